"""What the operators accept: fused backends follow addresses, so that a wrong shape must not get as far."""
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .contract import FusedBackend
from .folding import Shape, round_up
from .gamma import Gamma, Spec
from .relations import POSITIONS, constant

__all__ = ['check_attention', 'check_channels', 'check_gamma', 'check_maps', 'check_operator', 'check_part',
           'check_shape', 'check_spec', 'need']


def _described(**tensors: Tensor | None) -> str:
    return ', '.join(f'{name} {list(x.shape)} ({str(x.dtype)[6:]}, {x.device})' for name, x in tensors.items()
                     if x is not None)


def check_spec(spec: Spec) -> None:
    """Raises ValueError unless `spec` describes an attention that exists."""
    constant(spec, 'name')  # raises for a relation that its form has not
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
    area = spec.kernel_size ** 2
    inputs = constant(spec, 'width', query.shape[1], area, place is not None)
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
    if constant(spec, 'has_positions') and (place is None) != (spec.position == 'none'):
        raise ValueError(f"place must be given for position {spec.position!r}" if place is None else
                         "place must be None for position 'none'; 'relative' and 'absolute' take it")
    check_gamma(query, value, place, gamma, spec)
    if shift is not None:
        check_channels('shift', shift, value.shape[1], value)


def check_channels(name: str, x: Tensor, channels: int, like: Tensor) -> None:
    """Raises ValueError unless x has one floating element for each channel, where `like` is."""
    check_shape(name, x, (channels,), like)


def check_operator(shape: Shape, backend: FusedBackend, maps: Sequence[Tensor | None],
                   folded: Mapping[str, Tensor | None], gradient: Tensor | None = None) -> None:
    """Raises ValueError for what a registered operator does not accept.

    Args:
        shape: What the attention is said to be.
        backend: What is to run it.
        maps: query, key, value (None for the hidden vectors' statistics) and place.
        folded: scale1, shift1, weight1; except for those statistics also shift2, weight2, bias2 and the output's shift.
        gradient: Of the output, or of the statistics.
    """
    relation = shape.described
    _check_described(shape, backend)
    if backend.parts and not relation.is_pairwise and (gradient is not None or 'weight2' not in folded):
        raise ValueError(f'the {backend.name} backend has gradients and statistics of the {relation.form} form by its '
                         'parts: call the operators hidden and attend_hidden')
    query, key, value, place = maps
    needed = {name: x for name, x in folded.items() if name != 'shift'}
    need(query=query, key=key, **({'value': value} if 'weight2' in folded else {}), **needed)
    assert query is not None and key is not None
    check_maps(query, key, key if value is None else value, place)
    _check_served(backend, query)
    if place is not None and not relation.has_positions:
        raise ValueError(f'place must be None for the {relation.form} form')
    output: tuple[int, ...] = (2, shape.hidden)
    if value is not None:
        _check_value(shape, value)
        output = tuple(value.shape)
    _check_folded(shape, backend, folded, relation.width(query.shape[1], shape.area, place is not None), value, query)
    if gradient is not None:
        check_shape('gradient', gradient, output, query)


def check_part(shape: Shape, backend: FusedBackend, maps: Mapping[str, Tensor | None],
               folded: Mapping[str, Tensor | None], gradient: Tensor | None = None) -> None:
    """As `check_operator`, for the operators that do a part of the patchwise form.

    Args:
        shape: What the attention is said to be.
        backend: What is to run it.
        maps: query and key, or middle and value.
        folded: scale1, shift1 and weight1, or weight2 and bias2.
        gradient: Of the hidden vectors, or of the output.
    """
    relation = shape.described
    _check_described(shape, backend)
    if relation.is_pairwise or not backend.parts:
        raise ValueError(f'the {backend.name} backend does not do the {relation.form} form in parts')
    need(**maps, **folded)
    first, second = (x for x in maps.values() if x is not None)
    if 'value' in maps:
        check_maps(second, second, second, None)
        _check_value(shape, second)
        check_shape('middle', first, (len(second), shape.hidden, *second.shape[2:]), second, torch.float32)
        inputs, output = 0, tuple(second.shape)
    else:
        check_maps(first, second, first, None)
        inputs, output = relation.width(first.shape[1], shape.area, False), \
            (len(first), shape.hidden, *first.shape[2:])
    _check_served(backend, second)
    _check_folded(shape, backend, folded, inputs, None, second)
    if gradient is not None:
        check_shape('gradient', gradient, output, second)


def _check_described(shape: Shape, backend: FusedBackend) -> None:
    _check_integers(shape, backend.width())
    relation = shape.described
    if backend.name not in relation.backends:
        raise ValueError(f'the {backend.name} backend has no {relation.name} relation of the {relation.form} form')


def _check_served(backend: FusedBackend, x: Tensor) -> None:
    if x.dtype not in backend.dtypes:
        raise ValueError(f'maps must be of one of {", ".join(str(dtype)[6:] for dtype in backend.dtypes)}, '
                         f'got {x.dtype}')
    reason = backend.unavailable(x.device)
    if reason is not None:
        raise ValueError(f'the {backend.name} backend does not serve these maps: {reason}')


def _check_value(shape: Shape, value: Tensor) -> None:
    if value.shape[1] % shape.channels:
        raise ValueError(f'the channels of value must be a multiple of the {shape.channels} weight channels, '
                         f'got {value.shape[1]}')


def _check_folded(shape: Shape, backend: FusedBackend, folded: Mapping[str, Tensor | None], inputs: int,
                  value: Tensor | None, like: Tensor) -> None:
    padded = round_up(shape.hidden, backend.width())
    taps = () if shape.described.is_pairwise else (shape.area,)
    expected: dict[str, tuple[int, ...]] = dict(
        scale1=(inputs,), shift1=(inputs,), weight1=(inputs, padded), shift2=(padded,),
        weight2=(shape.hidden, *taps, shape.lanes), bias2=(*taps, shape.lanes))
    if value is not None:
        expected['shift'] = (value.shape[1],)
    for name, x in folded.items():
        if x is not None:
            check_shape(name, x, expected[name], like, torch.float32)


def _check_integers(shape: Shape, width: int) -> None:
    if shape.absolute not in (0, 1):
        raise ValueError(f'absolute must be 0 or 1, got {shape.absolute}')
    if shape.kernel_size < 1 or shape.kernel_size % 2 == 0 or shape.dilation < 1:
        raise ValueError('kernel_size must be odd and positive and dilation positive, got '
                         f'kernel_size={shape.kernel_size}, dilation={shape.dilation}')
    if shape.hidden < 1 or shape.channels < 1 or shape.lanes < 1 or shape.lanes % shape.channels \
            or shape.lanes % width:
        raise ValueError('hidden, channels and lanes must be positive and lanes a multiple of channels and of '
                         f'{width}, got hidden={shape.hidden}, channels={shape.channels}, lanes={shape.lanes}')


def need(**tensors: Tensor | None) -> None:
    """Raises ValueError where a tensor is missing: torch hands None to an operator as it does a tensor."""
    for name, x in tensors.items():
        if x is None:
            raise ValueError(f'{name} must be a tensor, got None')


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raises ValueError unless x is of that shape and dtype (None: any floating one) and where `like` is."""
    if x.shape != shape or x.device != like.device \
            or (x.dtype != dtype if dtype is not None else not x.is_floating_point()):
        kind = 'floating' if dtype is None else str(dtype)[6:]
        raise ValueError(f'{name} must be a {kind} tensor {list(shape)} on {like.device}, got '
                         + _described(**{name: x}))
