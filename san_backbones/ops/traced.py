"""Footprint attention for whoever looks at the program rather than runs it: torch.compile, torch.export, TorchScript,
FX, ONNX, and the runtimes that follow from them.

The result is the definition's (`reference`); the form is one that all of them take and are quick at. Tensors have at
most five axes. A footprint is made of slices, first of columns and then of rows, 2 k instead of k * k. Of the values
only the columns are made, and the weighted sum is taken row by row, so that nothing has m * k * k elements a pixel.
Where sizes are known, borders are padded by the operator for it; where they are open, or where nobody can say, rows and
columns are selected by `reflected`, which is right at every size.

The functions take maps that are not padded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import geometry
from .gamma import Gamma, Spec, apply_gamma
from .reference import combine, combine_patch
from .relations import reads_every_query

try:
    from torch.fx.experimental.symbolic_shapes import has_static_value
except ImportError:  # torch 2.6 and older
    has_static_value = None  # type: ignore[assignment]

__all__ = ['aggregate', 'attend', 'relate']


def reflected(x: Tensor, axis: int, pad: int) -> Tensor:
    """`geometry.reflection_index` of an axis of x, by arithmetic of tensors that no branch on a size goes into."""
    size = x.shape[axis]
    index = torch.arange(size + 2 * pad, device=x.device)
    last = torch.arange(size, device=x.device)[-1:]
    period = 2 * last + (last == 0)  # of one pixel 1
    place = index + (period - 1) * pad  # counted from a whole number of periods before the axis
    place = place - torch.div(place, period, rounding_mode='floor') * period
    return last - (place - last).abs()


def is_known(size: int) -> bool:
    """Whether the size of an axis is an int now, and in whatever is being traced."""
    if torch.compiler.is_dynamo_compiling():  # which takes its symbols for integers
        return has_static_value is not None and has_static_value(size)
    return type(size) is int


def _pad_known(x: Tensor, pad: int) -> Tensor:
    """Each time as far as there are pixels to mirror; the result is symmetric about its borders then."""
    down, along = pad, pad
    while down or along:
        height, width = x.shape[-2:]
        rows, columns = min(down, height - 1), min(along, width - 1)
        if rows or columns:
            x = F.pad(x, (columns, columns, rows, rows), mode='reflect')
        down, along = down - rows, along - columns
        single = (along if width == 1 else 0, down if height == 1 else 0)
        if any(single):
            x = F.pad(x, (single[0], single[0], single[1], single[1]), mode='replicate')
            along, down = along - single[0], down - single[1]
    return x


@torch.fx.wrap
def reflect_pad(x: Tensor, pad: int) -> Tensor:
    """`geometry.reflect_pad` of x (N, C, H, W)."""
    if pad == 0:
        return x
    if not torch.jit.is_scripting():
        if is_known(x.shape[-2]) and is_known(x.shape[-1]):
            return _pad_known(x, pad)
    return x.index_select(2, reflected(x, 2, pad)).index_select(3, reflected(x, 3, pad))


def _columns(x: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """x (N, C, H, W) padded, and shifted to each column of the footprint: (N, C, k, H + 2 pad, W)."""
    padded = reflect_pad(x, geometry.padding(kernel_size, dilation)).unsqueeze(2)
    reach = dilation * (kernel_size - 1)
    parts: list[Tensor] = []
    for begin in range(0, reach, dilation):
        parts.append(padded[:, :, :, :, begin:begin - reach])
    parts.append(padded[:, :, :, :, reach:])
    return torch.cat(parts, 2)


def _rows(columns: Tensor, kernel_size: int, dilation: int) -> list[Tensor]:
    """For each row of the footprint (N, C, k, H, W)."""
    reach = dilation * (kernel_size - 1)
    parts: list[Tensor] = []
    for begin in range(0, reach, dilation):
        parts.append(columns[:, :, :, begin:begin - reach])
    parts.append(columns[:, :, :, reach:])
    return parts


def footprint(x: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """The footprint of every pixel of x (N, C, H, W): (N, C, k * k, H * W)."""
    return torch.cat(_rows(_columns(x, kernel_size, dilation), kernel_size, dilation), 2).flatten(3)


def _relate_pairwise(
        query: Tensor,
        key: Tensor,
        place: Tensor | None,
        relation: str,
        position: str,
        kernel_size: int,
        dilation: int,
) -> Tensor:
    features = combine(query.flatten(2).unsqueeze(2), footprint(key, kernel_size, dilation), relation)
    if place is not None:
        offset = footprint(place, kernel_size, dilation)
        if position == 'relative':
            offset = place.flatten(2).unsqueeze(2) - offset
        features = torch.cat([features, offset.to(features.dtype).expand(features.shape[0], -1, -1, -1)], 1)
    return features


def _relate_patchwise(query: Tensor, key: Tensor, relation: str, kernel_size: int, dilation: int) -> Tensor:
    neighbours = footprint(key, kernel_size, dilation)
    if relation == 'clique':  # the products of all pairs: a matrix for each pixel, quicker than their definition
        queries = footprint(query, kernel_size, dilation)
        features = torch.matmul(queries.permute(0, 3, 2, 1), neighbours.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        return features.unsqueeze(2)
    queries = footprint(query, kernel_size, dilation) if reads_every_query(relation) else query.flatten(2)
    return combine_patch(queries, neighbours, relation, 1).unsqueeze(2)


def relate(
        query: Tensor,
        key: Tensor,
        place: Tensor | None,
        pairwise: bool,
        relation: str,
        position: str,
        kernel_size: int,
        dilation: int,
) -> Tensor:
    """`reference.relate` of maps (N, r, H, W) that are not padded, pixels in one axis: (N, width, P, H * W)."""
    if pairwise:
        return _relate_pairwise(query, key, place, relation, position, kernel_size, dilation)
    return _relate_patchwise(query, key, relation, kernel_size, dilation)


def aggregate(logits: Tensor, value: Tensor, pairwise: bool, kernel_size: int, dilation: int) -> Tensor:
    """`reference.aggregate` of a value (N, m, H, W) that is not padded.

    Args:
        logits: gamma's output, (N, cw, k * k, H * W) (pairwise: softmax is taken here) or (N, cw * k * k, 1, H * W)
            (patchwise, channel order c * k^2 + o).
        value: beta(x); m is a multiple of cw.
        pairwise: Which of the two forms.
        kernel_size: k.
        dilation: Pixels between neighbours of a footprint.

    Returns:
        (N, m, H, W) in the dtype of value.
    """
    area = kernel_size * kernel_size
    if pairwise:
        logits = logits.softmax(2)
        weight_channels = logits.shape[1]
    else:
        weight_channels = logits.shape[1] // area
    batch, channels, height, width = value.shape[0], value.shape[1], value.shape[2], value.shape[3]
    shares = channels // weight_channels
    weights = logits.reshape(batch, 1, weight_channels, area, height * width).split(kernel_size, 3)
    rows = _rows(_columns(value, kernel_size, dilation), kernel_size, dilation)
    shape = [batch, shares, weight_channels, kernel_size, height * width]
    output = (rows[0].reshape(shape) * weights[0]).sum(3)
    for row in range(1, kernel_size):
        output = output + (rows[row].reshape(shape) * weights[row]).sum(3)
    return output.reshape(batch, channels, height, width).to(value.dtype)


def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        place: Tensor | None,
        gamma: Gamma,
        spec: Spec,
) -> Tensor:
    """Footprint attention in this form; arguments as `ops.footprint_attention`."""
    logits = apply_gamma(relate(query, key, place, *spec), gamma)
    return aggregate(logits, value, spec.pairwise, spec.kernel_size, spec.dilation)
