"""Folds the layers around the attention of a stage for inference, into as few passes over memory as possible.

In eval mode a block is `x + W relu(b2 + a2 attn(relu(a1 x + b1)))` plus biases: its norms are scales a and shifts b.
Folded, it takes four passes: relu(a1 x + b1); one product for query, key and value (the attention is linear in the
value, so a2 goes into its weights); the attention, ending in relu(y + b2); and a product added to x in place. The bias
of W is not added to x: it goes into the shift of every norm of the stage that reads x. The compiled loops take three:
what is before a product, and a stage's last norm and ReLU, they do with it (`ops.Linear`).
"""
import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import ops
from .layers import POINTWISE, POOL, RELU, SEQUENTIAL, has_process_wide_hooks, obstacle
from .norms import BATCH_NORM, as_norm
from .ops import native
from .ops.gamma import widened

__all__ = ['FoldableStage', 'FoldedBlock', 'fuse_for_inference', 'linear_of', 'missing_for_int8', 'refold',
           'scale_and_shift']

_logger = logging.getLogger('san_backbones')


class FoldedBlock(NamedTuple):
    """A block folded for inference."""
    first: ops.ScaleShiftReLU  # norm1 and its ReLU
    project: ops.Linear  # query, key and value: (2 r + m, C)
    attention: Any  # a PairwiseAttention or PatchwiseAttention
    gamma: ops.Gamma
    rounded: Any  # gamma in 8 bits, or None
    out_shift: Tensor  # (m,), of norm2
    expand: ops.Linear  # (C, m)
    places: dict[tuple[int, int], Tensor | None]  # mapped coordinates of the last map size, (1, H, W, 2)

    def _place(self, projected: Tensor) -> Tensor | None:
        size = (projected.shape[1], projected.shape[2])
        place = self.places.get(size)  # read once: another thread with another map size may clear the dict at any time
        if place is None:
            place = self.attention.place(projected.permute(0, 3, 1, 2))
            place = None if place is None else widened(place).permute(0, 2, 3, 1).contiguous()
            self.places.clear()
            self.places[size] = place
        return place

    def __call__(self, x: Tensor, after: ops.ScaleShiftReLU | None) -> Tensor:
        """Adds the block's branch to x (N, H, W, C), contiguous, which it writes over; then follows `after`."""
        return self.expand.add_to(x, self._attend(self.project(x, self.first)), after)

    def _attend(self, projected: Tensor) -> Tensor:
        """relu(norm2(attention)) of query, key and value (N, H, W, 2 r + m): (N, H, W, m)."""
        query, key, value = (x.permute(0, 3, 1, 2) for x in self._split(projected))
        place = self._place(projected)
        place = None if place is None else place.permute(0, 3, 1, 2)
        return ops.footprint_attention(query, key, value, place, self.gamma, self.attention.spec(),
                                       self.out_shift).permute(0, 2, 3, 1)

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r, m = self.attention.rel_planes, self.attention.out_planes
        query, key, value = projected.split((r, r, m), 3)
        return query, key, value

    def runs_in_loops(self) -> bool:
        """Whether the compiled loops have all of it."""
        return self.project.packed and self.expand.packed \
            and native.BACKEND.name in self.attention.spec().described.backends

    def prepare(self, x: Tensor, work: Tensor, after: ops.ScaleShiftReLU | None) -> list[native.Call]:
        """The calls of the compiled loops that do the same; `work` has room for what is between them."""
        between, pixels = self.project.columns, x[..., 0].numel()
        projected = work[:pixels * between].view(*x.shape[:3], between)
        attended = work[pixels * between:pixels * (between + self.expand.inner)].view(*x.shape[:3], self.expand.inner)
        return [self.project.prepare(x, self.first, projected),
                ops.prepare_attention(*self._split(projected), self._place(projected), self.gamma,
                                      self.attention.spec(), self.out_shift, attended, self.rounded),
                self.expand.prepare(attended, None, x, True, after)]

    def room(self) -> int:
        """Elements for each pixel that `prepare` has in `work`."""
        return self.project.columns + self.expand.inner


