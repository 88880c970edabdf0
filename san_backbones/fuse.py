"""Folding for inference: what surrounds the attention of a stage, in as few passes over memory as it needs.

In eval mode a block is `x + W relu(b2 + a2 attn(relu(a1 x + b1)))` plus biases, its norms being scales a and shifts b.
Folded, that is four passes: relu(a1 x + b1); one product for query, key and value (a2 goes into the value's weights,
since the attention is linear in it); the attention, ending in relu(y + b2); and a product added to x where it stands.
The bias of W is kept out of x: every norm of the stage that reads x has it in its shift.
"""
import functools
import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import ops
from .activations import PLAIN_RELUS, BoundedReLU
from .attention import _FootprintAttention
from .norms import as_norm, is_batch_norm, is_plain, is_pointwise
from .ops.gamma import widened

__all__ = ['FoldedStage', 'folded', 'fuse_for_inference', 'refold']

_logger = logging.getLogger('san_backbones')


class FoldedBlock(NamedTuple):
    """A block in inference form."""
    scale: Tensor  # (C,), of norm1
    shift: Tensor
    limit: float | None  # of the ReLU behind it
    weight: Tensor  # (2 r + m, C): query, key and value
    bias: Tensor
    attention: Any  # a PairwiseAttention or PatchwiseAttention
    gamma: ops.Gamma
    out_shift: Tensor  # (m,), of norm2
    out_weight: Tensor  # (m, C)
    places: dict[tuple[int, int], Tensor | None]  # the mapped coordinates of the last size

    def _place(self, value: Tensor) -> Tensor | None:
        size = (value.shape[2], value.shape[3])
        place = self.places.get(size)  # once: another thread, with maps of another size, may clear them any time
        if place is None:
            place = self.attention.place(value)
            self.places.clear()
            self.places[size] = place
        return place

    def __call__(self, x: Tensor) -> None:
        """Adds the block's branch to x (N, H, W, C), contiguous, in place."""
        attention, flat = self.attention, x.view(-1, x.shape[-1])
        rectified = ops.scale_shift_relu(flat, self.scale, self.shift, self.limit)
        projected = F.linear(rectified, self.weight, self.bias)
        widths = (attention.rel_planes, attention.rel_planes, attention.out_planes)
        query, key, value = projected.view(*x.shape[:3], sum(widths)).permute(0, 3, 1, 2).split(widths, 1)
        y = ops.footprint_attention(
            query, key, value, self._place(value), self.gamma, attention.spec(), self.out_shift)
        flat.addmm_(y.permute(0, 2, 3, 1).reshape(-1, attention.out_planes), self.out_weight)


