"""The compiled loops for the CPU: optional at installation; without them `unavailable()` says why."""
from ..folding import RELATIONS
from .library import QUIET_VARIABLE, build, pool, unavailable, warn_if_unavailable
from .pointwise import scale_shift_relu, stem

__all__ = ['QUIET_VARIABLE', 'RELATIONS', 'build', 'pool', 'scale_shift_relu', 'stem', 'unavailable',
           'warn_if_unavailable']
