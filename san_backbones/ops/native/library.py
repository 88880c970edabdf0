"""The compiled loops, as ctypes sees them: structures, loading, and a call that runs on torch's threads."""
import ctypes
import functools
import os
import pathlib
import warnings

import torch

from . import threads

__all__ = [
    'QUIET_VARIABLE',
    'Backward',
    'Scaled',
    'Stem',
    'Task',
    'build',
    'pool',
    'run',
    'unavailable',
    'warn_if_unavailable',
    'width',
]

QUIET_VARIABLE = 'SAN_BACKBONES_QUIET'
"""Environment variable: 1 lets the package compute without the compiled loops, and not say so."""

# instruction sets by torch's names for what the processor has (ATEN_CPU_CAPABILITY overrides it), best first
BUILDS: dict[str, tuple[str, ...]] = {'AVX512': ('avx512', 'avx2', 'baseline'), 'AVX2': ('avx2', 'baseline')}


UNKNOWN_CODE = 2
"""Of enum failure of footprint.h."""


class Task(ctypes.Structure):
    """struct task of footprint.c."""
    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            'relation', 'absolute', 'batch', 'height', 'width', 'rel', 'hidden', 'lanes', 'out', 'kernel', 'dilation',
            'query_row', 'key_row', 'value_row')),
        *((name, ctypes.c_void_p) for name in (
            'query', 'key', 'value', 'place', 'scale1', 'shift1', 'weight1', 'shift2', 'weight2', 'bias2', 'rows',
            'columns', 'shift', 'output')),
        *((name, ctypes.c_int64) for name in ('hidden_used', 'together', 'next', 'failed')),
    ]


class Backward(ctypes.Structure):
    """struct backward of backward.c."""
    _fields_ = [
        ('task', Task),
        *((name, ctypes.c_int64) for name in (
            'mode', 'inputs', 'inputs_padded', 'rel_padded', 'slots', 'parameters', 'band', 'odd')),
        *((name, ctypes.c_void_p) for name in (
            'gradient', 'weight1_t', 'weight2_t', 'd_query', 'd_key', 'd_value', 'd_place', 'd_parameters', 'sums')),
    ]


class Stem(ctypes.Structure):
    """struct stem of pointwise.c."""
    _fields_ = [
        *((name, ctypes.c_int64) for name in ('batch', 'height', 'width', 'inputs', 'out', 'out_padded')),
        ('strides', ctypes.c_int64 * 4),
        *((name, ctypes.c_int64) for name in ('slots', 'parameters')),
        *((name, ctypes.c_void_p) for name in (
            'image', 'weight', 'bias', 'output', 'gradient', 'd_image', 'd_parameters')),
        *((name, ctypes.c_int64) for name in ('next', 'failed')),
    ]


class Scaled(ctypes.Structure):
    """struct scaled of pointwise.c."""
    _fields_ = [
        *((name, ctypes.c_int64) for name in ('pixels', 'channels')),
        *((name, ctypes.c_void_p) for name in ('x', 'scale', 'shift', 'output')),
        ('limit', ctypes.c_float),
        *((name, ctypes.c_int64) for name in ('next', 'failed')),
    ]


_STRUCTURES: dict[str, type[ctypes.Structure]] = {
    'san': Task, 'san_backward': Backward, 'san_stem': Stem, 'san_scaled': Scaled}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
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
            for name, structure in _STRUCTURES.items():
                if not hasattr(library, f'{name}_bytes') \
                        or getattr(library, f'{name}_bytes')() != ctypes.sizeof(structure):
                    return None, f'{path.name} was built from another version of its source; reinstall san_backbones'
                function = getattr(library, f'{name}_run')
                function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
                function.restype = None
            return library, build
    return None, f'the compiled loops are not installed (looked for {", ".join(builds)} in {folder})'


def build() -> str:
    """Name of the build that serves this processor, or why there is none."""
    return _load()[1]


def pool() -> tuple[str, int]:
    """The OpenMP runtime whose threads the loops use ('none': they run on one thread), and how many of them."""
    runtime = threads.runtime(_loaded())
    return runtime.name, threads.number(runtime) if runtime.parallel is not None else 1


def unavailable() -> str | None:
    """None if the compiled loops are there, else the reason."""
    loaded, reason = _load()
    return None if loaded is not None else reason


@functools.cache
def warn_if_unavailable() -> None:
    """Says once that the loops are missing, what that costs and what to do."""
    reason = unavailable()
    if reason is not None and os.environ.get(QUIET_VARIABLE, '') in ('', '0'):
        warnings.warn(
            f'{reason}. On the CPU models take about three times as long without them. Install a C compiler '
            '(gcc or clang), then reinstall san_backbones from its source; with SAN_BACKBONES_REQUIRE_LOOPS=1 in the '
            f'environment that stops where they cannot be built, and says why. {QUIET_VARIABLE}=1 silences this',
            RuntimeWarning, stacklevel=2)


def _loaded() -> ctypes.CDLL:
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


@torch.compiler.assume_constant_result
def width() -> int:
    """Numbers in a vector of the build that serves this processor."""
    return _loaded().san_width()


def run(name: str, task: ctypes.Structure) -> None:
    """Calls `NAME_run` of the library on torch's threads.

    Raises:
        MemoryError: A thread had no memory for its working space.
        ValueError: The loops do not know the relation or the mode of the task.
    """
    library = _loaded()
    runtime = threads.runtime(library)
    getattr(library, f'{name}_run')(ctypes.addressof(task), runtime.parallel, threads.number(runtime))
    failed = getattr(task, 'task', task).failed
    if failed == UNKNOWN_CODE:
        raise ValueError(f'the native loops ({name}) know no such relation or mode: relation '
                         f'{getattr(task, "task", task).relation}, mode {getattr(task, "mode", 0)}')
    if failed:
        raise MemoryError(f'no memory for the working space of a thread of the native loops ({name})')
