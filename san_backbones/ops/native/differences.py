"""Batch statistics of differences over all pairs, and their gradients, by the compiled loops of differences.c."""
import functools

import torch
from torch import Tensor

from .. import geometry, statistics
from ..checks import check_shape, check_spec, need
from ..folding import channels_first, channels_last, row
from ..gamma import Spec
from . import library
from .pointwise import SLOTS

__all__ = ()

_Axis = tuple[Tensor, Tensor]  # `starts` and `pixels` of struct axis

DIFFERENCE_SUMS, DIFFERENCE_GRADIENT = range(2)  # modes of struct differences


@functools.lru_cache(maxsize=64)
def _axes(size: int, kernel_size: int, dilation: int) -> tuple[_Axis, _Axis]:
    """What every pixel of an axis sees, and which pixels see it."""
    index = geometry.reflection_index(size, geometry.padding(kernel_size, dilation), torch.device('cpu'))
    seen = index.unfold(0, size, dilation).t().flatten()
    starts = torch.arange(0, len(seen) + 1, kernel_size, device='cpu')
    times = torch.bincount(seen, minlength=size)
    return (starts, seen), (torch.nn.functional.pad(times.cumsum(0), (1, 0)),
                            torch.argsort(seen, stable=True).div(kernel_size, rounding_mode='floor'))


def _matrix(x: Tensor) -> library.Matrix:
    return library.Matrix(at=x.data_ptr(), row=row(x))


def _run(mode: int, maps: list[Tensor], kernel_size: int, dilation: int, **tensors: Tensor) -> None:
    """Runs san_differences on query and key, (N, H, W, C), float32, as `folding.channels_last` makes them."""
    query, key = maps
    batch, height, width, channels = query.shape
    axes = dict(zip(('row', 'column'), (_axes(size, kernel_size, dilation) for size in (height, width))))
    lists = {f'{seeing}{axis}_{name}': x.data_ptr() for axis, both in axes.items()
             for seeing, lists in zip(('', 'seeing_'), both) for name, x in zip(('starts', 'pixels'), lists)}
    library.run('san_differences', library.Differences(
        mode=mode, batch=batch, height=height, width=width, channels=channels, kernel=kernel_size, slots=SLOTS,
        query=_matrix(query), key=_matrix(key), **lists,
        **{name: _matrix(x) if name.startswith('d_') else x.data_ptr() for name, x in tensors.items()}))


def _by_loops(query: Tensor, key: Tensor, kernel_size: int, dilation: int, **vectors: Tensor) -> list[Tensor] | None:
    """The maps as the loops take them, None for those of float64, which the loops do not compute in.

    Raises:
        ValueError: Arguments do not fit one another.
    """
    need(query=query, key=key, **vectors)
    if query.dim() != 4 or 0 in query.shape[1:] or not query.is_floating_point():
        raise ValueError('query must be a map of shape (N, C, H, W) with C, H and W at least 1, of a floating dtype, '
                         f'got {list(query.shape)}, {query.dtype}')
    check_shape('key', key, tuple(query.shape), query, query.dtype)
    check_spec(Spec(True, 'subtraction', 'none', kernel_size, dilation))
    for name, vector in vectors.items():
        check_shape(name, vector, (2, query.shape[1]), query, torch.float64)
    if query.dtype == torch.float64 or len(query) == 0 or library.unavailable() is not None:
        return None
    return [channels_last(x.float()) for x in (query, key)]


def _first_difference(query: Tensor, key: Tensor) -> Tensor:
    return query[0, 0, 0].double() - key[0, 0, 0]


@statistics.DIFFERENCE_MOMENTS.register_kernel('cpu')
def _(query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> Tensor:
    maps = _by_loops(query, key, kernel_size, dilation)
    if maps is None:
        return statistics.difference_moments(query, key, kernel_size, dilation)
    sums = query.new_zeros(SLOTS, 4, query.shape[1], dtype=torch.float64)
    _run(DIFFERENCE_SUMS, maps, kernel_size, dilation, sums=sums)
    q, k, products, squares = sums.sum(0) / (query.numel() // query.shape[1])
    mean = q - k
    return torch.stack([mean + _first_difference(*maps), products + squares - mean * mean])


@statistics.DIFFERENCE_MOMENTS_BACKWARD.register_kernel('cpu')
def _(gradient: Tensor, moments: Tensor, query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> list[Tensor]:
    maps = _by_loops(query, key, kernel_size, dilation, gradient=gradient, moments=moments)
    if maps is None:
        return statistics.difference_gradients(gradient, moments, query, key, kernel_size, dilation)
    to_mean, to_variance = gradient / (query.numel() // query.shape[1])
    slope = 2 * to_variance
    level = to_mean - slope * (moments[0] - _first_difference(*maps))
    d_query, d_key = (x.new_empty(x.shape) for x in maps)
    _run(DIFFERENCE_GRADIENT, maps, kernel_size, dilation, slope=slope, level=level, d_query=d_query, d_key=d_key)
    return [channels_first(d_query, query), channels_first(d_key, key)]
