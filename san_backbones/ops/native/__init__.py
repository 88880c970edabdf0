"""The compiled loops for the CPU: optional at installation; without them `unavailable()` says why."""
from ..folding import RELATIONS
from .library import build, unavailable
from .pointwise import scale_shift_relu, stem

__all__ = ['RELATIONS', 'build', 'scale_shift_relu', 'stem', 'unavailable']
