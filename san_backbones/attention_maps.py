"""Attention as tensors: the footprint weights of a block, and what reaches a pixel over all stages.

The model may be a SAN, a feature extractor made of one, a SANBackbone, or anything that holds one of these, such as a
detector: its SAN is looked for, and only that runs. Weights are computed again, by the definition in `ops.reference`,
from what enters the attention layer in a forward pass: they are those that any operator path uses.

Pixels are (row, column) on the map of a block. `visualize` draws all this over pictures.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention import _FootprintAttention
from .ops import geometry, reference
from .san import _SpareBuffers

__all__ = ['attention_blocks', 'attention_rollout', 'attention_weights', 'effective_size', 'footprint_weights']

BlockId = str | int | tuple[int, int]
Hook = tuple[nn.Module, bool, Callable[[Tensor], None]]

PIXELS_AT_ONCE = 4096  # whose relations are held in memory together


# --- The SAN inside a model ------------------------------------------------------------------------------------------

class _Block(NamedTuple):
    """A residual block (norm1, attn, ..., conv) and the stride of its map."""
    name: str
    module: Any  # a san.Block, or what FX made of it
    stage: int
    stride: int

    @property
    def attn(self) -> _FootprintAttention:
        return self.module.attn


class _Net(NamedTuple):
    """The SAN inside a model: the module that runs it on images, its stages and their strides, its blocks in order."""
    trunk: nn.Module
    stem: nn.Module
    stages: list[nn.Module]
    strides: list[int]
    blocks: dict[str, _Block]


def _find(model: nn.Module) -> _Net:
    """The one SAN in `model`. Whatever wraps it, timm's flattened and traced extractors too, keeps its parts' names."""
    pattern = re.compile(r'((?:.*\.)?)stages([._])(\d+)\.blocks\.(\d+)\.attn')
    layers = (path for path, module in model.named_modules() if isinstance(module, _FootprintAttention))
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
    stages, strides, blocks = [], [2], {}
    for stage in range(max(depths) + 1):
        stages.append(trunk.get_submodule(f'stages{separator}{stage}'))
        strides.append(strides[-1] * (2 if isinstance(stages[-1].get_submodule('pool'), nn.MaxPool2d) else 1))
        for index in range(depths.get(stage, 0)):
            name = f'stages.{stage}.blocks.{index}'
            blocks[name] = _Block(name, stages[-1].get_submodule(f'blocks.{index}'), stage, strides[-1])
    return _Net(trunk, trunk.get_submodule('stem'), stages, strides[1:], blocks)


def attention_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers of the SAN in `model` by the names of their blocks, in the order in which they run.

    Args:
        model: A SAN, or anything that holds one.

    Returns:
        `{'stages.0.blocks.0': PairwiseAttention(...), ...}`. The names are those of `SAN.named_modules`, also where
        the SAN is called otherwise inside `model` (`backbone.stages.0`, `stages_0`).

    Raises:
        ValueError: There is no SAN in `model`, or several.
    """
    return {name: block.attn for name, block in _find(model).blocks.items()}


def _find_block(net: _Net, block: BlockId | None) -> _Block:
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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _run(net: _Net, images: Tensor, hooks: Sequence[Hook]) -> None:
    """Runs the SAN on images; each of `hooks` (module, whether its input, function) is called with what flows there."""
    def before(see: Callable[[Tensor], None]) -> Callable[..., None]:
        return lambda module, args: see(args[0])

    def after(see: Callable[[Tensor], None]) -> Callable[..., None]:
        return lambda module, args, output: see(output)

    handles = [module.register_forward_pre_hook(before(see)) if is_input else module.register_forward_hook(after(see))
               for module, is_input, see in hooks]
    try:
        with torch.no_grad(), _SpareBuffers(net.trunk):
            net.trunk(images)
    finally:
        for handle in handles:
            handle.remove()


# --- Weights ---------------------------------------------------------------------------------------------------------

def _check_pixels(pixels: Sequence[tuple[int, int]] | None, maps: Tensor) -> Tensor:
    """Pixels (row, column) of maps (..., H, W) as an int64 tensor (P, 2); None is all of them, row by row."""
    height, width = maps.shape[-2:]
    if pixels is None:
        return torch.cartesian_prod(*(torch.arange(size, device=maps.device) for size in (height, width)))
    wrong = [pixel for pixel in pixels if len(pixel) != 2 or any(
        not 0 <= place < size or place % 1 for place, size in zip(pixel, (height, width), strict=True))]
    if wrong or not len(pixels):
        raise ValueError(f'expected pixels (row, column) of a map of {height} rows and {width} columns, counted from '
                         f'0, got {tuple(wrong[0]) if wrong else "none"}')
    return torch.tensor([[int(row), int(column)] for row, column in pixels], device=maps.device)


