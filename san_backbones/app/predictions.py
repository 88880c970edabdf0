"""What a detector or segmenter of OpenMMLab finds in a picture, and what its SAN looks at inside a box."""
from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import visualize
from ..attention_maps import AttentionBlock, BlockId, evaluating, find_block, roll_back, trace
from ..study import Study
from ..visualize import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['Prediction', 'Predictor', 'box_figure', 'box_mass', 'draw', 'draw_prediction', 'look_block']

MOST_PIXELS = 64  # of a map inside a box that are followed back
AT_ONCE = 8
SCALE = visualize.Scale('inferno', 0, 1, 'attention that comes from here, square root, 1 at the most')


class Prediction(NamedTuple):
    """Boxes (N, 4): left, top, right, bottom in pixels of the picture, the most certain first; of a segmenter, around
    the regions of each class."""
    boxes: np.ndarray
    labels: list[str]
    scores: np.ndarray
    """From 0 to 1. Of a segmenter, the share of the picture that the class has."""
    masks: np.ndarray | None
    """(N, H, W), bool."""


class Predictor:
    """A detector of MMDetection or a segmenter of MMSegmentation, on the CPU.

    Args:
        config: Its config file.
        checkpoint: Its weights.

    Raises:
        ImportError: The extra 'mm' (or 'onedl') is missing.
        ValueError: The config is of another kind of model.
        RuntimeError, OSError: The files cannot be read or do not fit each other.
    """

    def __init__(self, config: str | os.PathLike[str], checkpoint: str | os.PathLike[str]) -> None:
        try:
            importlib.import_module('san_backbones.mm')  # before mmdet
            from mmengine.config import Config
        except ImportError as error:
            raise ImportError("checkpoints of MMDetection and MMSegmentation need their packages: "
                              "pip install 'san-backbones[mm]'") from error
        read = Config.fromfile(config)
        self.scope = read.get('default_scope', 'mmdet')
        if self.scope == 'mmdet':
            from mmdet.apis import init_detector
            self.model = init_detector(read, str(checkpoint), palette='random', device='cpu')
        elif self.scope == 'mmseg':
            from mmseg.apis import init_model
            self.model = init_model(read, str(checkpoint), device='cpu')
        else:
            raise ValueError(f'{config} has default_scope {self.scope!r}; the page shows models of mmdet and mmseg')

    def predict(self, picture: np.ndarray) -> Prediction:
        """Finds objects, or regions of classes, in a picture (H, W, 3), uint8, RGB."""
        bgr = np.ascontiguousarray(picture[..., ::-1])
        classes = self.model.dataset_meta['classes']
        if self.scope == 'mmdet':
            from mmdet.apis import inference_detector
            found = inference_detector(self.model, bgr).pred_instances.cpu()
            order = found.scores.argsort(descending=True)
            masks = found.masks[order].bool().numpy() if 'masks' in found else None
            return Prediction(found.bboxes[order].numpy(), [classes[label] for label in found.labels[order]],
                              found.scores[order].numpy(), masks)
        from mmseg.apis import inference_model
        return _regions(inference_model(self.model, bgr).pred_sem_seg.data[0].cpu().numpy(), classes)


def _regions(labels: np.ndarray, classes: Sequence[str]) -> Prediction:
    """The pixels of each class in (H, W), the largest first, with the box around them."""
    numbers, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind='stable')
    masks = np.stack([labels == numbers[index] for index in order])
    boxes = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return Prediction(np.array(boxes, np.float32), [classes[numbers[index]] for index in order],
                      counts[order] / labels.size, masks)


def look_block(study: Study, block: BlockId | None = None) -> AttentionBlock:
    """Returns the block whose pixels are followed back: the given one, or the last at stride 16 or less."""
    names = [name for name, found in study.net.blocks.items() if found.stride <= 16]
    return find_block(study.net, block if block is not None or not names else names[-1])


@torch.no_grad()
def box_mass(study: Study, box: Sequence[float], block: BlockId | None = None) -> Tensor:
    """Computes where the features inside a box come from: `attention_rollout` averaged over its pixels.

    Args:
        study: The picture.
        box: Left, top, right, bottom, in pixels of the picture.
        block: Whose pixels are followed back; None is the last at stride 16 or less. Of more than 64 in the box,
            64 are, evenly spaced.

    Returns:
        (H, W) at the size that the network takes; sums to 1.
    """
    start, shown = look_block(study, block), study.shown
    tall, wide = shown.original.shape[:2]
    top, left = shown.on_map((min(max(box[0], 0), wide - 1), min(max(box[1], 0), tall - 1)), start.stride)
    bottom, right = shown.on_map((min(max(box[2] - 1, box[0]), wide - 1), min(max(box[3] - 1, box[1]), tall - 1)),
                                 start.stride)
    cells = [(row, column) for row in range(top, bottom + 1) for column in range(left, right + 1)]
    cells = [cells[index] for index in np.linspace(0, len(cells) - 1, min(len(cells), MOST_PIXELS)).astype(int)]
    with evaluating(study.model):
        steps = trace(study.net, shown.images, start, None, 'weights')
    mass = sum(roll_back(steps, cells[first:first + AT_ONCE])[0].sum(0) for first in range(0, len(cells), AT_ONCE))
    return (torch.as_tensor(mass) / len(cells)).cpu()


