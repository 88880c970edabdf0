"""The pooling of the stages."""
import torch
import torch.nn.functional as F
from torch import nn

from .ops import halve

__all__ = ['Pool']


class Pool(nn.MaxPool2d):
    """2x2 max pooling of stride 2. A side of one pixel stays one pixel, so that images may have any size."""

    def __init__(self):
        super().__init__(2, 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, C, max(H // 2, 1), max(W // 2, 1))."""
        if self.is_by_twos():
            return halve(input)
        return F.max_pool2d(  # type: ignore[call-overload]
            input, self.kernel_size, self.stride, self.padding, self.dilation, ceil_mode=self.ceil_mode,
            return_indices=self.return_indices)

    def is_by_twos(self) -> bool:
        """Whether its attributes are still those of 2x2 pooling."""
        return not self.ceil_mode and not self.return_indices and self.kernel_size == 2 and self.stride == 2 \
            and self.padding == 0 and self.dilation == 1
