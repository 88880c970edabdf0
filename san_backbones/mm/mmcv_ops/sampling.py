"""Shared by the parts of the `mmcv._ext` stand-in: precision, differentiation, bilinear sampling."""
import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """Converts to a precision for computation: float64 stays, everything else becomes float32.

    Half and bfloat16 cannot hold box coordinates of a large image, and many operators lack them on CPU.
    """
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def gradients(function, inputs: tuple[Tensor, ...], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Computes gradients of `function(*inputs)`; runs it again, since mmcv's backward functions have no graph.

    Args:
        function: differentiable, returns one tensor.
        inputs: tensors to differentiate with respect to.
        grad_output: gradient of the returned tensor, of its shape.

    Returns:
        One gradient per input; zeros for an input that the output does not depend on.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        output = function(*leaves)
    return torch.autograd.grad(output, leaves, grad_output.to(output.dtype), allow_unused=True, materialize_grads=True)


def bilinear(features: Tensor, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Samples feature maps at points, by RoIAlign's rule, differentiably in the features and in the positions.

    A point more than one pixel outside the map reads 0; other points outside are first moved onto the border.

    Args:
        features: (N, C, H, W).
        image: integer index into N, of any shape.
        y: row of the points in pixels, of the same shape.
        x: column of the points in pixels, of the same shape.

    Returns:
        (*points, C).
    """
    _, channels, height, width = features.shape
    # Written so that NaN counts as outside: it must not become an index.
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y = torch.where(inside, y, 0).clamp(0, height - 1)
    x = torch.where(inside, x, 0).clamp(0, width - 1)
    top, left = y.detach().floor().long(), x.detach().floor().long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    down, across = (y - top)[..., None], (x - left)[..., None]
    pixels = features.permute(0, 2, 3, 1).reshape(-1, channels)

    def read(row, column):
        return pixels[(image * height + row) * width + column]

    upper = read(top, left) * (1 - across) + read(top, right) * across
    lower = read(bottom, left) * (1 - across) + read(bottom, right) * across
    return (upper * (1 - down) + lower * down) * inside[..., None]
