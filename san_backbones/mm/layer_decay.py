"""Layer-wise learning rates: smaller for layers closer to the image."""

import torch.nn as nn
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from timm.models._manipulate import group_with_matcher

from .. import san
from .backbone import SANBackbone

__all__ = ['SANLayerDecayOptimWrapperConstructor']

DECAY_TYPES = ('block', 'stage')


class SANLayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Gives layer i of n of a SANBackbone the learning rate lr * decay_rate ** (n - i); other parts have lr.

    Layer 0 is the stem. The other layers are the blocks, counted through all stages, or with decay_type 'stage' the
    stages. The convolution of a stage belongs to its first block and the norm to its last, as in `SAN.group_matcher`.
    So the last layer has lr * decay_rate, and necks and heads have lr.

        optim_wrapper = dict(
            constructor='SANLayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(decay_rate=0.8, decay_type='block', norm_decay_mult=0., bias_decay_mult=0.),
            optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05))

    Args:
        optim_wrapper_cfg: As for `DefaultOptimWrapperConstructor`; its optimizer must name an `lr`.
        paramwise_cfg: `decay_rate`, in (0, 1]; `decay_type`, 'block' (default) or 'stage'; `backbone_lr_mult`, a factor
            for the whole backbone (default 1; a factor in `custom_keys` instead would give norms weight decay); and all
            options of `DefaultOptimWrapperConstructor`, whose factors (`bias_lr_mult`, `lr_mult` of `custom_keys`)
            multiply with the decay.

    Raises:
        ValueError: An option is out of range, no lr is given, or the model has no SANBackbone.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = self.paramwise_cfg.get('decay_rate')
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(f"paramwise_cfg needs a 'decay_rate' in (0, 1], for instance 0.8, got {rate!r}")
        decay_type = self.paramwise_cfg.get('decay_type', 'block')
        if decay_type not in DECAY_TYPES:
            raise ValueError(f'decay_type must be one of {", ".join(map(repr, DECAY_TYPES))}, got {decay_type!r}')
        factor = self.paramwise_cfg.get('backbone_lr_mult', 1.)
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor < 0:
            raise ValueError(f'backbone_lr_mult must be a number that is not negative, got {factor!r}')
        if self.base_lr is None:
            raise ValueError(f"layer decay needs the 'lr' of the optimizer, got optimizer={self.optimizer_cfg!r}")

    def add_params(
            self,
            params: list[dict],
            module: nn.Module,
            prefix: str = '',
            is_dcn_module: int | float | None = None,
    ) -> None:
        """Adds a group for every trainable parameter, as the parent class does, and scales its learning rate."""
        super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)
        if prefix:  # the parent class calls this again for each child
            return
        scales = self._scales(module)
        for group in params:
            group.setdefault('lr', self.base_lr)
            group['lr'] *= scales.get(id(group['params'][0]), 1.)

    def _scales(self, model: nn.Module) -> dict[int, float]:
        """Returns the learning rate factor for each parameter, by its id, of all SANBackbones in the model."""
        rate, by_stage = self.paramwise_cfg['decay_rate'], self.paramwise_cfg.get('decay_type', 'block') == 'stage'
        factor = self.paramwise_cfg.get('backbone_lr_mult', 1.)
        scales: dict[int, float] = {}
        for name, backbone in model.named_modules():
            if not isinstance(backbone, SANBackbone):
                continue
            parameters = ((n.replace('_fsdp_wrapped_module.', ''), p) for n, p in backbone.named_parameters())
            layers = group_with_matcher(
                parameters, san.SAN.group_matcher(backbone, coarse=by_stage), return_values=True)
            for i, parameters in layers.items():
                scales.update((id(parameter), factor * rate ** (len(layers) - i)) for parameter in parameters)
            print_log(f'layer decay: {name or "the model"} has {len(layers)} layers, learning rates from '
                      f'{self.base_lr * factor * rate ** len(layers):g} (stem) to {self.base_lr * factor * rate:g}',
                      logger='current')
        if not scales:
            raise ValueError(f'SANLayerDecayOptimWrapperConstructor expects a model with a SANBackbone, got a '
                             f'{type(model).__name__} without one; use DefaultOptimWrapperConstructor for it')
        return scales
