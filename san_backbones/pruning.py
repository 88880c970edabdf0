"""Structured pruning of a SAN, attention layers included, by Torch-Pruning (https://github.com/VainF/Torch-Pruning)."""
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn

from .attention import PairwiseAttention, PatchwiseAttention
from .san import SAN

__all__ = ['prunable', 'prune_inputs', 'prune_outputs']

Attention = PairwiseAttention | PatchwiseAttention


def _checked(indices: Iterable[Any], channels: int, what: str) -> list[int]:
    indices = [operator.index(i) for i in indices]
    strange = sorted({i for i in indices if not 0 <= i < channels})
    if strange:
        raise ValueError(f'expected {what} channels from 0 to {channels - 1}, got {", ".join(map(str, strange))}')
    if len(set(indices)) == channels:
        raise ValueError(f'got all {channels} {what} channels; at least one must stay')
    return indices


def _remove_channels(conv: Any, indices: Sequence[int], dim: int) -> None:
    """Removes output channels (dim 0) or input channels (dim 1) of a convolution."""
    size = conv.weight.shape[dim]
    gone = set(indices)
    kept = torch.tensor([i for i in range(size) if i not in gone], device=conv.weight.device)
    for name in ('weight', 'bias') if dim == 0 else ('weight',):
        tensor = getattr(conv, name)
        if tensor is not None:
            new = nn.Parameter(tensor.detach().index_select(dim, kept), tensor.requires_grad)
            new.grad = None if tensor.grad is None else tensor.grad.index_select(dim, kept)
            setattr(conv, name, new)
    if dim == 0:
        conv.out_channels = len(kept)
    else:
        conv.in_channels = len(kept)


def prune_inputs(layer: Attention, indices: Sequence[int]) -> Attention:
    """Removes input channels of an attention layer.

    Args:
        layer: Changed in place.
        indices: Input channels, from 0 to `layer.dim` - 1.

    Returns:
        The layer.

    Raises:
        ValueError: There are no such channels, or none would stay.
        TypeError: An index is no integer.
    """
    indices = _checked(indices, layer.dim, 'input')
    for conv in (layer.query, layer.key, layer.value):
        _remove_channels(conv, indices, 1)
    return layer


def prune_outputs(layer: Attention, indices: Sequence[int]) -> Attention:
    """Removes output channels of an attention layer, and their weight channels.

    Args:
        layer: Changed in place.
        indices: Output channels, from 0 to `layer.out_planes` - 1. Channels that share a weight go together.

    Returns:
        The layer.

    Raises:
        ValueError: There are no such channels, none would stay, or only some of those that share a weight are given.
        TypeError: An index is no integer.
    """
    indices = _checked(indices, layer.out_planes, 'output')
    planes = layer.out_planes // layer.share_planes
    weights = sorted({i % planes for i in indices})
    if len(set(indices)) != len(weights) * layer.share_planes:
        raise ValueError(f'channels that share a weight are {planes} apart, {layer.share_planes} of them, and go '
                         f'together; got {sorted(indices)} of {layer.out_planes}')
    fc2: Any = layer.weight_mlp.fc2
    area = fc2.out_channels // planes  # the footprint of the patchwise form, 1 for the pairwise one
    _remove_channels(layer.value, indices, 0)
    _remove_channels(fc2, [w * area + o for w in weights for o in range(area)], 0)
    return layer


class _AttentionPruner:
    """Tells Torch-Pruning how to prune an attention layer."""

    def prune_out_channels(self, layer: Attention, idxs: Sequence[int]) -> Attention:
        return prune_outputs(layer, idxs)

    def prune_in_channels(self, layer: Attention, idxs: Sequence[int]) -> Attention:
        return prune_inputs(layer, idxs)

    def get_out_channels(self, layer: Attention) -> int:
        return layer.out_planes

    def get_in_channels(self, layer: Attention) -> int:
        return layer.dim

    def get_out_channel_groups(self, layer: Attention) -> int:
        return layer.share_planes  # prunes the same index in each group: the channels that share a weight


@contextmanager
def prunable(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Context in which Torch-Pruning can trace and prune a model with SAN attention layers.

    Torch-Pruning follows the operations of a forward pass. Inside the context each attention layer computes only its
    values, so that Torch-Pruning sees a single operation from all inputs to all outputs. Prune inside the context: when
    it ends, `num_features` and `feature_info` are those of the narrowed network.

    Args:
        model: A SAN, or a module that holds one.

    Yields:
        Arguments for Torch-Pruning's pruners: `customized_pruners` and `root_module_types`.

    Raises:
        ImportError: Torch-Pruning is not installed.
    """
    try:
        from torch_pruning import BasePruningFunc
    except ImportError as error:
        raise ImportError('prunable needs Torch-Pruning: pip install torch-pruning') from error
    types = (PairwiseAttention, PatchwiseAttention)
    pruner = type('AttentionPruner', (_AttentionPruner, BasePruningFunc), dict(TARGET_MODULES=types))()
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, types)]
    for layer in layers:
        layer.forward = layer.value.forward
    try:
        yield dict(customized_pruners=dict.fromkeys(types, pruner),
                   root_module_types=[nn.Conv2d, nn.Linear, *types])
    finally:
        for layer in layers:
            del layer.forward
        for net in model.modules():
            if isinstance(net, SAN):
                net.read_widths()
