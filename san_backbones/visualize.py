"""Draws the footprint weights of a block, the attention roll-out over the stages, and feature maps.

The figures are matplotlib's (extra 'visualize') and do not use pyplot's state: they can be made in any thread and
without a screen. The data come from `attention_maps`, whose functions can be imported from here too.

Pixels are (x, y) on the given picture, x from the left and y from the top, both from 0. The tensor functions
`attention_weights` and `attention_rollout` take (row, column) on the feature map of a block instead.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from . import _pictures
from .attention_maps import (
    BlockId,
    Attended,
    AttentionBlock,
    evaluating,
    find_network,
    find_block,
    fine_block,
    neighbours,
    Network,
    roll_back,
    run_hooked,
    trace,
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

class Shown(NamedTuple):
    """A picture as given (H, W, 3) and scaled (H', W', 3), both uint8, and as the model's input."""
    original: np.ndarray
    scaled: np.ndarray
    images: Tensor

    def on_map(self, pixel: tuple[float, float], stride: int) -> tuple[int, int]:
        """(x, y) on the picture to (row, column) on a map; pixels dropped by pooling at the edge go to the last one."""
        (height, width), (tall, wide) = self.scaled.shape[:2], self.original.shape[:2]
        row, column = (pixel[1] + 0.5) * height / tall / stride, (pixel[0] + 0.5) * width / wide / stride
        return min(int(row), height // stride - 1), min(int(column), width // stride - 1)

    def on_stride(self, stride: int) -> tuple[int, int]:
        """Height and width of a map."""
        return self.scaled.shape[0] // stride, self.scaled.shape[1] // stride

    def box(self, top: float, left: float, bottom: float, right: float, stride: int) -> Extent:
        """Edges in pixels of a map to edges on the picture (left, right, bottom, top), which is matplotlib's extent.

        matplotlib has the centre of the first pixel at 0 and its edge at -0.5.
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
    if isinstance(image, torch.Tensor):
        raise ValueError('expected a path, a PIL picture or a uint8 array (H, W, 3), RGB, got a tensor '
                         f'{list(image.shape)}')
    if not isinstance(image, Image.Image):
        with Image.open(image) as file:
            return _pictures.upright(file)
    return _pictures.upright(image)


def _cfg(model: nn.Module) -> Mapping[str, Any]:
    found = (getattr(module, 'pretrained_cfg', None) for module in model.modules())
    return next((cfg for cfg in found if isinstance(cfg, Mapping)), {})


def _statistics(model: nn.Module) -> tuple[Sequence[float], Sequence[float], bool]:
    """Returns mean and standard deviation for images in [0, 1], and whether the model takes BGR."""
    preprocessor = getattr(model, 'data_preprocessor', None)  # of OpenMMLab models, which read pictures as BGR
    if preprocessor is not None and hasattr(preprocessor, 'mean') and hasattr(preprocessor, 'std'):
        # MMDetection's and MMSegmentation's, MMEngine's, MMPretrain's
        turned = next((getattr(preprocessor, name) for name in ('_channel_conversion', 'channel_conversion', 'to_rgb')
                       if hasattr(preprocessor, name)), False)
        mean, std = ((values.flatten() / 255).tolist() for values in (preprocessor.mean, preprocessor.std))
        return mean, std, not turned
    cfg = _cfg(model)
    return cfg.get('mean') or IMAGENET_DEFAULT_MEAN, cfg.get('std') or IMAGENET_DEFAULT_STD, False


def prepare_picture(model: nn.Module, net: Network, image: Picture, size: int | None) -> Shown:
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
    return Shown(original, np.asarray(picture), images.to(weight.dtype))


def list_points(shown: Shown, pixels: Pixels | None, grid: int | tuple[int, int] | None) -> list[tuple[float, float]]:
    """Returns pixels (x, y) of the picture: the given ones, the centres of the cells of a grid, or the centre."""
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


def new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'san-backbones[visualize]'") from error
    return Figure(figsize=(width, height), layout='constrained')


def _is_untrained(net: Network) -> bool:
    """Whether no norm of the network has ever seen a picture: its statistics are those that it was made with."""
    norms: list[Any] = [module for part in (net.stem, *net.stages) for module in part.modules()
                        if isinstance(getattr(module, 'running_mean', None), Tensor)]
    return bool(norms) and all(not norm.running_mean.any() and (norm.running_var == 1).all() for norm in norms)


def add_title(figure: Figure, net: Network, title: str) -> None:
    """Writes a title; over every panel of an untrained network, and beside the title, that it is untrained."""
    untrained = _is_untrained(net)
    if untrained:
        title += '\nUNTRAINED NETWORK: its weights are random, and what is seen here means nothing'
        for number, axes in enumerate(axes for axes in figure.axes if axes.images):
            axes.text(0.5, 0.5, 'untrained', rotation=30, fontsize=11 if number else 26, color='#c62828', alpha=0.6,
                      ha='center', va='center', transform=axes.transAxes, in_layout=False, zorder=10, clip_on=True)
    figure.suptitle(title, fontsize=LABEL + 2, color='#c62828' if untrained else None)


COLOURS = ('#00b8d9', '#ff7a00', '#8bc34a', '#e040fb', '#ffd600', '#f44336', '#3f8cff', '#a1887f')
SMALL, LABEL = 7, 8  # points
DISTANCES_FROM = (3, 4)  # rows and columns of pixels whose distances are averaged


def remove_ticks(axes: Axes, title: str = '', colour: str | None = None) -> Axes:
    """Removes the ticks, and colours the frame if a colour is given."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=SMALL, pad=3)
    for spine in axes.spines.values():
        spine.set_color(colour or '0.7')
        spine.set_linewidth(2 if colour else 0.5)
    return axes


def _lighten(picture: np.ndarray) -> np.ndarray:
    """Makes a picture grey and light, so that colours drawn over it are visible."""
    grey = picture.astype(np.float32).mean(2, keepdims=True)
    return np.repeat((255 - 0.65 * (255 - grey)).astype(np.uint8), 3, axis=2)


class Scale(NamedTuple):
    """Maps values from `least` to `most` to colours; signed values have white in the middle."""
    name: str
    least: float
    most: float
    label: str

    def options(self) -> dict[str, Any]:
        return dict(cmap=self.name, vmin=self.least, vmax=self.most, interpolation='nearest')

    def overlay(self, values: np.ndarray) -> np.ndarray:
        """(H, W) to RGBA; transparent for NaN and for signed values near 0."""
        from matplotlib import colormaps
        span = (np.nan_to_num(values) - self.least) / max(self.most - self.least, 1e-30)
        colours = colormaps[self.name](np.clip(span, 0, 1))
        signed = self.least == -self.most
        colours[..., 3] = np.clip(0.2 + 0.7 * np.abs(2 * span - 1) if signed else 0.75, 0, 0.9) * ~np.isnan(values)
        return colours


def _scale_of(values: Tensor, signed: bool, label: str) -> Scale:
    most = values.abs().max().item()
    return Scale('RdBu_r', -most, most, label) if signed else Scale('inferno', values.min().item(), most, label)


def add_colour_bar(figure: Any, scale: Scale, axes: Any, **options: Any) -> None:
    """Adds a colour bar; it also works if all values are equal."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator
    colours = ScalarMappable(Normalize(scale.least, scale.most), scale.name)
    bar = figure.colorbar(colours, ax=axes, ticks=MaxNLocator(5), **options)
    bar.formatter.set_useOffset(False)
    bar.set_label(scale.label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)


# --- Footprints ------------------------------------------------------------------------------------------------------

def _most_different(weights: Tensor, count: int) -> list[int]:
    """Selects the `count` weight channels of (P, G, k, k) that differ most: first the one with the smallest effective
    size, then repeatedly the one farthest from those selected."""
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
        return _most_different(weights, count)
    channels = np.atleast_1d(channel).tolist()
    wrong = [index for index in channels if not isinstance(index, int) or not 0 <= index < groups]
    if wrong or not channels:
        raise ValueError(f'channel must be a weight channel of the block, 0 to {groups - 1}, or several of them, got '
                         f'{channel!r}')
    return channels


def make_mosaic(shown: Shown, block: AttentionBlock, at: tuple[int, int]) -> np.ndarray:
    """Assembles the picture that a footprint covers: stride x stride pixels for each of its k x k neighbours."""
    stride, (height, width) = block.stride, shown.on_stride(block.stride)
    cells = torch.from_numpy(shown.scaled[:height * stride, :width * stride].copy())
    cells = cells.unflatten(1, (width, stride)).unflatten(0, (height, stride)).permute(1, 3, 4, 0, 2).flatten(0, 2)
    k = block.attn.kernel_size
    near = neighbours(cells[None], torch.tensor([at]), k, block.attn.dilation)[0, 0]
    return near.unflatten(0, (stride, stride, 3)).permute(3, 0, 4, 1, 2).reshape(k * stride, k * stride, 3).numpy()


def _spread(weights: Tensor, block: AttentionBlock, at: tuple[int, int], height: int, width: int) -> np.ndarray:
    """Puts weights (k, k) on the map (height, width), NaN elsewhere; mirrored weights are added to their source."""
    k, d = block.attn.kernel_size, block.attn.dilation
    pad = geometry.padding(k, d)
    rows = geometry.reflection_index(height, pad)[at[0] + d * torch.arange(k)]
    columns = geometry.reflection_index(width, pad)[at[1] + d * torch.arange(k)]
    cells = (rows[:, None], columns[None])
    spread = torch.zeros(height, width).index_put_(cells, weights, accumulate=True)
    covered = torch.zeros(height, width, dtype=torch.bool).index_put_(cells, torch.tensor(True))
    return torch.where(covered, spread, float('nan')).numpy()


def _extent(shown: Shown, block: AttentionBlock, at: tuple[int, int]) -> Extent:
    """Returns the extent of a footprint on the picture (left, right, bottom, top); it may reach beyond the border."""
    reach = geometry.padding(block.attn.kernel_size, block.attn.dilation)
    return shown.box(at[0] - reach, at[1] - reach, at[0] + reach + 1, at[1] + reach + 1, block.stride)


def draw_rectangle(axes: Axes, extent: Extent, colour: str, **options: Any) -> None:
    from matplotlib.patches import Rectangle
    left, right, bottom, top = extent
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, **options))


def describe_block(block: AttentionBlock) -> str:
    layer = block.attn
    dilation = f', dilation {layer.dilation}' if layer.dilation > 1 else ''
    form = 'pairwise' if layer.is_pairwise else 'patchwise'
    return (f'{block.name}: {form} {layer.relation}, footprint {layer.kernel_size} x {layer.kernel_size}{dilation}, '
            f'stride {block.stride}')


def _draw_tile(axes: Axes, weights: Tensor, scale: Scale, title: str, note: str, colour: str | None = None) -> None:
    axes.imshow(weights.numpy(), **scale.options())
    centre = weights.shape[-1] // 2
    axes.plot(centre, centre, '+', color='#00e676', markersize=5, markeredgewidth=1.2)
    remove_ticks(axes, title, colour)
    axes.set_xlabel(note, fontsize=SMALL, labelpad=2)


def _draw_overlays(axes: Axes, shown: Shown, block: AttentionBlock, cells: Sequence[tuple[int, int]], tiles: Tensor,
                   scale: Scale) -> None:
    """Draws tiles (P, k, k) over the pixels that they weigh; where tiles overlap, the most extreme value."""
    height, width = shown.on_stride(block.stride)
    axes.imshow(_lighten(shown.original))
    heat, middle = np.full((height, width), np.nan, np.float32), (scale.least + scale.most) / 2
    for at, tile in zip(cells, tiles, strict=True):
        spread = _spread(tile, block, at, height, width)
        more = np.isnan(heat) | (np.abs(spread - middle) > np.abs(heat - middle))
        heat = np.where(more & ~np.isnan(spread), spread, heat)
    axes.imshow(scale.overlay(heat), extent=shown.box(0, 0, height, width, block.stride), interpolation='nearest')
    limit_to_picture(axes, shown)


def limit_to_picture(axes: Axes, shown: Shown, title: str = '') -> None:
    """Limits the axes to the picture."""
    remove_ticks(axes)
    axes.set_title(title, fontsize=LABEL)
    axes.set_xlim(-0.5, shown.original.shape[1] - 0.5)
    axes.set_ylim(shown.original.shape[0] - 0.5, -0.5)


class Seen(NamedTuple):
    """The weights of a block at all pixels (H * W, G, k, k), as computed and as drawn."""
    weights: Tensor
    drawn: Tensor
    signed: bool
    label: str

    @property
    def mean(self) -> Tensor:
        return self.weights.mean(0)

    def departure(self) -> Tensor:
        """|w - mean| / |mean| of every pixel: how much its weights depend on the content."""
        return (self.weights - self.mean).flatten(1).norm(dim=1) / self.mean.norm().clamp(min=1e-30)

    def fixed(self) -> float:
        """The squared mean over the picture as a share of the mean squared weights."""
        return (self.mean.square().sum() / self.weights.square().sum((1, 2, 3)).mean()).item()


def _compute_seen(model: nn.Module, shown: Shown, block: AttentionBlock, departures: bool) -> Seen:
    with evaluating(model):
        weights = attention_weights(model, shown.images, block.name)[0]
    return see_block(weights, block, departures)


def see_block(weights: Tensor, block: AttentionBlock, departures: bool = False) -> Seen:
    weights = weights.cpu().float()
    pairwise, area = block.attn.is_pairwise, block.attn.kernel_size ** 2
    weights = weights * area if pairwise else weights
    label = f'weight, times 1/{area} (1 is average pooling)' if pairwise else 'weight (red adds, blue subtracts)'
    if departures:
        return Seen(weights, weights - weights.mean(0), True, f'{label},\nless its mean over the picture')
    return Seen(weights, weights, not pairwise, label)


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
    and the mean weights over the pixels that they weigh; and a row for each pixel: the part of the picture that its
    footprint covers, the mean of the weights, and single weight channels. The last row is the mean over all pixels of
    the picture: the part of the weights that does not depend on the content. For a grid: the mean weights of its
    pixels; how many neighbours each pixel of the picture uses (`effective_size`, at most k^2); and how far its weights
    depart from their mean over the picture, `|w - mean| / |mean|`.

    Pairwise weights are in multiples of 1 / k^2, the weights of average pooling. Patchwise weights have signs: red is
    positive, blue negative.

    Args:
        model: A SAN, or a module that holds one. It runs in eval mode; its mode is restored afterwards.
        image: A path, a PIL picture, or a uint8 array (H, W, 3), RGB. EXIF orientation is applied. It is normalised
            as the model's `pretrained_cfg` (or OpenMMLab's data_preprocessor) says, else by ImageNet's statistics.
        block: As for `attention_weights`; None is the last block at stride 4.
        pixels: (x, y) on the given picture, not the scaled one: x counts from the left, y from the top, both from 0.
            None is the centre.
        grid: (rows, columns) of evenly spaced pixels, or one number for both, instead of `pixels`.
        channel: The weight channel(s) to draw, 0 to G - 1; for a grid, to average. None draws those that differ most;
            for a grid, the mean of all.
        size: Shorter side in pixels to which the picture is scaled for the model, keeping the aspect ratio. None takes
            it from `pretrained_cfg` (input size / crop_pct), or does not scale if there is none.
        channels: How many weight channels to draw at most if `channel` is None.
        departures: Draw weights minus their mean over the picture: the part that depends on the content.

    Returns:
        A matplotlib Figure outside pyplot's state, so that it can be made in any thread: `figure.savefig('a.png')`.

    Raises:
        ValueError: There is no SAN or no such block or channel, or a pixel is not on the picture; the message lists the
            choices.
        ImportError: matplotlib is missing.
    """
    new_figure(1, 1)  # fails early if matplotlib is missing
    net = find_network(model)
    at_block = fine_block(net) if block is None else find_block(net, block)
    shown = prepare_picture(model, net, image, size)
    points = list_points(shown, pixels, grid)
    cells = [shown.on_map(point, at_block.stride) for point in points]
    seen = _compute_seen(model, shown, at_block, departures)
    if grid is not None:
        figure = _grid_figure(shown, at_block, cells, grid if isinstance(grid, int) else grid[0], seen, channel)
    else:
        figure = _pixel_figure(shown, at_block, cells, points, seen, channel, channels)
    add_title(figure, net, f'{describe_block(at_block)}, {len(seen.mean)} weight channels')
    return figure


def _take(shown: Shown, block: AttentionBlock, cells: Sequence[tuple[int, int]], weights: Tensor) -> Tensor:
    return weights[[row * shown.on_stride(block.stride)[1] + column for row, column in cells]]


def _pixel_figure(shown: Shown, block: AttentionBlock, cells: Sequence[tuple[int, int]], points: Pixels, seen: Seen,
                  channel: int | Sequence[int] | None, channels: int) -> Figure:
    chosen, drawn = (_take(shown, block, cells, weights) for weights in (seen.weights, seen.drawn))
    indices, departures = _channels(channel, chosen, channels), seen.departure()
    departing = seen.drawn is not seen.weights
    parts = drawn if departing else torch.cat([drawn, seen.mean[None]])
    mean_scale = _scale_of(parts.mean(1), seen.signed, f"on the picture and in 'mean':\nmean {seen.label}")
    scale = _scale_of(parts[:, indices], seen.signed, f'in single channels:\n{seen.label}')
    rows, columns, tile = len(points) + (not departing), 2 + len(indices), 1.35
    tall = max(rows * (tile + 0.5), 3.8)
    wide = min(max((tall - 1) * shown.original.shape[1] / shown.original.shape[0], 3), 6)
    figure = new_figure(wide + columns * tile + 1.2, tall + 0.6)
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=[wide, columns * tile + 1.2]))

    axes = left.add_subplot()
    _draw_overlays(axes, shown, block, cells, drawn.mean(1), mean_scale)
    axes.set_title('weights on the pixels that they weigh,\nmean over the channels', fontsize=LABEL)
    add_colour_bar(left, mean_scale, axes, location='bottom', shrink=0.8, aspect=40)
    grid, grid_axes = right.add_gridspec(rows, columns), []

    def counting(tile: Tensor) -> str:
        total = '' if block.attn.is_pairwise else f'\nweights sum to {tile.sum():+.2f}'
        return f'{effective_size(tile):.0f} of {tile.numel()} pixels count{total}'

    def draw_row(row: int, tiles: Tensor, notes: Sequence[str], colour: str | None = None) -> None:
        for column, index in enumerate([None, *indices]):
            name = 'mean' if index is None else f'channel {index}'
            grid_axes.append(right.add_subplot(grid[row, 1 + column]))
            _draw_tile(grid_axes[-1], tiles.mean(0) if index is None else tiles[index],
                  mean_scale if index is None else scale, name if row == 0 else '', notes[column],
                  colour if index is None else None)

    for row, (at, point) in enumerate(zip(cells, points, strict=True)):
        colour = COLOURS[row % len(COLOURS)]
        draw_rectangle(axes, _extent(shown, block, at), colour, linewidth=2)
        axes.plot(*point, '+', color='#00e676', markersize=7)
        mosaic, half = make_mosaic(shown, block, at), block.stride / 2
        covers = right.add_subplot(grid[row, 0])
        covers.imshow(mosaic)
        centre = (len(mosaic) - 1) / 2
        draw_rectangle(covers, (centre - half, centre + half, centre + half, centre - half), '#00e676', linewidth=1)
        remove_ticks(covers, 'what it covers' if row == 0 else '', colour)
        covers.set_ylabel(f'x {point[0]:.0f}, y {point[1]:.0f}', fontsize=SMALL)
        departure = _take(shown, block, [at], departures).item()
        covers.set_xlabel(f'its weights differ by {departure:.0%}\nfrom the mean of all pixels', fontsize=SMALL,
                          labelpad=2)
        mean = chosen[row].mean(0)
        draw_row(row, drawn[row], [''] * (1 + len(indices)) if departing else
                 [counting(mean), *(counting(chosen[row, index]) for index in indices)], colour)
    if not departing:
        text = remove_ticks(right.add_subplot(grid[rows - 1, 0]))
        text.axis('off')
        words = f'mean of all pixels:\n{seen.fixed():.0%} of the weights\n(squared) are the\nsame everywhere'
        text.text(0.5, 0.5, words, ha='center', va='center', fontsize=SMALL, transform=text.transAxes)
        draw_row(rows - 1, seen.mean, [counting(seen.mean.mean(0)), *(counting(seen.mean[index]) for index in indices)])
    add_colour_bar(right, scale, grid_axes, location='right', shrink=0.7, aspect=30)
    return figure


