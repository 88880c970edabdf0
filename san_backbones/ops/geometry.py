"""Footprints, reflection and coordinates: where the neighbours of a pixel are.

Every backend shares these definitions. A *footprint* of `kernel_size` k and `dilation` d holds the k x k
pixels around a centre, d apart; beyond the border the map is mirrored without repeating the edge, and mirrored again
where it is narrower than the footprint reaches.
"""

import torch
from torch import Tensor

__all__ = ['coordinates', 'footprint', 'padding', 'reflect_pad', 'reflection_index']


def padding(kernel_size: int, dilation: int) -> int:
    """Pixels that a footprint reaches beyond its centre on each side."""
    return dilation * (kernel_size - 1) // 2


def reflection_index(size: int, pad: int, device: torch.device | None = None) -> Tensor:
    """Source index of every position of an axis padded by reflection.

    The index is a triangle wave of period `2 * (size - 1)`: equal to `torch.nn.functional.pad(mode='reflect')` where
    that is defined (pad < size), and the same mirror applied again beyond it. An axis of one pixel repeats it.

    Args:
        size: Length of the axis, in pixels.
        pad: Pixels added on each side.
        device: Where the index is made.

    Returns:
        int64 tensor of shape (size + 2 * pad,) with values in [0, size).
    """
    period = max(2 * (size - 1), 1)
    # counted from a whole number of periods before the axis: inductor of torch 2.15 breaks on negative numbers here
    place = (torch.arange(size + 2 * pad, device=device) + (period - 1) * pad).remainder(period)
    return torch.minimum(place, period - place)


def reflect_pad(x: Tensor, pad: int) -> Tensor:
    """Pads the last two axes of x (..., H, W) by repeated reflection to (..., H + 2 pad, W + 2 pad)."""
    if pad == 0:
        return x
    rows = reflection_index(x.shape[-2], pad, x.device)
    columns = reflection_index(x.shape[-1], pad, x.device)
    return x.index_select(-2, rows).index_select(-1, columns)


def footprint(padded: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """The footprint of every pixel, as a view that copies nothing.

    Args:
        padded: (N, C, H + 2 pad, W + 2 pad) as `reflect_pad` returns it.
        kernel_size: k.
        dilation: Pixels between neighbours of a footprint.

    Returns:
        (N, C, k, k, H, W): element [n, c, a, b, y, x] is the neighbour in row a, column b of pixel (y, x).
    """
    reach = dilation * (kernel_size - 1)
    height, width = padded.shape[-2] - reach, padded.shape[-1] - reach
    return padded.unfold(2, height, dilation).unfold(3, width, dilation)


def _axis(size: int, step: float, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    index = torch.arange(size, dtype=dtype, device=device)
    last = index[-1:]  # not size - 1: where sizes are symbols or tensors, arithmetic on them is not everybody's
    if step > 0.:
        return (index - last / 2) * step
    last = last.clamp(min=1)
    return (2 * index - last) / last  # linspace(-1, 1, size), whose size torch.export cannot leave open


@torch.fx.wrap
def coordinates(x: Tensor, step: float = 0.) -> Tensor:
    """Pixel coordinates of the map x, before the learned position mapping.

    Args:
        x: (N, C, H, W); only its size, device and dtype count.
        step: Distance between neighbouring pixels; 0 spans [-1, 1] whatever the size, as the released models do.
            With a fixed step the origin is the centre of the map.

    Returns:
        (2, H, W), horizontal coordinate first, in float32 or, for float64 maps, float64: half precision cannot hold
        the differences.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    height, width = x.shape[-2], x.shape[-1]
    horizontal = _axis(width, step, dtype, x.device)
    vertical = _axis(height, step, dtype, x.device)
    return torch.stack([horizontal[None, :].expand(height, width), vertical[:, None].expand(height, width)])
