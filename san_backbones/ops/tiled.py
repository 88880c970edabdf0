"""Footprint attention in tiles: a few rows, or a part of one, at a time, recomputed in the backward pass.

The definition of `reference`, applied to parts of the padded maps, so that the k x k axis exists for one tile only:
memory is the maps themselves plus O(tile), in training too. Norms come as an affine map; where they use batch
statistics, a pass over the tiles gathers mean and variance first, and gradients flow through them exactly.
"""
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import geometry, reference
from .gamma import Affine, Gamma, Norm, Spec, fold, fold_batch, moments, refuse_other_backward
from .relations import constant

__all__ = ['TILE_ELEMENTS', 'attend']

TILE_ELEMENTS = 1 << 20
"""Elements of the widest k x k tensor of one tile; beyond the last-level cache larger tiles gain nothing on a CPU."""

OWN, HALO, WHOLE = 'own', 'halo', 'whole'  # how an input is cut: its own pixels; those and their border; not at all


class Tile(NamedTuple):
    images: slice
    rows: slice
    columns: slice
    reach: int  # pixels that a halo input has beyond `rows` and `columns`

    def cut(self, x: Tensor, kind: str) -> Tensor:
        if kind == WHOLE:
            return x
        images = self.images if x.shape[0] > 1 else slice(None)  # coordinates are shared by the images of a batch
        more = self.reach if kind == HALO else 0
        return x[images, :, self.rows.start:self.rows.stop + more, self.columns.start:self.columns.stop + more]


