"""Converts data sets with boxes or outlines of objects, as they are found in the wild, to COCO's format."""
import collections
import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

from .coco_json import read_coco
from .labels import DataError, Picture, Thing, short
from .voc import read_voc
from .yolo import CLASS_FILES, read_yolo

__all__ = ['Report', 'convert']

READERS = (read_coco, read_voc, read_yolo)
NOTE = 'converted.json'
LEAST = 1.  # pixels: sides of one pixel and less are mistakes
LOOKED_FOR = ("COCO: *.json with images, annotations (with bbox) and categories",
              "VOC:  *.xml with <annotation>, and pictures of the same names",
              'YOLO: pictures, and .txt beside them, or in labels/ where they are in images/, with lines '
              f'`class x y width height`; names of classes in *.yaml, {", ".join(CLASS_FILES[:2])}')


class Report(NamedTuple):
    """What was converted: the kind of labels, and by split the number of pictures and of objects."""
    what: str
    folder: str
    classes: tuple[str, ...]
    pictures: dict[str, int]
    objects: dict[str, int]
    has_masks: bool
    notes: tuple[str, ...]


def convert(folder: str | os.PathLike[str], out: str | os.PathLike[str], val: float = .2, seed: int = 0) -> Report:
    """Converts a folder of data to COCO's format: `annotations/instances_train.json`, `train/` and so on.

    Pictures are hard links where the file system has them, else copies. Splits are the data set's own; without a
    validation split the test split takes its place, or else a part of the training pictures, drawn at random.

    Args:
        folder: With COCO's JSON, VOC's XML or YOLO's text, and pictures.
        out: A new or empty folder, or one that an earlier conversion made, which is replaced.
        val: Part of the training pictures to draw for validation if the data have neither split.
        seed: Of that draw.

    Raises:
        DataError: Nothing was found, or what was found is broken; the message says what was looked for.
        FileExistsError: `out` holds other files.
    """
    folder, out = pathlib.Path(folder).resolve(), pathlib.Path(out)
    if not folder.is_dir():
        raise DataError(f'{folder} is not a folder')
    if out.resolve() == folder or out.resolve() in folder.parents:
        raise DataError(f'{out} holds the data themselves: name another folder')
    found = next((found for reader in READERS if (found := reader(folder)) is not None), None)
    if found is None:
        raise DataError(_nothing(folder))
    splits, drawn = split(found.pictures, val, seed)
    notes = [*found.notes, *drawn]
    dropped: list[str] = []
    contents = {name: _content(pictures, folder, found.classes, dropped) for name, pictures in splits.items()}
    objects = {name: len(content['annotations']) for name, content in contents.items()}
    if not any(objects.values()):
        raise DataError(f'{found.what} in {folder}: no object is labelled in any picture')
    _make_empty(out)
    for name, content in contents.items():
        for picture, image in zip(splits[name], content['images']):
            _link(picture.path, out / name / image['file_name'])
        (out / 'annotations' / f'instances_{name}.json').write_text(json.dumps(content))
    masks = all(thing.segmentation for picture in found.pictures for thing in picture.things)
    if dropped:
        notes.append(f'{len(dropped)} boxes without area were left out, such as {dropped[0]}')
    report = Report(found.what, str(out), tuple(found.classes.values()), {name: len(p) for name, p in splits.items()},
                    objects, masks, tuple(notes))
    (out / NOTE).write_text(json.dumps(dict(report._asdict(), source=str(folder)), indent=2))
    return report