def _is_local(layer: _FootprintAttention) -> bool:
    """Whether the weights of a pixel depend on its footprint only: gamma's norms use fixed statistics."""
    norms = (layer.weight_mlp.get_submodule(name) for name in ('norm1', 'norm2'))
    return layer.gamma_is_plain() and all(
        not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not norm.training and norm.running_mean is not None
        for norm in norms)


def _neighbours(maps: Tensor, pixels: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """The footprints of the pixels: (N, C, H, W) to (N, P, C, k, k), mirrored at the border."""
    pad = geometry.padding(kernel_size, dilation)
    steps = dilation * torch.arange(kernel_size, device=maps.device)
    rows = geometry.reflection_index(maps.shape[2], pad, maps.device)[pixels[:, :1] + steps]
    columns = geometry.reflection_index(maps.shape[3], pad, maps.device)[pixels[:, 1:] + steps]
    return maps[:, :, rows[:, :, None], columns[:, None, :]].transpose(1, 2)


def _weights_at(layer: _FootprintAttention, x: Tensor, pixels: Tensor) -> Iterator[Tensor]:
    """The weights at pixels (P, 2) in parts, (N, p, G, k, k) each.

    A pixel is a map of 1 x 1 whose padding is the rest of its footprint: what `ops.reference` says of padded maps then
    holds for any set of pixels.
    """
    k, area, images = layer.kernel_size, layer.kernel_size ** 2, len(x)
    query, key, place = layer.query(x), layer.key(x), layer.place(x)
    local = _is_local(layer)
    for part in pixels.split(PIXELS_AT_ONCE) if local else [_check_pixels(None, x)]:
        def around(maps: Tensor, part=part) -> Tensor:
            return _neighbours(maps, part, k, layer.dilation).flatten(0, 1)

        def at(maps: Tensor, part=part) -> Tensor:
            return maps[:, :, part[:, 0], part[:, 1]].transpose(1, 2).flatten(0, 1)[:, :, None, None]

        places = None if place is None else place.expand(images, -1, -1, -1)
        relation = reference.relate(
            around(query) if layer.relation == 'clique' else at(query), around(key),
            None if places is None else at(places), None if places is None else around(places),
            layer.is_pairwise, layer.relation, layer.position_mode, k, 1)
        relation = relation.flatten(2).unflatten(0, (images, len(part))).permute(0, 2, 3, 1).contiguous()
        with nullcontext() if local else _SpareBuffers(layer):
            logits = layer.weight_mlp(relation)  # (N, G, k * k, P), or (N, G * k * k, 1, P)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        weights = logits.softmax(2) if layer.is_pairwise else logits.squeeze(2).unflatten(1, (-1, area))
        weights = weights.permute(0, 3, 1, 2).unflatten(3, (k, k))
        yield weights if local else weights[:, pixels[:, 0] * x.shape[3] + pixels[:, 1]]


@torch.no_grad()
def footprint_weights(layer: nn.Module, x: Tensor, pixels: Sequence[tuple[int, int]] | None = None) -> Tensor:
    """The weights that one attention layer gives to the footprints of pixels.

        pairwise   w_ij = softmax_j( gamma([delta(x_i, x_j), p_i - p_j]) )    positive, their sum over j is 1
        patchwise  w_ij = gamma( delta(x_R(i)) )_j                            of either sign and any sum

    The layer's output is y_i[c] = sum_j w_ij[c mod G] * beta(x_j)[c] (CVPR 2020, equations 2 and 4).

    Args:
        layer: A `PairwiseAttention` or `PatchwiseAttention`.
        x: Its input, (N, dim, H, W).
        pixels: (row, column) of the pixels i; None is all of them, row by row.

    Returns:
        (N, P, G, k, k), float32 (float64 for float64 layers): G = out_planes / share_planes weight channels; element
        [n, p, g, a, b] weighs the neighbour `dilation * (a - k // 2)` rows below and `dilation * (b - k // 2)` columns
        right of the pixel, mirrored where that lies beyond the border. All pixels take N H W G k^2 * 4 bytes.
        With batch statistics (training) the norms see the whole maps, which then are held with their k x k axis.

    Raises:
        ValueError: layer is no attention layer, x does not fit it, or a pixel is not on the map.
    """
    if not isinstance(layer, _FootprintAttention):
        raise ValueError(f'expected a PairwiseAttention or PatchwiseAttention, got {type(layer).__name__}; for a model '
                         'there is attention_weights')
    layer._check(x)
    return torch.cat(list(_weights_at(layer, x, _check_pixels(pixels, x))), 1)


def attention_weights(
        model: nn.Module,
        images: Tensor,
        block: BlockId,
        pixels: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """The footprint weights of a block of the SAN in `model`, for images.

    The model runs as it stands (in training mode with batch statistics, whose running averages stay what they are),
    without gradients, and no further than its SAN.

    Args:
        model: A SAN, or anything that holds one.
        images: (N, in_chans, H, W), normalised as the model takes them.
        block: A name of `attention_blocks`, such as 'stages.3.blocks.4'; or its number in that order, negative ones
            counting from the last; or (stage, block).
        pixels: (row, column) on the map of the block, which is the image divided by its stride (2 to 32), rounded
            down; None is all of them, row by row.

    Returns:
        (N, P, G, k, k), as `footprint_weights`, which says more.

    Raises:
        ValueError: There is no SAN in `model`, or no such block, or a pixel is not on the map; the message lists what
            there is.
    """
    net = _find(model)
    layer = _find_block(net, block).attn
    weights: list[Tensor] = []
    _run(net, images, [(layer, True, lambda x: weights.append(footprint_weights(layer, x, pixels)))])
    return weights[0]


def effective_size(weights: Tensor) -> Tensor:
    """How many neighbours a footprint really uses: exp of the entropy of its absolute weights, 1 to k^2.

    Args:
        weights: (..., k, k), of any sign.

    Returns:
        (...), in the dtype of the weights; k^2 where all weights are alike, 1 where all but one are zero.
    """
    share = weights.abs().flatten(-2)
    share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
    return torch.special.entr(share).sum(-1).exp()


# --- Roll-out --------------------------------------------------------------------------------------------------------

class _Attended(NamedTuple):
    """A block on the way back: what each pixel drew from its footprint (N, k * k, H, W), and kept (N, 1, H, W)."""
    drawn: Tensor
    kept: Tensor
    kernel_size: int
    dilation: int

    def back(self, mass: Tensor) -> Tensor:
        k, (height, width) = self.kernel_size, mass.shape[2:]
        pad = geometry.padding(k, self.dilation)
        sent = mass * (1 - self.kept)
        padded = mass.new_zeros(*mass.shape[:2], height + 2 * pad, width + 2 * pad)
        for place in range(k * k):
            top, left = place // k * self.dilation, place % k * self.dilation
            padded[:, :, top:top + height, left:left + width] += sent * self.drawn[:, None, place]
        rows = geometry.reflection_index(height, pad, mass.device)
        columns = geometry.reflection_index(width, pad, mass.device)
        folded = mass.new_zeros(*mass.shape[:3], width + 2 * pad).index_add_(2, rows, padded)
        return (mass * self.kept).index_add_(3, columns, folded)


class _Pooled(NamedTuple):
    """A 2x2 max pool on the way back: the share of each of the four (N, 4, H // 2, W // 2), and the size before."""
    share: Tensor
    size: tuple[int, int]

    def back(self, mass: Tensor) -> Tensor:
        (height, width), before = mass.shape[2:], mass.new_zeros(*mass.shape[:2], *self.size)
        for place in range(4):
            corner = before[:, :, place // 2:2 * height:2, place % 2:2 * width:2]
            corner.copy_(mass * self.share[:, None, place])
        return before


def _pooled(x: Tensor) -> _Pooled:
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    corners = torch.stack([x[:, :, row:height:2, column:width:2] for row in (0, 1) for column in (0, 1)], 1).float()
    largest = corners.amax(1, keepdim=True)
    won = (corners == largest).float()
    share = (won / won.sum(1, keepdim=True) * largest.abs()).sum(2)
    total = share.sum(1, keepdim=True)
    return _Pooled(torch.where(total > 0, share / total.clamp(min=1e-30), 0.25), (x.shape[2], x.shape[3]))


def _drawn(layer: _FootprintAttention, x: Tensor, measure: str) -> Tensor:
    """The shares of the neighbours in what the attention gives each pixel, (N, k * k, H, W), their sum being 1."""
    pixels, parts, first = _check_pixels(None, x), [], 0
    groups = layer.out_planes // layer.share_planes
    value = layer.value(x).float().abs().unflatten(1, (-1, groups)).sum(1) if measure == 'contributions' else None
    for weights in _weights_at(layer, x, pixels):
        weights = weights.abs()
        if value is not None:
            part = pixels[first:first + weights.shape[1]]
            weights = weights * _neighbours(value, part, layer.kernel_size, layer.dilation)
        parts.append(weights.sum(2).flatten(2))
        first += weights.shape[1]
    drawn = torch.cat(parts, 1)
    total = drawn.sum(2, keepdim=True)
    drawn = torch.where(total > 0, drawn / total.clamp(min=1e-30), 1 / drawn.shape[2])
    return drawn.transpose(1, 2).unflatten(2, x.shape[2:]).float()


def _trace(net: _Net, images: Tensor, last: _Block, residual: float | None, measure: str) -> list[_Attended | _Pooled]:
    """What the way back needs of every pool and block up to `last`, in forward order."""
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

    def attends(layer: _FootprintAttention) -> Callable[[Tensor], None]:
        return lambda x: steps.append(
            _Attended(_drawn(layer, x, measure), x, layer.kernel_size, layer.dilation))

    hooks: list[Hook] = []
    for pool in [part.get_submodule('pool') for part in (net.stem, *net.stages[:last.stage + 1])]:
        if isinstance(pool, nn.MaxPool2d):
            hooks.append((pool, True, lambda x: steps.append(_pooled(x))))
    for block in net.blocks.values():
        hooks += [(block.module.norm1, True, enters_block), (block.attn, True, attends(block.attn)),
                  (block.module.conv, False, leaves_branch)]
        if block is last:
            break
    _run(net, images, hooks)
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
    """Where the features of a pixel come from: attention rolled out over all blocks and stages below.

    After Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (ACL 2020), who multiply the attention
    matrices of the layers, half the identity added to each for the residual connection. Here a unit of mass starts at
    a pixel behind `block` and goes back to the picture; no H W x H W matrix is built:

        block     m'_j = s_j m_j + sum_i (1 - s_i) a_ij m_i
        max pool  m'_j = t_ij m_i, j being one of the four pixels of i

    a_ij is `|w_ij|` summed over the weight channels (vector weights have no single value), divided by its sum over the
    footprint; of pairwise weights that is their mean. Neighbours beyond the border are the pixels they mirror. s_i is
    the share of the residual connection. t_ij is the share of the channels whose maximum is at j, each counting by
    that maximum. Mass is never lost: every map sums to 1.

    It is a summary, not an attribution. It knows nothing of the class, of signs (patchwise weights cancel and
    subtract), of single channels, nor of what the 1x1 convolutions, norms and ReLUs do with what arrives.

    Args:
        model: A SAN, or anything that holds one. It runs as in `attention_weights`.
        images: (N, in_chans, H, W), normalised as the model takes them.
        pixels: (row, column) on the map of the block. None: one map, for the mean of all pixels, which is what a
            classifier's average pool reads.
        block: Where to start, as for `attention_weights`; None is the last block.
        residual: Share s kept by the residual connection, 0 to 1; 0.5 is Abnar and Zuidema's. None measures it at each
            pixel: `|x| / (|x| + |f(x)|)` for the block x + f(x), with Euclidean norms over the channels.
        measure: 'weights', or 'contributions': a_ij is then the sum over the channels of `|w_ij * beta(x_j)|`, so that
            a neighbour whose values are small counts little.
        to: 'picture', or 'finest': stop at the input of the first block, at stride 2.

    Returns:
        (N, P, H, W), or (N, P, H // 2, W // 2) for 'finest'; float32, each map summing to 1. One map of weights of
        each block is held, N k^2 H W * 4 bytes at its size.

    Raises:
        ValueError: There is no SAN in `model`, or no such block; a pixel is not on the map; an option is unknown.
    """
    if to not in ('picture', 'finest'):
        raise ValueError(f"to must be 'picture' or 'finest', got {to!r}")
    net = _find(model)
    steps = _trace(net, images, _find_block(net, block), residual, measure)
    return _roll_back(steps if to == 'picture' else steps[1:], pixels)


def _roll_back(steps: Sequence[_Attended | _Pooled], pixels: Sequence[tuple[int, int]] | None) -> Tensor:
    drawn = next(step.drawn for step in reversed(steps) if isinstance(step, _Attended))
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
