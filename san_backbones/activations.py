"""ReLUs that work in place in inference only; the one before an attention layer may have an upper bound."""
import contextlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import create_act_layer
from torch import Tensor, nn

__all__ = ['BoundedReLU', 'ReLU', 'follow_bounds', 'is_setting', 'make_act', 'may_write_over', 'relu_bound',
           'resolve_bound']

AUTO_BOUND = 6.
"""Default bound of a new patchwise network."""


def resolve_bound(relu_bound: float | None, attention: str) -> float | None:
    """Returns the bound of a new network, None for none; raises ValueError if `relu_bound` is invalid."""
    if relu_bound is None:
        return AUTO_BOUND if attention == 'patchwise' else None
    if isinstance(relu_bound, bool) or not isinstance(relu_bound, (int, float)) or not relu_bound >= 0:
        raise ValueError('relu_bound must be a positive number, 0 for no bound, or None for the default, '
                         f'got {relu_bound!r}')
    return float(relu_bound) if 0 < relu_bound < math.inf else None


def is_setting(name: str) -> bool:
    """Whether this entry of a state dict is a ReLU bound, which weights may lack."""
    return name.endswith('.act1.bound')


def may_write_over() -> bool:
    """Whether a module may work in place: with gradients on, a selective activation checkpoint may have kept its
    input. A traced program serves both cases, and is traced in place.
    """
    return torch.jit.is_tracing() or not torch.is_grad_enabled()


class ReLU(nn.ReLU):
    """`torch.nn.ReLU` that works in place only while gradients are off."""

    def forward(self, x: Tensor) -> Tensor:
        """relu(x)."""
        return F.relu(x, inplace=self.inplace and may_write_over())


def make_act(act_layer: Any) -> nn.Module:
    """Makes an activation from a class or timm's name of one, in place if possible.

    Raises:
        ValueError: timm knows no activation of that name.
        TypeError: act_layer is neither callable nor a name.
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


class BoundedReLU(ReLU):
    """min(relu(x), bound); without a bound, ReLU.

    The patchwise form has no softmax: attention multiplies two factors that both grow with the input, so each block
    squares an outlier. The bound keeps values in the range of training. It is saved in the state dict as `bound`.
    Loading weights sets the layer to their bound, or to none if they have none, unless the bound was `chosen`.

    Args:
        bound: Positive number, or None.
        chosen: Whether the bound stays when weights are loaded.
        inplace: Work in place while gradients are off.
        device: Device of the `bound` buffer.
        dtype: Dtype of the `bound` buffer.

    Shape:
        Any shape of a floating dtype, to the same.
    """

    if TYPE_CHECKING:  # an Optional attribute would be missing in the state dict of TorchScript
        bound: Tensor | None
    limit: float | None  # used in forward; `bound` repeats it for the state dict

    def __init__(
            self,
            bound: float | None = None,
            chosen: bool = False,
            inplace: bool = False,
            device: Any = None,
            dtype: Any = None,
    ):
        super().__init__(inplace)
        self.chosen = chosen
        self.limit = bound
        self.register_buffer('bound', None if bound is None else torch.tensor(bound, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """min(relu(x), bound)."""
        limit = self.limit
        if limit is None:
            return F.relu(x, inplace=self.inplace and may_write_over())
        return F.hardtanh(x, 0., limit, inplace=self.inplace and may_write_over())

    def follow(self, bound: Tensor | None, like: Tensor | None = None) -> None:
        """Takes over the bound of weights that are being loaded, unless the layer's own was chosen.

        Args:
            bound: One positive number, or None if the weights have none.
            like: A parameter whose device and dtype the buffer gets; None takes those of `bound`.

        Raises:
            ValueError: The bound is not a positive finite number.
        """
        if self.chosen or (bound is not None and bound.is_meta):
            return
        if bound is None:
            self.limit = self.bound = None
            return
        if bound.numel() != 1 or not 0 < float(bound) < math.inf:
            raise ValueError(f'the bound of a ReLU in these weights must be one positive finite number, got {bound}: '
                             'the file is damaged, take another')
        like = bound if like is None or like.is_meta else like
        self.limit = float(bound)
        self.bound = torch.tensor(self.limit, device=like.device, dtype=like.dtype)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Does nothing: the block calls `follow`, since only it knows whether its weights are in the state dict."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'BoundedReLU':
        super()._apply(fn, recurse)
        if self.limit is not None and self.bound is not None and not self.bound.is_meta:
            self.bound = torch.full_like(self.bound, self.limit)  # to_empty() leaves it uninitialised
        return self

    def extra_repr(self) -> str:
        return ', '.join(([] if self.limit is None else [f'bound={self.limit:g}']) +
                         (['inplace=True'] if self.inplace else []))


def follow_bounds(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Sets a model's bounds to those of a complete state dict, without loading its weights."""
    for name, module in model.named_modules():
        if isinstance(module, BoundedReLU):
            module.follow(state_dict.get(f'{name}.bound'))


def relu_bound(model: nn.Module) -> float:
    """Returns the bound of a model as the option `relu_bound`: 0 for none."""
    return next((module.limit or 0. for module in model.modules() if isinstance(module, BoundedReLU)), 0.)
