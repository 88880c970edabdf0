"""Definitions of the operators as NumPy loops, written from the papers and mmcv's documentation.

All take and return float64 arrays. Slow on purpose.
"""
import math

import numpy as np


def iou(a, b, offset=0, mode='iou'):
    def side(low, high):
        return high - low + offset

    across = max(0.0, side(max(a[0], b[0]), min(a[2], b[2])))
    down = max(0.0, side(max(a[1], b[1]), min(a[3], b[3])))
    shared = across * down
    area_a, area_b = (side(box[0], box[2]) * side(box[1], box[3]) for box in (a, b))
    return shared / (area_a + area_b - shared if mode == 'iou' else area_a)


def nms(boxes, scores, threshold, offset=0):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


def soft_nms(boxes, scores, threshold, sigma, min_score, method, offset=0):
    scores, left, kept = list(scores), list(range(len(boxes))), []
    while left:
        best = max(left, key=lambda i: scores[i])
        kept.append((best, scores[best]))
        left.remove(best)
        for i in list(left):
            overlap = iou(boxes[best], boxes[i], offset)
            if method == 'gaussian':
                scores[i] *= math.exp(-overlap**2 / sigma)
            elif overlap >= threshold:
                scores[i] *= 0 if method == 'naive' else 1 - overlap
            if scores[i] < min_score:
                left.remove(i)
    return [i for i, _ in kept], [score for _, score in kept]


def nms_match(boxes, scores, threshold):
    order, groups = sorted(range(len(boxes)), key=lambda i: -scores[i]), []
    while order:
        group = [i for i in order if i == order[0] or iou(boxes[order[0]], boxes[i]) >= threshold]
        groups.append(group)
        order = [i for i in order if i not in group]
    return groups


def rotated_corners(box):
    x, y, width, height, angle = box
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    half = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [width / 2, height / 2]
    return half @ turn.T + [x, y]


def polygon_area(points):
    return 0.5 * sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(points, np.roll(points, -1, 0)))


def rotated_iou(a, b):
    """By clipping one rectangle with the sides of the other, one after the other (Sutherland and Hodgman)."""
    polygon, clip = list(rotated_corners(a)), rotated_corners(b)
    for start, end in zip(clip, np.roll(clip, -1, 0)):
        def side(point):
            return (end[0] - start[0]) * (point[1] - start[1]) - (end[1] - start[1]) * (point[0] - start[0])

        clipped = []
        for p, q in zip(polygon, polygon[1:] + polygon[:1]):
            if side(p) >= 0:
                clipped.append(p)
            if side(p) * side(q) < 0:
                clipped.append(p + (q - p) * side(p) / (side(p) - side(q)))
        polygon = clipped
    shared = polygon_area(polygon) if len(polygon) > 2 else 0.0
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def bilinear(plane, y, x):
    """RoIAlign's sample of one channel: 0 beyond one pixel from the map, the border value within."""
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    total = 0.0
    for row in range(height):
        for column in range(width):
            total += max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column)) * plane[row, column]
    return total


def bilinear_zero(plane, y, x):
    """The sample of deformable convolutions and of attention: pixels outside of the map count as 0."""
    height, width = plane.shape
    total = 0.0
    for row in range(math.floor(y), math.floor(y) + 2):
        for column in range(math.floor(x), math.floor(x) + 2):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * plane[row, column]
    return total


def roi_align(features, rois, bins, scale, ratio, mode, aligned, shifts=None, gamma=0.1):
    """Also deformable RoI pooling, when given `shifts` (K, 2, *bins)."""
    output = np.zeros((len(rois), features.shape[1], *bins))
    for k, (image, *box) in enumerate(rois):
        x1, y1, x2, y2 = (value * scale - (0.5 if aligned else 0) for value in box)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        rows, columns = (ratio or max(0, math.ceil(side / count)) for side, count in zip((height, width), bins))
        for c in range(features.shape[1]):
            for i in range(bins[0]):
                for j in range(bins[1]):
                    down = gamma * height * shifts[k, 1, i, j] if shifts is not None else 0
                    across = gamma * width * shifts[k, 0, i, j] if shifts is not None else 0
                    values = [bilinear(features[int(image), c],
                                       y1 + down + (i + (a + 0.5) / rows) * height / bins[0],
                                       x1 + across + (j + (b + 0.5) / columns) * width / bins[1])
                              for a in range(rows) for b in range(columns)]
                    if values:
                        output[k, c, i, j] = max(values) if mode == 'max' else sum(values) / len(values)
    return output


