"""The definition of footprint attention, in plain lines (Zhao, Jia, Koltun, CVPR 2020, sections 3.1 and 3.2).

    pairwise   y_i = sum_{j in R(i)} softmax_j( gamma([delta(x_i, x_j), p_i - p_j]) ) * beta(x_j)
    patchwise  y_i = sum_{j in R(i)} gamma( delta(x_R(i)) )_j * beta(x_j)

`relate` is delta, `aggregate` the weighted sum; gamma stands between them. `query`, `key`, `value` are phi(x), psi(x),
beta(x). Everything with a k x k axis is written to memory: this is what other backends are tested against. `combine`
and `combine_patch` are all that is particular to a relation; the traced form calls them too.

The functions take maps that are padded already (`geometry.reflect_pad`), so that a strip of rows and the whole map
are the same computation.
"""

import torch
from torch import Tensor

from . import geometry
from .gamma import Gamma, Spec, apply_gamma
from .relations import constant, reads_every_query

__all__ = ['aggregate', 'attend', 'combine', 'combine_patch', 'relate']


def combine(centre: Tensor, neighbours: Tensor, relation: str) -> Tensor:
    """The pairwise relation of phi(x_i) to psi(x_j), channels in axis 1, by broadcasting.

    Raises:
        ValueError: There is no such pairwise relation.
    """
    if relation == 'subtraction':
        return centre - neighbours
    if relation == 'summation':
        return centre + neighbours
    if relation == 'hadamard':
        return centre * neighbours
    if relation == 'dot':
        return (centre * neighbours).sum(1, keepdim=True)
    if relation == 'concatenation':
        return torch.cat([centre.expand_as(neighbours), neighbours], 1)
    raise ValueError('no pairwise relation is called ' + relation)


def combine_patch(query: Tensor, neighbours: Tensor, relation: str, tap_axes: int) -> Tensor:
    """The patchwise relation of a pixel to its footprint, whose taps lie in axis 2, or in axes 2 and 3.

    Args:
        query: phi(x_i), (N, r, pixels); where `relations.reads_every_query`, phi(x_j), (N, r, taps, pixels).
        neighbours: psi(x_j), (N, r, taps, pixels).
        relation: Its name.
        tap_axes: How many axes the taps have: 1, k * k long, or 2, k long.

    Returns:
        (N, width, pixels).

    Raises:
        ValueError: There is no such patchwise relation.
    """
    if relation == 'concatenation':
        return torch.cat([query, neighbours.flatten(1, 1 + tap_axes)], 1)
    if relation == 'star':
        for _ in range(tap_axes):
            query = query.unsqueeze(2)
        return (query * neighbours).sum(1).flatten(1, tap_axes)
    if relation == 'clique':
        queries, neighbours = query.flatten(2, 1 + tap_axes), neighbours.flatten(2, 1 + tap_axes)
        return (queries[:, :, :, None] * neighbours[:, :, None]).sum(1).flatten(1, 2)
    raise ValueError('no patchwise relation is called ' + relation)


def _relate_pairwise(
        query: Tensor,
        neighbours: Tensor,
        relation: str,
        position: str,
        place: Tensor | None,
        place_padded: Tensor | None,
        kernel_size: int,
        dilation: int,
) -> Tensor:
    features = combine(query[:, :, None, None], neighbours, relation)
    if place is not None and place_padded is not None:
        others = geometry.footprint(place_padded, kernel_size, dilation)
        offset = place[:, :, None, None] - others if position == 'relative' else others
        offset = offset.to(features.dtype).expand(features.shape[0], -1, -1, -1, -1, -1)
        features = torch.cat([features, offset], 1)
    return features.flatten(2, 3)


def _relate_patchwise(query: Tensor, neighbours: Tensor, relation: str, kernel_size: int, dilation: int) -> Tensor:
    if reads_every_query(relation):
        query = geometry.footprint(query, kernel_size, dilation)
    return combine_patch(query, neighbours, relation, 2).unsqueeze(2)


def relate(
        query: Tensor,
        key: Tensor,
        place: Tensor | None,
        place_padded: Tensor | None,
        pairwise: bool,
        relation: str,
        position: str,
        kernel_size: int,
        dilation: int,
) -> Tensor:
    """delta: the relation of every pixel to its footprint, with the position channels appended.

    Args:
        query: phi(x), (N, r, H, W); where `relations.reads_every_query` padded, (N, r, H + 2 pad, W + 2 pad).
        key: psi(x) padded, (N, r, H + 2 pad, W + 2 pad).
        place: Mapped coordinates p, (1, 2, H, W), or None for no position channels.
        place_padded: The same, padded.
        pairwise: Which of the two forms.
        relation: One of the form's, `PAIRWISE_RELATIONS` or `PATCHWISE_RELATIONS`.
        position: 'relative' appends p_i - p_j, 'absolute' p_j.
        kernel_size: k.
        dilation: Pixels between neighbours of a footprint.

    Returns:
        (N, width, P, H, W), P = k * k for the pairwise form and 1 for the patchwise form, whose channels hold the
        patch. Channel order of the concatenations: phi, then psi (patchwise: c * k^2 + o), then positions.
    """
    neighbours = geometry.footprint(key, kernel_size, dilation)
    if pairwise:
        return _relate_pairwise(query, neighbours, relation, position, place, place_padded, kernel_size, dilation)
    return _relate_patchwise(query, neighbours, relation, kernel_size, dilation)


def aggregate(logits: Tensor, value: Tensor, pairwise: bool, kernel_size: int, dilation: int) -> Tensor:
    """The weighted sum over the footprint: y[c] = sum_o w[c mod cw, o] * beta(x)[c, i + o].

    Args:
        logits: gamma's output, (N, cw, k * k, H, W) (pairwise: softmax is taken here) or (N, cw * k * k, 1, H, W)
            (patchwise, channel order c * k^2 + o).
        value: beta(x) padded, (N, m, H + 2 pad, W + 2 pad); m is a multiple of cw.
        pairwise: Which of the two forms.
        kernel_size: k.
        dilation: Pixels between neighbours of a footprint.

    Returns:
        (N, m, H, W) in the dtype of value.
    """
    if pairwise:
        logits = logits.softmax(2)
    else:
        area = kernel_size * kernel_size
        logits = logits.squeeze(2).unflatten(1, [logits.shape[1] // area, area])
    weight_channels = logits.shape[1]
    weight = logits.unflatten(2, [kernel_size, kernel_size]).unsqueeze(1)
    shares = value.shape[1] // weight_channels
    values = geometry.footprint(value, kernel_size, dilation).unflatten(1, [shares, weight_channels])
    return (weight * values).sum([3, 4]).flatten(1, 2).to(value.dtype)


def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        place: Tensor | None,
        gamma: Gamma,
        spec: Spec,
) -> Tensor:
    """Footprint attention by its definition; arguments as `ops.footprint_attention`."""
    pad = geometry.padding(spec.kernel_size, spec.dilation)
    if constant(spec, 'every_query'):
        query = geometry.reflect_pad(query, pad)
    place_padded = None if place is None else geometry.reflect_pad(place, pad)
    hidden = relate(query, geometry.reflect_pad(key, pad), place, place_padded, *spec)
    height, width = hidden.shape[-2:]
    logits = apply_gamma(hidden.flatten(3), gamma).unflatten(3, [height, width])
    return aggregate(logits, geometry.reflect_pad(value, pad), spec.pairwise, spec.kernel_size, spec.dilation)
