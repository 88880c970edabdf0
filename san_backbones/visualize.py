"""Seeing attention: the footprint weights of a block, what reaches a pixel over all stages, and the feature maps.

`attention_weights` and `attention_rollout` give tensors, `footprint_figure`, `rollout_figure` and `feature_figure` draw
them over a picture with matplotlib (extra 'visualize'). The model may be a SAN, a feature extractor made of one, a
SANBackbone, or anything that holds one of these, such as a detector: its SAN is looked for, and only that runs.

Weights are computed again, by the definition in `ops.reference`, from what enters the attention layer in a forward
pass. They are those that any operator path uses.

Two kinds of coordinates occur. Tensors speak of (row, column) on the map of a block, figures of (x, y) on the picture.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from .attention import _FootprintAttention
from .ops import geometry, reference
from .san import _spare_buffers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['attention_blocks', 'attention_rollout', 'attention_weights', 'effective_size', 'feature_figure',
           'footprint_figure', 'footprint_weights', 'rollout_figure']

Pixels = Sequence[tuple[float, float]]
BlockId = str | int | tuple[int, int]
Picture = str | PathLike | Image.Image | np.ndarray

PIXELS_AT_ONCE = 4096  # whose relations are held in memory together


# --- The SAN inside a model ------------------------------------------------------------------------------------------

class _Block(NamedTuple):
    """A residual block: its layers, the stride of its map, and the 2x2 pools before it."""
    name: str
    module: nn.Module
    stage: int
    stride: int

    @property
    def attn(self) -> Any:
        return self.module.attn


class _Net(NamedTuple):
    """The SAN inside a model: the module that runs it on images, its stages, and its blocks in order."""
    trunk: nn.Module
    stem: nn.Module
    stages: list[nn.Module]
    blocks: dict[str, _Block]


def _find(model: nn.Module) -> _Net:
    """The one SAN in `model`, whatever wraps it: timm's flattened and traced extractors keep the names of its parts."""
    name = re.compile(r'((?:.*\.)?)stages([._])(\d+)\.blocks\.(\d+)\.attn')
    found = [name.fullmatch(path) for path, module in model.named_modules() if isinstance(module, _FootprintAttention)]
    prefixes = sorted({match[1] for match in found if match})
    if not prefixes:
        raise ValueError(f'there is no SAN in this {type(model).__name__}: expected a model of san_backbones, or one '
                         'that holds its stem and stages')
    if len(prefixes) > 1:
        raise ValueError(f'there are several SANs in this {type(model).__name__} ({", ".join(map(repr, prefixes))}): '
                         'give one of them, model.get_submodule(NAME)')
    prefix, separator = prefixes[0], next(match[2] for match in found if match)
    trunk = model.get_submodule(prefix.rstrip('.'))
    depths: dict[int, int] = {}
    for match in filter(None, found):
        depths[int(match[3])] = max(depths.get(int(match[3]), 0), int(match[4]) + 1)
    stages, blocks, stride = [], {}, 2
    for stage in range(max(depths) + 1):
        stages.append(trunk.get_submodule(f'stages{separator}{stage}'))
        stride *= 2 if isinstance(stages[-1].get_submodule('pool'), nn.MaxPool2d) else 1
        for index in range(depths.get(stage, 0)):
            module = stages[-1].get_submodule(f'blocks.{index}')
            blocks[f'stages.{stage}.blocks.{index}'] = _Block(f'stages.{stage}.blocks.{index}', module, stage, stride)
    return _Net(trunk, trunk.get_submodule('stem'), stages, blocks)


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


def _run(net: _Net, images: Tensor, hooks: Sequence[tuple[nn.Module, bool, Callable[[Tensor], None]]]) -> None:
    """Runs the SAN on images; each of `hooks` (module, whether its input, function) is called with what flows there."""
    def before(see):
        return lambda module, args: see(args[0])

    def after(see):
        return lambda module, args, output: see(output)

    handles = [module.register_forward_pre_hook(before(see)) if is_input else module.register_forward_hook(after(see))
               for module, is_input, see in hooks]
    try:
        with torch.no_grad(), _spare_buffers(net.trunk):
            net.trunk(images)
    finally:
        for handle in handles:
            handle.remove()