def roi_pool(features, rois, bins, scale):
    """The pooled values, and their gradient when every output has gradient 1 (the number of times a pixel wins)."""
    output, wins = np.zeros((len(rois), features.shape[1], *bins)), np.zeros_like(features)
    for k, (image, x1, y1, x2, y2) in enumerate(rois):
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        if x2 <= x1 or y2 <= y1:
            continue
        for c, i, j in np.ndindex(features.shape[1], *bins):
            rows = range(math.floor(y1 + i * (y2 - y1) / bins[0]), math.ceil(y1 + (i + 1) * (y2 - y1) / bins[0]))
            columns = range(math.floor(x1 + j * (x2 - x1) / bins[1]), math.ceil(x1 + (j + 1) * (x2 - x1) / bins[1]))
            pixels = [(row, column) for row in rows for column in columns
                      if 0 <= row < features.shape[2] and 0 <= column < features.shape[3]]
            if pixels:
                winner = max(pixels, key=lambda pixel: features[int(image), c][pixel])
                output[k, c, i, j] = features[int(image), c][winner]
                wins[int(image), c][winner] += 1
    return output, wins


def deform_conv(features, weight, offset, mask, bias, stride, padding, dilation, groups, deform_groups):
    """Deformable convolution; v1 with `mask` of ones and `bias` of zeros."""
    images, channels = features.shape[:2]
    filters, _, kernel_h, kernel_w = weight.shape
    output = np.zeros((images, filters, *offset.shape[2:]))
    for n, o, i, j in np.ndindex(*output.shape):
        total = bias[o]
        for c in range(channels // groups):
            channel = o // (filters // groups) * (channels // groups) + c
            shared = channel // (channels // deform_groups)
            for a, b in np.ndindex(kernel_h, kernel_w):
                tap = (shared * kernel_h + a) * kernel_w + b
                y = i * stride[0] - padding[0] + a * dilation[0] + offset[n, 2 * tap, i, j]
                x = j * stride[1] - padding[1] + b * dilation[1] + offset[n, 2 * tap + 1, i, j]
                total += weight[o, c, a, b] * mask[n, tap, i, j] * bilinear_zero(features[n, channel], y, x)
        output[n, o, i, j] = total
    return output


def attention(value, shapes, locations, weights):
    """Multi-scale deformable attention."""
    batch, _, heads, width = value.shape
    _, queries, _, levels, points, _ = locations.shape
    output = np.zeros((batch, queries, heads, width))
    for n, q, head, level, point in np.ndindex(batch, queries, heads, levels, points):
        height, across = shapes[level]
        start = sum(h * w for h, w in shapes[:level])
        x, y = locations[n, q, head, level, point] * [across, height] - 0.5
        for d in range(width):
            plane = value[n, start:start + height * across, head, d].reshape(height, across)
            output[n, q, head, d] += weights[n, q, head, level, point] * bilinear_zero(plane, y, x)
    return output.reshape(batch, queries, -1)


def carafe(features, masks, kernel, groups, scale):
    images, channels, height, width = features.shape
    output = np.zeros((images, channels, height * scale, width * scale))
    for n, c, i, j in np.ndindex(*output.shape):
        group = c // (channels // groups)
        for a, b in np.ndindex(kernel, kernel):
            row, column = i // scale + a - kernel // 2, j // scale + b - kernel // 2
            if 0 <= row < height and 0 <= column < width:
                tap = (group * kernel + a) * kernel + b
                output[n, c, i, j] += features[n, c, row, column] * masks[n, tap, i, j]
    return output


def psa_mask(masks, kind, size):
    images, _, height, width = masks.shape
    output = np.zeros((images, height, width, height, width))
    for n, i, j, a, b in np.ndindex(images, height, width, *size):
        row, column = i + a - (size[0] - 1) // 2, j + b - (size[1] - 1) // 2
        if 0 <= row < height and 0 <= column < width:
            places = (row, column, i, j) if kind == 'collect' else (i, j, row, column)
            output[(n, *places)] = masks[n, a * size[1] + b, i, j]
    return output.reshape(images, height * width, height, width)


def sigmoid_focal_loss(logits, target, gamma, alpha, weight=None):
    loss = np.zeros_like(logits)
    for n, c in np.ndindex(*logits.shape):
        chance = 1 / (1 + math.exp(-logits[n, c]))
        if target[n] == c:
            loss[n, c] = -alpha * (1 - chance)**gamma * math.log(chance)
        else:
            loss[n, c] = -(1 - alpha) * chance**gamma * math.log(1 - chance)
        if weight is not None and target[n] < logits.shape[1]:
            loss[n, c] *= weight[target[n]]
    return loss
