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

    def on_stride(self, stride: int) -> tuple[int, int]:
        """Height and width of a map."""
        return self.scaled.shape[0] // stride, self.scaled.shape[1] // stride

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
    """How values become colours: from `least` to `most`; with signs, white in the middle."""
    name: str
    least: float
    most: float
    label: str

    def options(self) -> dict[str, Any]:
        return dict(cmap=self.name, vmin=self.least, vmax=self.most, interpolation='nearest')

    def overlay(self, values: np.ndarray) -> np.ndarray:
        """(H, W) to RGBA; clear where there is no value (NaN), and where a value with a sign is near 0."""
        from matplotlib import colormaps
        span = (np.nan_to_num(values) - self.least) / max(self.most - self.least, 1e-30)
        colours = colormaps[self.name](np.clip(span, 0, 1))
        signed = self.least == -self.most
        colours[..., 3] = np.clip(0.2 + 0.7 * np.abs(2 * span - 1) if signed else 0.75, 0, 0.9) * ~np.isnan(values)
        return colours


def _scale_of(values: Tensor, signed: bool, label: str) -> _Scale:
    most = values.abs().max().item()
    return _Scale('RdBu_r', -most, most, label) if signed else _Scale('inferno', values.min().item(), most, label)


def _bar(figure: Figure, scale: _Scale, axes: Any, **options: Any) -> None:
    """A colour bar; of one value only where all are alike."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator
    colours = ScalarMappable(Normalize(scale.least, scale.most), scale.name)
    bar = figure.colorbar(colours, ax=axes, ticks=MaxNLocator(5), **options)
    bar.set_label(scale.label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)


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
    stride, (height, width) = block.stride, shown.on_stride(block.stride)
    cells = torch.from_numpy(shown.scaled[:height * stride, :width * stride].copy())
    cells = cells.unflatten(1, (width, stride)).unflatten(0, (height, stride)).permute(1, 3, 4, 0, 2).flatten(0, 2)
    k = block.attn.kernel_size
    near = _neighbours(cells[None], torch.tensor([at]), k, block.attn.dilation)[0, 0]
    return near.unflatten(0, (stride, stride, 3)).permute(3, 0, 4, 1, 2).reshape(k * stride, k * stride, 3).numpy()


def _spread(weights: Tensor, block: _Block, at: tuple[int, int], height: int, width: int) -> np.ndarray:
    """Weights (k, k) on the pixels of the map (height, width), NaN elsewhere; mirrored ones add up where they come from."""
    k, d = block.attn.kernel_size, block.attn.dilation
    pad = geometry.padding(k, d)
    rows = geometry.reflection_index(height, pad)[at[0] + d * torch.arange(k)]
    columns = geometry.reflection_index(width, pad)[at[1] + d * torch.arange(k)]
    cells = (rows[:, None], columns[None])
    spread = torch.zeros(height, width).index_put_(cells, weights, accumulate=True)
    covered = torch.zeros(height, width, dtype=torch.bool).index_put_(cells, torch.tensor(True))
    return torch.where(covered, spread, float('nan')).numpy()


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


def _tile(axes: Axes, weights: Tensor, scale: _Scale, title: str, note: str, colour: str | None = None) -> None:
    axes.imshow(weights.numpy(), **scale.options())
    centre = weights.shape[-1] // 2
    axes.plot(centre, centre, '+', color='#00e676', markersize=5, markeredgewidth=1.2)
    _bare(axes, title, colour)
    axes.set_xlabel(note, fontsize=SMALL, labelpad=2)


def _overlays(axes: Axes, shown: _Shown, block: _Block, places: Sequence[tuple[int, int]], tiles: Tensor,
              scale: _Scale) -> None:
    """The picture with tiles (P, k, k) on the pixels of the map that they weigh; of overlapping ones the extreme."""
    height, width = shown.on_stride(block.stride)
    axes.imshow(_pale(shown.original))
    heat, middle = np.full((height, width), np.nan, np.float32), (scale.least + scale.most) / 2
    for at, tile in zip(places, tiles, strict=True):
        spread = _spread(tile, block, at, height, width)
        more = np.isnan(heat) | (np.abs(spread - middle) > np.abs(heat - middle))
        heat = np.where(more & ~np.isnan(spread), spread, heat)
    axes.imshow(scale.overlay(heat), extent=shown.box(0, 0, height, width, block.stride), interpolation='nearest')
    _whole(axes, shown)


def _whole(axes: Axes, shown: _Shown, title: str = '') -> None:
    """Shows the picture and nothing beyond it."""
    _bare(axes)
    axes.set_title(title, fontsize=LABEL)
    axes.set_xlim(-0.5, shown.original.shape[1] - 0.5)
    axes.set_ylim(shown.original.shape[0] - 0.5, -0.5)


class _Seen(NamedTuple):
    """The weights of a block over the whole picture (H * W, G, k, k), as they are and as they are drawn."""
    weights: Tensor
    drawn: Tensor
    signed: bool
    label: str

    @property
    def mean(self) -> Tensor:
        return self.weights.mean(0)

    def departure(self) -> Tensor:
        """|w - mean| / |mean| of every pixel: how much its weights depend on what it sees."""
        return (self.weights - self.mean).flatten(1).norm(dim=1) / self.mean.norm()

    def fixed(self) -> float:
        """The share of the weights' square that their mean over the picture has."""
        return (self.mean.square().sum() / self.weights.square().sum((1, 2, 3)).mean()).item()


