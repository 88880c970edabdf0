"""A hook that says where values leave the finite range, when an evaluation is not finite."""
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..diagnosis import diagnose
from .backbone import SANBackbone

__all__ = ['CheckInvalidFeaturesHook']


@HOOKS.register_module()
class CheckInvalidFeaturesHook(Hook):
    """Looks at the feature maps of every SANBackbone while the model is validated or tested.

    Where a value is NaN or infinite, the log names the first layer that left the range and what to do
    (`san_backbones.diagnose`), once an evaluation. MMEngine's `CheckInvalidLossHook` does so for the loss of training,
    which batch statistics keep finite where evaluation is not.

    Args:
        stop: End the run with a RuntimeError instead of a warning.
    """

    priority = 'NORMAL'

    def __init__(self, stop: bool = False):
        self.stop = stop
        self._handles: list[Any] = []
        self._images: list[tuple[SANBackbone, torch.Tensor]] = []

    def _watch(self, backbone: SANBackbone, args: tuple[torch.Tensor, ...], maps: tuple[torch.Tensor, ...]) -> None:
        if not self._images and not all(bool(x.isfinite().all()) for x in maps):
            self._images.append((backbone, args[0].detach().clone()))

    def _before(self, runner: Runner) -> None:
        self._after()
        self._handles = [module.register_forward_hook(self._watch) for module in runner.model.modules()
                         if isinstance(module, SANBackbone)]

    def _after(self) -> list[tuple[SANBackbone, torch.Tensor]]:
        for handle in self._handles:
            handle.remove()
        found, self._handles, self._images = self._images, [], []
        return found

    def _report(self, runner: Runner) -> None:
        for backbone, images in self._after():
            message = f'SANBackbone gave values that are not finite. {diagnose(backbone, images)}'
            if self.stop:
                raise RuntimeError(message)
            runner.logger.warning(message)

    before_val_epoch = before_test_epoch = _before

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Says what was found."""
        self._report(runner)

    after_test_epoch = after_val_epoch
