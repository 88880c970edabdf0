"""Models as the command line names them, with the weights it is told to take; and where weights lie, off line."""
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import huggingface_hub
import timm
import torch
from timm.data import CustomDatasetInfo, ImageNetInfo, infer_imagenet_subset
from timm.models import load_state_dict as read_checkpoint
from timm.models import parse_model_name

from .. import hub
from ..san import checkpoint_filter_fn
from ..weights import authors

__all__ = ['Whereabouts', 'class_names', 'create', 'load', 'our_models', 'whereabouts']


class Whereabouts(NamedTuple):
    """Where a model's weights are."""
    state: str  # 'folder', 'shipped', 'hub cache', 'authors cache', 'local-dir'; 'to download', 'not here', 'none',
    # 'unusable'
    path: str | None
    note: str  # in words: what the state means for this model
    download_bytes: int | None = None  # at least, of what is to be downloaded


def our_models(pattern: str = '*') -> list[str]:
    """Names of this package's models that match a pattern of the shell's kind."""
    return [name for name in timm.list_models(pattern)
            if timm.models.model_entrypoint(name).__module__ == 'san_backbones.san']


def whereabouts(cfg: Mapping[str, Any]) -> Whereabouts:
    """Finds weights in the order of `san_backbones.hub`, without asking the network.

    Args:
        cfg: A model's `pretrained_cfg`.
    """
    if cfg.get('source') == 'local-dir':
        return Whereabouts('local-dir', cfg['file'], 'in the folder given')
    source = cfg.get('hf_hub_id')
    if not source:
        return Whereabouts('none', None, 'none exist: the model is untrained')
    repository, _, revision = source.partition('@')
    organisation, _, model = repository.partition('/')
    if organisation == hub.ORGANISATION:
        repository = hub.repository(model)
        try:
            path = None if revision else hub.find_local(model)
        except hub.WeightsError as error:
            return Whereabouts('unusable', None, str(error))
        if path is not None:
            named = os.environ.get(hub.FOLDER_VARIABLE)
            if named and pathlib.Path(named) in path.parents:
                return Whereabouts('folder', str(path), f'in the folder that {hub.FOLDER_VARIABLE} names')
            return Whereabouts('shipped', str(path), 'shipped with the package')
        if not revision and 'drive_id' in hub.manifest().get(model, {}):
            return _of_the_authors(model, repository)
    return _on_the_hub(repository, revision)


def _on_the_hub(repository: str, revision: str = '') -> Whereabouts:
    cached = huggingface_hub.try_to_load_from_cache(repository, hub.FILENAME, revision=revision or None)
    if isinstance(cached, str):
        return Whereabouts('hub cache', cached, f'of {repository}, in the cache of huggingface_hub')
    return Whereabouts('not here', None, f'not on this machine; the Hub would be asked for {repository}')


def _of_the_authors(model: str, repository: str) -> Whereabouts:
    """Of weights that their authors published: as `hub.weights` goes about it."""
    found = _on_the_hub(repository)
    try:
        path = None if hub.authors_off() else authors.cached(model)
    except hub.WeightsError as error:
        return Whereabouts('unusable', None, str(error))
    if path is not None and (found.path is None or repository == f'{hub.ORGANISATION}/{model}'):
        return Whereabouts('authors cache', str(path), "made of the authors' file")
    if found.path is not None or not hub.known_unpublished(model):
        return found
    reason = authors.refusal()
    if reason is not None:
        return Whereabouts('not here', None, f'not on this machine, not on the Hub yet, and {reason}')
    least = 4 * hub.manifest()[model]['parameters']
    return Whereabouts('to download', None, f"not on this machine; the authors' file, {least / 1e6:.0f} MB or more, "
                       'would be downloaded', least)


def create(name: str, **options: Any) -> Any:
    """`timm.create_model`, with errors that name the model. What timm's modules have, torch's types do not know."""
    try:
        return timm.create_model(name, **options)
    except (huggingface_hub.errors.HfHubHTTPError, OSError) as error:
        raise RuntimeError(f'cannot create {name}: {error}') from error


def load(name: str, checkpoint: pathlib.Path | None = None, random: bool = False, **options: Any) -> Any:
    """A model in eval mode with the weights asked for: a checkpoint's, random ones (always the same), or pretrained.

    A checkpoint decides the number of classes and of input channels.

    Raises:
        RuntimeError: The weights cannot be had or do not fit; the message says what to do.
    """
    if random:
        torch.manual_seed(0)
        return create(name, **options).eval()
    if checkpoint is None:
        try:
            return create(name, pretrained=True, **options).eval()
        except RuntimeError as error:
            raise RuntimeError(f'{error}\nOr give a checkpoint of your own: --weights FILE; or choose a model whose '
                               'weights are here: san-backbones list') from error
    if parse_model_name(name)[0]:
        raise ValueError(f'{name} names weights already: --weights goes with the name of a model')
    try:
        state = read_checkpoint(str(checkpoint))
        named = {**checkpoint_filter_fn(state), **state}  # by the released files' names too
    except Exception as error:  # whatever a file that is no checkpoint makes its readers raise
        raise RuntimeError(f'{checkpoint} cannot be read as a checkpoint (.pth with tensors and plain data, or '
                           f'.safetensors): {str(error).splitlines()[0] if str(error) else repr(error)}') from error
    cfg = create(name, device='meta').pretrained_cfg
    overlay: dict[str, Any] = dict(state_dict=state)
    stem, classifier = (named.get(f'{cfg[layer]}.weight') for layer in ('first_conv', 'classifier'))
    if stem is not None and stem.shape[1] != cfg['input_size'][0]:
        options['in_chans'] = stem.shape[1]
        overlay['input_size'] = (stem.shape[1], *cfg['input_size'][1:])
    if classifier is not None and classifier.shape[0] != cfg['num_classes']:
        options['num_classes'] = classifier.shape[0]
        overlay.update(num_classes=classifier.shape[0], label_names=None, label_descriptions=None)
    try:
        model = create(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except RuntimeError as error:
        raise RuntimeError(f'{checkpoint}: {error}') from error
    model.pretrained_cfg.pop('state_dict', None)
    return model.eval()


def class_names(model: Any, count: int) -> list[str]:
    """What the classes are called: by the weights' own names, or ImageNet's; 'class 0' and so on where neither is."""
    cfg = model.pretrained_cfg
    labels: Any = None
    if cfg.get('label_names'):
        if len(cfg['label_names']) == count:
            labels = CustomDatasetInfo(cfg['label_names'], cfg.get('label_descriptions'))
    elif count >= 1000:
        subset = infer_imagenet_subset(model)
        labels = ImageNetInfo(subset) if subset else None
    return [labels.index_to_description(i) if labels else f'class {i}' for i in range(count)]