def _look(model: nn.Module, shown: _Shown, block: _Block, departures: bool) -> _Seen:
    with _evaluating(model):
        weights = attention_weights(model, shown.images, block.name)[0].cpu().float()
    pairwise, area = block.attn.is_pairwise, block.attn.kernel_size ** 2
    weights = weights * area if pairwise else weights
    label = f'weight, times 1/{area} (1 is average pooling)' if pairwise else 'weight'
    if departures:
        return _Seen(weights, weights - weights.mean(0), True, f'{label}, less its mean over the picture')
    return _Seen(weights, weights, not pairwise, label)


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
        departures: bool = False,
) -> Figure:
    """Draws what pixels of a picture attend to in a block.

    For pixels: the picture with their footprints at true size (neighbours are stride x dilation picture pixels apart)
    and the mean weights on the pixels that they weigh; and a row for each: what its footprint covers, the mean of the
    weights, and single weight channels. The last row is the mean over all pixels of the picture: what the block does
    everywhere, whatever it sees. For a grid: the mean weights of its pixels; how many neighbours each pixel of the
    picture uses (`effective_size`, at most k^2); and how far its weights depart from their mean over the picture,
    |w - mean| / |mean|.

    Pairwise weights are given in multiples of 1 / k^2, which average pooling would give to all. Patchwise weights have
    signs: red is positive, blue negative.

    Args:
        model: A SAN, or anything that holds one. It is run in eval mode and then put back.
        image: A path, a PIL picture, or a uint8 array (H, W, 3), RGB. EXIF orientation is applied. It is normalised
            as the model's `pretrained_cfg` (or OpenMMLab's data_preprocessor) says, by ImageNet's statistics where
            there is none.
        block: As for `attention_weights`; None is the last block at stride 4.
        pixels: (x, y) on the picture as given: x counts pixels from the left, y from the top, both from 0, whatever
            `size` is. None is the centre.
        grid: (rows, columns) of pixels evenly spread, or one number for both, instead of `pixels`.
        channel: The weight channel(s) to draw, 0 to G - 1; for a grid, whose mean to draw. None draws those that
            differ most from each other; for a grid, the mean of all.
        size: Shorter side in pixels to which the picture is scaled for the model, the aspect kept. None takes the
            `pretrained_cfg`'s (input size / crop_pct), or leaves the picture as it is where there is none.
        channels: How many weight channels to draw at most, where `channel` is None.
        departures: Draw weights less their mean over the picture: what depends on what the pixel sees.

    Returns:
        A matplotlib Figure outside pyplot's state, so that it can be made in any thread: `figure.savefig('a.png')`.

    Raises:
        ValueError: There is no SAN or no such block or channel, or a pixel is not on the picture; the message says
            what there is.
        ImportError: matplotlib is missing.
    """
    _new_figure(1, 1)  # an error before the work, not after it
    net = _find(model)
    if block is None:
        block = ([name for name, found in net.blocks.items() if found.stride <= 4] or list(net.blocks))[-1]
    at_block, shown = _find_block(net, block), _show(model, net, image, size)
    points = _points(shown, pixels, grid)
    places = [shown.on_map(point, at_block.stride) for point in points]
    seen = _look(model, shown, at_block, departures)
    if grid is not None:
        return _grid_figure(shown, at_block, places, grid if isinstance(grid, int) else grid[0], seen, channel)
    return _pixel_figure(shown, at_block, places, points, seen, channel, channels)


