"""Networks that the page can show: the one given, those that ship, and untrained ones to compare with."""
from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from .. import hub
from .._loading import load
from ..attention_maps import find_network

__all__ = ['Choice', 'Network', 'choices', 'given', 'of_predictor']

SHIPPED = ('san10_patchwise.distilled', 'san10_pairwise.distilled', 'test_san_patchwise.shapes')


class Network(NamedTuple):
    """A model in eval mode, whether its weights are random, and the Python that makes `model`."""
    name: str
    model: Any
    untrained: bool
    code: str


class Choice(NamedTuple):
    """A network by its name on the page; `load()` makes it on the first call."""
    name: str
    load: Callable[[], Network]


def given(name: str, weights: pathlib.Path | None = None, random: bool = False) -> Network:
    """Loads the network that was asked for.

    Raises:
        RuntimeError: The weights are not available or do not fit; the message says what to do.
    """
    model = load(name, weights, random)
    if random:
        return Network(f'{name}, untrained', model, True,
                       f"torch.manual_seed(0)\nmodel = timm.create_model({name!r}).eval()")
    overlay = '' if weights is None else (f', pretrained_cfg_overlay=dict(\n    file={str(weights)!r}, '
                                          f'num_classes={model.num_classes})')
    return Network(name if weights is None else f'{name}: {weights.name}', model, False,
                   f'model = timm.create_model({name!r}, pretrained=True{overlay}).eval()')


def _counterpart(name: str) -> Choice | None:
    """The network of the other form: with weights of the same tag if they are at hand, with those of the paper, or
    untrained.
    """
    plain, _, tag = name.partition('.')
    series, _, form = plain.rpartition('_')
    others = {'pairwise': 'patchwise', 'patchwise': 'pairwise'}
    if form not in others:
        return None
    other = f'{series}_{others[form]}'
    for full, short in ((f'{other}.{tag}', f'{other}.{tag}'), (f'{other}.in1k', other)):
        if full in hub.manifest() and hub.find_local(full) is not None:
            return Choice(short, functools.cache(functools.partial(given, short)))
    return Choice(f'{other}, untrained', functools.cache(functools.partial(given, other, random=True)))


def choices(first: Network, name: str) -> list[Choice]:
    """Returns what can be chosen without the network: `first`, its counterpart of the other form, trained if weights
    are at hand, and the networks that ship.

    Args:
        first: The network that was asked for.
        name: Its name for timm.
    """
    found = {first.name: Choice(first.name, lambda: first)}
    other = _counterpart(name)
    if other is not None:
        found.setdefault(other.name, other)
    for shipped in SHIPPED:
        if shipped not in found and hub.find_local(shipped) is not None:
            found[shipped] = Choice(shipped, functools.cache(lambda name=shipped: given(name)))
    return list(found.values())


def of_predictor(model: Any, config: str, checkpoint: str) -> Choice:
    """Returns the SAN in a detector or segmenter.

    Raises:
        ValueError: There is none.
    """
    find_network(model)
    network = Network(f'the backbone of {pathlib.Path(config).stem}', model, False,
                      f'from san_backbones.app.predictions import Predictor\n\nmodel = Predictor({config!r}, '
                      f'{checkpoint!r}).model')
    return Choice(network.name, lambda: network)
