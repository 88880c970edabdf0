"""Which path computes an attention: one choice, with its reasons.

A path is a `Backend`: a name, `refusal` (why it cannot run a request, or None) and `attend`. `BACKENDS` lists them
from the most to the least wanted; a new path is one more entry. `choose_backend` takes the first that does not
refuse, and says in the debug log of `san_backbones.ops` why others did. `use_backend` (a context manager) or the
environment variable SAN_BACKBONES_BACKEND names one path; if that one cannot run, it is an error.
"""
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import fused, native, reference, statistics, tiled, triton
from .folding import FUSED_DTYPES, power_of_2
from .gamma import Gamma, Spec

__all__ = [
    'AUTO',
    'BACKENDS',
    'ENVIRONMENT_VARIABLE',
    'FUSED_DTYPES',
    'Backend',
    'Request',
    'available_backends',
    'choose_backend',
    'use_backend',
]

_logger = logging.getLogger('san_backbones.ops')

AUTO = 'auto'
ENVIRONMENT_VARIABLE = 'SAN_BACKBONES_BACKEND'
_overrides: tuple[tuple[str, int], ...] = ()  # paths and threads; for all threads, since autograd has its own
_entering = threading.Lock()


def _in_child() -> None:
    """After a fork: threads that held the lock, or were in a block, are not here."""
    global _entering, _overrides
    _entering = threading.Lock()
    _overrides = tuple(override for override in _overrides if override[1] == threading.get_ident())


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_in_child)


class Request(NamedTuple):
    """What an attention needs, as far as the choice of a path depends on it."""
    spec: Spec
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    needs_grad: bool
    batch_statistics: bool
    symbolic: str | None  # who is looking at the program rather than running it, e.g. 'torch.export'
    matrices: int = 0  # numbers in gamma's two matrices for one tap


class Backend(NamedTuple):
    """A path: `refusal(request)` is None or the reason why it cannot run; `attend` computes. A path that `finishes`
    also takes the argument `shift` of `footprint_attention`, without gradients.
    """
    name: str
    refusal: Callable[[Request], str | None]
    attend: Callable[..., Tensor]
    finishes: bool = False


def _tiled_refusal(request: Request) -> str | None:
    if request.symbolic is not None:
        return f'{request.symbolic} sees the plain definition'
    return None


def _fused_refusal(request: Request) -> str | None:
    if request.symbolic is not None:
        return f'{request.symbolic} sees the plain definition'
    if request.dtype not in FUSED_DTYPES:
        return f'it computes in float32, the maps are {request.dtype}'
    if (request.spec.pairwise, request.spec.relation) not in native.RELATIONS:
        return f'it has no {request.spec.relation} relation'
    if request.batch_statistics and (request.spec.pairwise, request.spec.relation) not in statistics.SUPPORTED:
        return f'it has no batch statistics of the {request.spec.relation} relation'
    return None


def _native_refusal(request: Request) -> str | None:
    if request.device.type != 'cpu':
        return f'it runs on the CPU, the maps are on {request.device}'
    return _fused_refusal(request) or native.unavailable()


def _triton_refusal(request: Request) -> str | None:
    if request.needs_grad and request.device.type == 'cuda' and torch.are_deterministic_algorithms_enabled():
        return 'it sums gradients in an order that varies, and torch.use_deterministic_algorithms(True) was called'
    return _fused_refusal(request) or triton.unavailable(request.device) \
        or triton.too_wide(request.device, request.matrices, request.needs_grad)


