"""The OpenMP runtime that torch has loaded: the loops run on its threads, so that no second pool competes with them."""
import ctypes
import functools
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch

__all__ = ['Runtime', 'number', 'runtime']


class Runtime(NamedTuple):
    """Where the loops find threads.

    `parallel` is the address of a function with the signature of GCC's GOMP_parallel, None for one thread.
    `lost_in_fork` says whether a forked process would wait for threads that it has not: GCC's runtime does. `name` is
    the file.
    """
    parallel: int | None = None
    lost_in_fork: bool = False
    name: str = 'none'


_MAPS = '/proc/self/maps'
_NAME = re.compile(rb'lib(gomp|omp|iomp5)[-.]')


def _sorted(paths: set[bytes]) -> list[str]:
    """The OpenMP runtimes among these files: torch's own first, and always in one order."""
    home = os.path.realpath(torch.__path__[0])  # and in some wheels beside it, in torch.libs
    runtimes = (os.fsdecode(path) for path in paths if _NAME.match(path.rpartition(b'/')[2]))
    return sorted(runtimes, key=lambda path: (not path.startswith(home), path))


def _mapped(maps: bytes) -> set[bytes]:
    """The files that Linux's /proc/self/maps lists; names are bytes, in no encoding that is known here."""
    return {line.split(None, 5)[-1] for line in maps.split(b'\n') if line}


def _images() -> Iterator[bytes]:
    """The libraries that macOS's dynamic linker has loaded."""
    linker = ctypes.CDLL(None)
    linker._dyld_get_image_name.restype = ctypes.c_char_p
    for index in range(linker._dyld_image_count()):
        name = linker._dyld_get_image_name(ctypes.c_uint32(index))
        if name is not None:  # unloaded meanwhile
            yield name


def _gomp(path: str) -> Runtime:
    """A runtime with GCC's interface, which LLVM's has too on Linux and macOS.

    Raises:
        OSError, AttributeError, ValueError: It is not loaded, or is something else.
    """
    loaded = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_NOLOAD)  # another would bring threads of its own
    name = os.path.basename(path)
    return Runtime(ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value, 'gomp' in name, name)


def _kmp(library: ctypes.CDLL, loaded: ctypes.CDLL, name: str) -> Runtime:
    """A runtime with LLVM's interface alone, as on Windows.

    Raises:
        AttributeError: It is something else.
    """
    functions = (loaded.__kmpc_fork_call, loaded.__kmpc_push_num_threads, loaded.__kmpc_global_thread_num)
    library.san_kmp_use(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))
    return Runtime(ctypes.cast(library.san_kmp_parallel, ctypes.c_void_p).value, False, name)


def _on_windows(library: ctypes.CDLL) -> Runtime:
    kernel = ctypes.WinDLL('kernel32')  # type: ignore[attr-defined]
    kernel.GetModuleHandleW.restype = ctypes.c_void_p
    for name in ('libiomp5md.dll', 'libomp140.x86_64.dll', 'libomp.dll'):
        handle = kernel.GetModuleHandleW(ctypes.c_wchar_p(name))  # of what is loaded, never loads
        if handle:
            try:
                return _kmp(library, ctypes.CDLL(name, handle=handle), name)
            except AttributeError:
                continue
    return Runtime()


@functools.cache
def runtime(library: ctypes.CDLL) -> Runtime:
    """The runtime that torch has loaded. Without one the loops run on one thread."""
    if sys.platform == 'win32':
        return _on_windows(library)
    try:
        if sys.platform == 'darwin':
            paths = set(_images())
        else:
            with open(_MAPS, 'rb') as maps:
                paths = _mapped(maps.read())
    except (OSError, AttributeError):
        return Runtime(None, True)  # nobody knows
    for path in _sorted(paths):
        try:
            return _gomp(path)
        except (OSError, AttributeError, ValueError):
            continue
    return Runtime()


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


def number(runtime: Runtime) -> int:
    """How many threads may work: as torch is told, but one where a forked process would wait for ever for more."""
    threads = torch.get_num_threads()
    if threads > 1 and runtime.lost_in_fork and _left_threads_behind:
        torch.set_num_threads(threads := 1)
        warnings.warn('this process was forked from one with several threads; if those were of OpenMP, torch would '
                      'wait for them in vain here: it goes on with one thread. Call torch.set_num_threads(1) before '
                      'the fork or first in the new process, or start it by spawn', RuntimeWarning, stacklevel=2)
    return threads
