"""ReLUs that write over their input in inference only; the one before an attention layer may have an upper bound."""
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['PLAIN_RELUS', 'BoundedReLU', 'ReLU', 'follow_bounds', 'is_setting', 'may_write_over', 'relu_bound',
           'resolve_bound']

AUTO_BOUND = 6.
"""Bound of a new patchwise network."""


def resolve_bound(relu_bound: float | None, attention: str) -> float | None:
    """The bound of a new network, None for none; raises ValueError unless `relu_bound` asks for one."""
    if relu_bound is None:
        return AUTO_BOUND if attention == 'patchwise' else None
    if isinstance(relu_bound, bool) or not isinstance(relu_bound, (int, float)) or not relu_bound >= 0:
        raise ValueError('relu_bound must be a positive number, 0 for no bound, or None for the default, '
                         f'got {relu_bound!r}')
    return float(relu_bound) if 0 < relu_bound < math.inf else None


def is_setting(name: str) -> bool:
    """Whether this entry of a state dict is a bound, which weights may lack, and no weight."""
    return name.endswith('.act1.bound')


def may_write_over() -> bool:
    """Whether a module may work in place: where gradients are on, a selective activation checkpoint may have kept what
    another operator gave. A traced program is one for both.
    """
    return torch.jit.is_tracing() or not torch.is_grad_enabled()


class ReLU(nn.ReLU):
    """`torch.nn.ReLU` that works in place only where gradients are off."""

    def forward(self, x: Tensor) -> Tensor:
        """relu(x)."""
        return F.relu(x, inplace=self.inplace and may_write_over())


PLAIN_RELUS: tuple[Callable[..., Any], ...] = (nn.ReLU.forward, ReLU.forward)


class BoundedReLU(ReLU):
    """min(relu(x), bound); without a bound, ReLU.

    The patchwise form has no softmax: attention multiplies two things that grow with its input, and a block squares an
    excess. The bound keeps it to what was seen in training. Weights are run as they were trained: the bound is in the
    state dict, as `bound`, where there is one. Loading weights that have another, or none, changes the layer, unless
    the bound was `chosen`.

    Args:
        bound: Positive number, or None.
        chosen: Whether the bound stays as it is when weights are loaded.
        inplace: Write the output over the input where gradients are off.
        device: Where the entry of the state dict is made.
        dtype: Its dtype.

    Shape:
        Any, of a floating dtype, to the same.
    """

    bound: Tensor | None
    limit: float | None  # what is computed with; `bound` repeats it for the state dict

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
        """Takes the bound of weights that are being loaded, unless it was chosen.

        Args:
            bound: One positive number, None where the weights have none.
            like: A parameter beside it, for the device and dtype of the entry; None takes those of `bound`.

        Raises:
            ValueError: The bound is no positive finite number.
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
        """Nothing: the block calls `follow`, which knows whether its weights are there at all."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'BoundedReLU':
        super()._apply(fn, recurse)
        if self.limit is not None and self.bound is not None and not self.bound.is_meta:
            self.bound = torch.full_like(self.bound, self.limit)  # what to_empty() makes holds anything
        return self

    def extra_repr(self) -> str:
        return ', '.join(([] if self.limit is None else [f'bound={self.limit:g}']) +
                         (['inplace=True'] if self.inplace else []))


def follow_bounds(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Lets a model take the bounds of a state dict of all its weights, which is not loaded."""
    for name, module in model.named_modules():
        if isinstance(module, BoundedReLU):
            module.follow(state_dict.get(f'{name}.bound'))


def relu_bound(model: nn.Module) -> float:
    """The bound of a model, as its option says it: 0 for none."""
    return next((module.limit or 0. for module in model.modules() if isinstance(module, BoundedReLU)), 0.)
