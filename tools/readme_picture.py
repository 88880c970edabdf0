"""Draws the picture of the README from what `make demo` leaves: detections, and what the backbone attends to.

    python -m tools.readme_picture [work_dirs/demo] [--picture 9] [--out docs/static/san.png]

The photograph of picture 9 is scikit-image's `chelsea` (CC0).
"""
import argparse
import pathlib
import sys

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tests import ROOT

sys.path.insert(0, str(ROOT / 'demo'))  # whose scripts import one another by name

import san_backbones.mm  # noqa: F401, before mmdet
import mmcv
import sheet
from mmdet.apis import inference_detector, init_detector

from san_backbones.ops import geometry
from san_backbones.visualize import attention_blocks, attention_weights

COLOURS = ('#E69F00', '#56B4E9', '#009E73', '#CC79A7')  # Okabe and Ito
BLOCK = 'stages.1.blocks.0'  # stride 4
SCORE = 0.5


def detect(model, path):
    """The picture (RGB), and its detections as `sheet.draw_cell` takes them."""
    found = inference_detector(model, str(path)).pred_instances.cpu()
    found = found[found.scores >= SCORE]
    return mmcv.imread(str(path), channel_order='rgb'), dict(
        masks=found.masks.numpy(), boxes=found.bboxes.numpy(), labels=found.labels.numpy(), scores=found.scores.numpy())


def attend(model, picture, pixels, stride):
    """Weights of the footprints of pixels (x, y), (P, k, k), and their departure from the mean over the picture.

    In the channel that depends most on the content.
    """
    preprocess = model.data_preprocessor
    images = (torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() - preprocess.mean) / preprocess.std
    weights = attention_weights(model, images, BLOCK)[0]
    mean = weights.mean(0)
    at = [y // stride * (picture.shape[1] // stride) + x // stride for x, y in pixels]
    channel = ((weights[at] - mean).std(0) / mean.std()).mean((1, 2)).argmax()
    return weights[at, channel].numpy(), (weights[at, channel] - mean[channel]).numpy()


def edges(masks, count):
    """Pixels (x, y) on the outlines of the largest masks, where what a footprint sees differs most."""
    masks = sorted(masks, key=lambda mask: -mask.sum())
    points = []
    for number in range(count):
        mask = masks[number % len(masks)]
        rim = mask[1:-1, 1:-1] & ~(mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:])
        rows, columns = np.nonzero(rim)
        inner = (rows > 20) & (rows < mask.shape[0] - 20) & (columns > 20) & (columns < mask.shape[1] - 20)
        rows, columns = rows[inner] + 1, columns[inner] + 1
        at = len(rows) * (2 * number + 1) // (2 * count)
        points.append((int(columns[at]), int(rows[at])))
    return points


def draw(model, path, out):
    picture, found = detect(model, path)
    layer = attention_blocks(model)[BLOCK]
    k, stride = layer.kernel_size, 4
    pixels = edges(found['masks'], len(COLOURS))
    columns = attend(model, picture, pixels, stride)
    titles = 'footprint', 'weights of\none channel', 'of these,\nby content'
    figure = Figure(figsize=(9.2, 4.6), dpi=110, facecolor='white')
    grid = figure.add_gridspec(len(pixels), 5, width_ratios=(4.6, 0.1, 1, 1, 1), wspace=0.1, hspace=0.1, left=0.01,
                               right=0.89, top=0.9, bottom=0.02)
    axis = figure.add_subplot(grid[:, 0])
    sheet.draw_cell(axis, picture, found, model.dataset_meta['classes'], few=True)
    axis.set_title('a SAN Mask R-CNN after the 400 steps of make demo', fontsize=9)
    half = k // 2 * stride + stride / 2
    padded = np.pad(picture, ((64, 64), (64, 64), (0, 0)), 'reflect')
    largest = [np.abs(values).max() for values in columns]
    for row, ((x, y), colour) in enumerate(zip(pixels, COLOURS, strict=True)):
        centre = (x // stride * stride + stride / 2, y // stride * stride + stride / 2)
        axis.add_patch(Rectangle((centre[0] - half - 0.5, centre[1] - half - 0.5), 2 * half, 2 * half, fill=False,
                                 edgecolor='white', linewidth=3.4))
        axis.add_patch(Rectangle((centre[0] - half - 0.5, centre[1] - half - 0.5), 2 * half, 2 * half, fill=False,
                                 edgecolor=colour, linewidth=2))
        top, left = int(centre[1] - half) + 64, int(centre[0] - half) + 64
        tiles = [padded[top:top + k * stride, left:left + k * stride], *(values[row] for values in columns)]
        for column, tile in enumerate(tiles):
            panel = figure.add_subplot(grid[row, 2 + column])
            if column:
                image = panel.imshow(tile, cmap='RdBu_r', vmin=-largest[column - 1], vmax=largest[column - 1])
            else:
                panel.imshow(tile)
            panel.set(xticks=[], yticks=[])
            for side in panel.spines.values():
                side.set(color=colour, linewidth=2)
            if row == 0:
                panel.set_title(titles[column], fontsize=9)
    bar = figure.colorbar(image, ax=figure.axes[1:], fraction=0.04, pad=0.03, ticks=[-largest[1], 0, largest[1]])
    bar.ax.set_yticklabels(['subtracts', '0', 'adds'], fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    assert geometry.padding(k, 1) * stride <= 64, 'the footprint is wider than the padding'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('demo', nargs='?', type=pathlib.Path, default=ROOT / 'work_dirs/demo')
    parser.add_argument('--picture', type=int, default=9, help='which of the held-out ones')
    parser.add_argument('--out', type=pathlib.Path, default=ROOT / 'docs/static/san.png')
    options = parser.parse_args()
    config, = options.demo.glob('mask-rcnn*.py')
    model = init_detector(str(config), str(options.demo / 'checkpoint.pth'), device='cpu')
    pictures = sorted((options.demo / 'shapes/val').iterdir())
    draw(model, pictures[options.picture], options.out)
    print(options.out)


if __name__ == '__main__':
    main()
