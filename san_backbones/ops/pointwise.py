"""What surrounds the attention: pooling, the stem in one piece, relu(s x + t), and relu(norm(x)), bounded or not."""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .backends import serves
from .checks import check_channels
from .gamma import Norm, fold, fold_batch, moments_of_sums, refuse_other_backward
from .traced import is_known

__all__ = ['halve', 'norm_relu', 'scale_shift_relu', 'serves_norm_relu', 'stem']


@torch.fx.wrap
def halve(x: Tensor) -> Tensor:
    """max_pool2d(x, 2) of x (N, C, H, W), where a side of one pixel stays one pixel."""
    height, width = x.shape[-2], x.shape[-1]
    if torch.jit.is_scripting():
        low, narrow = height == 1, width == 1
    elif torch.jit.is_tracing():  # a pixel more where there is one, by no branch on a size
        return F.max_pool2d(F.pad(x, (0, 1 // width, 0, 1 // height), value=float('-inf')), 2)
    else:  # torch.export takes an open side to be at least 2 here, and guards that it is
        low, narrow = is_known(height) and height == 1, is_known(width) and width == 1
    if low or narrow:
        x = x.expand(-1, -1, 2 if low else -1, 2 if narrow else -1)
    return F.max_pool2d(x, 2)


def _linear_statistics(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of W x over batch and pixels, and how many values each has.

    From the mean m and the covariance C of x: W m and diag(W C W^T), in float64.
    """
    x, weight = x.double(), weight.double()
    count = x.shape[0] * x.shape[2] * x.shape[3]
    mean = x.mean((0, 2, 3)) if count else x.sum((0, 2, 3))  # of nothing 0
    centred = (x - mean[:, None, None]).flatten(2)
    covariance = torch.matmul(centred, centred.transpose(1, 2)).sum(0) / max(count, 1)
    return (weight @ mean).float(), ((weight @ covariance) * weight).sum(1).clamp(min=0).float(), count


def stem(image: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    """max_pool2d(relu(norm(W x)), 2) without a map at full resolution.

    Args:
        image: (N, C, H, W), one that `serves` accepts, H and W at least 2.
        weight: (D, C).
        norm: Batch normalisation of the D channels; running buffers are updated in place as BatchNorm2d's are.

    Returns:
        (N, D, H // 2, W // 2) in the dtype of the image (of autocast, where that is on) and channels_last memory
        format.

    Raises:
        ValueError: Image, weight and norm do not fit one another, or batch statistics of a single value.
    """
    if weight.dim() != 2 or image.dim() != 4 or image.shape[1] != weight.shape[1] \
            or weight.device != image.device:
        raise ValueError('expected an image (N, C, H, W) and a weight (D, C) on one device, got '
                         f'{list(image.shape)} on {image.device} and {list(weight.shape)} on {weight.device}')
    if image.dtype not in native.BACKEND.dtypes or native.BACKEND.unavailable(image.device) is not None:
        raise ValueError(f'no compiled loop serves this image ({image.dtype}, {image.device}): see `serves`')
    for name, x in zip(norm._fields, norm[:4]):
        if x is not None:
            check_channels(f'{name} of the norm', x, len(weight), image)
    kind = image.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else image.dtype
    with torch.autocast(kind, enabled=False):
        image = image.to(dtype)  # first: statistics are of what is normalised by them
        if norm.batch_statistics:
            affine = fold_batch(norm, *_linear_statistics(image, weight))
        else:
            affine = fold(norm, norm.running_mean, norm.running_var)
        return native.stem(image, (weight.float() * affine.scale[:, None]).float(), affine.shift.float())


def scale_shift_relu(x: Tensor, scale: Tensor, shift: Tensor, limit: float | None = None) -> Tensor:
    """min(relu(scale x + shift), limit), for inference: no gradients where a compiled loop serves.

    Args:
        x: (..., C), C at least 1, any floating dtype.
        scale: (C,), float32.
        shift: (C,), float32.
        limit: Largest value of the output, None for any.

    Returns:
        Like x.

    Raises:
        ValueError: scale or shift is not one number for each channel.
    """
    if x.dim() == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f'x must be (..., C) with C at least 1, of a floating dtype, got {list(x.shape)}, {x.dtype}')
    check_channels('scale', scale, x.shape[-1], x)
    check_channels('shift', shift, x.shape[-1], x)
    if x.dtype == torch.float32 and x.is_contiguous() and not torch.is_grad_enabled() and serves(x):
        return native.scale_shift_relu(x, scale.float().contiguous(), shift.float().contiguous(), limit)
    output = torch.addcmul(shift, x, scale).relu_()
    return (output if limit is None else output.clamp_(max=limit)).to(x.dtype)


class _NormReLU(torch.autograd.Function):
    """min(relu(weight (x - mean) / sqrt(var + eps) + bias), limit) of x (N, H, W, C), and x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, weight: Tensor, bias: Tensor,
                limit: float | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.batch_statistics, ctx.limit, ctx.dtype = norm.batch_statistics, limit, weight.dtype
        if norm.batch_statistics:
            values = x.numel() // x.shape[3]
            mean, var = moments_of_sums(native.moments(x), values)
            affine = fold_batch(norm, mean, var, values)
        else:
            assert norm.running_mean is not None and norm.running_var is not None  # or the batch's are used
            mean, var = norm.running_mean, norm.running_var
            affine = fold(norm, mean, var)
        inverse = torch.rsqrt(var + norm.eps)
        vectors = [y.float().contiguous() for y in (mean, *affine, inverse)]
        ctx.save_for_backward(x, *vectors)
        return native.scale_shift_relu(x, *vectors[1:3], limit), x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        gradient, beside = gradients
        if gradient is None:
            return beside, None, None, None, None
        refuse_other_backward(gradient)
        x, mean, scale, shift, inverse = ctx.saved_tensors
        arguments = gradient, x, mean, scale, shift
        d_bias, d_weight = native.scale_shift_relu_sums(*arguments, ctx.limit)
        d_weight = d_weight * inverse
        slopes = torch.zeros(2, x.shape[3]).to(mean)
        if ctx.batch_statistics:  # as mean and variance depend on x
            slopes = -scale * torch.stack([d_weight * inverse, d_bias]) / (x.numel() // x.shape[3])
        d_x = native.scale_shift_relu_gradient(*arguments, *slopes.float(), ctx.limit, beside)
        return d_x, None, d_weight.to(ctx.dtype), d_bias.to(ctx.dtype), None


def serves_norm_relu(x: Tensor) -> bool:
    """Whether `norm_relu` takes x (N, C, H, W)."""
    return serves(x) and x.dim() == 4 and x.dtype == torch.float32 and x.numel() > x.shape[1] \
        and x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] % native.width() == 0 \
        and not torch.is_autocast_enabled(x.device.type)


def norm_relu(x: Tensor, norm: Norm, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """min(relu(norm(x)), limit) in one operator, and its gradients in two passes over x.

    It also returns x, for what else reads it, such as a residual connection: the gradient from there is then added in
    one of the two passes, and not in a third.

    Args:
        x: (N, C, H, W), one that `serves_norm_relu` accepts.
        norm: Batch normalisation of the C channels, of this process alone; running buffers are updated in place as
            BatchNorm2d's are.
        limit: Largest value of the output, None for any.

    Returns:
        Both like x.

    Raises:
        ValueError: x is another map, or the norm is of another number of channels.
    """
    if not serves_norm_relu(x):
        raise ValueError('expected a map (N, C, H, W) in float32 on the CPU, in channels_last format, of more than one '
                         f'value per channel, C a multiple of {native.width()}, got {list(x.shape)}, {x.dtype}, '
                         f'{x.device}, strides {list(x.stride())}: see `serves_norm_relu`')
    for name, y in zip(norm._fields, norm[:4]):
        if y is not None:
            check_channels(f'{name} of the norm', y, x.shape[1], x)
    weight = torch.ones_like(x[0, :, 0, 0]) if norm.weight is None else norm.weight
    bias = torch.zeros_like(weight) if norm.bias is None else norm.bias
    y, x = _NormReLU.apply(x.permute(0, 2, 3, 1), norm, weight, bias, limit)
    return y.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
