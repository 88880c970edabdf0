"""The lines of Python that make the figures of the page."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .networks import Network
from .pictures import Picture

__all__ = ['attention', 'boxes', 'features']


def _arguments(options: Mapping[str, Any]) -> str:
    return ', '.join(f'{name}={value!r}' for name, value in options.items())


def _program(network: Network | None, pictures: Sequence[Picture], imports: Sequence[str], lines: Sequence[str],
             name: str) -> str:
    needed = list(imports)
    code = '' if network is None else network.code + '\n'
    code += '\n'.join(lines) + '\n'
    if network is not None:
        needed += ['import timm', 'import san_backbones  # registers the models']
        needed += ['import torch'] if network.untrained else []
    if any(picture.code.startswith('skimage.') for picture in pictures):
        needed.append('import skimage.data')
    needed.sort(key=lambda line: ('san_backbones' in line, line.startswith('from'), line))
    return '\n'.join(needed) + f"\n\n{code}figure.savefig('{name}.png', dpi=150)  # or '{name}.svg'\n"


def attention(network: Network, picture: Picture, block: str, options: Mapping[str, Any]) -> str:
    """`options` are those of `visualize.footprint_figure`."""
    given = _arguments(options)
    return _program(network, [picture], ['from san_backbones import visualize'], [
        'figure = visualize.footprint_figure(', f'    model, {picture.code}, {block!r}, {given})'], 'attention')


def features(network: Network, pictures: Sequence[Picture], pixel: Sequence[float], stage: int,
             options: Mapping[str, Any]) -> str:
    """`options` are those of `comparison.compare_figure`."""
    given = _arguments(options)
    named = ', '.join(picture.code for picture in pictures)
    return _program(network, pictures, ['from san_backbones.comparison import compare_figure'], [
        'figure = compare_figure(', f'    model, [{named}], {tuple(pixel)!r}, {stage}, {given})'], 'features')


def boxes(config: str, checkpoint: str, picture: Picture, box: int, options: Mapping[str, Any]) -> str:
    """`options` are those of `predictions.box_figure`."""
    given = _arguments(options)
    return _program(None, [picture], ['from san_backbones.app.predictions import Predictor, box_figure'], [
        f'predictor = Predictor({config!r}, {checkpoint!r})',
        f'figure = box_figure(predictor, {picture.code}, {box}, {given})'], 'boxes')
