"""Attention as tensors: the footprint weights of a block, and attention rolled out over all stages.

The model may be a SAN, a feature extractor made of one, a SANBackbone, or any module that holds one of these, such as a
detector: only the SAN in it runs. Weights are recomputed by the definition in `ops.reference` from the input of the
attention layer; every backend uses the same weights.

Pixels are (row, column) on the feature map of a block. `visualize` draws the results over pictures.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention import FootprintAttention
from .ops import geometry, reference
from .san import SpareBuffers

__all__ = ['Attended', 'AttentionBlock', 'Network', 'attention_blocks', 'attention_rollout', 'attention_weights',
           'effective_size', 'evaluating', 'find_block', 'find_network', 'footprint_weights', 'neighbours', 'roll_back',
           'run_hooked', 'trace']

BlockId = str | int | tuple[int, int]
Hook = tuple[nn.Module, bool, Callable[[Tensor], None]]

PIXELS_AT_ONCE = 4096  # bounds the relations in memory


# --- The SAN inside a model ------------------------------------------------------------------------------------------

class AttentionBlock(NamedTuple):
    """A residual block (norm1, attn, ..., conv) and the stride of its feature map."""
    name: str
    module: Any  # a san.Block, or its traced form
    stage: int
    stride: int

    @property
    def attn(self) -> FootprintAttention:
        return self.module.attn


class Network(NamedTuple):
    """The SAN inside a model: the module that runs it on images, its stages, their strides, and its blocks in order."""
    trunk: nn.Module
    stem: nn.Module
    stages: list[nn.Module]
    strides: list[int]
    blocks: dict[str, AttentionBlock]


def _stride(part: Any) -> int:
    """The stride of a stem or stage, read from its layers: FX keeps no other attributes."""
    pool = part._modules.get('pool')
    return part.conv.stride[0] * (pool.stride if isinstance(pool, nn.MaxPool2d) else 1)


def find_network(model: nn.Module) -> Network:
    """Finds the one SAN in `model` by the names of its parts, which all wrappers and timm's extractors keep."""
    pattern = re.compile(r'((?:.*\.)?)stages([._])(\d+)\.blocks\.(\d+)\.attn')
    layers = (path for path, module in model.named_modules() if isinstance(module, FootprintAttention))
    found = [match for match in map(pattern.fullmatch, layers) if match]
    prefixes = sorted({match[1] for match in found})
    if not prefixes:
        raise ValueError(f'there is no SAN in this {type(model).__name__}: expected a model of san_backbones, or one '
                         'that holds its stem and stages')
    if len(prefixes) > 1:
        raise ValueError(f'there are several SANs in this {type(model).__name__} ({", ".join(map(repr, prefixes))}): '
                         'give one of them, model.get_submodule(NAME)')
    prefix, separator = prefixes[0], found[0][2]
    trunk = model.get_submodule(prefix.rstrip('.'))
    depths: dict[int, int] = {}
    for match in found:
        depths[int(match[3])] = max(depths.get(int(match[3]), 0), int(match[4]) + 1)
    stem = trunk.get_submodule('stem')
    stages, strides, blocks = [], [_stride(stem)], {}
    for stage in range(max(depths) + 1):
        stages.append(trunk.get_submodule(f'stages{separator}{stage}'))
        strides.append(strides[-1] * _stride(stages[-1]))
        for index in range(depths.get(stage, 0)):
            name = f'stages.{stage}.blocks.{index}'
            blocks[name] = AttentionBlock(name, stages[-1].get_submodule(f'blocks.{index}'), stage, strides[-1])
    return Network(trunk, stem, stages, strides[1:], blocks)


