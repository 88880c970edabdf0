"""Counts parameters and multiply-adds of a SAN, by formula from its layers.

There are two ways to count. Ours is the common one: one per multiply-add of a linear map or of the aggregation. The
paper's table also counts norms (2 per element), ReLUs, pooling inputs, biases and subtractions (1 per element).
"""
from typing import Any, cast

from torch import nn

from . import ops
from .attention import FootprintAttention, PairwiseAttention
from .checks import is_integer, sides
from .san import SAN

__all__ = ['count_multiply_adds', 'count_parameters', 'multiply_adds_by_part']


def count_parameters(model: nn.Module) -> int:
    """Counts the elements of the model's parameters."""
    return sum(p.numel() for p in model.parameters())


def _linear(layer: nn.Conv2d | nn.Linear, pixels: int, paper: bool) -> int:
    return pixels * (layer.weight.numel() + (layer.bias.numel() if paper and layer.bias is not None else 0))


def _norm_relu(channels: int, pixels: int, paper: bool) -> int:
    return 3 * channels * pixels if paper else 0


def _attention(layer: FootprintAttention, pixels: int, paper: bool) -> int:
    area = layer.kernel_size ** 2
    mlp: Any = layer.weight_mlp
    total = sum(_linear(conv, pixels, paper) for conv in (layer.query, layer.key, layer.value))
    inputs = pixels * (area if isinstance(layer, PairwiseAttention) else 1)  # vectors that gamma maps
    total += sum(_linear(conv, inputs, paper) for conv in (mlp.fc1, mlp.fc2))
    total += _norm_relu(mlp.fc1.in_channels, inputs, paper) + _norm_relu(mlp.fc2.in_channels, inputs, paper)
    relation = ops.relations.find(layer.pairwise, layer.relation)
    if relation.operation == 'multiply' or paper:
        total += pixels * relation.operations(layer.rel_planes, area)
    if layer.position is not None:
        total += _linear(layer.position, pixels, paper)
        if paper and layer.position_mode == 'relative':
            total += 2 * area * pixels
    return total + layer.out_planes * area * pixels


def multiply_adds_by_part(
        model: SAN,
        image_size: int | tuple[int, int] = 224,
        paper: bool = False,
) -> dict[str, int]:
    """Counts the multiply-adds of one image in each part of the model: 'stem', 'stages.0', ..., 'head'.

    Args:
        model: A SAN, pruned or not; the head is counted if it has a classifier.
        image_size: Side of the image in pixels, or (height, width).
        paper: Count as the table of Zhao et al. (CVPR 2020) does, see above.

    Returns:
        Counts by the names of the parts, in the order of computation.

    Raises:
        TypeError: The model is none, or has been made into a feature extractor.
        ValueError: The size is none.
    """
    if not isinstance(model, SAN):
        raise TypeError(f'expected a SAN, got a {type(model).__name__}: a model of timm.create_model without '
                        'features_only; torch.utils.flop_counter.FlopCounterMode counts what others compute')
    height, width = sides(image_size)
    if not is_integer(height) or not is_integer(width):
        raise ValueError(f'image_size must be at least 1 pixel, an integer or (height, width), got {image_size!r}')
    conv, stages, parts = model.stem.conv, cast(Any, model.stages), {}
    height, width = (max(side // conv.stride[0], 1) for side in (height, width))
    parts['stem'] = _linear(conv, height * width, paper) + _norm_relu(conv.out_channels, height * width, paper)
    # the paper's table counts the stem's pooling with the first stage
    strides = [model.stem.stride // conv.stride[0], *(stage.stride for stage in stages[1:])]
    for i, (stage, stride) in enumerate(zip(stages, strides)):
        total = stage.conv.in_channels * height * width if paper and stride > 1 else 0
        height, width = (max(side // stride, 1) for side in (height, width))
        pixels = height * width
        total += _linear(stage.conv, pixels, paper)
        for block in stage.blocks:
            total += _norm_relu(stage.conv.out_channels, pixels, paper)
            total += _attention(block.attn, pixels, paper)
            total += _norm_relu(block.attn.out_planes, pixels, paper)
            total += _linear(block.conv, pixels, paper)
        parts[f'stages.{i}'] = total + _norm_relu(stage.conv.out_channels, pixels, paper)
    if isinstance(model.head.fc, nn.Linear):
        parts['head'] = _linear(model.head.fc, 1, paper) + (model.num_features * pixels if paper else 0)
    return parts


def count_multiply_adds(model: SAN, image_size: int | tuple[int, int] = 224, paper: bool = False) -> int:
    """Counts the multiply-adds of one image in the model: the sum of `multiply_adds_by_part`.

    Returns:
        The count; divide by 1e9 for the usual unit.
    """
    return sum(multiply_adds_by_part(model, image_size, paper).values())
