"""Pictures as models take them."""
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torchvision import transforms

__all__ = ['SUFFIXES', 'find', 'read', 'transform']

SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')


def find(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """The files named, and the pictures in the folders named and below them, each folder's in natural order."""
    def natural(path: pathlib.Path) -> list[Any]:
        return [(int(part), '') if part.isdecimal() else (-1, part) for part in re.split(r'(\d+)', str(path))]

    found = []
    for path in paths:
        if path.is_dir():
            inside = (pathlib.Path(folder, name) for folder, _, names in os.walk(path) for name in names)
            found += sorted((p for p in inside if p.suffix.lower() in SUFFIXES and not p.name.startswith('.')),
                            key=natural)
        else:
            found.append(path)
    return found


def read(path: pathlib.Path, channels: int = 3) -> Image.Image:
    """A picture the right way up, in colour or, for one channel, in grey.

    Raises:
        OSError: The file is not there or is no picture.
        ValueError: Its pixels have more than 8 bits, which Pillow would clip; or the model wants other channels.
    """
    if channels not in (1, 3):
        raise ValueError(f'the model takes {channels} channels, and pictures have 1 or 3')
    with Image.open(path) as picture:
        if picture.mode.startswith(('I', 'F')):
            raise ValueError(f'its pixels have more than 8 bits (mode {picture.mode}); convert it to 8 bits first')
        return ImageOps.exif_transpose(picture).convert('RGB' if channels == 3 else 'L')


def transform(cfg: Mapping[str, Any], size: tuple[int, int] | None = None,
              whole: bool = False) -> tuple[int, Callable[[Image.Image], Tensor]]:
    """How pictures become tensors (C, H, W) for a model: timm's evaluation transform.

    Args:
        cfg: The model's `pretrained_cfg`: size, crop, interpolation, mean and standard deviation.
        size: (height, width) instead of the cfg's.
        whole: Keep the picture's own size.

    Returns:
        The number of channels, and the function.
    """
    channels = cfg['input_size'][0]
    config = resolve_data_config(dict(input_size=(channels, *size)) if size else {}, pretrained_cfg=dict(cfg))
    for name in ('mean', 'std'):
        if len(config[name]) != channels:  # colours' numbers, for a model of grey pictures
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    if whole:
        mean, std = torch.tensor(config['mean']), torch.tensor(config['std'])
        return channels, transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    return channels, create_transform(**config, is_training=False)
