"""Measures the accuracy of weights on pictures, and compares it with the paper.

    san-backbones weights verify san15_patchwise --images PICTURES --quick
    san-backbones weights verify FOLDER/san15_patchwise.in1k --images /data/imagenet/val
    san-backbones weights verify FOLDER/san15_patchwise.in1k --images /data/imagenet/val --limit 2000

The weights are a folder that `san-backbones weights convert` wrote, or the name of a model with pretrained weights.

With --quick, any pictures will do if their folder, or their file name up to the first _, names the class as the weights
do (ImageNet's wnids for the released models); not every class needs pictures. Within a minute it prints the
accuracy and the most frequent confusion, and whether this fits the accuracy that the weights claim.

Without it, the images are ImageNet's validation set, one folder per class, sorted by name. The evaluation is the
paper's: shorter side to 256 (bilinear), centre crop 224, ImageNet's mean and standard deviation. An interrupted run
continues where it stopped. Exit status: 0 if the figures agree with the paper's within the tolerance, or there are none
to compare with; else 1.
"""
import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.data import CustomDatasetInfo, ImageNetInfo, infer_imagenet_subset
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
from tqdm import tqdm

from .. import hub
from ..hub import WeightsError
from . import common

IMAGES = 50_000  # in ImageNet's validation set
BATCHES_BETWEEN_SAVES = 20
QUICK_SECONDS = 30  # for --quick, without imports and loading the weights
QUICK_TOLERANCE = 15  # points: other pictures and classes are easier or harder than all of ImageNet's


class Result(NamedTuple):
    """Counts per class, in the order of the classes: images, and those right among the best 1 and the best 5."""

    images: list[int]
    top1: list[int]
    top5: list[int]

    def percent(self, counts: Sequence[int]) -> float:
        return 100 * sum(counts) / sum(self.images)


class Images(Dataset[tuple[torch.Tensor, int]]):
    """A data set of preprocessed images (3, H, W) with their classes."""

    def __init__(self, samples: Sequence[tuple[str, int]], transform: Callable[[Any], torch.Tensor]):
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, target = self.samples[index]
        try:
            return self.transform(default_loader(path)), target
        except Exception as error:
            raise WeightsError(f'{path} cannot be read as an image ({type(error).__name__}: {error}); replace it by '
                               'the right file and run again') from error


# --- What is measured, on what ---------------------------------------------------------------------------------------

def load(named: str, known: Mapping[str, Mapping[str, Any]]) -> tuple[Any, str, str]:
    """Loads the model in a folder that `convert` wrote, or of a name; returns it, its name with tag, and its digest.

    Raises:
        WeightsError: The folder does not hold a model, or one without a classifier, or not the pinned weights.
    """
    folder = pathlib.Path(named).resolve()
    if not folder.exists() and os.sep not in named:
        source = common.repository_of(named)
        sha256 = hub.digest(hub.weights(source))
        return timm.create_model(named, pretrained=True).eval(), source.rpartition('/')[2], sha256
    for name in ('config.json', hub.FILENAME):
        if not (folder / name).is_file():
            raise WeightsError(f'{folder} has no {name}; expected a folder that `san-backbones weights convert` '
                               'wrote, or the name of a model')
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        tag = config['pretrained_cfg'].get('tag')
        name = config['architecture'] + (f'.{tag}' if tag else '')
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f'{folder / "config.json"} is not what timm writes ({type(error).__name__}: {error}); '
                           'convert the checkpoint again (san-backbones weights convert)') from error
    path = folder / hub.FILENAME
    hub.check(path, name, str(folder), known.get(name, {}).get('sha256'))
    model: Any = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    if not model.num_classes:
        raise WeightsError(f'{folder} holds a backbone without a classifier; there is no accuracy to measure')
    return model, name, hub.digest(path)


