"""The compiled loops, as ctypes sees them: structures, loading, and a call that runs on torch's threads."""
import ctypes
import functools
import os
import pathlib
import re
import sys
import warnings

import torch

__all__ = ['Backward', 'Scaled', 'Stem', 'Task', 'build', 'run', 'unavailable', 'width']

# instruction sets by torch's names for what the processor has (ATEN_CPU_CAPABILITY overrides it), best first
BUILDS = {'AVX512': ('avx512', 'avx2', 'baseline'), 'AVX2': ('avx2', 'baseline')}


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


_STRUCTURES = {'san': Task, 'san_backward': Backward, 'san_stem': Stem, 'san_scaled': Scaled}


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


def unavailable() -> str | None:
    """None if the compiled loops are there, else the reason."""
    loaded, reason = _load()
    return None if loaded is not None else reason


def _loaded() -> ctypes.CDLL:
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


@torch.compiler.assume_constant_result
def width() -> int:
    """Numbers in a vector of the build that serves this processor."""
    return _loaded().san_width()


_MAPS = '/proc/self/maps'
_RUNTIME = re.compile(rb'lib(gomp|omp|iomp5)[-.]')


def _runtimes(maps: bytes) -> list[str]:
    """The OpenMP runtimes among the files that /proc/self/maps lists: torch's own first, and always in one order."""
    # names are bytes: in no encoding that is known here
    paths = {line.split(None, 5)[-1] for line in maps.split(b'\n') if _RUNTIME.match(line.rpartition(b'/')[2])}
    home = os.path.realpath(torch.__path__[0])  # and in some wheels beside it, in torch.libs
    return sorted(map(os.fsdecode, paths), key=lambda path: (not path.startswith(home), path))


@functools.cache
def _torch_parallel() -> tuple[int | None, bool]:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded, so that its threads do this work too; and
    whether that is GCC's, whose threads are waited for in vain after a fork. Without one the loops run on one thread.
    """
    if not sys.platform.startswith('linux'):
        return None, False
    try:
        with open(_MAPS, 'rb') as maps:
            paths = _runtimes(maps.read())
    except OSError:
        return None, True  # nobody knows
    for path in paths:
        try:
            runtime = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_NOLOAD)  # another would bring threads of its own
            address = ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
            return address, 'gomp' in os.path.basename(path)
        except (OSError, AttributeError, ValueError):
            continue
    return None, False


_threads_at_fork, _left_threads_behind = 1, False


def _before_fork() -> None:
    global _threads_at_fork
    try:
        _threads_at_fork = len(os.listdir('/proc/self/task'))
    except OSError:
        _threads_at_fork = 2  # nobody knows


def _in_child() -> None:
    global _left_threads_behind
    _left_threads_behind = _left_threads_behind or _threads_at_fork > 1


if sys.platform.startswith('linux'):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)


def _threads(lost_in_fork: bool) -> int:
    """How many threads may work: as torch is told, but one where more would be waited for for ever."""
    threads = torch.get_num_threads()
    if threads > 1 and lost_in_fork and _left_threads_behind:
        torch.set_num_threads(threads := 1)
        warnings.warn('this process was forked from one with several threads; if those were of OpenMP, torch would '
                      'wait for them in vain here: it goes on with one thread. Call torch.set_num_threads(1) before '
                      'the fork or first in the new process, or start it by spawn', RuntimeWarning, stacklevel=2)
    return threads


def run(name: str, task: ctypes.Structure) -> None:
    """Calls `NAME_run` of the library on torch's threads.

    Raises:
        MemoryError: A thread had no memory for its working space.
        ValueError: The loops do not know the relation or the mode of the task.
    """
    parallel, lost_in_fork = _torch_parallel()
    getattr(_loaded(), f'{name}_run')(ctypes.addressof(task), parallel, _threads(lost_in_fork))
    failed = getattr(task, 'task', task).failed
    if failed == UNKNOWN_CODE:
        raise ValueError(f'the native loops ({name}) know no such relation or mode: relation '
                         f'{getattr(task, "task", task).relation}, mode {getattr(task, "mode", 0)}')
    if failed:
        raise MemoryError(f'no memory for the working space of a thread of the native loops ({name})')
