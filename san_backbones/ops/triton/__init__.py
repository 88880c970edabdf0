"""Footprint attention by Triton kernels, for CUDA; where there is none, `unavailable()` says why."""
import functools
import importlib
import importlib.util
import os

import torch

from ..contract import FusedBackend, Request

__all__ = ['BACKEND', 'TUNE_VARIABLE', 'installed', 'too_wide', 'unavailable']

TUNE_VARIABLE = 'SAN_BACKBONES_TRITON_TUNE'


OLDEST = (3, 4)
"""The first Triton that compiles the kernels; it came with torch 2.8."""


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec('triton') is not None


@functools.cache
def _version() -> str:
    import triton
    return triton.__version__


@functools.cache
def _fault() -> str | None:
    """Why Triton does not start here: it compiles its driver, and needs a C compiler for that; None if it does."""
    try:
        _version()
        from triton.runtime import driver
        driver.active.utils  # noqa: B018
    except Exception as error:
        return f'Triton does not start: {type(error).__name__}: {(str(error).splitlines() or [""])[0]}'
    return None


def _interpreting() -> bool:
    return os.environ.get('TRITON_INTERPRET', '0').lower() in ('1', 'true', 'yes', 'on')


def unavailable(device: torch.device) -> str | None:
    """None if the kernels run on `device`, else the reason."""
    if not installed():
        return 'Triton is not installed'
    interpreted = device.type == 'cpu' and _interpreting()  # for tests: far slower than anything else
    if not interpreted and (device.type != 'cuda' or torch.version.hip is not None):
        return f'it runs on NVIDIA GPUs, the maps are on {device}'
    if not interpreted and _fault() is not None:
        return _fault()
    if tuple(map(int, _version().split('.')[:2])) < OLDEST:
        return f'it needs Triton {".".join(map(str, OLDEST))} or newer, {_version()} is installed'
    if not interpreted and torch.cuda.get_device_capability(device) < (8, 0):
        return f'it needs compute capability 8.0 or newer, {torch.cuda.get_device_name(device)} has an older one'
    return None


def too_wide(device: torch.device, elements: int, needs_grad: bool) -> str | None:
    """Why matrices of so many elements do not stay in the shared memory of `device`; None if they do.

    Bytes for an element are what float32 kernels of the pairwise form were seen to take, rounded up.
    """
    need = elements * 5 if needs_grad else elements * 7 // 2
    if device.type != 'cuda' or need <= 48 << 10:  # which every GPU has
        return None
    there = getattr(torch.cuda.get_device_properties(device), 'shared_memory_per_block_optin', 0)
    if need <= there:
        return None
    return f'its programs would need about {need >> 10} KiB of shared memory, {device} has {there >> 10} KiB'


def _limit(request: Request) -> str | None:
    if request.needs_grad and request.device.type == 'cuda' and torch.are_deterministic_algorithms_enabled():
        return 'it sums gradients in an order that varies, and torch.use_deterministic_algorithms(True) was called'
    return too_wide(request.device, request.matrices, request.needs_grad)


BACKEND = FusedBackend(
    'triton', 'NVIDIA GPUs', ('cuda', 'cpu'),  # on the CPU in Triton's interpreter
    missing=lambda device: unavailable(device),
    loops=lambda: importlib.import_module('.launch', __name__), limit=_limit)
"""Factors of matrix products have the dtype of the maps (float32: as `torch.backends.cuda.matmul.allow_tf32` says), all
else is float32. Gradients of maps are sums by atomic additions, whose order differs from run to run.
"""
