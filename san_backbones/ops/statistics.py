"""Mean and variance of relations over every pair of a pixel and a neighbour, without forming the pairs.

Batch statistics of norm1 (of delta and the position channels) from sums over the maps: a footprint is a separable box,
so that, for the subtraction, E[q_i - k_j] = E[q] - E[box k] and E[(q_i - k_j)^2] = E[q^2] - 2 E[q box k] + E[box k^2].
Maps are centred first, since a variance must not be the small difference of two large sums. Exact, differentiable, in
float64, which has room for squares of whatever is finite in float32.
"""
import typing
from collections.abc import Callable

import torch
from torch import Tensor

from . import geometry
from .folding import memory_format
from .gamma import Spec, refuse_other_backward

__all__ = ['DIFFERENCE_MOMENTS', 'DIFFERENCE_MOMENTS_BACKWARD', 'SUPPORTED', 'difference_gradients',
           'difference_moments', 'relation_statistics']

_Moments = tuple[Tensor, Tensor]  # mean and biased variance, one for each channel
_Axis = list[tuple[int, int, Tensor]]  # first and last pixel that a block of an axis sees, and its matrix

# torch 2.6 takes no list[Tensor] in operators
_Outputs = typing.List[Tensor]  # noqa: UP006
_BLOCK = 128  # pixels whose boxes one product computes: a matrix for a whole axis grows with its square


def _taps(size: int, kernel_size: int, dilation: int, device: torch.device) -> Tensor:
    """Which pixel of an axis every pixel sees at each tap: (k, size)."""
    reach = geometry.padding(kernel_size, dilation)
    return geometry.reflection_index(size, reach, device).unfold(0, size, dilation)


def _axis(size: int, kernel_size: int, dilation: int, device: torch.device) -> _Axis:
    """The mean over the taps along an axis, as a product with matrices in float64."""
    taps, reach = _taps(size, kernel_size, dilation, device), geometry.padding(kernel_size, dilation)
    blocks: _Axis = []
    matrices: dict[int | None, Tensor] = {}
    for at in range(0, size, _BLOCK):
        first, last = max(at - reach, 0), min(at + _BLOCK + reach, size)
        kind = None if last - first == _BLOCK + 2 * reach else at  # all blocks that see no end of the axis are equal
        if kind not in matrices:
            seen = torch.arange(first, last, device=device)[:, None, None] == taps[:, at:at + _BLOCK]
            matrices[kind] = seen.double().mean(1)
        blocks.append((first, last, matrices[kind]))
    return blocks


def _axes(x: Tensor, kernel_size: int, dilation: int) -> list[_Axis]:
    """Those of rows and columns of x (N, C, H, W)."""
    axes = {size: _axis(size, kernel_size, dilation, x.device) for size in x.shape[-2:]}
    return [axes[size] for size in x.shape[-2:]]


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]  # of one it would be a copy


def _box(x: Tensor, rows: _Axis, columns: _Axis) -> Tensor:
    """Mean over the footprint of every pixel of x (N, C, H, W)."""
    x = _joined([x[..., first:last] @ matrix for first, last, matrix in columns], -1)
    return _joined([matrix.mT @ x[..., first:last, :] for first, last, matrix in rows], -2)


def _added(parts: list[Tensor], axis: _Axis, dim: int) -> Tensor:
    """Adds what the blocks of an axis give to the pixels that they see."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[dim] = axis[-1][1]
    result = parts[0].new_zeros(shape)
    for (first, last, _), part in zip(axis, parts):
        result.narrow(dim, first, last - first).add_(part)
    return result


def _spread(x: Tensor, rows: _Axis, columns: _Axis) -> Tensor:
    """The transpose of `_box`: x of every pixel, divided among its footprint."""
    parts = [part @ matrix.mT for part, (_, _, matrix) in zip(x.split(_BLOCK, -1), columns)]
    parts = [matrix @ part for part, (_, _, matrix) in zip(_added(parts, columns, -1).split(_BLOCK, -2), rows)]
    return _added(parts, rows, -2)


def _shares(rows: _Axis, columns: _Axis) -> Tensor:
    """How much of all boxes each pixel makes: (H, W)."""
    row, column = (_added([matrix.sum(1) for _, _, matrix in axis], axis, 0) for axis in (rows, columns))
    return row[:, None] * column


def _pixels(x: Tensor) -> int:
    return max(x.shape[0] * x.shape[2] * x.shape[3], 1)  # a mean of nothing is 0


def _mean(x: Tensor) -> Tensor:
    return x.sum((0, 2, 3)) / _pixels(x)


def _tap_means(x: Tensor, spec: Spec) -> Tensor:
    """Mean over batch and pixels of what each pixel sees at each tap: (C, k, k)."""
    rows, columns = (x.new_zeros(spec.kernel_size, size).scatter_add(1, taps, torch.ones_like(taps, dtype=x.dtype))
                     for size in x.shape[-2:] for taps in [_taps(size, spec.kernel_size, spec.dilation, x.device)])
    return rows @ x.sum(0) @ columns.t() / _pixels(x)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double().contiguous()
    centre = _mean(x.detach())
    return centre, x - centre[:, None, None]


def _seen_mean(x: Tensor, axes: list[_Axis]) -> Tensor:
    """Mean of x_j over all pairs."""
    return x.sum(0).flatten(1) @ _shares(*axes).flatten() / _pixels(x)


def difference_moments(query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Mean and biased variance of q_i - k_j over all pairs, (2, C) in float64, of maps (N, C, H, W)."""
    (centre_q, q), (centre_k, k), axes = _centred(query), _centred(key), _axes(query, kernel_size, dilation)
    mean = -_seen_mean(k, axes)
    square = _mean(_box(k, *axes).mul_(-2).add_(q).mul_(q)) + _seen_mean(k * k, axes)
    return torch.stack([centre_q - centre_k + mean, square - mean * mean])


