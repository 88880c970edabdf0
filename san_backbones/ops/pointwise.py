"""What surrounds the attention: pooling, the stem in one piece, and relu(s x + t), bounded or not."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .backends import serves
from .checks import check_channels
from .folding import FUSED_DTYPES
from .gamma import Norm, fold, fold_batch
from .traced import is_known

__all__ = ['halve', 'scale_shift_relu', 'stem']


@torch.fx.wrap
def halve(x: Tensor) -> Tensor:
    """max_pool2d(x, 2) of x (N, C, H, W), where a side of one pixel stays one pixel."""
    height, width = x.shape[-2], x.shape[-1]
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():  # a pixel more where there is one, by no branch on a size
            return F.max_pool2d(F.pad(x, (0, 1 // width, 0, 1 // height), value=float('-inf')), 2)
        if not (is_known(height) and is_known(width)):
            return F.max_pool2d(x, 2)  # torch.export takes open sizes to be at least 2 here, and guards that they are
    if height == 1 or width == 1:
        x = x.expand(-1, -1, 2 if height == 1 else height, 2 if width == 1 else width)
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
    if image.device.type != 'cpu' or image.dtype not in FUSED_DTYPES or native.unavailable() is not None:
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
