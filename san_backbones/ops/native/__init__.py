"""Fused footprint attention on the CPU: the compiled loops of footprint.c and backward.c.

Optional at installation: without a C compiler the package works, and `library()` says why this path is not there.
"""
import ctypes
import functools
import math
import pathlib
import sys
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .. import geometry
from ..gamma import Affine, Gamma, Norm, Spec, fold, refuse_double_backward, synchronise, update_running_statistics
from ..statistics import relation_statistics

__all__ = ['attend', 'library', 'unavailable']

LANES = 16
RELATIONS = {(True, 'subtraction'): 0, (True, 'summation'): 1, (True, 'hadamard'): 2, (True, 'concatenation'): 3,
             (True, 'dot'): 4, (False, 'concatenation'): 5, (False, 'star'): 6}
# instruction sets by torch's names for what the processor has (ATEN_CPU_CAPABILITY overrides it), best first
BUILDS = {'AVX512': ('avx512', 'avx2', 'baseline'), 'AVX2': ('avx2', 'baseline')}


MAX_GRADIENT_NUMBERS = 1 << 22
"""Bound on the partial sums of parameter gradients that a backward pass keeps (float32 numbers)."""


class _Task(ctypes.Structure):
    """struct task of footprint.c."""
    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            'relation', 'absolute', 'batch', 'height', 'width', 'rel', 'hidden', 'lanes', 'out', 'kernel', 'dilation')),
        *((name, ctypes.c_void_p) for name in (
            'query', 'key', 'value', 'place', 'scale1', 'shift1', 'weight1', 'shift2', 'weight2', 'bias2', 'rows',
            'columns', 'output')),
        *((name, ctypes.c_int64) for name in ('hidden_used', 'next', 'failed')),
    ]


class _Backward(ctypes.Structure):
    """struct backward of backward.c."""
    _fields_ = [
        ('task', _Task),
        *((name, ctypes.c_int64) for name in (
            'mode', 'inputs', 'inputs_padded', 'slots', 'parameters', 'band', 'odd')),
        *((name, ctypes.c_void_p) for name in (
            'gradient', 'weight1_t', 'weight2_t', 'd_query', 'd_key', 'd_value', 'd_place', 'd_parameters', 'sums')),
    ]


ATTENTION, STATISTICS, STATISTICS_BACKWARD = range(3)  # modes of struct backward


@functools.lru_cache(maxsize=None)
def _load() -> Tuple[Optional[ctypes.CDLL], str]:
    """The library for this processor, or None; and which one, or why none."""
    folder = pathlib.Path(__file__).parent
    builds = BUILDS.get(torch.backends.cpu.get_cpu_capability(), ('baseline',))
    for build in builds:
        for path in sorted(folder.glob(f'_{build}.*')):
            if path.suffix not in ('.so', '.dll'):
                continue
            try:
                library = ctypes.CDLL(str(path))
            except OSError as error:
                return None, f'{path.name} does not load: {error}'
            if not hasattr(library, 'san_backward_bytes') or (library.san_task_bytes(), library.san_backward_bytes()) != (
                    ctypes.sizeof(_Task), ctypes.sizeof(_Backward)):
                return None, f'{path.name} was built from another version of its source; reinstall san_backbones'
            for run in (library.san_run, library.san_backward_run):
                run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
                run.restype = None
            return library, build
    return None, f'the compiled loops are not installed (looked for {", ".join(builds)} in {folder})'


def library() -> str:
    """Name of the build that serves this processor, or why there is none."""
    return _load()[1]


def unavailable() -> Optional[str]:
    """None if the compiled loops are there, else the reason."""
    loaded, reason = _load()
    return None if loaded is not None else reason


@functools.lru_cache(maxsize=None)
def _torch_parallel() -> Optional[int]:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded, so that its threads do this work too."""
    if not sys.platform.startswith('linux'):
        return None
    with open('/proc/self/maps') as maps:
        paths = {line.split(None, 5)[-1].strip() for line in maps if 'omp' in line.rpartition('/')[2]}
    torch_first = sorted(paths, key=lambda path: 'torch' not in path)
    for path in torch_first:
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def _pad(x: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, size - x.shape[-1]))


def _repeat(x: Tensor, lanes: int) -> Tensor:
    return x.repeat(*(1,) * (x.dim() - 1), lanes // x.shape[-1])


def _round_up(size: int) -> int:
    return (size + LANES - 1) // LANES * LANES


class _Shape(NamedTuple):
    """Numbers that both directions need."""
    spec: Spec
    hidden: int  # without padding
    lanes: int


def _folded(norm1: Affine, norm2: Affine, gamma: Gamma, spec: Spec) -> Tuple[_Shape, List[Tensor]]:
    """gamma as the loops read it: scale1, shift1, weight1, shift2, weight2, bias2. Differentiable."""
    area = spec.kernel_size ** 2
    scale1, shift1 = norm1
    scale2, shift2 = norm2
    weight1 = (gamma.weight1.flatten(1).float() * scale2[:, None]).t()  # (inputs, hidden)
    weight2, bias2 = gamma.weight2.flatten(1).float().t(), gamma.bias2.float()
    hidden = weight1.shape[1]
    weight_channels = weight2.shape[1] // (1 if spec.pairwise else area)
    lanes = math.lcm(weight_channels, LANES)
    scale1, shift1, weight1 = (_in_loop_order(x, spec) for x in (scale1, shift1, weight1))
    if not spec.pairwise:
        weight2 = weight2.view(hidden, weight_channels, area).transpose(1, 2)
        bias2 = bias2.view(weight_channels, area).t()
    folded = [scale1, shift1, _pad(weight1, _round_up(hidden)), _pad(shift2, _round_up(hidden)),
              _repeat(weight2, lanes), _repeat(bias2, lanes)]
    return _Shape(spec, hidden, lanes), [x.contiguous() for x in folded]


def _in_loop_order(x: Tensor, spec: Spec) -> Tensor:
    """Relation channels (the first axis of x): psi's come as c * k^2 + o, the loops write them as o * r + c."""
    if spec.pairwise or spec.relation != 'concatenation':
        return x
    area = spec.kernel_size ** 2
    rel = x.shape[0] // (area + 1)
    psi = x[rel:].unflatten(0, (rel, area)).transpose(0, 1).flatten(0, 1)
    return torch.cat([x[:rel], psi])


def _channels_last(x: Tensor) -> Tensor:
    return x.detach().float().permute(0, 2, 3, 1).contiguous()


def _channels_first(x: Tensor, like: Tensor) -> Tensor:
    """(N, H, W, C) as (N, C, H, W) in the dtype and memory format of `like`."""
    x = x.permute(0, 3, 1, 2).to(like.dtype)
    keeps_format = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return x if keeps_format else x.contiguous()


class _Arguments:
    """struct task, and the tensors it points to, which must outlive it."""

    def __init__(self, shape: _Shape, maps: Sequence[Optional[Tensor]], folded: Sequence[Optional[Tensor]], out: int):
        spec = shape.spec
        query = maps[0]
        batch, height, width, rel = query.shape
        pad = geometry.padding(spec.kernel_size, spec.dilation)
        self.indices = [geometry.reflection_index(size, pad) for size in (height, width)]
        self.tensors = (*maps, *folded)
        pointers = [None if x is None else x.data_ptr() for x in (*self.tensors, *self.indices)]
        self.task = _Task(
            RELATIONS[spec.pairwise, spec.relation], spec.position == 'absolute', batch, height, width, rel,
            _round_up(shape.hidden), shape.lanes, out, spec.kernel_size, spec.dilation, *pointers, None, shape.hidden,
            0, 0)

    def check(self, task: _Task) -> None:
        if task.failed:
            raise MemoryError('no memory for the working space of a thread of the native footprint attention')


