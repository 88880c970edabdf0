"""Launches the kernels: `output`, `gradients`, `sums` and `sums_gradients` as `fused` asks for them."""
import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..folding import RELATIONS, Shape, row
from . import kernels

__all__ = ['Configuration', 'configuration', 'constants', 'gradients', 'output', 'sums', 'sums_gradients']

MAX_GRADIENT_NUMBERS = 1 << 23
"""Bound on the partial sums of parameter gradients that a backward pass keeps (float32 numbers)."""
MAX_PROGRAMS = 512
"""Programs among which a backward pass shares the pixels: several for each multiprocessor of the largest GPU."""

SHARED_AT_A_TIME = 64
"""Channels of the value that a backward pass holds of a neighbour."""

WIDEST_KEPT = 1 << 13
"""Numbers of weight1 that `attend_pairwise` keeps while it goes through the taps; wider ones are read for every tap."""

_PAIR_CONCATENATION, _DOT = RELATIONS[True, 'concatenation'], RELATIONS[True, 'dot']
_PATCH_CONCATENATION, _STAR = RELATIONS[False, 'concatenation'], RELATIONS[False, 'star']

_Tensors = Sequence[Any]  # tensors, and None in the place of one that there is none of


class Configuration(NamedTuple):
    """How a kernel is compiled: pixels of a program, and the options of Triton's compiler."""
    pixels: int
    num_warps: int
    num_stages: int


# By the widest vector of a pixel (channels, rounded up), since all of them have to stay in registers. 16 pixels are the
# rows that a tensor core takes, more of them pay where vectors are short; wide vectors are spread over more warps, and
# not read ahead of time, which takes shared memory. The pairwise backward pass also holds the gradients of gamma.
CONFIGURATIONS = {
    32: Configuration(64, 4, 2),
    128: Configuration(16, 4, 2),
    256: Configuration(16, 8, 2),
    1 << 30: Configuration(16, 8, 1),
}
BACKWARD_CONFIGURATIONS = {
    32: Configuration(32, 4, 1),
    64: Configuration(16, 4, 1),
    1 << 30: Configuration(16, 8, 1),
}


def configuration(kernel: str, constants: dict[str, Any]) -> Configuration:
    """How `kernel` is compiled for an attention with these `constants`.

    Chosen by the registers and spills that ptxas reports (benchmarks/triton_offline.py), not by timings, and the same
    for every size of the images, so that none is ever compiled for another size.
    """
    if kernels.INTERPRETED:
        return Configuration(64, 4, 1)  # its time goes by the number of programs
    table = BACKWARD_CONFIGURATIONS if kernel == 'attend_pairwise_backward' else CONFIGURATIONS
    width = max(constants['R'], constants['H'], constants['S'] * constants['C'])
    return next(chosen for bound, chosen in table.items() if width <= bound)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _is_pairwise(shape: Shape) -> bool:
    return shape.relation <= _DOT


