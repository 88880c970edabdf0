"""Fused footprint attention on the CPU: the compiled loops of footprint.c, for inference.

Optional at installation: without a C compiler the package works, and `library()` says why this path is not there.
"""
import ctypes
import functools
import math
import pathlib
import sys
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from .. import geometry
from ..gamma import Gamma, Spec, fold

__all__ = ['attend', 'library', 'unavailable']

LANES = 16
RELATIONS = {(True, 'subtraction'): 0, (True, 'summation'): 1, (True, 'hadamard'): 2, (True, 'concatenation'): 3,
             (True, 'dot'): 4, (False, 'concatenation'): 5, (False, 'star'): 6}
# instruction sets by torch's names for what the processor has (ATEN_CPU_CAPABILITY overrides it), best first
BUILDS = {'AVX512': ('avx512', 'avx2', 'baseline'), 'AVX2': ('avx2', 'baseline')}


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
            if library.san_task_bytes() != ctypes.sizeof(_Task):
                return None, f'{path.name} was built from another version of footprint.c; reinstall san_backbones'
            library.san_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
            library.san_run.restype = None
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


def _folded(gamma: Gamma, spec: Spec) -> List[Tensor]:
    """gamma as the loops read it: scale1, shift1, weight1, shift2, weight2, bias2."""
    area = spec.kernel_size ** 2
    scale1, shift1 = fold(gamma.norm1, gamma.norm1.running_mean, gamma.norm1.running_var)
    scale2, shift2 = fold(gamma.norm2, gamma.norm2.running_mean, gamma.norm2.running_var)
    weight1 = (gamma.weight1.flatten(1).float() * scale2[:, None]).t()  # (inputs, hidden)
    weight2, bias2 = gamma.weight2.flatten(1).float().t(), gamma.bias2.float()
    hidden = weight1.shape[1]
    weight_channels = weight2.shape[1] // (1 if spec.pairwise else area)
    lanes = math.lcm(weight_channels, LANES)
    if not spec.pairwise:
        if spec.relation == 'concatenation':  # psi's channels come as c * k^2 + o, the loops write them as o * r + c
            rel = scale1.shape[0] // (area + 1)
            order = torch.arange(rel * area, device=scale1.device).view(rel, area).t().flatten() + rel
            order = torch.cat([torch.arange(rel, device=scale1.device), order])
            scale1, shift1, weight1 = scale1[order], shift1[order], weight1[order]
        weight2 = weight2.view(hidden, weight_channels, area).transpose(1, 2)
        bias2 = bias2.view(weight_channels, area).t()
    padded = (hidden + LANES - 1) // LANES * LANES
    folded = [scale1, shift1, _pad(weight1, padded), _pad(shift2, padded), _repeat(weight2, lanes),
              _repeat(bias2, lanes)]
    return [x.contiguous() for x in folded]


def _channels_last(x: Tensor) -> Tensor:
    return x.detach().float().permute(0, 2, 3, 1).contiguous()


def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        place: Optional[Tensor],
        gamma: Gamma,
        spec: Spec,
) -> Tensor:
    """Footprint attention by compiled loops, without gradients; arguments as `ops.footprint_attention`.

    Computes in float32 whatever the dtype of the maps. The result has the memory format of `value`.
    """
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    with torch.no_grad():
        return _attend(loaded, query, key, value, place, gamma, spec)


def _attend(loaded: ctypes.CDLL, query: Tensor, key: Tensor, value: Tensor, place: Optional[Tensor], gamma: Gamma,
            spec: Spec) -> Tensor:
    batch, out, height, width = value.shape
    pad = geometry.padding(spec.kernel_size, spec.dilation)
    maps = [_channels_last(x) for x in (query, key, value)]
    maps.append(None if place is None else _channels_last(place))
    folded = _folded(gamma, spec)
    indices = [geometry.reflection_index(size, pad) for size in (height, width)]
    output = torch.empty((batch, height, width, out), dtype=torch.float32)
    task = _Task(
        RELATIONS[spec.pairwise, spec.relation], spec.position == 'absolute', batch, height, width, query.shape[1],
        folded[3].shape[0], folded[5].shape[-1], out, spec.kernel_size, spec.dilation,
        *(None if x is None else x.data_ptr() for x in (*maps, *folded, *indices)), output.data_ptr(),
        folded[4].shape[0], 0, 0)
    loaded.san_run(ctypes.addressof(task), _torch_parallel(), torch.get_num_threads())
    if task.failed:
        raise MemoryError('no memory for the working space of a thread of the native footprint attention')
    result = output.permute(0, 3, 1, 2).to(value.dtype)
    keeps_format = value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()
    return result if keeps_format else result.contiguous()
