"""Converts batch norms to the operators' form, and provides a `SyncBatchNorm` that also works on the CPU."""
import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers import get_norm_layer
from torch import Tensor
from torchvision.ops.misc import FrozenBatchNorm2d

from . import ops
from .layers import BOUNDED_RELU, Kind, is_plain
from .ops.gamma import normalise

__all__ = ['BATCH_NORM', 'SyncBatchNorm', 'as_norm', 'norm_constructor', 'norm_relu', 'norm_relu_beside']


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with statistics of all processes that also works on the CPU, over gloo; `nn.SyncBatchNorm` does not.

    Arguments and state dict are those of `nn.SyncBatchNorm`. Not a subclass of it: DistributedDataParallel refuses its
    instances on the CPU.
    """

    process_group: Any

    def __init__(self, *args: Any, process_group: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f'expected at least 2 dimensions (N, C, ...), got {list(x.shape)}')

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same."""
        if not self.training or _sync_group(self) is None:
            return super().forward(x)
        self._check_input_dim(x)
        maps = x if x.dim() == 4 else x.reshape(*x.shape[:2], 1, math.prod(x.shape[2:]))
        return normalise(maps, as_norm(self, maps)).reshape(x.shape)


# mmengine's SyncBN only changes checks, and has torch's forward
_FORWARDS: tuple[Callable[..., Any], ...] = (
    nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward, FrozenBatchNorm2d.forward,
    nn.Identity.forward)
_FROZEN_OF = ('torchvision', 'transformers', 'detectron2')
_FROZEN_BUFFERS = {'weight', 'bias', 'running_mean', 'running_var'}


def _is_frozen(module: nn.Module) -> bool:
    """Whether the module is torchvision's FrozenBatchNorm2d or a copy of it in a known library.

    Detectron2 and each DETR of transformers replace batch norms by copies of their own, which compute the same. They
    are recognised by name and buffers; some have no `eps` and add 1e-5. Classes of that name from other libraries may
    compute something else.
    """
    return type(module).__name__.endswith('FrozenBatchNorm2d') \
        and type(module).__module__.partition('.')[0] in _FROZEN_OF and not module._parameters \
        and not module._modules and _FROZEN_BUFFERS.issubset(module._buffers)


def _is_batch_norm(module: nn.Module) -> bool:
    return is_plain(module, (*_FORWARDS, *((type(module).forward,) if _is_frozen(module) else ())))


BATCH_NORM = Kind('batch norm', _is_batch_norm)
"""A batch norm, a frozen one or none (`nn.Identity`): what `as_norm` describes."""


def norm_constructor(norm_layer: Any) -> Any:
    """Returns a function of channels, `device` and `dtype`, given one of channels only or timm's name of a norm.

    Raises:
        ValueError: timm knows no norm of that name.
        TypeError: norm_layer is neither callable nor a name.
    """
    if callable(norm_layer):
        return norm_layer if _takes_device(norm_layer) else functools.partial(_make_there, norm_layer)
    if not isinstance(norm_layer, str):
        raise TypeError(f"norm_layer must be a class or timm's name of one, got {norm_layer!r}")
    found = None
    with contextlib.suppress(KeyError):
        found = get_norm_layer(norm_layer)
    if found is None:
        raise ValueError("norm_layer must be a class or timm's name of one, such as 'batchnorm2d', 'groupnorm1' or "
                         f"'layernorm2d', got {norm_layer!r}")
    return norm_constructor(found)


def _takes_device(norm_layer: Any) -> bool:
    try:
        parameters = inspect.signature(norm_layer).parameters.values()
    except (TypeError, ValueError):  # nothing is known
        return True
    return {'device', 'dtype'} <= {p.name for p in parameters} or any(p.kind is p.VAR_KEYWORD for p in parameters)


def _make_there(norm_layer: Any, channels: int, device: Any = None, dtype: Any = None) -> nn.Module:
    norm = norm_layer(channels)
    return norm if device is None and dtype is None else norm.to(device=device, dtype=dtype)


def _sync_group(norm: nn.Module) -> Any:
    """Returns the process group of a SyncBatchNorm if it has several processes, else None."""
    if not isinstance(norm, (nn.SyncBatchNorm, SyncBatchNorm)) or not dist.is_available() or not dist.is_initialized():
        return None
    group = norm.process_group if norm.process_group is not None else dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def as_norm(module: Any, like: Tensor, bias: Tensor | None = None) -> ops.Norm:
    """Converts a norm module to the operators' form; counts the batch as `nn.BatchNorm2d.forward` does.

    `like` is a vector of its channels. `bias` is that of the linear map before it if the norm is `nn.Identity`.
    """
    if isinstance(module, nn.Identity):  # the norm is folded into the linear map before it; keep that map's bias
        return ops.Norm(None, bias, torch.zeros_like(like), torch.ones_like(like), False, 0., 0.)
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        frozen: Any = module
        eps = getattr(module, 'eps', 1e-5)
        return ops.Norm(frozen.weight, frozen.bias, frozen.running_mean, frozen.running_var, False, 0., eps)
    momentum = 0. if module.momentum is None else module.momentum
    if module.training and module.track_running_stats and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            momentum = 1. / float(module.num_batches_tracked)
    batch_statistics = module.training or module.running_mean is None
    keep_buffers = not module.training or module.track_running_stats
    return ops.Norm(
        module.weight, module.bias,
        module.running_mean if keep_buffers else None, module.running_var if keep_buffers else None,
        batch_statistics, momentum, module.eps, _sync_group(module) if module.training else None)


def norm_relu(norm: Any, act: Any, x: Tensor) -> Tensor:
    """act(norm(x)), which leaves x as it is; a batch norm and a ReLU that get gradients run as one operator."""
    return norm_relu_beside(norm, act, x)[0]


def norm_relu_beside(norm: Any, act: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """act(norm(x)) and x, for a residual connection beside them: see `ops.norm_relu`."""
    if _in_one(norm, act, x):
        return ops.norm_relu(x, as_norm(norm, x[0, :, 0, 0]), getattr(act, 'limit', None))
    normed = norm(x)
    return act(normed.clone() if normed is x else normed), x  # without a norm: activations may work in place


def _in_one(norm: Any, act: Any, x: Any) -> bool:
    return isinstance(x, Tensor) and torch.is_grad_enabled() and ops.serves_norm_relu(x) \
        and isinstance(norm, nn.modules.batchnorm._BatchNorm) and BATCH_NORM.fits(norm) and BOUNDED_RELU.fits(act) \
        and _sync_group(norm) is None
