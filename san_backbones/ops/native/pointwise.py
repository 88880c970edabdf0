"""The stem, relu(s x + t), and a batch norm's gradients through it, by the compiled loops of pointwise.c."""
import ctypes
import math
import typing

import torch
from torch import Tensor

from ..checks import check_shape, need
from ..contract import FUSED_DTYPES
from ..gamma import refuse_other_backward
from . import library

SLOTS = 64
"""Partial sums of parameter gradients, each of a fixed share of the rows: results depend on no number of threads."""


# in operators torch 2.6 takes neither list[Tensor] nor float | None
_Outputs = typing.List[Tensor]  # noqa: UP006
_Number = typing.Optional[float]  # noqa: UP045
_Map = typing.Optional[Tensor]  # noqa: UP045


def _check(image: Tensor, weight: Tensor, bias: Tensor) -> None:
    need(image=image, weight=weight, bias=bias)
    if image.dim() != 4 or image.shape[1] == 0 or image.dtype not in FUSED_DTYPES:
        raise ValueError('image must be (N, C, H, W) with C at least 1, of one of '
                         f'{", ".join(str(dtype)[6:] for dtype in FUSED_DTYPES)}, got {list(image.shape)}, '
                         f'{image.dtype}')
    if weight.dim() != 2 or len(weight) == 0:
        raise ValueError(f'weight must be (D, C) with D at least 1, got {list(weight.shape)}')
    check_shape('weight', weight, (len(weight), image.shape[1]), image, torch.float32)
    check_shape('bias', bias, (len(weight),), image, torch.float32)


def _task(image: Tensor, weight: Tensor, bias: Tensor):
    """struct stem, and tensors that must outlive it."""
    out, inputs = weight.shape
    padded = -(-out // library.width()) * library.width()
    image = image.detach().float()
    tensors = [image, torch.nn.functional.pad(weight.t(), (0, padded - out)).contiguous(),
               torch.nn.functional.pad(bias, (0, padded - out)).contiguous()]
    batch, _, height, width = image.shape
    addresses = dict(zip(('image', 'weight', 'bias'), (x.data_ptr() for x in tensors)))
    task = library.Stem(batch=batch, height=height, width=width, inputs=inputs, out=out, out_padded=padded,
                        strides=(ctypes.c_int64 * 4)(*image.stride()), slots=SLOTS, parameters=(inputs + 1) * padded,
                        **addresses)
    return task, tensors


@torch.library.custom_op('san_backbones::stem', mutates_args=(), device_types='cpu')
def _stem(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check(image, weight, bias)
    task, _tensors = _task(image, weight, bias)
    output = torch.empty(_output_shape(image, weight), dtype=torch.float32, device=image.device,
                         memory_format=torch.channels_last)
    task.output = output.data_ptr()
    library.run('san_stem', task)
    return output.to(image.dtype)


def _output_shape(image: Tensor, weight: Tensor) -> list[int]:
    return [image.shape[0], weight.shape[0], image.shape[2] // 2, image.shape[3] // 2]


@_stem.register_fake
def _(image, weight, bias):
    return torch.empty(_output_shape(image, weight), dtype=image.dtype, device=image.device,
                       memory_format=torch.channels_last)


@torch.library.custom_op('san_backbones::stem_backward', mutates_args=(), device_types='cpu')
def _stem_backward(gradient: Tensor, image: Tensor, weight: Tensor, bias: Tensor, of_image: bool) -> _Outputs:
    """Gradients of weight and bias, and of the image if asked for."""
    _check(image, weight, bias)
    need(gradient=gradient)
    check_shape('gradient', gradient, tuple(_output_shape(image, weight)), image)
    out, inputs = weight.shape
    task, _tensors = _task(image, weight, bias)
    gradient = gradient.float().contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).contiguous()
    parameters = weight.new_zeros(SLOTS, inputs + 1, task.out_padded, dtype=torch.float32)
    d_image = image.new_zeros(image.shape[0], *image.shape[2:], inputs, dtype=torch.float32) if of_image else None
    task.gradient, task.d_parameters = gradient.data_ptr(), parameters.data_ptr()
    task.d_image = None if d_image is None else d_image.data_ptr()
    library.run('san_stem', task)
    total = parameters.sum(0)[:, :out]
    gradients = [total[:-1].t().contiguous(), total[-1].clone()]
    return gradients if d_image is None else [*gradients, d_image.permute(0, 3, 1, 2).to(image.dtype)]


@_stem_backward.register_fake
def _(gradient, image, weight, bias, of_image):
    return [torch.empty_like(weight), torch.empty_like(bias),
            *([torch.empty_like(image, memory_format=torch.channels_last)] if of_image else [])]


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, gradient):
    refuse_other_backward(gradient)
    image, weight, bias = ctx.saved_tensors
    d_weight, d_bias, *d_image = _stem_backward(gradient, image, weight, bias, ctx.needs_input_grad[0])
    return d_image[0] if d_image else None, d_weight, d_bias


_stem.register_autograd(_differentiate, setup_context=_keep)


def stem(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """relu(max_pool2d(W x + b, 2)), without a map at full resolution.

    Args:
        image: (N, C, H, W), float32, bfloat16 or float16, any strides.
        weight: (D, C), float32.
        bias: (D,), float32.

    Returns:
        (N, D, H // 2, W // 2) in the dtype of the image, in channels_last memory format.

    Raises:
        ValueError: Shapes, dtypes or devices are others.
    """
    return _stem(image, weight, bias)


@torch.library.custom_op('san_backbones::scale_shift_relu', mutates_args=(), device_types='cpu')
def scale_shift_relu(x: Tensor, scale: Tensor, shift: Tensor, limit: _Number = None) -> Tensor:
    """min(relu(scale x + shift), limit) in one pass; no gradients.

    Args:
        x: (..., C), C at least 1, float32.
        scale: (C,), float32.
        shift: (C,), float32.
        limit: Largest value of the output, None for any.

    Returns:
        Like x, contiguous.

    Raises:
        ValueError: Shapes, dtypes or devices are others.
    """
    need(x=x, scale=scale, shift=shift)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f'x must be (..., C) with C at least 1, got {list(x.shape)}')
    check_shape('x', x, tuple(x.shape), x, torch.float32)
    for name, vector in (('scale', scale), ('shift', shift)):
        check_shape(name, vector, (x.shape[-1],), x, torch.float32)
    x, scale, shift = x.contiguous(), scale.contiguous(), shift.contiguous()
    output = torch.empty_like(x)
    task = library.Scaled(pixels=x.numel() // x.shape[-1], channels=x.shape[-1], x=x.data_ptr(), scale=scale.data_ptr(),
                          shift=shift.data_ptr(), output=output.data_ptr(), limit=math.inf if limit is None else limit)
    library.run('san_scaled', task)
    return output


@scale_shift_relu.register_fake
def _(x, scale, shift, limit=None):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


MOMENTS, GRADIENT_SUMS, GRADIENT = range(3)  # modes of struct normed


def _normed(mode: int, x: Tensor, limit: float | None, **tensors: Tensor) -> Tensor:
    """Runs san_normed on x (N, H, W, C), with gradients of its shape and vectors (C,): the sums, or the gradient."""
    need(x=x, **tensors)
    if x.dim() != 4 or x.shape[3] == 0 or x.shape[3] % library.width():
        raise ValueError(f'x must be (N, H, W, C) with C a multiple of {library.width()}, got {list(x.shape)}')
    check_shape('x', x, tuple(x.shape), x, torch.float32)
    for name, y in tensors.items():
        check_shape(name, y, tuple(x.shape) if name in ('gradient', 'beside') else (x.shape[3],), x, torch.float32)
    kept = {name: y.contiguous() for name, y in dict(tensors, x=x).items()}
    output = torch.empty_like(kept['x']) if mode == GRADIENT else x.new_zeros(SLOTS, 2, x.shape[3], dtype=torch.float64)
    kept['d_x' if mode == GRADIENT else 'sums'] = output
    library.run('san_normed', library.Normed(
        mode=mode, pixels=x.numel() // x.shape[3], channels=x.shape[3], slots=SLOTS,
        limit=math.inf if limit is None else limit, **{name: y.data_ptr() for name, y in kept.items()}))
    return output if mode == GRADIENT else output.sum(0)


@torch.library.custom_op('san_backbones::moments', mutates_args=(), device_types='cpu')
def moments(x: Tensor) -> Tensor:
    """Sums of x and of x * x over the pixels; no gradients.

    Args:
        x: (N, H, W, C), float32, C a multiple of the width of a vector.

    Returns:
        (2, C) in float64.

    Raises:
        ValueError: x is another tensor.
    """
    return _normed(MOMENTS, x, None)


@torch.library.custom_op('san_backbones::scale_shift_relu_sums', mutates_args=(), device_types='cpu')
def scale_shift_relu_sums(gradient: Tensor, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor,
                          limit: _Number) -> Tensor:
    """Sums of e and of e (x - mean), e being what of the gradient of min(relu(scale x + shift), limit) passes the ReLU:
    as `moments`. The vectors are (C,), float32.
    """
    return _normed(GRADIENT_SUMS, x, limit, gradient=gradient, mean=mean, scale=scale, shift=shift)


@torch.library.custom_op('san_backbones::scale_shift_relu_gradient', mutates_args=(), device_types='cpu')
def scale_shift_relu_gradient(gradient: Tensor, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, by_x: Tensor,
                              by_one: Tensor, limit: _Number, beside: _Map = None) -> Tensor:
    """scale e + by_x (x - mean) + by_one + beside, with e as above, beside as x or nothing: (N, H, W, C)."""
    also = {} if beside is None else dict(beside=beside)
    return _normed(GRADIENT, x, limit, gradient=gradient, mean=mean, scale=scale, shift=shift, by_x=by_x, by_one=by_one,
                   **also)


@moments.register_fake
def _(x):
    return torch.empty((2, x.shape[3]), dtype=torch.float64, device=x.device)


@scale_shift_relu_sums.register_fake
def _(gradient, x, *rest):
    return torch.empty((2, x.shape[3]), dtype=torch.float64, device=x.device)


@scale_shift_relu_gradient.register_fake
def _(gradient, x, *rest):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
