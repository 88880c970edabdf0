"""Box operators of the `mmcv._ext` stand-in: overlaps and non-maximum suppression.

Boxes are corners (x1, y1, x2, y2); their width is x2 - x1 + offset, where `offset` 1 counts pixels inclusively.
"""
from collections.abc import Callable, Iterator

import torch
import torchvision  # noqa: F401, registers torch.ops.torchvision
from torch import Tensor

from .sampling import widened

NAIVE, LINEAR, GAUSSIAN = range(3)  # softnms's `method`
IOU, IOF = range(2)  # `mode`: intersection over union, or over the first box
PAIRS_AT_ONCE = 1 << 15  # rotated pairs take about 2 kB each


def _areas(boxes: Tensor, offset: int) -> Tensor:
    sides = boxes[..., 2:] - boxes[..., :2] + offset
    return sides[..., 0] * sides[..., 1]


def _intersections(boxes1: Tensor, boxes2: Tensor, offset: int) -> Tensor:
    corner1 = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    corner2 = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    sides = (corner2 - corner1 + offset).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def _ious(boxes1: Tensor, boxes2: Tensor, offset: int = 0) -> Tensor:
    """IoU of boxes (..., 4) that broadcast against each other; NaN where both boxes are empty."""
    shared = _intersections(boxes1, boxes2, offset)
    return shared / (_areas(boxes1, offset) + _areas(boxes2, offset) - shared)


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Writes overlaps of boxes (M, 4) and (N, 4) to `ious`: (M,) of the pairs if `aligned`, else (M, N) of all."""
    boxes1, boxes2 = widened(bboxes1), widened(bboxes2)
    if not aligned:
        boxes1 = boxes1[:, None]
    shared = _intersections(boxes1, boxes2, offset)
    base = _areas(boxes1, offset)
    if mode == IOU:
        base = base + _areas(boxes2, offset) - shared
    ious.copy_(shared / base.clamp(min=offset))


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Returns indices (K,), best first, of the boxes (N, 4) that no better kept box overlaps beyond the threshold."""
    boxes = widened(boxes)
    # Counting pixels inclusively is the same as moving the lower right corner by one.
    boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    # mmcv rounds threshold and IoU alike: 3 / 5 > 0.6 is false in float32 and in float64, but true with one in each.
    threshold = boxes.new_tensor(iou_threshold).item()
    return torch.ops.torchvision.nms(boxes, scores.to(boxes.dtype), threshold)


def softnms(boxes: Tensor, scores: Tensor, dets: Tensor, iou_threshold: float, sigma: float, min_score: float,
            method: int, offset: int) -> Tensor:
    """Repeatedly takes the best box and lowers the scores of the boxes that overlap it.

    Args:
        boxes: (N, 4).
        scores: (N,).
        dets: (N, 5), output: its first K rows become the taken boxes with the score they had when taken.
        iou_threshold: smallest overlap at which the naive and the linear method lower a score.
        sigma: width of the gaussian method.
        min_score: boxes whose score falls below are dropped.
        method: 0 drops, 1 multiplies by 1 - IoU, 2 multiplies by exp(-IoU^2 / sigma).
        offset: 0 or 1.

    Returns:
        (K,) indices of the taken boxes, in the order of `dets`.
    """
    candidates, scores = widened(boxes), widened(scores)
    remaining = torch.arange(len(scores), device=scores.device)
    taken, final_scores = [remaining[:0]], [scores[:0]]
    while len(remaining):
        best = scores.argmax()
        taken.append(remaining[best, None])
        final_scores.append(scores[best, None])
        # mmcv's order decides between equal scores: the first box moves to the index of the best one.
        left = torch.arange(len(scores), device=scores.device)
        left[best] = 0
        left = left[1:]
        # The IoU of two empty boxes is NaN; they do not affect each other.
        ious = _ious(candidates[best], candidates[left], offset).nan_to_num(0)
        decayed = scores[left] * _decay(ious, iou_threshold, sigma, method)
        alive = _close_gaps(decayed >= min_score)
        left, scores = left[alive], decayed[alive]
        candidates, remaining = candidates[left], remaining[left]
    order = torch.cat(taken)
    dets[:len(order), :4] = boxes[order]
    dets[:len(order), 4] = torch.cat(final_scores)
    return order


