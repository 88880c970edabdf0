"""Draws a sheet of pictures: what is there beside what a model saw, with masks, boxes, classes and scores."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Colours that stay apart for colour-blind eyes too (Okabe and Ito); classes beyond the eighth start over.
COLOURS = np.array([(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167),
                    (0, 114, 178), (255, 255, 255)]) / 255
PAIRS_PER_ROW = 2
CELL, GAP, MARGIN, HEADER = 2.6, 0.06, 0.25, 0.85  # inches


def draw(path, examples, classes, title, score_threshold=0.5):
    """Writes the sheet as an image file.

    Args:
        path: Where to write, e.g. a .png.
        examples: Dicts with `picture` (H x W x 3, RGB, uint8), `truth` and `predicted`; the latter two are dicts of
            arrays: `masks` (N x H x W, bool), `boxes` (N x 4: left, top, right, bottom), `labels` (N) and, for
            predictions, `scores` (N).
        classes: Class names, by label.
        title: Text above the sheet.
        score_threshold: Predictions that score less are left out.
    """
    pair = 2 * CELL + GAP
    width = PAIRS_PER_ROW * (pair + MARGIN) + MARGIN
    height = HEADER + math.ceil(len(examples) / PAIRS_PER_ROW) * (CELL + GAP) + MARGIN
    figure = Figure(figsize=(width, height), dpi=130, facecolor='white')
    figure.text(MARGIN / width, 1 - 0.2 / height, title, va='top', fontsize=13, fontweight='bold')

    for number, example in enumerate(examples):
        row, column = divmod(number, PAIRS_PER_ROW)
        sure = example['predicted']['scores'] >= score_threshold
        predicted = {key: values[sure] for key, values in example['predicted'].items()}
        for side, objects in enumerate((example['truth'], predicted)):
            left = MARGIN + column * (pair + MARGIN) + side * (CELL + GAP)
            bottom = height - HEADER - row * (CELL + GAP) - CELL
            axis = figure.add_axes([left / width, bottom / height, CELL / width, CELL / height])
            draw_cell(axis, example['picture'], objects, classes)
            if row == 0:
                axis.set_title(f'predicted (scores from {score_threshold:g})' if side else 'ground truth',
                               fontsize=10, color='0.3', pad=4)
    figure.savefig(path)


def draw_cell(axis, picture, objects, classes):
    """Draws one picture with the objects on it."""
    canvas = picture / 255
    colours = COLOURS[objects['labels'].astype(int) % len(COLOURS)]
    for mask, colour in zip(objects['masks'], colours):
        canvas[mask] = 0.45 * canvas[mask] + 0.55 * colour
    axis.imshow(canvas, interpolation='bilinear')

    scores = objects.get('scores', [None] * len(colours))
    for mask, box, label, score, colour in zip(objects['masks'], objects['boxes'], objects['labels'], scores, colours):
        if mask.any():
            axis.contour(mask, levels=[0.5], colors=[colour], linewidths=1.4)
        left, top, right, bottom = box
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=0.9))
        name = classes[int(label)]
        # Labels stay inside the picture, whatever the box: the neighbour would cover them.
        x = np.clip(left, 0.01 * len(canvas[0]), 0.75 * len(canvas[0]))
        y = max(top, 0.06 * len(canvas))
        axis.text(x, y, name if score is None else f'{name} {score:.2f}', fontsize=6.5, va='bottom', clip_on=True,
                  bbox=dict(boxstyle='square,pad=0.15', facecolor=colour, edgecolor='none', alpha=0.9))
    axis.set(xlim=(-0.5, len(canvas[0]) - 0.5), ylim=(len(canvas) - 0.5, -0.5))
    axis.set_axis_off()
