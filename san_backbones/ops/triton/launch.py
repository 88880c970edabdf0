"""Launches the kernels: `output`, `gradients`, `sums` and `sums_gradients` as `fused` asks for them.

Kernels are tuned: of the few `Configuration`s that fit the widths of an attention, the first call times each on its own
tensors and keeps the quickest for this process. SAN_BACKBONES_TRITON_TUNE=0 takes the first without timing.
"""
import contextlib
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..folding import Shape, power_of_2, row
from . import TUNE_VARIABLE, kernels

__all__ = ['Configuration', 'configurations', 'constants', 'gradients', 'output', 'sums', 'sums_gradients']

_logger = logging.getLogger(__name__)

MAX_GRADIENT_ELEMENTS = 1 << 23
"""Bound on the partial sums of parameter gradients that a backward pass keeps (float32 elements)."""
MAX_PROGRAMS = 512
"""Programs among which a backward pass shares the pixels: several for each multiprocessor of the largest GPU."""

SHARED_AT_A_TIME = 64
"""Channels of the value that a backward pass holds of a neighbour."""

WIDEST_KEPT = 1 << 13
"""Elements of weight1 that `attend_pairwise` keeps while it goes through the taps; more are read for every tap."""

_Tensors = Sequence[Any]  # tensors, and None for one that is absent


class Configuration(NamedTuple):
    """How a kernel is compiled: pixels of a program, and the options of Triton's compiler."""
    pixels: int
    num_warps: int
    num_stages: int


# By the widest vector of a pixel (channels, rounded up), since all of them have to stay in registers. 16 pixels are the
# rows that a tensor core takes, more of them pay where vectors are short; wide vectors are spread over more warps, and
# not read ahead of time, which takes shared memory. The pairwise backward pass also holds the gradients of gamma. Those
# in front have the fewest registers and spills (benchmarks/triton_offline.py); those behind them:
CONFIGURATIONS = {
    32: (Configuration(64, 4, 2), Configuration(32, 4, 2)),  # more programs, for maps that do not fill a GPU
    128: (Configuration(16, 4, 2), Configuration(32, 4, 2)),  # gamma's matrices are read once for twice the pixels
    256: (Configuration(16, 8, 2), Configuration(16, 4, 1)),  # two programs instead of one hide each other's waits
    1 << 30: (Configuration(16, 8, 1), Configuration(16, 16, 1)),  # half the elements for a thread
}
BACKWARD_CONFIGURATIONS = {
    32: (Configuration(32, 4, 1), Configuration(16, 4, 1)),  # half the elements for a thread
    64: (Configuration(16, 4, 1), Configuration(16, 8, 1)),  # the same
    1 << 30: (Configuration(16, 8, 1), Configuration(16, 16, 1)),  # the same
}


def configurations(kernel: str, constants: dict[str, Any]) -> tuple[Configuration, ...]:
    """What `kernel` may be compiled with for an attention with these `constants`, best guess first.

    The same for every size of the images, so that none is ever compiled for another size.
    """
    if kernels.INTERPRETED:
        return Configuration(64, 4, 1),  # its time goes by the number of programs
    table = BACKWARD_CONFIGURATIONS if kernel == 'attend_pairwise_backward' else CONFIGURATIONS
    width = max(constants['R'], constants['H'], constants['S'] * constants['C'])
    return next(chosen for bound, chosen in table.items() if width <= bound)


# Not triton.autotune: it keeps a call's arguments in itself, where calls of other threads find them, takes what is best
# on one GPU for best on all, and cannot be told not to measure while a CUDA graph is captured.
_quickest: dict[tuple, Configuration] = {}
RUNS = 5
"""Times that a configuration runs while it is tuned; the quickest counts."""


def _milliseconds(call: Callable[[], Any]) -> float:
    call()
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


def _tune(candidates: Sequence[Configuration], call: Callable[[Configuration], Any]) -> Configuration:
    """The candidate whose call is quickest; those that the GPU has no room for are left out."""
    times, refusal = {}, None
    for candidate in candidates:
        try:
            times[candidate] = _milliseconds(functools.partial(call, candidate))
        except OutOfResources as error:
            refusal = error
    if not times:
        raise RuntimeError(f"this GPU has no room for a program of footprint attention ({refusal}); run it under "
                           "san_backbones.ops.use_backend('tiled')") from refusal
    return min(times, key=times.__getitem__)


def _tunes(device: torch.device) -> bool:
    # configurations sum in different orders
    return device.type == 'cuda' and os.environ.get(TUNE_VARIABLE, '1') != '0' \
        and not torch.are_deterministic_algorithms_enabled()


