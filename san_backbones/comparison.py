"""Feature maps of two pictures in one projection to colours, and the patches that are nearest to a patch."""
from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import visualize
from .study import Study
from .visualize import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['Comparison', 'Patch', 'compare_figure']


PANELS = ('nearest', 'colours', 'likeness')
SCALE = visualize.Scale('RdBu_r', -1, 1, 'likeness to the chosen patch: cosine')


class Patch(NamedTuple):
    """A pixel of a feature map: the picture, by its number, row and column, and how like the chosen patch it is."""
    picture: int
    row: int
    column: int
    likeness: float


class Comparison:
    """The maps of one stage, of one or more pictures that ran through the same network.

    Args:
        studies: The pictures.
        stage: Counted from 0; negative counts from the last.

    Attributes:
        maps: (C, H, W) of each picture.
        stride: Pixels of the scaled picture for each pixel of the map.
        colours: (H, W, 3) of each picture, 0 to 1: the three main components of all pixels of all pictures together, so
            that equal colours are similar features in and across pictures.
        held: Share of the variance that the colours hold.

    Raises:
        ValueError: There is no such stage, or no picture.
    """

    def __init__(self, studies: Sequence[Study], stage: int = -1) -> None:
        if not studies:
            raise ValueError('give at least one picture')
        count = len(studies[0].maps)
        if not -count <= stage < count:
            raise ValueError(f'stage must be 0 to {count - 1}, or negative to count from the last, got {stage}')
        self.studies, self.stage = list(studies), stage % count
        self.maps = [study.maps[stage] for study in studies]
        self.stride = studies[0].net.strides[stage]
        pixels = torch.cat([features.flatten(1) for features in self.maps], 1)
        colours, self.held = visualize.principal_components(pixels[:, :, None])
        parts = colours[:, 0].split([features[0].numel() for features in self.maps])
        self.colours = [part.unflatten(0, features.shape[1:]) for part, features in zip(parts, self.maps, strict=True)]
        self._mean = pixels.mean(1)

    def at(self, pixel: tuple[float, float], picture: int = 0) -> tuple[int, int]:
        """Returns the (row, column) of the map where a pixel (x, y) of a picture lies.

        Raises:
            ValueError: The pixel is not on the picture.
        """
        shown = self.studies[picture].shown
        point, = visualize.list_points(shown, [pixel], None)
        return shown.on_map(point, self.stride)

    def likeness(self, cell: tuple[int, int], picture: int = 0) -> list[Tensor]:
        """Returns the cosine between the features of a patch and those of all patches, (H, W) for each picture.

        Their mean over the pictures is taken away first: features behind a ReLU all point into one corner of space, and
        everything would be like everything.
        """
        chosen = self.maps[picture][:, cell[0], cell[1]] - self._mean
        return [torch.nn.functional.cosine_similarity(features - self._mean[:, None, None], chosen[:, None, None], 0)
                for features in self.maps]

    def nearest(self, cell: tuple[int, int], picture: int = 0, count: int = 5) -> list[list[Patch]]:
        """Returns the patches of each picture that are most like a patch, the most like first, without the patch."""
        found = []
        for number, values in enumerate(self.likeness(cell, picture)):
            patches = [Patch(number, index // values.shape[1], index % values.shape[1], values.flatten()[index].item())
                       for index in values.flatten().argsort(descending=True)[:count + 1].tolist()]
            found.append([patch for patch in patches if patch[:3] != (picture, *cell)][:count])
        return found


def compare_figure(
        model: nn.Module,
        images: Picture | Sequence[Picture],
        pixel: tuple[float, float] | None = None,
        stage: int = -1,
        *,
        picture: int = 0,
        size: int | None = None,
        count: int = 5,
) -> Figure:
    """Draws a stage's feature maps of one or more pictures side by side, and the patches nearest to a patch.

    A row for each picture: the picture, with the chosen patch and the `count` patches nearest to it in frames; the main
    components of the features as colours, in one projection for all pictures; and how like the chosen patch each patch
    is, from -1 to 1 (`Comparison.likeness`).

    Args:
        model: As for `visualize.footprint_figure`.
        images: Paths, PIL pictures or uint8 arrays (H, W, 3), RGB; or one of them.
        pixel: (x, y) on one of the pictures as given; None is its centre.
        stage: Counted from 0; negative counts from the last.
        picture: The number of the picture that `pixel` is on.
        size: As for `visualize.footprint_figure`.
        count: How many nearest patches to frame in each picture.

    Returns:
        A matplotlib Figure outside pyplot's state.

    Raises:
        ValueError: There is no SAN, no such stage, no such picture, no picture at all, or the pixel is not on it.
        ImportError: matplotlib is missing.
    """
    visualize.new_figure(1, 1)
    images = [images] if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray)) else images
    if not 0 <= picture < len(images):
        raise ValueError(f'picture must be the number of one of the {len(images)} pictures, from 0, got {picture}')
    return draw(Comparison([Study(model, image, size) for image in images], stage), pixel, picture, count)