# --- Weights ---------------------------------------------------------------------------------------------------------

def _check_pixels(pixels: Sequence[tuple[int, int]] | None, height: int, width: int, device: torch.device) -> Tensor:
    """Pixels (row, column) as an int64 tensor (P, 2); None is all of them, row by row."""
    if pixels is None:
        return torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device))
    wrong = [pixel for pixel in pixels
             if len(pixel) != 2 or not 0 <= pixel[0] < height or not 0 <= pixel[1] < width or pixel[0] % 1 or pixel[1] % 1]
    if wrong or not len(pixels):
        raise ValueError(f'expected pixels (row, column) of a map of {height} rows and {width} columns, counted from '
                         f'0, got {tuple(wrong[0]) if wrong else "none"}')
    return torch.tensor([[int(row), int(column)] for row, column in pixels], device=device)


def _is_local(layer: _FootprintAttention) -> bool:
    """Whether the weights of a pixel depend on its footprint only: gamma's norms use fixed statistics."""
    norms = (layer.weight_mlp.norm1, layer.weight_mlp.norm2)
    return layer.gamma_is_plain() and all(
        isinstance(norm, (nn.Identity, FrozenBatchNorm2d)) or not norm.training and norm.running_mean is not None
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
    for part in pixels.split(PIXELS_AT_ONCE) if local else [_check_pixels(None, *x.shape[2:], x.device)]:
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
        with nullcontext() if local else _spare_buffers(layer):
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
        ValueError: x does not fit the layer, or a pixel is not on the map.
    """
    layer._check(x)
    return torch.cat(list(_weights_at(layer, x, _check_pixels(pixels, *x.shape[2:], x.device))), 1)


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
    return _Pooled(torch.where(total > 0, share / total.clamp(min=1e-30), 0.25), tuple(x.shape[2:]))


def _drawn(layer: _FootprintAttention, x: Tensor, measure: str) -> Tensor:
    """The shares of the neighbours in what the attention gives each pixel, (N, k * k, H, W), their sum being 1."""
    pixels, parts, first = _check_pixels(None, *x.shape[2:], x.device), [], 0
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

    def attends(layer: Any) -> Callable[[Tensor], None]:
        return lambda x: steps.append(
            _Attended(_drawn(layer, x, measure), x, layer.kernel_size, layer.dilation))

    hooks: list[tuple[nn.Module, bool, Callable[[Tensor], None]]] = []
    for pool in [net.stem.get_submodule('pool')] + [stage.get_submodule('pool') for stage in
                                                    net.stages[:last.stage + 1]]:
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

    a_ij is |w_ij| summed over the weight channels (vector weights have no single value), divided by its sum over the
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
            pixel: |x| / (|x| + |f(x)|) for the block x + f(x), with Euclidean norms over the channels.
        measure: 'weights', or 'contributions': a_ij is then the sum over the channels of |w_ij * beta(x_j)|, so that a
            neighbour whose values are small counts little.
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
        at = _check_pixels(pixels, height, width, drawn.device)
        mass = drawn.new_zeros(count, len(at), height, width)
        mass[:, torch.arange(len(at), device=at.device), at[:, 0], at[:, 1]] = 1
    for step in reversed(steps):
        mass = step.back(mass)
    return mass


# --- Pictures --------------------------------------------------------------------------------------------------------

class _Shown(NamedTuple):
    """A picture as it was given (H, W, 3), as it was scaled (H', W', 3), both uint8, and as the model takes it."""
    original: np.ndarray
    scaled: np.ndarray
    images: Tensor

    def on_map(self, pixel: tuple[float, float], stride: int) -> tuple[int, int]:
        """(x, y) on the picture to (row, column) on a map; a last pixel that pooling dropped counts to the one before."""
        (height, width), (tall, wide) = self.scaled.shape[:2], self.original.shape[:2]
        row, column = (pixel[1] + 0.5) * height / tall / stride, (pixel[0] + 0.5) * width / wide / stride
        return min(int(row), height // stride - 1), min(int(column), width // stride - 1)

    def box(self, top: float, left: float, bottom: float, right: float, stride: int) -> tuple[float, ...]:
        """Edges on a map, in its pixels, to edges on the picture (left, right, bottom, top), as matplotlib's extent.

        matplotlib puts the centre of the first pixel at 0, and its edge at -0.5.
        """
        (height, width), (tall, wide) = self.scaled.shape[:2], self.original.shape[:2]
        x, y = stride * wide / width, stride * tall / height
        return left * x - 0.5, right * x - 0.5, bottom * y - 0.5, top * y - 0.5


def _read(image: Picture) -> Image.Image:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError('expected a picture as a uint8 array of shape (height, width, 3), RGB, got '
                             f'{image.dtype} {list(image.shape)}')
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        with Image.open(image) as file:
            return ImageOps.exif_transpose(file).convert('RGB')
    return ImageOps.exif_transpose(image).convert('RGB')


def _statistics(model: nn.Module, net: _Net) -> tuple[Sequence[float], Sequence[float], bool]:
    """Mean and standard deviation of the model's images, of channels in [0, 1], and whether they are BGR."""
    preprocessor = getattr(model, 'data_preprocessor', None)  # of OpenMMLab's models, which read pictures as BGR
    if preprocessor is not None and hasattr(preprocessor, 'mean') and hasattr(preprocessor, 'std'):
        turned = getattr(preprocessor, '_channel_conversion', getattr(preprocessor, 'channel_conversion', False))
        mean, std = ((values.flatten() / 255).tolist() for values in (preprocessor.mean, preprocessor.std))
        return mean, std, not turned
    cfg = next((module.pretrained_cfg for module in (model, net.trunk, *model.modules())
                if isinstance(getattr(module, 'pretrained_cfg', None), Mapping)), {})
    return cfg.get('mean') or IMAGENET_DEFAULT_MEAN, cfg.get('std') or IMAGENET_DEFAULT_STD, False


def _default_size(model: nn.Module) -> int | None:
    cfg = next((module.pretrained_cfg for module in model.modules()
                if isinstance(getattr(module, 'pretrained_cfg', None), Mapping)), {})
    return round(min(cfg['input_size'][1:]) / (cfg.get('crop_pct') or 1)) if cfg.get('input_size') else None


def _show(model: nn.Module, net: _Net, image: Picture, size: int | None) -> _Shown:
    picture = _read(image)
    original, size = np.asarray(picture), size or _default_size(model)
    if size is not None:
        scale = size / min(picture.size)
        picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))),
                                 Image.Resampling.BILINEAR)
    weight = net.stem.get_submodule('conv').weight
    mean, std, bgr = _statistics(model, net)
    images = torch.from_numpy(np.array(picture)).to(weight.device).permute(2, 0, 1)[None] / 255
    images = (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]
    channels = weight.shape[1]
    if channels not in (1, 3):
        raise ValueError(f'the model takes images of {channels} channels; pictures can be shown to models of 3 or 1')
    images = images.mean(1, keepdim=True) if channels == 1 else images.flip(1) if bgr else images
    return _Shown(original, np.asarray(picture), images.to(weight.dtype))