def constants(shape: Shape, maps: _Tensors) -> dict[str, Any]:
    """The constants of every kernel for this attention; each takes those that it names."""
    query, key, value, place = maps
    relation, area, rel = shape.described, shape.kernel_size ** 2, query.shape[3]
    tap = relation.tap_width(rel, area)
    inputs = relation.width(rel, area, place is not None)
    channels = shape.lanes if value is not None else 1
    shares = value.shape[3] // channels if value is not None else 1
    columns = channels * (1 if relation.is_pairwise else area)
    total = inputs * (2 + shape.hidden)
    if relation.is_pairwise:
        total += shape.hidden * (1 + columns)
    else:
        total += columns * (shape.hidden + 1)
    return dict(
        FORM=relation.form, RELATION=relation.name, POSITION=0 if place is None else 2 if shape.absolute else 1,
        K=shape.kernel_size, DILATION=shape.dilation, REL=rel, CENTRE=relation.centre_width(rel), TAP=tap,
        HIDDEN=shape.hidden, CHANNELS=channels, SHARES=shares, QUERY_ROW=row(query), KEY_ROW=row(key),
        VALUE_ROW=1 if value is None else row(value), INPUTS=inputs, TOTAL=total,
        PRECISION='tf32' if _allows_tf32() else 'ieee', R=power_of_2(rel), T=power_of_2(tap),
        H=power_of_2(shape.hidden), C=power_of_2(channels), S=power_of_2(shares),
        B=min(power_of_2(shares), max(1, SHARED_AT_A_TIME // power_of_2(channels))),
        WIDE=power_of_2(tap) * power_of_2(shape.hidden) > WIDEST_KEPT)


def _allows_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, 'fp32_precision', None)  # since torch 2.9
    if precision == 'none':
        precision = getattr(torch.backends, 'fp32_precision', 'none')
    return matmul.allow_tf32 if precision is None else precision == 'tf32'


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
        """Programs that have something to do, at most."""
        pixels = min(candidate.pixels for candidate in configurations(kernel.__name__, self.constants))
        return triton.cdiv(self.sizes[0], pixels)

    def _configuration(self, kernel: Any, call: Callable[[Configuration], Any], tensors: _Tensors,
                       added_to: Sequence[Tensor | None]) -> Configuration:
        candidates = configurations(kernel.__name__, self.constants)
        if len(candidates) == 1 or not _tunes(self.device):
            return candidates[0]
        # maps of about the same size, within a factor of 16
        key = (kernel.__name__, torch.cuda.get_device_name(self.device), self.sizes[0].bit_length() // 4,
               tuple(self.constants.values()), tuple(None if x is None else x.dtype for x in tensors))
        if key not in _quickest:
            if torch.cuda.is_current_stream_capturing():  # nothing can be timed
                return candidates[0]
            _quickest[key] = _tune(candidates, call)
            for tensor in added_to:
                if tensor is not None:
                    tensor.zero_()
            _logger.debug('%s: %s', kernel.__name__, _quickest[key])
        return _quickest[key]

    def run(self, kernel: Any, programs: Sequence[int], *tensors: Tensor | None,
            added_to: Sequence[Tensor | None] = ()) -> None:
        """Runs `kernel` on a grid of `programs`, or on one program for every block of pixels where that is empty.

        Args:
            added_to: Those of the tensors, of zeros, that the kernel adds to.
        """
        if not self.sizes[0]:
            return
        named = {name: self.constants[name] for name in kernel.arg_names if name in self.constants}

        def call(chosen: Configuration) -> None:
            grid = tuple(programs) or (triton.cdiv(self.sizes[0], chosen.pixels),)
            kernel[grid](*tensors, *self.sizes, **named, M=chosen.pixels, num_warps=chosen.num_warps,
                         num_stages=chosen.num_stages)

        there = torch.cuda.device(self.device) if self.device.type == 'cuda' else contextlib.nullcontext()
        with there:
            call(self._configuration(kernel, call, tensors, added_to))


def output(shape: Shape, maps: _Tensors, folded: _Tensors, shift: Tensor | None) -> Tensor:
    """As `native.attention.output`, in the dtype of the value."""
    launcher = _Launcher(shape, maps)
    value = maps[2]
    result = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if shape.described.is_pairwise:
        launcher.run(kernels.attend_pairwise, (), *maps, *folded, shift, None, result, None, None)
    else:
        launcher.run(kernels.attend_patchwise, (), *maps[:3], *folded, shift, result)
    return result


def sums(shape: Shape, maps: _Tensors, folded: _Tensors) -> Tensor:
    """As `native.attention.sums`."""
    launcher = _Launcher(shape, maps)
    query, key, _, place = maps
    kernel, given = (kernels.pairwise_sums, (query, key, place)) if shape.described.is_pairwise \
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
    if shape.described.is_pairwise:
        slots = max(1, min(launcher.blocks(kernels.attend_pairwise_backward), MAX_PROGRAMS,
                           MAX_GRADIENT_ELEMENTS // total))
        parameters = zeros(slots, total)
        lse = slope = None
        if value is not None:
            lse, slope = (zeros(pixels, launcher.constants['CHANNELS']) for _ in range(2))
            launcher.run(kernels.attend_pairwise, (), *maps, *folded, None, gradient, None, lse, slope)
        launcher.run(kernels.attend_pairwise_backward, (slots,), *maps, *folded, gradient, lse, slope, slopes, d_query,
                     d_key, d_value, d_place, parameters, added_to=(d_key, d_value, d_place))
        d_scale1, d_shift1, d_weight1, d_shift2, d_weight2 = parameters.sum(0).split(
            [*firsts, hidden, total - sum(firsts) - hidden])
        if value is not None:
            d_bias2 = torch.zeros_like(bias2)  # what all neighbours share does not change a softmax
    else:
        taps = shape.kernel_size ** 2 + bool(launcher.constants['CENTRE'])
        slots = max(1, min(launcher.blocks(kernels.attend_patchwise_backward), triton.cdiv(8 * MAX_PROGRAMS, taps),
                           MAX_GRADIENT_ELEMENTS // total))
        parameters = zeros(slots, total)
        h, d_hidden = (None if value is None else zeros(pixels, hidden)), zeros(pixels, hidden)
        launcher.run(kernels.patchwise_hidden_backward, (), *maps[:3], scale1, shift1, weight1, shift2,
                     weight2, gradient, slopes, h, d_hidden)
        launcher.run(kernels.attend_patchwise_backward, (taps, slots), *maps[:3], scale1, shift1, weight1, weight2,
                     bias2, gradient, h, d_hidden, d_query, d_key, d_value, parameters,
                     added_to=(d_query, d_key, d_value))
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
