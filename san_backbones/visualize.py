"""Seeing attention: figures of a block's footprint weights, of the roll-out over the stages, and of feature maps.

Figures are matplotlib's (extra 'visualize') and stand outside pyplot's state: they can be made in any thread and
without a screen. What they draw comes from `attention_maps`, whose functions are here too.

Pixels are (x, y) on the picture as it was given, x from the left and y from the top, both from 0. The tensor functions
`attention_weights` and `attention_rollout` take (row, column) on the map of a block instead.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from .attention_maps import (
    BlockId,
    _Attended,
    _Block,
    _evaluating,
    _find,
    _find_block,
    _neighbours,
    _Net,
    _roll_back,
    _run,
    _trace,
    attention_blocks,
    attention_rollout,
    attention_weights,
    effective_size,
    footprint_weights,
)
from .ops import geometry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['attention_blocks', 'attention_rollout', 'attention_weights', 'effective_size', 'feature_figure',
           'footprint_figure', 'footprint_weights', 'rollout_figure']

Pixels = Sequence[tuple[float, float]]
Picture = str | PathLike[str] | Image.Image | np.ndarray
Extent = tuple[float, float, float, float]


# --- Pictures --------------------------------------------------------------------------------------------------------

class _Shown(NamedTuple):
    """A picture as it was given (H, W, 3), as it was scaled (H', W', 3), both uint8, and as the model takes it."""
    original: np.ndarray
    scaled: np.ndarray
    images: Tensor

    def on_map(self, pixel: tuple[float, float], stride: int) -> tuple[int, int]:
        """(x, y) on the picture to (row, column) on a map; pixels at its end that pooling dropped count to the last."""
        (height, width), (tall, wide) = self.scaled.shape[:2], self.original.shape[:2]
        row, column = (pixel[1] + 0.5) * height / tall / stride, (pixel[0] + 0.5) * width / wide / stride
        return min(int(row), height // stride - 1), min(int(column), width // stride - 1)

    def on_stride(self, stride: int) -> tuple[int, int]:
        """Height and width of a map."""
        return self.scaled.shape[0] // stride, self.scaled.shape[1] // stride

    def box(self, top: float, left: float, bottom: float, right: float, stride: int) -> Extent:
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


def _cfg(model: nn.Module) -> Mapping[str, Any]:
    found = (getattr(module, 'pretrained_cfg', None) for module in model.modules())
    return next((cfg for cfg in found if isinstance(cfg, Mapping)), {})


def _statistics(model: nn.Module) -> tuple[Sequence[float], Sequence[float], bool]:
    """Mean and standard deviation of the model's images, of channels in [0, 1], and whether they are BGR."""
    preprocessor = getattr(model, 'data_preprocessor', None)  # of OpenMMLab's models, which read pictures as BGR
    if preprocessor is not None and hasattr(preprocessor, 'mean') and hasattr(preprocessor, 'std'):
        # MMDetection's and MMSegmentation's, MMEngine's, MMPretrain's
        turned = next((getattr(preprocessor, name) for name in ('_channel_conversion', 'channel_conversion', 'to_rgb')
                       if hasattr(preprocessor, name)), False)
        mean, std = ((values.flatten() / 255).tolist() for values in (preprocessor.mean, preprocessor.std))
        return mean, std, not turned
    cfg = _cfg(model)
    return cfg.get('mean') or IMAGENET_DEFAULT_MEAN, cfg.get('std') or IMAGENET_DEFAULT_STD, False