def samples_of(folder: pathlib.Path, num_classes: int, limit: int | None) -> list[tuple[str, int]]:
    """Lists (path, class) of the images in a folder with one folder per class; with `limit` an even selection.

    Raises:
        WeightsError: The folder is not of that form, or has another number of classes.
    """
    try:
        dataset = ImageFolder(str(folder))
    except OSError as error:
        raise WeightsError(f'{folder} cannot be used ({str(error).splitlines()[0]}); expected a folder with one folder '
                           'of images per class, as torchvision.datasets.ImageFolder reads it') from error
    if len(dataset.classes) != num_classes:
        raise WeightsError(f'{folder} has {len(dataset.classes)} folders ({", ".join(dataset.classes[:3])}, ...), and '
                           f'the model has {num_classes} classes; expected one folder per class and no others')
    count = len(dataset.samples)
    if limit is None or limit >= count:
        return dataset.samples
    return [dataset.samples[(2 * i + 1) * count // (2 * limit)] for i in range(limit)]


def state_key(sha256: str, data_config: Mapping[str, Any], folder: pathlib.Path,
           samples: Sequence[tuple[str, int]]) -> str:
    """Returns a digest of what the counts depend on: weights, preprocessing, images and their order."""
    names = [[os.path.relpath(path, folder).replace(os.sep, '/'), target] for path, target in samples]
    return hashlib.sha256(json.dumps([sha256, data_config, names]).encode()).hexdigest()


# --- Measuring -------------------------------------------------------------------------------------------------------

def read_state(path: pathlib.Path, key: str) -> dict[str, Any]:
    """Reads the counts of an earlier run of the same measurement; {} if there is none.

    Raises:
        WeightsError: This script did not write the file.
    """
    if not path.is_file():
        return {}
    try:
        state = json.loads(path.read_text(encoding='utf-8'))
        if state['key'] == key:
            return {name: state[name] for name in ('done', 'top1', 'top5')}
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f'{path} is not a state of this script ({type(error).__name__}: {error}); name another file '
                           'with --state, or delete it') from error
    print(f'{path} is of other weights, images or preprocessing: starting afresh')
    return {}


def write_state(path: pathlib.Path, key: str, state: Mapping[str, Any]) -> None:
    common.replace_files(path.parent, {path.name: json.dumps({'key': key, **state}).encode()})


def add_batch(state: Mapping[str, Any], right: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
    """Adds the counts of a batch: `right` (N, up to 5) says which of the best classes are the image's."""
    top1, top5 = list(state['top1']), list(state['top5'])
    for target, first, among in zip(targets.tolist(), right[:, 0].tolist(), right.any(1).tolist()):
        top1[target] += first
        top5[target] += among
    return {'done': state['done'] + len(targets), 'top1': top1, 'top5': top5}


@contextlib.contextmanager
def without_traceback() -> Iterator[None]:
    """Strips the traceback that a DataLoader worker puts before the message of an error."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(str(error).strip().splitlines()[-1].rpartition('WeightsError: ')[2]) from error


def measure(
        model: Any,
        samples: Sequence[tuple[str, int]],
        transform: Callable[[Any], torch.Tensor],
        key: str,
        state_path: pathlib.Path,
        batch_size: int = 64,
        workers: int = 0,
        device: str = 'cpu',
) -> Result:
    """Counts right answers over the samples; saves the counts to a file at intervals and on interruption."""
    classes = range(model.num_classes)
    state = {'done': 0, 'top1': [0] * len(classes), 'top5': [0] * len(classes), **read_state(state_path, key)}
    if state['done']:
        print(f"{state['done']} of {len(samples)} images were done earlier ({state_path})")
    model = model.to(device)
    loader = DataLoader(Images(samples[state['done']:], transform), batch_size=batch_size, num_workers=workers,
                        pin_memory=torch.device(device).type == 'cuda')
    try:
        with without_traceback(), torch.inference_mode(), tqdm(
                total=len(samples), initial=state['done'], unit='images') as progress:
            for number, (images, targets) in enumerate(loader, 1):
                best = model(images.to(device)).topk(min(5, len(classes)), dim=1).indices.cpu()
                state = add_batch(state, best == targets[:, None], targets)  # replaced at once: never half a batch
                progress.update(len(targets))
                progress.set_postfix_str(f"top-1 {100 * sum(state['top1']) / state['done']:.2f}", refresh=False)
                if number % BATCHES_BETWEEN_SAVES == 0:
                    write_state(state_path, key, state)
    finally:
        write_state(state_path, key, state)
    images_of = [0] * len(classes)
    for _, target in samples:
        images_of[target] += 1
    return Result(images_of, state['top1'], state['top5'])


def compare(result: Result, entry: Mapping[str, Any], tolerance: float) -> tuple[list[str], bool]:
    """Compares with the paper; returns lines of text, and whether both figures agree.

    With fewer images than ImageNet's validation set, two standard errors are added to the tolerance.
    """
    count = sum(result.images)
    lines, passed = [], True
    for what, counts in (('top-1', result.top1), ('top-5', result.top5)):
        paper = entry[f"paper_{what.replace('-', '')}"]
        error = _standard_error(paper, count) if count < IMAGES else 0.
        measured = result.percent(counts)
        allowed = tolerance + 2 * error
        agrees = abs(measured - paper) <= allowed + 1e-9
        passed &= agrees
        lines.append(f'{what}: {measured:.2f} measured, {paper:.1f} in the paper, {measured - paper:+.2f} points, '
                     f'{allowed:.2f} allowed: {"pass" if agrees else "FAIL"}')
        if error:
            lines.append(f'  over {count} images the standard error is {error:.2f} points; twice that is added to the '
                         f'{tolerance:g} allowed')
    return lines, passed


# --- Quickly ---------------------------------------------------------------------------------------------------------

def classes_of(model: Any) -> CustomDatasetInfo | ImageNetInfo | None:
    """Returns the class names of a model, from its weights or because they are ImageNet's; None if unknown."""
    cfg = model.pretrained_cfg
    if cfg.get('label_names') and len(cfg['label_names']) == model.num_classes:
        return CustomDatasetInfo(cfg['label_names'], cfg.get('label_descriptions'))
    subset = infer_imagenet_subset(model) if model.num_classes >= 1000 else None
    return ImageNetInfo(subset) if subset else None


def pictures_of(folder: pathlib.Path, model: Any) -> list[tuple[str, int]]:
    """Lists (path, class) of pictures whose folder, or whose name up to the first _, names a class; classes in turns.

    Raises:
        WeightsError: There are none, and the folder does not have one folder per class either.
    """
    info = classes_of(model)
    numbers = {name: number for number, name in enumerate(info.label_names())} if info else {}
    by_class: dict[int, list[tuple[str, int]]] = collections.defaultdict(list)
    for path in sorted(pathlib.Path(root, name) for root, _, names in os.walk(folder) for name in names):
        number = numbers.get(path.parent.name, numbers.get(path.name.partition('_')[0]))
        if number is not None and path.suffix.lower() in IMG_EXTENSIONS:
            by_class[number].append((str(path), number))
    if by_class:
        turns = itertools.zip_longest(*by_class.values())
        return [sample for turn in turns for sample in turn if sample is not None]
    try:
        return samples_of(folder, model.num_classes, None)
    except WeightsError as error:
        expected = f'such as {", ".join(list(numbers)[:2])}' if numbers else 'one folder for each class'
        raise WeightsError(f'{folder} has no pictures whose folder, or whose name up to the first _, is a class of '
                           f'these weights ({expected}); {error}') from error


def quick(
        model: Any,
        name: str,
        folder: pathlib.Path,
        entry: Mapping[str, Any],
        batch_size: int = 16,
        workers: int = 0,
        device: str = 'cpu',
) -> bool:
    """Evaluates weights on some pictures within a minute; returns whether the result fits what they claim.

    Args:
        model: The model with its weights.
        name: Name of the weights.
        folder: The pictures.
        entry: The model's entry in the manifest, with the paper's accuracy if it is claimed.
        batch_size, workers, device: For the evaluation.

    Raises:
        WeightsError: There are no pictures of the model's classes.
    """
    samples = pictures_of(folder, model)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    model, guesses = model.to(device), []
    loader = DataLoader(Images(samples, transform), batch_size=min(batch_size, 16), num_workers=workers)
    end = time.monotonic() + QUICK_SECONDS
    with without_traceback(), torch.inference_mode(), tqdm(total=len(samples), unit='images') as progress:
        for images, _ in loader:
            guesses += model(images.to(device)).topk(min(5, model.num_classes), dim=1).indices.tolist()
            progress.update(len(images))
            if time.monotonic() > end:
                break
    asked = [target for _, target in samples[:len(guesses)]]
    count, classes = len(asked), len(set(asked))
    top1, top5 = (100 * sum(target in guess[:best] for target, guess in zip(asked, guesses)) / count for best in (1, 5))
    print(f'{name}: top-1 {top1:.1f}, top-5 {top5:.1f} over {count} pictures of {classes} of {model.num_classes} '
          'classes')
    wrong = collections.Counter((target, guess[0]) for target, guess in zip(asked, guesses) if guess[0] != target)
    info = classes_of(model)
    for (target, guess), times in wrong.most_common(1):
        right, taken = (info.index_to_description(i) if info else f'class {i}' for i in (target, guess))
        print(f'confused most: {right}, taken for {taken} in {times} of {asked.count(target)} pictures')
    if 'paper_top1' in entry:
        least = [max(entry[f'paper_{what}'] - QUICK_TOLERANCE - 2 * _standard_error(entry[f'paper_{what}'], count), 0)
                 for what in ('top1', 'top5')]
        print(f"the paper's, over all of ImageNet: top-1 {entry['paper_top1']:.1f}, top-5 {entry['paper_top5']:.1f}; "
              f'expected here: at least {least[0]:.1f} and {least[1]:.1f}')
        passed = top1 >= least[0] and top5 >= least[1]
    else:
        chance = 100 / model.num_classes
        print(f'no figures to compare with; guessing gives {chance:.1f}')
        passed = top1 > chance + 2 * _standard_error(chance, count)
    print('PASS: these weights can be what they claim' if passed else
          'FAIL: these weights, or the classes of these pictures, are not what they claim')
    return passed


def _standard_error(percent: float, count: int) -> float:
    return 100 * math.sqrt(percent / 100 * (1 - percent / 100) / count)


# --- Command line ----------------------------------------------------------------------------------------------------

def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser('verify', __doc__)
    parser.add_argument('weights', metavar='FOLDER|MODEL', help='what convert wrote, or the name of a model')
    parser.add_argument('--images', '--imagenet', dest='images', required=True, type=pathlib.Path, metavar='FOLDER',
                        help='pictures: the validation images, one folder per class; with --quick, any named by class')
    parser.add_argument('--quick', action='store_true', help='some pictures, of some classes, within a minute')
    parser.add_argument('--limit', type=int, metavar='N', help='only N images, evenly spread over all')
    parser.add_argument('--tolerance', type=float, default=0.3, metavar='POINTS',
                        help='largest accepted difference from the paper (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=64, metavar='N')
    parser.add_argument('--workers', type=int, default=min(8, os.cpu_count() or 1), metavar='N',
                        help='processes that read images; 0 reads in the main process')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--state', type=pathlib.Path, metavar='FILE',
                        help='where to save the counts (default: FOLDER.verify.json, beside the folder)')
    parser.add_argument('--record', action='store_true',
                        help='write the result into the manifest, for the model card; all images only')
    parser.add_argument('--manifest', type=pathlib.Path, default=common.MANIFEST, metavar='FILE')
    options = parser.parse_args(argv)
    if options.quick and (options.record or options.limit):
        parser.error('--quick takes as many pictures as fit into its time: leave out --record and --limit')
    for name, least in dict(limit=1, batch_size=1, workers=0, tolerance=0).items():
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f'--{name.replace("_", "-")} must be at least {least}, not {value}')
    try:
        if torch.device(options.device).type == 'cuda' and not torch.cuda.is_available():
            raise RuntimeError('there is no CUDA device')
    except RuntimeError as error:
        parser.error(f'--device {options.device} cannot be used ({error}); expected cpu, cuda, cuda:1, ...')
    return options


@common.command
def main(argv: Sequence[str] | None = None) -> int:
    """Measures as the command line says; returns the exit status."""
    options = parse(argv)
    known = common.read_manifest(options.manifest)
    model, name, sha256 = load(options.weights, known)
    if options.quick:
        return int(not quick(model, name, options.images, known.get(name, {}), options.batch_size, options.workers,
                             options.device))
    samples = samples_of(options.images, model.num_classes, options.limit)
    if options.record and (name not in known or len(samples) != IMAGES):
        raise WeightsError(f'--record is for the models of {options.manifest} on all {IMAGES} validation images; this '
                           f'is {name} on {len(samples)}. Run without it')
    data_config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data_config, is_training=False)
    folder = pathlib.Path(options.weights).resolve()
    state_path = options.state or folder.with_name(f'{folder.name}.verify.json')
    result = measure(model, samples, transform, state_key(sha256, data_config, options.images, samples), state_path,
                     options.batch_size, options.workers, options.device)
    top1, top5 = result.percent(result.top1), result.percent(result.top5)
    print(f'{name}: top-1 {top1:.2f}, top-5 {top5:.2f} over {len(samples)} images')
    if options.record:
        measured = {'top1': round(top1, 3), 'top5': round(top5, 3), 'images': len(samples), 'sha256': sha256}
        common.record(options.manifest, name, measured=measured)
        print(f'recorded in {options.manifest}')
    if 'paper_top1' not in known.get(name, {}):
        print(f'{options.manifest} has no figures for {name}: nothing to compare with')
        return 0
    lines, passed = compare(result, known[name], options.tolerance)
    print('\n'.join(lines))
    print('PASS' if passed else 'FAIL: these weights, this evaluation or these images are not those of the paper')
    return 0 if passed else 1

