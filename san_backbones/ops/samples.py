"""Elements of tensors on the CPU that are compared with what they were."""
import torch
from torch import Tensor

from .native import library

__all__ = ['Samples']


class Samples:
    """Elements that are compared with what they were; `views` are vectors on the CPU, read in place."""

    def __init__(self, views: list[Tensor]):
        self.views = views
        self.expected = self._bytes()
        self.vectors: Tensor | None = None
        if views and library.unavailable() is None:
            self.vectors = torch.tensor([(view.data_ptr(), view.stride(0), len(view), view.element_size())
                                         for view in views], device='cpu')

    def _bytes(self) -> Tensor:
        # copies: a vector of one element is contiguous whatever its stride, and then not to be seen as bytes
        parts = [view.clone(memory_format=torch.contiguous_format).view(torch.uint8) for view in self.views]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device='cpu')

    def unchanged(self) -> bool:
        """Whether all have the bits that they had. The memory of the views must be there."""
        if self.vectors is not None:  # torch.cat of many short views takes longer than to read them
            return library.unchanged(self.vectors, self.expected)
        return torch.equal(self._bytes(), self.expected)
