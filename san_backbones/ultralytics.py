"""Importing it gives the SAN models to Ultralytics, whose YAML files name a backbone by `TorchVision`.

    backbone:
      - [-1, 1, TorchVision, [128, test_san_patchwise, DEFAULT, True, 0, True]]  # channels, name, weights or None
      - [0, 1, Index, [64, 4]]  # 0: the picture, 1: the stem, 2 to 6: stages, at strides 2 to 32

`TorchVision` asks torchvision for the model, so that is where the names go. Ultralytics itself is not imported.
"""
import functools
from typing import Any

import timm
import torch
from torchvision.models import _api, list_models

from . import san  # noqa: F401, registers the models


def features(name: str, weights: Any = None) -> torch.nn.Module:
    """The stem and the stages of a SAN, each the input of the next; pretrained if `weights` is not None."""
    model: torch.nn.Module = timm.create_model(name, features_only=True, pretrained=weights is not None)
    return model


for _name in set(timm.list_models(module='san')) - set(list_models()):
    _api.register_model(_name)(functools.partial(features, _name))
