"""Lists models, and locates their weights without the network."""
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import huggingface_hub
import timm
from timm.data import CustomDatasetInfo, ImageNetInfo, infer_imagenet_subset

from .. import hub
from .._loading import create, load
from ..weights import authors

__all__ = ['Location', 'class_names', 'create', 'load', 'locate_weights', 'our_models', 'our_weights']


class Location(NamedTuple):
    """Where a model's weights are, or why they are not here."""
    state: str  # 'folder', 'shipped', 'hub cache', 'authors cache', 'local-dir'; 'to download', 'not here', 'none',
    # 'unusable'
    path: str | None
    note: str  # explains the state
    download_bytes: int | None = None  # lower bound of the download


def our_models(pattern: str = '*') -> list[str]:
    """Returns names of this package's models that match a shell pattern."""
    return [name for name in timm.list_models(pattern)
            if timm.models.model_entrypoint(name).__module__ == 'san_backbones.san']


def our_weights(pattern: str = '*') -> list[str]:
    """Returns names with tags of weights beside each model's default ones: 'san10_patchwise.distilled'."""
    defaults: dict[str, Any] = {model: timm.get_pretrained_cfg(model) for model in our_models()}
    named = [name.partition('.') for name in timm.list_pretrained(pattern)]
    return [f'{model}.{tag}' for model, _, tag in named if model in defaults and tag != defaults[model].tag]


def locate_weights(cfg: Mapping[str, Any]) -> Location:
    """Finds weights in the order of `san_backbones.hub`, without asking the network.

    Args:
        cfg: A model's `pretrained_cfg`.
    """
    if cfg.get('source') == 'local-dir':
        return Location('local-dir', cfg['file'], 'in the folder given')
    source = cfg.get('hf_hub_id')
    if not source:
        return Location('none', None, 'none exist: the model is untrained')
    repository, _, revision = source.partition('@')
    organisation, _, model = repository.partition('/')
    if organisation == hub.ORGANISATION:
        repository = hub.repository(model)
        try:
            path = None if revision else hub.find_local(model)
        except hub.WeightsError as error:
            return Location('unusable', None, str(error))
        if path is not None:
            named = os.environ.get(hub.FOLDER_VARIABLE)
            if named and pathlib.Path(named).expanduser() in path.parents:
                return Location('folder', str(path), f'in the folder that {hub.FOLDER_VARIABLE} names')
            return Location('shipped', str(path), 'shipped with the package')
        if not revision and 'drive_id' in hub.manifest().get(model, {}):
            return _locate_authors_weights(model, repository)
    return _locate_on_hub(repository, revision)


def _locate_on_hub(repository: str, revision: str = '') -> Location:
    cached = huggingface_hub.try_to_load_from_cache(repository, hub.FILENAME, revision=revision or None)
    if isinstance(cached, str):
        return Location('hub cache', cached, f'of {repository}, in the cache of huggingface_hub')
    return Location('not here', None, f'not on this machine; the Hub would be asked for {repository}')


def _locate_authors_weights(model: str, repository: str) -> Location:
    """Locates weights that the authors published, in the order of `hub.weights`."""
    found = _locate_on_hub(repository)
    try:
        path = None if hub.authors_off() else authors.cached(model)
    except hub.WeightsError as error:
        return Location('unusable', None, str(error))
    if path is not None and (found.path is None or repository == f'{hub.ORGANISATION}/{model}'):
        return Location('authors cache', str(path), "made of the authors' file")
    if found.path is not None or not hub.known_unpublished(model):
        return found
    reason = authors.refusal()
    if reason is not None:
        return Location('not here', None, f'not on this machine, not on the Hub yet, and {reason}')
    least = 4 * hub.manifest()[model]['parameters']
    return Location('to download', None, f"not on this machine; the authors' file, {least / 1e6:.0f} MB or more, "
                       'would be downloaded', least)


def class_names(model: Any, count: int) -> list[str]:
    """Returns the class names: the weights' own, or ImageNet's; without either, 'class 0' and so on."""
    cfg = model.pretrained_cfg
    labels: Any = None
    if cfg.get('label_names'):
        if len(cfg['label_names']) == count:
            labels = CustomDatasetInfo(cfg['label_names'], cfg.get('label_descriptions'))
    elif count >= 1000:
        subset = infer_imagenet_subset(model)
        labels = ImageNetInfo(subset) if subset else None
    return [labels.index_to_description(i) if labels else f'class {i}' for i in range(count)]