def attention_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the attention layers of the SAN in `model` by the names of their blocks, in the order in which they run.

    Args:
        model: A SAN, or a module that holds one.

    Returns:
        `{'stages.0.blocks.0': PairwiseAttention(...), ...}`. The names are those of `SAN.named_modules`, even if the
        parts have other names inside `model` (`backbone.stages.0`, `stages_0`).

    Raises:
        ValueError: There is no SAN in `model`, or several.
    """
    return {name: block.attn for name, block in find_network(model).blocks.items()}


def find_block(net: Network, block: BlockId | None) -> AttentionBlock:
    names = list(net.blocks)
    if isinstance(block, str) and re.fullmatch(r'-?\d+', block):
        block = int(block)
    if block is None:
        return net.blocks[names[-1]]
    if isinstance(block, int) and -len(names) <= block < len(names):
        return net.blocks[names[block]]
    text = '.'.join(map(str, block)) if isinstance(block, tuple) else str(block)
    match = re.fullmatch(r'(?:(?:.*\.)?stages[._])?(\d+)\.(?:blocks\.)?(\d+)(?:\.attn)?', text)
    name = f'stages.{match[1]}.blocks.{match[2]}' if match else ''
    if name not in net.blocks:
        raise ValueError(f'there is no block {block!r}; the {len(names)} blocks are {", ".join(names)} (or their '
                         f"number, 0 to {len(names) - 1}, or 'STAGE.BLOCK')")
    return net.blocks[name]


def fine_block(net: Network) -> AttentionBlock:
    """What a figure of weights shows unless told otherwise: the last block up to stride 4, else the last of all."""
    blocks = list(net.blocks.values())
    return ([block for block in blocks if block.stride <= 4] or blocks)[-1]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into eval mode, and restores the modes of its modules afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def run_hooked(net: Network, images: Tensor, hooks: Sequence[Hook]) -> None:
    """Runs the SAN on images with hooks (module, whether to see its input or its output, function to call)."""
    def before(see: Callable[[Tensor], None]) -> Callable[..., None]:
        return lambda module, args: see(args[0])

    def after(see: Callable[[Tensor], None]) -> Callable[..., None]:
        return lambda module, args, output: see(output)

    handles = [module.register_forward_pre_hook(before(see)) if is_input else module.register_forward_hook(after(see))
               for module, is_input, see in hooks]
    try:
        with torch.no_grad(), SpareBuffers(net.trunk):
            net.trunk(images)
    finally:
        for handle in handles:
            handle.remove()


# --- Weights ---------------------------------------------------------------------------------------------------------

def _check_pixels(pixels: Sequence[tuple[int, int]] | None, maps: Tensor) -> Tensor:
    """Converts pixels (row, column) of maps (..., H, W) to an int64 tensor (P, 2); None is all of them, row by row."""
    height, width = maps.shape[-2:]
    if pixels is None:
        return torch.cartesian_prod(*(torch.arange(size, device=maps.device) for size in (height, width)))
    wrong = [pixel for pixel in pixels if len(pixel) != 2 or any(
        not 0 <= index < size or index % 1 for index, size in zip(pixel, (height, width), strict=True))]
    if wrong or not len(pixels):
        raise ValueError(f'expected pixels (row, column) of a map of {height} rows and {width} columns, counted from '
                         f'0, got {tuple(wrong[0]) if wrong else "none"}')
    return torch.tensor([[int(row), int(column)] for row, column in pixels], device=maps.device)


def _is_local(layer: FootprintAttention) -> bool:
    """Whether the weights of a pixel depend on its footprint only: gamma's norms use fixed statistics."""
    norms = (layer.weight_mlp.get_submodule(name) for name in ('norm1', 'norm2'))
    return layer.gamma_is_plain() and all(
        not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not norm.training and norm.running_mean is not None
        for norm in norms)


