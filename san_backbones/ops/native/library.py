"""The compiled loops, as ctypes sees them: structures, loading, and a call that runs on torch's threads."""
import ctypes
import functools
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import threads

__all__ = [
    'QUIET_VARIABLE',
    'Backward',
    'Call',
    'Differences',
    'Linear',
    'Matrix',
    'Normed',
    'Program',
    'Scaled',
    'Stem',
    'Task',
    'build',
    'codes',
    'has_amx',
    'has_int8',
    'panel',
    'pool',
    'run',
    'unavailable',
    'unchanged',
    'warn_if_unavailable',
    'width',
]

QUIET_VARIABLE = 'SAN_BACKBONES_QUIET'
"""Environment variable: 1 lets the package compute without the compiled loops, and not say so."""

# instruction sets by torch's names for what the processor has (ATEN_CPU_CAPABILITY overrides it), best first
BUILDS: dict[str, tuple[str, ...]] = {'AVX512': ('avx512', 'avx2', 'baseline'), 'AVX2': ('avx2', 'baseline')}


UNKNOWN_CODE = 2
"""Of enum failure of footprint.h."""
UNKNOWN_RELATION = -1
"""In the place of the number of a relation that the loops have not."""
FORMS = ('pairwise', 'patchwise')
"""By their numbers in enum form of footprint.h."""


def _int64(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int64) for name in names.split()]


