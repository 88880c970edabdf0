"""Creates models by name, with the weights that a command or a job asks for."""
import pathlib
from typing import Any

import huggingface_hub
import timm
import torch
from timm.models import load_state_dict as read_checkpoint
from timm.models import parse_model_name

from .san import checkpoint_filter_fn

__all__ = ['create', 'load']


def create(name: str, **options: Any) -> Any:
    """`timm.create_model`, with errors that name the model. Typed Any: timm's modules have more than nn.Module."""
    try:
        return timm.create_model(name, **options)
    except (huggingface_hub.errors.HfHubHTTPError, OSError) as error:
        raise RuntimeError(f'cannot create {name}: {error}') from error


def load(name: str, checkpoint: pathlib.Path | None = None, random: bool = False, **options: Any) -> Any:
    """Returns a model in eval mode with weights from a checkpoint, random (always the same), or pretrained.

    The checkpoint sets the number of classes and of input channels.

    Raises:
        RuntimeError: The weights are not available or do not fit; the message says what to do.
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
        raise ValueError(f'{name} already names weights: use --weights with a plain model name')
    try:
        state = read_checkpoint(str(checkpoint))
        named = {**checkpoint_filter_fn(state), **state}  # under our names and under the file's own
    except Exception as error:  # readers raise many kinds of errors for files that are not checkpoints
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
