"""SAN as a Detectron2 backbone.

    >>> from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
    >>> from san_backbones.detectron2 import SANBackbone
    >>> names = ['res2', 'res3', 'res4', 'res5']
    >>> backbone = FPN(SANBackbone('san15_patchwise', names), names, 256, top_block=LastLevelMaxPool())
"""
from collections.abc import Sequence
from typing import Any

import timm
import torch

from . import san  # noqa: F401, registers the models

try:
    from detectron2.layers import ShapeSpec  # type: ignore[import-not-found]
    from detectron2.modeling import Backbone  # type: ignore[import-not-found]
except ImportError as error:
    raise ImportError(
        f'san_backbones.detectron2 needs Detectron2, which cannot be imported here ({error}); it is not on PyPI: '
        'https://detectron2.readthedocs.io/en/latest/tutorials/install.html') from error

__all__ = ['SANBackbone']


class SANBackbone(Backbone):
    """Feature maps of a SAN under Detectron2's ResNet names.

    Args:
        model: A timm model of this package, for instance 'san15_patchwise'.
        out_features: Maps to return, in increasing order, from 'res1' (stride 2) to 'res5' (stride 32).
        **kwargs: For `timm.create_model`, for instance pretrained=True, in_chans=1, output_stride=16,
            position_ref_size=224.

    Raises:
        ValueError: `out_features` are not increasing names of maps.
    """

    def __init__(self, model: str = 'san15_patchwise', out_features: Sequence[str] = ('res2', 'res3', 'res4', 'res5'),
                 **kwargs: Any):
        super().__init__()
        names = [f'res{i}' for i in range(1, 6)]
        if isinstance(out_features, str) or not out_features \
                or list(out_features) != [name for name in names if name in out_features]:
            raise ValueError(f'out_features must be names of {names}, each once and in this order, '
                             f'got {out_features!r}')
        indices = [names.index(name) for name in out_features]
        self.net: torch.nn.Module = timm.create_model(model, features_only=True, out_indices=indices, **kwargs)
        info: Any = self.net.feature_info
        self._out_features: list[str] = list(out_features)
        self._out_feature_channels: dict[str, int] = dict(zip(out_features, info.channels(), strict=True))
        self._out_feature_strides: dict[str, int] = dict(zip(out_features, info.reduction(), strict=True))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (N, in_chans, H, W) to feature maps (N, channels, H // stride, W // stride), by name."""
        return dict(zip(self._out_features, self.net(x), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Returns channels and stride of each map, by name."""
        return {name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
                for name in self._out_features}
