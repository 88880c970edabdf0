"""Mean and variance of relations over every pair of a pixel and a neighbour, without forming the pairs.

Batch statistics of norm1 (of delta and the position channels) from sums over the maps: a footprint is a separable box,
so that, for the subtraction, E[q_i - k_j] = E[q] - E[box k] and E[(q_i - k_j)^2] = E[q^2] - 2 E[q box k] + E[box k^2].
Maps are centred first, since a variance must not be the small difference of two large sums. Exact, differentiable, in
float64, which has room for squares of whatever is finite in float32.
"""
from typing import Any

import torch
from torch import Tensor

from . import geometry
from .gamma import Spec

__all__ = ['SUPPORTED', 'relation_statistics']

SUPPORTED = frozenset((
    (True, 'subtraction'), (True, 'summation'), (True, 'hadamard'), (True, 'concatenation'), (False, 'concatenation')))

_Moments = tuple[Tensor, Tensor]  # mean and biased variance, one for each channel


def _box(x: Tensor, spec: Spec) -> Tensor:
    """Mean over the footprint of every pixel of x (N, C, H, W)."""
    reach = spec.dilation * (spec.kernel_size - 1)
    height, width = x.shape[-2:]
    x = geometry.reflect_pad(x, reach // 2)
    steps = range(0, reach + 1, spec.dilation)
    rows: Any = sum(x[:, :, y:y + height] for y in steps)
    return sum(rows[:, :, :, c:c + width] for c in steps) / spec.kernel_size ** 2


def _mean(x: Tensor) -> Tensor:
    return x.mean((0, 2, 3)) if x.shape[0] else x.sum((0, 2, 3))  # of nothing 0


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
    mean = _mean(_box(x, spec))
    return centre + mean, _mean(_box(x * x, spec)) - mean * mean


def _difference(q: Tensor, k: Tensor, spec: Spec) -> _Moments:
    """Of q_i - k_j over all pairs."""
    (centre_q, q), (centre_k, k) = _centred(q), _centred(k)
    box = _box(k, spec)
    mean = _mean(q) - _mean(box)
    square = _mean(q * q) - 2 * _mean(q * box) + _mean(_box(k * k, spec))
    return centre_q - centre_k + mean, square - mean * mean


def _product(q: Tensor, k: Tensor, spec: Spec) -> _Moments:
    # a product has no centre to take out
    mean = _mean(q * _box(k, spec))
    return mean, _mean(q * q * _box(k * k, spec)) - mean * mean


def _window_sums(x: Tensor, spec: Spec) -> Tensor:
    """Sum over batch and pixels of what each pixel sees at each place of its footprint: (C, k, k)."""
    reach = spec.dilation * (spec.kernel_size - 1)

    def counts(size: int) -> Tensor:
        """How often every row is seen from each place: (k, size)."""
        index = geometry.reflection_index(size, reach // 2, x.device)
        places = index.unfold(0, size, spec.dilation)
        return torch.zeros(spec.kernel_size, size, dtype=x.dtype, device=x.device).scatter_add(
            1, places, torch.ones((), dtype=x.dtype, device=x.device).expand_as(places))

    return counts(x.shape[-2]) @ x.sum(0) @ counts(x.shape[-1]).t()


def _shifted(x: Tensor, spec: Spec) -> _Moments:
    """Of each place of the footprint on its own, over all pixels: (C * k * k,), places innermost."""
    centre, x = _centred(x)
    pixels = max(x.numel() // x.shape[1], 1)
    mean = _window_sums(x, spec) / pixels
    square = _window_sums(x * x, spec) / pixels
    return (centre[:, None, None] + mean).flatten(), (square - mean * mean).flatten()


def relation_statistics(query: Tensor, key: Tensor, place: Tensor | None, spec: Spec) -> tuple[Tensor, Tensor, int]:
    """Batch statistics of the channels of `reference.relate`.

    Args:
        query: phi(x), (N, r, H, W).
        key: psi(x), (N, r, H, W), not padded.
        place: Mapped coordinates, (1, 2, H, W), or None.
        spec: One of `SUPPORTED`.

    Returns:
        Mean and biased variance, (width,) each, in float64, and how many values each channel has.
    """
    query, key = query.double(), key.double()
    pixels = query.shape[0] * query.shape[2] * query.shape[3]
    parts: list[_Moments]
    if not spec.pairwise:
        parts = [_plain(query), _shifted(key, spec)]
    elif spec.relation == 'subtraction':
        parts = [_difference(query, key, spec)]
    elif spec.relation == 'summation':
        parts = [_difference(query, -key, spec)]
    elif spec.relation == 'hadamard':
        parts = [_product(query, key, spec)]
    else:
        parts = [_plain(query), _boxed(key, spec)]
    if place is not None:
        place = place.double()
        parts.append(_difference(place, place, spec) if spec.position == 'relative' else _boxed(place, spec))
    mean, var = (torch.cat(moments) for moments in zip(*parts))
    return mean, var.clamp(min=0), pixels * (spec.kernel_size ** 2 if spec.pairwise else 1)