def difference_gradients(
        gradient: Tensor, moments: Tensor, query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> _Outputs:
    """Those of query and key, given those of `difference_moments` and its result."""
    (centre_q, q), (centre_k, k), axes = _centred(query), _centred(key), _axes(query, kernel_size, dilation)
    to_mean, to_variance = gradient / _pixels(q)
    slope = (2 * to_variance)[:, None, None]
    level = to_mean[:, None, None] - slope * (moments[0] - (centre_q - centre_k))[:, None, None]
    spread = _spread(q, *axes)
    of_query = q.sub_(_box(k, *axes)).mul_(slope).add_(level)
    of_key = k.mul_(slope).sub_(level).mul_(_shares(*axes)).sub_(spread.mul_(slope))
    return [g.to(x.dtype, memory_format=memory_format(x)) for g, x in ((of_query, query), (of_key, key))]


# native/differences.py has other kernels for the CPU
DIFFERENCE_MOMENTS = torch.library.custom_op(
    'san_backbones::difference_moments', difference_moments, mutates_args=())
DIFFERENCE_MOMENTS_BACKWARD = torch.library.custom_op(
    'san_backbones::difference_moments_backward', difference_gradients, mutates_args=())


@DIFFERENCE_MOMENTS.register_fake
def _(query, key, kernel_size, dilation):
    return query.new_empty((2, query.shape[1]), dtype=torch.float64)


@DIFFERENCE_MOMENTS_BACKWARD.register_fake
def _(gradient, moments, query, key, kernel_size, dilation):
    return [torch.empty_like(x, memory_format=memory_format(x)) for x in (query, key)]


def _keep(ctx, inputs, output):
    query, key, *ctx.footprint = inputs
    ctx.save_for_backward(output, query, key)


def _differentiate(ctx, gradient):
    refuse_other_backward(gradient)
    return *DIFFERENCE_MOMENTS_BACKWARD(gradient, *ctx.saved_tensors, *ctx.footprint), None, None


DIFFERENCE_MOMENTS.register_autograd(_differentiate, setup_context=_keep)


def _difference(query: Tensor, key: Tensor, spec: Spec) -> _Moments:
    """Of q_i - k_j over all pairs."""
    mean, var = DIFFERENCE_MOMENTS(query, key, spec.kernel_size, spec.dilation)
    return mean, var


def _plain(x: Tensor) -> _Moments:
    centre, x = _centred(x)
    mean = _mean(x)
    return centre + mean, _mean(x * x) - mean * mean


def _boxed(x: Tensor, spec: Spec) -> _Moments:
    """Of x_j over all pairs."""
    centre, x = _centred(x)
    mean, square = (_tap_means(y, spec).mean((1, 2)) for y in (x, x * x))
    return centre + mean, square - mean * mean


def _product(q: Tensor, k: Tensor, spec: Spec) -> _Moments:
    q, k = (x.double().contiguous() for x in (q, k))  # a product has no centre to take out
    axes = _axes(k, spec.kernel_size, spec.dilation)
    mean = _mean(q * _box(k, *axes))
    return mean, _mean(q * q * _box(k * k, *axes)) - mean * mean


def _shifted(x: Tensor, spec: Spec) -> _Moments:
    """Of each tap on its own, over all pixels: (C * k * k,), taps innermost."""
    centre, x = _centred(x)
    mean, square = (_tap_means(y, spec) for y in (x, x * x))
    return (centre[:, None, None] + mean).flatten(), (square - mean * mean).flatten()


# by form (whether it is pairwise) and name; a relation without an entry has its batch statistics from a pass over tiles
_MOMENTS: dict[tuple[bool, str], Callable[[Tensor, Tensor, Spec], list[_Moments]]] = {
    (True, 'subtraction'): lambda q, k, spec: [_difference(q, k, spec)],
    (True, 'summation'): lambda q, k, spec: [_difference(q, -k, spec)],
    (True, 'hadamard'): lambda q, k, spec: [_product(q, k, spec)],
    (True, 'concatenation'): lambda q, k, spec: [_plain(q), _boxed(k, spec)],
    (False, 'concatenation'): lambda q, k, spec: [_plain(q), _shifted(k, spec)],
}
SUPPORTED = frozenset(_MOMENTS)


def relation_statistics(query: Tensor, key: Tensor, place: Tensor | None, spec: Spec) -> tuple[Tensor, Tensor, int]:
    """Batch statistics of the channels of `reference.relate`.

    Args:
        query: phi(x), (N, r, H, W).
        key: psi(x), (N, r, H, W), not padded.
        place: Mapped coordinates, (1, 2, H, W), or None.
        spec: Its form and relation are in `SUPPORTED`.

    Returns:
        Mean and biased variance, (width,) each, in float64, and how many values each channel has.
    """
    pixels = query.shape[0] * query.shape[2] * query.shape[3]
    parts = _MOMENTS[spec.pairwise, spec.relation](query, key, spec)
    if place is not None:
        parts.append(_difference(place, place, spec) if spec.position == 'relative' else _boxed(place, spec))
    mean, var = (torch.cat(moments) for moments in zip(*parts))
    return mean, var.clamp(min=0), pixels * (spec.kernel_size ** 2 if spec.pairwise else 1)
