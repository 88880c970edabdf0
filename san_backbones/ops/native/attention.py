"""Fused footprint attention by the compiled loops of footprint.c and backward.c."""
import ctypes
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import geometry
from ..folding import Shape, pad, round_up, row
from . import library
from .linear import INT8_VNNI, pack_int8

MAX_GRADIENT_ELEMENTS = 1 << 22
"""Bound on the partial sums of parameter gradients that a backward pass keeps (float32 elements)."""

ATTENTION, STATISTICS, STATISTICS_BACKWARD = range(3)  # modes of struct backward
WHOLE, TO_HIDDEN, FROM_HIDDEN = range(3)  # enum part of footprint.h

_Tensors = Sequence[Any]  # tensors, and None for one that is absent


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
    last = x.storage_offset() + sum(stride * (size - 1) for size, stride in zip(x.shape, x.stride()))
    if 4 * (last + library.width()) <= x.untyped_storage().nbytes():
        return x
    memory = x.new_empty(x.numel() + library.width())
    return memory[:x.numel()].view(x.shape).copy_(x)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _matrix(x: Tensor | None, row: int) -> library.Matrix:
    """Rows of x that lie `row` elements apart."""
    return library.Matrix(at=_address(x), row=row)


def _map(x: Tensor | None) -> library.Matrix:
    """A map, a row for each pixel."""
    return _matrix(x, 0 if x is None else row(x))


NARROW = {'pairwise': 32, 'patchwise': 16, 'weights': 4}
"""Channels of phi (weights: weight channels, FROM_HIDDEN) up to which vectors lie across pixels: measured with AVX2 and
AVX-512.
"""
GROUP_INT8 = 512
"""Channels of a patchwise relation that are rounded and multiplied together in 8 bits, about."""
NARROW_BACKWARD = {'pairwise': 16, 'patchwise': 8, 'weights': 4}
"""The same where gradients are computed."""


def _across_pixels(rel: int, width: int, narrow: int) -> bool:
    """Whether planes.h computes it: narrow relations, on maps that fill a vector."""
    return rel <= narrow and width >= library.width()


class RoundedGamma(NamedTuple):
    """gamma's matrices in 8 bits: what its products are."""
    products: ctypes.Array[library.Linear]  # with weight1, of a group of taps each, then with weight2
    tensors: list[Tensor]  # that they point to


def _product(weight: Tensor, tensors: list[Tensor], **after: Any) -> library.Linear:
    """That with a matrix (inner, columns)."""
    packed, scales = pack_int8(weight.t())
    kept = {name: x for name, x in after.items() if isinstance(x, Tensor)}
    tensors += [packed, *scales, *kept.values()]
    return library.Linear(
        kind=INT8_VNNI, inner=len(weight), columns=weight.shape[1], weight=packed.data_ptr(),
        column_scale=_address(scales.scale), column_sum=_address(scales.sum), limit=math.inf,
        **{**after, **{name: _address(x) for name, x in kept.items()}})


def round_gamma(shape: Shape, rel: int, folded: _Tensors) -> RoundedGamma | None:
    """gamma in 8 bits, where the loops have the relation and that is quicker; else None.

    Args:
        shape: What the attention is.
        rel: Channels of phi.
        folded: As `folding.fold_gamma` makes them.
    """
    _, _, weight1, shift2, weight2, bias2 = folded
    relation, area = shape.described, shape.area
    centre, tap = relation.centre_width(rel), relation.tap_width(rel, area)
    if rel <= NARROW[relation.form] or tap < rel or not library.has_int8():
        return None
    group = max(1, min(area, GROUP_INT8 // tap)) * tap
    if relation.form == 'pairwise':
        group = len(weight1)
    bounds = [0, *range(centre + group, len(weight1), group), len(weight1)]
    tensors: list[Tensor] = []
    products = [_product(weight1[begin:end], tensors, add=begin > 0) for begin, end in itertools.pairwise(bounds[:-1])]
    products.append(_product(weight1[bounds[-2]:], tensors, add=len(bounds) > 2, out_scale=torch.ones_like(shift2),
                             out_shift=shift2))
    products.append(_product(weight2.flatten(1), tensors, bias=bias2.flatten()))
    return RoundedGamma((library.Linear * len(products))(*products), tensors)


class _Arguments:
    """struct task, and the tensors it points to."""

    def __init__(self, shape: Shape, maps: _Tensors, folded: _Tensors, narrow: dict[str, int], part: int = WHOLE,
                 between: Tensor | None = None):
        floats: _Tensors = [None if x is None else _to_float(x) for x in maps]
        batch, height, width, _ = next(x.shape for x in floats if x is not None)
        rel, out = (0 if x is None else x.shape[3] for x in (floats[0], floats[2]))
        reach = geometry.padding(shape.kernel_size, shape.dilation)
        query, key, place = (_readable(floats[i]) for i in (0, 1, 3))
        scale1, shift1 = (_readable(x) for x in folded[:2])
        weight1, shift2, weight2, bias2 = folded[2:]
        rows, columns = _reflection_index(height, reach), _reflection_index(width, reach)
        self.tensors = (query, key, floats[2], place, between, scale1, shift1, *folded[2:], rows, columns)  # outlive it
        relation, hidden = shape.described, _padded(shape.hidden)
        form, code = library.codes(relation.form, relation.name)
        planes = _across_pixels(shape.channels, width, narrow['weights']) if part == FROM_HIDDEN \
            else _across_pixels(rel, width, narrow[relation.form])
        self.task = library.Task(
            form=form, relation=code, part=part, absolute=shape.absolute, batch=batch, height=height, width=width,
            kernel=shape.kernel_size, dilation=shape.dilation, rel=rel, centre=relation.centre_width(rel),
            tap=relation.tap_width(rel, shape.area) if rel else 0, hidden=hidden, hidden_used=shape.hidden,
            lanes=shape.lanes, weight_channels=shape.channels, out=out, planes=planes,
            query=_map(query), key=_map(key), value=_map(floats[2]), between=_map(between), place=_map(place),
            scale1=_address(scale1), shift1=_address(shift1), shift2=_address(shift2), bias2=_address(bias2),
            weight1=_matrix(weight1, hidden), weight2=_matrix(weight2, 0 if bias2 is None else bias2.numel()),
            rows=_address(rows), columns=_address(columns))


def _run_backward(shape: Shape, maps: _Tensors, folded: _Tensors, mode: int, gradient: Tensor | None,
                  part: int = WHOLE, between: Tensor | None = None, d_between: Tensor | None = None) -> list[Tensor]:
    """Gradients of the maps and of folded gamma; for STATISTICS, the sums of the hidden vectors and their squares."""
    arguments = _Arguments(shape, maps, folded, NARROW if mode == STATISTICS else NARROW_BACKWARD, part, between)
    task, like = arguments.task, next(x for x in maps if x is not None)
    _, _, weight1, _, weight2, bias2 = folded
    inputs, hidden = 0 if weight1 is None else weight1.shape[0], task.hidden
    padded = _padded(inputs)
    columns = 0 if bias2 is None else bias2.numel()
    sizes = [padded, padded, inputs * hidden, hidden, task.hidden_used * columns, columns]
    band = max(1, task.dilation * (task.kernel - 1))  # twice what a footprint reaches to either side
    units = task.batch * ((task.height + 2 * band - 1) // (2 * band))
    slots = max(1, min(units, 64, max(4, MAX_GRADIENT_ELEMENTS // sum(sizes))))
    outputs: list[Any] = [None] * 4
    parameters: Any = None
    sums: Any = None
    if mode == STATISTICS:
        sums = like.new_zeros(slots, 2, hidden, dtype=torch.float64)
    else:
        outputs = [None if x is None else _zeros(x, task.batch, *x.shape[1:3], _padded(x.shape[3]) if i < 2 and not
                                                 task.planes else x.shape[3]) for i, x in enumerate(maps)]
        parameters = _zeros(like, slots, sum(sizes))
    weight1_t = None if weight1 is None else pad(weight1[:, :task.hidden_used].t(), padded).contiguous()
    weight2_t = None if weight2 is None else pad(weight2.flatten(1).t(), hidden).contiguous()
    d_query, d_key, d_value, d_place = map(_map, outputs)
    backward = library.Backward(
        task=task, mode=mode, inputs=inputs, inputs_padded=padded, slots=slots, parameters=sum(sizes), band=band,
        gradient=_matrix(gradient, task.out if mode == ATTENTION else hidden),
        weight1_t=_matrix(weight1_t, padded), weight2_t=_matrix(weight2_t, hidden), d_between=_map(d_between),
        d_query=d_query, d_key=d_key, d_value=d_value, d_place=d_place,
        d_parameters=_address(parameters), sums=_address(sums))
    library.run('san_backward', backward)
    if mode == STATISTICS:
        return [sums.sum(0)]
    d_scale1, d_shift1, d_weight1, d_shift2, d_weight2, d_bias2 = parameters.sum(0).split(sizes)
    parts = [d_scale1[:inputs], d_shift1[:inputs], d_weight1, d_shift2, d_weight2, d_bias2]
    # copies: an operator's outputs share no memory. What has no part in this is None
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
    result = maps[2].new_empty(maps[2].shape, dtype=torch.float32)
    call = prepare(shape, maps, folded, shift, result)
    library.run(call.name, call.task)
    return result


def prepare(shape: Shape, maps: _Tensors, folded: _Tensors, shift: Tensor | None, result: Tensor,
            rounded: RoundedGamma | None = None) -> library.Call:
    """The call that writes `output` of the same arguments to `result`, (N, H, W, m), float32, contiguous; with
    `rounded`, gamma's products are in 8 bits.
    """
    arguments = _Arguments(shape, maps, folded, NARROW)
    arguments.task.output = _map(result)
    arguments.task.shift = _address(shift)
    if rounded is not None:
        arguments.task.eight = rounded.products
    return library.Call('san', arguments.task,
                        (*arguments.tensors, shift, result, *([] if rounded is None else rounded.tensors)))


def gradients(shape: Shape, maps: _Tensors, folded: _Tensors, gradient: Tensor) -> list[Tensor]:
    """Of the pairwise form, those of the maps, (N, H, W, C) or None, place's for each image; then those of `folded`,
    without Nones.
    """
    return _run_backward(shape, maps, folded, ATTENTION, gradient.float())


def hidden(shape: Shape, maps: _Tensors, folded: _Tensors) -> Tensor:
    """Hidden vectors of the patchwise form, u = weight1 relu(norm1(delta)), (N, H, W, hidden) in float32.

    Args:
        shape: What the attention is.
        maps: query and key.
        folded: scale1, shift1 and weight1.
    """
    result = maps[0].new_empty((*maps[0].shape[:3], shape.hidden), dtype=torch.float32)
    nothing = _zeros(folded[2], folded[2].shape[1])
    arguments = _Arguments(shape, (*maps, None, None), (*folded, nothing, None, None), NARROW, TO_HIDDEN, result)
    library.run('san', arguments.task)
    return result


def hidden_gradients(shape: Shape, maps: _Tensors, folded: _Tensors, gradient: Tensor) -> list[Tensor]:
    """Those of query and key, (N, H, W, C), then those of `folded`; arguments as `hidden`'s."""
    gradients = _run_backward(shape, (*maps, None, None), (*folded, None, None, None), STATISTICS_BACKWARD, None,
                              TO_HIDDEN, d_between=gradient.float())
    return [*gradients[:2], *gradients[4:]]


def from_hidden(shape: Shape, middle: Tensor, value: Tensor, folded: _Tensors) -> Tensor:
    """The attention of the patchwise form, (N, H, W, m) in float32.

    Args:
        shape: What the attention is.
        middle: relu(norm2(u)), (N, H, W, hidden), float32.
        value: As `folding.channels_last` makes it.
        folded: weight2 and bias2.
    """
    result = value.new_empty(value.shape, dtype=torch.float32)
    arguments = _Arguments(shape, (None, None, value, None), (None, None, None, None, *folded), NARROW, FROM_HIDDEN,
                           middle)
    arguments.task.output = _map(result)
    library.run('san', arguments.task)
    return result


def from_hidden_gradients(shape: Shape, middle: Tensor, value: Tensor, folded: _Tensors,
                          gradient: Tensor) -> list[Tensor]:
    """Those of middle and value, then those of `folded`; arguments as `from_hidden`'s."""
    d_middle = torch.empty_like(middle)
    gradients = _run_backward(shape, (None, None, value, None), (None, None, None, None, *folded), ATTENTION,
                              gradient.float(), FROM_HIDDEN, middle, d_middle)
    return [d_middle, gradients[2], *gradients[4:]]


def sums(shape: Shape, maps: _Tensors, folded: _Tensors) -> Tensor:
    """Of the pairwise form, sums of the hidden vectors and of their squares, (2, hidden or more) in float64; only what
    leads to them is given: value, shift2, weight2 and bias2 are None.
    """
    return _run_backward(shape, maps, folded, STATISTICS, None)[0]


def sums_gradients(shape: Shape, maps: _Tensors, folded: _Tensors, slopes: Tensor) -> list[Tensor]:
    """As `gradients`, for a loss whose gradient by a hidden vector u is slopes[0] + slopes[1] * u."""
    return _run_backward(shape, maps, folded, STATISTICS_BACKWARD, slopes)