def _close_gaps(alive: Tensor) -> Tensor:
    """Indices of the boxes that are alive (N,), in mmcv's order: each gap is filled with the last box."""
    order = torch.arange(len(alive), device=alive.device)
    count = int(alive.sum())
    order[:count][~alive[:count]] = order[count:][alive[count:]].flip(0)
    return order[:count]


def _decay(ious: Tensor, iou_threshold: float, sigma: float, method: int) -> Tensor:
    if method == GAUSSIAN:
        return torch.exp(-ious.square() / sigma)
    weight = 1 - ious if method == LINEAR else torch.zeros_like(ious)
    return torch.where(ious >= iou_threshold, weight, 1)


def _suppress(scores: Tensor, overlapped: Callable[[Tensor, Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Suppresses boxes greedily.

    Args:
        scores: (N,).
        overlapped: takes the index of a kept box and the indices (M,) of the rest; returns a mask (M,) to suppress.

    Yields:
        The index () of each kept box, best first, and the indices of the boxes that it suppresses, best first.
    """
    left = scores.argsort(descending=True, stable=True)
    while len(left):
        kept, left = left[0], left[1:]
        gone = overlapped(kept, left)
        yield kept, left[gone]
        left = left[~gone]


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups boxes with scores (N, 5): each kept index, followed by those that it suppresses (IoU >= threshold)."""
    boxes = widened(dets[:, :4])
    groups = _suppress(dets[:, 4], lambda kept, left: _ious(boxes[kept], boxes[left]) >= iou_threshold)
    return [[int(kept), *matched.tolist()] for kept, matched in groups]


def nms_rotated(dets: Tensor, scores: Tensor, order: Tensor, dets_sorted: Tensor, labels: Tensor,
                iou_threshold: float, multi_label: bool) -> Tensor:
    """Returns indices (K,) of the rotated boxes that no better kept box of their label overlaps beyond the threshold.

    Args:
        dets: (N, 5) as for `box_iou_rotated`, or (N, 6) with the label last if `multi_label`.
        scores: (N,).
        order: not needed here; nor are `dets_sorted` and `labels`.
        iou_threshold: IoU above which the worse box is dropped.
        multi_label: whether boxes suppress only boxes of the same label.
    """
    boxes = widened(dets)

    def overlapped(kept, left):
        ious = _rotated_overlaps(boxes[kept, :5].expand(len(left), 5), boxes[left, :5], IOU)
        return (ious > iou_threshold) & (boxes[left, 5] == boxes[kept, 5] if multi_label else True)

    kept = [index for index, _ in _suppress(scores, overlapped)]
    return torch.stack(kept) if kept else scores.new_empty(0, dtype=torch.long)


def box_iou_rotated(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool) -> None:
    """Computes overlaps of rotated boxes (x, y, width, height, clockwise angle in radians).

    Args:
        bboxes1: (M, 5).
        bboxes2: (N, 5).
        ious: output, (M,) of the pairs if `aligned`, else (M * N,) of all, row by row.
        mode_flag: 0 for the intersection over the union, 1 over the first box.
        aligned: whether M == N and box i is compared with box i only.
    """
    boxes1, boxes2 = widened(bboxes1), widened(bboxes2)
    if not aligned:
        rows, columns = len(boxes1), len(boxes2)
        boxes1, boxes2 = boxes1.repeat_interleave(columns, 0), boxes2.repeat(rows, 1)
    pairs = zip(boxes1.split(PAIRS_AT_ONCE), boxes2.split(PAIRS_AT_ONCE))
    ious.copy_(torch.cat([_rotated_overlaps(some1, some2, mode_flag) for some1, some2 in pairs]))


def _rotated_overlaps(boxes1: Tensor, boxes2: Tensor, mode: int) -> Tensor:
    """Returns overlaps (P,) of P pairs of rotated boxes (P, 5), computed in float64, in the boxes' dtype."""
    precision = boxes1.dtype
    boxes1, boxes2 = boxes1.double(), boxes2.double()
    origin = boxes2[:, None, :2]  # keeps the coordinates of overlapping boxes small
    shared = _convex_intersection(_corners(boxes1) - origin, _corners(boxes2) - origin)
    base = boxes1[:, 2] * boxes1[:, 3]
    if mode == IOU:
        base = base + boxes2[:, 2] * boxes2[:, 3] - shared
    return (shared / base).nan_to_num(0).to(precision)


def _corners(boxes: Tensor) -> Tensor:
    """Returns corners (P, 4, 2) of rotated boxes (P, 5), in the direction of the angle."""
    signs = boxes.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    across, down = (signs * boxes[:, None, 2:4] / 2).unbind(-1)
    cos, sin = boxes[:, 4, None].cos(), boxes[:, 4, None].sin()
    return boxes[:, None, :2] + torch.stack([across * cos - down * sin, across * sin + down * cos], -1)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _convex_intersection(corners1: Tensor, corners2: Tensor) -> Tensor:
    """Returns the areas (P,) of the intersections of P pairs of convex quadrilaterals (P, 4, 2) of equal orientation.

    The vertices of an intersection are the corners of each that lie in the other and the points where edges cross.
    """
    candidates = _inside(corners1, corners2), _inside(corners2, corners1), _crossings(corners1, corners2)
    points, valid = (torch.cat(parts, 1) for parts in zip(*candidates))
    # Points that are not vertices are moved to a vertex, where they add no area.
    first = valid.int().argmax(1)[:, None, None].expand(-1, 1, 2)
    points = torch.where(valid[..., None], points, points.gather(1, first))
    spokes = points - (points * valid[..., None]).sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None]
    around = torch.atan2(spokes[..., 1], spokes[..., 0]).argsort(1)
    spokes = spokes.gather(1, around[..., None].expand(-1, -1, 2))
    area = _cross(spokes, spokes.roll(-1, 1)).sum(1).abs() / 2
    return torch.where(valid.sum(1) > 2, area, 0)


def _inside(corners: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the corners (P, 4, 2), and which of them (P, 4) lie in the other quadrilateral or on its border."""
    edges = others.roll(-1, 1) - others
    sides = _cross(edges[:, None], corners[:, :, None] - others[:, None])  # (P, corner, edge)
    tolerance = 1e-9 * edges.square().sum((1, 2))
    return corners, (sides >= -tolerance[:, None, None]).all(2)


def _crossings(corners1: Tensor, corners2: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the crossings of the edges' lines (P, 16, 2), and which of them (P, 16) lie on both edges."""
    start1, start2 = corners1[:, :, None], corners2[:, None]
    edge1 = (corners1.roll(-1, 1) - corners1)[:, :, None]
    edge2 = (corners2.roll(-1, 1) - corners2)[:, None]
    turn = _cross(edge1, edge2)
    along1 = _cross(start2 - start1, edge2) / turn
    along2 = _cross(start2 - start1, edge1) / turn
    # The crossing of edges on the same line is rounding noise.
    apart = turn.abs() > 1e-9 * edge1.norm(dim=-1) * edge2.norm(dim=-1)
    met = (along1 >= 0) & (along1 <= 1) & (along2 >= 0) & (along2 <= 1) & apart
    points = start1 + along1.nan_to_num(0, 0, 0)[..., None] * edge1
    return points.flatten(1, 2), met.flatten(1)