def _at(shown: _Shown, block: _Block, places: Sequence[tuple[int, int]], weights: Tensor) -> Tensor:
    return weights[[row * shown.on_stride(block.stride)[1] + column for row, column in places]]


def _pixel_figure(shown: _Shown, block: _Block, places: Sequence[tuple[int, int]], points: Pixels, seen: _Seen,
                  channel: int | Sequence[int] | None, channels: int) -> Figure:
    chosen, drawn = (_at(shown, block, places, weights) for weights in (seen.weights, seen.drawn))
    indices, departures = _channels(channel, chosen, channels), seen.departure()
    departing = seen.drawn is not seen.weights
    parts = drawn if departing else torch.cat([drawn, seen.mean[None]])
    mean_scale = _scale_of(parts.mean(1), seen.signed, seen.label)
    scale = _scale_of(parts[:, indices], seen.signed, seen.label)
    rows, columns, tile = len(points) + (not departing), 2 + len(indices), 1.2
    tall = max(rows * (tile + 0.35), 3.8)
    wide = min(max((tall - 1) * shown.original.shape[1] / shown.original.shape[0], 3), 6)
    figure = _new_figure(wide + columns * tile + 1.2, tall + 0.6)
    figure.suptitle(_describe(block) + f', {len(seen.mean)} weight channels', fontsize=LABEL + 2)
    left, right = figure.subfigures(1, 2, width_ratios=[wide, columns * tile + 1.2])

    axes = left.add_subplot()
    _overlays(axes, shown, block, places, drawn.mean(1), mean_scale)
    axes.set_title('mean over the channels, on the pixels weighed', fontsize=LABEL)
    _bar(left, mean_scale, axes, location='bottom', shrink=0.8, aspect=40)
    grid, grid_axes = right.add_gridspec(rows, columns), []

    def uses(tile: Tensor) -> str:
        total = '' if block.attn.is_pairwise else f', sum {tile.sum():+.2f}'
        return f'uses {effective_size(tile):.0f}{total}'

    def draw_row(row: int, tiles: Tensor, notes: Sequence[str], colour: str | None = None) -> None:
        for column, index in enumerate([None, *indices]):
            name = 'mean' if index is None else f'channel {index}'
            grid_axes.append(right.add_subplot(grid[row, 1 + column]))
            _tile(grid_axes[-1], tiles.mean(0) if index is None else tiles[index],
                  mean_scale if index is None else scale, name if row == 0 else '', notes[column],
                  colour if index is None else None)

    for row, (at, point) in enumerate(zip(places, points, strict=True)):
        colour = COLOURS[row % len(COLOURS)]
        _rectangle(axes, _extent(shown, block, at), colour, linewidth=2)
        axes.plot(*point, '+', color='#00e676', markersize=7)
        mosaic, half = _mosaic(shown, block, at), block.stride / 2
        covers = right.add_subplot(grid[row, 0])
        covers.imshow(mosaic)
        centre = (len(mosaic) - 1) / 2
        _rectangle(covers, (centre - half, centre + half, centre + half, centre - half), '#00e676', linewidth=1)
        _bare(covers, 'covers' if row == 0 else '', colour)
        covers.set_ylabel(f'x {point[0]:.0f}, y {point[1]:.0f}', fontsize=SMALL)
        departure = _at(shown, block, [at], departures).item()
        covers.set_xlabel(f'departs by {departure:.0%}', fontsize=SMALL, labelpad=2)
        mean = chosen[row].mean(0)
        draw_row(row, drawn[row], [''] * (1 + len(indices)) if departing else
                 [uses(mean), *(uses(chosen[row, index]) for index in indices)], colour)
    if not departing:
        text = _bare(right.add_subplot(grid[rows - 1, 0]))
        text.axis('off')
        text.text(0.5, 0.5, f'mean over the\npicture, which\nmakes up {seen.fixed():.0%}\nof the weights\n(of their square)',
                  ha='center', va='center', fontsize=SMALL, transform=text.transAxes)
        draw_row(rows - 1, seen.mean, [uses(seen.mean.mean(0)), *(uses(seen.mean[index]) for index in indices)])
    _bar(right, scale, grid_axes, location='right', shrink=0.7, aspect=30)
    return figure


