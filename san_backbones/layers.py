"""Checks whether layers are the plain layers that they seem to be.

Users, tools and other libraries replace, hook and wrap layers. Code that does not run a network layer by layer
(operators, folding, diagrams) asks here first: `obstacle` names the first unexpected layer. A layer is identified by
its `forward`: subclasses that only change checks are accepted, those that compute something else are not.
"""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from timm.layers import DropPath
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.module_tracker import ModuleTracker

from .activations import BoundedReLU, ReLU
from .pooling import Pool

__all__ = ['BOUNDED_RELU', 'DROP_PATH', 'POINTWISE', 'POOL', 'RELU', 'SEQUENTIAL', 'Kind', 'has_bias',
           'has_process_wide_hooks', 'is_plain', 'obstacle']

_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


def has_process_wide_hooks() -> bool:
    """Whether a hook is registered for all modules (`torch.nn.modules.module.register_module_forward_hook`).

    The hooks of torch's FLOP counter do not count: they only track the current module.
    """
    return any(not isinstance(getattr(hook, '__self__', None), ModuleTracker)
               for hooks in _HOOKS for hook in getattr(torch_module, f'_global{hooks}').values())


def is_plain(module: nn.Module, forwards: tuple[Callable[..., Any], ...]) -> bool:
    """Whether calling the module runs one of `forwards` and nothing else, such as hooks."""
    return type(module).forward in forwards and 'forward' not in module.__dict__ \
        and not any(getattr(module, hooks) for hooks in _HOOKS) and not has_process_wide_hooks()


def has_bias(conv: Any) -> bool:
    """Whether the convolution has a bias; does not compute a parametrised one."""
    return conv._parameters.get('bias', conv.__dict__.get('bias', conv)) is not None


def _is_pointwise(conv: Any) -> bool:
    # does not read the weight, which a parametrisation computes on each access
    return is_plain(conv, (nn.Conv2d.forward,)) and type(conv)._conv_forward is nn.Conv2d._conv_forward \
        and conv.kernel_size == (1, 1) and conv.stride == (1, 1) \
        and conv.groups == 1 and conv.padding in (0, (0, 0))


class Kind(NamedTuple):
    """A kind of layer that can be expected."""
    name: str
    """Used in messages."""
    fits: Callable[[Any], bool]
    """Whether a module is a plain layer of this kind."""

    @classmethod
    def by_forward(cls, name: str, *forwards: Callable[..., Any]) -> 'Kind':
        """Returns the kind of modules that run one of these forward functions and nothing else."""
        return cls(name, lambda module: is_plain(module, forwards))


POINTWISE = Kind('1x1 convolution', _is_pointwise)
POOL = Kind('2x2 max pool', lambda module: is_plain(module, (Pool.forward,)) and module.is_by_twos())
RELU = Kind.by_forward('ReLU', nn.ReLU.forward, ReLU.forward)
BOUNDED_RELU = Kind.by_forward('ReLU', nn.ReLU.forward, ReLU.forward, BoundedReLU.forward)
DROP_PATH = Kind.by_forward('DropPath', nn.Identity.forward, DropPath.forward)
SEQUENTIAL = Kind.by_forward('Sequential', nn.Sequential.forward)


def obstacle(module: nn.Module, expected: Mapping[str, Kind], prefix: str = '') -> str | None:
    """Describes the first layer that is not of the expected kind; None if all are.

    Args:
        module: The parent of the layers.
        expected: The expected kinds of its children, by name.
        prefix: Put before their names in the message.
    """
    for name, kind in expected.items():
        layer: Any = module._modules[name]
        if not kind.fits(layer):
            return f'{prefix}{name} is a {type(layer).__name__} and not a {kind.name} without hooks'
    return None
