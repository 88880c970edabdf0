"""Fused footprint attention by the compiled loops of footprint.c and backward.c."""
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import geometry
from ..gamma import Affine, Gamma, Norm, Spec, fold, fold_batch, need_several_values, refuse_double_backward
from ..statistics import relation_statistics
from . import library

RELATIONS = {(True, 'subtraction'): 0, (True, 'summation'): 1, (True, 'hadamard'): 2, (True, 'concatenation'): 3,
             (True, 'dot'): 4, (False, 'concatenation'): 5, (False, 'star'): 6}
MAX_GRADIENT_NUMBERS = 1 << 22
"""Bound on the partial sums of parameter gradients that a backward pass keeps (float32 numbers)."""

ATTENTION, STATISTICS, STATISTICS_BACKWARD = range(3)  # modes of struct backward

_Tensors = Sequence[Any]  # tensors, and None in the place of one that there is none of


_reflection_index = functools.lru_cache(maxsize=64)(geometry.reflection_index)


def _pad(x: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, size - x.shape[-1]))


def _repeat(x: Tensor, lanes: int) -> Tensor:
    return x.repeat(*(1,) * (x.dim() - 1), lanes // x.shape[-1])


def _round_up(size: int) -> int:
    return (size + library.width() - 1) // library.width() * library.width()


class _Shape(NamedTuple):
    """What an attention is, in the numbers that an operator's arguments can be."""
    relation: int  # of RELATIONS
    absolute: int  # positions p_j instead of p_i - p_j
    kernel_size: int
    dilation: int
    hidden: int  # width of the middle of gamma, without padding
    lanes: int

    @classmethod
    def of(cls, spec: Spec, hidden: int, lanes: int) -> list[int]:
        return [RELATIONS[spec.pairwise, spec.relation], int(spec.position == 'absolute'), spec.kernel_size,
                spec.dilation, hidden, lanes]


def _folded(norm1: Affine, norm2: Affine, gamma: Gamma, spec: Spec) -> tuple[list[int], list[Tensor]]:
    """gamma as the loops read it: scale1, shift1, weight1, shift2, weight2, bias2. Differentiable."""
    area = spec.kernel_size ** 2
    scale1, shift1 = norm1
    scale2, shift2 = norm2
    weight1 = (gamma.weight1.flatten(1).float() * scale2[:, None]).t()  # (inputs, hidden)
    weight2, bias2 = gamma.weight2.flatten(1).float().t(), gamma.bias2.float()
    hidden = weight1.shape[1]
    weight_channels = weight2.shape[1] // (1 if spec.pairwise else area)
    lanes = math.lcm(weight_channels, library.width())
    scale1, shift1, weight1 = (_in_loop_order(x, spec) for x in (scale1, shift1, weight1))
    if not spec.pairwise:
        weight2 = weight2.view(hidden, weight_channels, area).transpose(1, 2)
        bias2 = bias2.view(weight_channels, area).t()
    folded = [scale1, shift1, _pad(weight1, _round_up(hidden)), _pad(shift2, _round_up(hidden)),
              _repeat(weight2, lanes), _repeat(bias2, lanes)]
    return _Shape.of(spec, hidden, lanes), [x.contiguous() for x in folded]


def _in_loop_order(x: Tensor, spec: Spec) -> Tensor:
    """Relation channels (the first axis of x): psi's come as c * k^2 + o, the loops write them as o * r + c."""
    if spec.pairwise or spec.relation != 'concatenation':
        return x
    area = spec.kernel_size ** 2
    rel = x.shape[0] // (area + 1)
    psi = x[rel:].unflatten(0, (rel, area)).transpose(0, 1).flatten(0, 1)
    return torch.cat([x[:rel], psi])


def _channels_last(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H, W, C) in float32, without a copy where that is a slice of the channels of such a map."""
    x = x.detach().float().permute(0, 2, 3, 1)
    _, height, width, _ = x.shape
    row = x.stride(2)
    return x if x.stride() == (height * width * row, width * row, row, 1) else x.contiguous()


def _row(x: Tensor) -> int:
    """Numbers from one pixel of a map from `_channels_last` to the next; the stride of an axis of one is arbitrary."""
    return x.shape[3] if x.is_contiguous() else x.stride(2)


def _readable(x: Tensor | None) -> Tensor | None:
    """x, or a copy of it, with memory behind it, since the loops read whole vectors beyond its end."""
    if x is None or (x.dim() == 4 and x.shape[-1] % library.width() == 0):
        return x
    memory = torch.empty(x.numel() + library.width(), dtype=x.dtype)
    return memory[:x.numel()].view(x.shape).copy_(x)


def _channels_first(x: Tensor, like: Tensor) -> Tensor:
    """(N, H, W, C) as (N, C, H, W) in the dtype and memory format of `like`."""
    return x.permute(0, 3, 1, 2).to(like.dtype).contiguous(memory_format=_memory_format(like))


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.stride(1) == 1 and not x.is_contiguous()  # also for a slice of the channels of a channels_last map
    return torch.channels_last if last else torch.contiguous_format


class _Arguments:
    """struct task, and the tensors it points to."""

    def __init__(self, shape: _Shape, maps: _Tensors, folded: _Tensors, out: int):
        query, key, value, place = maps
        batch, height, width, rel = query.shape
        pad = geometry.padding(shape.kernel_size, shape.dilation)
        scale1, shift1, *rest = folded
        self.tensors = (  # outlive the task, which has their addresses
            _readable(query), _readable(key), value, _readable(place), _readable(scale1), _readable(shift1), *rest,
            _reflection_index(height, pad), _reflection_index(width, pad))
        self.task = library.Task(
            shape.relation, shape.absolute, batch, height, width, rel, _round_up(shape.hidden), shape.lanes, out,
            shape.kernel_size, shape.dilation, *(0 if x is None else _row(x) for x in self.tensors[:3]),
            *(None if x is None else x.data_ptr() for x in self.tensors), None, None, shape.hidden, 0, 0, 0)


def _run_backward(shape: list[int], maps: _Tensors, folded: _Tensors,
                  mode: int, gradient: Tensor | None) -> list[Tensor]:
    """Gradients of the maps and of folded gamma; for STATISTICS, the sums of the hidden vectors and their squares."""
    query, key, value, place = maps
    arguments = _Arguments(_Shape(*shape), maps, folded, 0 if value is None else value.shape[3])
    task = arguments.task
    _, _, weight1, _, weight2, bias2 = folded
    inputs, padded, hidden = weight1.shape[0], _round_up(weight1.shape[0]), task.hidden
    columns = 0 if bias2 is None else bias2.numel()
    sizes = [padded, padded, inputs * hidden, hidden, task.hidden_used * columns, columns]
    band = max(1, task.dilation * (task.kernel - 1))  # twice what a footprint reaches to either side
    units = task.batch * ((task.height + 2 * band - 1) // (2 * band))
    slots = max(1, min(units, 64, max(4, MAX_GRADIENT_NUMBERS // sum(sizes))))
    outputs: list[Any] = [None] * 4
    parameters: Any = None
    sums: Any = None
    if mode == STATISTICS:
        sums = torch.zeros(slots, 2, hidden, dtype=torch.float64)
    else:
        outputs = [None if x is None else torch.zeros(task.batch, *x.shape[1:3], _round_up(x.shape[3]) if i < 2 else
                                                      x.shape[3]) for i, x in enumerate(maps)]
        parameters = torch.zeros(slots, sum(sizes))
    transposed = [_pad(weight1[:, :task.hidden_used].t(), padded).contiguous(),
                  None if weight2 is None else _pad(weight2.flatten(1).t(), hidden).contiguous()]
    backward = library.Backward(
        task, mode, inputs, padded, _round_up(query.shape[3]), slots, sum(sizes), band, 0,
        *(None if x is None else x.data_ptr() for x in (gradient, *transposed, *outputs, parameters, sums)))
    library.run('san_backward', backward)
    if mode == STATISTICS:
        return [sums.sum(0)]
    d_scale1, d_shift1, d_weight1, d_shift2, d_weight2, d_bias2 = parameters.sum(0).split(sizes)
    parts = [d_scale1[:inputs], d_shift1[:inputs], d_weight1, d_shift2, d_weight2, d_bias2]
    # copies: an operator's outputs share no memory. weight2 and bias2 are None for the hidden vectors' statistics
    outputs = [None if x is None else d[..., :x.shape[3]] for d, x in zip(outputs, maps)]
    return [*outputs, *(part.clone().view(x.shape) for part, x in zip(parts, folded) if x is not None)]


def _to_inputs(gradients: _Tensors, maps: _Tensors) -> list[Tensor]:
    """Gradients of the maps (channels last) as those of the maps given, and the others; without those that are None."""
    firsts = [_channels_first(g.sum(0, keepdim=True) if x.shape[0] != g.shape[0] else g, x)
              for g, x in zip(gradients[:4], maps) if x is not None]
    return [*firsts, *gradients[4:]]


def _maps(*maps: Tensor | None) -> list[Tensor | None]:
    query, key, value, place = (None if x is None else _channels_last(x) for x in maps)
    return [query, key, value, None if place is None else place.contiguous()]


@torch.library.custom_op('san_backbones::attend', mutates_args=(), device_types='cpu')
def _attend(
        query: Tensor, key: Tensor, value: Tensor, place: Tensor | None, scale1: Tensor, shift1: Tensor,
        weight1: Tensor, shift2: Tensor, weight2: Tensor, bias2: Tensor, shift: Tensor | None,
        shape: list[int]) -> Tensor:
    """The attention, given folded gamma; `shape` is a `_Shape`. With `shift`, relu(y + shift); no gradients then."""
    batch, out, height, width = value.shape
    folded = (scale1, shift1, weight1, shift2, weight2, bias2)
    arguments = _Arguments(_Shape(*shape), _maps(query, key, value, place), folded, out)
    output = torch.empty((batch, height, width, out), dtype=torch.float32)
    arguments.task.output = output.data_ptr()
    arguments.task.shift = None if shift is None else shift.data_ptr()
    library.run('san', arguments.task)
    return _channels_first(output, value)


@_attend.register_fake
def _(query, key, value, *rest):
    return torch.empty_like(value, memory_format=_memory_format(value))


@torch.library.custom_op('san_backbones::attend_backward', mutates_args=(), device_types='cpu')
def _attend_backward(
        gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, place: Tensor | None, scale1: Tensor,
        shift1: Tensor, weight1: Tensor, shift2: Tensor, weight2: Tensor, bias2: Tensor,
        shape: list[int]) -> list[Tensor]:
    maps, folded = (query, key, value, place), (scale1, shift1, weight1, shift2, weight2, bias2)
    gradient = _channels_last(gradient).contiguous()
    return _to_inputs(_run_backward(shape, _maps(*maps), folded, ATTENTION, gradient), maps)


@_attend_backward.register_fake
def _(gradient, query, key, value, place, *rest):
    maps = [torch.empty_like(x, memory_format=_memory_format(x)) for x in (query, key, value, place) if x is not None]
    return [*maps, *(torch.empty_like(x) for x in rest[:-1])]


def _keep(ctx, inputs, output):
    *tensors, ctx.shape = inputs
    ctx.save_for_backward(*tensors)


def _spread(gradients: list[Tensor], has_place: bool, maps: int) -> list[Tensor | None]:
    """Gradients in the order of the inputs, with None for a place that is not there."""
    return [*gradients] if has_place else [*gradients[:maps], None, *gradients[maps:]]


def _differentiate_attend(ctx, gradient):
    refuse_double_backward()
    tensors = ctx.saved_tensors  # once: checkpointing recomputes them when they are asked for
    *tensors, shift = tensors
    if shift is not None:
        raise RuntimeError('the native attention with its finish fused has no gradients; call it without `shift`')
    gradients = _attend_backward(gradient, *tensors, ctx.shape)
    return *_spread(gradients, tensors[3] is not None, 3), None, None


_attend.register_autograd(_differentiate_attend, setup_context=_keep)


@torch.library.custom_op('san_backbones::hidden_sums', mutates_args=(), device_types='cpu')
def _hidden_sums(
        query: Tensor, key: Tensor, place: Tensor | None, scale1: Tensor, shift1: Tensor, weight1: Tensor,
        shape: list[int]) -> Tensor:
    """Sums of u = weight1 relu(norm1(delta)), the input of norm2, and of u * u: (2, hidden) in float64."""
    folded = (scale1, shift1, weight1, None, None, None)
    sums, = _run_backward(shape, _maps(query, key, None, place), folded, STATISTICS, None)
    return sums[:, :_Shape(*shape).hidden].contiguous()


@_hidden_sums.register_fake
def _(query, key, place, scale1, shift1, weight1, shape):
    return torch.empty((2, _Shape(*shape).hidden), dtype=torch.float64, device=query.device)


@torch.library.custom_op('san_backbones::hidden_sums_backward', mutates_args=(), device_types='cpu')
def _hidden_sums_backward(
        gradient: Tensor, query: Tensor, key: Tensor, place: Tensor | None, scale1: Tensor, shift1: Tensor,
        weight1: Tensor, shape: list[int]) -> list[Tensor]:
    maps, folded = (query, key, None, place), (scale1, shift1, weight1, None, None, None)
    slopes = gradient * torch.tensor([[1.], [2.]], dtype=gradient.dtype)  # d u / d u and d u^2 / d u = 2 u
    slopes = _pad(slopes.float(), weight1.shape[1]).contiguous()
    return _to_inputs(_run_backward(shape, _maps(*maps), folded, STATISTICS_BACKWARD, slopes), maps)


@_hidden_sums_backward.register_fake
def _(gradient, query, key, place, scale1, shift1, weight1, shape):
    maps = [torch.empty_like(x, memory_format=_memory_format(x)) for x in (query, key, place) if x is not None]
    return [*maps, *(torch.empty_like(x) for x in (scale1, shift1, weight1))]


def _differentiate_hidden_sums(ctx, gradient):
    refuse_double_backward()
    tensors = ctx.saved_tensors  # once: checkpointing recomputes them when they are asked for
    gradients = _hidden_sums_backward(gradient, *tensors, ctx.shape)
    return *_spread(gradients, tensors[2] is not None, 2), None


_hidden_sums.register_autograd(_differentiate_hidden_sums, setup_context=_keep)


def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        place: Tensor | None,
        gamma: Gamma,
        spec: Spec,
        shift: Tensor | None = None,
) -> Tensor:
    """Footprint attention by compiled loops; arguments as `ops.footprint_attention`, `shift` without gradients.

    Computes in float32 whatever the dtype of the maps. The result has the memory format of `value`. Nothing depends on
    the number of threads.
    """
    with torch.autocast('cpu', enabled=False):
        folded = None if gamma.cache is None else gamma.cache.get('native')
        if folded is None:
            norm1 = _affine(gamma.norm1, lambda: relation_statistics(query, key, place, spec))
            norm2 = _affine(gamma.norm2, lambda: _hidden_statistics(query, key, place, norm1, gamma, spec))
            folded = _folded(norm1, norm2, gamma, spec)
        if gamma.cache is not None:
            gamma.cache['native'] = folded
        shape, tensors = folded
        return _attend(query, key, value, place, *tensors, shift, shape)


def _affine(norm: Norm, statistics: Callable[[], tuple[Tensor, Tensor, int]]) -> Affine:
    if not norm.batch_statistics:
        return fold(norm, norm.running_mean, norm.running_var)
    mean, var, values = statistics()
    need_several_values(values)
    return fold_batch(norm, mean, var, torch.tensor(float(values)))


def _hidden_statistics(query: Tensor, key: Tensor, place: Tensor | None, norm1: Affine, gamma: Gamma,
                       spec: Spec) -> tuple[Tensor, Tensor, int]:
    weight1 = gamma.weight1.flatten(1).float().t()
    hidden = weight1.shape[1]
    scale1, shift1, weight1 = (_in_loop_order(x, spec).contiguous() for x in (*norm1, weight1))
    sums = _hidden_sums(query, key, place, scale1, shift1, _pad(weight1, _round_up(hidden)).contiguous(),
                        _Shape.of(spec, hidden, library.width()))
    vectors = query.shape[0] * query.shape[2] * query.shape[3] * (spec.kernel_size ** 2 if spec.pairwise else 1)
    mean, square = sums / vectors
    var = (square - mean * mean).clamp(min=0)  # in float64 the difference keeps float32's digits
    return mean.float(), var.float(), vectors