def _grid_figure(shown: Shown, block: AttentionBlock, cells: Sequence[tuple[int, int]], rows: int, seen: Seen,
                 channel: int | Sequence[int] | None) -> Figure:
    groups, what = len(seen.mean), 'mean over the channels'
    indices = list(range(groups)) if channel is None else _channels(channel, seen.weights, 1)
    if channel is not None:
        what = f'weight channel {indices[0]}' if len(indices) == 1 else f'mean over channels {indices}'
    tiles, k = _take(shown, block, cells, seen.drawn)[:, indices].mean(1), block.attn.kernel_size
    scale = _scale_of(tiles, seen.signed, seen.label)
    aspect = shown.original.shape[0] / shown.original.shape[1]
    figure = new_figure(10.5, 2 * (4.3 * aspect + 0.4) + 0.4)
    (left, enlarged), (used, departs) = figure.subplots(2, 2)
    _draw_overlays(left, shown, block, cells, tiles, scale)
    left.set_title(f'weights on the pixels that they weigh, {what}', fontsize=LABEL)
    add_colour_bar(figure, scale, enlarged, shrink=0.8)

    columns = len(cells) // rows
    field = torch.full((rows, k + 1, columns, k + 1), float('nan'))
    field[:, :k, :, :k] = tiles.unflatten(0, (rows, columns)).transpose(1, 2)
    enlarged.imshow(field.flatten(2).flatten(0, 1)[:-1, :-1].numpy(), **scale.options())
    remove_ticks(enlarged)
    enlarged.axis('off')
    enlarged.set_title('the same, each pixel\'s footprint for itself', fontsize=LABEL)

    size = shown.on_stride(block.stride)
    for axes, values, title, label in (
            (used, effective_size(seen.weights[:, indices]).mean(1), 'how many neighbours count', f'of {k * k}'),
            (departs, seen.departure(), 'where the weights depend on what is seen',
             'difference from the mean of all pixels,\nas a part of that mean')):
        axes.imshow(_lighten(shown.original))
        measured = Scale('viridis', values.min().item(), values.max().item(), label)
        axes.imshow(values.unflatten(0, size).numpy(), **measured.options(), alpha=0.8,
                    extent=shown.box(0, 0, size[0], size[1], block.stride))
        limit_to_picture(axes, shown, title)
        add_colour_bar(figure, measured, axes, shrink=0.8)
    return figure