def _affine(norm: nn.Module, like: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of the norm of x + offset, in float32 or wider."""
    described = as_norm(norm, like)
    scale, shift = ops.fold(described, described.running_mean, described.running_var)
    return scale.contiguous(), (shift + scale * offset).contiguous()


def _pointwise(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) of a 1x1 convolution, in float32 or wider."""
    weight = widened(conv.weight.flatten(1))
    return weight, weight.new_zeros(len(weight)) if conv.bias is None else widened(conv.bias)


def _fold_block(block: Any, offset: Tensor) -> tuple[FoldedBlock, Tensor]:
    """The block's inference form, and the offset of x behind it."""
    attention, dtype = block.attn, block.conv.weight.dtype
    scale, shift = _affine(block.norm1, attention.query.weight[0, :, 0, 0], offset)
    projections = [_pointwise(conv) for conv in (attention.query, attention.key, attention.value)]
    out_weight, out_bias = _pointwise(block.conv)
    out_scale, out_shift = _affine(block.norm2, block.conv.weight[0, :, 0, 0], torch.zeros_like(out_weight[0]))
    value_weight, value_bias = projections[2]
    projections[2] = value_weight * out_scale[:, None], value_bias * out_scale
    weight, bias = (torch.cat(parts).to(dtype) for parts in zip(*projections))
    gamma = attention.gamma()._replace(cache={})
    # copies, also where nothing is folded: what is written into a parameter unseen must not meet the rest half way
    out_weight = out_weight.t().to(dtype, copy=True)
    limit = getattr(block.act1, 'limit', None)  # torch's own ReLU has none
    folded = FoldedBlock(scale, shift, limit, weight, bias, attention, gamma, out_shift, out_weight, {})
    return folded, offset + out_bias


def _obstacle(stage: Any) -> str | None:
    """Why the stage has no inference form as it stands, or None."""
    layers = [('conv', stage.conv, 'conv'), ('norm', stage.norm, 'norm'), ('act', stage.act, 'relu')]
    if not is_plain(stage.blocks, (nn.Sequential.forward,)):
        return f'blocks is a {type(stage.blocks).__name__} and not a Sequential without hooks'
    for name, block in stage.blocks.named_children():
        if not is_plain(block, (stage.block_type.forward,)):
            return f'blocks.{name} is a {type(block).__name__} and not a block of SAN without hooks'
        if not is_plain(block.drop_path, (nn.Identity.forward, DropPath.forward)):
            return f'blocks.{name}.drop_path is a {type(block.drop_path).__name__} and not a DropPath without hooks'
        if not is_plain(block.attn, (_FootprintAttention.forward,)):
            return f'blocks.{name}.attn is a {type(block.attn).__name__} and not a SAN attention without hooks'
        layers += [(f'blocks.{name}.{layer}', block.get_submodule(layer), kind) for layer, kind in (
            ('norm1', 'norm'), ('act1', 'bounded'), ('attn.query', 'conv'), ('attn.key', 'conv'),
            ('attn.value', 'conv'), ('norm2', 'norm'), ('act2', 'relu'), ('conv', 'conv'))]
    fits = {'conv': is_pointwise, 'norm': is_batch_norm,
            'relu': lambda layer: is_plain(layer, PLAIN_RELUS),
            'bounded': lambda layer: is_plain(layer, (*PLAIN_RELUS, BoundedReLU.forward))}
    wanted = {'conv': '1x1 convolution', 'norm': 'batch norm', 'relu': 'ReLU', 'bounded': 'ReLU'}
    for name, layer, kind in layers:
        if not fits[kind](layer):
            return f'{name} is a {type(layer).__name__} and not a {wanted[kind]} without hooks'
    for name, block in stage.blocks.named_children():
        if not block.attn.gamma_is_plain():
            return f'blocks.{name}.attn has other layers than it was made with, or a hook'
    for name, module in stage.named_modules():
        if name and (module._forward_hooks or module._forward_pre_hooks):
            return f'{name} has a hook'
        if getattr(module, 'running_mean', module) is None:
            return f'{name} has no running statistics'
    return None


# attributes that say what a norm, a convolution or an attention computes
_SETTINGS = ('eps', 'stride', 'padding', 'groups', 'kernel_size', 'dilation', 'relation', 'position_mode',
             'position_step', 'limit')


_steps = 0  # begun and ended, of all optimizers: torch's fused ones do not count what they write


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_count_step)  # a step that fails has written, too
    register_optimizer_step_post_hook(_count_step)


def _tensors(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor | None]]:
    """What holds tensors, by which name, and the tensors: also plain attributes, which FullyShardedDataParallel makes
    of parameters.
    """
    attributes = {name: x for name, x in module.__dict__.items() if isinstance(x, Tensor)}
    return [(holder, name, x) for holder, found in (
        (module._parameters, module._parameters), (module._buffers, module._buffers), (module.__dict__, attributes))
        for name, x in found.items()]


def _sample(x: Tensor) -> Tensor:
    """A view of some elements: all of a vector, the diagonal of the matrix of a 1x1 convolution."""
    while x.dim() > 2:
        x = x[..., 0]
    return x.diagonal() if x.dim() == 2 else x.view(-1)


class _Watch:
    """Tells whether anything changed that a stage was folded from: modules, their settings, tensors, their versions.

    And on the CPU some elements, for what is written past torch: through `tensor.data`, NumPy, shared memory, by
    collectives. On a GPU to look at them would mean to wait for it.
    """

    def __init__(self, stage: nn.Module):
        _watch_optimizers()
        self.steps: int = _steps
        # not the stage itself, which would then hold itself
        self.modules: list[tuple[nn.Module, type, int]] = [
            (module, type(module), len(module._modules)) for module in stage.modules() if module is not stage]
        self.entries: list[tuple[dict[str, Any], str, Any, Any]] = []
        for module in stage.modules():
            self.entries += [(module._modules, name, child, None) for name, child in module._modules.items()]
            self.entries += [(module.__dict__, name, module.__dict__[name], None) for name in _SETTINGS
                             if name in module.__dict__]
            self.entries += [(holder, name, x, None if x is None else self._state(x))
                             for holder, name, x in _tensors(module)]
        tensors = [x for module in stage.modules() for _, _, x in _tensors(module) if x is not None]
        # kept, so that no other tensor comes to lie at the same address; of no size, where their memory was given back
        self.storages: list[tuple[Any, int]] = [(x.untyped_storage(), x.untyped_storage().nbytes()) for x in tensors]
        self.samples: list[Tensor] = [
            _sample(x.detach()) for x in tensors
            if ops.is_plain_tensor(x) and x.device.type == 'cpu' and x.is_floating_point()]
        self.sampled: Tensor | None = torch.cat(self.samples) if self.samples else None

    @staticmethod
    def _state(x: Any) -> Any:
        # a tensor made under torch.inference_mode() does not count what is written into it: never the same state twice
        return object() if x.is_inference() else (x.data_ptr(), x._version)

    def unchanged(self, stage: nn.Module) -> bool:
        if self.entries[0][0] is not stage._modules:  # a replica of DataParallel begins with the original's attributes
            return False
        if self.steps != _steps:
            return False
        for module, kind, children in self.modules:
            if module.training or module._forward_hooks or module._forward_pre_hooks or 'forward' in module.__dict__ \
                    or type(module) is not kind or len(module._modules) != children:
                return False
        for holder, name, item, state in self.entries:
            if holder.get(name) is not item or (state is not None and self._state(item) != state):
                return False
        if any(storage.nbytes() != size for storage, size in self.storages):
            return False
        return self.sampled is None or torch.equal(torch.cat(self.samples), self.sampled)


