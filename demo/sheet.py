"""Draws a sheet of pictures with ground truth and predictions side by side: masks, boxes, classes and scores."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

# Colours that colour-blind people can distinguish too (Okabe and Ito); they repeat after eight classes.
COLOURS = np.array([(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167),
                    (0, 114, 178), (255, 255, 255)]) / 255
PAIRS_PER_ROW = 2
MOST_LABELS = 6  # objects of a picture that are labelled one by one; of more, their colours alone say what they are
CELL, GAP, MARGIN, HEADER = 2.6, 0.06, 0.25, 0.85  # inches


def draw(path, examples, classes, title, score_threshold=0.5):
    """Writes the sheet as an image file.

    Args:
        path: Where to write, e.g. a .png.
        examples: Dicts with `picture` (H x W x 3, RGB, uint8), `truth` and `predicted`; the latter two are dicts of
            arrays: `masks` (N x H x W, bool; or none), `boxes` (N x 4: left, top, right, bottom), `labels` (N) and, for
            predictions, `scores` (N).
        classes: Class names, by label.
        title: Text above the sheet.
        score_threshold: Predictions with lower scores are left out.
    """
    pair = 2 * CELL + GAP
    width = PAIRS_PER_ROW * (pair + MARGIN) + MARGIN
    tall = CELL * max(len(example['picture']) / len(example['picture'][0]) for example in examples)
    height = HEADER + math.ceil(len(examples) / PAIRS_PER_ROW) * (tall + GAP) + MARGIN
    figure = Figure(figsize=(width, height), dpi=130, facecolor='white')
    figure.text(MARGIN / width, 1 - 0.2 / height, title, va='top', fontsize=13, fontweight='bold')
    figure.legend(
        handles=[Patch(facecolor=colour, edgecolor='0.4', linewidth=0.5, label=name)
                 for name, colour in zip(classes, COLOURS)],
        loc='upper right', bbox_to_anchor=(1 - MARGIN / width, 1 - 0.1 / height), ncols=4, frameon=False, fontsize=8.5,
        borderaxespad=0, handlelength=1, columnspacing=1)

    for number, example in enumerate(examples):
        row, column = divmod(number, PAIRS_PER_ROW)
        sure = example['predicted']['scores'] >= score_threshold
        predicted = {key: values[sure] for key, values in example['predicted'].items()}
        few = max(len(objects['labels']) for objects in (example['truth'], predicted)) <= MOST_LABELS
        for side, objects in enumerate((example['truth'], predicted)):
            left = MARGIN + column * (pair + MARGIN) + side * (CELL + GAP)
            bottom = height - HEADER - row * (tall + GAP) - tall
            axis = figure.add_axes([left / width, bottom / height, CELL / width, tall / height])
            draw_cell(axis, example['picture'], objects, classes, few)
            if row == 0:
                axis.set_title(f'predicted (scores from {score_threshold:g})' if side else 'ground truth',
                               fontsize=10, color='0.3', pad=4)
    figure.savefig(path)


def draw_cell(axis, picture, objects, classes, few):
    """Draws one picture with the objects on it; if they are few, each with its class and score."""
    canvas = picture / 255
    colours = COLOURS[objects['labels'].astype(int) % len(COLOURS)]
    masks = objects.get('masks', [None] * len(colours))
    for mask, colour in zip(masks, colours):
        if mask is not None:
            canvas[mask] = 0.45 * canvas[mask] + 0.55 * colour
    axis.imshow(canvas, interpolation='bilinear')

    scores = objects.get('scores', [None] * len(colours))
    for mask, box, label, score, colour in zip(masks, objects['boxes'], objects['labels'], scores, colours):
        if mask is not None and mask.any():
            axis.contour(mask, levels=[0.5], colors=[colour], linewidths=1.4 if few else 0.8)
        left, top, right, bottom = box
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=0.9))
        if few:
            draw_label(axis, box, classes[int(label)], score, colour, canvas.shape[:2])
    axis.set(xlim=(-0.5, len(canvas[0]) - 0.5), ylim=(len(canvas) - 0.5, -0.5))
    axis.set_axis_off()


def draw_label(axis, box, name, score, colour, size):
    """Writes a class and a score above a box, inside the picture: the next picture would cover what is outside."""
    height, width = size
    x, y = np.clip(box[0], 0.01 * width, 0.75 * width), max(box[1], 0.06 * height)
    axis.text(x, y, name if score is None else f'{name} {score:.2f}', fontsize=6.5, va='bottom', clip_on=True,
              bbox=dict(boxstyle='square,pad=0.15', facecolor=colour, edgecolor='none', alpha=0.9))
