"""The compiled loops for the CPU: optional at installation; without them `unavailable()` says why."""
from ..contract import FusedBackend
from . import attention, differences, library  # noqa: F401, differences registers kernels
from .library import (
    QUIET_VARIABLE,
    Call,
    Program,
    build,
    has_amx,
    has_int8,
    pool,
    unavailable,
    warn_if_unavailable,
    width,
)
from .linear import Int8, linear, pack, pack_bfloat16, pack_int8, unpack, unpack_bfloat16, unpack_int8
from .pointwise import moments, scale_shift_relu, scale_shift_relu_gradient, scale_shift_relu_sums, stem

__all__ = [
    'BACKEND',
    'QUIET_VARIABLE',
    'Call',
    'Int8',
    'Program',
    'build',
    'has_amx',
    'has_int8',
    'library',
    'linear',
    'moments',
    'pack',
    'pack_bfloat16',
    'pack_int8',
    'pool',
    'scale_shift_relu',
    'scale_shift_relu_gradient',
    'scale_shift_relu_sums',
    'stem',
    'unavailable',
    'unpack',
    'unpack_bfloat16',
    'unpack_int8',
    'warn_if_unavailable',
    'width',
]

BACKEND = FusedBackend(
    'native', 'the CPU', ('cpu',),
    missing=lambda device: unavailable(), loops=lambda: attention, width=width, say_unavailable=warn_if_unavailable,
    parts=True)
"""Computes in float32 whatever the dtype of the maps. Nothing depends on the number of threads."""