def _show(model: nn.Module, net: _Net, image: Picture, size: int | None) -> _Shown:
    picture, cfg = _read(image), _cfg(model)
    original = np.asarray(picture)
    if size is None and cfg.get('input_size'):
        size = round(min(cfg['input_size'][1:]) / (cfg.get('crop_pct') or 1))
    if size is not None:
        if size < 1:
            raise ValueError(f'size must be a number of pixels, at least 1, got {size}')
        scale = size / min(picture.size)
        picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))),
                                 Image.Resampling.BILINEAR)
    weight = net.stem.get_parameter('conv.weight')
    mean, std, bgr = _statistics(model)
    images = torch.from_numpy(np.array(picture)).to(weight.device).permute(2, 0, 1)[None] / 255
    images = images.flip(1) if bgr else images
    images = (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]
    channels = weight.shape[1]
    if channels not in (1, 3):
        raise ValueError(f'the model takes images of {channels} channels; pictures can be shown to models of 3 or 1')
    images = images.mean(1, keepdim=True) if channels == 1 else images
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
    points = [(wide // 2, tall // 2)] if pixels is None else list(pixels)
    for point in points:
        if np.shape(point) != (2,):
            raise ValueError(f'pixels must be a list of (x, y), got {pixels!r}')
        if not -0.5 <= point[0] < wide - 0.5 or not -0.5 <= point[1] < tall - 0.5:
            raise ValueError(f'pixel (x, y) = {tuple(point)} is not on the picture: x runs from 0 to {wide - 1}, '
                             f'y from 0 to {tall - 1}')
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


def _bar(figure: Any, scale: _Scale, axes: Any, **options: Any) -> None:
    """A colour bar; of one value only where all are alike."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator
    colours = ScalarMappable(Normalize(scale.least, scale.most), scale.name)
    bar = figure.colorbar(colours, ax=axes, ticks=MaxNLocator(5), **options)
    bar.formatter.set_useOffset(False)
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
    channels = np.atleast_1d(channel).tolist()
    wrong = [index for index in channels if not isinstance(index, int) or not 0 <= index < groups]
    if wrong or not channels:
        raise ValueError(f'channel must be a weight channel of the block, 0 to {groups - 1}, or several of them, got '
                         f'{channel!r}')
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
    """Weights (k, k) on the map (height, width), NaN elsewhere; mirrored ones add up where they come from."""
    k, d = block.attn.kernel_size, block.attn.dilation
    pad = geometry.padding(k, d)
    rows = geometry.reflection_index(height, pad)[at[0] + d * torch.arange(k)]
    columns = geometry.reflection_index(width, pad)[at[1] + d * torch.arange(k)]
    cells = (rows[:, None], columns[None])
    spread = torch.zeros(height, width).index_put_(cells, weights, accumulate=True)
    covered = torch.zeros(height, width, dtype=torch.bool).index_put_(cells, torch.tensor(True))
    return torch.where(covered, spread, float('nan')).numpy()


def _extent(shown: _Shown, block: _Block, at: tuple[int, int]) -> Extent:
    """The true extent of a footprint on the picture (left, right, bottom, top), which may reach beyond it."""
    reach = geometry.padding(block.attn.kernel_size, block.attn.dilation)
    return shown.box(at[0] - reach, at[1] - reach, at[0] + reach + 1, at[1] + reach + 1, block.stride)


def _rectangle(axes: Axes, extent: Extent, colour: str, **options: Any) -> None:
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
        return (self.weights - self.mean).flatten(1).norm(dim=1) / self.mean.norm().clamp(min=1e-30)

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
    `|w - mean| / |mean|`.

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
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=[wide, columns * tile + 1.2]))

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
        words = f'mean over the\npicture, which\nmakes up {seen.fixed():.0%}\nof the weights\n(of their square)'
        text.text(0.5, 0.5, words, ha='center', va='center', fontsize=SMALL, transform=text.transAxes)
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
        axes.imshow(values.unflatten(0, size).numpy(), **measured.options(), alpha=0.8,
                    extent=shown.box(0, 0, size[0], size[1], block.stride))
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


def _draw_mass(axes: Axes, shown: _Shown, mass: Tensor, cell: int, title: str) -> None:
    """Mass (H', W') over the picture, averaged over cells of cell x cell pixels; square roots, as most is in few."""
    from matplotlib import colormaps
    mass = torch.nn.functional.avg_pool2d(mass[None], cell, ceil_mode=True, count_include_pad=False)[0]
    strength = (mass / mass.max().clamp(min=1e-30)).sqrt().numpy()
    colours = colormaps['inferno'](strength)
    colours[..., 3] = np.clip(1.5 * strength, 0, 0.85)
    axes.imshow(_pale(shown.original))
    axes.imshow(colours, extent=shown.box(0, 0, mass.shape[0], mass.shape[1], cell), interpolation='bilinear')
    _whole(axes, shown, title)


def _zoom(axes: Axes, extent: Extent, shown: _Shown) -> None:
    """Shows an extent and a margin, moved onto the picture where they reach beyond it."""
    left, right, bottom, top = extent
    tall, wide = shown.original.shape[:2]
    width, height = min(1.12 * (right - left), wide), min(1.12 * (bottom - top), tall)
    x = min(max((left + right - width) / 2, -0.5), wide - 0.5 - width)
    y = min(max((top + bottom - height) / 2, -0.5), tall - 0.5 - height)
    axes.set_xlim(x, x + width)
    axes.set_ylim(y + height, y)


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
    attended = {number: step.kept.mean().item() for number, step in enumerate(steps) if isinstance(step, _Attended)}
    blocks = dict(zip(net.blocks.values(), attended, strict=False))

    def roll(start: _Block, place: tuple[int, int] | None) -> Tensor:
        return _roll_back(steps[:blocks[start] + 1], None if place is None else [place])[0, 0].cpu()

    def draw(axes: Axes, start: _Block, point: tuple[float, float], title: str) -> None:
        at = shown.on_map(point, start.stride)
        mass, reach = roll(start, at), _reach(net, start) / start.stride
        _draw_mass(axes, shown, mass, max(1, start.stride // 4), title)
        _rectangle(axes, shown.box(at[0], at[1], at[0] + 1, at[1] + 1, start.stride), COLOURS[0], linewidth=1)
        box = shown.box(at[0] - reach, at[1] - reach, at[0] + 1 + reach, at[1] + 1 + reach, start.stride)
        _rectangle(axes, box, COLOURS[0], linewidth=1.2, linestyle='--')
        _zoom(axes, box, shown)
        axes.set_xlabel(f'half within {_half(mass, shown, start, at):.0f} px', fontsize=SMALL, labelpad=2)

    kept = [f'{share:.0%}' for share in attended.values()]
    kept = kept if len(kept) < 9 else [*kept[:3], '...', *kept[-3:]]
    how = f'residual connections keep {", ".join(kept)}'
    aspect, side = shown.original.shape[0] / shown.original.shape[1], 2.2
    if grid is not None:
        rows = grid if isinstance(grid, int) else grid[0]
        figure = _new_figure(len(points) // rows * side, rows * (side * aspect + 0.3) + 0.6)
        for point, axes in zip(points, figure.subplots(rows, len(points) // rows, squeeze=False).flat, strict=True):
            draw(axes, last, point, f'x {point[0]:.0f}, y {point[1]:.0f}')
        figure.suptitle(f'roll-out from {last.name}, stride {last.stride}; {how}', fontsize=LABEL + 1)
        return figure
    ends = list({found.stage: found for found in blocks}.values())
    figure = _new_figure(len(ends) * side + 0.3, (len(points) + 1) * (side * aspect + 0.3) + 0.6)
    panels = figure.subplots(len(points) + 1, len(ends), squeeze=False)
    for column, start in enumerate(ends):
        for row, point in enumerate(points):
            draw(panels[row, column], start, point, f'{start.name}, stride {start.stride}' if row == 0 else '')
        _draw_mass(panels[-1, column], shown, roll(start, None), max(4, start.stride // 4), '')
    for row, point in enumerate(points):
        panels[row, 0].set_ylabel(f'x {point[0]:.0f}, y {point[1]:.0f}', fontsize=SMALL)
    panels[-1, 0].set_ylabel('mean of all pixels', fontsize=SMALL)
    figure.suptitle(f'attention roll-out; {how}', fontsize=LABEL + 1)
    return figure


def _principal(features: Tensor) -> tuple[Tensor, float]:
    """The three main components of (C, H, W) as colours (H, W, 3), and the share of the variance that they hold."""
    flat = features.flatten(1).T
    flat = flat - flat.mean(0)
    basis = torch.randn(flat.shape[1], 8, generator=torch.Generator().manual_seed(0))
    for _ in range(10):  # orthogonal iteration: a full decomposition of 2048 channels takes seconds
        basis = torch.linalg.qr(flat.T @ (flat @ basis))[0]
    left, spread, _ = torch.linalg.svd(flat @ basis, full_matrices=False)
    held = spread[:3].square().sum() / flat.square().sum().clamp(min=1e-30)
    parts = torch.nn.functional.pad(left * spread, (0, 3))[:, :3]  # a map of one or two pixels has fewer
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
    for number, (row, features, stride) in enumerate(zip(panels, maps, net.strides, strict=True)):
        extent = shown.box(0, 0, features.shape[1], features.shape[2], stride)
        colours, held = _principal(features)
        first = number == 0
        row[0].imshow(shown.original)
        row[1].imshow(features.norm(dim=0).numpy(), cmap='inferno', extent=extent)
        row[2].imshow(colours.numpy(), extent=extent)
        for axes, title in zip(row, ('picture', 'length', 'main components'), strict=False):
            _whole(axes, shown, title if first else '')
        row[0].set_ylabel(f'stage {number}: stride {stride}\n{len(features)} channels', fontsize=SMALL)
        row[2].set_xlabel(f'{held:.0%} of the variance', fontsize=SMALL, labelpad=2)
        varied = features.flatten(1).var(1, correction=0).argsort(descending=True)[:channels].tolist()
        for axes, index in zip(row[3:], varied, strict=False):
            axes.imshow(features[index].numpy(), cmap='inferno', extent=extent)
            _whole(axes, shown)
            axes.set_xlabel(f'channel {index}', fontsize=SMALL, labelpad=2)
    return figure
