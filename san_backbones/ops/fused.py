"""Fused footprint attention: the operators, their gradients and batch statistics, whichever loops compute them.

A path is a module with the functions `output`, `gradients`, `sums` and `sums_gradients` on maps with channels last and
folded gamma, nothing of size k x k being kept by any of them: `native.attention` (C, on the CPU) and `triton.launch`.
"""
import importlib
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_operator, need
from .folding import Shape, channels_first, channels_last, fold_gamma, in_loop_order, memory_format, pad, round_up
from .gamma import Affine, Gamma, Norm, Spec, fold, fold_batch, refuse_other_backward
from .native import attention as native_attention
from .native import library
from .statistics import relation_statistics

__all__ = ['attend_native', 'attend_triton']

PATHS = ('native', 'triton')
_DEVICES = ('cpu', 'cuda')
# torch 2.6 takes no list[int] in operators
_Ints = typing.List[int]  # noqa: UP006
_Outputs = typing.List[Tensor]  # noqa: UP006
_FOLDED = ('scale1', 'shift1', 'weight1', 'shift2', 'weight2', 'bias2', 'shift')
_Tensors = Sequence[Any]  # tensors, and None in the place of one that there is none of


def _loops(shape: Shape) -> Any:
    # Triton's are imported when they are first used; the others are here already, for a process that is forked while
    # another thread imports waits for ever
    return native_attention if shape.path == 0 else importlib.import_module('.triton.launch', __package__)


def _width(path: int) -> int:
    return library.width() if path == 0 else 1  # the compiler of Triton chooses vectors by itself


def _checked(numbers: list[int], maps: _Tensors, folded: _Tensors, gradient: Tensor | None = None) -> Shape:
    """The `Shape` of these numbers, which fits maps and tensors: loops follow addresses."""
    shape = Shape.read(numbers)
    check_operator(shape, _width(shape.path), maps, dict(zip(_FOLDED, folded)), gradient)
    return shape


def _maps(*maps: Tensor | None) -> list[Tensor | None]:
    query, key, value, place = (None if x is None else channels_last(x) for x in maps)
    return [query, key, value, None if place is None else place.float().contiguous()]


def _packed(*folded: Tensor | None) -> list[Tensor | None]:
    """Folded gamma as the loops read it: a compiled graph may have left out a `.contiguous()` that it believed idle."""
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
    described = _checked(shape, maps, folded)
    return channels_first(_loops(described).output(described, _maps(*maps), folded[:-1], folded[-1]), value)


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
    described = _checked(shape, maps, folded, gradient)
    gradient = channels_last(gradient).contiguous()
    return _to_inputs(_loops(described).gradients(described, _maps(*maps), folded, gradient), maps)


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
    described = _checked(shape, maps, folded[:3])
    return _loops(described).sums(described, _maps(*maps), folded)[:, :described.hidden].contiguous()


@_hidden_sums.register_fake
def _(query, key, place, scale1, shift1, weight1, shape):
    return torch.empty((2, Shape(*shape).hidden), dtype=torch.float64, device=query.device)


@torch.library.custom_op('san_backbones::hidden_sums_backward', mutates_args=(), device_types=_DEVICES)
def _hidden_sums_backward(
        gradient: Tensor, query: Tensor, key: Tensor, place: Tensor | None, scale1: Tensor, shift1: Tensor,
        weight1: Tensor, shape: _Ints) -> _Outputs:
    maps, folded = (query, key, None, place), _packed(scale1, shift1, weight1, None, None, None)
    need(gradient=gradient)
    described = _checked(shape, maps, folded[:3], gradient)
    slopes = torch.stack([gradient[0], 2 * gradient[1]])  # d u / d u and d u^2 / d u = 2 u
    slopes = pad(slopes.float(), weight1.shape[1]).contiguous()
    return _to_inputs(_loops(described).sums_gradients(described, _maps(*maps), folded, slopes), maps)


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


def _attend_by(
        path: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        place: Tensor | None,
        gamma: Gamma,
        spec: Spec,
        shift: Tensor | None,
) -> Tensor:
    width = _width(path)
    with torch.autocast(value.device.type, enabled=False):
        folded = None if gamma.cache is None else gamma.cache.get(PATHS[path])
        if folded is None:
            norm1 = _affine(gamma.norm1, lambda: relation_statistics(query, key, place, spec))
            norm2 = _affine(gamma.norm2,
                            lambda: _hidden_statistics(query, key, place, norm1, gamma, spec, width, path))
            folded = fold_gamma(norm1, norm2, gamma, spec, width, path)
        if gamma.cache is not None:
            gamma.cache[PATHS[path]] = folded
        shape, tensors = folded
        return _attend(query, key, value, place, *tensors, shift, shape)


def attend_native(
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
    return _attend_by(0, query, key, value, place, gamma, spec, shift)


def attend_triton(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        place: Tensor | None,
        gamma: Gamma,
        spec: Spec,
        shift: Tensor | None = None,
) -> Tensor:
    """Footprint attention by Triton kernels; arguments as `ops.footprint_attention`, `shift` without gradients.

    Factors of matrix products have the dtype of the maps (float32: as `torch.backends.cuda.matmul.allow_tf32` says),
    all else is float32. The result has the memory format of `value`. Gradients of maps are sums by atomic additions,
    whose order differs from run to run.
    """
    return _attend_by(1, query, key, value, place, gamma, spec, shift)


def _affine(norm: Norm, statistics: Callable[[], tuple[Tensor, Tensor, int]]) -> Affine:
    if not norm.batch_statistics:
        return fold(norm, norm.running_mean, norm.running_var)
    return fold_batch(norm, *statistics())


def _hidden_statistics(query: Tensor, key: Tensor, place: Tensor | None, norm1: Affine, gamma: Gamma,
                       spec: Spec, width: int, path: int) -> tuple[Tensor, Tensor, int]:
    weight1 = gamma.weight1.flatten(1).float().t()
    hidden = weight1.shape[1]
    scale1, shift1, weight1 = (in_loop_order(x.float(), spec).contiguous() for x in (*norm1, weight1))
    sums = _hidden_sums(query, key, place, scale1, shift1, pad(weight1, round_up(hidden, width)).contiguous(),
                        Shape.of(spec, hidden, 1, width, path))
    vectors = query.shape[0] * query.shape[2] * query.shape[3] * (spec.kernel_size ** 2 if spec.pairwise else 1)
    mean, square = sums / max(vectors, 1)
    var = (square - mean * mean).clamp(min=0)  # in float64 the difference keeps float32's digits
    return mean.float(), var.float(), vectors