def neighbours(maps: Tensor, pixels: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Gathers the footprints of the pixels: (N, C, H, W) to (N, P, C, k, k), mirrored at the border."""
    pad = geometry.padding(kernel_size, dilation)
    steps = dilation * torch.arange(kernel_size, device=maps.device)
    rows = geometry.reflection_index(maps.shape[2], pad, maps.device)[pixels[:, :1] + steps]
    columns = geometry.reflection_index(maps.shape[3], pad, maps.device)[pixels[:, 1:] + steps]
    return maps[:, :, rows[:, :, None], columns[:, None, :]].transpose(1, 2)


def _weights_at(layer: FootprintAttention, x: Tensor, pixels: Tensor) -> Iterator[Tensor]:
    """Yields the weights at pixels (P, 2) in chunks, (N, p, G, k, k) each.

    Each pixel is passed to `ops.reference` as a map of 1 x 1 whose padding is the rest of its footprint, so that any
    set of pixels can be computed.
    """
    k, area, images = layer.kernel_size, layer.kernel_size ** 2, len(x)
    query, key, place = layer.query(x), layer.key(x), layer.place(x)
    local = _is_local(layer)
    for part in pixels.split(PIXELS_AT_ONCE) if local else [_check_pixels(None, x)]:
        def around(maps: Tensor, part=part) -> Tensor:
            return neighbours(maps, part, k, layer.dilation).flatten(0, 1)

        def at(maps: Tensor, part=part) -> Tensor:
            return maps[:, :, part[:, 0], part[:, 1]].transpose(1, 2).flatten(0, 1)[:, :, None, None]

        places = None if place is None else place.expand(images, -1, -1, -1)
        relation = reference.relate(
            around(query) if layer.relation == 'clique' else at(query), around(key),
            None if places is None else at(places), None if places is None else around(places),
            layer.is_pairwise, layer.relation, layer.position_mode, k, 1)
        relation = relation.flatten(2).unflatten(0, (images, len(part))).permute(0, 2, 3, 1).contiguous()
        with nullcontext() if local else SpareBuffers(layer):
            logits = layer.weight_mlp(relation)  # (N, G, k * k, P), or (N, G * k * k, 1, P)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        weights = logits.softmax(2) if layer.is_pairwise else logits.squeeze(2).unflatten(1, (-1, area))
        weights = weights.permute(0, 3, 1, 2).unflatten(3, (k, k))
        yield weights if local else weights[:, pixels[:, 0] * x.shape[3] + pixels[:, 1]]


@torch.no_grad()
def footprint_weights(layer: nn.Module, x: Tensor, pixels: Sequence[tuple[int, int]] | None = None) -> Tensor:
    """Computes the weights that one attention layer gives to the footprints of pixels.

        pairwise   w_ij = softmax_j( gamma([delta(x_i, x_j), p_i - p_j]) )    positive, sum to 1 over j
        patchwise  w_ij = gamma( delta(x_R(i)) )_j                            of either sign and any sum

    The layer's output is y_i[c] = sum_j w_ij[c mod G] * beta(x_j)[c] (CVPR 2020, equations 2 and 4).

    Args:
        layer: A `PairwiseAttention` or `PatchwiseAttention`.
        x: Its input, (N, dim, H, W).
        pixels: (row, column) of the pixels i; None is all of them, row by row.

    Returns:
        (N, P, G, k, k), float32 (float64 for float64 layers): G = out_planes / share_planes weight channels; element
        [n, p, g, a, b] weighs the neighbour `dilation * (a - k // 2)` rows below and `dilation * (b - k // 2)` columns
        right of the pixel, mirrored at the border. All pixels take N H W G k^2 * 4 bytes. With batch statistics
        (training) the norms need the whole maps, so the relations of all pixels are held in memory.

    Raises:
        ValueError: layer is not an attention layer, x does not fit it, or a pixel is not on the map.
    """
    if not isinstance(layer, FootprintAttention):
        raise ValueError(f'expected a PairwiseAttention or PatchwiseAttention, got {type(layer).__name__}; for a model '
                         'use attention_weights')
    layer._check(x)
    return torch.cat(list(_weights_at(layer, x, _check_pixels(pixels, x))), 1)


def attention_weights(
        model: nn.Module,
        images: Tensor,
        block: BlockId,
        pixels: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Computes the footprint weights of a block of the SAN in `model`, for images.

    Runs the SAN in its current mode and without gradients; running statistics do not change. The rest of the model does
    not run.

    Args:
        model: A SAN, or a module that holds one.
        images: (N, in_chans, H, W), normalised for the model.
        block: A name of `attention_blocks`, such as 'stages.3.blocks.4'; or its index in that order, negative to count
            from the last; or (stage, block).
        pixels: (row, column) on the feature map of the block, whose size is the image's divided by the stride (2 to
            32), rounded down; None is all of them, row by row.

    Returns:
        (N, P, G, k, k), see `footprint_weights`.

    Raises:
        ValueError: There is no SAN in `model`, no such block, or a pixel is not on the map; the message lists the
            choices.
    """
    net = find_network(model)
    layer = find_block(net, block).attn
    weights: list[Tensor] = []
    run_hooked(net, images, [(layer, True, lambda x: weights.append(footprint_weights(layer, x, pixels)))])
    return weights[0]


def effective_size(weights: Tensor) -> Tensor:
    """Computes how many neighbours a footprint effectively uses: exp of the entropy of its absolute weights, 1 to k^2.

    Args:
        weights: (..., k, k), of any sign.

    Returns:
        (...), in the dtype of the weights; k^2 if all weights are equal, 1 if all but one are zero.
    """
    share = weights.abs().flatten(-2)
    share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
    return torch.special.entr(share).sum(-1).exp()


# --- Roll-out --------------------------------------------------------------------------------------------------------

class Attended(NamedTuple):
    """Roll-out through a block: the shares a pixel took from its footprint (N, k * k, H, W) and kept (N, 1, H, W)."""
    drawn: Tensor
    kept: Tensor
    kernel_size: int
    dilation: int

    def back(self, mass: Tensor) -> Tensor:
        k, (height, width) = self.kernel_size, mass.shape[2:]
        pad = geometry.padding(k, self.dilation)
        sent = mass * (1 - self.kept)
        padded = mass.new_zeros(*mass.shape[:2], height + 2 * pad, width + 2 * pad)
        for tap in range(k * k):
            top, left = tap // k * self.dilation, tap % k * self.dilation
            padded[:, :, top:top + height, left:left + width] += sent * self.drawn[:, None, tap]
        rows = geometry.reflection_index(height, pad, mass.device)
        columns = geometry.reflection_index(width, pad, mass.device)
        folded = mass.new_zeros(*mass.shape[:3], width + 2 * pad).index_add_(2, rows, padded)
        return (mass * self.kept).index_add_(3, columns, folded)


class _Pooled(NamedTuple):
    """Roll-out through a 2x2 max pool: the share of each input pixel (N, 4, H // 2, W // 2), and the input size."""
    share: Tensor
    size: tuple[int, int]

    def back(self, mass: Tensor) -> Tensor:
        (height, width), before = mass.shape[2:], mass.new_zeros(*mass.shape[:2], *self.size)
        for index in range(4):
            corner = before[:, :, index // 2:2 * height:2, index % 2:2 * width:2]
            corner.copy_(mass * self.share[:, None, index])
        return before


class _Patches(NamedTuple):
    """Roll-out through a patch convolution: all pixels of a patch get equal shares."""
    side: int
    size: tuple[int, int]

    def back(self, mass: Tensor) -> Tensor:
        inside = mass.new_zeros([side * self.side for side in mass.shape[2:]])
        inside[:self.size[0], :self.size[1]] = 1
        number = inside.unflatten(1, (-1, self.side)).unflatten(0, (-1, self.side)).sum((1, 3))
        spread = (mass / number).repeat_interleave(self.side, 2).repeat_interleave(self.side, 3)
        before = mass.new_zeros(*mass.shape[:2], *self.size)  # pixels beyond the last whole patch get nothing
        height, width = (min(a, b) for a, b in zip(self.size, spread.shape[2:]))
        before[:, :, :height, :width] = spread[:, :, :height, :width]
        return before


def _pooled(x: Tensor) -> _Pooled:
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    corners = torch.stack([x[:, :, row:height:2, column:width:2] for row in (0, 1) for column in (0, 1)], 1).float()
    largest = corners.amax(1, keepdim=True)
    won = (corners == largest).float()
    share = (won / won.sum(1, keepdim=True) * largest.abs()).sum(2)
    total = share.sum(1, keepdim=True)
    return _Pooled(torch.where(total > 0, share / total.clamp(min=1e-30), 0.25), (x.shape[2], x.shape[3]))


def _drawn(layer: FootprintAttention, x: Tensor, measure: str) -> Tensor:
    """Returns the shares of the neighbours in each pixel's attention output, (N, k * k, H, W), which sum to 1."""
    pixels, parts, first = _check_pixels(None, x), [], 0
    groups = layer.out_planes // layer.share_planes
    value = layer.value(x).float().abs().unflatten(1, (-1, groups)).sum(1) if measure == 'contributions' else None
    for weights in _weights_at(layer, x, pixels):
        weights = weights.abs()
        if value is not None:
            part = pixels[first:first + weights.shape[1]]
            weights = weights * neighbours(value, part, layer.kernel_size, layer.dilation)
        parts.append(weights.sum(2).flatten(2))
        first += weights.shape[1]
    drawn = torch.cat(parts, 1)
    total = drawn.sum(2, keepdim=True)
    drawn = torch.where(total > 0, drawn / total.clamp(min=1e-30), 1 / drawn.shape[2])
    return drawn.transpose(1, 2).unflatten(2, x.shape[2:]).float()


_Step = Attended | _Pooled | _Patches


def trace(net: Network, images: Tensor, last: AttentionBlock, residual: float | None, measure: str) -> list[_Step]:
    """Runs the SAN and records, in forward order, what the roll-out needs of each layer up to the block `last`."""
    if measure not in ('weights', 'contributions'):
        raise ValueError(f"measure must be 'weights' or 'contributions', got {measure!r}")
    if residual is not None and not 0 <= residual <= 1:
        raise ValueError(f'residual must be None (as measured) or a share from 0 to 1, got {residual!r}')
    steps: list[Any] = []
    length: list[Tensor] = []

    def enters_block(x: Tensor) -> None:
        length.append(x.float().norm(dim=1, keepdim=True))

    def leaves_branch(x: Tensor) -> None:
        kept, branch = length.pop(), x.float().norm(dim=1, keepdim=True)
        if residual is None:
            kept = torch.where(kept + branch > 0, kept / (kept + branch).clamp(min=1e-30), 1.)
        else:
            kept = torch.full_like(kept, residual)
        steps[-1] = steps[-1]._replace(kept=kept)

    def attends(layer: FootprintAttention) -> Callable[[Tensor], None]:
        return lambda x: steps.append(
            Attended(_drawn(layer, x, measure), x, layer.kernel_size, layer.dilation))

    hooks: list[Hook] = []
    stem: Any = net.stem
    patch = stem.conv.stride[0]
    if patch > 1:
        steps.append(_Patches(patch, (images.shape[2], images.shape[3])))
    for part in (net.stem, *net.stages[:last.stage + 1]):
        pool = part._modules.get('pool')
        if isinstance(pool, nn.MaxPool2d):
            hooks.append((pool, True, lambda x: steps.append(_pooled(x))))
    for block in net.blocks.values():
        hooks += [(block.module.norm1, True, enters_block), (block.attn, True, attends(block.attn)),
                  (block.module.conv, False, leaves_branch)]
        if block is last:
            break
    run_hooked(net, images, hooks)
    return steps


def attention_rollout(
        model: nn.Module,
        images: Tensor,
        pixels: Sequence[tuple[int, int]] | None = None,
        block: BlockId | None = None,
        *,
        residual: float | None = None,
        measure: str = 'weights',
        to: str = 'picture',
) -> Tensor:
    """Computes where the features of a pixel come from: attention rolled out over all blocks and stages before it.

    After Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (ACL 2020), who multiply the attention
    matrices of the layers, each averaged with the identity for the residual connection. Here a unit of mass starts at
    a pixel of the output of `block` and goes back to the picture; no H W x H W matrix is built:

        block     m'_j = s_j m_j + sum_i (1 - s_i) a_ij m_i
        max pool  m'_j = t_ij m_i, for each of the four pixels j of i
        patch     m'_j = m_i / 16, for each of the sixteen pixels j of i (`stem='patch'`)

    a_ij is `|w_ij|` summed over the weight channels and divided by its sum over the footprint; for pairwise weights
    this is their mean. Neighbours beyond the border are the pixels they mirror. s_i is the share of the residual
    connection. t_ij is the share of the channels whose maximum is at j, weighted by that maximum. Mass is conserved:
    every map sums to 1.

    It is a summary, not an attribution. It ignores the class, signs (patchwise weights cancel and subtract), single
    channels, and the effect of the 1x1 convolutions, norms and ReLUs.

    Args:
        model: A SAN, or a module that holds one. It runs as in `attention_weights`.
        images: (N, in_chans, H, W), normalised for the model.
        pixels: (row, column) on the feature map of the block. None gives one map for the mean of all pixels, which is
            what a classifier's average pool reads.
        block: Where to start, as for `attention_weights`; None is the last block.
        residual: Share s kept by the residual connection, 0 to 1; 0.5 is Abnar and Zuidema's. None measures it at each
            pixel: `|x| / (|x| + |f(x)|)` for the block x + f(x), with Euclidean norms over the channels.
        measure: 'weights', or 'contributions': a_ij is then the sum over the channels of `|w_ij * beta(x_j)|`, so that
            neighbours with small values count little.
        to: 'picture', or 'finest' to stop at the input of the first block, at the stride of the stem.

    Returns:
        (N, P, H, W), or (N, P, H // stride, W // stride) for 'finest'; float32, each map sums to 1. Memory: one map of
        weights per block, N k^2 H W * 4 bytes at the size of its feature map.

    Raises:
        ValueError: There is no SAN in `model`, no such block, a pixel is not on the map, or an option is unknown.
    """
    if to not in ('picture', 'finest'):
        raise ValueError(f"to must be 'picture' or 'finest', got {to!r}")
    net = find_network(model)
    steps = trace(net, images, find_block(net, block), residual, measure)
    return roll_back(steps if to == 'picture' else steps[1:], pixels)


def roll_back(steps: Sequence[_Step], pixels: Sequence[tuple[int, int]] | None) -> Tensor:
    drawn = next(step.drawn for step in reversed(steps) if isinstance(step, Attended))
    count, (height, width) = len(drawn), drawn.shape[2:]
    if pixels is None:
        mass = drawn.new_full((count, 1, height, width), 1 / (height * width))
    else:
        at = _check_pixels(pixels, drawn)
        mass = drawn.new_zeros(count, len(at), height, width)
        mass[:, torch.arange(len(at), device=at.device), at[:, 0], at[:, 1]] = 1
    for step in reversed(steps):
        mass = step.back(mass)
    return mass