def _grid_figure(shown: _Shown, block: _Block, places: Sequence[tuple[int, int]], rows: int, seen: _Seen,
                 channel: int | Sequence[int] | None) -> Figure:
    groups, what = len(seen.mean), 'mean over the channels'
    indices = list(range(groups)) if channel is None else _channels(channel, seen.weights, 1)
    if channel is not None:
        what = f'weight channel {indices[0]}' if len(indices) == 1 else f'mean over channels {indices}'
    tiles, k = _at(shown, block, places, seen.drawn)[:, indices].mean(1), block.attn.kernel_size
    scale = _scale_of(tiles, seen.signed, seen.label)
    aspect = shown.original.shape[0] / shown.original.shape[1]
    figure = _new_figure(10.5, 2 * (4.3 * aspect + 0.4) + 0.4)
    figure.suptitle(_describe(block) + f', {groups} weight channels', fontsize=LABEL + 2)
    (left, enlarged), (used, departs) = figure.subplots(2, 2)
    _overlays(left, shown, block, places, tiles, scale)
    left.set_title(f'{what}, on the pixels weighed', fontsize=LABEL)
    _bar(figure, scale, enlarged, shrink=0.8)

    columns = len(places) // rows
    field = torch.full((rows, k + 1, columns, k + 1), float('nan'))
    field[:, :k, :, :k] = tiles.unflatten(0, (rows, columns)).transpose(1, 2)
    enlarged.imshow(field.flatten(2).flatten(0, 1)[:-1, :-1].numpy(), **scale.options(), aspect='auto')
    enlarged.set_box_aspect(aspect)
    _bare(enlarged)
    enlarged.set_title('the same, footprint by footprint', fontsize=LABEL)

    size = shown.on_stride(block.stride)
    for axes, values, title, label in (
            (used, effective_size(seen.weights[:, indices]).mean(1), 'neighbours used', f'of {k * k}'),
            (departs, seen.departure(), 'what depends on the content', '|w - mean over the picture| / |mean|')):
        axes.imshow(_pale(shown.original))
        measured = _Scale('viridis', values.min().item(), values.max().item(), label)
        axes.imshow(values.unflatten(0, size).numpy(), **measured.options(), extent=shown.box(0, 0, *size, block.stride),
                    alpha=0.8)
        _whole(axes, shown, title)
        _bar(figure, measured, axes, shrink=0.8)
    return figure


# --- Roll-out and features over the stages ---------------------------------------------------------------------------

def _reach(net: _Net, last: _Block) -> int:
    """How many picture pixels the footprints up to `last` reach beyond the edges of its pixel, on each side."""
    reach = 0
    for block in net.blocks.values():
        reach += block.stride * geometry.padding(block.attn.kernel_size, block.attn.dilation)
        if block is last:
            break
    return reach


def _half(mass: Tensor, shown: _Shown, block: _Block, at: tuple[int, int]) -> float:
    """The radius in pixels of the picture as given within which half of the mass lies, around a pixel of the map."""
    (height, width), (tall, wide) = mass.shape, shown.original.shape[:2]
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    y, x = (y - (at[0] + 0.5) * block.stride) * tall / height, (x - (at[1] + 0.5) * block.stride) * wide / width
    distance, order = (y[:, None].square() + x.square()).sqrt().flatten().sort()
    within = mass.flatten()[order].cumsum(0)
    return distance[int((within < within[-1] / 2).sum().clamp(max=len(within) - 1))].item()


