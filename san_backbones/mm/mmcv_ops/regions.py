"""Region operators of the `mmcv._ext` stand-in: pooling of feature maps within boxes.

Regions `rois` are (K, 5): the index of the image, then x1, y1, x2, y2 in the image, which `spatial_scale` scales to the
feature map. Features are (N, C, H, W), results (K, C, pooled height, pooled width).
"""
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401, registers torch.ops.torchvision
from torch import Tensor

from .sampling import bilinear, gradients, widened

MAX, AVERAGE = range(2)  # `pool_mode`
FAR = 1e6  # pixels, beyond any map
SAMPLES_AT_ONCE = 1 << 23  # bounds the samples in memory: 32 MB for each float32 tensor


def roi_align_forward(input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor,
                      aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
                      pool_mode: int, aligned: bool) -> None:
    """Pools bilinear samples on a regular grid in each bin (Mask R-CNN, section 3).

    Args:
        input: (N, C, H, W).
        rois: (K, 5).
        output: (K, C, aligned_height, aligned_width), written.
        argmax_y: shaped as `output` for the max mode, written: row of the largest sample in the bin's grid; else empty.
        argmax_x: the same for its column.
        aligned_height: bins per region, downwards.
        aligned_width: bins per region, across.
        spatial_scale: from image to feature coordinates.
        sampling_ratio: samples per bin and axis; 0 for about one per feature pixel.
        pool_mode: 0 for the maximum, 1 for the average. A bin without samples becomes 0.
        aligned: whether pixel centres are at half-integer coordinates; else regions are also at least one pixel wide.
    """
    features = widened(input)
    boxes = _safe(rois).to(features.dtype)
    bins = (aligned_height, aligned_width)
    if pool_mode == AVERAGE:
        output.copy_(_roi_align(features, boxes, bins, spatial_scale, sampling_ratio, aligned))
        return
    output.zero_(), argmax_y.fill_(-1), argmax_x.fill_(-1)
    sides = _sides(boxes, spatial_scale, aligned)
    for some, (rows, columns) in _alike(sides, bins, sampling_ratio, features.shape[1]):
        grid = (bins[0] * rows, bins[1] * columns)
        samples = _roi_align(features, boxes[some], grid, spatial_scale, 1, aligned)
        largest, index = F.max_pool2d(samples, (rows, columns), return_indices=True)
        output[some] = largest.to(output.dtype)
        # Indices within the bin are small numbers, which are exact in half precision; coordinates would not be.
        argmax_y[some] = (index // grid[1] % rows).to(argmax_y.dtype)
        argmax_x[some] = (index % grid[1] % columns).to(argmax_x.dtype)


def roi_align_backward(grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor,
                       aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
                       pool_mode: int, aligned: bool) -> None:
    """Writes the gradient of `roi_align_forward` in the features to `grad_input` (N, C, H, W)."""
    grad = widened(grad_output)
    boxes = _safe(rois).to(grad.dtype)
    bins = (aligned_height, aligned_width)
    if pool_mode == AVERAGE:
        grad_input.copy_(
            _roi_align_backward(grad, boxes, bins, spatial_scale, sampling_ratio, aligned, grad_input.shape))
        return
    total = grad.new_zeros(grad_input.shape)
    sides = _sides(boxes, spatial_scale, aligned)
    for some, (rows, columns) in _alike(sides, bins, sampling_ratio, grad.shape[1]):
        samples = grad.new_zeros(len(some), grad.shape[1], bins[0], rows, bins[1], columns)
        index = argmax_y[some].long() * columns + argmax_x[some].long()
        samples = samples.permute(0, 1, 2, 4, 3, 5).flatten(4)
        samples.scatter_(4, index[..., None], grad[some][..., None])
        samples = samples.unflatten(4, (rows, columns)).permute(0, 1, 2, 4, 3, 5)
        samples = samples.reshape(len(some), grad.shape[1], bins[0] * rows, bins[1] * columns)
        grid = samples.shape[2:]
        total += _roi_align_backward(samples, boxes[some], grid, spatial_scale, 1, aligned, total.shape)
    grad_input.copy_(total)


def _roi_align(features, boxes, bins, spatial_scale, sampling_ratio, aligned) -> Tensor:
    return torch.ops.torchvision.roi_align(features, boxes, spatial_scale, *bins, sampling_ratio, aligned)


def _roi_align_backward(grad, boxes, bins, spatial_scale, sampling_ratio, aligned, shape) -> Tensor:
    return torch.ops.torchvision._roi_align_backward(
        grad, boxes, spatial_scale, *bins, *shape, sampling_ratio, aligned)


def _safe(rois: Tensor) -> Tensor:
    """Makes regions with a corner that is not finite (as in a diverged training) empty and outside the map.

    Otherwise torchvision would read out of bounds for them, or never end.
    """
    boxes = widened(rois)
    corners = torch.where(boxes[:, 1:].isfinite().all(1, keepdim=True), boxes[:, 1:], FAR)
    return torch.cat([boxes[:, :1], corners], 1)


def _sides(boxes: Tensor, spatial_scale: float, aligned: bool) -> Tensor:
    """Returns height and width (K, 2) of regions on the feature map, in pixels."""
    sides = (boxes[:, [4, 3]] - boxes[:, [2, 1]]) * spatial_scale
    return sides if aligned else sides.clamp(min=1)


def _alike(sides: Tensor, bins: tuple[int, int], sampling_ratio: int,
           channels: int) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Groups regions by the grid of samples in their bins.

    Args:
        sides: (K, 2), height and width on the feature map.
        bins: bins per region, downwards and across.
        sampling_ratio: samples per bin and axis; 0 for as many as the bin has pixels, rounded up.
        channels: channels of the features; a group has at most `SAMPLES_AT_ONCE` samples, or one region.

    Yields:
        Indices of regions, and the rows and columns of samples in each of their bins; never an empty grid.
    """
    if sampling_ratio > 0:
        grids = torch.full_like(sides, sampling_ratio, dtype=torch.long)
    else:
        grids = (sides / sides.new_tensor(bins)).ceil().clamp(min=0).long()
    kinds, kind = grids.unique(dim=0, return_inverse=True)
    for number, (rows, columns) in enumerate(kinds.tolist()):
        if rows and columns:
            samples = channels * bins[0] * rows * bins[1] * columns
            members = (kind == number).nonzero()[:, 0]
            for some in members.split(max(1, SAMPLES_AT_ONCE // samples)):
                yield some, (rows, columns)


def roi_pool_forward(input: Tensor, rois: Tensor, output: Tensor, argmax: Tensor, pooled_height: int,
                     pooled_width: int, spatial_scale: float) -> None:
    """Takes the maximum over the pixels that each bin touches (Fast R-CNN, section 2.1).

    Unlike in torchvision, bins have fractional borders and include x2 and y2.

    Args:
        input: (N, C, H, W).
        rois: (K, 5).
        output: (K, C, pooled_height, pooled_width), written; 0 if a bin lies outside the map.
        argmax: integers of the same shape, written: index of the largest of the H * W pixels, or -1.
        pooled_height: bins per region, downwards.
        pooled_width: bins per region, across.
        spatial_scale: from image to feature coordinates.
    """
    channels, height, width = input.shape[1:]
    boxes = _safe(rois)
    top, bottom = _pixel_bins(boxes[:, 2], boxes[:, 4], pooled_height, spatial_scale, height)
    left, right = _pixel_bins(boxes[:, 1], boxes[:, 3], pooled_width, spatial_scale, width)

    pixels = input.permute(0, 2, 3, 1).reshape(-1, channels)
    first = boxes[:, 0].long()[:, None, None] * height * width
    bins = (len(rois), pooled_height, pooled_width)
    largest = input.new_full((*bins, channels), -torch.inf).flatten(0, 2)
    winner = argmax.new_full((*bins, channels), -1).flatten(0, 2)
    for down in range(int((bottom - top).max()) if len(rois) else 0):
        for across in range(int((right - left).max())):
            row, column = top + down, left + across
            touched = ((row < bottom)[:, :, None] & (column < right)[:, None]).flatten().nonzero()[:, 0]
            here = row[:, :, None] * width + column[:, None]
            value, before = pixels[(first + here).flatten()[touched]], largest[touched]
            here = here.flatten()[touched, None].to(winner.dtype)
            larger = value > before
            largest[touched] = torch.where(larger, value, before)
            winner[touched] = torch.where(larger, here, winner[touched])
    largest = torch.where(winner < 0, 0, largest)
    output.copy_(largest.unflatten(0, bins).permute(0, 3, 1, 2))
    argmax.copy_(winner.unflatten(0, bins).permute(0, 3, 1, 2))


def _pixel_bins(start: Tensor, end: Tensor, bins: int, spatial_scale: float, size: int) -> tuple[Tensor, Tensor]:
    """Returns the first pixel and the end (K, bins) of each bin along one axis; empty bins for empty regions."""
    start, end = start * spatial_scale, (end + 1) * spatial_scale
    side = (end - start) / bins
    number = torch.arange(bins, device=start.device, dtype=start.dtype)
    first = (number * side[:, None] + start[:, None]).floor().clamp(0, size).long()
    last = ((number + 1) * side[:, None] + start[:, None]).ceil().clamp(0, size).long()
    return first, torch.where(side[:, None] > 0, last, first)


def roi_pool_backward(grad_output: Tensor, rois: Tensor, argmax: Tensor, grad_input: Tensor, pooled_height: int,
                      pooled_width: int, spatial_scale: float) -> None:
    """Writes the gradient of `roi_pool_forward` in the features to `grad_input` (N, C, H, W)."""
    _, channels, height, width = grad_input.shape
    plane = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)
    index = plane[:, :, None, None] * height * width + argmax
    pooled = argmax >= 0
    total = widened(grad_output).new_zeros(grad_input.numel())
    total.index_add_(0, index[pooled], widened(grad_output)[pooled])
    grad_input.copy_(total.view(grad_input.shape))


def deform_roi_pool_forward(input: Tensor, rois: Tensor, offset: Tensor, output: Tensor, pooled_height: int,
                            pooled_width: int, spatial_scale: float, sampling_ratio: int, gamma: float) -> None:
    """RoIAlign with shifted bins (Deformable Convolutional Networks, section 2.2).

    Args:
        input: (N, C, H, W).
        rois: (K, 5).
        offset: (K, 2, pooled_height, pooled_width), shifts across and down of each bin, in units of `gamma` times the
            region's side; empty for none.
        output: (K, C, pooled_height, pooled_width), written.
        pooled_height: bins per region, downwards.
        pooled_width: bins per region, across.
        spatial_scale: from image to feature coordinates.
        sampling_ratio: samples per bin and axis; 0 for about one per feature pixel.
        gamma: scale of the shifts.
    """
    features, boxes = widened(input), _safe(rois)
    shifts = _shifts(offset, features, len(rois), pooled_height, pooled_width)
    output.zero_()
    sides = _sides(boxes, spatial_scale, aligned=True)
    for some, grid in _alike(sides, (pooled_height, pooled_width), sampling_ratio, features.shape[1]):
        pooled = _deform_roi_pool(features, boxes[some], shifts[some], grid, spatial_scale, gamma)
        output[some] = pooled.to(output.dtype)


def deform_roi_pool_backward(grad_output: Tensor, input: Tensor, rois: Tensor, offset: Tensor, grad_input: Tensor,
                             grad_offset: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float,
                             sampling_ratio: int, gamma: float) -> None:
    """Writes the gradients of `deform_roi_pool_forward` to `grad_input` and `grad_offset`.

    They match the forward pass everywhere, also for samples on the border of the map.
    """
    features, boxes = widened(input), _safe(rois)
    shifts = _shifts(offset, features, len(rois), pooled_height, pooled_width)
    grad_features, grad_shifts = torch.zeros_like(features), torch.zeros_like(shifts)
    sides = _sides(boxes, spatial_scale, aligned=True)
    for some, grid in _alike(sides, (pooled_height, pooled_width), sampling_ratio, features.shape[1]):

        def pool(features, shifts, some=some, grid=grid):
            return _deform_roi_pool(features, boxes[some], shifts, grid, spatial_scale, gamma)

        some_features, some_shifts = gradients(pool, (features, shifts[some]), grad_output[some])
        grad_features += some_features
        grad_shifts[some] = some_shifts
    grad_input.copy_(grad_features)
    if grad_offset.numel():
        grad_offset.copy_(grad_shifts)


def _shifts(offset: Tensor, features: Tensor, regions: int, height: int, width: int) -> Tensor:
    if offset.numel():
        return offset.to(features.dtype)
    return features.new_zeros(regions, 2, height, width)


def _deform_roi_pool(features: Tensor, boxes: Tensor, shifts: Tensor, grid: tuple[int, int], spatial_scale: float,
                     gamma: float) -> Tensor:
    """Averages over the same `grid` of samples in every bin, differentiably: (K, C, pooled height, pooled width)."""
    across, down = shifts.unbind(1)
    y = _sample_positions(boxes[:, 2], boxes[:, 4], shifts.shape[2], grid[0], spatial_scale)[:, :, None, :, None]
    x = _sample_positions(boxes[:, 1], boxes[:, 3], shifts.shape[3], grid[1], spatial_scale)[:, None, :, None, :]
    height, width = _sides(boxes, spatial_scale, aligned=True)[:, :, None, None].unbind(1)
    y = y + (gamma * height * down)[..., None, None]
    x = x + (gamma * width * across)[..., None, None]
    y, x = torch.broadcast_tensors(y, x)  # (K, pooled height, pooled width, *grid)
    image = boxes[:, 0].long()[:, None, None, None, None]
    return bilinear(features, image, y, x).mean((3, 4)).permute(0, 3, 1, 2)


def _sample_positions(start: Tensor, end: Tensor, bins: int, samples: int, spatial_scale: float) -> Tensor:
    """Returns evenly spaced positions (K, bins, samples) along one axis of regions that span (K,) start to end."""
    start, end = start * spatial_scale - 0.5, end * spatial_scale - 0.5
    share = (torch.arange(bins * samples, device=start.device, dtype=start.dtype) + 0.5) / (bins * samples)
    return (start[:, None] + (end - start)[:, None] * share).view(-1, bins, samples)
