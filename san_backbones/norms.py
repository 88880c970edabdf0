"""Modules as the operators take them: which are what they seem to be, and batch norms as `ops.Norm`.

And `SyncBatchNorm`, which shares its statistics on the CPU as well.
"""
import contextlib
import math
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers import create_act_layer, get_norm_layer
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.utils.module_tracker import ModuleTracker
from torchvision.ops.misc import FrozenBatchNorm2d

from . import ops
from .activations import ReLU
from .ops.gamma import normalise

__all__ = ['SyncBatchNorm', 'as_norm', 'check_dtype', 'has_bias', 'has_process_wide_hooks', 'is_batch_norm',
           'is_integer', 'is_plain', 'is_pointwise', 'make_act', 'norm_constructor']


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with statistics shared by all processes, for the CPU (over gloo), which `nn.SyncBatchNorm` refuses.

    Arguments and state dict are those of `nn.SyncBatchNorm`. Not a subclass of it: DistributedDataParallel refuses any
    of its instances on the CPU.
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


# by their forward, so that a subclass that only changes checks (mmengine's SyncBN) counts and one that computes
# something else (a fused activation, an adapter) does not
BATCH_NORM_FORWARDS: tuple[Callable[..., Any], ...] = (
    nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward, FrozenBatchNorm2d.forward,
    nn.Identity.forward)
_FROZEN_OF = ('torchvision', 'transformers', 'detectron2')
_FROZEN_BUFFERS = {'weight', 'bias', 'running_mean', 'running_var'}
_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


def has_process_wide_hooks() -> bool:
    """Whether a hook waits for calls of every module (`torch.nn.modules.module.register_module_forward_hook`).

    Those by which torch's counter of operations notes where it is do not count: they look at no output.
    """
    return any(not isinstance(getattr(hook, '__self__', None), ModuleTracker)
               for hooks in _HOOKS for hook in getattr(torch_module, f'_global{hooks}').values())


def is_plain(module: nn.Module, forwards: tuple[Callable[..., Any], ...]) -> bool:
    """Whether calling the module is one of `forwards` and nothing else."""
    return type(module).forward in forwards and 'forward' not in module.__dict__ \
        and not any(getattr(module, hooks) for hooks in _HOOKS) and not has_process_wide_hooks()


def _is_frozen(module: nn.Module) -> bool:
    """Whether the module is torchvision's FrozenBatchNorm2d or a copy of it in a library that is known.

    Every DETR of transformers and Detectron2 have copies of their own, and put them in the place of batch norms; all
    compute the same. What tells them is the name and what they hold; some have no `eps` and add 1e-5. Classes of that
    name from elsewhere may compute anything.
    """
    return type(module).__name__.endswith('FrozenBatchNorm2d') \
        and type(module).__module__.partition('.')[0] in _FROZEN_OF and not module._parameters \
        and not module._modules and _FROZEN_BUFFERS.issubset(module._buffers)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the module is a batch norm, a frozen one or none, and nothing else: what `as_norm` describes."""
    return is_plain(module, (*BATCH_NORM_FORWARDS, *((type(module).forward,) if _is_frozen(module) else ())))


def norm_constructor(norm_layer: Any) -> Any:
    """What makes a norm of a number of channels: `norm_layer`, or the class that timm calls so.

    Raises:
        ValueError: timm knows no norm of that name.
        TypeError: It is neither callable nor a name.
    """
    if callable(norm_layer):
        return norm_layer
    if not isinstance(norm_layer, str):
        raise TypeError(f"norm_layer must be a class or timm's name of one, got {norm_layer!r}")
    found = None
    with contextlib.suppress(KeyError):
        found = get_norm_layer(norm_layer)
    if found is None:
        raise ValueError("norm_layer must be a class or timm's name of one, such as 'batchnorm2d', 'groupnorm1' or "
                         f"'layernorm2d', got {norm_layer!r}")
    return found


def make_act(act_layer: Any) -> nn.Module:
    """An activation, in place where it can be: of a class, or of the class that timm calls so.

    Raises:
        ValueError: timm knows no activation of that name.
        TypeError: It is neither callable nor a name.
    """
    if not callable(act_layer) and not isinstance(act_layer, str):
        raise TypeError(f"act_layer must be a class or timm's name of one, got {act_layer!r}")
    if act_layer in ('relu', nn.ReLU):
        return ReLU(inplace=True)
    act = None
    with contextlib.suppress(KeyError):
        act = create_act_layer(act_layer, inplace=True)
    if act is None:
        raise ValueError("act_layer must be a class or timm's name of one, such as 'relu', 'gelu' or 'silu', got "
                         f'{act_layer!r}')
    return act


def is_integer(value: Any, least: float = 1) -> TypeGuard[int]:
    """Whether it is an integer of at least that; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_dtype(x: Tensor, conv: Any) -> None:
    """Raises ValueError where x has not the dtype of a convolution's weights, and nothing would convert it."""
    weight = conv._parameters.get('weight')  # not that of a parametrisation, which may have any
    if weight is None or x.dtype == weight.dtype or not weight.is_floating_point() \
            or not is_plain(conv, (nn.Conv2d.forward,)):
        return
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return
    raise ValueError(f'expected {weight.dtype}, the dtype of the weights, got {x.dtype}: convert one of them, as in '
                     f'x.to({weight.dtype}) or model.to({x.dtype})')


def is_pointwise(conv: Any) -> bool:
    """Whether the module is a 1x1 convolution and nothing else."""
    # not by the weight, which a parametrisation computes anew whenever it is looked at
    return is_plain(conv, (nn.Conv2d.forward,)) and type(conv)._conv_forward is nn.Conv2d._conv_forward \
        and conv.kernel_size == (1, 1) and conv.stride == (1, 1) \
        and conv.groups == 1 and conv.padding in (0, (0, 0))


def has_bias(conv: Any) -> bool:
    """Whether the convolution has a bias, without computing one that is parametrised."""
    return conv._parameters.get('bias', conv.__dict__.get('bias', conv)) is not None


def _sync_group(norm: nn.Module) -> Any:
    """The process group of a SyncBatchNorm that has anyone to share with, else None."""
    if not isinstance(norm, (nn.SyncBatchNorm, SyncBatchNorm)) or not dist.is_available() or not dist.is_initialized():
        return None
    group = norm.process_group if norm.process_group is not None else dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def as_norm(module: Any, like: Tensor, bias: Tensor | None = None) -> ops.Norm:
    """A norm module as the operators take it; counts the batch as `nn.BatchNorm2d.forward` does.

    `like` is a vector of its channels. `bias` is that of the linear map before it, where the norm is `nn.Identity`.
    """
    if isinstance(module, nn.Identity):  # fused into the linear map before it, whose bias it then brings along
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
