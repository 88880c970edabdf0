"""Checks arguments: integers in range, images, maps in the dtype of the weights."""
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .layers import is_plain

__all__ = ['check_dtype', 'check_image', 'is_integer', 'one_of', 'per_stage', 'sides']


def is_integer(value: Any, least: float = 1) -> TypeGuard[int]:
    """Whether value is an integer of at least `least`; True and False do not count."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """Returns value; raises ValueError unless it is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f'{name} must be one of {", ".join(map(repr, allowed))}, got {value!r}')
    return value


def sides(image_size: Any) -> tuple[Any, Any]:
    """Returns (height, width) of a side or of such a pair; raises ValueError for anything else."""
    if isinstance(image_size, int):
        return image_size, image_size
    if not isinstance(image_size, Sequence) or len(image_size) != 2:
        raise ValueError(f'image_size must be an integer or (height, width), got {image_size!r}')
    return image_size[0], image_size[1]


def per_stage(name: str, value: int | Sequence[int], stages: int, least: float) -> tuple[int, ...]:
    """Expands one integer, or a sequence, to one integer per stage; raises ValueError for anything else."""
    values = (value,) * stages if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(values) != stages or not all(is_integer(v, least) for v in values):
        raise ValueError(f'{name} must have one integer for each of the {stages} stages of depths, got {value!r}')
    return values


def check_image(x: Tensor, in_chans: int) -> None:
    """Raises TypeError or ValueError unless x is a batch of images (N, in_chans, H, W) of a floating dtype."""
    if not torch.jit.is_scripting():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f'expected a tensor of images of shape (N, {in_chans}, H, W), got a {type(x).__name__}: '
                            'convert it, as with torch.from_numpy')
    if not x.is_floating_point():
        raise ValueError(f'expected images of a floating dtype, normalised, got {x.dtype}: convert them, as in '
                         'images.float() / 255')
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f'expected images of shape (N, {in_chans}, H, W), got {list(x.shape)}')
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f'expected images of at least one pixel, got {x.shape[2]} x {x.shape[3]}')


def check_dtype(x: Tensor, conv: Any) -> None:
    """Raises ValueError if x has another dtype than a convolution's weights and nothing would convert it."""
    weight = conv._parameters.get('weight')  # None for a parametrised weight, which may have any dtype
    if weight is None or x.dtype == weight.dtype or not weight.is_floating_point() \
            or not is_plain(conv, (nn.Conv2d.forward,)):
        return
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return
    raise ValueError(f'expected {weight.dtype}, the dtype of the weights, got {x.dtype}: convert one of them, as in '
                     f'x.to({weight.dtype}) or model.to({x.dtype})')