def draw(comparison: Comparison, pixel: tuple[float, float] | None, picture: int = 0, count: int = 5) -> Figure:
    """`compare_figure` of what was computed before."""
    studies, stride = comparison.studies, comparison.stride
    if pixel is None:
        tall, wide = studies[picture].shown.original.shape[:2]
        pixel = wide // 2, tall // 2
    cell = comparison.at(pixel, picture)
    aspects = [study.shown.original.shape[0] / study.shown.original.shape[1] for study in studies]
    figure = visualize.new_figure(10, 3 * sum(aspects) + 0.4 * len(studies) + 0.5)
    panels = figure.subplots(len(studies), 3, squeeze=False, height_ratios=aspects)
    titles = ('the chosen patch (green) and those nearest to it',
              f'main components as colours ({comparison.held:.0%} of the variance)', 'likeness to the chosen patch')
    for number, row in enumerate(panels):
        for axes, panel, title in zip(row, PANELS, titles, strict=True):
            draw_panel(axes, comparison, number, panel, cell, picture, count)
            axes.set_title(title if number == 0 else '', fontsize=visualize.LABEL)
    visualize.add_colour_bar(figure, SCALE, list(panels[:, 2]), location='bottom', shrink=0.8, aspect=30)
    visualize.add_title(figure, studies[0].net,
                         f'stage {comparison.stage}, stride {stride}, {len(comparison.maps[0])} channels')
    return figure


def draw_panel(axes: Axes, comparison: Comparison, number: int, panel: str, cell: tuple[int, int], picture: int = 0,
               count: int = 5) -> None:
    """Draws one of PANELS of picture `number`; `cell` is the chosen patch, on the map of `picture`."""
    shown, stride = comparison.studies[number].shown, comparison.stride
    height, width = comparison.maps[number].shape[1:]
    extent = shown.box(0, 0, height, width, stride)
    if panel == 'nearest':
        axes.imshow(shown.original)
    elif panel == 'colours':
        axes.imshow(comparison.colours[number].numpy(), extent=extent, interpolation='nearest')
    else:
        axes.imshow(comparison.likeness(cell, picture)[number].numpy(), extent=extent, **SCALE.options())
    visualize.limit_to_picture(axes, shown)

    def frame(row: int, column: int, colour: str, **options: Any) -> visualize.Extent:
        box = shown.box(row, column, row + 1, column + 1, stride)
        visualize.draw_rectangle(axes, box, colour, **options)
        return box

    if panel == 'nearest':
        for rank, patch in reversed(list(enumerate(comparison.nearest(cell, picture, count)[number], 1))):
            box = frame(patch.row, patch.column, visualize.COLOURS[1], linewidth=1.5)
            axes.annotate(str(rank), (box[1], box[3]), color='white', fontsize=visualize.SMALL, va='top',
                          annotation_clip=True, bbox=dict(facecolor='black', alpha=0.6, pad=0.5, linewidth=0))
    if number == picture:
        frame(*cell, '#00e676', linewidth=2)