def scale_and_shift(norm: nn.Module, like: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns scale and shift of a batch norm of x + offset in eval mode, in float32 or wider; `like` is (C,)."""
    described = as_norm(norm, like)
    scale, shift = ops.fold(described, described.running_mean, described.running_var)
    return scale.contiguous(), (shift if offset is None else shift + scale * offset).contiguous()


def linear_of(conv: Any) -> tuple[Tensor, Tensor]:
    """Returns weight (out, in) and bias (out,) of a 1x1 convolution, in float32 or wider."""
    weight = widened(conv.weight.flatten(1))
    return weight, weight.new_zeros(len(weight)) if conv.bias is None else widened(conv.bias)


# attributes that change what a norm, a convolution or an attention computes
_SETTINGS = ('eps', 'stride', 'padding', 'groups', 'kernel_size', 'dilation', 'relation', 'position_mode',
             'position_step', 'limit')


_steps = 0  # begun and ended steps of all optimizers: fused ones do not raise the version of what they write


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_count_step)  # a step that fails may have written, too
    register_optimizer_step_post_hook(_count_step)


def _tensors(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor | None]]:
    """Lists (dict, name, tensor) of a module: parameters, buffers, and plain attributes, as which
    FullyShardedDataParallel stores parameters.
    """
    attributes = {name: x for name, x in module.__dict__.items() if isinstance(x, Tensor)}
    return [(holder, name, x) for holder, found in (
        (module._parameters, module._parameters), (module._buffers, module._buffers), (module.__dict__, attributes))
        for name, x in found.items()]


def _sample(x: Tensor) -> Tensor:
    """Returns a view of some elements: all of a vector, the diagonal of a 1x1 convolution's matrix."""
    while x.dim() > 2:
        x = x[..., 0]
    return x.diagonal() if x.dim() == 2 else x.view(-1)


class _Watch:
    """Detects changes to what a stage was folded from: modules, their settings, tensors and their versions.

    On the CPU it also compares some elements, to detect writes that torch does not count: through `tensor.data`, NumPy,
    shared memory, collectives. On a GPU, reading elements would wait for the device.
    """

    def __init__(self, stage: nn.Module):
        _watch_optimizers()
        self.steps: int = _steps
        # without the stage itself, which would make a reference cycle
        self.modules: list[tuple[nn.Module, type, int]] = [
            (module, type(module), len(module._modules)) for module in stage.modules() if module is not stage]
        self.entries: list[tuple[dict[str, Any], str, Any]] = []
        for module in stage.modules():
            self.entries += [(module._modules, name, child) for name, child in module._modules.items()]
            self.entries += [(module.__dict__, name, module.__dict__[name]) for name in _SETTINGS
                             if name in module.__dict__ and module is not stage]
            self.entries += _tensors(module)
        tensors = [x for module in stage.modules() for _, _, x in _tensors(module) if x is not None]
        # kept alive, so that no other tensor gets the same address; their size becomes 0 if their memory is freed
        self.storages: list[tuple[Any, int]] = [(x.untyped_storage(), x.untyped_storage().nbytes()) for x in tensors]
        self.inference: bool = any(x.is_inference() for x in tensors)  # these do not count what is written into them
        self.tensors: list[Tensor] = tensors
        self.states: list[tuple[int, int]] = self._states()
        self.samples = ops.Samples([
            _sample(x.detach()) for x in tensors
            if ops.is_plain_tensor(x) and x.device.type == 'cpu' and x.is_floating_point()])

    def _states(self) -> list[tuple[int, int]]:
        return [] if self.inference else [(x.data_ptr(), x._version) for x in self.tensors]

    def unchanged(self, stage: nn.Module) -> bool:
        if self.entries[0][0] is not stage._modules:  # a replica of DataParallel starts with the original's attributes
            return False
        if self.steps != _steps:
            return False
        for module, kind, children in self.modules:
            if module.training or module._forward_hooks or module._forward_pre_hooks or 'forward' in module.__dict__ \
                    or type(module) is not kind or len(module._modules) != children:
                return False
        for holder, name, item in self.entries:
            if holder.get(name) is not item:
                return False
        if self.inference or self._states() != self.states:
            return False
        if any(storage.nbytes() != size for storage, size in self.storages):
            return False
        return self.samples.unchanged()


CACHED_BYTES = 8 << 20
"""Of a stage's map: as many images of a batch go through the stage together as have this much, so that the map stays in
the caches from block to block."""
SIZES_PREPARED = 4
"""Sizes of maps whose calls a stage keeps."""


def _size(x: Tensor, halve: bool) -> tuple[int, int, int]:
    """Images, height and width of x (N, H, W, C), pooled if `halve`."""
    batch, height, width, _ = x.shape
    return (batch, height // 2, width // 2) if halve else (batch, height, width)


class _FoldedStage:
    """The pooling, folded convolution, blocks and last norm of a stage, and a watch on what they were folded from."""

    def __init__(self, stage: Any):
        self.watch: _Watch = _Watch(stage)  # first, so that writes during the folding are detected
        self.blocks: list[FoldedBlock] = []
        self.pool: Any = stage.pool
        with torch.no_grad():
            conv = stage.conv
            self.conv = ops.Linear(conv.weight.flatten(1), conv.bias, stage.folds_to_int8)
            offset = widened(conv.weight.new_zeros(conv.out_channels))
            for block in stage.blocks:
                folded, offset = block.fold(offset, stage.folds_to_int8)
                self.blocks.append(folded)
            self.last = ops.ScaleShiftReLU(*scale_and_shift(stage.norm, conv.weight[:, 0, 0, 0], offset))
        self.memory: ops.Memory = stage.memory
        self.in_loops: bool = bool(self.blocks) and all(block.runs_in_loops() for block in self.blocks)
        self.programs: dict[Any, list[native.Program]] = {}  # by the map's size and strides; those that nobody runs now

    def __call__(self, x: Tensor) -> Tensor:
        """Runs the stage on x (N, C, H, W)."""
        halve = self.in_loops and POOL.fits(self.pool) and x.dtype == torch.float32 and min(x.shape[2:]) > 1 \
            and self.conv.runs_packed(x)
        x = (x if halve else self.pool(x)).permute(0, 2, 3, 1)
        batch, height, width = size = _size(x, halve)
        together = max(1, CACHED_BYTES // (4 * height * width * self.conv.columns))
        if batch <= together or not self.conv.runs_packed(x):
            return self._run(x, None, halve).permute(0, 3, 1, 2)
        output = self.memory.empty((*size, self.conv.columns), x)
        for begin in range(0, batch, together):
            self._run(x[begin:begin + together], output[begin:begin + together], halve)
        return output.permute(0, 3, 1, 2)

    def _run(self, x: Tensor, output: Tensor | None, halve: bool) -> Tensor:
        if self.in_loops and self.conv.runs_packed(x):
            return self._run_in_loops(x, output, halve)
        x = self.conv(x, output=output)
        for block, after in self._with_last():
            x = block(x, after)
        if self.blocks:
            return x
        return self.last(x) if output is None else output.copy_(self.last(x))

    def _with_last(self) -> list[tuple[FoldedBlock, ops.ScaleShiftReLU | None]]:
        return [(block, self.last if block is self.blocks[-1] else None) for block in self.blocks]

    def _run_in_loops(self, x: Tensor, output: Tensor | None, halve: bool) -> Tensor:
        """In float32: of a model in half precision, the maps between stages are that. `halve`: pools x first."""
        self.conv.check(x, None if halve else output)
        if output is None:
            output = self.memory.empty((*_size(x, halve), self.conv.columns), x)
        if x.dtype != torch.float32:
            return output.copy_(self._run_in_loops(x.float(), None, halve))
        x = ops.as_rows(x)
        room = max(block.room() for block in self.blocks)
        # the loops read whole vectors beyond a map's end
        work = self.memory.empty((output[..., 0].numel() * room + native.width(),), x)
        maps, key = (x, output, work), (x.shape, x.stride(), halve)
        free = self.programs.setdefault(key, [])
        try:
            program = free.pop()  # nobody else has it now
        except IndexError:
            calls = [self.conv.prepare(x, None, output, halve=halve)]
            for block, after in self._with_last():
                calls += block.prepare(output, work, after)
            program = native.Program(calls, maps)
            for old in list(self.programs)[:-SIZES_PREPARED]:
                self.programs.pop(old, None)
        program.run(maps)
        free.append(program)
        return output


class FoldableStage(nn.Module):
    """A pooling `pool`, a convolution `conv`, `blocks`, `norm` and `act`, which run folded for inference if possible.

    Blocks fold themselves: `block.obstacle(prefix)` says why a block cannot be folded; `block.fold(offset, int8)`
    returns the `FoldedBlock` for x + offset, and the offset of its output.
    """
    folds_to_int8: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._folding = False
        self._folded: list[_FoldedStage | None] = [None]
        self.memory = ops.Memory()

    @torch.jit.ignore
    def set_folding(self, enable: bool = True, int8: bool = False, memory: ops.Memory | None = None) -> None:
        """Turns folding for inference on or off (`fuse_for_inference`); the next call folds again.

        The stages of a model are given one `memory`, for their maps.
        """
        self._folding, self.folds_to_int8 = enable, int8
        self._folded = [None]
        self.memory = memory or ops.Memory()

    @torch.jit.ignore
    def obstacle(self) -> str | None:
        """Says why the stage cannot be folded now; None if it can."""
        found = obstacle(self, {'conv': POINTWISE, 'norm': BATCH_NORM, 'act': RELU, 'blocks': SEQUENTIAL})
        if found is not None:
            return found
        blocks: Any = self.blocks
        for name, block in blocks.named_children():
            if not hasattr(type(block), 'obstacle'):  # asks the class: FullyShardedDataParallel forwards attributes
                return f'blocks.{name} is a {type(block).__name__} and not a block of SAN without hooks'
            found = block.obstacle(f'blocks.{name}')
            if found is not None:
                return found
        for name, module in self.named_modules():
            if name and (module._forward_hooks or module._forward_pre_hooks):
                return f'{name} has a hook'
            if getattr(module, 'running_mean', module) is None:
                return f'{name} has no running statistics'
        return None

    @torch.jit.ignore
    def inference_form(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Returns the stage, folded, if it may run on x; else None."""
        if isinstance(x, torch.fx.Proxy) or ops.is_compiling(x):
            return None
        if self.training or torch.is_grad_enabled():
            self._folded = [None]  # it may be trained now, and not every write on a GPU is detected
            self.memory.clear()
        if self.training or x.is_meta or torch.is_autocast_enabled(x.device.type) or ops.symbolic_caller(x) is not None:
            return None  # autocast does not know the meta device
        if has_process_wide_hooks():
            return None
        if not ops.is_plain_tensor(x):
            return None  # tensor subclasses and modes need to see the layers
        if torch.is_grad_enabled():
            warnings.warn('a model fused for inference was called where gradients are enabled, and runs unfused; call '
                          'it under torch.inference_mode() or torch.no_grad()', stacklevel=2)
            return None
        kept = self._folded  # replaced by a new list when folds become invalid, so that a fold in progress is dropped
        kept[0] = folded = self._fold_anew(kept[0])
        return folded

    def _fold_anew(self, present: _FoldedStage | None) -> _FoldedStage | None:
        """Returns `present` if nothing has changed, else a new fold; None if the stage cannot be folded."""
        if present is not None and present.watch.unchanged(self):
            return present
        found = self.obstacle()
        if found is None and not any(module.training for module in self.modules()):
            return _FoldedStage(self)
        _logger.debug('a stage runs module by module: %s', found or 'a layer of it is in training mode')
        return None

    def _apply(self, fn, recurse=True):
        self._folded = [None]  # moved or converted
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_folded': [None]}


def fuse_for_inference(model: nn.Module, int8: bool = False) -> nn.Module:
    """Lets every SAN stage inside `model` run folded when it is in eval mode and gradients are off.

    Norms, biases and the separate projections are folded into fewer passes. Parameters, buffers and the state dict do
    not change, and outputs are equal up to rounding. Training, enabled gradients (so call the model under
    `torch.no_grad()` or `torch.inference_mode()`), autocast, tracing, scripting and torch.compile run the modules as
    before, and so does a stage with forward hooks inside. The first call folds, and so does each call after parameters
    or buffers were loaded, moved, converted, trained or replaced. Some writes are not detected: see `refold`. torch
    does not count writes into parameters or buffers made under `torch.inference_mode()`, so every call folds again,
    which costs time: make or load the model outside it.

    Args:
        model: A SAN, a SANBackbone, or a module that holds one: a feature extractor, a detector.
        int8: Compute the 1x1 convolutions, and gamma's where the relation is wide, in 8 bits on processors with AVX-512
            VNNI; elsewhere, and on other devices, a warning says that it has no effect. Each pixel of a map, and each
            relation, is rounded with a scale of its own when it is read, so that no calibration is needed and no
            picture changes what another gives; weights are rounded with a scale for each output channel. Softmax,
            weighted sum, the maps between layers and narrow convolutions stay in float32.

    Returns:
        `model` itself.

    Raises:
        ValueError: There is no SAN stage in `model`, or a stage has layers that do not fold; the message names them.
    """
    stages: dict[str, Any] = {}
    if isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        stages = {name: module for name, module in model.named_modules() if hasattr(module, 'set_folding')}
    if not stages:
        raise ValueError(f'there is no SAN in this {type(model).__name__} to fuse: expected a model of san_backbones, '
                         'or one that holds its stages')
    for name, stage in stages.items():
        found = stage.obstacle()
        if found is not None and any(getattr(x, '_fsdp_flattened', False) for x in stage.parameters()):
            found = 'FullyShardedDataParallel holds its parameters; fuse the model before it is wrapped, and wrap ' \
                    'stages or the whole model (blocks that are wrapped run unfused)'
        if found is not None:
            raise ValueError(f'fuse_for_inference cannot fold {name or "this stage"}: {found}')
    missing = missing_for_int8(model) if int8 else None
    if missing is not None:
        warnings.warn(f'int8=True has no effect, and the model runs as without: {missing}', RuntimeWarning,
                      stacklevel=2)
    memory = ops.Memory()
    for stage in stages.values():
        stage.set_folding(True, int8, memory)
    return model


def missing_for_int8(model: nn.Module) -> str | None:
    """Says why the SAN stages inside `model` do not compute in 8 bits when they are folded for it; None if they do."""
    dtypes = {f'{x.dtype} on {x.device.type}' for stage in model.modules() if hasattr(stage, 'set_folding')
              for x in stage.parameters()}
    if dtypes != {'torch.float32 on cpu'}:
        return f'8 bits are for a SAN in float32 on the CPU, and this is {" and ".join(sorted(dtypes)) or "none"}'
    if native.unavailable() is not None or native.has_int8():
        return native.unavailable()
    return f'8 bits need a processor with AVX-512 VNNI, and the compiled loops here are those for {native.build()}'


def refold(model: nn.Module) -> nn.Module:
    """Lets every fused stage inside `model` fold again in its next call; for writes that are not detected.

    Detected are writes that torch counts, steps of torch's optimizers, and loaded or replaced tensors; training drops
    all folds. Other writes go through `tensor.data`, NumPy, DLPack, collectives such as `torch.distributed.broadcast`,
    fused optimizers called as functions, or other processes (shared memory). On the CPU these are detected if they
    change an element of a vector (biases, norms) or of the diagonal of a matrix. Call `refold` after such a write that
    changes only elements off the diagonal, and after any such write on a GPU, including replays of CUDA graphs.

    Returns:
        `model` itself.

    Raises:
        ValueError: There is no fused stage in `model`.
    """
    stages: list[Any] = [module for module in model.modules() if getattr(module, '_folding', False)]
    if not stages:
        raise ValueError(f'there is no fused SAN in this {type(model).__name__}: expected a model that '
                         'fuse_for_inference was called for')
    for stage in stages:
        stage.set_folding(True, stage.folds_to_int8, stage.memory)
    return model
