"""What the operators are told: the footprint, and gamma (Norm, ReLU, Linear, Norm, ReLU, Linear) as plain tensors."""
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import relations

__all__ = ['Affine', 'Gamma', 'Norm', 'Spec', 'apply_gamma', 'fold', 'fold_batch', 'moments', 'moments_of_sums',
           'normalise', 'refuse_other_backward', 'synchronise', 'update_running_statistics', 'widened']


class Spec(NamedTuple):
    """Which attention is meant; the order is that of `reference.relate`'s last arguments."""
    pairwise: bool
    relation: str
    position: str
    kernel_size: int
    dilation: int

    @property
    def described(self) -> relations.Relation:
        """The row of the relation in the table. Raises ValueError where there is none."""
        return relations.find(self.pairwise, self.relation)


class Norm(NamedTuple):
    """A batch normalisation over (N, C, P, H * W), as `torch.nn.functional.batch_norm` takes it.

    `batch_statistics` says whether the mean and variance of this call's data are used (and the running buffers, where
    given, moved towards them by `momentum`) or the running buffers. `group` is the process group over which the
    statistics are shared (SyncBatchNorm), None for this process alone.
    """
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batch_statistics: bool
    momentum: float
    eps: float
    group: Any = None


class Gamma(NamedTuple):
    """The mapping from relations to weights: norm1, ReLU, weight1, norm2, ReLU, weight2 and bias2.

    Linear maps are held as 1x1 convolutions, (out, in, 1, 1). `cache` is a dict where a backend keeps what it derives
    from the other fields; whoever gives one vouches that their tensors do not change while it lives.
    """
    norm1: Norm
    weight1: Tensor
    norm2: Norm
    weight2: Tensor
    bias2: Tensor
    cache: dict[str, Any] | None = None


class Affine(NamedTuple):
    """A normalisation reduced to `x * scale + shift`, each (C,), in float32 or float64."""
    scale: Tensor
    shift: Tensor


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def fold(norm: Norm, mean: Tensor | None, var: Tensor | None) -> Affine:
    """The affine map that normalises by `mean` and (biased) `var`, then applies the norm's weight and bias."""
    assert mean is not None and var is not None  # who has no running statistics uses the batch's
    scale = torch.rsqrt(widened(var) + norm.eps)
    if norm.weight is not None:
        scale = scale * widened(norm.weight)
    shift = -widened(mean) * scale
    if norm.bias is not None:
        shift = shift + widened(norm.bias)
    return Affine(scale, shift)


def update_running_statistics(norm: Norm, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Moves the running buffers by `momentum` towards `mean` and the unbiased variance, as BatchNorm2d does."""
    if norm.running_mean is None or norm.running_var is None:
        return
    with torch.no_grad():
        unbiased = var * (count / (count - 1).clamp(min=1))
        for running, found in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            # not lerp_, which makes a NaN of what is infinite
            running.mul_(1 - norm.momentum).add_(found.to(running.dtype), alpha=norm.momentum)


def synchronise(mean: Tensor, var: Tensor, count: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Joins the statistics of the processes of `group`: mean, biased variance and count of all their data.

    Two reductions, so that the variance is not the small difference of two large sums. Gradients flow back to every
    process's own statistics; of a process without data they count for nothing, but must be finite.
    """
    from torch.distributed.nn.functional import all_reduce
    total = count.clone()
    dist.all_reduce(total, group=group)
    share = count / total.clamp(min=1)
    joined_mean = all_reduce(mean * share, group=group)
    joined_var = all_reduce((var + (mean - joined_mean) ** 2) * share, group=group)
    return joined_mean, joined_var, total


def moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over `dims`; 0 where there is no value."""
    if x.numel() == 0:
        return x.sum(dims), x.sum(dims)
    var, mean = torch.var_mean(x, dims, correction=0)
    return mean, var


def moments_of_sums(sums: Tensor, values: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance from the sums of so many values and of their squares, (2, C) in float64."""
    mean, square = sums / max(values, 1)
    return mean, (square - mean * mean).clamp(min=0)  # in float64 the difference keeps float32's digits


def fold_batch(norm: Norm, mean: Tensor, var: Tensor, values: int) -> Affine:
    """`fold` by the statistics of this call's values, so many for each channel: shared over the norm's process group,
    and the running buffers moved towards them. Statistics of no values are finite and move nothing.

    Raises:
        ValueError: The processes together have a single value.
    """
    count = mean.new_full((), values)
    if norm.group is not None:
        mean, var, count = synchronise(mean, var, count, norm.group)
        values = values if values > 1 else int(count)  # which waits for a GPU, and is needed in the rarest case only
    if values == 1:
        raise ValueError('batch statistics need more than 1 value per channel, got 1: use a larger batch or image, or '
                         'put the norm in eval mode')
    if values:
        update_running_statistics(norm, mean.detach(), var.detach(), count)
    return fold(norm, mean, var)


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """Applies `norm` to x (N, C, P, L), updating its running buffers where it uses batch statistics."""
    fused = not norm.batch_statistics and norm.eps == 0  # into what is before it; torch 2.10's batch_norm refuses that
    if norm.group is None and not fused:
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias,
            norm.batch_statistics, norm.momentum, norm.eps)
    wide = widened(x)
    if fused:
        affine = fold(norm, norm.running_mean, norm.running_var)
    else:
        affine = fold_batch(norm, *moments(wide, (0, 2, 3)), x.numel() // x.shape[1])
    return (wide * affine.scale[:, None, None] + affine.shift[:, None, None]).to(x.dtype)


def apply_gamma(relation: Tensor, gamma: Gamma) -> Tensor:
    """gamma of relations (N, width, P, L): what it says of each, (N, c_w, P, L) or, patchwise, (N, c_w * k^2, 1, L)."""
    hidden = F.conv2d(F.relu(normalise(relation, gamma.norm1)), gamma.weight1)
    return F.conv2d(F.relu(normalise(hidden, gamma.norm2)), gamma.weight2, gamma.bias2)


def refuse_other_backward(gradient: Tensor) -> None:
    """Raises where a gradient is to be differentiated again (`create_graph=True`), or many are computed at once."""
    if torch._C._functorch.is_batchedtensor(gradient) or torch._C._functorch.is_legacy_batchedtensor(gradient):
        raise RuntimeError('this backend of footprint attention takes one gradient at a time, and no batch of them '
                           '(is_grads_batched, vectorize, vmap): compute them under '
                           "san_backbones.ops.use_backend('reference')")
    if torch.is_grad_enabled():
        raise RuntimeError('this backend of footprint attention has no second derivatives: compute them under '
                           "san_backbones.ops.use_backend('reference')")
