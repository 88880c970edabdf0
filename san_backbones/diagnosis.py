"""Finds the first layer of a network that leaves the range its batch norms saw in training, and says what to do."""
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .activations import BoundedReLU
from .attention import PatchwiseAttention
from .san import Block

__all__ = ['Diagnosis', 'LayerRange', 'diagnose']


class LayerRange(NamedTuple):
    """How far the input of a batch norm lies from what training saw."""
    name: str
    deviations: float
    """Largest distance from the running mean, in running standard deviations; infinite or NaN if a value is."""
    channel: int
    """Where that value is; `image` counts in the batch."""
    image: int


class Diagnosis(NamedTuple):
    """The result of `diagnose`; `str()` gives the message."""
    layer: str | None
    """The first layer out of range, or the first parameter or buffer that is not finite; None if there is none."""
    finite: bool
    """Whether every output of the model, parameter and buffer is finite."""
    message: str
    layers: tuple[LayerRange, ...]
    """All batch norms that ran, in the order in which they ran."""

    def __str__(self) -> str:
        return self.message


def _range(name: str, norm: Any, x: Tensor) -> LayerRange:
    wide = torch.float32 if x.device.type == 'mps' else torch.float64  # Apple's GPUs have no float64
    x = x.detach().to(wide)
    x = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)  # (N, C, values)
    mean, var = (t.detach().to(wide)[:, None] for t in (norm.running_mean, norm.running_var))
    distances = ((x - mean).abs() / (var + getattr(norm, 'eps', 1e-5)).sqrt()).amax(2)
    where = int(distances.argmax())  # NaN counts as the largest
    return LayerRange(name, float(distances.flatten()[where]), where % distances.shape[1], where // distances.shape[1])


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _advice(model: nn.Module, layer: str) -> str:
    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, Block)]
    if not any(layer.startswith(f'{name}.') for name, _ in blocks) and layer.rpartition('.')[0].endswith('stem'):
        return 'The images are unlike those of the training: check that they are normalised in the same way.'
    unbounded = any(isinstance(block.attn, PatchwiseAttention) and isinstance(block.act1, BoundedReLU)
                    and block.act1.limit is None for _, block in blocks)
    bound = ('Give the network a bound, with the same weights: create it with relu_bound=6. and load them. '
             if unbounded else '')
    return (f'{bound}In a training from random weights: clip the norm of the gradient at 1, lower the learning rate, '
            'and take more pictures for the running statistics (a larger batch, or a smaller momentum of the norms).')


@torch.no_grad()
def diagnose(model: nn.Module, images: Tensor, threshold: float = 300.) -> Diagnosis:
    """Finds the first layer whose values leave the range that training saw.

    Runs the model once, in eval mode, and compares the input of every batch norm with its running mean and variance.
    In a healthy network values lie within a few tens of standard deviations.

    Args:
        model: A SAN, a SANBackbone, a feature extractor, or any other module that holds batch norms and takes images.
        images: (N, C, H, W), preprocessed; for instance those whose outputs are not finite.
        threshold: Standard deviations that still count as in range.

    Returns:
        The layer's name, the ranges of all layers, and a message that says what to do.

    Raises:
        ValueError: The model is in training mode, where batch statistics hide what evaluation does; or there is no
            image.
    """
    model = getattr(model, '_orig_mod', model)  # compiled models do not run hooks
    if model.training:
        raise ValueError('expected a model in eval mode, where running statistics are used; call model.eval()')
    if not len(images):
        raise ValueError(f'expected at least one image, got {list(images.shape)}')
    state = [*model.named_parameters(), *model.named_buffers()]
    broken = next((name for name, tensor in state if not tensor.isfinite().all()), None)
    if broken is not None:
        return Diagnosis(broken, False, f'{broken} holds values that are not finite: the training went wrong before '
                         'this. Go back to an earlier checkpoint, with a lower learning rate and the norm of the '
                         'gradient clipped at 1.', ())
    found: list[LayerRange] = []
    handles = [norm.register_forward_pre_hook(lambda norm, args, name=name: found.append(_range(name, norm, args[0])))
               for name, norm in model.named_modules()
               if isinstance(getattr(norm, 'running_var', None), Tensor) and not norm.training]
    try:
        output = model(images)
    finally:
        for handle in handles:
            handle.remove()
    finite = all(bool(tensor.isfinite().all()) for tensor in _tensors(output))
    first = next((layer for layer in found if not layer.deviations <= threshold), None)
    if not found:
        message = (f'No batch norm with running statistics ran in this {type(model).__name__}, so there is nothing to '
                   f'compare with; the output is {"" if finite else "not "}finite.')
    elif first is None and finite:
        largest = max(layer.deviations for layer in found)
        message = f'All values are finite and within {largest:.3g} standard deviations of what training saw.'
    elif first is None:
        message = 'The output is not finite, although every batch norm has inputs in range: look at the layers behind.'
    else:
        result = '' if finite else ' The output is not finite.'
        message = (f'{first.name} is the first layer out of range: its input lies {first.deviations:.3g} standard '
                   f'deviations from the mean that training saw (channel {first.channel}, image {first.image}).'
                   f'{result} {_advice(model, first.name)}')
    return Diagnosis(first and first.name, finite, message, tuple(found))
