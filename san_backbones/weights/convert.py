"""Converts a checkpoint to the three files of a timm model on the Hugging Face Hub.

    san-backbones weights convert model_best.pth --model san15_patchwise --out FOLDER/san15_patchwise.in1k
    san-backbones weights convert model_best.pth.tar --model san15_pairwise --tag food101 --out FOLDER
    san-backbones weights convert epoch_12.pth --model san15_patchwise --tag coco --arch-option kernel_sizes=5 --out OUT

It reads the authors' released files, and what was trained with this package: checkpoints of timm (averaged weights
first), of MMDetection and MMSegmentation (the entries below `backbone.`; there is no classifier then), .safetensors.
Nothing is unpickled but tensors and plain data. It writes model.safetensors, config.json and README.md; timm reads them
from the folder, as 'local-dir:FOLDER', and from the Hub, as 'hf-hub:ORGANISATION/NAME'.
"""
import argparse
import ast
import codecs
import dataclasses
import hashlib
import inspect
import json
import pathlib
import pickle
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict
from timm.models._hub import save_config_for_hf

from .. import hub
from .._requirements import LEAST_FOR_CONVERSION, check, check_pickles
from ..activations import follow_bounds, relu_bound
from ..hub import WeightsError
from ..san import DEPTHS, SAN, checkpoint_filter_fn
from . import card, common

# arguments of SAN that the checkpoint, the architecture or the place decide
NOT_OPTIONS = {'attention', 'in_chans', 'num_classes', 'global_pool', 'drop_rate', 'drop_path_rate', 'relu_bound',
               'norm_layer', 'device', 'dtype'}
OPTIONS = [name for name in inspect.signature(SAN).parameters if name not in NOT_OPTIONS]
DATA_OPTIONS = ['input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode']
MM_POSITION_REF_SIZE = 224  # the default of SANBackbone
IMAGENET_CLASSES = 1000
# what a configuration of timm says of its weights rather than of the architecture
OF_ONE_SET_OF_WEIGHTS = {'tag', 'license', 'origin_url', 'description', 'notes', 'label_names', 'label_descriptions'}

# what training scripts put beside the tensors: arguments, and accuracies that NumPy computed; none of it runs code
_NUMPY: list[Any] = [(np.dtype, 'numpy.dtype'), *((kind, f'numpy.dtypes.{kind.__name__}') for kind in (
    type(np.dtype(name)) for name in ('float32', 'float64', 'int32', 'int64', 'bool')))]
