"""Converts a checkpoint to the three files of a timm model on the Hugging Face Hub.

    san-backbones weights convert model_best.pth --model san15_patchwise --out FOLDER/san15_patchwise.in1k
    san-backbones weights convert model_best.pth.tar --model san15_pairwise --tag food101 --out FOLDER
    san-backbones weights convert epoch_12.pth --model san15_patchwise --tag coco --arch-option kernel_sizes=5 --out OUT

It reads the authors' released files and checkpoints trained with this package: timm's (averaged weights if present),
MMDetection's and MMSegmentation's (the entries below `backbone.`, without a classifier), and .safetensors. Only tensors
and plain data are unpickled. It writes model.safetensors, config.json and README.md; timm loads them from the folder as
'local-dir:FOLDER' and from the Hub as 'hf-hub:ORGANISATION/NAME'.
"""
import argparse
import ast
import dataclasses
import hashlib
import importlib
import inspect
import json
import pathlib
import pickle
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import clean_state_dict
from timm.models._hub import save_config_for_hf

from .. import hub
from .._pickles import MMENGINE, SCRIPTS, entries
from .._requirements import LEAST_FOR_CONVERSION, check, check_pickles
from ..activations import follow_bounds, relu_bound
from ..hub import WeightsError
from ..san import DEPTHS, SAN, checkpoint_filter_fn, misfits
from . import card, common

# arguments of SAN that the checkpoint, the architecture or the caller decides
NOT_OPTIONS = {'attention', 'in_chans', 'num_classes', 'global_pool', 'drop_rate', 'drop_path_rate', 'relu_bound',
               'zero_init_last', 'norm_layer', 'device', 'dtype'}
OPTIONS = [name for name in inspect.signature(SAN).parameters if name not in NOT_OPTIONS]
DATA_OPTIONS = ['input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode']
MM_POSITION_REF_SIZE = 224  # the default of SANBackbone
IMAGENET_CLASSES = 1000
# fields of a timm cfg that describe its weights, not the architecture
OF_ONE_SET_OF_WEIGHTS = {'tag', 'license', 'origin_url', 'description', 'notes', 'label_names', 'label_descriptions'}


@dataclasses.dataclass(frozen=True)
class Converted:
    """The result of `convert`: folder, name with tag, digests of the source and of model.safetensors, whether these are
    the authors' weights, and notes for the user.
    """

    folder: pathlib.Path
    name: str
    source_sha256: str
    sha256: str
    authors: bool
    notes: tuple[str, ...]


class WrongFile(WeightsError):
    """The file is damaged, not a checkpoint, holds more than data, or belongs to another model."""


# --- Reading ---------------------------------------------------------------------------------------------------------

def _load(path: pathlib.Path, allowed: tuple[str, ...]) -> Any:
    present = torch.serialization.get_safe_globals()  # must stay; the context removes all entries that it was given
    with torch.serialization.safe_globals([entry for entry in entries(allowed) if entry not in present]):
        return torch.load(path, map_location='cpu', weights_only=True)