def constants(shape: Shape, maps: _Tensors) -> dict[str, Any]:
    """The constants of every kernel for this attention; each takes those that it names."""
    query, key, value, place = maps
    rel = query.shape[3]
    dot = shape.relation in (_DOT, _STAR)
    channels = shape.lanes if value is not None else 1
    shares = value.shape[3] // channels if value is not None else 1
    tap = 1 if dot else rel
    area = shape.kernel_size ** 2
    inputs = tap * (1 if _is_pairwise(shape) else area)
    if shape.relation in (_PAIR_CONCATENATION, _PATCH_CONCATENATION):
        inputs += rel
    if place is not None:
        inputs += 2
    columns = channels * (1 if _is_pairwise(shape) else area)
    total = inputs * (2 + shape.hidden)
    if _is_pairwise(shape):
        total += shape.hidden * (1 + columns)
    else:
        total += columns * (shape.hidden + 1)
    return dict(
        RELATION=shape.relation, POSITION=0 if place is None else 2 if shape.absolute else 1, K=shape.kernel_size,
        DILATION=shape.dilation, REL=rel, HIDDEN=shape.hidden, CHANNELS=channels, SHARES=shares,
        QUERY_ROW=row(query), KEY_ROW=row(key), VALUE_ROW=1 if value is None else row(value), INPUTS=inputs,
        TOTAL=total, PRECISION='tf32' if _allows_tf32() else 'ieee', R=_power_of_2(rel), T=_power_of_2(tap),
        H=_power_of_2(shape.hidden), C=_power_of_2(channels), S=_power_of_2(shares),
        B=min(_power_of_2(shares), max(1, SHARED_AT_A_TIME // _power_of_2(channels))),
        WIDE=_power_of_2(tap) * _power_of_2(shape.hidden) > WIDEST_KEPT)


def _allows_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == 'tf32' if hasattr(matmul, 'fp32_precision') else matmul.allow_tf32


class _Launcher:
    """Runs kernels on the pixels of an attention."""

    def __init__(self, shape: Shape, maps: _Tensors):
        query = maps[0]
        batch, height, width, _ = query.shape
        self.sizes = (batch * height * width, height, width)
        if self.sizes[0] > 1 << 30:
            raise ValueError(f'a batch may have {1 << 30} pixels, got {batch} x {height} x {width}: '
                             'use smaller batches')
        self.constants = constants(shape, maps)
        self.device = query.device

    def blocks(self, kernel: Any) -> int:
        return triton.cdiv(self.sizes[0], configuration(kernel.__name__, self.constants).pixels)

    def run(self, kernel: Any, grid: tuple[int, ...] | None, *tensors: Tensor | None) -> None:
        if not self.sizes[0]:
            return
        grid = grid or (self.blocks(kernel),)
        pixels, num_warps, num_stages = configuration(kernel.__name__, self.constants)
        named = {name: self.constants[name] for name in kernel.arg_names if name in self.constants}
        there = torch.cuda.device(self.device) if self.device.type == 'cuda' else contextlib.nullcontext()
        with there:
            kernel[grid](*tensors, *self.sizes, **named, M=pixels, num_warps=num_warps, num_stages=num_stages)


def output(shape: Shape, maps: _Tensors, folded: _Tensors, shift: Tensor | None) -> Tensor:
    """As `native.attention.output`, in the dtype of the value."""
    launcher = _Launcher(shape, maps)
    value = maps[2]
    result = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if _is_pairwise(shape):
        launcher.run(kernels.attend_pairwise, None, *maps, *folded, shift, None, result, None, None)
    else:
        launcher.run(kernels.attend_patchwise, None, *maps[:3], *folded, shift, result)
    return result


def sums(shape: Shape, maps: _Tensors, folded: _Tensors) -> Tensor:
    """As `native.attention.sums`."""
    launcher = _Launcher(shape, maps)
    query, key, _, place = maps
    kernel, given = (kernels.pairwise_sums, (query, key, place)) if _is_pairwise(shape) \
        else (kernels.patchwise_sums, (query, key))
    slots = max(1, min(launcher.blocks(kernel), MAX_PROGRAMS))
    parts = torch.zeros((slots, 2, shape.hidden), dtype=torch.float64, device=query.device)
    launcher.run(kernel, (slots,), *given, *folded[:3], parts)
    return parts.sum(0)


def _refuse_determinism() -> None:
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError('the triton backend of footprint attention sums gradients in an order that varies, and '
                           'torch.use_deterministic_algorithms(True) was called: run it under '
                           "san_backbones.ops.use_backend('tiled')")


def _gradients(shape: Shape, maps: _Tensors, folded: _Tensors, gradient: Tensor | None,
               slopes: Tensor | None) -> list[Tensor]:
    if not kernels.INTERPRETED:
        _refuse_determinism()
    launcher = _Launcher(shape, maps)
    query, key, value, place = maps
    scale1, shift1, weight1, shift2, weight2, bias2 = folded
    total = launcher.constants['TOTAL']
    pixels = launcher.sizes[0]

    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float32, device=query.device)

    d_query, d_key = zeros(*query.shape), zeros(*key.shape)
    d_value = None if value is None else zeros(*value.shape)
    d_place = None if place is None else zeros(query.shape[0], *place.shape[1:])
    inputs, hidden = weight1.shape
    firsts = [inputs, inputs, inputs * hidden]
    d_shift2 = d_bias2 = None
    if _is_pairwise(shape):
        slots = max(1, min(launcher.blocks(kernels.attend_pairwise_backward), MAX_PROGRAMS,
                           MAX_GRADIENT_NUMBERS // total))
        parameters = zeros(slots, total)
        lse = slope = None
        if value is not None:
            lse, slope = (zeros(pixels, launcher.constants['CHANNELS']) for _ in range(2))
            launcher.run(kernels.attend_pairwise, None, *maps, *folded, None, gradient, None, lse, slope)
        launcher.run(kernels.attend_pairwise_backward, (slots,), *maps, *folded, gradient, lse, slope, slopes, d_query,
                     d_key, d_value, d_place, parameters)
        d_scale1, d_shift1, d_weight1, d_shift2, d_weight2 = parameters.sum(0).split(
            [*firsts, hidden, total - sum(firsts) - hidden])
        if value is not None:
            d_bias2 = torch.zeros_like(bias2)  # what all neighbours share does not change a softmax
    else:
        taps = shape.kernel_size ** 2 + (shape.relation == _PATCH_CONCATENATION)
        slots = max(1, min(launcher.blocks(kernels.attend_patchwise_backward), triton.cdiv(8 * MAX_PROGRAMS, taps),
                           MAX_GRADIENT_NUMBERS // total))
        parameters = zeros(slots, total)
        h, d_hidden = (None if value is None else zeros(pixels, hidden)), zeros(pixels, hidden)
        launcher.run(kernels.patchwise_hidden_backward, None, *maps[:3], scale1, shift1, weight1, shift2,
                     weight2, gradient, slopes, h, d_hidden)
        launcher.run(kernels.attend_patchwise_backward, (taps, slots), *maps[:3], scale1, shift1, weight1, weight2,
                     bias2, gradient, h, d_hidden, d_query, d_key, d_value, parameters)
        columns = 0 if bias2 is None else bias2.numel()
        d_scale1, d_shift1, d_weight1, d_weight2, d_bias2 = parameters.sum(0).split(
            [*firsts, total - sum(firsts) - columns, columns])
        d_shift2 = d_hidden.sum(0)
    parts = [d_scale1, d_shift1, d_weight1, d_shift2, d_weight2, d_bias2]
    # copies: an operator's outputs share no memory
    return [d_query, d_key, d_value, d_place,
            *(part.clone().view(x.shape) for part, x in zip(parts, folded) if x is not None)]


def gradients(shape: Shape, maps: _Tensors, folded: _Tensors, gradient: Tensor) -> list[Tensor]:
    """As `native.attention.gradients`."""
    return _gradients(shape, maps, folded, gradient, None)


def sums_gradients(shape: Shape, maps: _Tensors, folded: _Tensors, slopes: Tensor) -> list[Tensor]:
    """As `native.attention.sums_gradients`."""
    return _gradients(shape, maps, folded, None, slopes)
