"""What the operators accept: the compiled loops follow addresses, so that a wrong shape must not get as far."""
import torch
from torch import Tensor

from .gamma import Gamma, Spec
from .reference import PAIRWISE_RELATIONS, PATCHWISE_RELATIONS, POSITIONS

__all__ = ['check_attention', 'check_channels', 'check_gamma', 'check_maps', 'check_spec']


def _described(**tensors: Tensor | None) -> str:
    return ', '.join(f'{name} {list(x.shape)} ({str(x.dtype)[6:]}, {x.device})' for name, x in tensors.items()
                     if x is not None)


def check_spec(spec: Spec) -> None:
    """Raises ValueError unless `spec` describes an attention that exists."""
    relations = PAIRWISE_RELATIONS if spec.pairwise else PATCHWISE_RELATIONS
    if spec.relation not in relations:
        raise ValueError(f'relation of the {"pairwise" if spec.pairwise else "patchwise"} form must be one of '
                         f'{", ".join(map(repr, relations))}, got {spec.relation!r}')
    if spec.position not in POSITIONS:
        raise ValueError(f'position must be one of {", ".join(map(repr, POSITIONS))}, got {spec.position!r}')
    if spec.kernel_size < 1 or spec.kernel_size % 2 == 0 or spec.dilation < 1:
        raise ValueError('kernel_size must be odd and positive and dilation positive, got '
                         f'kernel_size={spec.kernel_size}, dilation={spec.dilation}')


def check_maps(query: Tensor, key: Tensor, value: Tensor, place: Tensor | None) -> None:
    """Raises ValueError unless the maps fit one another."""
    maps = {'query': query, 'key': key, 'value': value, 'place': place}
    for name, x in maps.items():
        if x is None:
            continue
        if x.dim() != 4 or 0 in x.shape[1:]:
            raise ValueError(f'{name} must be a map of shape (N, C, H, W) with C, H and W at least 1, '
                             f'got {list(x.shape)}')
        if not x.is_floating_point():
            raise ValueError(f'{name} must be of a floating dtype, got {x.dtype}: convert it, as in {name}.float()')
    batch, _, height, width = value.shape
    if query.shape != key.shape or query.shape[0] != batch or query.shape[2:] != (height, width):
        raise ValueError('query and key must be (N, r, H, W) and value (N, m, H, W) with the same N, H and W, got '
                         + _described(query=query, key=key, value=value))
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError('query, key and value must have one dtype, got '
                         + _described(query=query, key=key, value=value))
    if place is not None and place.shape != (1, 2, height, width):
        raise ValueError(f'place must be (1, 2, H, W) = {[1, 2, height, width]}, got {list(place.shape)}')
    if not query.device == key.device == (value if place is None else place).device == value.device:
        raise ValueError('query, key, value and place must be on one device, got ' + _described(**maps))


def check_gamma(query: Tensor, value: Tensor, place: Tensor | None, gamma: Gamma, spec: Spec) -> None:
    """Raises ValueError unless gamma's tensors have the widths that maps and spec call for."""
    area, rel = spec.kernel_size ** 2, query.shape[1]
    if spec.pairwise:
        inputs = {'dot': 1, 'concatenation': 2 * rel}.get(spec.relation, rel) + (0 if place is None else 2)
    else:
        inputs = {'star': area, 'clique': area * area}.get(spec.relation, rel * (area + 1))
    for number, norm in ((1, gamma.norm1), (2, gamma.norm2)):
        if not norm.batch_statistics and (norm.running_mean is None or norm.running_var is None):
            raise ValueError(f'norm{number} of gamma has no running_mean or running_var; expected both, or '
                             'batch_statistics=True')
        if norm.momentum is None:
            raise ValueError(f'momentum of norm{number} of gamma must be a number, got None (for a cumulative average, '
                             '1 / number of batches)')
    hidden, outputs, taps = gamma.weight1.shape[0], gamma.weight2.shape[0], 1 if spec.pairwise else area
    expected = {'weight1': (gamma.weight1, (hidden, inputs, 1, 1)), 'weight2': (gamma.weight2, (outputs, hidden, 1, 1)),
                'bias2': (gamma.bias2, (outputs,))}
    for number, norm, channels in ((1, gamma.norm1, inputs), (2, gamma.norm2, hidden)):
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            x = getattr(norm, name)
            if x is not None:
                expected[f'norm{number}.{name}'] = x, (channels,)
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f'{name} of gamma must be {list(shape)} for this relation and these maps, '
                             f'got {list(x.shape)}')
        if not x.is_floating_point():
            raise ValueError(f'{name} of gamma must be of a floating dtype, got {x.dtype}')
        if x.device != value.device:
            raise ValueError(f'the maps are on {value.device} and {name} of gamma is on {x.device}: move maps or layer '
                             'with .to(device)')
    if outputs % taps or outputs == 0 or value.shape[1] % (outputs // taps):
        raise ValueError('the channels of value must be a multiple of the weight channels, got '
                         f'{value.shape[1]} channels and weight2 of gamma with {outputs} rows, {taps} for each weight '
                         'channel')


def check_attention(query: Tensor, key: Tensor, value: Tensor, place: Tensor | None, gamma: Gamma, spec: Spec,
                    shift: Tensor | None) -> None:
    """Raises ValueError for what `ops.footprint_attention` does not accept."""
    check_spec(spec)
    check_maps(query, key, value, place)
    if spec.pairwise and (place is None) != (spec.position == 'none'):
        raise ValueError(f"place must be given for position {spec.position!r}" if place is None else
                         "place must be None for position 'none'; 'relative' and 'absolute' take it")
    check_gamma(query, value, place, gamma, spec)
    if shift is not None:
        check_channels('shift', shift, value.shape[1], value)


def check_channels(name: str, x: Tensor, channels: int, like: Tensor) -> None:
    """Raises ValueError unless x has one floating number for each channel, where `like` is."""
    if x.shape != (channels,) or not torch.is_floating_point(x) or x.device != like.device:
        raise ValueError(f'{name} must be a floating tensor [{channels}] on {like.device}, got '
                         + _described(**{name: x}))
