"""Elements of tensors on the CPU that are compared with what they were."""
import torch
from torch import Tensor

from .native import library

__all__ = ['Samples']


class Samples:
    """Elements that are compared with what they were; `views` are vectors on the CPU, read in place."""

    def __init__(self, views: list[Tensor]):
        self.views = views
        self.expected = torch.cat(views) if views else torch.empty(0, device='cpu')
        self.vectors: Tensor | None = None
        if views and library.unavailable() is None and all(view.dtype == torch.float32 for view in views):
            self.vectors = torch.tensor([(view.data_ptr(), view.stride(0), len(view)) for view in views], device='cpu')

    def unchanged(self) -> bool:
        """Whether all have the values that they had. The memory of the views must be there."""
        if self.vectors is not None:  # torch.cat of many short views takes longer than to read them
            return library.unchanged(self.vectors, self.expected)
        return torch.equal(torch.cat(self.views), self.expected) if self.views else True
