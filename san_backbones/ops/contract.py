"""What a backend of footprint attention is: what it is asked, and what it says of itself."""
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import statistics
from .gamma import Spec

__all__ = ['FUSED_DTYPES', 'Backend', 'FusedBackend', 'Request']

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of maps, where a backend computes in float32; what is folded is float32."""


class Request(NamedTuple):
    """What an attention needs, as far as the choice of a backend depends on it."""
    spec: Spec
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    needs_grad: bool
    batch_statistics: bool
    symbolic: str | None  # who is looking at the program rather than running it, e.g. 'torch.export'
    matrices: int = 0  # elements of gamma's two matrices for one tap


class Backend(NamedTuple):
    """One implementation: `refusal(request)` is None or the reason why it cannot run; `attend` computes. A backend that
    `finishes` also takes the argument `shift` of `footprint_attention`, without gradients.
    """
    name: str
    refusal: Callable[[Request], str | None]
    attend: Callable[..., Tensor]
    finishes: bool = False


class FusedBackend(NamedTuple):
    """A backend whose attention, gradients and batch statistics are one loop each, nothing of size k x k being kept.

    `loops` returns a module with the functions `output`, `gradients`, `sums` and `sums_gradients` on maps with channels
    last and folded gamma; `native.attention` describes them. One with `parts` has also `hidden`, `from_hidden` and the
    gradients of both. `fused.FUSED` lists these backends, and registers torch's
    operators for them.
    """
    name: str  # also of the table `relations.RELATIONS`, which says what it can compute
    where: str  # it runs, in words
    devices: tuple[str, ...]  # types of devices it can run on, as torch names them
    missing: Callable[[torch.device], str | None]  # what is missing to run on such a device here and now, or None
    loops: Callable[[], Any]  # imports them if need be: in a process that is forked while a thread imports, that hangs
    width: Callable[[], int] = lambda: 1  # elements of a vector: gamma's columns are filled up to whole ones
    dtypes: tuple[torch.dtype, ...] = FUSED_DTYPES  # of maps
    limit: Callable[[Request], str | None] = lambda request: None  # what else keeps it from a request
    say_unavailable: Callable[[], None] = lambda: None  # called where it would have run
    parts: bool = False  # whether it does the patchwise form in two parts, with a map of hidden vectors between

    def unavailable(self, device: torch.device) -> str | None:
        """Why it does not run on the device, or None."""
        if device.type not in self.devices:
            return f'it runs on {self.where}, the maps are on {device}'
        return self.missing(device)

    def unfit(self, request: Request) -> str | None:
        """Why it cannot run the request wherever it is installed, or None."""
        if request.symbolic is not None:
            return f'{request.symbolic} sees the plain definition'
        if request.device.type not in self.devices:
            return self.unavailable(request.device)
        if request.dtype not in self.dtypes:
            return f'it computes in float32, the maps are {request.dtype}'
        relation = request.spec.described
        if self.name not in relation.backends:
            return f'it has no {relation.name} relation'
        if request.batch_statistics and (relation.is_pairwise, relation.name) not in statistics.SUPPORTED:
            return f'it has no batch statistics of the {relation.name} relation'
        return None

    def refusal(self, request: Request) -> str | None:
        """Why it cannot run the request, or None."""
        return self.unfit(request) or self.missing(request.device) or self.limit(request)
