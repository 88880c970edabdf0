"""What the operators compute, for `torch.utils.flop_counter`: two operations for a multiply-add.

As for torch's own operators, linear maps and products count, and norms, ReLUs and the softmax do not. A backward pass
computes the maps again and then takes two gradients of each, as that of torch's fused attention.
"""
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import fused, native  # noqa: F401, they register the operators
from .folding import Shape

__all__ = ()

_operators = torch.ops.san_backbones


def _hidden(query: Any, weight1: Any, shape: Shape) -> int:
    """Of the relations and of the hidden vectors made of them."""
    vectors = shape.area if shape.described.is_pairwise else 1
    return _products(query, shape) + 2 * query[0] * prod(query[2:]) * vectors * weight1[0] * shape.hidden


def _products(query: Any, shape: Shape) -> int:
    """Of the relations."""
    relation = shape.described
    products = relation.operations(query[1], shape.area) if relation.operation == 'multiply' else 0
    return 2 * query[0] * prod(query[2:]) * products


def _weights(query: Any, shape: Shape) -> int:
    """Of the attention weights, one for each pair and weight channel in both forms."""
    return 2 * query[0] * prod(query[2:]) * shape.area * shape.hidden * shape.channels


def _weighted_sum(value: Any, shape: Shape) -> int:
    return 2 * prod(value) * shape.area


@register_flop_formula(_operators.attend)
def _attend(query, key, value, place, scale1, shift1, weight1, shift2, weight2, bias2, shift, shape, **_) -> int:
    described = Shape(*shape)
    return _hidden(query, weight1, described) + _weights(query, described) + _weighted_sum(value, described)


@register_flop_formula(_operators.attend_backward)
def _attend_backward(gradient, query, key, value, place, scale1, shift1, weight1, shift2, weight2, bias2, shape,
                     **_) -> int:
    described = Shape(*shape)
    return 3 * (_hidden(query, weight1, described) + _weights(query, described)) + 2 * _weighted_sum(value, described)


@register_flop_formula(_operators.hidden_sums)
def _hidden_sums(query, key, place, scale1, shift1, weight1, shape, **_) -> int:
    return _hidden(query, weight1, Shape(*shape))


@register_flop_formula(_operators.hidden_sums_backward)
def _hidden_sums_backward(gradient, query, key, place, scale1, shift1, weight1, shape, **_) -> int:
    return 3 * _hidden(query, weight1, Shape(*shape))


@register_flop_formula(_operators.hidden)
def _hidden_vectors(query, key, scale1, shift1, weight1, shape, **_) -> int:
    return _hidden(query, weight1, Shape(*shape))


@register_flop_formula(_operators.hidden_backward)
def _hidden_vectors_backward(gradient, query, key, scale1, shift1, weight1, shape, **_) -> int:
    described = Shape(*shape)
    return 2 * _hidden(query, weight1, described) + _products(query, described)  # of what is computed, only those again


@register_flop_formula(_operators.attend_hidden)
def _attend_hidden(middle, value, weight2, bias2, shape, **_) -> int:
    return _weights(value, Shape(*shape)) + _weighted_sum(value, Shape(*shape))


@register_flop_formula(_operators.attend_hidden_backward)
def _attend_hidden_backward(gradient, middle, value, weight2, bias2, shape, **_) -> int:
    return 3 * _weights(value, Shape(*shape)) + 2 * _weighted_sum(value, Shape(*shape))


@register_flop_formula(_operators.stem)
def _stem(image, weight, bias, **_) -> int:
    return 2 * image[0] * prod(image[2:]) * prod(weight)


@register_flop_formula(_operators.stem_backward)
def _stem_backward(gradient, image, weight, bias, of_image, **_) -> int:
    return (3 if of_image else 2) * _stem(image, weight, bias)


@register_flop_formula(_operators.scale_shift_relu)
def _scale_shift_relu(*_, **__) -> int:
    return 0
