"""What fused backends are given: gamma folded into six tensors, maps with their channels last, and a few integers."""
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import relations
from .gamma import Affine, Gamma, Spec

__all__ = ['Shape', 'as_rows', 'channels_first', 'channels_last', 'fold_gamma', 'fold_weights', 'in_loop_order',
           'memory_format', 'pad', 'power_of_2', 'round_up', 'row']


class Shape(NamedTuple):
    """What an attention is, in integers, which an operator takes."""
    relation: int  # its place in relations.RELATIONS
    absolute: int  # positions p_j instead of p_i - p_j
    kernel_size: int
    dilation: int
    hidden: int  # width of the middle of gamma, without padding
    channels: int  # weight channels
    lanes: int  # columns of weight2 for a tap: weight channels, repeated to fill vectors
    backend: int  # its place in fused.FUSED

    @classmethod
    def of(cls, spec: Spec, hidden: int, channels: int, lanes: int, backend: int) -> list[int]:
        return [relations.number(spec.pairwise, spec.relation), int(spec.position == 'absolute'), spec.kernel_size,
                spec.dilation, hidden, channels, lanes, backend]

    @classmethod
    def read(cls, integers: list[int]) -> 'Shape':
        if len(integers) != len(cls._fields):
            raise ValueError(f'shape must be {len(cls._fields)} integers ({", ".join(cls._fields)}), got {integers}')
        return cls(*integers)

    @property
    def described(self) -> relations.Relation:
        """The row of the relation in the table. Raises ValueError where there is none."""
        if not 0 <= self.relation < len(relations.RELATIONS):
            raise ValueError(f'relation must be in [0, {len(relations.RELATIONS)}), got {self.relation}')
        return relations.RELATIONS[self.relation]

    @property
    def area(self) -> int:
        return self.kernel_size ** 2


def pad(x: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, size - x.shape[-1]))


def _repeat(x: Tensor, lanes: int) -> Tensor:
    return x.repeat(*(1,) * (x.dim() - 1), lanes // x.shape[-1])


def round_up(size: int, width: int) -> int:
    return (size + width - 1) // width * width


def power_of_2(n: int) -> int:
    """The least that is no less than n."""
    power = 1  # not n.bit_length(): not every torch compiles it, and in a graph n may be a symbol
    while power < n:
        power *= 2
    return power


def fold_gamma(norm1: Affine, norm2: Affine, gamma: Gamma, spec: Spec, width: int,
               backend: int) -> tuple[list[int], list[Tensor]]:
    """gamma as fused backends read it: scale1, shift1, weight1, shift2, weight2, bias2. Differentiable.

    Columns are padded (hidden) or repeated (weight channels) to a multiple of `width`, the backend's vectors.
    """
    scale2, shift2 = norm2
    weight1 = (gamma.weight1.flatten(1).float() * scale2[:, None]).t()  # (inputs, hidden)
    hidden = weight1.shape[1]
    scale1, shift1, weight1 = (in_loop_order(x, spec) for x in (*norm1, weight1))
    folded = [scale1, shift1, pad(weight1, round_up(hidden, width)), pad(shift2, round_up(hidden, width))]
    folded = [x.float().contiguous() for x in folded]  # norms may be float64
    weight2, bias2, channels = fold_weights(gamma, spec, width)
    return Shape.of(spec, hidden, channels, bias2.shape[-1], backend), [*folded, weight2, bias2]


def fold_weights(gamma: Gamma, spec: Spec, width: int) -> tuple[Tensor, Tensor, int]:
    """weight2 and bias2 of `fold_gamma`, and the number of weight channels."""
    area = spec.kernel_size ** 2
    weight2, bias2 = gamma.weight2.flatten(1).float().t(), gamma.bias2.float()
    channels = weight2.shape[1] // (1 if spec.pairwise else area)
    lanes = math.lcm(channels, width)
    if not spec.pairwise:
        weight2 = weight2.view(len(weight2), channels, area).transpose(1, 2)
        bias2 = bias2.view(channels, area).t()
    return _repeat(weight2, lanes).contiguous(), _repeat(bias2, lanes).contiguous(), channels


def in_loop_order(x: Tensor, spec: Spec) -> Tensor:
    """Channels of a patchwise relation (the first axis of x): those of the taps come as c * k^2 + o, fused backends
    write them as o * tap width + c.
    """
    if spec.pairwise or relations.is_summed(spec.pairwise, spec.relation):
        return x
    area, joined = spec.kernel_size ** 2, relations.is_joined(spec.pairwise, spec.relation)
    rel = x.shape[0] // (area + joined)
    taps = x[rel * joined:].unflatten(0, (rel, area)).transpose(0, 1).flatten(0, 1)
    return torch.cat([x[:rel * joined], taps])


def channels_last(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H, W, C), without a copy where that is a slice of the channels of such a map."""
    return as_rows(x.detach().permute(0, 2, 3, 1))


def as_rows(x: Tensor) -> Tensor:
    """x (N, H, W, C), or a copy of it, with its pixels at equal distances and the channels of each together."""
    _, height, width, _ = x.shape
    row = x.stride(2)
    return x if x.stride() == (height * width * row, width * row, row, 1) else x.contiguous()


def row(x: Tensor) -> int:
    """Elements from one pixel of a map from `channels_last` to the next; the stride of an axis of one is arbitrary."""
    return x.shape[3] if x.is_contiguous() else x.stride(2)


def memory_format(x: Tensor) -> torch.memory_format:
    last = x.stride(1) == 1 and not x.is_contiguous()  # also for a slice of the channels of a channels_last map
    return torch.channels_last if last else torch.contiguous_format


def channels_first(x: Tensor, like: Tensor) -> Tensor:
    """(N, H, W, C) as (N, C, H, W) in the dtype and memory format of `like`."""
    return x.permute(0, 3, 1, 2).to(like.dtype).contiguous(memory_format=memory_format(like))
