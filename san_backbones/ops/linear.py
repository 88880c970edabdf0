"""Linear maps over the channels of a map, for inference, with what folding leaves around them."""
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .backends import serves
from .pointwise import scale_shift_relu

__all__ = ['NARROWEST_INT8', 'Linear', 'ScaleShiftReLU']

NARROWEST_INT8 = 64
"""Channels below which rounding a map takes longer than 8 bits save, measured with AVX-512 VNNI."""


class ScaleShiftReLU(NamedTuple):
    """f(x) = min(relu(scale x + shift), limit) of every channel: scale and shift are (C,), float32; limit None for any.
    """
    scale: Tensor
    shift: Tensor
    limit: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        return scale_shift_relu(x, *self)


class Linear:
    """y = W f(x) + b, or x + W y + b, for inference: f is a `ScaleShiftReLU` before the product, and one may follow.

    On the CPU weights are kept as the compiled loops read them, which then compute all of it in one pass, on maps in
    float32. Weights in bfloat16 are multiplied by AMX where there is that, with f(x) rounded to bfloat16; sums are
    float32.

    Args:
        weight: (D, C), copied.
        bias: (D,) or None.
        int8: Round W and f(x) to 8 bits where the compiled loops compute it, the processor has instructions for it
            (`native.has_int8`), and D and C are at least `NARROWEST_INT8`: W with one scale for each of the D, f(x)
            with a scale and a zero for each pixel.

    Raises:
        ValueError: When called with a map of other channels, or an `output` of another size.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, int8: bool = False):
        self.columns: int
        self.inner: int
        self.columns, self.inner = weight.shape
        self.bias = None if bias is None else bias.clone()
        self.dtype: torch.dtype = weight.dtype
        self.packed: bool = weight.dtype in native.BACKEND.dtypes and native.BACKEND.unavailable(weight.device) is None
        self._int8: native.Int8 | None = None
        if not self.packed:
            self._weight = weight.clone()
        elif int8 and weight.dtype == torch.float32 and native.has_int8() and min(weight.shape) >= NARROWEST_INT8:
            self._weight, self._int8 = native.pack_int8(weight)
        elif weight.dtype == torch.bfloat16 and native.has_amx():
            self._weight = native.pack_bfloat16(weight)
        else:
            self._weight = native.pack(weight.float())

    @property
    def weight(self) -> Tensor:
        """(D, C), as rounded."""
        if self._int8 is not None:
            return native.unpack_int8(self._weight, self._int8, self.inner)
        if not self.packed:
            return self._weight
        unpack = native.unpack_bfloat16 if self._weight.dtype == torch.bfloat16 else native.unpack
        return unpack(self._weight, self.columns, self.inner).to(self.dtype)

    def __call__(self, x: Tensor, before: ScaleShiftReLU | None = None, output: Tensor | None = None) -> Tensor:
        """W f(x) + b of x (N, H, W, C), f being `before`: (N, H, W, D), contiguous; written to `output` if given."""
        self.check(x, output)
        if x.dtype == torch.float32 and self.runs_packed(x):
            output = x.new_empty(*x.shape[:3], self.columns) if output is None else output
            self._run(self.prepare(x, before, output))
            return output
        y = F.linear(x if before is None else before(x.contiguous()), self.weight, self.bias)
        return y if output is None else output.copy_(y)

    def add_to(self, output: Tensor, x: Tensor, after: ScaleShiftReLU | None = None) -> Tensor:
        """output + W x + b of x (N, H, W, C), followed by `after`: (N, H, W, D). Writes over `output`, contiguous."""
        self.check(x, output)
        if x.dtype == torch.float32 and self.runs_packed(x):
            self._run(self.prepare(x, None, output, True, after))
            return output
        output.view(-1, self.columns).addmm_(x.reshape(-1, self.inner), self.weight.t())
        if self.bias is not None:
            output += self.bias
        return output if after is None else after(output)

    def check(self, x: Tensor, output: Tensor | None) -> None:
        """Raises ValueError for maps that a call does not take."""
        if x.dim() != 4 or x.shape[3] != self.inner:
            raise ValueError(f'expected a map with {self.inner} channels (N, H, W, {self.inner}), got {list(x.shape)}')
        if output is not None and (output.shape != (*x.shape[:3], self.columns) or output.dtype != x.dtype
                                   or not output.is_contiguous()):
            raise ValueError(f'expected an output {[*x.shape[:3], self.columns]}, {x.dtype}, contiguous, got '
                             f'{list(output.shape)}, {output.dtype}, strides {list(output.stride())}')

    def runs_packed(self, x: Tensor) -> bool:
        """Whether the compiled loops compute it for x, in float32 if it is not."""
        return self.packed and x.dtype == self.dtype and serves(x)

    def prepare(self, x: Tensor, before: ScaleShiftReLU | None, output: Tensor, add: bool = False,
                after: ScaleShiftReLU | None = None, halve: bool = False) -> native.Call:
        """The call of the compiled loops that writes `after` of W f(x) + b, or of output + W f(x) + b, to `output`;
        arguments as above, maps in float32, nothing is checked. With `halve`, x is max_pool2d(x, 2) of what is given.
        """
        vectors: Any = [None if f is None else (f.scale.float(), f.shift.float()) for f in (before, after)]
        bias = None if self.bias is None else self.bias.float()
        return native.linear(x, self._weight, bias, vectors[0], before and before.limit, output, add, vectors[1],
                             self._int8, halve)

    @staticmethod
    def _run(call: native.Call) -> None:
        native.library.run(call.name, call.task)
