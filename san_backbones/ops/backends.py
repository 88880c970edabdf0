"""Which backend computes an attention: one choice, with its reasons.

`BACKENDS` lists them from the most to the least wanted: first the fused ones that `fused.FUSED` registers.
`choose_backend` takes the first that does not refuse, and says in the debug log of `san_backbones.ops` why others did.
`use_backend` (a context manager) or the environment variable SAN_BACKBONES_BACKEND names one; it is an error if that
one cannot run.
"""
import contextlib
import functools
import logging
import os
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from . import fused, native, reference, relations, tiled
from .contract import Backend, Request
from .folding import power_of_2
from .gamma import Gamma, Spec
from .tracing import symbolic_caller

__all__ = [
    'AUTO',
    'BACKENDS',
    'ENVIRONMENT_VARIABLE',
    'Backend',
    'Request',
    'available_backends',
    'choose_backend',
    'use_backend',
]

_logger = logging.getLogger('san_backbones.ops')

AUTO = 'auto'
ENVIRONMENT_VARIABLE = 'SAN_BACKBONES_BACKEND'
_overrides: tuple[tuple[str, int], ...] = ()  # backends and threads; for all threads, since autograd has its own
_entering = threading.Lock()


def _in_child() -> None:
    """After a fork: threads that held the lock, or were in a block, are not here."""
    global _entering, _overrides
    _entering = threading.Lock()
    _overrides = tuple(override for override in _overrides if override[1] == threading.get_ident())


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_in_child)


def _tiled_refusal(request: Request) -> str | None:
    if request.symbolic is not None:
        return f'{request.symbolic} sees the plain definition'
    return None


BACKENDS = (
    *(Backend(backend.name, backend.refusal, functools.partial(fused.attend, backend.name), finishes=True)
      for backend in fused.FUSED),
    Backend('tiled', _tiled_refusal, tiled.attend),
    Backend('reference', lambda request: None, reference.attend),
)


def _named(name: str, where: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    known = ', '.join(repr(n) for n in (AUTO, *(b.name for b in BACKENDS)))
    raise ValueError(f'unknown backend {name!r} in {where}; expected one of {known}')


def _wanted() -> tuple[str, str]:
    """The backend asked for and who asked."""
    overrides = _overrides
    if overrides:
        return overrides[-1][0], 'san_backbones.ops.use_backend'
    return os.environ.get(ENVIRONMENT_VARIABLE, '') or AUTO, f'the environment variable {ENVIRONMENT_VARIABLE}'


def serves(x: Tensor) -> bool:
    """Whether the compiled loops around the attention take x: the conditions of the native backend, and no other asked
    for.
    """
    return x.dtype in native.BACKEND.dtypes and symbolic_caller(x) is None \
        and _wanted()[0] in (AUTO, native.BACKEND.name) and native.BACKEND.unavailable(x.device) is None


@torch.compiler.assume_constant_result
def compiled_backend(device: str, dtype: str, pairwise: bool, relation: str, needs_grad: bool, batch_statistics: bool,
                     matrices: int) -> str:
    """The fused backend whose operators a graph of torch.compile calls; 'reference' where there is none.

    Decided when the graph is compiled: what `use_backend` says then stays in it.
    """
    request = Request(Spec(pairwise, relation, 'none', 1, 1), torch.device(device), getattr(torch, dtype[6:]), (),
                      needs_grad, batch_statistics, None, matrices)
    name = choose_backend(request).name
    return name if name in (backend.name for backend in fused.FUSED) else 'reference'


def make_request(query: Tensor, key: Tensor, value: Tensor, place: Tensor | None, gamma: Gamma,
                 spec: Spec) -> Request:
    """Describes a call of `footprint_attention`."""
    tensors = (query, key, value, place, *gamma.norm1[:2], gamma.weight1, *gamma.norm2[:2], gamma.weight2, gamma.bias2)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    batch_statistics = gamma.norm1.batch_statistics or gamma.norm2.batch_statistics
    symbolic = symbolic_caller(value)
    matrices = tap_matrices(query, gamma, spec) if symbolic is None else 0  # sizes may be symbols while tracing
    return Request(spec, value.device, value.dtype, tuple(value.shape), needs_grad, batch_statistics, symbolic,
                   matrices)


def tap_matrices(query: Tensor, gamma: Gamma, spec: Spec) -> int:
    """Elements of weight1 and weight2 that belong to one tap, sizes rounded up to powers of 2."""
    taps = 1 if spec.pairwise else spec.kernel_size ** 2
    channels, hidden = gamma.weight2.shape[:2]
    tap_width = 1 if relations.is_summed(spec.pairwise, spec.relation) else query.shape[1]
    return power_of_2(hidden) * (power_of_2(tap_width) + power_of_2(channels // taps))


def choose_backend(request: Request) -> Backend:
    """The backend that will compute `request`.

    Raises:
        ValueError: The backend named by `use_backend` or the environment does not exist.
        RuntimeError: It exists and cannot run this request; the message says why.
    """
    name, where = _wanted()
    if name != AUTO:
        backend = _named(name, where)
        reason = backend.refusal(request)
        if reason is not None and request.symbolic is None:
            raise RuntimeError(f'backend {name!r}, asked for by {where}, cannot run: {reason}')
        if reason is None:
            return backend
    for backend in BACKENDS:
        reason = backend.refusal(request)
        if reason is None:
            _logger.debug('%s chosen for %s', backend.name, request)
            if name == AUTO:
                _say_what_is_missing(backend.name, request)
            return backend
        _logger.debug('%s refused: %s', backend.name, reason)
    raise AssertionError('the reference refuses nothing')


def _say_what_is_missing(chosen: str, request: Request) -> None:
    """For the fused backends that would have been wanted more."""
    for backend in fused.FUSED:
        if backend.name == chosen:
            return
        if backend.unfit(request) is None:
            backend.say_unavailable()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Computes every attention inside the block by the backend `name` ('auto' lets the choice be made).

    It holds for all threads of the process; of blocks that several threads are in, the one entered last. Where
    activations are checkpointed, run the backward pass inside the block too, for it computes the attention again.

    Example:
        >>> with san_backbones.ops.use_backend('reference'):
        ...     logits = model(images)

    Raises:
        ValueError: There is no such backend.
    """
    if name != AUTO:
        _named(name, 'use_backend')
    global _overrides
    override = (name, threading.get_ident())  # told from others by identity
    with _entering:
        _overrides = (*_overrides, override)
    try:
        yield
    finally:
        with _entering:  # another thread may have entered since
            _overrides = tuple(other for other in _overrides if other is not override)


def available_backends(device: str = 'cpu') -> tuple[str, ...]:
    """Names of the backends that can run a plain float32 inference on `device`, the most wanted first."""
    request = Request(Spec(True, 'subtraction', 'relative', 7, 1), torch.device(device), torch.float32,
                      (1, 64, 56, 56), False, False, None)
    return tuple(backend.name for backend in BACKENDS if backend.refusal(request) is None)
