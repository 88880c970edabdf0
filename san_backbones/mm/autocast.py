"""bfloat16 without a loss scaler, on any device."""
from contextlib import contextmanager
from collections.abc import Iterator

import torch
import torch.nn as nn
from mmengine.optim import OptimWrapper
from mmengine.runner import autocast

__all__ = ['AutocastOptimWrapper']


class AutocastOptimWrapper(OptimWrapper):
    """Runs forward passes under torch.autocast in bfloat16; weights, gradients and steps stay in float32.

    It also runs on the CPU, which MMEngine's `AmpOptimWrapper` refuses. bfloat16 has the range of float32, so losses
    need no scaling.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context that MMEngine enters for the forward pass of a training step."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield
