"""Fused footprint attention: the registered backends, and torch's operators for their output, gradients and sums."""
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native, triton
from .checks import check_operator, check_part, need
from .contract import FusedBackend
from .folding import (
    Shape,
    channels_first,
    channels_last,
    fold_gamma,
    fold_weights,
    in_loop_order,
    memory_format,
    pad,
    round_up,
)
from .gamma import Affine, Gamma, Norm, Spec, fold, fold_batch, moments, moments_of_sums, refuse_other_backward
from .statistics import relation_statistics

__all__ = ['FUSED', 'attend', 'folded', 'prepare_attention', 'round_gamma']

FUSED: tuple[FusedBackend, ...] = (native.BACKEND, triton.BACKEND)
"""The most wanted first. The number of a backend, in arguments of registered operators, is its place here."""

_DEVICES = tuple(sorted({device for backend in FUSED for device in backend.devices}))
# torch 2.6 takes no list[int] in operators
_Ints = typing.List[int]  # noqa: UP006
_Outputs = typing.List[Tensor]  # noqa: UP006
_FOLDED = ('scale1', 'shift1', 'weight1', 'shift2', 'weight2', 'bias2', 'shift')
_Tensors = Sequence[Any]  # tensors, and None for one that is absent


def _checked(integers: list[int], maps: _Tensors, folded: _Tensors,
             gradient: Tensor | None = None) -> tuple[Shape, Any]:
    """The `Shape` of these integers and the loops for it, where they fit maps and tensors: loops follow addresses."""
    shape, backend = _described(integers)
    check_operator(shape, backend, maps, dict(zip(_FOLDED, folded)), gradient)
    return shape, backend.loops()


def _checked_part(integers: list[int], maps: dict[str, Tensor], folded: dict[str, Tensor],
                  gradient: Tensor | None = None) -> tuple[Shape, Any]:
    """As `_checked`, for a part of the patchwise form."""
    shape, backend = _described(integers)
    check_part(shape, backend, maps, folded, gradient)
    return shape, backend.loops()


def _described(integers: list[int]) -> tuple[Shape, FusedBackend]:
    shape = Shape.read(integers)
    if not 0 <= shape.backend < len(FUSED):
        known = ', '.join(f'{number} ({backend.name})' for number, backend in enumerate(FUSED))
        raise ValueError(f'backend must be one of {known}, got {shape.backend}')
    return shape, FUSED[shape.backend]


def _maps(*maps: Tensor | None) -> list[Tensor | None]:
    query, key, value, place = (None if x is None else channels_last(x) for x in maps)
    return [query, key, value, None if place is None else place.float().contiguous()]


def _last(maps: dict[str, Tensor]) -> list[Tensor]:
    return [channels_last(x) for x in maps.values()]


def _packed(*folded: Tensor | None) -> list[Tensor | None]:
    """Folded gamma as loops read it: a compiled graph may have left out a `.contiguous()` that it believed idle."""
    return [None if x is None else x.contiguous() for x in folded]


def _to_inputs(gradients: _Tensors, maps: _Tensors) -> list[Tensor]:
    """Gradients of the maps (channels last) as those of the maps given, and the others; without those that are None."""
    firsts = [channels_first(g.sum(0, keepdim=True) if x.shape[0] != g.shape[0] else g, x)
              for g, x in zip(gradients[:4], maps) if x is not None]
    return [*firsts, *gradients[4:]]


@torch.library.custom_op('san_backbones::attend', mutates_args=(), device_types=_DEVICES)
def _attend(
        query: Tensor, key: Tensor, value: Tensor, place: Tensor | None, scale1: Tensor, shift1: Tensor,
        weight1: Tensor, shift2: Tensor, weight2: Tensor, bias2: Tensor, shift: Tensor | None,
        shape: _Ints) -> Tensor:
    """The attention, given folded gamma; `shape` is a `Shape`. With `shift`, relu(y + shift); no gradients then."""
    maps, folded = (query, key, value, place), _packed(scale1, shift1, weight1, shift2, weight2, bias2, shift)
    described, loops = _checked(shape, maps, folded)
    return channels_first(loops.output(described, _maps(*maps), folded[:-1], folded[-1]), value)


@_attend.register_fake
def _(query, key, value, *rest):
    return torch.empty_like(value, memory_format=memory_format(value))


@torch.library.custom_op('san_backbones::attend_backward', mutates_args=(), device_types=_DEVICES)
def _attend_backward(
        gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, place: Tensor | None, scale1: Tensor,
        shift1: Tensor, weight1: Tensor, shift2: Tensor, weight2: Tensor, bias2: Tensor,
        shape: _Ints) -> _Outputs:
    maps, folded = (query, key, value, place), _packed(scale1, shift1, weight1, shift2, weight2, bias2)
    need(gradient=gradient)
    described, loops = _checked(shape, maps, folded, gradient)
    gradient = channels_last(gradient).contiguous()
    return _to_inputs(loops.gradients(described, _maps(*maps), folded, gradient), maps)


