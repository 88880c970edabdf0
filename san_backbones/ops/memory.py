"""Memory of large maps that is used again."""
import math
import weakref

import torch
from torch import Tensor

__all__ = ['Memory']

LARGE = 4 << 20
"""Bytes of a map from which on its memory is kept. Smaller ones are left to the C library; large blocks it gives back
to the system, which fills each page of the next one with zeros when it is first touched."""
KEPT = 6
"""Free blocks that are kept at most: what the stages of a network use in turn."""


class Memory:
    """Makes maps in the memory of earlier ones that are gone.

    A map may be kept, shared and written to like any other: its memory is free when the last tensor in it is gone, and
    not before. It cannot be resized. Threads may share one Memory; a copy of it begins empty.
    """

    def __init__(self) -> None:
        self._free: dict[int, Tensor] = {}  # blocks, by their address, the oldest first

    def __reduce__(self) -> tuple[type['Memory'], tuple[()]]:
        return Memory, ()

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor of that shape, contiguous, of the dtype and on the device of `like`, with whatever was there."""
        size = math.prod(shape) * like.element_size()
        if size < LARGE or like.device.type != 'cpu':
            return like.new_empty(shape)
        block = self._block(size)
        array = block.numpy()  # the map's owner: gone when the last tensor in the map is
        weakref.finalize(array, self._take_back, block).atexit = False
        return torch.from_numpy(array)[:size].view(like.dtype).view(shape)

    def clear(self) -> None:
        """Lets go of blocks that no map is in."""
        self._free.clear()

    def _block(self, size: int) -> Tensor:
        for address, block in list(self._free.items()):
            if size <= block.numel() <= 2 * size and self._free.pop(address, None) is not None:
                return block
        return torch.empty(size, dtype=torch.uint8, device='cpu')

    def _take_back(self, block: Tensor) -> None:
        self._free[block.data_ptr()] = block
        for address in list(self._free)[:-KEPT]:
            self._free.pop(address, None)