def read(path: pathlib.Path, mmengine: bool = True) -> dict[str, Any]:
    """Reads a checkpoint to the CPU.

    Args:
        path: The file.
        mmengine: Whether it may contain data classes of mmengine.

    Raises:
        WrongFile: The file is damaged, not a checkpoint, or holds more than data.
        WeightsError: The file does not exist, or a package to read it is missing or too old.
    """
    if not path.is_file():
        raise WeightsError(f'{path} is no file; expected a checkpoint (.pth, .pth.tar, .safetensors)')
    if path.suffix != '.safetensors':
        try:
            check_pickles(f'reading {path}')
        except ImportError as error:
            raise WeightsError(str(error)) from None
    try:
        if path.suffix == '.safetensors':
            return safetensors.torch.load_file(path)
        try:
            content = _load(path, SCRIPTS)
        except pickle.UnpicklingError as error:
            if not mmengine or not _refused(error).startswith('mmengine.'):
                raise
            importlib.import_module('mmengine')
            content = _load(path, (*SCRIPTS, *MMENGINE))
    except ImportError as error:
        raise WeightsError(f'{path} was saved by mmengine, which is needed to read it and is not here ({error}); '
                           "install the mm extra: pip install '.[mm]'") from error
    except Exception as error:
        refused = _refused(error)
        if refused:
            raise WrongFile(f'{path} asks for {refused}, and what is loaded that way can run code; expected tensors '
                            'and plain data. Nothing was run. Get the file from where it is known to be good, or '
                            'save its state dict alone') from None
        # keep only the reason from torch's message, which advises to unpickle everything
        reason = str(error).rpartition('WeightsUnpickler error: ')[2].strip().splitlines() or ['without a message']
        page = ' It looks like a web page: a download that was refused.' if _starts_as_page(path) else ''
        raise WrongFile(f'{path} ({path.stat().st_size} bytes) cannot be read as a checkpoint '
                        f'({type(error).__name__}: {reason[0]}); expected what torch.save or safetensors wrote. It '
                        f'may be truncated: get it again.{page}') from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise WrongFile(f'{path} holds a {type(content).__name__}, expected a dict of tensors by name, or one with '
                        "it under 'state_dict'")
    return content