def _run_backward(arguments: _Arguments, mode: int, gradient: Optional[Tensor]) -> List[Tensor]:
    """Gradients of the maps and of folded gamma; for STATISTICS, the sums of the hidden vectors and their squares."""
    task = arguments.task
    query, key, value, place, scale1, _, weight1, _, weight2, bias2 = arguments.tensors
    inputs, padded, hidden = weight1.shape[0], _round_up(weight1.shape[0]), task.hidden
    columns = 0 if bias2 is None else bias2.numel()
    sizes = [padded, padded, inputs * hidden, hidden, task.hidden_used * columns, columns]
    band = max(1, task.dilation * (task.kernel - 1))  # twice what a footprint reaches to either side
    units = task.batch * ((task.height + 2 * band - 1) // (2 * band))
    slots = max(1, min(units, 64, max(4, MAX_GRADIENT_NUMBERS // sum(sizes))))
    if mode == STATISTICS:
        outputs, parameters = [], None
        sums = torch.zeros(slots, 2, hidden, dtype=torch.float64)
    else:
        outputs = [torch.zeros_like(query), torch.zeros_like(key), None if value is None else torch.zeros_like(value),
                   None if place is None else torch.zeros(task.batch, *place.shape[1:])]
        parameters, sums = torch.zeros(slots, sum(sizes)), None
    transposed = [_pad(weight1[:, :task.hidden_used].t(), padded).contiguous(),
                  None if weight2 is None else _pad(weight2.flatten(1).t(), hidden).contiguous()]
    if mode == STATISTICS:
        maps = [None] * 4
    else:
        maps = outputs
    backward = _Backward(
        task, mode, inputs, padded, slots, sum(sizes), band, 0,
        *(None if x is None else x.data_ptr() for x in (gradient, *transposed, *maps, parameters, sums)))
    library, _ = _load()
    library.san_backward_run(ctypes.addressof(backward), _torch_parallel(), torch.get_num_threads())
    arguments.check(backward.task)
    if mode == STATISTICS:
        return list(sums.sum(0))
    d_scale1, d_shift1, d_weight1, d_shift2, d_weight2, d_bias2 = parameters.sum(0).split(sizes)
    return [*outputs, d_scale1[:inputs], d_shift1[:inputs], d_weight1.view(weight1.shape), d_shift2,
            None if weight2 is None else d_weight2.view(weight2.shape),
            None if bias2 is None else d_bias2.view(bias2.shape)]


def _to_inputs(gradients: Sequence[Optional[Tensor]], inputs: Sequence[Optional[Tensor]]) -> List[Optional[Tensor]]:
    """Gradients of the maps (channels last) as those of what was given."""
    maps = [None if g is None else _channels_first(g.sum(0, keepdim=True) if x.shape[0] < g.shape[0] else g, x)
            for g, x in zip(gradients[:4], inputs[:4])]
    return [*maps, *gradients[4:]]


class _Attend(torch.autograd.Function):
    """The attention, given folded gamma."""

    @staticmethod
    def forward(ctx, shape: _Shape, *inputs: Optional[Tensor]) -> Tensor:
        query, key, value, place, *folded = inputs
        maps = [None if x is None else _channels_last(x) for x in inputs[:4]]
        batch, out, height, width = value.shape
        arguments = _Arguments(shape, maps, [x.detach() for x in folded], out)
        output = torch.empty((batch, height, width, out), dtype=torch.float32)
        arguments.task.output = output.data_ptr()
        library, _ = _load()
        library.san_run(ctypes.addressof(arguments.task), _torch_parallel(), torch.get_num_threads())
        arguments.check(arguments.task)
        ctx.shape = shape
        ctx.save_for_backward(*inputs)
        return _channels_first(output, value)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tuple[Optional[Tensor], ...]:
        refuse_double_backward()
        inputs = ctx.saved_tensors
        maps = [None if x is None else _channels_last(x) for x in inputs[:4]]
        arguments = _Arguments(ctx.shape, maps, inputs[4:], grad_output.shape[1])
        gradients = _run_backward(arguments, ATTENTION, _channels_last(grad_output))
        return (None, *_to_inputs(gradients, inputs))


class _HiddenStatistics(torch.autograd.Function):
    """Mean and biased variance of u = weight1 relu(norm1(delta)), the input of norm2, over all of its vectors."""

    @staticmethod
    def forward(ctx, shape: _Shape, *inputs: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        query, key, place, scale1, shift1, weight1 = inputs
        sums, squares = _run_backward(_HiddenStatistics._arguments(shape, inputs), STATISTICS, None)
        vectors = query.shape[0] * query.shape[2] * query.shape[3] * (
            shape.spec.kernel_size ** 2 if shape.spec.pairwise else 1)
        mean = sums / vectors
        var = (squares / vectors - mean * mean).clamp(min=0)  # float64: their difference keeps float32's digits
        ctx.shape, ctx.vectors = shape, vectors
        ctx.save_for_backward(mean, *inputs)
        return mean[:shape.hidden].float(), var[:shape.hidden].float()

    @staticmethod
    def _arguments(shape: _Shape, inputs: Sequence[Optional[Tensor]]) -> _Arguments:
        query, key, place, scale1, shift1, weight1 = (None if x is None else x.detach() for x in inputs)
        maps = [_channels_last(query), _channels_last(key), None, None if place is None else _channels_last(place)]
        return _Arguments(shape, maps, [scale1, shift1, weight1, None, None, None], 0)

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor) -> Tuple[Optional[Tensor], ...]:
        refuse_double_backward()
        mean, *inputs = ctx.saved_tensors
        padded = _round_up(ctx.shape.hidden)
        # d mean / d u = 1 / n, d var / d u = 2 (u - mean) / n
        slope = _pad(2 * grad_var.double() / ctx.vectors, padded)
        start = _pad(grad_mean.double() / ctx.vectors, padded) - slope * mean
        gradient = torch.stack([start, slope]).float()
        gradients = _run_backward(_HiddenStatistics._arguments(ctx.shape, inputs), STATISTICS_BACKWARD, gradient)
        d_query, d_key, _, d_place = _to_inputs(gradients, (*inputs[:2], None, inputs[2]))[:4]
        return None, d_query, d_key, d_place, *gradients[4:7]


def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        place: Optional[Tensor],
        gamma: Gamma,
        spec: Spec,
) -> Tensor:
    """Footprint attention by compiled loops; arguments as `ops.footprint_attention`.

    Computes in float32 whatever the dtype of the maps. The result has the memory format of `value`. Nothing depends on
    the number of threads.
    """
    _, reason = _load()
    if unavailable() is not None:
        raise RuntimeError(reason)
    with torch.autocast('cpu', enabled=False):
        norm1 = _affine(gamma.norm1, lambda: relation_statistics(query, key, place, spec))
        norm2 = _affine(gamma.norm2, lambda: _hidden_statistics(query, key, place, norm1, gamma, spec))
        shape, folded = _folded(norm1, norm2, gamma, spec)
        return _Attend.apply(shape, query, key, value, place, *folded)


def _affine(norm: Norm, statistics: Callable[[], Tuple[Tensor, Tensor, int]]) -> Affine:
    if not norm.batch_statistics:
        return fold(norm, norm.running_mean, norm.running_var)
    mean, var, values = statistics()
    if values <= 1:
        raise ValueError(f'batch statistics need more than 1 value per channel, got {values}: '
                         'use a larger batch or image, or put the norm in eval mode')
    count = torch.tensor(float(values))
    if norm.group is not None:
        mean, var, count = synchronise(mean, var, count, norm.group)
    update_running_statistics(norm, mean.detach(), var.detach(), count)
    return fold(norm, mean, var)


def _hidden_statistics(query: Tensor, key: Tensor, place: Optional[Tensor], norm1: Affine, gamma: Gamma,
                       spec: Spec) -> Tuple[Tensor, Tensor, int]:
    weight1 = gamma.weight1.flatten(1).float().t()
    hidden = weight1.shape[1]
    scale1, shift1, weight1 = (_in_loop_order(x, spec).contiguous() for x in (*norm1, weight1))
    mean, var = _HiddenStatistics.apply(
        _Shape(spec, hidden, LANES), query, key, place, scale1, shift1, _pad(weight1, _round_up(hidden)).contiguous())
    vectors = query.shape[0] * query.shape[2] * query.shape[3] * (spec.kernel_size ** 2 if spec.pairwise else 1)
    return mean, var, vectors
