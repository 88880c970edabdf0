"""Linear maps over the channels of a map by the compiled loops of linear.c, with the norms and ReLUs around them."""
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..folding import as_rows, pad, row
from . import library

__all__ = ['linear', 'pack', 'unpack']


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
) -> None:
    """Writes W f(x) + b to `output` (with `add`: adds W f(x) to it), then g of that.

    Tensors are float32 and on the CPU, vectors contiguous; nothing is checked.

    Args:
        x: (N, H, W, C).
        packed: W, as `pack` makes it.
        bias: (D,) or None.
        before: Scale and shift (C,) of f(x) = min(relu(scale x + shift), limit); None for x itself.
        limit: See `before`; None for no limit.
        output: (N, H, W, D), contiguous.
        add: Whether to add to what is there.
        after: Scale and shift (D,) of g(y) = relu(scale y + shift); None for y itself.
    """
    scale, shift = before or (None, None)
    out_scale, out_shift = after or (None, None)
    columns, x = output.shape[3], as_rows(x)
    library.run('san_linear', library.Linear(
        pixels=output.numel() // columns, inner=x.shape[3], columns=columns,
        input=library.Matrix(at=x.data_ptr(), row=row(x)), scale=_address(scale), shift=_address(shift),
        weight=packed.data_ptr(), bias=_address(bias), output=library.Matrix(at=output.data_ptr(), row=columns),
        add=add, out_scale=_address(out_scale), out_shift=_address(out_shift),
        limit=math.inf if limit is None else limit))