def _refused(error: Exception) -> str:
    """Returns the class or function that `torch.load` refused, '' for other errors."""
    found = re.search(r'GLOBAL ([\w.]+)', str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return found[1].rstrip('.') if found else ''


def _starts_as_page(path: pathlib.Path) -> bool:
    with open(path, 'rb') as file:
        return file.read(64).lstrip().lower().startswith((b'<!doctype', b'<html'))


def is_the_authors(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has the parameter names of the authors' code."""
    dicts = [content, *(value for value in content.values() if isinstance(value, dict))]
    return any(isinstance(name, str) and re.fullmatch(r'(module\.)*conv_in\.weight', name) for d in dicts for name in d)


def translate(content: Mapping[str, Any], path: pathlib.Path) -> tuple[dict[str, torch.Tensor], int]:
    """Returns a checkpoint's tensors under this package's names.

    Returns:
        The tensors, and how many others were left out because they are not below `backbone.`; -1 if no name is.

    Raises:
        WrongFile: There are no tensors, or an entry is not a plain tensor.
    """
    try:
        state = checkpoint_filter_fn(content)
    except TypeError:  # a key that is not a string
        state = {}
    if any(name.startswith('_orig_mod.') for name in state):
        state = checkpoint_filter_fn(clean_state_dict(state))
    left_out = -1
    if not any(name.startswith(('stem.', 'stages.')) for name in state):
        inner = {name.partition('.')[2]: tensor for name, tensor in state.items() if name.startswith('backbone.')}
        if inner:
            left_out = len(state) - len(inner)
            state = inner
    other = [f'{name} ({kind})' for name, kind in zip(state, map(_what_is_not_plain, state.values())) if kind]
    if other or not state:
        raise WrongFile(f"{path} holds {', '.join(other[:10]) or 'no tensors'}; expected a dict of tensors by name "
                        "(strided, on the CPU, not quantised), alone or under 'state_dict_ema', 'model_ema', "
                        "'state_dict' or 'model'")
    return state, left_out


def _what_is_not_plain(value: Any) -> str:
    """Describes a value that is not a plain tensor in memory; '' if it is one."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if value.is_nested or value.is_quantized or value.layout != torch.strided or value.device.type != 'cpu':
        kind = 'nested ' * value.is_nested + 'quantised ' * value.is_quantized
        return f'a {kind}tensor, {value.layout}, {value.device}'
    return ''


# --- The model -------------------------------------------------------------------------------------------------------

def models() -> list[str]:
    """Returns our architectures in timm, without aliases."""
    return [name for name in timm.list_models(module='san') if name not in DEPTHS]


def build(name: str, state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> Any:
    """Builds the model for these tensors on the meta device, with their number of classes and image channels.

    Args:
        name: Architecture, with a tag if timm has a cfg of that name.
        state: Tensors under this package's names.
        options: Other arguments of SAN.

    Raises:
        WeightsError: An option is out of range.
    """
    stem, classifier = state.get('stem.conv.weight'), state.get('head.fc.weight')
    in_chans = stem.shape[1] if stem is not None and stem.dim() == 4 else 3
    num_classes = 0 if classifier is None else classifier.shape[0] if classifier.dim() else 1
    try:
        model: Any = timm.create_model(name, in_chans=in_chans, num_classes=num_classes, device='meta', **options)
    except (TypeError, ValueError) as error:
        raise WeightsError(f'{name} cannot be built with {dict(options)}: {error}') from error
    follow_bounds(model, state)
    return model


def name_in_timm(architecture: str, tag: str | None) -> str:
    """Returns the name with its tag if timm has a cfg for it, else without."""
    name = f'{architecture}.{tag}'
    return name if name in timm.list_models(module='san', include_tags=True) else architecture


def describe(model: Any, tag: str | None, license: str | None) -> str | None:
    """Removes from a model's cfg what describes other weights, for weights that are not the authors'.

    Returns:
        The given licence, else the one that the cfg has for these weights, else None.
    """
    cfg = dict(model.pretrained_cfg)
    if cfg.get('tag') != tag or cfg.get('origin_url'):
        cfg = {key: value for key, value in cfg.items() if key not in OF_ONE_SET_OF_WEIGHTS}
    cfg.update({key: value for key, value in dict(tag=tag, license=license).items() if value})
    model.pretrained_cfg = cfg
    return cfg.get('license')


def find_fitting_model(state: Mapping[str, torch.Tensor]) -> str | None:
    """Returns the architecture whose names and shapes fit, apart from the classifier; None if none fits."""
    state = {name: tensor for name, tensor in state.items() if not name.startswith('head.')}
    for name in models():
        if not misfits(state, build(name, state, {}).state_dict()):
            return name
    return None


def fit(
        state: Mapping[str, torch.Tensor],
        model: Any,
        options: Mapping[str, Any],
        path: pathlib.Path,
) -> dict[str, torch.Tensor]:
    """Returns the tensors in the model's order and dtypes, without shared memory.

    Args:
        state: Tensors under this package's names.
        model: The model, on the meta device.
        options: The options it was built with, for messages.
        path: The file of the tensors, for messages.

    Raises:
        WrongFile: The tensors do not fit the model, or are not finite.
    """
    architecture = model.pretrained_cfg['architecture']
    what = architecture + (f' with {dict(options)}' if options else '') + f' and {model.num_classes} classes'
    expected = model.state_dict()
    wrong = misfits(state, expected)
    if wrong:
        def listed(names: list[str]) -> str:
            return ', '.join(names[:20]) + (f' and {len(names) - 20} more' if len(names) > 20 else '')
        problems = '; '.join(f'{len(names)} {"of another shape" if kind == "wrong" else kind}: {listed(names)}'
                             for kind, names in wrong._asdict().items() if names)
        other = find_fitting_model(state)
        if other is None:
            remedy = f'If its structure is not the released one, say how with --arch-option ({", ".join(OPTIONS)})'
        elif other == architecture:
            remedy = (f'Apart from the classifier it fits {other} without --arch-option; if it was trained for other '
                      'classes, give it a --tag of its own')
        else:
            remedy = f'These are the tensors of {other}: give --model {other}'
        raise WrongFile(f'{path} does not fit {what}. {problems}. {remedy}')
    fitted = {}
    for name, like in expected.items():
        tensor = state[name].detach().to(like.dtype).contiguous().clone()
        if not tensor.isfinite().all():
            count = int(tensor.numel() - tensor.isfinite().sum())
            raise WrongFile(f'{path} holds {count} values in {name} that are infinite or not numbers; expected '
                            'finite ones. The file is damaged or the training diverged: take another checkpoint')
        if name.endswith('running_var') and (tensor < 0).any():
            raise WrongFile(f'{path} holds variances below zero in {name}; expected none. The file is damaged: take '
                            'another checkpoint')
        fitted[name] = tensor
    return fitted


def released(content: Mapping[str, Any], path: pathlib.Path, name: str, entry: Mapping[str, Any],
             source_sha256: str) -> bytes:
    """Makes model.safetensors from the content of the authors' file.

    Args:
        content: As `read` returns it.
        path: The file.
        name: A model of the manifest.
        entry: Its entry in the manifest.
        source_sha256: Digest of the file.

    Raises:
        WeightsError: It is not the file that the manifest pins, or its tensors are not the model's.
    """
    if entry['source_sha256'] not in (None, source_sha256):
        raise WeightsError(f"{path} has the SHA-256 {source_sha256}; the authors' file for {entry['architecture']} has "
                           f"{entry['source_sha256']} (Google Drive id {entry['drive_id']}). Download it again; or, if "
                           'this is a training of your own, give it a --tag of its own')
    state, _ = translate(content, path)
    net = timm.create_model(name_in_timm(entry['architecture'], common.TAG), num_classes=IMAGENET_CLASSES,
                            device='meta', relu_bound=0)
    weights = serialise(fit(state, net, {}, path))
    sha256 = hashlib.sha256(weights).hexdigest()
    if entry['sha256'] not in (None, sha256):
        raise WeightsError(f"{path} became a {hub.FILENAME} with the SHA-256 {sha256}; the manifest pins "
                           f"{entry['sha256']} for {name}. The converter or safetensors has changed: find out why "
                           "before anything is published, or set the manifest's sha256 to null")
    return weights


def to_half(tensors: Mapping[str, torch.Tensor], path: pathlib.Path) -> dict[str, torch.Tensor]:
    """Converts matrices to float16; tensors of one dimension, such as those of norms, keep their dtype.

    Raises:
        WrongFile: A value is too large for float16.
    """
    half = {name: tensor.half() if tensor.dim() > 1 and tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()}
    large = [name for name, tensor in half.items() if not tensor.isfinite().all()]
    if large:
        raise WrongFile(f'{path} holds values in {", ".join(large[:5])} that are too large for half precision; leave '
                        'out --half')
    return half


def serialise(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Serialises tensors; equal tensors give equal bytes."""
    return safetensors.torch.save(dict(sorted(tensors.items())), {'format': 'pt'})


# --- Writing ---------------------------------------------------------------------------------------------------------

def config_json(model: Any, data_options: Mapping[str, Any]) -> bytes:
    """Returns config.json as timm writes and reads it.

    Raises:
        WeightsError: The data options do not fit the model, or timm is too old to write them.
    """
    try:
        check('san-backbones weights convert', LEAST_FOR_CONVERSION)
    except ImportError as error:
        raise WeightsError(str(error)) from None
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / 'config.json'
        try:
            save_config_for_hf(model, str(path), data_config=dict(data_options))
            create_transform(**resolve_data_config({}, pretrained_cfg={**model.pretrained_cfg, **data_options}))
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(f'the data options {dict(data_options)} do not fit the model: {error}; expected for '
                               'instance input_size=(3,224,224), mean=(0.5,0.5,0.5), crop_pct=0.9') from error
        config = json.loads(path.read_text())
        # it stands at the top level, and transformers' TimmWrapper passes it beside the model_args
        config.get('model_args', {}).pop('num_classes', None)
        # also in the state dict, but not every library loads with load_state_dict
        config.setdefault('model_args', {})['relu_bound'] = relu_bound(model)
        for labels in ('label_names', 'label_descriptions'):  # at the top level, where timm and transformers look first
            if labels in config['pretrained_cfg']:
                config[labels] = config['pretrained_cfg'].pop(labels)
        return json.dumps(config, indent=2).encode()


def write(folder: pathlib.Path, contents: Mapping[str, bytes], force: bool) -> None:
    """Writes the files, or none if one exists with other content.

    Raises:
        WeightsError: One does, and `force` is False.
    """
    if folder.exists() and not folder.is_dir():
        raise WeightsError(f'{folder} is a file; expected a folder, or nothing, for --out')
    present = {name: (folder / name).read_bytes() for name in contents if (folder / name).is_file()}
    other = [name for name, content in present.items() if content != contents[name]]
    if other and not force:
        raise WeightsError(f'{folder} already holds {" and ".join(other)} with other content; give another --out, or '
                           '--force to overwrite')
    common.replace_files(folder, contents)


def convert(
        source: pathlib.Path,
        model: str,
        out: pathlib.Path,
        *,
        tag: str | None = None,
        options: Mapping[str, Any] | None = None,
        data_options: Mapping[str, Any] | None = None,
        license: str | None = None,
        text: str | None = None,
        repository: str | None = None,
        half: bool = False,
        manifest: pathlib.Path = common.MANIFEST,
        force: bool = False,
) -> Converted:
    """Converts one checkpoint.

    A checkpoint with the authors' parameter names, for a model of the manifest, without options and with no tag or
    'in1k', is taken as the authors' file: it must have their classes, and their digest if the manifest pins one.

    Args:
        source: The checkpoint.
        model: Name of the model in timm, with or without a tag.
        out: Folder for the three files.
        tag: Distinguishes these weights from others of the architecture.
        options: Arguments of SAN that differ from the architecture's own.
        data_options: Preprocessing that differs from the architecture's own, as in timm.
        license: Licence; not for the authors' weights.
        text: Markdown for the card; not for the authors' weights.
        repository: ORGANISATION/NAME, for the card.
        half: Write matrices in float16, which halves the file; not for the authors' weights.
        manifest: Path of the manifest.
        force: Overwrite existing files with other content.

    Raises:
        WeightsError: An argument or the checkpoint is wrong; the message says what to do.
    """
    architecture = common.architecture_of(model)
    tag = tag or model.partition('.')[2] or None
    options, data_options = dict(options or {}), dict(data_options or {})
    if architecture not in models():
        raise common.UsageError(f'there is no model {model!r}; expected one of {", ".join(models())}')
    for what, given, allowed in (('arch', options, OPTIONS), ('data', data_options, DATA_OPTIONS)):
        if not set(given) <= set(allowed):
            raise WeightsError(f'there is no --{what}-option {", ".join(sorted(set(given) - set(allowed)))}; expected '
                               f'one of {", ".join(allowed)}')
    known = common.read_manifest(manifest)
    content = read(source)
    source_sha256 = hub.digest(source)
    entry = known.get(f'{architecture}.{common.TAG}')
    notes: list[str] = []
    net: Any
    authors = (entry is not None and tag in (None, common.TAG) and not options and not data_options
               and is_the_authors(content))
    if authors and half:
        raise WeightsError("--half is not for the authors' weights, which are published as they are")
    if entry is not None and authors:
        name = f'{architecture}.{common.TAG}'
        net = timm.create_model(name_in_timm(architecture, common.TAG), num_classes=IMAGENET_CLASSES, device='meta',
                                relu_bound=0)
        weights = released(content, source, name, entry, source_sha256)
    else:
        state, left_out = translate(content, source)
        if left_out >= 0:
            notes.append(f'took the entries below backbone., left out {left_out} others')
            if any('.attn.position.' in name for name in state) and 'position_ref_size' not in options:
                options['position_ref_size'] = MM_POSITION_REF_SIZE
                notes.append(f'position_ref_size={MM_POSITION_REF_SIZE}, as SANBackbone has it unless a config says '
                             'otherwise; if yours does, give it with --arch-option')
        net = build(name_in_timm(architecture, tag), state, options)
        license = describe(net, tag, license)
        if not license:
            notes.append('the card states no licence; --license does')
        name = f'{architecture}.{tag}' if tag else architecture
        tensors = fit(state, net, options, source)
        weights = serialise(to_half(tensors, source) if half else tensors)
    sha256 = hashlib.sha256(weights).hexdigest()
    repository = repository or hub.repository(name)
    config = config_json(net, data_options)
    if authors:
        readme = card.released(name, known, repository, source_sha256, sha256)
    else:
        side = {**net.pretrained_cfg, **data_options}['input_size'][-1]
        own_steps = side != MM_POSITION_REF_SIZE and any('.attn.position.' in key for key in tensors)
        readme = card.own(name, architecture, repository, source_sha256, net.num_classes, options, license, text,
                          side if own_steps else None)
    write(out, {'README.md': readme.encode(), 'config.json': config, hub.FILENAME: weights}, force)
    return Converted(out, name, source_sha256, sha256, authors, tuple(notes))


# --- Command line ----------------------------------------------------------------------------------------------------

def setting(text: str) -> tuple[str, Any]:
    """Parses NAME=VALUE, where the value is a Python literal, else a string."""
    name, equals, value = text.partition('=')
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f'expected NAME=VALUE, got {text!r}')
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (SyntaxError, ValueError):
        return name.strip(), value.strip()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser('convert', __doc__)
    parser.add_argument('checkpoint', type=pathlib.Path)
    parser.add_argument('--model', required=True, metavar='NAME', help='name in timm, such as san15_patchwise')
    parser.add_argument('--out', required=True, type=pathlib.Path, metavar='FOLDER')
    parser.add_argument('--tag', help="distinguishes these weights from others of the model (the authors': in1k)")
    parser.add_argument('--arch-option', type=setting, action='append', default=[], metavar='NAME=VALUE',
                        help='structure that differs from the model\'s own, such as kernel_sizes=5 or '
                             'depths=2,1,2,4,1 (may be repeated)')
    parser.add_argument('--data-option', type=setting, action='append', default=[], metavar='NAME=VALUE',
                        help='preprocessing that differs from ImageNet\'s, such as input_size=3,160,160, mean, std, '
                             'crop_pct, interpolation (may be repeated)')
    parser.add_argument('--license', metavar='NAME', help='of weights that are not the authors\', as the Hub spells it')
    parser.add_argument('--card-text', type=pathlib.Path, metavar='FILE',
                        help='Markdown for the card of weights that are not the authors\'')
    parser.add_argument('--repository', metavar='ORGANISATION/NAME', help='for the examples in the card')
    parser.add_argument('--half', action='store_true', help='write matrices in float16: half the size')
    parser.add_argument('--manifest', type=pathlib.Path, default=common.MANIFEST, metavar='FILE')
    parser.add_argument('--force', action='store_true', help='overwrite files with other content')
    return parser.parse_args(argv)


@common.command
def main(argv: Sequence[str] | None = None) -> int:
    """Converts as the command line says; returns the exit status."""
    options = parse(argv)
    text = None
    if options.card_text:
        try:
            text = options.card_text.read_text(encoding='utf-8')
        except (OSError, UnicodeDecodeError) as error:
            raise WeightsError(f'--card-text {options.card_text} cannot be read ({error}); expected a file of '
                               'Markdown, in UTF-8') from error
    done = convert(
        options.checkpoint, options.model, options.out, tag=options.tag, options=dict(options.arch_option),
        data_options=dict(options.data_option), license=options.license, text=text, repository=options.repository,
        half=options.half, manifest=options.manifest, force=options.force)
    for note in done.notes:
        print(f'note: {note}')
    print(f'{done.folder}: {done.name}{", as the authors released it" if done.authors else ""}')
    print(f'SHA-256 of {options.checkpoint}: {done.source_sha256}')
    print(f'SHA-256 of {hub.FILENAME}: {done.sha256}')
    print(f"timm.create_model('local-dir:{done.folder}', pretrained=True) loads it")
    return 0

