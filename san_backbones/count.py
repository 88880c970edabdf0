"""How much a SAN computes: parameters and multiply-adds, counted by formula from the layers.

Two counts exist. Ours is the common one, one for each multiply-add of a linear map or of the aggregation. The paper's
table also counts norms (2 per element), ReLUs, pooling inputs, biases and subtractions (1 per element).
"""
from typing import Any

from torch import nn

from .attention import PairwiseAttention, _FootprintAttention
from .san import SAN

__all__ = ['count_multiply_adds', 'count_parameters', 'multiply_adds_by_part']


def count_parameters(model: nn.Module) -> int:
    """Learned numbers of the model."""
    return sum(p.numel() for p in model.parameters())


def _linear(layer: nn.Conv2d | nn.Linear, pixels: int, paper: bool) -> int:
    return pixels * (layer.weight.numel() + (layer.bias.numel() if paper and layer.bias is not None else 0))


def _norm_relu(channels: int, pixels: int, paper: bool) -> int:
    return 3 * channels * pixels if paper else 0


def _attention(layer: _FootprintAttention, pixels: int, paper: bool) -> int:
    area = layer.kernel_size ** 2
    mlp: Any = layer.weight_mlp
    total = sum(_linear(conv, pixels, paper) for conv in (layer.query, layer.key, layer.value))
    inputs = pixels * (area if isinstance(layer, PairwiseAttention) else 1)  # vectors that gamma maps
    total += sum(_linear(conv, inputs, paper) for conv in (mlp.fc1, mlp.fc2))
    total += _norm_relu(mlp.fc1.in_channels, inputs, paper) + _norm_relu(mlp.fc2.in_channels, inputs, paper)
    products = {'dot': layer.rel_planes * area, 'hadamard': layer.rel_planes * area,
                'star': layer.rel_planes * area, 'clique': layer.rel_planes * area ** 2}
    total += pixels * products.get(layer.relation, 0)
    if layer.position is not None:
        total += _linear(layer.position, pixels, paper)
        if paper and layer.position_mode == 'relative':
            total += 2 * area * pixels
    if paper and layer.relation in ('subtraction', 'summation'):
        total += layer.rel_planes * area * pixels
    return total + layer.out_planes * area * pixels


def multiply_adds_by_part(
        model: SAN,
        image_size: int | tuple[int, int] = 224,
        paper: bool = False,
) -> dict[str, int]:
    """Multiply-adds of one image through each part of the model: 'stem', 'stages.0', ..., 'head'.

    Args:
        model: A SAN, pruned or not; the head is counted where it has a classifier.
        image_size: Side of the image in pixels, or (height, width).
        paper: Count as the table of Zhao et al. (CVPR 2020) does, see above.

    Returns:
        Counts by the parts' names in the model, in the order of computation.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    pixels = height * width
    parts = {'stem': _linear(model.stem.conv, pixels, paper) + _norm_relu(model.stem.conv.out_channels, pixels, paper)}
    stages: Any = model.stages
    pools = [model.stem.pool, *(stage.pool for stage in stages[1:])]
    for i, (stage, pool) in enumerate(zip(stages, pools)):
        total = 0
        if isinstance(pool, nn.MaxPool2d):
            total += stage.conv.in_channels * pixels if paper else 0
            height, width = height // 2, width // 2
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
    """Multiply-adds of one image through the model: the sum of `multiply_adds_by_part`, which see.

    Returns:
        The count; divide by 1e9 for the usual unit.
    """
    return sum(multiply_adds_by_part(model, image_size, paper).values())