def _draw_mass(axes: Axes, shown: _Shown, mass: Tensor, title: str) -> None:
    """Mass (H', W') over the picture; square roots, as half of it may lie in a few pixels."""
    from matplotlib import colormaps
    strength = (mass / mass.max().clamp(min=1e-30)).sqrt().numpy()
    colours = colormaps['inferno'](strength)
    colours[..., 3] = 0.9 * strength ** 0.5
    axes.imshow(_pale(shown.original))
    axes.imshow(colours, extent=shown.box(0, 0, *mass.shape, 1), interpolation='bilinear')
    _whole(axes, shown, title)


def rollout_figure(
        model: nn.Module,
        image: Picture,
        pixels: Pixels | None = None,
        grid: int | tuple[int, int] | None = None,
        *,
        block: BlockId | None = None,
        size: int | None = None,
        residual: float | None = None,
        measure: str = 'weights',
) -> Figure:
    """Draws where the features of pixels come from: `attention_rollout`, back to the picture.

    For pixels: a row for each, a column for each stage, rolled out from the stage's last block; the last row is for
    the mean of all pixels. A solid frame is the pixel of the stage's map, a dashed one all that its footprints can
    reach; below stands the radius around the pixel within which half of the mass lies, in pixels of the picture. For a
    grid: each of its pixels from one block. Brightness is the square root of the mass, in each panel relative to its
    largest.

    Args:
        model, image, pixels, grid, size: As for `footprint_figure`.
        block: Where to start for a grid, and the last one to draw for pixels; None is the last of all.
        residual, measure: As for `attention_rollout`, which says what is drawn and what it leaves out.

    Returns:
        A matplotlib Figure outside pyplot's state.

    Raises:
        ValueError, ImportError: As for `footprint_figure`.
    """
    _new_figure(1, 1)
    net = _find(model)
    last, shown = _find_block(net, block), _show(model, net, image, size)
    points = _points(shown, pixels, grid)
    with _evaluating(model):
        steps = _trace(net, shown.images, last, residual, measure)
    attended = [number for number, step in enumerate(steps) if isinstance(step, _Attended)]
    blocks = dict(zip(net.blocks.values(), attended, strict=False))

    def roll(start: _Block, place: tuple[int, int] | None) -> Tensor:
        return _roll_back(steps[:blocks[start] + 1], None if place is None else [place])[0, 0].cpu()

    def draw(axes: Axes, start: _Block, point: tuple[float, float], title: str) -> None:
        at = shown.on_map(point, start.stride)
        mass, reach = roll(start, at), _reach(net, start) / start.stride
        _draw_mass(axes, shown, mass, title)
        _rectangle(axes, shown.box(at[0], at[1], at[0] + 1, at[1] + 1, start.stride), COLOURS[0], linewidth=1)
        _rectangle(axes, shown.box(at[0] - reach, at[1] - reach, at[0] + 1 + reach, at[1] + 1 + reach, start.stride),
                   COLOURS[0], linewidth=1.2, linestyle='--')
        axes.set_xlabel(f'half within {_half(mass, shown, start, at):.0f} px', fontsize=SMALL, labelpad=2)

    kept = ', '.join(f'{steps[number].kept.mean():.0%}' for number in attended)
    how = f'residual connections keep {kept}'
    how = how if len(how) < 100 else f'residual connections keep {steps[attended[0]].kept.mean():.0%} in the first, ' \
        f'{steps[attended[-1]].kept.mean():.0%} in the last block'
    aspect, side = shown.original.shape[0] / shown.original.shape[1], 2.2
    if grid is not None:
        rows = grid if isinstance(grid, int) else grid[0]
        figure = _new_figure(len(points) // rows * side, rows * (side * aspect + 0.3) + 0.6)
        for point, axes in zip(points, figure.subplots(rows, len(points) // rows, squeeze=False).flat, strict=True):
            draw(axes, last, point, '')
        figure.suptitle(f'roll-out from {last.name}, stride {last.stride}; {how}', fontsize=LABEL + 1)
        return figure
    ends = list({found.stage: found for found in blocks}.values())
    figure = _new_figure(len(ends) * side + 0.3, (len(points) + 1) * (side * aspect + 0.3) + 0.6)
    panels = figure.subplots(len(points) + 1, len(ends), squeeze=False)
    for column, start in enumerate(ends):
        for row, point in enumerate(points):
            draw(panels[row, column], start, point, f'{start.name}, stride {start.stride}' if row == 0 else '')
        _draw_mass(panels[-1, column], shown, roll(start, None), '')
    for row, point in enumerate(points):
        panels[row, 0].set_ylabel(f'x {point[0]:.0f}, y {point[1]:.0f}', fontsize=SMALL)
    panels[-1, 0].set_ylabel('mean of all pixels', fontsize=SMALL)
    figure.suptitle(f'attention roll-out; {how}', fontsize=LABEL + 1)
    return figure


def _principal(features: Tensor) -> tuple[Tensor, float]:
    """The three main components of (C, H, W) as colours (H, W, 3), and the share of the variance that they hold."""
    flat = features.flatten(1).T.double()
    flat = flat - flat.mean(0)
    left, spread, _ = torch.linalg.svd(flat, full_matrices=False)
    held = spread[:3].square().sum() / spread.square().sum().clamp(min=1e-30)
    parts = torch.zeros(len(flat), 3, dtype=flat.dtype)
    parts[:, :min(3, len(spread))] = (left * spread)[:, :3]
    parts = parts * torch.where(parts.pow(3).sum(0) < 0, -1, 1)  # the sign is free: the longer tail is made bright
    low, high = torch.quantile(parts, 0.02, 0), torch.quantile(parts, 0.98, 0)
    colours = ((parts - low) / (high - low).clamp(min=1e-30)).clamp(0, 1)
    return colours.unflatten(0, features.shape[1:]), held.item()


def feature_figure(
        model: nn.Module,
        image: Picture,
        *,
        size: int | None = None,
        channels: int = 5,
) -> Figure:
    """Draws the feature maps that the stages hand on, a row for each stage.

    The length of the feature vector at each pixel; its three main components as red, green and blue (over this
    picture: alike colours are alike features within a row, and mean nothing across rows); and the channels that vary
    most over the picture, each on its own scale from black (least) to yellow.

    Args:
        model, image, size: As for `footprint_figure`.
        channels: How many channels to draw.

    Returns:
        A matplotlib Figure outside pyplot's state.

    Raises:
        ValueError, ImportError: As for `footprint_figure`.
    """
    _new_figure(1, 1)
    if channels < 0:
        raise ValueError(f'channels must be at least 0, got {channels}')
    net = _find(model)
    shown = _show(model, net, image, size)
    maps: list[Tensor] = []
    with _evaluating(model):
        _run(net, shown.images, [(stage.get_submodule('act'), False, lambda x: maps.append(x[0].float().cpu()))
                                 for stage in net.stages])
    aspect, side = shown.original.shape[0] / shown.original.shape[1], 1.7
    figure = _new_figure((3 + channels) * side, len(maps) * (side * aspect + 0.3) + 0.5)
    panels = figure.subplots(len(maps), 3 + channels, squeeze=False)
    for number, (row, features) in enumerate(zip(panels, maps, strict=True)):
        stride = 2 ** round(float(np.log2(shown.scaled.shape[0] / features.shape[1])))
        extent = shown.box(0, 0, *features.shape[1:], stride)
        colours, held = _principal(features)
        first = number == 0
        row[0].imshow(shown.original)
        row[1].imshow(features.norm(dim=0).numpy(), cmap='inferno', extent=extent)
        row[2].imshow(colours.numpy(), extent=extent)
        for axes, title in zip(row, ('picture', 'length', 'main components'), strict=False):
            _whole(axes, shown, title if first else '')
        row[0].set_ylabel(f'stage {number}: stride {stride}\n{len(features)} channels', fontsize=SMALL)
        row[2].set_xlabel(f'{held:.0%} of the variance', fontsize=SMALL, labelpad=2)
        varied = features.flatten(1).var(1).argsort(descending=True)[:channels].tolist()
        for axes, index in zip(row[3:], varied, strict=False):
            axes.imshow(features[index].numpy(), cmap='inferno', extent=extent)
            _whole(axes, shown)
            axes.set_xlabel(f'channel {index}', fontsize=SMALL, labelpad=2)
    return figure
