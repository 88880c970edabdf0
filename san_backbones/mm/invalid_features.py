"""A hook that finds where values stop being finite in an evaluation."""
from typing import Any

import torch
from mmengine.hooks import Hook

from ..diagnosis import diagnose
from .backbone import SANBackbone

__all__ = ['CheckInvalidFeaturesHook']


class CheckInvalidFeaturesHook(Hook):
    """Checks the feature maps of every SANBackbone in validation and testing.

    If a value is NaN or infinite, the log names the first layer that left the range and says what to do
    (`san_backbones.diagnose`), once per evaluation. MMEngine's `CheckInvalidLossHook` checks the training loss, which
    batch statistics can keep finite when the evaluation is not.

    Args:
        stop: End the run with a RuntimeError instead of a line in the log.
    """

    priority = 'NORMAL'

    def __init__(self, stop: bool = False):
        self.stop = stop
        self._handles: list[Any] = []
        self._looking = False
        self._message: str | None = None

    def _watch(self, backbone: SANBackbone, args: tuple[torch.Tensor, ...], maps: tuple[torch.Tensor, ...]) -> None:
        if self._looking and not all(bool(x.isfinite().all()) for x in maps):
            self._looking = False  # once only; also, diagnose calls the backbone again
            # now, since weights and precision are those of the evaluation
            self._message = f'SANBackbone gave values that are not finite. {diagnose(backbone, args[0])}'

    def _before(self, runner: Any) -> None:
        self._after()
        self._looking = True
        self._handles = [module.register_forward_hook(self._watch) for module in runner.model.modules()
                         if isinstance(module, SANBackbone)]

    def _after(self) -> str | None:
        for handle in self._handles:
            handle.remove()
        message, self._message, self._handles, self._looking = self._message, None, [], False
        return message

    def _report(self, runner: Any) -> None:
        message = self._after()
        if message is not None and self.stop:
            raise RuntimeError(message)
        if message is not None:
            runner.logger.error(message)  # error: the level that processes after the first show too

    before_val_epoch = before_test_epoch = _before

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Logs what was found."""
        self._report(runner)

    after_test_epoch = after_val_epoch