def tiles(batch: int, height: int, width: int, depth: int, reach: int) -> Iterator[Tile]:
    """Cuts N x H x W pixels of `depth` elements each into tiles of about TILE_ELEMENTS elements."""
    columns = min(width, max(1, TILE_ELEMENTS // depth))
    rows = min(height, max(1, TILE_ELEMENTS // (depth * columns)))
    images = max(1, TILE_ELEMENTS // (depth * width * height)) if rows == height else 1
    for image in range(0, max(batch, 1), images):  # an empty batch is one empty tile
        for row in range(0, height, rows):
            for column in range(0, width, columns):
                yield Tile(slice(image, min(image + images, batch)), slice(row, min(row + rows, height)),
                           slice(column, min(column + columns, width)), reach)


class Plan(NamedTuple):
    """A computation on tiles: the function of the cut inputs, how each is cut, and the tiles."""
    function: Callable[..., Tensor]
    kinds: tuple[str, ...]
    tiles: list[Tile]


@contextlib.contextmanager
def _autocast_as(state: tuple[str, bool, torch.dtype]) -> Iterator[None]:
    device_type, enabled, dtype = state
    with torch.autocast(device_type, dtype=dtype, enabled=enabled):
        yield


def _autocast_state(x: Tensor) -> tuple[str, bool, torch.dtype]:
    kind = x.device.type
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _backward_by_tiles(
        plan: Plan,
        inputs: Sequence[Tensor],
        needs_grad: Sequence[bool],
        autocast: tuple[str, bool, torch.dtype],
        seed: Callable[[Tensor, Tile], tuple[Tensor, Tensor]],
) -> list[Tensor | None]:
    """Recomputes every tile with gradients and sums them.

    `seed` turns a tile's output into (what to differentiate, the gradient it receives).
    """
    def accumulator(x: Tensor, kind: str) -> Tensor:
        wide = torch.float32 if kind == WHOLE and x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        return torch.zeros(x.shape, dtype=wide, device=x.device)

    grads = [accumulator(x, kind) if needed else None for x, kind, needed in zip(inputs, plan.kinds, needs_grad)]
    for tile in plan.tiles:
        cut = [tile.cut(x, kind).detach().requires_grad_(needed)
               for x, kind, needed in zip(inputs, plan.kinds, needs_grad)]
        with torch.enable_grad(), _autocast_as(autocast):
            target, gradient = seed(plan.function(*cut), tile)
        wanted = [x for x, needed in zip(cut, needs_grad) if needed]
        parts = iter(torch.autograd.grad(target, wanted, gradient, allow_unused=True))
        for grad, kind in zip(grads, plan.kinds):
            if grad is not None:
                part = next(parts)
                if part is not None:
                    tile.cut(grad, kind).add_(part)
    return [grad if grad is None else grad.to(x.dtype) for grad, x in zip(grads, inputs)]


class _Map(torch.autograd.Function):
    """Pixels of output from pixels of input."""

    @staticmethod
    def forward(ctx, plan: Plan, *inputs: Tensor) -> Tensor:
        ctx.plan, ctx.autocast = plan, _autocast_state(inputs[0])
        ctx.save_for_backward(*inputs)
        output: Any = None
        for tile in plan.tiles:
            part = plan.function(*map(tile.cut, inputs, plan.kinds))
            if output is None:
                last = plan.tiles[-1]
                output = part.new_empty((last.images.stop, part.shape[1], last.rows.stop, last.columns.stop))
            output[tile.images, :, tile.rows, tile.columns] = part
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_other_backward(grad_output)

        def seed(output: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
            return output, grad_output[tile.images, :, tile.rows, tile.columns].to(output.dtype)

        return (None, *_backward_by_tiles(
            ctx.plan, ctx.saved_tensors, ctx.needs_input_grad[1:], ctx.autocast, seed))


class _Statistics(torch.autograd.Function):
    """Mean and biased variance per channel of what a plan computes, (N, C, P, H, W) over all but C."""

    @staticmethod
    def forward(ctx, plan: Plan, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        count, mean, scatter = 0, torch.empty(0), torch.empty(0)
        for tile in plan.tiles:
            part = plan.function(*map(tile.cut, inputs, plan.kinds))
            part = part if part.dtype == torch.float64 else part.float()
            n = part.numel() // part.shape[1]
            part_mean, part_var = moments(part, (0, 2, 3, 4))
            if count == 0:
                count, mean, scatter = n, part_mean, part_var * n
            else:  # Chan, Golub and LeVeque 1979: joining two sets without subtracting large sums
                delta = part_mean - mean
                scatter = scatter + part_var * n + delta * delta * (count * n / (count + n))
                mean = mean + delta * (n / (count + n))
                count += n
        ctx.plan, ctx.count, ctx.autocast = plan, max(count, 1), _autocast_state(inputs[0])
        ctx.save_for_backward(mean, *inputs)
        return mean, scatter / ctx.count

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        refuse_other_backward(grad_mean)
        mean, *inputs = ctx.saved_tensors
        shape = (1, -1, 1, 1, 1)
        to_mean, to_var, centre = (t.view(shape) for t in (grad_mean / ctx.count, 2 * grad_var / ctx.count, mean))

        def seed(output: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
            # d mean / d x = 1 / n and d var / d x = 2 (x - mean) / n
            return output, (to_mean + to_var * (output.detach() - centre)).to(output.dtype)

        return (None, *_backward_by_tiles(ctx.plan, inputs, ctx.needs_input_grad[1:], ctx.autocast, seed))


def _scale_shift_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)  # as batch norm: half precision has no room for mean / deviation
    scale, shift = (t.to(wide).view(-1, 1, 1, 1) for t in (scale, shift))
    return torch.addcmul(shift, x.to(wide), scale).relu().to(x.dtype)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(weight.flatten(1), x.flatten(2)).unflatten(2, x.shape[2:])


def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        place: Tensor | None,
        gamma: Gamma,
        spec: Spec,
) -> Tensor:
    """Footprint attention by tiles; arguments as `ops.footprint_attention`."""
    pad = geometry.padding(spec.kernel_size, spec.dilation)
    batch, _, height, width = value.shape
    hidden_width = max(gamma.weight1.shape[:2])
    area = spec.kernel_size ** 2 if spec.pairwise else 1
    products = constant(spec, 'operations', query.shape[1], spec.kernel_size ** 2)  # before they are summed
    depth = max(area * hidden_width, spec.kernel_size ** 2 * value.shape[1], products)
    cuts = list(tiles(batch, height, width, depth, 2 * pad))

    query_kind = HALO if constant(spec, 'every_query') else OWN
    maps = [geometry.reflect_pad(query, pad) if query_kind == HALO else query, geometry.reflect_pad(key, pad)]
    kinds = [query_kind, HALO]
    if place is not None:
        maps += [place, geometry.reflect_pad(place, pad)]
        kinds += [OWN, HALO]
    n = len(maps)

    def plan(function: Callable[..., Tensor], *more: str) -> Plan:
        return Plan(function, (*kinds, *more), cuts)

    def relation(query: Tensor, key: Tensor, place: Tensor | None = None, place_padded: Tensor | None = None) -> Tensor:
        return reference.relate(query, key, place, place_padded, *spec)

    def hidden(*inputs: Tensor) -> Tensor:
        scale, shift, weight = inputs[n:]
        x = _linear(_scale_shift_relu(relation(*inputs[:n]), scale, shift), weight)
        return x if spec.pairwise else x.squeeze(2)

    def weighted_sum(hidden: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor,
                     value: Tensor) -> Tensor:
        logits = _linear(_scale_shift_relu(hidden, scale, shift), weight)
        logits = logits + bias.to(logits.dtype).view(-1, 1, 1, 1)
        return reference.aggregate(logits, value, spec.pairwise, spec.kernel_size, spec.dilation)

    def affine(norm: Norm, statistics: Plan, inputs: Sequence[Tensor]) -> Affine:
        if not norm.batch_statistics:
            return fold(norm, norm.running_mean, norm.running_var)
        mean, var = _Statistics.apply(statistics, *inputs)
        return fold_batch(norm, mean, var, batch * height * width * area)

    last = [gamma.weight2, gamma.bias2, geometry.reflect_pad(value, pad)]
    first = [*maps, *affine(gamma.norm1, plan(relation), maps), gamma.weight1]
    to_hidden = plan(hidden, *(WHOLE,) * 3)
    if spec.pairwise:  # the hidden vectors have the k x k axis: compute them again rather than keep them
        norm2 = affine(gamma.norm2, to_hidden, first)
        whole = plan(lambda *x: weighted_sum(hidden(*x[:n + 3]), *x[n + 3:]), *(WHOLE,) * 7, HALO)
        return _Map.apply(whole, *first, *norm2, *last)
    z = _Map.apply(to_hidden, *first)  # one vector a pixel: keep it
    norm2 = affine(gamma.norm2, Plan(lambda z: z.unsqueeze(2), (OWN,), cuts), [z])
    from_hidden = Plan(lambda z, *x: weighted_sum(z.unsqueeze(2), *x), (OWN, *(WHOLE,) * 4, HALO), cuts)
    return _Map.apply(from_hidden, z, *norm2, *last)