# --- Roll-out and features over the stages ---------------------------------------------------------------------------

def _reach(net: Network, last: AttentionBlock) -> int:
    """Returns how many picture pixels the footprints up to `last` reach beyond its pixel, on each side."""
    reach = 0
    for block in net.blocks.values():
        reach += block.stride * geometry.padding(block.attn.kernel_size, block.attn.dilation)
        if block is last:
            break
    return reach


def _by_distance(mass: Tensor, shown: Shown, block: AttentionBlock, at: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns distances from a pixel of the map, in pixels of the given picture, rising, and the mass up to each."""
    (height, width), (tall, wide) = mass.shape, shown.original.shape[:2]
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    y, x = (y - (at[0] + 0.5) * block.stride) * tall / height, (x - (at[1] + 0.5) * block.stride) * wide / width
    distance, order = (y[:, None].square() + x.square()).sqrt().flatten().sort()
    return distance, mass.flatten()[order].cumsum(0)


def half_mass_radius(mass: Tensor, shown: Shown, block: AttentionBlock, at: tuple[int, int]) -> float:
    """Returns the radius, in pixels of the given picture, around a pixel of the map that contains half of the mass."""
    distance, within = _by_distance(mass, shown, block, at)
    return distance[int((within < within[-1] / 2).sum().clamp(max=len(within) - 1))].item()


def _within(mass: Tensor, shown: Shown, block: AttentionBlock, at: tuple[int, int], radii: np.ndarray) -> np.ndarray:
    """Returns the part of the mass within each radius around a pixel of the map."""
    distance, within = _by_distance(mass, shown, block, at)
    count = torch.searchsorted(distance, torch.from_numpy(radii).to(distance), right=True)
    return torch.nn.functional.pad(within / within[-1].clamp(min=1e-30), (1, 0))[count].numpy()


def draw_mass(axes: Axes, shown: Shown, mass: Tensor, cell: int, title: str) -> None:
    """Draws mass (H', W') averaged over cell x cell pixels; square roots, since few pixels hold most of it."""
    from matplotlib import colormaps
    mass = torch.nn.functional.avg_pool2d(mass[None], cell, ceil_mode=True, count_include_pad=False)[0]
    strength = (mass / mass.max().clamp(min=1e-30)).sqrt().numpy()
    colours = colormaps['inferno'](strength)
    colours[..., 3] = np.clip(1.5 * strength, 0, 0.85)
    axes.imshow(_lighten(shown.original))
    axes.imshow(colours, extent=shown.box(0, 0, mass.shape[0], mass.shape[1], cell), interpolation='bilinear')
    limit_to_picture(axes, shown, title)


def _zoom(axes: Axes, extent: Extent, shown: Shown) -> None:
    """Limits the axes to an extent and a margin, shifted so that they stay on the picture."""
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

    For pixels: a row for each, a column for each stage, rolled out from the stage's last block. A solid frame is the
    pixel of the stage's map, a dashed one the reach of its footprints. The label gives the radius around the pixel that
    contains half of the mass, in pixels of the picture. Below, a curve for each stage: the part of the mass within a
    distance, averaged over pixels all over the picture, and how far the footprints reach: how local the network really
    is. For a grid: each of its pixels from one block. Brightness is the square root of the mass, relative to the
    maximum of each panel.

    Args:
        model, image, pixels, grid, size: As for `footprint_figure`.
        block: Where to start for a grid, and the last one to draw for pixels; None is the last block.
        residual, measure: As for `attention_rollout`, which defines what is drawn.

    Returns:
        A matplotlib Figure outside pyplot's state.

    Raises:
        ValueError, ImportError: As for `footprint_figure`.
    """
    new_figure(1, 1)
    net = find_network(model)
    last, shown = find_block(net, block), prepare_picture(model, net, image, size)
    points = list_points(shown, pixels, grid)
    with evaluating(model):
        steps = trace(net, shown.images, last, residual, measure)
    attended = {number: step.kept.mean().item() for number, step in enumerate(steps) if isinstance(step, Attended)}
    blocks = dict(zip(net.blocks.values(), attended, strict=False))

    def roll(start: AttentionBlock, pixel: tuple[int, int] | None) -> Tensor:
        return roll_back(steps[:blocks[start] + 1], None if pixel is None else [pixel])[0, 0].cpu()

    def draw(axes: Axes, start: AttentionBlock, point: tuple[float, float], title: str) -> None:
        at = shown.on_map(point, start.stride)
        mass, reach = roll(start, at), _reach(net, start) / start.stride
        draw_mass(axes, shown, mass, max(1, start.stride // 4), title)
        draw_rectangle(axes, shown.box(at[0], at[1], at[0] + 1, at[1] + 1, start.stride), COLOURS[0], linewidth=1)
        box = shown.box(at[0] - reach, at[1] - reach, at[0] + 1 + reach, at[1] + 1 + reach, start.stride)
        draw_rectangle(axes, box, COLOURS[0], linewidth=1.2, linestyle='--')
        _zoom(axes, box, shown)
        radius = half_mass_radius(mass, shown, start, at)
        axes.set_xlabel(f'half comes from within {radius:.0f} pixels', fontsize=SMALL, labelpad=2)

    kept = [f'{share:.0%}' for share in attended.values()]
    kept = kept if len(kept) < 9 else [*kept[:3], '...', *kept[-3:]]
    how = f'residual connections pass on {", ".join(kept)} of it, block by block'
    aspect, side = shown.original.shape[0] / shown.original.shape[1], 2.2
    if grid is not None:
        rows = grid if isinstance(grid, int) else grid[0]
        figure = new_figure(len(points) // rows * side, rows * (side * aspect + 0.3) + 0.6)
        for point, axes in zip(points, figure.subplots(rows, len(points) // rows, squeeze=False).flat, strict=True):
            draw(axes, last, point, f'x {point[0]:.0f}, y {point[1]:.0f}')
        add_title(figure, net, f'where a pixel of {last.name}, stride {last.stride}, comes from\n{how}')
        return figure
    ends = list({found.stage: found for found in blocks}.values())
    figure = new_figure(max(len(ends) * side, 5) + 0.3, len(points) * (side * aspect + 0.4) + 3.2)
    grid_of_panels = figure.add_gridspec(len(points) + 1, len(ends),
                                         height_ratios=[side * aspect + 0.4] * len(points) + [2.4])
    for column, start in enumerate(ends):
        for row, point in enumerate(points):
            axes = figure.add_subplot(grid_of_panels[row, column])
            draw(axes, start, point, f'{start.name}, stride {start.stride}' if row == 0 else '')
            if column == 0:
                axes.set_ylabel(f'x {point[0]:.0f}, y {point[1]:.0f}', fontsize=SMALL)
    _draw_distances(figure.add_subplot(grid_of_panels[-1, :]), shown, net, ends, roll)
    add_title(figure, net, f'where a pixel comes from, stage by stage (attention roll-out)\n{how}')
    return figure


def _draw_distances(axes: Axes, shown: Shown, net: Network, ends: Sequence[AttentionBlock],
                    roll: Callable[[AttentionBlock, tuple[int, int]], Tensor]) -> None:
    """Draws for each stage the part of the mass within a distance, averaged over pixels all over the picture."""
    tall, wide = shown.original.shape[:2]
    radii = np.geomspace(1, np.hypot(tall, wide), 60)
    for number, start in enumerate(ends):
        colour = COLOURS[number % len(COLOURS)]
        cells = {shown.on_map(point, start.stride) for point in list_points(shown, None, DISTANCES_FROM)}
        curves = [_within(roll(start, at), shown, start, at, radii) for at in sorted(cells)]
        axes.plot(radii, 100 * np.mean(curves, 0), color=colour, linewidth=1.8,
                  label=f'{start.name}, stride {start.stride}')
        reach = _reach(net, start) * wide / shown.scaled.shape[1]
        if reach <= radii[-1]:
            axes.axvline(reach, color=colour, linewidth=1, linestyle=':')
    axes.axhline(50, color='0.8', linewidth=0.8, zorder=0)
    axes.set(xscale='log', xlim=(radii[0], radii[-1]), ylim=(0, 102))
    axes.set_xlabel('distance from the pixel, in pixels of the picture (dotted: as far as the footprints reach)',
                    fontsize=LABEL)
    axes.set_ylabel('part that comes\nfrom within it, %', fontsize=LABEL)
    axes.set_title('how local is it? The mean of pixels all over the picture', fontsize=LABEL)
    axes.tick_params(labelsize=SMALL)
    axes.xaxis.set_major_formatter('{x:g}')
    axes.legend(fontsize=SMALL, frameon=False, loc='upper left')
    for side in ('top', 'right'):
        axes.spines[side].set_visible(False)


def principal_components(features: Tensor) -> tuple[Tensor, float]:
    """Returns the three main components of (C, H, W) as colours (H, W, 3), and their share of the variance."""
    flat = features.flatten(1).T
    flat = flat - flat.mean(0)
    basis = torch.randn(flat.shape[1], 8, generator=torch.Generator().manual_seed(0))
    for _ in range(10):  # orthogonal iteration: a full decomposition of 2048 channels takes seconds
        basis = torch.linalg.qr(flat.T @ (flat @ basis))[0]
    left, spread, _ = torch.linalg.svd(flat @ basis, full_matrices=False)
    held = spread[:3].square().sum() / flat.square().sum().clamp(min=1e-30)
    parts = torch.nn.functional.pad(left * spread, (0, 3))[:, :3]  # a map of one or two pixels has fewer
    parts = parts * torch.where(parts.pow(3).sum(0) < 0, -1, 1)  # the sign is arbitrary: make the longer tail bright
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
    """Draws the feature maps of the stages, a row for each stage.

    Each row shows the norm of the feature vector at each pixel; its three main components as red, green and blue (equal
    colours are similar features within a row, and cannot be compared across rows); and the channels that vary most over
    the picture, each on its own scale from black (smallest) to yellow.

    Args:
        model, image, size: As for `footprint_figure`.
        channels: How many channels to draw.

    Returns:
        A matplotlib Figure outside pyplot's state.

    Raises:
        ValueError, ImportError: As for `footprint_figure`.
    """
    new_figure(1, 1)
    if channels < 0:
        raise ValueError(f'channels must be at least 0, got {channels}')
    net = find_network(model)
    shown = prepare_picture(model, net, image, size)
    maps: list[Tensor] = []
    with evaluating(model):
        run_hooked(net, shown.images, [(stage.get_submodule('act'), False, lambda x: maps.append(x[0].float().cpu()))
                                 for stage in net.stages])
    aspect, side = shown.original.shape[0] / shown.original.shape[1], 1.7
    rows, columns = len(maps) + 1, 2 + channels
    figure = new_figure(max(columns * side, 6), rows * (side * aspect + 0.3) + 0.5)
    grid = figure.add_gridspec(rows, columns)
    photograph, words = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1:])
    photograph.imshow(shown.original)
    limit_to_picture(photograph, shown, 'the picture')
    words.axis('off')
    words.text(0, 0.95, FEATURES_EXPLAINED, va='top', fontsize=LABEL, linespacing=1.5, transform=words.transAxes)
    panels = [[figure.add_subplot(grid[row, column]) for column in range(columns)] for row in range(1, rows)]
    for number, (row, features, stride) in enumerate(zip(panels, maps, net.strides, strict=True)):
        extent = shown.box(0, 0, features.shape[1], features.shape[2], stride)
        colours, held = principal_components(features)
        row[0].imshow(features.norm(dim=0).numpy(), cmap='inferno', extent=extent)
        row[1].imshow(colours.numpy(), extent=extent)
        for axes, title in zip(row, ('length', 'main components'), strict=False):
            limit_to_picture(axes, shown, title if number == 0 else '')
        row[0].set_ylabel(f'stage {number}: stride {stride}\n{len(features)} channels', fontsize=SMALL)
        row[1].set_xlabel(f'{held:.0%} of the variance', fontsize=SMALL, labelpad=2)
        varied = features.flatten(1).var(1, correction=0).argsort(descending=True)[:channels].tolist()
        for axes, index in zip(row[2:], varied, strict=False):
            axes.imshow(features[index].numpy(), cmap='inferno', extent=extent)
            limit_to_picture(axes, shown)
            axes.set_xlabel(f'channel {index}', fontsize=SMALL, labelpad=2)
    add_title(figure, net, 'feature maps, stage by stage')
    return figure


FEATURES_EXPLAINED = '''length: the norm of the features of each pixel
main components: the three directions in which the features differ most, as red, green and blue;
equal colours are similar features, within a row
channels: those that vary most over the picture
Dark is the smallest value of a panel, bright the largest: each has its own scale.'''
