"""Linear maps over the channels of a map by the compiled loops of linear.c, with the norms and ReLUs around them."""
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..folding import as_rows, pad, round_up, row
from . import library

__all__ = ['Int8', 'linear', 'pack', 'pack_bfloat16', 'pack_int8', 'unpack', 'unpack_bfloat16', 'unpack_int8']

GROUP = 4
"""Bytes of channels of a column that lie together in 8 bits and in bfloat16."""
LINE = 64
"""To a multiple of which they are filled up."""
FLOAT32, INT8_VNNI, INT8_AMX, BFLOAT16_AMX = range(4)
"""By their numbers in enum weights of linear.c."""


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
    scale = weight.abs().amax(1) / 127
    rounded = (weight / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return _in_groups(rounded.to(torch.int8)), Int8(scale, rounded.sum(1) * scale)


def _in_groups(weight: Tensor) -> Tensor:
    columns, inner = weight.shape
    size = weight.element_size()
    filled = pad(weight, round_up(inner, LINE // size))
    return torch.cat([
        pad(filled[column:column + panel].t(), panel).view(-1, GROUP // size, panel).transpose(1, 2).flatten()
        for column, panel in _panels(columns)])


def _out_of_groups(packed: Tensor, columns: int, inner: int) -> Tensor:
    size = packed.element_size()
    row = round_up(inner, LINE // size)
    parts = [packed[column * row:(column + panel) * row].view(-1, panel, GROUP // size).transpose(1, 2)
             .reshape(row, panel).t() for column, panel in _panels(columns)]
    return torch.cat(parts)[:columns, :inner]


def pack_bfloat16(weight: Tensor) -> Tensor:
    """weight (columns, inner), bfloat16, as the loops read it: a copy."""
    return _in_groups(weight)


def unpack_bfloat16(packed: Tensor, columns: int, inner: int) -> Tensor:
    """The weight (columns, inner) that was packed."""
    return _out_of_groups(packed, columns, inner)


def unpack_int8(packed: Tensor, scales: Int8, inner: int) -> Tensor:
    """The weight (columns, inner) that was packed, as it was rounded."""
    return _out_of_groups(packed, len(scales.scale), inner) * scales.scale[:, None]


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
        halve: bool = False,
) -> library.Call:
    """The call that writes W f(x) + b to `output` (with `add`: adds W f(x) to it), then g of that.

    Tensors are float32 and on the CPU, vectors contiguous; nothing is checked.

    Args:
        x: (N, H, W, C).
        packed: W, as `pack` makes it, `pack_int8` or, where there is AMX, `pack_bfloat16`: f(x) is then rounded to
            bfloat16.
        bias: (D,) or None.
        before: Scale and shift (C,) of f(x) = min(relu(scale x + shift), limit); None for x itself.
        limit: See `before`; None for no limit.
        output: (N, H, W, D), contiguous.
        add: Whether to add to what is there.
        after: Scale and shift (D,) of g(y) = relu(scale y + shift); None for y itself.
        int8: What belongs to W of `pack_int8`: each pixel of f(x) is then rounded to 8 bits, x = zero + scale q with q
            in 0..255, zero and scale from the smallest (at most 0) and the largest of its channels; needs `has_int8`.
            A pixel that is not finite gives NaN.
        halve: Whether x, which has two pixels a side at least, is max_pool2d'd by 2 first.
    """
    scale, shift = before or (None, None)
    out_scale, out_shift = after or (None, None)
    columns, x = output.shape[3], as_rows(x)
    sizes = dict(pooled_width=output.shape[2], pooled_height=output.shape[1], from_width=x.shape[2],
                 from_height=x.shape[1]) if halve else {}
    int8_kind = INT8_AMX if library.has_amx() else INT8_VNNI
    task = library.Linear(
        kind={torch.float32: FLOAT32, torch.int8: int8_kind, torch.bfloat16: BFLOAT16_AMX}[packed.dtype],
        pixels=output.numel() // columns, inner=x.shape[3], columns=columns,
        input=library.Matrix(at=x.data_ptr(), row=row(x)), scale=_address(scale), shift=_address(shift),
        weight=packed.data_ptr(), column_scale=_address(int8 and int8.scale), column_sum=_address(int8 and int8.sum),
        bias=_address(bias), output=library.Matrix(at=output.data_ptr(), row=columns),
        add=add, out_scale=_address(out_scale), out_shift=_address(out_shift),
        limit=math.inf if limit is None else limit, **sizes)
    tensors = (x, packed, bias, scale, shift, out_scale, out_shift, output)
    return library.Call('san_linear', task, tensors if int8 is None else (*tensors, *int8))