def _pointers(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


class Matrix(ctypes.Structure):
    """struct matrix of footprint.h."""
    _fields_ = [*_pointers('at'), *_int64('row')]


def _matrices(names: str) -> list[tuple[str, Any]]:
    return [(name, Matrix) for name in names.split()]


class Linear(ctypes.Structure):
    """struct linear of linear.h."""
    _fields_ = [
        *_int64('kind pixels inner columns'), *_matrices('input'),
        *_int64('pooled_width pooled_height from_width from_height'),
        *_pointers('scale shift weight column_scale column_sum bias'), *_matrices('output'), *_int64('add'),
        *_pointers('out_scale out_shift'), ('limit', ctypes.c_float),
        *_int64('tile chunk next failed'),
    ]


class Task(ctypes.Structure):
    """struct task of footprint.h."""
    _fields_ = [
        *_int64('form relation part absolute batch height width kernel dilation'),
        *_int64('rel centre tap hidden hidden_used lanes weight_channels out planes'),
        *_matrices('query key value between place'), *_pointers('scale1 shift1 shift2 bias2'),
        *_matrices('weight1 weight2'), ('eight', ctypes.POINTER(Linear)),
        *_pointers('rows columns shift'), *_matrices('output'), *_int64('together next failed'),
    ]


class Backward(ctypes.Structure):
    """struct backward of backward.c."""
    _fields_ = [
        ('task', Task), *_int64('mode inputs inputs_padded slots parameters band odd'),
        *_matrices('gradient weight1_t weight2_t d_between d_query d_key d_value d_place'),
        *_pointers('d_parameters sums'),
    ]


class Differences(ctypes.Structure):
    """struct differences of differences.c."""
    _fields_ = [
        *_int64('mode batch height width channels kernel slots'), *_matrices('query key'),
        # four struct axis
        *_pointers('row_starts row_pixels column_starts column_pixels'),
        *_pointers('seeing_row_starts seeing_row_pixels seeing_column_starts seeing_column_pixels'),
        *_pointers('sums slope level'), *_matrices('d_query d_key'), *_int64('next failed'),
    ]


class Stem(ctypes.Structure):
    """struct stem of pointwise.c."""
    _fields_ = [
        *_int64('batch height width inputs out out_padded'), ('strides', ctypes.c_int64 * 4),
        *_int64('slots parameters'), *_pointers('image weight bias output gradient d_image d_parameters'),
        *_int64('next failed'),
    ]


class Scaled(ctypes.Structure):
    """struct scaled of pointwise.c."""
    _fields_ = [
        *_int64('pixels channels'), *_pointers('x scale shift output'), ('limit', ctypes.c_float),
        *_int64('next failed'),
    ]


class Normed(ctypes.Structure):
    """struct normed of pointwise.c."""
    _fields_ = [
        *_int64('mode pixels channels'), *_pointers('x gradient beside mean scale shift by_x by_one d_x sums'),
        *_int64('slots'), ('limit', ctypes.c_float), *_int64('next failed'),
    ]


_STRUCTURES: dict[str, type[ctypes.Structure]] = {
    'san': Task, 'san_backward': Backward, 'san_differences': Differences, 'san_linear': Linear, 'san_stem': Stem,
    'san_scaled': Scaled, 'san_normed': Normed}


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
            library.san_unchanged.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
            library.san_unchanged.restype = ctypes.c_int64
            library.san_relations.argtypes = [ctypes.c_int64]
            library.san_relations.restype = ctypes.c_char_p
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
    """Elements of a vector of the build that serves this processor."""
    return _loaded().san_width()


def unchanged(vectors: Tensor, expected: Tensor) -> bool:
    """Whether elements have the bits that are expected: `vectors` has address, stride, count and bytes of an element of
    each vector, (V, 4), int64; `expected` their bytes, one vector behind the other.
    """
    return bool(_loaded().san_unchanged(vectors.data_ptr(), len(vectors), expected.data_ptr()))


def panel() -> int:
    """Columns of a panel of a linear map's weights."""
    return _loaded().san_panel()


@functools.cache
def _int8() -> int:
    return 0 if unavailable() is not None else _loaded().san_int8()


def has_int8() -> bool:
    """Whether linear maps may be computed in 8 bits: the AVX-512 build, on a processor with VNNI."""
    return _int8() > 0


def has_amx() -> bool:
    """Whether maps of 8 bits and of bfloat16 are multiplied by AMX: on a processor that has it, and a system that lets
    this process use it.
    """
    return _int8() > 1


@functools.cache
def codes(form: str, relation: str) -> tuple[int, int]:
    """The numbers that the loops have for a form and a relation of it: `UNKNOWN_RELATION` for one they have not."""
    number = FORMS.index(form)
    names = _loaded().san_relations(number).decode().split()
    return number, names.index(relation) if relation in names else UNKNOWN_RELATION


def run(name: str, task: ctypes.Structure) -> None:
    """Calls `NAME_run` of the library on torch's threads.

    Raises:
        MemoryError: A thread had no memory for its working space.
        ValueError: The loops have no such form, relation or mode as the task has.
    """
    library = _loaded()
    runtime = threads.runtime(library)
    getattr(library, f'{name}_run')(ctypes.addressof(task), runtime.parallel, threads.number(runtime))
    _raise_failure(name, task)


def _raise_failure(name: str, task: Any) -> None:
    common = getattr(task, 'task', task)  # of the backward loops, what they share with the forward ones
    if common.failed == UNKNOWN_CODE:
        raise ValueError(f'the native loops ({name}) have no such form, relation or mode: form {common.form}, relation '
                         f'{common.relation}, mode {getattr(task, "mode", 0)}')
    if common.failed:
        raise MemoryError(f'no memory for the working space of a thread of the native loops ({name})')


class Call(NamedTuple):
    """What `run` is given, and the tensors that the task points to."""
    name: str
    task: Any
    tensors: Sequence[Tensor | None]


class Program:
    """Calls of the loops that are prepared once, and repeated on other maps of the same sizes and strides: for small
    maps, to prepare them takes as long as the loops. Not for two threads at a time.

    Args:
        calls: In their order.
        maps: Tensors that a run may replace: wherever a matrix of a call begins in the memory of one of them, it
            begins in the memory of its successor, as far behind the first element.
    """

    def __init__(self, calls: Sequence[Call], maps: Sequence[Tensor]):
        library = _loaded()
        self._calls: list[tuple[Any, int, Any, str]] = [
            (getattr(library, f'{call.name}_run'), ctypes.addressof(call.task), call.task, call.name) for call in calls]
        self._places: list[tuple[Matrix, int, int]] = []
        ranges = [(x.data_ptr(), x.untyped_storage().data_ptr() + x.untyped_storage().nbytes()) for x in maps]
        own = {x.untyped_storage().data_ptr() for x in maps}
        self._tensors: list[Tensor] = [x for call in calls for x in call.tensors  # not the maps: they may go
                                       if x is not None and x.untyped_storage().data_ptr() not in own]
        for call in calls:
            for field, kind in call.task._fields_:
                matrix = getattr(call.task, field) if kind is Matrix else None
                for number, (begin, end) in enumerate(ranges):
                    if matrix is not None and matrix.at is not None and begin <= matrix.at < end:
                        self._places.append((matrix, number, matrix.at - begin))
                        break

    def run(self, maps: Sequence[Tensor]) -> None:
        """Repeats the calls. Raises what `run` raises."""
        runtime = threads.runtime(_loaded())
        parallel, number = runtime.parallel, threads.number(runtime)
        begins = [x.data_ptr() for x in maps]
        for matrix, which, behind in self._places:
            matrix.at = begins[which] + behind
        for function, address, task, name in self._calls:
            task.next = task.failed = 0
            function(address, parallel, number)
            if task.failed:
                _raise_failure(name, task)