class FoldedStage:
    """The blocks and the last norm of a stage in inference form, and a watch on what they were made from."""

    def __init__(self, stage: Any):
        self.watch: _Watch = _Watch(stage)  # first: what is written while folding shows afterwards
        self.blocks: list[FoldedBlock] = []
        with torch.no_grad():
            offset = widened(stage.conv.weight.new_zeros(stage.conv.out_channels))
            for block in stage.blocks:
                folded, offset = _fold_block(block, offset)
                self.blocks.append(folded)
            self.scale, self.shift = _affine(stage.norm, stage.conv.weight[:, 0, 0, 0], offset)

    def __call__(self, x: Tensor) -> Tensor:
        """The stage behind its convolution, whose output x (N, C, H, W) is overwritten."""
        x = x.permute(0, 2, 3, 1).contiguous()
        for block in self.blocks:
            block(x)
        return ops.scale_shift_relu(x, self.scale, self.shift).permute(0, 3, 1, 2)


def folded(stage: nn.Module, present: FoldedStage | None) -> FoldedStage | None:
    """The inference form of the stage as it is now: `present` if that still holds; None if there is none."""
    if present is not None and present.watch.unchanged(stage):
        return present
    obstacle = _obstacle(stage)
    if obstacle is None and not any(module.training for module in stage.modules()):
        return FoldedStage(stage)
    _logger.debug('a stage runs module by module: %s', obstacle or 'a layer of it is in training mode')
    return None


def fuse_for_inference(model: nn.Module) -> nn.Module:
    """Lets every SAN stage inside `model` run folded wherever it is in eval mode and no gradients are asked for.

    Norms, biases and the separate projections are folded into fewer passes; parameters, buffers and the state dict stay
    what they are, and outputs are equal up to rounding. Training, gradients (call the model under `torch.no_grad()` or
    `torch.inference_mode()`), autocast, tracing, scripting and torch.compile run the modules as before, and so does a
    stage with forward hooks inside. Folding happens in the first call and anew when parameters or buffers have been
    loaded, moved, converted, trained or replaced. `refold` says what may go unseen, and is for that. Where parameters
    or buffers were themselves made under `torch.inference_mode()`, torch does not count writes into them, and every
    call folds anew, which costs time; make or load the model outside it.

    Args:
        model: A SAN, a SANBackbone, or anything that holds one: a feature extractor, a detector.

    Returns:
        `model` itself.

    Raises:
        ValueError: There is no SAN stage in `model`, or one that has layers that do not fold; the message names them.
    """
    stages: dict[str, Any] = {name: module for name, module in model.named_modules() if hasattr(module, 'set_folding')}
    if not stages:
        raise ValueError(f'there is no SAN in this {type(model).__name__} to fuse: expected a model of san_backbones, '
                         'or one that holds its stages')
    for name, stage in stages.items():
        obstacle = _obstacle(stage)
        if obstacle is not None and any(getattr(x, '_fsdp_flattened', False) for x in stage.parameters()):
            obstacle = 'FullyShardedDataParallel holds its parameters; fuse the model before it is wrapped, and wrap ' \
                       'stages or the whole model (blocks that are wrapped run unfused)'
        if obstacle is not None:
            raise ValueError(f'fuse_for_inference cannot fold {name or "this stage"}: {obstacle}')
    for stage in stages.values():
        stage.set_folding(True)
    return model


def refold(model: nn.Module) -> nn.Module:
    """Lets every stage inside `model` that `fuse_for_inference` was called for fold anew in its next call.

    For writes into parameters or buffers that nothing tells of. Writes that torch counts, steps of optimizers of torch
    and tensors that are loaded or replaced are noticed, and training forgets all folds. Writes past torch are noticed
    on the CPU if they change any number of a vector (biases, norms) or of the diagonal of a matrix: by
    `tensor.data`, NumPy, DLPack, collectives such as `torch.distributed.broadcast`, fused optimizers that are called as
    functions, and other processes (shared memory). Call this after such a write of a few numbers beside the diagonal,
    and after any of them on a GPU, replays of CUDA graphs included.

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
        stage.set_folding(True)
    return model