@_attend_backward.register_fake
def _(gradient, query, key, value, place, *rest):
    maps = [torch.empty_like(x, memory_format=memory_format(x)) for x in (query, key, value, place) if x is not None]
    return [*maps, *(x.new_empty(x.shape) for x in rest[:-1])]


def _keep(ctx, inputs, output):
    *tensors, ctx.shape = inputs
    ctx.save_for_backward(*tensors)


def _spread(gradients: list[Tensor], has_place: bool, maps: int) -> list[Tensor | None]:
    """Gradients in the order of the inputs, with None for a place that is not there."""
    return [*gradients] if has_place else [*gradients[:maps], None, *gradients[maps:]]


def _differentiate_attend(ctx, gradient):
    refuse_other_backward(gradient)
    tensors = ctx.saved_tensors  # once: checkpointing recomputes them when they are asked for
    *tensors, shift = tensors
    if shift is not None:
        raise RuntimeError('the fused attention with its finish fused has no gradients; call it without `shift`')
    gradients = _attend_backward(gradient, *tensors, ctx.shape)
    return *_spread(gradients, tensors[3] is not None, 3), None, None


_attend.register_autograd(_differentiate_attend, setup_context=_keep)


@torch.library.custom_op('san_backbones::hidden_sums', mutates_args=(), device_types=_DEVICES)
def _hidden_sums(
        query: Tensor, key: Tensor, place: Tensor | None, scale1: Tensor, shift1: Tensor, weight1: Tensor,
        shape: _Ints) -> Tensor:
    """Sums of u = weight1 relu(norm1(delta)), the input of norm2, and of u * u: (2, hidden) in float64."""
    maps, folded = (query, key, None, place), _packed(scale1, shift1, weight1, None, None, None)
    described, loops = _checked(shape, maps, folded[:3])
    return loops.sums(described, _maps(*maps), folded)[:, :described.hidden].contiguous()


@_hidden_sums.register_fake
def _(query, key, place, scale1, shift1, weight1, shape):
    return torch.empty((2, Shape(*shape).hidden), dtype=torch.float64, device=query.device)


@torch.library.custom_op('san_backbones::hidden_sums_backward', mutates_args=(), device_types=_DEVICES)
def _hidden_sums_backward(
        gradient: Tensor, query: Tensor, key: Tensor, place: Tensor | None, scale1: Tensor, shift1: Tensor,
        weight1: Tensor, shape: _Ints) -> _Outputs:
    maps, folded = (query, key, None, place), _packed(scale1, shift1, weight1, None, None, None)
    need(gradient=gradient)
    described, loops = _checked(shape, maps, folded[:3], gradient)
    slopes = torch.stack([gradient[0], 2 * gradient[1]])  # d u / d u and d u^2 / d u = 2 u
    slopes = pad(slopes.float(), weight1.shape[1]).contiguous()
    return _to_inputs(loops.sums_gradients(described, _maps(*maps), folded, slopes), maps)


@_hidden_sums_backward.register_fake
def _(gradient, query, key, place, scale1, shift1, weight1, shape):
    maps = [torch.empty_like(x, memory_format=memory_format(x)) for x in (query, key, place) if x is not None]
    return [*maps, *(x.new_empty(x.shape) for x in (scale1, shift1, weight1))]


def _differentiate_hidden_sums(ctx, gradient):
    refuse_other_backward(gradient)
    tensors = ctx.saved_tensors  # once: checkpointing recomputes them when they are asked for
    gradients = _hidden_sums_backward(gradient, *tensors, ctx.shape)
    return *_spread(gradients, tensors[2] is not None, 2), None


_hidden_sums.register_autograd(_differentiate_hidden_sums, setup_context=_keep)


@torch.library.custom_op('san_backbones::hidden', mutates_args=(), device_types=_DEVICES)
def _hidden(query: Tensor, key: Tensor, scale1: Tensor, shift1: Tensor, weight1: Tensor, shape: _Ints) -> Tensor:
    """Hidden vectors of the patchwise form, u = weight1 relu(norm1(delta)), (N, hidden, H, W) in float32."""
    maps, folded = dict(query=query, key=key), dict(scale1=scale1, shift1=shift1, weight1=weight1)
    described, loops = _checked_part(shape, maps, folded)
    return loops.hidden(described, _last(maps), _packed(*folded.values())).permute(0, 3, 1, 2)


@_hidden.register_fake
def _(query, key, scale1, shift1, weight1, shape):
    batch, _, height, width = query.shape
    return query.new_empty((batch, height, width, Shape(*shape).hidden), dtype=torch.float32).permute(0, 3, 1, 2)