_NUMPY += [(np.float64(0).__reduce__()[0], f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')]
_NUMPY += [(codecs.encode, '_codecs.encode')]
DATA_CLASSES: list[Any] = [argparse.Namespace, *_NUMPY]


@dataclasses.dataclass(frozen=True)
class Converted:
    """What `convert` wrote: where, name and tag, digests of the source and of model.safetensors; whether it counts as
    the authors' own; what the user should know.
    """

    folder: pathlib.Path
    name: str
    source_sha256: str
    sha256: str
    authors: bool
    notes: tuple[str, ...]


class WrongFile(WeightsError):
    """A file that is damaged, no checkpoint, one that asks for more than data, or another model's."""


# --- Reading ---------------------------------------------------------------------------------------------------------

def _load(path: pathlib.Path) -> Any:
    present = torch.serialization.get_safe_globals()  # these are to stay; the context takes away all it was given
    with torch.serialization.safe_globals([entry for entry in DATA_CLASSES if entry not in present]):
        return torch.load(path, map_location='cpu', weights_only=True)


def read(path: pathlib.Path, mmengine: bool = True) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Args:
        path: The file.
        mmengine: Whether it may ask for the classes of mmengine that hold data. They are then allowed in the whole
            process, as `import san_backbones.mm` does.

    Raises:
        WrongFile: It is damaged, no checkpoint, or holds more than data.
        WeightsError: There is no such file, or a package to read it is missing or too old.
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
            content = _load(path)
        except pickle.UnpicklingError as error:
            if not mmengine or not _refused(error).startswith('mmengine.'):
                raise
            from .. import mm  # noqa: F401, allows the classes of mmengine's own checkpoints
            content = _load(path)
    except ImportError as error:
        raise WeightsError(f'{path} was saved by mmengine, which is needed to read it and is not here ({error}); '
                           "install the mm extra: pip install '.[mm]'") from error
    except Exception as error:
        refused = _refused(error)
        if refused:
            raise WrongFile(f'{path} asks for {refused}, and what is loaded that way can run code; expected tensors '
                            'and plain data. Nothing was run. Get the file from where it is known to be good, or '
                            'save its state dict alone') from None
        # of what torch says of pickles only the reason: its advice is to unpickle everything
        reason = str(error).rpartition('WeightsUnpickler error: ')[2].strip().splitlines() or ['no more is known']
        page = ' It looks like a web page: a download that was refused.' if _starts_as_page(path) else ''
        raise WrongFile(f'{path} ({path.stat().st_size} bytes) cannot be read as a checkpoint '
                        f'({type(error).__name__}: {reason[0]}); expected what torch.save or safetensors wrote. It '
                        f'may be cut short: get it again.{page}') from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise WrongFile(f'{path} holds a {type(content).__name__}, expected a dict of tensors by name, or one with '
                        "it under 'state_dict'")
    return content


def _refused(error: Exception) -> str:
    """The class or function that `torch.load` refused, '' if that was not it."""
    found = re.search(r'GLOBAL ([\w.]+)', str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return found[1].rstrip('.') if found else ''


def _starts_as_page(path: pathlib.Path) -> bool:
    with open(path, 'rb') as file:
        return file.read(64).lstrip().lower().startswith((b'<!doctype', b'<html'))


def is_the_authors(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's names are those of the authors' code."""
    dicts = [content, *(value for value in content.values() if isinstance(value, dict))]
    return any(isinstance(name, str) and re.fullmatch(r'(module\.)*conv_in\.weight', name) for d in dicts for name in d)


def translate(content: Mapping[str, Any], path: pathlib.Path) -> tuple[dict[str, torch.Tensor], int]:
    """A checkpoint's tensors by this package's names.

    Returns:
        The tensors, and how many were left out because they are not below `backbone.`; -1 if no name is.

    Raises:
        WrongFile: There is none, or something else than a plain tensor.
    """
    try:
        state = checkpoint_filter_fn(content)
    except TypeError:  # a name that is none
        state = {}
    if any(name.startswith('_orig_mod.') for name in state):
        state = checkpoint_filter_fn(clean_state_dict(state))
    left_out = -1
    if not any(name.startswith(('stem.', 'stages.')) for name in state):
        inner = {name.partition('.')[2]: tensor for name, tensor in state.items() if name.startswith('backbone.')}
        if inner:
            left_out = len(state) - len(inner)
            state = inner
    other = [f'{name} ({kind})' for name, kind in zip(state, map(_unlike_plain, state.values())) if kind]
    if other or not state:
        raise WrongFile(f"{path} holds {', '.join(other[:10]) or 'no tensors'}; expected a dict of tensors by name "
                        "(strided, on the CPU, not quantised), alone or under 'state_dict_ema', 'model_ema', "
                        "'state_dict' or 'model'")
    return state, left_out


def _unlike_plain(value: Any) -> str:
    """What a value is instead of a plain tensor in memory; '' if it is one."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if value.is_nested or value.is_quantized or value.layout != torch.strided or value.device.type != 'cpu':
        kind = 'nested ' * value.is_nested + 'quantised ' * value.is_quantized
        return f'a {kind}tensor, {value.layout}, {value.device}'
    return ''


# --- The model -------------------------------------------------------------------------------------------------------

def models() -> list[str]:
    """Our architectures in timm, each under one name."""
    return [name for name in timm.list_models(module='san') if name not in DEPTHS]


def build(name: str, state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> Any:
    """The model for these tensors, on the meta device: their classes and channels of the image, the options' structure.

    Args:
        name: Architecture, with a tag if timm has a configuration of that name.
        state: Tensors by this package's names.
        options: Arguments of SAN.

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


def known_to_timm(architecture: str, tag: str | None) -> str:
    """The name with its tag if timm has a configuration for it, else without."""
    name = f'{architecture}.{tag}'
    return name if name in timm.list_models(module='san', include_tags=True) else architecture


def describe(model: Any, tag: str | None, license: str | None) -> str | None:
    """Makes the configuration of a model with weights that are not the authors' tell nothing of other weights.

    Returns:
        The licence given, else the one that the configuration has for just these weights, else None.
    """
    cfg = dict(model.pretrained_cfg)
    if cfg.get('tag') != tag or cfg.get('origin_url'):
        cfg = {key: value for key, value in cfg.items() if key not in OF_ONE_SET_OF_WEIGHTS}
    cfg.update({key: value for key, value in dict(tag=tag, license=license).items() if value})
    model.pretrained_cfg = cfg
    return cfg.get('license')


def misfits(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Names that are missing, unexpected, or of tensors with another shape or kind; each list may be empty."""
    both = [name for name in expected if name in state]
    shapes = [(name, list(state[name].shape), list(expected[name].shape)) for name in both]
    kinds = [(name, state[name].dtype, expected[name].dtype) for name in both
             if state[name].is_floating_point() != expected[name].is_floating_point() or state[name].is_complex()]
    return {
        'missing': [name for name in expected if name not in state],
        'unexpected': [name for name in state if name not in expected],
        'wrong': [f'{name} {found} instead of {right}' for name, found, right in [*shapes, *kinds] if found != right],
    }


def fits_instead(state: Mapping[str, torch.Tensor]) -> str | None:
    """The one of our architectures whose names and shapes these are, but for the classifier."""
    state = {name: tensor for name, tensor in state.items() if not name.startswith('head.')}
    for name in models():
        if not any(misfits(state, build(name, state, {}).state_dict()).values()):
            return name
    return None


def fit(
        state: Mapping[str, torch.Tensor],
        model: Any,
        options: Mapping[str, Any],
        path: pathlib.Path,
) -> dict[str, torch.Tensor]:
    """The tensors in the model's order, in its dtypes, without shared memory.

    Args:
        state: Tensors by this package's names.
        model: On the meta device.
        options: With which it was built, for messages.
        path: Where the tensors come from, for messages.

    Raises:
        WrongFile: They are not the model's, or not finite.
    """
    architecture = model.pretrained_cfg['architecture']
    what = architecture + (f' with {dict(options)}' if options else '') + f' and {model.num_classes} classes'
    expected = model.state_dict()
    wrong = misfits(state, expected)
    if any(wrong.values()):
        def listed(names: list[str]) -> str:
            return ', '.join(names[:20]) + (f' and {len(names) - 20} more' if len(names) > 20 else '')
        problems = '; '.join(f'{len(names)} {"of another shape" if kind == "wrong" else kind}: {listed(names)}'
                             for kind, names in wrong.items() if names)
        other = fits_instead(state)
        if other is None:
            remedy = f'If its structure is not the released one, say how with --arch-option ({", ".join(OPTIONS)})'
        elif other == architecture:
            remedy = (f'But for the classifier it fits {other} without --arch-option; if it was trained for other '
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
    """model.safetensors, made of the content of the authors' file.

    Args:
        content: As `read` gives it.
        path: The file.
        name: A model of the manifest.
        entry: The manifest's.
        source_sha256: Digest of the file.

    Raises:
        WeightsError: It is not the file that the manifest pins, or its tensors are not the model's.
    """
    if entry['source_sha256'] not in (None, source_sha256):
        raise WeightsError(f"{path} has the SHA-256 {source_sha256}; the authors' file for {entry['architecture']} has "
                           f"{entry['source_sha256']} (Google Drive id {entry['drive_id']}). Download it again; or, if "
                           'this is a training of your own, give it a --tag of its own')
    state, _ = translate(content, path)
    net = timm.create_model(known_to_timm(entry['architecture'], common.TAG), num_classes=IMAGENET_CLASSES,
                            device='meta', relu_bound=0)
    weights = serialised(fit(state, net, {}, path))
    sha256 = hashlib.sha256(weights).hexdigest()
    if entry['sha256'] not in (None, sha256):
        raise WeightsError(f"{path} became a {hub.FILENAME} with the SHA-256 {sha256}; the manifest pins "
                           f"{entry['sha256']} for {name}. The converter or safetensors has changed: find out why "
                           "before anything is published, or set the manifest's sha256 to null")
    return weights


def halved(tensors: Mapping[str, torch.Tensor], path: pathlib.Path) -> dict[str, torch.Tensor]:
    """Matrices in float16; what has one dimension, such as norms, stays.

    Raises:
        WrongFile: A value is too large for it.
    """
    half = {name: tensor.half() if tensor.dim() > 1 and tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()}
    large = [name for name, tensor in half.items() if not tensor.isfinite().all()]
    if large:
        raise WrongFile(f'{path} holds values in {", ".join(large[:5])} that are too large for half precision; leave '
                        'out --half')
    return half


def serialised(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The same bytes for the same tensors."""
    return safetensors.torch.save(dict(sorted(tensors.items())), {'format': 'pt'})


# --- Writing ---------------------------------------------------------------------------------------------------------

def config_json(model: Any, data_options: Mapping[str, Any]) -> bytes:
    """config.json as timm writes and reads it.

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
        except (AssertionError, TypeError, ValueError) as error:
            raise WeightsError(f'the data options {dict(data_options)} do not fit the model: {error}; expected for '
                               'instance input_size=(3,224,224), mean=(0.5,0.5,0.5), crop_pct=0.9') from error
        config = json.loads(path.read_text())
        # timm finds the number above, and transformers' TimmWrapper passes it beside the model_args
        config.get('model_args', {}).pop('num_classes', None)
        # the state dict has it too; but not every library loads by load_state_dict, which looks there
        config.setdefault('model_args', {})['relu_bound'] = relu_bound(model)
        for labels in ('label_names', 'label_descriptions'):  # beside the cfg, where both of them look first
            if labels in config['pretrained_cfg']:
                config[labels] = config['pretrained_cfg'].pop(labels)
        return json.dumps(config, indent=2).encode()


def write(folder: pathlib.Path, contents: Mapping[str, bytes], force: bool) -> None:
    """Writes the files, or none of them if others stand in their places.

    Raises:
        WeightsError: One does, and not `force`.
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

    A checkpoint with the authors' names, for a model of the manifest, with no tag or 'in1k' and no options, counts as
    the authors' own: then it must have the classes and the digest of theirs, where the manifest has one.

    Args:
        source: The checkpoint.
        model: Name of the model in timm, with or without a tag.
        out: Folder for the three files.
        tag: What tells these weights from others of the architecture.
        options: Arguments of SAN in which the structure differs from the architecture's own.
        data_options: Preprocessing that differs from the architecture's own, as in timm.
        license: Of weights that are not the authors'.
        text: Markdown for the card of weights that are not the authors'.
        repository: ORGANISATION/NAME, for the card.
        half: Write matrices in float16, which halves the file; of weights that are not the authors'.
        manifest: Its file.
        force: Overwrite other content.

    Raises:
        WeightsError: Something of this is not as it must be; the message says what to do.
    """
    architecture = common.architecture_of(model)
    tag = tag or model.partition('.')[2] or None
    options, data_options = dict(options or {}), dict(data_options or {})
    if architecture not in models():
        raise WeightsError(f'there is no model {model!r}; expected one of {", ".join(models())}')
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
        net = timm.create_model(known_to_timm(architecture, common.TAG), num_classes=IMAGENET_CLASSES, device='meta',
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
        net = build(known_to_timm(architecture, tag), state, options)
        license = describe(net, tag, license)
        if not license:
            notes.append('the card states no licence; --license does')
        name = f'{architecture}.{tag}' if tag else architecture
        tensors = fit(state, net, options, source)
        weights = serialised(halved(tensors, source) if half else tensors)
    sha256 = hashlib.sha256(weights).hexdigest()
    repository = repository or hub.repository(name)
    readme = card.released(name, known, repository, source_sha256, sha256) if authors else card.own(
        name, architecture, repository, source_sha256, net.num_classes, options, license, text)
    write(out, {'README.md': readme.encode(), 'config.json': config_json(net, data_options), hub.FILENAME: weights},
          force)
    return Converted(out, name, source_sha256, sha256, authors, tuple(notes))


# --- Command line ----------------------------------------------------------------------------------------------------

def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, where the value is a Python literal or else a string."""
    name, equals, value = text.partition('=')
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f'expected NAME=VALUE, got {text!r}')
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (SyntaxError, ValueError):
        return name.strip(), value.strip()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        prog='san-backbones weights convert', description=lines[0], epilog='\n'.join(lines[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=pathlib.Path)
    parser.add_argument('--model', required=True, metavar='NAME', help='name in timm, such as san15_patchwise')
    parser.add_argument('--out', required=True, type=pathlib.Path, metavar='FOLDER')
    parser.add_argument('--tag', help="what tells these weights from others of the model (the authors': in1k)")
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
    parser.add_argument('--half', action='store_true', help='matrices in float16: half the size')
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