def _make_empty(out: pathlib.Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        if not (out / NOTE).is_file():
            raise FileExistsError(f'{out} is not empty, and no earlier conversion made it: name another folder')
        shutil.rmtree(out)
    (out / 'annotations').mkdir(parents=True)


def split(pictures: list[Picture], val: float, seed: int) -> tuple[dict[str, list[Picture]], list[str]]:
    """Divides pictures into 'train' and 'val', and 'test' if there is one beside them; and says what it decided."""
    splits: dict[str, list[Picture]] = collections.defaultdict(list)
    for picture in pictures:
        splits[picture.split or 'train'].append(picture)
    if 'train' not in splits:
        raise DataError(f'no pictures to train on: all are in splits called {short(sorted(splits))}')
    if 'val' in splits:
        return {name: splits[name] for name in ('train', 'val', 'test') if name in splits}, []
    if 'test' in splits:
        return {'train': splits['train'], 'val': splits['test']}, ['the test split is taken for validation']
    count = round(val * len(pictures))
    if not 0 < count < len(pictures):
        raise DataError(f'a part of {val:g} of {len(pictures)} pictures for validation leaves none on one side')
    chosen = set(random.Random(seed).sample(range(len(pictures)), count))
    parts: dict[str, list[Picture]] = {'train': [], 'val': []}
    for number, picture in enumerate(pictures):
        parts['val' if number in chosen else 'train'].append(picture)
    return parts, [f'no validation split: {count} of {len(pictures)} pictures were drawn for it']


def _content(pictures: list[Picture], folder: pathlib.Path, classes: dict[Any, str],
             dropped: list[str]) -> dict[str, Any]:
    numbers = {label: number for number, label in enumerate(classes, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    taken: set[str] = set()
    for image_id, picture in enumerate(pictures, 1):
        name = _name(picture.path.relative_to(folder), taken)
        images.append(dict(id=image_id, file_name=name, width=picture.width, height=picture.height))
        for thing in picture.things:
            box = _clip(thing, picture)
            if box is None:
                dropped.append(f'{short(list(thing.box))} in {picture.path}')
                continue
            area = thing.area or box[2] * box[3]
            annotations.append(dict(
                id=len(annotations) + 1, image_id=image_id, category_id=numbers[thing.label], bbox=box, area=area,
                iscrowd=int(thing.crowd), **(dict(segmentation=thing.segmentation) if thing.segmentation else {})))
    return dict(images=images, annotations=annotations,
                categories=[dict(id=numbers[label], name=name) for label, name in classes.items()])


def _name(path: pathlib.Path, taken: set[str]) -> str:
    """Returns a name for a picture that no other has, and takes it: names recur in other folders."""
    stem = '_'.join((*path.parent.parts, path.stem))
    name, number = stem + path.suffix, 2
    while name.lower() in taken:  # file systems may not tell A from a
        name, number = f'{stem}-{number}{path.suffix}', number + 1
    taken.add(name.lower())
    return name


def _clip(thing: Thing, picture: Picture) -> list[float] | None:
    """Returns x, y, width, height inside the picture; None for a box without area."""
    left, top, right, bottom = thing.box
    left, right = (min(max(x, 0.), picture.width) for x in (left, right))
    top, bottom = (min(max(y, 0.), picture.height) for y in (top, bottom))
    width, height = right - left, bottom - top
    return [round(x, 3) for x in (left, top, width, height)] if width > LEAST and height > LEAST else None


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:  # which may be a link to another picture: writing into it would change that one
        raise
    except OSError:  # another disk, or a file system without them
        shutil.copyfile(source, target)


def _nothing(folder: pathlib.Path) -> str:
    kinds = collections.Counter(path.suffix.lower() or path.name for path in folder.rglob('*') if path.is_file())
    there = ', '.join(f'{count} {kind}' for kind, count in kinds.most_common(8))
    return '\n'.join([f'no labels of boxes in {folder}', '  looked for:', *(f'    {line}' for line in LOOKED_FOR),
                      f'  found: {there or "nothing: the folder is empty"}'])


def describe(report: Report, say: Callable[[str], None]) -> None:
    """Tells what was converted, a line each."""
    kind = 'outlines' if report.has_masks else 'boxes'
    say(f'{report.what}, {kind}, {len(report.classes)} classes: {short(list(report.classes), 100)}')
    for name, count in report.pictures.items():
        say(f'  {name:5} {count} pictures with {report.objects[name]} objects')
    for note in report.notes:
        say(f'  {note}')


def find_or_convert(folder: pathlib.Path, out: pathlib.Path, say: Callable[[str], None]) -> pathlib.Path:
    """Returns a folder in COCO's format: this one if it has annotations of both splits, else what is made of it."""
    from .coco import annotations
    if folder.is_dir() and all(annotations(folder, name) for name in ('train', 'val')):
        return folder
    report = convert(folder, out)
    say(f'{folder} was converted to COCO\'s format, in {out}')
    describe(report, say)
    return out