@torch.library.custom_op('san_backbones::hidden_backward', mutates_args=(), device_types=_DEVICES)
def _hidden_backward(gradient: Tensor, query: Tensor, key: Tensor, scale1: Tensor, shift1: Tensor, weight1: Tensor,
                     shape: _Ints) -> _Outputs:
    need(gradient=gradient)
    maps, folded = dict(query=query, key=key), dict(scale1=scale1, shift1=shift1, weight1=weight1)
    described, loops = _checked_part(shape, maps, folded, gradient)
    gradients = loops.hidden_gradients(described, _last(maps), _packed(*folded.values()),
                                       channels_last(gradient).contiguous())
    return [*(channels_first(g, x) for g, x in zip(gradients, (query, key))), *gradients[2:]]


@_hidden_backward.register_fake
def _(gradient, query, key, scale1, shift1, weight1, shape):
    maps = [torch.empty_like(x, memory_format=memory_format(x)) for x in (query, key)]
    return [*maps, *(x.new_empty(x.shape) for x in (scale1, shift1, weight1))]


def _differentiate_hidden(ctx, gradient):
    refuse_other_backward(gradient)
    return *_hidden_backward(gradient, *ctx.saved_tensors, ctx.shape), None


_hidden.register_autograd(_differentiate_hidden, setup_context=_keep)


@torch.library.custom_op('san_backbones::attend_hidden', mutates_args=(), device_types=_DEVICES)
def _attend_hidden(middle: Tensor, value: Tensor, weight2: Tensor, bias2: Tensor, shape: _Ints) -> Tensor:
    """The attention of the patchwise form, given relu(norm2(u)), (N, hidden, H, W), of its hidden vectors u."""
    maps, folded = dict(middle=middle, value=value), dict(weight2=weight2, bias2=bias2)
    described, loops = _checked_part(shape, maps, folded)
    output = loops.from_hidden(described, *_last(maps), _packed(*folded.values()))
    return channels_first(output, value)


@_attend_hidden.register_fake
def _(middle, value, *rest):
    return torch.empty_like(value, memory_format=memory_format(value))


@torch.library.custom_op('san_backbones::attend_hidden_backward', mutates_args=(), device_types=_DEVICES)
def _attend_hidden_backward(gradient: Tensor, middle: Tensor, value: Tensor, weight2: Tensor, bias2: Tensor,
                            shape: _Ints) -> _Outputs:
    need(gradient=gradient)
    maps, folded = dict(middle=middle, value=value), dict(weight2=weight2, bias2=bias2)
    described, loops = _checked_part(shape, maps, folded, gradient)
    gradients = loops.from_hidden_gradients(described, *_last(maps), _packed(*folded.values()),
                                            channels_last(gradient).contiguous())
    return [*(channels_first(g, x) for g, x in zip(gradients, (middle, value))), *gradients[2:]]


@_attend_hidden_backward.register_fake
def _(gradient, middle, value, weight2, bias2, shape):
    maps = [torch.empty_like(x, memory_format=memory_format(x)) for x in (middle, value)]
    return [*maps, *(x.new_empty(x.shape) for x in (weight2, bias2))]


def _differentiate_attend_hidden(ctx, gradient):
    refuse_other_backward(gradient)
    return *_attend_hidden_backward(gradient, *ctx.saved_tensors, ctx.shape), None


_attend_hidden.register_autograd(_differentiate_attend_hidden, setup_context=_keep)


@torch.compiler.assume_constant_result
def _number(name: str) -> int:
    """The place of a backend in `FUSED`."""
    return next(number for number, backend in enumerate(FUSED) if backend.name == name)


@torch.compiler.assume_constant_result
def _width(name: str) -> int:
    return FUSED[_number(name)].width()


def attend(
        name: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        place: Tensor | None,
        gamma: Gamma,
        spec: Spec,
        shift: Tensor | None = None,
) -> Tensor:
    """Footprint attention by the fused backend of that name; the others as `ops.footprint_attention`, `shift` without
    gradients. The result has the memory format of `value`.
    """
    with torch.autocast(value.device.type, enabled=False):
        if _in_parts(name, gamma, spec):
            output = _attend_in_parts(name, query, key, value, gamma, spec)
            return output if shift is None else torch.relu(output + shift.to(output.dtype)[:, None, None])
        shape, tensors = folded(name, gamma, spec, query, key, place)
        return _attend(query, key, value, place, *tensors, shift, shape)


