"""Footprint attention on tensors: the definition, faster backends with the same result, and the choice between them."""
import torch
from torch import Tensor

from . import flops, fused, native, reference, relations, traced, triton  # noqa: F401
from .backends import (
    BACKENDS,
    Backend,
    Request,
    available_backends,
    choose_backend,
    compiled_backend,
    make_request,
    serves,
    tap_matrices,
    use_backend,
)
from .checks import check_attention
from .folding import as_rows
from .fused import prepare_attention, round_gamma
from .gamma import Gamma, Norm, Spec, fold
from .geometry import coordinates, footprint, padding, reflect_pad, reflection_index
from .linear import Linear, ScaleShiftReLU
from .memory import Memory
from .pointwise import halve, norm_relu, scale_shift_relu, serves_norm_relu, stem
from .relations import PAIRWISE_RELATIONS, PATCHWISE_RELATIONS, POSITIONS
from .samples import Samples
from .tracing import is_compiling, is_exporting, is_plain_tensor, symbolic_caller

__all__ = [
    'BACKENDS',
    'PAIRWISE_RELATIONS',
    'PATCHWISE_RELATIONS',
    'POSITIONS',
    'Backend',
    'Gamma',
    'Linear',
    'Memory',
    'Norm',
    'Request',
    'Samples',
    'ScaleShiftReLU',
    'Spec',
    'as_rows',
    'available_backends',
    'choose_backend',
    'coordinates',
    'fold',
    'footprint',
    'footprint_attention',
    'halve',
    'is_compiling',
    'is_exporting',
    'is_plain_tensor',
    'native',
    'norm_relu',
    'padding',
    'prepare_attention',
    'reflect_pad',
    'reflection_index',
    'round_gamma',
    'scale_shift_relu',
    'serves',
    'serves_norm_relu',
    'stem',
    'symbolic_caller',
    'triton',
    'use_backend',
]


def footprint_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        place: Tensor | None,
        gamma: Gamma,
        spec: Spec,
        shift: Tensor | None = None,
) -> Tensor:
    """Vector self-attention over local footprints (Zhao, Jia, Koltun, CVPR 2020, equations 2 and 4).

    Args:
        query: phi(x), (N, r, H, W), any floating dtype.
        key: psi(x), (N, r, H, W).
        value: beta(x), (N, m, H, W); m is a multiple of the weight channels cw.
        place: Mapped pixel coordinates p, (1, 2, H, W), float32 or wider; None for no position channels.
        gamma: The mapping from relations to weights. Pairwise: weight2 is (cw, hidden, 1, 1). Patchwise:
            (cw * k * k, hidden, 1, 1), channel order c * k^2 + o. Running buffers of its norms are updated in place
            where they use batch statistics.
        spec: Form, relation, position mode, kernel size and dilation.
        shift: (m,): the output is relu(y + shift) instead of y; None for y.

    Returns:
        (N, m, H, W) in value's dtype.

    Raises:
        ValueError: Maps, gamma and spec do not fit one another (shapes, dtypes, devices), batch statistics of a single
            value, or an unknown backend was asked for.
        RuntimeError: The backend asked for cannot run this call.
    """
    if not torch.jit.is_tracing():  # where sizes are tensors
        check_attention(query, key, value, place, gamma, spec, shift)
    if is_compiling(value):  # the choice is made while compiling, and stays out of the graph
        statistics = gamma.norm1.batch_statistics or gamma.norm2.batch_statistics
        name = 'reference' if is_exporting() or value.device.type not in ('cpu', 'cuda') else compiled_backend(
            str(value.device), str(value.dtype), spec.pairwise, spec.relation, torch.is_grad_enabled(), statistics,
            tap_matrices(query, gamma, spec))
        output = traced.attend(query, key, value, place, gamma, spec) if name == 'reference' else \
            fused.attend(name, query, key, value, place, gamma, spec)
    elif torch.jit.is_tracing():
        output = traced.attend(query, key, value, place, gamma, spec)
    else:
        backend = choose_backend(make_request(query, key, value, place, gamma, spec))
        if shift is not None and backend.finishes and not torch.is_grad_enabled():
            return backend.attend(query, key, value, place, gamma, spec, shift.float())
        output = backend.attend(query, key, value, place, gamma, spec)
    return output if shift is None else torch.relu(output + shift.to(output.dtype)[:, None, None])
