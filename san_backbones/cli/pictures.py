"""Finds, reads and preprocesses pictures for the commands."""
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

from .._pictures import SUFFIXES, config, reason, upright

__all__ = ['SUFFIXES', 'find', 'read', 'reason', 'transform']


def find(paths: Iterable[pathlib.Path], suffixes: tuple[str, ...] = SUFFIXES) -> list[pathlib.Path]:
    """Returns the given files, and the pictures in the given folders and their subfolders in natural order."""
    def natural(path: pathlib.Path) -> list[Any]:
        return [(int(part), '') if part.isdecimal() else (-1, part) for part in re.split(r'(\d+)', str(path))]

    found = []
    for path in paths:
        if path.is_dir():
            inside = (pathlib.Path(folder, name) for folder, _, names in os.walk(path) for name in names)
            found += sorted((p for p in inside if p.suffix.lower() in suffixes and not p.name.startswith('.')),
                            key=natural)
        else:
            found.append(path)
    return found


def read(path: pathlib.Path, channels: int = 3) -> Image.Image:
    """Reads a picture, applies its EXIF orientation, and converts it to RGB, or to grey for one channel.

    Raises:
        OSError: The file does not exist or is not a picture.
        ValueError: The pixels have more than 8 bits, which Pillow would clip, or channels is not 1 or 3.
    """
    with Image.open(path) as picture:
        return upright(picture, channels)


def transform(cfg: Mapping[str, Any], size: tuple[int, int] | None = None,
              whole: bool = False) -> tuple[int, Callable[[Image.Image], Tensor]]:
    """Makes the transform from pictures to tensors (C, H, W) for a model: timm's evaluation transform.

    Args:
        cfg: The model's `pretrained_cfg`: size, crop, interpolation, mean and standard deviation.
        size: (height, width) instead of the cfg's.
        whole: Keep the picture's own size.

    Returns:
        The number of channels, and the function.
    """
    found = config(cfg, size)
    channels = found['input_size'][0]
    if whole:
        mean, std = torch.tensor(found['mean']), torch.tensor(found['std'])
        return channels, transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    return channels, create_transform(**found, is_training=False)
