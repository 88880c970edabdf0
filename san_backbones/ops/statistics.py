"""Mean and variance of relations over every pair of a pixel and a neighbour, without forming the pairs.

Batch statistics of norm1 (of delta and the position channels) from sums over the maps: a footprint is a separable box,
so that, for the subtraction, E[q_i - k_j] = E[q] - E[box k] and E[(q_i - k_j)^2] = E[q^2] - 2 E[q box k] + E[box k^2].
Maps are centred first, since a variance must not be the small difference of two large sums. Exact, differentiable, in
float64, which has room for squares of whatever is finite in float32.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from . import geometry
from .gamma import Spec

__all__ = ['SUPPORTED', 'relation_statistics']

_Moments = tuple[Tensor, Tensor]  # mean and biased variance, one for each channel


_BLOCK = 512  # pixels whose boxes one product computes: a matrix for a whole axis grows with its square


def _taps(size: int, spec: Spec, like: Tensor) -> Tensor:
    """Which pixel of an axis every pixel sees at each tap: (k, size)."""
    reach = geometry.padding(spec.kernel_size, spec.dilation)
    return geometry.reflection_index(size, reach, like.device).unfold(0, size, spec.dilation)


def _box_row(x: Tensor, spec: Spec) -> Tensor:
    """Mean over the taps along the last axis of x (..., size)."""
    size, reach = x.shape[-1], geometry.padding(spec.kernel_size, spec.dilation)
    taps, blocks, matrices = _taps(size, spec, x), [], {}
    for at in range(0, size, _BLOCK):
        first, last = max(at - reach, 0), min(at + _BLOCK + reach, size)
        kind = None if last - first == _BLOCK + 2 * reach else at  # all blocks that see no end of the axis are equal
        if kind not in matrices:
            block = taps[:, at:at + _BLOCK] - first
            matrices[kind] = x.new_zeros(last - first, block.shape[1]).scatter_add(
                0, block, torch.full_like(block, 1 / spec.kernel_size, dtype=x.dtype))
        blocks.append(x[..., first:last] @ matrices[kind])
    return torch.cat(blocks, -1)


def _box(x: Tensor, spec: Spec) -> Tensor:
    """Mean over the footprint of every pixel of x (N, C, H, W)."""
    return _box_row(_box_row(x, spec).mT, spec).mT


def _mean(x: Tensor) -> Tensor:
    return x.mean((0, 2, 3)) if x.shape[0] else x.sum((0, 2, 3))  # of nothing 0


def _tap_means(x: Tensor, spec: Spec) -> Tensor:
    """Mean over batch and pixels of what each pixel sees at each tap: (C, k, k)."""
    rows, columns = (x.new_zeros(spec.kernel_size, size).scatter_add(1, taps, torch.ones_like(taps, dtype=x.dtype))
                     for size in x.shape[-2:] for taps in [_taps(size, spec, x)])
    return rows @ x.sum(0) @ columns.t() / max(x.numel() // x.shape[1], 1)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    centre = _mean(x.detach())
    return centre, x - centre[:, None, None]


def _plain(x: Tensor) -> _Moments:
    centre, x = _centred(x)
    mean = _mean(x)
    return centre + mean, _mean(x * x) - mean * mean


def _boxed(x: Tensor, spec: Spec) -> _Moments:
    """Of x_j over all pairs."""
    centre, x = _centred(x)
    mean, square = (_tap_means(y, spec).mean((1, 2)) for y in (x, x * x))
    return centre + mean, square - mean * mean


def _difference(q: Tensor, k: Tensor, spec: Spec) -> _Moments:
    """Of q_i - k_j over all pairs."""
    (centre_q, q), (centre_k, k) = _centred(q), _centred(k)
    mean_k, square_k = (_tap_means(y, spec).mean((1, 2)) for y in (k, k * k))
    mean, square = _mean(q) - mean_k, _mean(q * q) - 2 * _mean(q * _box(k, spec)) + square_k
    return centre_q - centre_k + mean, square - mean * mean


def _product(q: Tensor, k: Tensor, spec: Spec) -> _Moments:
    # a product has no centre to take out
    mean = _mean(q * _box(k, spec))
    return mean, _mean(q * q * _box(k * k, spec)) - mean * mean


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
    query, key = query.double().contiguous(), key.double().contiguous()
    pixels = query.shape[0] * query.shape[2] * query.shape[3]
    parts = _MOMENTS[spec.pairwise, spec.relation](query, key, spec)
    if place is not None:
        place = place.double()
        parts.append(_difference(place, place, spec) if spec.position == 'relative' else _boxed(place, spec))
    mean, var = (torch.cat(moments) for moments in zip(*parts))
    return mean, var.clamp(min=0), pixels * (spec.kernel_size ** 2 if spec.pairwise else 1)
