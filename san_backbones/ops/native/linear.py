"""Linear maps over the channels of a map by the compiled loops of linear.c, with the norms and ReLUs around them."""
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..folding import as_rows, pad, round_up, row
from . import library

__all__ = ['Int8', 'linear', 'pack', 'pack_int8', 'unpack', 'unpack_int8']

GROUP = 4
"""Channels of a column that lie together in 8 bits."""
LINE = 64
"""To a multiple of which the channels are filled up in 8 bits."""


class Int8(NamedTuple):
    """What makes weights of rounded ones, for each column: (D,), float32."""
    scale: Tensor
    sum: Tensor  # of the rounded weights, times their scale


def _panels(columns: int) -> Iterator[tuple[int, int]]:
    """First column and width of each panel, as linear.c has them."""
    width, column = library.width(), 0
    while column < columns:
        left = -(-(columns - column) // width)
        panel = library.panel() if left * width >= library.panel() else width * min(left, 2)
        yield column, panel
        column += panel


def pack(weight: Tensor) -> Tensor:
    """weight (columns, inner), float32, as the loops read it: a copy."""
    columns, inner = weight.shape
    return torch.cat([pad(weight[column:column + panel].t(), panel).flatten() for column, panel in _panels(columns)])


def unpack(packed: Tensor, columns: int, inner: int) -> Tensor:
    """The weight (columns, inner) that was packed."""
    parts = [packed[column * inner:(column + panel) * inner].view(inner, panel).t()
             for column, panel in _panels(columns)]
    return torch.cat(parts)[:columns]


def pack_int8(weight: Tensor) -> tuple[Tensor, Int8]:
    """weight (columns, inner), float32, rounded to -127..127 with one scale for each column, as the loops read it."""
    columns, inner = weight.shape
    scale = weight.abs().amax(1) / 127
    rounded = (weight / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    filled = pad(rounded, round_up(inner, LINE)).to(torch.int8)
    parts = [pad(filled[column:column + panel].t(), panel).view(-1, GROUP, panel).transpose(1, 2).flatten()
             for column, panel in _panels(columns)]
    return torch.cat(parts), Int8(scale, rounded.sum(1) * scale)


def unpack_int8(packed: Tensor, scales: Int8, inner: int) -> Tensor:
    """The weight (columns, inner) that was packed, as it was rounded."""
    columns, row = len(scales.scale), round_up(inner, LINE)
    parts = [packed[column * row:(column + panel) * row].view(-1, panel, GROUP).transpose(1, 2).reshape(row, panel).t()
             for column, panel in _panels(columns)]
    return torch.cat(parts)[:columns, :inner] * scales.scale[:, None]


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def linear(
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        before: tuple[Tensor, Tensor] | None,
        limit: float | None,
        output: Tensor,
        add: bool,
        after: tuple[Tensor, Tensor] | None,
        int8: Int8 | None = None,
) -> library.Call:
    """The call that writes W f(x) + b to `output` (with `add`: adds W f(x) to it), then g of that.

    Tensors are float32 and on the CPU, vectors contiguous; nothing is checked.

    Args:
        x: (N, H, W, C).
        packed: W, as `pack` makes it, or `pack_int8`.
        bias: (D,) or None.
        before: Scale and shift (C,) of f(x) = min(relu(scale x + shift), limit); None for x itself.
        limit: See `before`; None for no limit.
        output: (N, H, W, D), contiguous.
        add: Whether to add to what is there.
        after: Scale and shift (D,) of g(y) = relu(scale y + shift); None for y itself.
        int8: What belongs to W of `pack_int8`: each pixel of f(x) is then rounded to 8 bits, x = zero + scale q with q
            in 0..255, zero and scale from the smallest (at most 0) and the largest of its channels; needs `has_int8`.
            A pixel that is not finite gives NaN.
    """
    scale, shift = before or (None, None)
    out_scale, out_shift = after or (None, None)
    columns, x = output.shape[3], as_rows(x)
    task = library.Linear(
        pixels=output.numel() // columns, inner=x.shape[3], columns=columns,
        input=library.Matrix(at=x.data_ptr(), row=row(x)), scale=_address(scale), shift=_address(shift),
        weight=packed.data_ptr(), column_scale=_address(int8 and int8.scale), column_sum=_address(int8 and int8.sum),
        bias=_address(bias), output=library.Matrix(at=output.data_ptr(), row=columns),
        add=add, out_scale=_address(out_scale), out_shift=_address(out_shift),
        limit=math.inf if limit is None else limit, amx=int8 is not None and library.has_amx())
    tensors = (x, packed, bias, scale, shift, out_scale, out_shift, output)
    return library.Call('san_linear', task, tensors if int8 is None else (*tensors, *int8))