def _points(shown: _Shown, pixels: Pixels | None, grid: int | tuple[int, int] | None) -> list[tuple[float, float]]:
    """Pixels (x, y) of the picture: those asked for, or the centres of the cells of a grid, or the centre."""
    tall, wide = shown.original.shape[:2]
    if pixels is not None and grid is not None:
        raise ValueError('give pixels or a grid, not both')
    if grid is not None:
        rows, columns = (grid, grid) if isinstance(grid, int) else grid
        if rows < 1 or columns < 1:
            raise ValueError(f'grid must be (rows, columns), at least (1, 1), got {grid!r}')
        return [((column + 0.5) * wide / columns - 0.5, (row + 0.5) * tall / rows - 0.5)
                for row in range(rows) for column in range(columns)]
    points = [(wide // 2, tall // 2)] if pixels is None else [tuple(pixel) for pixel in pixels]
    for point in points:
        if len(point) != 2 or not -0.5 <= point[0] < wide - 0.5 or not -0.5 <= point[1] < tall - 0.5:
            raise ValueError(f'pixel {point} is not on the picture: x runs from 0 to {wide - 1}, y from 0 to {tall - 1}')
    if not points:
        raise ValueError('pixels is empty; give at least one (x, y)')
    return points


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'san-backbones[visualize]'") from error
    return Figure(figsize=(width, height), layout='constrained')


COLOURS = ('#00b8d9', '#ff7a00', '#8bc34a', '#e040fb', '#ffd600', '#f44336', '#3f8cff', '#a1887f')
SMALL, LABEL = 7, 8  # points


def _bare(axes: Axes, title: str = '', colour: str | None = None) -> Axes:
    """Without ticks; with a coloured frame where a colour is given."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=SMALL, pad=3)
    for spine in axes.spines.values():
        spine.set_color(colour or '0.7')
        spine.set_linewidth(2 if colour else 0.5)
    return axes


def _pale(picture: np.ndarray) -> np.ndarray:
    """Grey and light, so that colours laid over it are seen."""
    grey = picture.astype(np.float32).mean(2, keepdims=True)
    return np.repeat((255 - 0.65 * (255 - grey)).astype(np.uint8), 3, axis=2)


class _Scale(NamedTuple):
    """How values become colours: from 0 to `most`, or from -most to most where they have signs."""
    name: str
    least: float
    most: float

    def options(self) -> dict[str, Any]:
        return dict(cmap=self.name, vmin=self.least, vmax=self.most, interpolation='nearest')

    def overlay(self, values: np.ndarray) -> np.ndarray:
        """(H, W) to RGBA, the more opaque the larger."""
        from matplotlib import colormaps
        span = (values - self.least) / max(self.most - self.least, 1e-30)
        colours = colormaps[self.name](np.clip(span, 0, 1))
        colours[..., 3] = np.clip(np.abs(values) / max(self.most, 1e-30), 0, 1) ** 0.7 * 0.9
        return colours


def _scale_of(weights: Tensor, signed: bool) -> _Scale:
    most = weights.abs().max().item()
    return _Scale('RdBu_r', -most, most) if signed else _Scale('inferno', 0., most)


# --- Footprints ------------------------------------------------------------------------------------------------------

def _varied(weights: Tensor, count: int) -> list[int]:
    """The `count` weight channels of (P, G, k, k) that differ most from each other: the most selective, then always
    the one farthest from those taken."""
    flat = weights.transpose(0, 1).flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-30)
    taken = [int(effective_size(weights).mean(0).argmin())]
    while len(taken) < min(count, len(flat)):
        distance = torch.cdist(flat, flat[taken]).amin(1)
        distance[taken] = -1
        taken.append(int(distance.argmax()))
    return sorted(taken)


def _channels(channel: int | Sequence[int] | None, weights: Tensor, count: int) -> list[int]:
    groups = weights.shape[1]
    if channel is None:
        return _varied(weights, count)
    channels = [channel] if isinstance(channel, int) else list(channel)
    wrong = [index for index in channels if not isinstance(index, int) or not 0 <= index < groups]
    if wrong or not channels:
        raise ValueError(f'channel must be a weight channel of the block, 0 to {groups - 1}, or several, got {channel!r}')
    return channels


def _mosaic(shown: _Shown, block: _Block, at: tuple[int, int]) -> np.ndarray:
    """What a footprint covers: the stride x stride pixels behind each of its k x k neighbours, side by side."""
    stride, height, width = block.stride, shown.scaled.shape[0] // block.stride, shown.scaled.shape[1] // block.stride
    cells = torch.from_numpy(shown.scaled[:height * stride, :width * stride].copy())
    cells = cells.unflatten(1, (width, stride)).unflatten(0, (height, stride)).permute(1, 3, 4, 0, 2).flatten(0, 2)
    k = block.attn.kernel_size
    near = _neighbours(cells[None], torch.tensor([at]), k, block.attn.dilation)[0, 0]
    return near.unflatten(0, (stride, stride, 3)).permute(3, 0, 4, 1, 2).reshape(k * stride, k * stride, 3).numpy()


def _spread(weights: Tensor, block: _Block, at: tuple[int, int], height: int, width: int) -> np.ndarray:
    """Weights (k, k) on the map pixels that they belong to (height, width), mirrored ones added where they come from."""
    k, d = block.attn.kernel_size, block.attn.dilation
    pad = geometry.padding(k, d)
    rows = geometry.reflection_index(height, pad)[at[0] + d * torch.arange(k)]
    columns = geometry.reflection_index(width, pad)[at[1] + d * torch.arange(k)]
    spread = torch.zeros(height, width).index_put_((rows[:, None], columns[None]), weights, accumulate=True)
    return spread.numpy()


def _extent(shown: _Shown, block: _Block, at: tuple[int, int]) -> tuple[float, ...]:
    """The true extent of a footprint on the picture (left, right, bottom, top), which may reach beyond it."""
    reach = geometry.padding(block.attn.kernel_size, block.attn.dilation)
    return shown.box(at[0] - reach, at[1] - reach, at[0] + reach + 1, at[1] + reach + 1, block.stride)


def _rectangle(axes: Axes, extent: Sequence[float], colour: str, **options: Any) -> None:
    from matplotlib.patches import Rectangle
    left, right, bottom, top = extent
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, **options))


def _describe(block: _Block) -> str:
    layer = block.attn
    dilation = f', dilation {layer.dilation}' if layer.dilation > 1 else ''
    form = 'pairwise' if layer.is_pairwise else 'patchwise'
    return (f'{block.name}: {form} {layer.relation}, footprint {layer.kernel_size} x {layer.kernel_size}{dilation}, '
            f'stride {block.stride}')


def _tile(axes: Axes, weights: Tensor, scale: _Scale, title: str = '', colour: str | None = None,
          note: bool = True) -> None:
    axes.imshow(weights.numpy(), **scale.options())
    centre = weights.shape[-1] // 2
    axes.plot(centre, centre, '+', color='#00e676', markersize=5, markeredgewidth=1.2)
    _bare(axes, title, colour)
    if note:
        total = '' if scale.least == 0 else f'   sum {weights.sum():+.2f}'
        axes.set_xlabel(f'uses {effective_size(weights):.0f}{total}', fontsize=SMALL, labelpad=2)


def _overlays(axes: Axes, shown: _Shown, block: _Block, places: Sequence[tuple[int, int]], weights: Tensor,
              scale: _Scale, colours: Sequence[str], linewidth: float = 2.) -> None:
    """The picture with the weights (P, k, k) on the pixels that they belong to, and the footprints' true extents."""
    height, width = shown.scaled.shape[0] // block.stride, shown.scaled.shape[1] // block.stride
    axes.imshow(_pale(shown.original))
    heat = np.zeros((height, width), np.float32)
    for at, tile in zip(places, weights, strict=True):
        spread = _spread(tile, block, at, height, width)
        heat = np.where(np.abs(spread) > np.abs(heat), spread, heat)
    axes.imshow(scale.overlay(heat), extent=shown.box(0, 0, height, width, block.stride), interpolation='nearest')
    for number, at in enumerate(places):
        colour = colours[number % len(colours)]
        _rectangle(axes, _extent(shown, block, at), colour, linewidth=linewidth, clip_on=True)
    axes.set_xlim(-0.5, shown.original.shape[1] - 0.5)
    axes.set_ylim(shown.original.shape[0] - 0.5, -0.5)


def footprint_figure(
        model: nn.Module,
        image: Picture,
        block: BlockId | None = None,
        pixels: Pixels | None = None,
        grid: int | tuple[int, int] | None = None,
        channel: int | Sequence[int] | None = None,
        *,
        size: int | None = None,
        channels: int = 6,
) -> Figure:
    """Draws what pixels of a picture attend to in a block.

    For pixels: the picture with their footprints at true size and the mean weights on the pixels they belong to; and
    a row for each: what its footprint covers, the mean of the weights, and single weight channels. The last row is the
    mean over all pixels of the picture: what the block does everywhere, whatever it sees. For a grid: the mean weights
    of its pixels, each in its place, and how many neighbours each pixel of the picture uses.

    Pairwise weights are positive and run from black (0) to yellow; patchwise weights have signs, red for positive and
    blue for negative. 'uses n' is `effective_size`, at most k^2.

    Args:
        model: A SAN, or anything that holds one. It is run in eval mode and then put back.
        image: A path, a PIL picture, or a uint8 array (H, W, 3), RGB. EXIF orientation is applied. It is normalised
            as the model's `pretrained_cfg` (or OpenMMLab's data_preprocessor) says, by ImageNet's statistics where
            there is none.
        block: As for `attention_weights`; None is the last block at stride 4.
        pixels: (x, y) on the picture as given: x counts pixels from the left, y from the top, both from 0, whatever
            `size` is. None is the centre.
        grid: (rows, columns) of pixels evenly spread, or one number for both, instead of `pixels`.
        channel: The weight channel(s) to draw, 0 to G - 1; for a grid in place of the mean. None draws those that
            differ most from each other.
        size: Shorter side in pixels to which the picture is scaled for the model, the aspect kept. None takes the
            `pretrained_cfg`'s (input size / crop_pct), or leaves the picture as it is where there is none.
        channels: How many weight channels to draw at most, where `channel` is None.

    Returns:
        A matplotlib Figure outside pyplot's state, so that it can be made in any thread: `figure.savefig('a.png')`.

    Raises:
        ValueError: There is no SAN or no such block or channel, or a pixel is not on the picture; the message says
            what there is.
        ImportError: matplotlib is missing.
    """
    _new_figure(1, 1)
    net = _find(model)
    if block is None:
        names = [name for name, found in net.blocks.items() if found.stride <= 4]
        block = (names or list(net.blocks))[-1]
    shown, at_block = _show(model, net, image, size), _find_block(net, block)
    points = _points(shown, pixels, grid)
    places = [shown.on_map(point, at_block.stride) for point in points]
    with _evaluating(model):
        weights = attention_weights(model, shown.images, at_block.name)[0].cpu().float()  # of all pixels
    width = shown.scaled.shape[1] // at_block.stride
    chosen = weights[[row * width + column for row, column in places]]
    if grid is not None:
        rows = grid if isinstance(grid, int) else grid[0]
        return _grid_figure(shown, at_block, places, rows, weights, chosen, channel)
    return _pixel_figure(shown, at_block, places, points, weights, chosen, _channels(channel, chosen, channels))


def _pixel_figure(shown: _Shown, block: _Block, places: Sequence[tuple[int, int]], points: Pixels, weights: Tensor,
                  chosen: Tensor, channels: Sequence[int]) -> Figure:
    signed, everywhere = not block.attn.is_pairwise, weights.mean(0)
    drawn = torch.cat([chosen, everywhere[None]])[:, channels]
    scale, mean_scale = _scale_of(drawn, signed), _scale_of(chosen.mean(1), signed)
    rows, columns = len(points) + 1, 2 + len(channels)
    tile, aspect = 1.25, shown.original.shape[0] / shown.original.shape[1]
    tall = max(rows * (tile + 0.35), 3.6)
    wide = min(max((tall - 1) / aspect, 2.5), 7)
    figure = _new_figure(wide + columns * tile + 0.8, tall + 0.5)
    figure.suptitle(_describe(block) + f', {weights.shape[1]} weight channels', fontsize=LABEL + 2)
    spec = figure.add_gridspec(rows, columns + 1, width_ratios=[wide] + [tile] * columns)

    axes = figure.add_subplot(spec[:, 0])
    _overlays(axes, shown, block, places, chosen.mean(1), mean_scale, COLOURS)
    _bare(axes)
    axes.set_title('mean weights, on the pixels they weigh', fontsize=LABEL)
    for row, (at, point, tiles) in enumerate(zip(places, points, chosen, strict=True)):
        colour = COLOURS[row % len(COLOURS)]
        axes = figure.add_subplot(spec[row, 1])
        mosaic = _mosaic(shown, block, at)
        axes.imshow(mosaic)
        centre = (len(mosaic) - 1) / 2
        half = block.stride / 2
        _rectangle(axes, (centre - half, centre + half, centre + half, centre - half), '#00e676', linewidth=1)
        _bare(axes, 'covers' if row == 0 else '', colour)
        axes.set_ylabel(f'x {point[0]:.0f}, y {point[1]:.0f}', fontsize=SMALL)
        _tile(figure.add_subplot(spec[row, 2]), tiles.mean(0), mean_scale, 'mean' if row == 0 else '', colour)
        for column, index in enumerate(channels):
            _tile(figure.add_subplot(spec[row, 3 + column]), tiles[index], scale,
                  f'channel {index}' if row == 0 else '')
    axes = _bare(figure.add_subplot(spec[rows - 1, 1]))
    axes.axis('off')
    fixed = (everywhere.square().sum() / weights.square().sum((1, 2, 3)).mean()).item()
    axes.text(0.5, 0.5, f'mean over\nthe picture:\n{fixed:.0%} of the\nweights\' square', ha='center', va='center', fontsize=SMALL,
              transform=axes.transAxes)
    _tile(figure.add_subplot(spec[rows - 1, 2]), everywhere.mean(0), mean_scale, '')
    for column, index in enumerate(channels):
        _tile(figure.add_subplot(spec[rows - 1, 3 + column]), everywhere[index], scale)
    return figure


def _grid_figure(shown: _Shown, block: _Block, places: Sequence[tuple[int, int]], rows: int, weights: Tensor,
                 chosen: Tensor, channel: int | Sequence[int] | None) -> Figure:
    signed, what = not block.attn.is_pairwise, 'mean weights'
    if channel is not None:
        channels = _channels(channel, chosen, 1)
        weights, chosen = weights[:, channels], chosen[:, channels]
        what = f'weight channel {channels[0]}' if len(channels) == 1 else f'mean of channels {channels}'
    tiles = chosen.mean(1)
    scale, k = _scale_of(tiles, signed), block.attn.kernel_size
    aspect = shown.original.shape[0] / shown.original.shape[1]
    figure = _new_figure(13.5, 4.3 * aspect + 1)
    figure.suptitle(_describe(block), fontsize=LABEL + 2)
    left, middle, right = figure.subplots(1, 3)
    _overlays(left, shown, block, places, tiles, scale, ('0.15',), linewidth=0.6)
    _bare(left)
    left.set_title(f'{what}, on the pixels they weigh', fontsize=LABEL)

    field = torch.full((rows * (k + 1) + 1, len(places) // rows * (k + 1) + 1), float('nan'))
    for number, tile in enumerate(tiles):
        row, column = divmod(number, len(places) // rows)
        field[row * (k + 1) + 1:(row + 1) * (k + 1), column * (k + 1) + 1:(column + 1) * (k + 1)] = tile
    heat = middle.imshow(field.numpy(), **scale.options(), aspect='auto')
    _bare(middle)
    middle.set_box_aspect(aspect)
    middle.set_title('the same, enlarged', fontsize=LABEL)
    figure.colorbar(heat, ax=middle, shrink=0.8).ax.tick_params(labelsize=SMALL)

    height, width = shown.scaled.shape[0] // block.stride, shown.scaled.shape[1] // block.stride
    sizes = effective_size(weights).mean(1).unflatten(0, (height, width))
    right.imshow(_pale(shown.original))
    heat = right.imshow(sizes.numpy(), extent=shown.box(0, 0, height, width, block.stride), cmap='viridis', alpha=0.8)
    _bare(right)
    right.set_title(f'neighbours used, of {k * k}', fontsize=LABEL)
    right.set_xlim(left.get_xlim())
    right.set_ylim(left.get_ylim())
    figure.colorbar(heat, ax=right, shrink=0.8).ax.tick_params(labelsize=SMALL)
    return figure


# --- Roll-out over the stages ----------------------------------------------------------------------------------------

def _reach(net: _Net, last: _Block, at: tuple[int, int]) -> tuple[int, int]:
    """How far, in picture pixels, the footprints below and at `last` reach from the edge of its pixel."""
    reach = 0
    for block in net.blocks.values():
        reach += block.stride * geometry.padding(block.attn.kernel_size, block.attn.dilation)
        if block is last:
            break
    return reach


def rollout_figure(*args, **kwargs):
    pass


def feature_figure(*args, **kwargs):
    pass