BACKENDS = (
    Backend('native', _native_refusal, fused.attend_native, finishes=True),
    Backend('triton', _triton_refusal, fused.attend_triton, finishes=True),
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
    """The path asked for and who asked."""
    overrides = _overrides
    if overrides:
        return overrides[-1][0], 'san_backbones.ops.use_backend'
    return os.environ.get(ENVIRONMENT_VARIABLE, '') or AUTO, f'the environment variable {ENVIRONMENT_VARIABLE}'


def is_plain_tensor(x: Tensor) -> bool:
    """Whether nothing but torch itself sees what is done with x: neither a subclass nor a dispatch mode."""
    return type(x) in (Tensor, torch.nn.Parameter) and _get_current_dispatch_mode() is None


def is_compiling(x: Tensor) -> bool:
    """Whether torch.compile or torch.export traces what is done with x.

    torch.compiler.is_compiling() alone is true in all threads while one of them compiles or exports.
    """
    return torch.compiler.is_dynamo_compiling() or (torch.compiler.is_compiling() and not is_plain_tensor(x))


def symbolic_caller(x: Tensor) -> str | None:
    """Names the tool that traces instead of running, or None."""
    if is_compiling(x):
        return 'torch.compile or torch.export'
    if torch.jit.is_tracing():
        return 'torch.jit.trace'
    if x.device.type == 'meta':
        return 'the meta device'
    if torch.autograd.forward_ad._current_level >= 0:
        return 'forward-mode differentiation'
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return 'torch.func'
    return None


def serves(x: Tensor) -> bool:
    """Whether the compiled loops around the attention take x: the same conditions, and no other path asked for."""
    return x.device.type == 'cpu' and x.dtype in FUSED_DTYPES and symbolic_caller(x) is None \
        and _wanted()[0] in (AUTO, 'native') and native.unavailable() is None


@torch.compiler.assume_constant_result  # in a graph of torch 2.10, torch.compiler.is_exporting is always true
def is_exporting() -> bool:
    """Whether torch.export is looking: an exported program holds the definition only, and needs no operator of ours."""
    if hasattr(torch.compiler, 'is_exporting'):
        return torch.compiler.is_exporting()
    export = sys.modules.get('torch.export._trace')  # torch 2.4 to 2.6
    return getattr(export, '_EXPORT_FLAGS', None) is not None


@torch.compiler.assume_constant_result
def compiled_backend(device: str, dtype: str, pairwise: bool, relation: str, needs_grad: bool, batch_statistics: bool,
                     matrices: int) -> str:
    """The path that a graph of torch.compile calls where that is one of registered operators; otherwise 'reference'.

    Decided when the graph is compiled: what `use_backend` says then stays in it.
    """
    request = Request(Spec(pairwise, relation, 'none', 1, 1), torch.device(device), getattr(torch, dtype[6:]), (),
                      needs_grad, batch_statistics, None, matrices)
    name = choose_backend(request).name
    return name if name in fused.PATHS else 'reference'


def make_request(query: Tensor, key: Tensor, value: Tensor, place: Tensor | None, gamma: Gamma,
                 spec: Spec) -> Request:
    """Describes a call of `footprint_attention`."""
    tensors = (query, key, value, place, *gamma.norm1[:2], gamma.weight1, *gamma.norm2[:2], gamma.weight2, gamma.bias2)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    batch_statistics = gamma.norm1.batch_statistics or gamma.norm2.batch_statistics
    symbolic = symbolic_caller(value)
    matrices = tap_matrices(query, gamma, spec) if symbolic is None else 0  # sizes may be no numbers while tracing
    return Request(spec, value.device, value.dtype, tuple(value.shape), needs_grad, batch_statistics, symbolic,
                   matrices)


def tap_matrices(query: Tensor, gamma: Gamma, spec: Spec) -> int:
    """Numbers in the parts of weight1 and weight2 that belong to one tap, sizes rounded up to powers of 2."""
    taps = 1 if spec.pairwise else spec.kernel_size ** 2
    channels, hidden = gamma.weight2.shape[:2]
    relation = 1 if spec.relation in ('dot', 'star') else query.shape[1]
    return power_of_2(hidden) * (power_of_2(relation) + power_of_2(channels // taps))


def choose_backend(request: Request) -> Backend:
    """The path that will compute `request`.

    Raises:
        ValueError: The path named by `use_backend` or the environment does not exist.
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
            if backend.name != 'native' and name == AUTO and request.device.type == 'cpu' \
                    and _fused_refusal(request) is None:
                native.warn_if_unavailable()
            return backend
        _logger.debug('%s refused: %s', backend.name, reason)
    raise AssertionError('the reference path refuses nothing')


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Computes every attention inside the block by the path `name` ('auto' lets the choice be made).

    It holds for all threads of the process; of blocks that several threads are in, the one entered last. Where
    activations are checkpointed, run the backward pass inside the block too, for it computes the attention again.

    Example:
        >>> with san_backbones.ops.use_backend('reference'):
        ...     logits = model(images)

    Raises:
        ValueError: There is no such path.
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
    """Names of the paths that can run a plain float32 inference on `device`, the most wanted first."""
    request = Request(Spec(True, 'subtraction', 'relative', 7, 1), torch.device(device), torch.float32,
                      (1, 64, 56, 56), False, False, None)
    return tuple(backend.name for backend in BACKENDS if backend.refusal(request) is None)