def draw_prediction(axes: Axes, picture: np.ndarray, prediction: Prediction, box: int | None = None,
                    least: float = 0.3) -> None:
    """Draws what was found with scores of at least `least`, the chosen box in a thicker frame."""
    canvas = picture.astype(np.float32)
    kept = [index for index, score in enumerate(prediction.scores) if score >= least or index == box]
    colours = {name: visualize.COLOURS[number % len(visualize.COLOURS)]
               for number, name in enumerate(sorted(set(prediction.labels)))}
    if prediction.masks is not None:
        from matplotlib.colors import to_rgb
        for index in kept:
            mask = prediction.masks[index]
            canvas[mask] = 0.55 * canvas[mask] + 0.45 * 255 * np.array(to_rgb(colours[prediction.labels[index]]))
    axes.imshow(canvas.astype(np.uint8))
    for index in reversed(kept):
        left, top, right, bottom = prediction.boxes[index] - 0.5
        colour, chosen = colours[prediction.labels[index]], index == box
        visualize.draw_rectangle(axes, (left, right, bottom, top), colour, linewidth=3.5 if chosen else 1.5)
        axes.annotate(f'{prediction.labels[index]} {prediction.scores[index]:.0%}', (max(left, 0), max(top, 0)),
                      color='white', fontsize=visualize.LABEL, va='top', weight='bold' if chosen else 'normal',
                      bbox=dict(facecolor='black', alpha=0.65, pad=1, linewidth=0))
    _limit(axes, picture)


def _limit(axes: Axes, picture: np.ndarray) -> None:
    visualize.remove_ticks(axes)
    axes.set_xlim(-0.5, picture.shape[1] - 0.5)
    axes.set_ylim(picture.shape[0] - 0.5, -0.5)


def draw_look(axes: Axes, study: Study, box: Sequence[float], block: BlockId | None = None) -> None:
    """Draws what the features inside a box are made of, over the picture."""
    start = look_block(study, block)
    visualize.draw_mass(axes, study.shown, box_mass(study, box, block), max(1, start.stride // 4), '')
    left, top, right, bottom = (side - 0.5 for side in box)
    visualize.draw_rectangle(axes, (left, right, bottom, top), '#00e676', linewidth=2)


def box_figure(
        predictor: Predictor,
        image: Picture,
        box: int = 0,
        *,
        least: float = 0.3,
        block: BlockId | None = None,
        size: int | None = None,
) -> Figure:
    """Draws what was found in a picture, beside what the backbone looks at inside one of the boxes.

    Args:
        predictor: The detector or segmenter.
        image: A path, a PIL picture, or a uint8 array (H, W, 3), RGB.
        box: Number of the box, the most certain being 0.
        least: Score from which boxes are drawn.
        block: As for `box_mass`.
        size: Shorter side to which the picture is scaled for the attention; None does not scale. The detector scales
            as its config says.

    Returns:
        A matplotlib Figure outside pyplot's state.

    Raises:
        ValueError: There is no such box or block.
        ImportError: matplotlib is missing.
    """
    visualize.new_figure(1, 1)
    study = Study(predictor.model, image, size)
    return draw(study, predictor.predict(study.shown.original), box, least, block)


def draw(study: Study, prediction: Prediction, box: int = 0, least: float = 0.3,
         block: BlockId | None = None) -> Figure:
    """`box_figure` of what was computed before."""
    count = len(prediction.boxes)
    if not 0 <= box < count:
        raise ValueError(f'there is no box {box}: {count} were found' + (f', 0 to {count - 1}' if count else ''))
    picture = study.shown.original
    figure = visualize.new_figure(11, 5 * picture.shape[0] / picture.shape[1] + 1.2)
    found, look = figure.subplots(1, 2)
    draw_prediction(found, picture, prediction, box, least)
    found.set_title(f'found, with a score of at least {least:.0%}', fontsize=visualize.LABEL)
    draw_look(look, study, prediction.boxes[box], block)
    start = look_block(study, block)
    look.set_title(f'what the features in the box of {prediction.labels[box]} are made of, from {start.name}, '
                   f'stride {start.stride}', fontsize=visualize.LABEL)
    visualize.add_colour_bar(figure, SCALE, look, location='bottom', shrink=0.8, aspect=40)
    return figure