def folded(
        name: str,
        gamma: Gamma,
        spec: Spec,
        query: Any = None,
        key: Any = None,
        place: Tensor | None = None,
) -> tuple[list[int], list[Tensor]]:
    """A `Shape` and gamma folded for the backend of that name, from gamma's cache if it has one. Maps are needed where
    norms use batch statistics.
    """
    number, width = _number(name), _width(name)
    found = None if gamma.cache is None else gamma.cache.get(name)
    if found is None:
        norm1 = _affine(gamma.norm1, lambda: relation_statistics(query, key, place, spec))
        norm2 = _affine(gamma.norm2, lambda: _hidden_statistics(query, key, place, norm1, gamma, spec, width, number))
        found = fold_gamma(norm1, norm2, gamma, spec, width, number)
    if gamma.cache is not None:
        gamma.cache[name] = found
    return found


def prepare_attention(query: Tensor, key: Tensor, value: Tensor, place: Tensor | None, gamma: Gamma, spec: Spec,
                      shift: Tensor, output: Tensor,
                      rounded: native.attention.RoundedGamma | None = None) -> native.Call:
    """The call of the compiled loops that writes relu(y + shift) of the attention y to `output`, on maps with channels
    last; nothing is checked.

    Args:
        query: phi(x), (N, H, W, r), float32, a slice of the channels of a contiguous map; as `key`, psi(x).
        value: beta(x), (N, H, W, m), likewise.
        place: (1, H, W, 2), contiguous, or None.
        gamma: With a cache, and norms that use running statistics.
        spec: With a relation that the loops have.
        shift: (m,), float32.
        output: (N, H, W, m), contiguous.
        rounded: What `round_gamma` gave, or None.
    """
    shape, tensors = folded(native.BACKEND.name, gamma, spec)
    return native.attention.prepare(Shape(*shape), (query, key, value, place), tensors, shift.float(), output, rounded)


def round_gamma(gamma: Gamma, spec: Spec, rel: int) -> native.attention.RoundedGamma | None:
    """gamma in 8 bits for `prepare_attention`, `rel` being the channels of phi; None where there is no such form, or it
    saves no time.
    """
    if native.BACKEND.name not in spec.described.backends:
        return None
    shape, tensors = folded(native.BACKEND.name, gamma, spec)
    return native.attention.round_gamma(Shape(*shape), rel, tensors)


def _affine(norm: Norm, statistics: Callable[[], tuple[Tensor, Tensor, int]]) -> Affine:
    if not norm.batch_statistics:
        return fold(norm, norm.running_mean, norm.running_var)
    return fold_batch(norm, *statistics())


def _inputs_folded(norm1: Affine, gamma: Gamma, spec: Spec, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """scale1, shift1 and weight1 for what ends with the hidden vectors."""
    weight1 = gamma.weight1.flatten(1).float().t()
    scale1, shift1, weight1 = (in_loop_order(x.float(), spec).contiguous() for x in (*norm1, weight1))
    return scale1, shift1, pad(weight1, round_up(weight1.shape[1], width)).contiguous()


def _hidden_statistics(query: Any, key: Any, place: Tensor | None, norm1: Affine, gamma: Gamma,
                       spec: Spec, width: int, backend: int) -> tuple[Tensor, Tensor, int]:
    shape = Shape.of(spec, len(gamma.weight1), 1, width, backend)
    sums = _hidden_sums(query, key, place, *_inputs_folded(norm1, gamma, spec, width), shape)
    vectors = query.shape[0] * query.shape[2] * query.shape[3] * (spec.kernel_size ** 2 if spec.pairwise else 1)
    mean, var = moments_of_sums(sums, vectors)
    return mean.float(), var.float(), vectors


def _in_parts(name: str, gamma: Gamma, spec: Spec) -> bool:
    """Whether a map of the hidden vectors is kept, of which the patchwise form has one for a pixel: where they would be
    computed several times, for their statistics and for gradients.
    """
    return not spec.pairwise and FUSED[_number(name)].parts \
        and (torch.is_grad_enabled() or gamma.norm2.batch_statistics)


def _attend_in_parts(name: str, query: Tensor, key: Tensor, value: Tensor, gamma: Gamma, spec: Spec) -> Tensor:
    """As `attend` of the patchwise form, without a finish."""
    number, width = _number(name), _width(name)
    norm1 = _affine(gamma.norm1, lambda: relation_statistics(query, key, None, spec))
    scale1, shift1, weight1 = _inputs_folded(norm1, gamma, spec, width)
    u = _hidden(query, key, scale1, shift1, weight1, Shape.of(spec, len(gamma.weight1), 1, width, number))
    norm2 = _affine(gamma.norm2, lambda: (*moments(u.double(), (0, 2, 3)), u.numel() // u.shape[1]))
    scale2, shift2 = (x.float()[:, None, None] for x in norm2)
    weight2, bias2, channels = fold_weights(gamma, spec, width)
    shape = Shape.of(spec, len(gamma.weight1), channels, bias2.shape[-1], number)
    return _attend_hidden(torch.relu(torch.addcmul(shift2, u, scale2)), value, weight2, bias2, shape)
