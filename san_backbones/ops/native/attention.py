"""Fused footprint attention by the compiled loops of footprint.c and backward.c."""
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import geometry
from ..folding import Shape, pad, round_up, row
from . import library

MAX_GRADIENT_NUMBERS = 1 << 22
"""Bound on the partial sums of parameter gradients that a backward pass keeps (float32 numbers)."""

ATTENTION, STATISTICS, STATISTICS_BACKWARD = range(3)  # modes of struct backward

_Tensors = Sequence[Any]  # tensors, and None in the place of one that there is none of


_reflection_index = functools.lru_cache(maxsize=64)(geometry.reflection_index)


def _padded(size: int) -> int:
    return round_up(size, library.width())


def _to_float(x: Tensor) -> Tensor:
    # a converted map has its channels last too, which `preserve_format` does not promise of one that overlaps itself
    return x if x.dtype == torch.float32 else x.to(torch.float32, memory_format=torch.contiguous_format)


def _zeros(like: Tensor, *size: int) -> Tensor:
    return like.new_zeros(size, dtype=torch.float32)  # whatever the default dtype and device


def _readable(x: Tensor | None) -> Tensor | None:
    """x, or a copy of it, with memory behind it, since the loops read whole vectors beyond its end."""
    if x is None or (x.dim() == 4 and x.shape[-1] % library.width() == 0):
        return x
    memory = x.new_empty(x.numel() + library.width())
    return memory[:x.numel()].view(x.shape).copy_(x)


class _Arguments:
    """struct task, and the tensors it points to."""

    def __init__(self, shape: Shape, maps: _Tensors, folded: _Tensors, out: int):
        floats: _Tensors = [None if x is None else _to_float(x) for x in maps]
        query, key, value, place = floats
        batch, height, width, rel = query.shape
        reach = geometry.padding(shape.kernel_size, shape.dilation)
        scale1, shift1, *rest = folded
        self.tensors = (  # outlive the task, which has their addresses
            _readable(query), _readable(key), value, _readable(place), _readable(scale1), _readable(shift1), *rest,
            _reflection_index(height, reach), _reflection_index(width, reach))
        self.task = library.Task(
            shape.relation, shape.absolute, batch, height, width, rel, _padded(shape.hidden), shape.lanes, out,
            shape.kernel_size, shape.dilation, *(0 if x is None else row(x) for x in self.tensors[:3]),
            *(None if x is None else x.data_ptr() for x in self.tensors), None, None, shape.hidden, 0, 0, 0)


def _run_backward(shape: Shape, maps: _Tensors, folded: _Tensors,
                  mode: int, gradient: Tensor | None) -> list[Tensor]:
    """Gradients of the maps and of folded gamma; for STATISTICS, the sums of the hidden vectors and their squares."""
    query, key, value, place = maps
    arguments = _Arguments(shape, maps, folded, 0 if value is None else value.shape[3])
    task = arguments.task
    _, _, weight1, _, weight2, bias2 = folded
    inputs, padded, hidden = weight1.shape[0], _padded(weight1.shape[0]), task.hidden
    columns = 0 if bias2 is None else bias2.numel()
    sizes = [padded, padded, inputs * hidden, hidden, task.hidden_used * columns, columns]
    band = max(1, task.dilation * (task.kernel - 1))  # twice what a footprint reaches to either side
    units = task.batch * ((task.height + 2 * band - 1) // (2 * band))
    slots = max(1, min(units, 64, max(4, MAX_GRADIENT_NUMBERS // sum(sizes))))
    outputs: list[Any] = [None] * 4
    parameters: Any = None
    sums: Any = None
    if mode == STATISTICS:
        sums = query.new_zeros(slots, 2, hidden, dtype=torch.float64)
    else:
        outputs = [None if x is None else _zeros(x, task.batch, *x.shape[1:3], _padded(x.shape[3]) if i < 2 else
                                                 x.shape[3]) for i, x in enumerate(maps)]
        parameters = _zeros(query, slots, sum(sizes))
    transposed = [pad(weight1[:, :task.hidden_used].t(), padded).contiguous(),
                  None if weight2 is None else pad(weight2.flatten(1).t(), hidden).contiguous()]
    backward = library.Backward(
        task, mode, inputs, padded, _padded(query.shape[3]), slots, sum(sizes), band, 0,
        *(None if x is None else x.data_ptr() for x in (gradient, *transposed, *outputs, parameters, sums)))
    library.run('san_backward', backward)
    if mode == STATISTICS:
        return [sums.sum(0)]
    d_scale1, d_shift1, d_weight1, d_shift2, d_weight2, d_bias2 = parameters.sum(0).split(sizes)
    parts = [d_scale1[:inputs], d_shift1[:inputs], d_weight1, d_shift2, d_weight2, d_bias2]
    # copies: an operator's outputs share no memory. weight2 and bias2 are None for the hidden vectors' statistics
    outputs = [None if x is None else d[..., :x.shape[3]] for d, x in zip(outputs, maps)]
    return [*outputs, *(part.clone().view(x.shape) for part, x in zip(parts, folded) if x is not None)]


def output(shape: Shape, maps: _Tensors, folded: _Tensors, shift: Tensor | None) -> Tensor:
    """The attention, (N, H, W, m) in float32; relu(y + shift) where `shift` is given.

    Args:
        shape: What the attention is.
        maps: query, key, value and place, as `folding.channels_last` makes them; place may be None.
        folded: As `folding.fold_gamma` makes them.
        shift: (m,) or None.
    """
    value = maps[2]
    arguments = _Arguments(shape, maps, folded, value.shape[3])
    result = value.new_empty(value.shape, dtype=torch.float32)
    arguments.task.output = result.data_ptr()
    arguments.task.shift = None if shift is None else shift.data_ptr()
    library.run('san', arguments.task)
    return result


def gradients(shape: Shape, maps: _Tensors, folded: _Tensors, gradient: Tensor) -> list[Tensor]:
    """Those of the maps, (N, H, W, C) or None, place's for each image; then those of `folded`, without Nones."""
    return _run_backward(shape, maps, folded, ATTENTION, gradient.float())


def sums(shape: Shape, maps: _Tensors, folded: _Tensors) -> Tensor:
    """Sums of the hidden vectors and of their squares, (2, hidden or more) in float64; only what leads to them is
    given: value, shift2, weight2 and bias2 are None.
    """
    return _run_backward(shape, maps, folded, STATISTICS, None)[0]


def sums_gradients(shape: Shape, maps: _Tensors, folded: _Tensors, slopes: Tensor) -> list[Tensor]:
    """As `gradients`, for a loss whose gradient by a hidden vector u is slopes[0] + slopes[1] * u."""
    return _run_backward(shape, maps, folded, STATISTICS_BACKWARD, slopes)
