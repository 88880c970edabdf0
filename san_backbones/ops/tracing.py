"""Who is looking at a program rather than running it: torch.compile, torch.export, torch.jit, transforms, modes."""
import sys

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ['is_compiling', 'is_exporting', 'is_plain_tensor', 'symbolic_caller']


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


@torch.compiler.assume_constant_result  # in a graph of torch 2.10, torch.compiler.is_exporting is always true
def is_exporting() -> bool:
    """Whether torch.export is looking: an exported program holds the definition only, and needs no operator of ours."""
    if hasattr(torch.compiler, 'is_exporting'):
        return torch.compiler.is_exporting()
    export = sys.modules.get('torch.export._trace')  # torch 2.4 to 2.6
    return getattr(export, '_EXPORT_FLAGS', None) is not None
