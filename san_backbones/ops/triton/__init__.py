"""Footprint attention by Triton kernels, for CUDA; where there is none, `unavailable()` says why."""
import functools
import importlib.util
import os

import torch

__all__ = ['unavailable']


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec('triton') is not None


def _interpreting() -> bool:
    return os.environ.get('TRITON_INTERPRET', '0').lower() in ('1', 'true', 'yes', 'on')


def unavailable(device: torch.device) -> str | None:
    """None if the kernels run on `device`, else the reason."""
    if not _installed():
        return 'Triton is not installed'
    if device.type == 'cpu' and _interpreting():
        return None  # Triton's interpreter, for tests: far slower than anything else
    if device.type != 'cuda' or torch.version.hip is not None:
        return f'it runs on NVIDIA GPUs, the maps are on {device}'
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f'it needs compute capability 8.0 or newer, {torch.cuda.get_device_name(device)} has an older one'
    return None
