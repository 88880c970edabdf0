"""Reads labels of objects in pictures as they are found in the wild: VOC's XML, YOLO's text, COCO's JSON.

Each reader returns `Found`, or None where a folder has nothing of its format. All boxes are (left, top, right, bottom)
in pixels of the picture as it is seen, after the orientation that its camera noted.
"""
import dataclasses
import itertools
import json
import math
import pathlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import yaml
from PIL import Image

from .._pictures import is_picture, size_upright, walk
from .coco import DataError, short

__all__ = ['Found', 'Picture', 'Thing', 'read_coco', 'read_voc', 'read_yolo', 'split_of']

WORDS = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test'}
CLASS_FILES = ('classes.txt', 'obj.names', '*.names', '_darknet.labels', 'labels.txt')


class Thing(NamedTuple):
    """A labelled object."""
    label: Any  # a class: a name for VOC, else a number
    box: tuple[float, float, float, float]
    segmentation: Any = None  # polygons [[x, y, ...], ...] or an RLE, as in COCO's format
    crowd: bool = False  # not to be learned, nor counted when it is not found
    area: float | None = None


class Picture(NamedTuple):
    """A picture and what is labelled in it; split is 'train', 'val', 'test' or ''."""
    path: pathlib.Path
    width: int
    height: int
    things: list[Thing]
    split: str


@dataclasses.dataclass
class Found:
    """What a reader found; `classes` are names by class, `notes` say what was left out and why."""
    what: str
    pictures: list[Picture]
    classes: dict[Any, str]
    notes: list[str]


def size_of(path: pathlib.Path) -> tuple[int, int]:
    """Returns width and height as the picture is seen.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return size_upright(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f'{path} cannot be read as a picture: {error}') from error


def split_of(path: pathlib.PurePath) -> str:
    """Returns the split that a folder in the path is named after; '' if none is."""
    for part in reversed(path.parts[:-1]):
        found = re.match(r'(train|validation|valid|val|test)(?![a-z])', part.lower())
        if found:
            return WORDS[found[1]]
    return ''


def list_pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    return [pathlib.Path(path) for path in walk(folder) if is_picture(path)]


def _files(folder: pathlib.Path, suffix: str) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob(f'*{suffix}') if path.is_file() and not path.name.startswith('.'))


def _note(notes: list[str], what: str, cases: Iterable[Any]) -> None:
    cases = list(cases)
    if cases:
        notes.append(f'{len(cases)} {what}, such as {cases[0]}')


# --- VOC -------------------------------------------------------------------------------------------------------------

def read_voc(folder: pathlib.Path) -> Found | None:
    """Reads `<annotation>` files of PASCAL VOC, LabelImg and others. Coordinates start at 1, as the devkit's do.

    Objects marked as difficult become crowds. Splits are those of ImageSets/Main, else of the folders' names.

    Raises:
        DataError: An XML file is broken, or no picture belongs to any.
    """
    roots = {path: root for path in _files(folder, '.xml') if (root := _annotation(path)) is not None}
    if not roots:
        return None
    by_stem: dict[str, list[pathlib.Path]] = {}
    for path in list_pictures(folder):
        by_stem.setdefault(path.stem, []).append(path)
    sets = _image_sets(folder)
    pictures, alone = [], []
    for path, root in roots.items():
        stems = (path.stem, pathlib.PureWindowsPath(root.findtext('filename') or '').stem)
        fitting = next((by_stem[stem] for stem in stems if stem in by_stem), [])
        if not fitting:
            alone.append(path)
            continue
        picture = max(fitting, key=lambda one: _shared(one, path))  # of two splits may have the same name
        width, height = size_of(picture)
        split = sets.get(path.stem, 'unlisted') if sets else split_of(path.relative_to(folder))
        pictures.append(Picture(picture, width, height, [_thing(path, each) for each in root.iter('object')], split))
    if not pictures:
        raise DataError(f'none of the {len(alone)} XML files in {folder}, such as {alone[0]}, has a picture of its '
                        'name there')
    notes: list[str] = []
    _note(notes, 'XML files without a picture were left out', alone)
    listed = [picture for picture in pictures if picture.split != 'unlisted']
    _note(notes, 'pictures that ImageSets/Main does not list were left out',
          [picture.path for picture in pictures if picture.split == 'unlisted'])
    names = sorted({thing.label for picture in listed for thing in picture.things})
    return Found(f"VOC's XML ({len(roots)} files)", listed, {name: name for name in names}, notes)


def _annotation(path: pathlib.Path) -> ElementTree.Element | None:
    """Returns the root of an XML file with objects of pictures; None for XML of another kind."""
    text = path.read_bytes()
    if b'<annotation' not in text or b'<!ENTITY' in text:  # entities can blow up a parser
        return None
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DataError(f'{path} is broken XML: {error}') from error
    return root if root.tag == 'annotation' else None


def _thing(path: pathlib.Path, node: ElementTree.Element) -> Thing:
    name = (node.findtext('name') or '').strip()
    try:
        left, top, right, bottom = (float(node.findtext(f'bndbox/{side}') or '')
                                    for side in ('xmin', 'ymin', 'xmax', 'ymax'))
    except ValueError:
        name = ''
    if not name:
        raise DataError(f'{path}: an <object> has no name, or no bndbox with xmin, ymin, xmax and ymax as numbers')
    return Thing(name, (left - 1, top - 1, right, bottom), crowd=(node.findtext('difficult') or '').strip() == '1')


def _image_sets(folder: pathlib.Path) -> dict[str, str]:
    """Returns the split of each name in ImageSets/Main; empty if there are no such lists."""
    lists = {path.stem: path for path in sorted(folder.rglob('ImageSets/Main/*.txt'), reverse=True)}
    found: dict[str, str] = {}
    for name, split in (('trainval', 'train'), ('train', 'train'), ('test', 'test'), ('val', 'val')):  # later ones win
        if name in lists and (name != 'trainval' or 'train' not in lists):
            found.update((line.split()[0], split) for line in lists[name].read_text().splitlines() if line.strip())
    return found


def _shared(one: pathlib.Path, other: pathlib.Path) -> int:
    """Counts the parts that two paths have in common at their beginnings."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one.parts, other.parts)))


# --- YOLO ------------------------------------------------------------------------------------------------------------

def read_yolo(folder: pathlib.Path) -> Found | None:
    """Reads text labels of YOLO: lines `class x y width height`, or `class x y x y x y ...` for outlines.

    Numbers are parts of width and height; a sixth number, a confidence, is passed over. A label lies beside its
    picture, or in `labels` where the picture lies in `images`. A picture without one shows nothing. Names of classes
    come from `names` in a .yaml file, or from classes.txt, obj.names and the like.

    Raises:
        DataError: A line is something else.
    """
    pictures = list_pictures(folder)
    labels = {path: label for path in pictures if (label := _label_of(path, folder)) is not None}
    if not labels or not any(_is_yolo(label) for label in labels.values()):
        return None
    names, source = _class_names(folder)
    found, seen = [], set()
    for path in pictures:
        width, height = size_of(path)
        things = _read_lines(labels[path], width, height) if path in labels else []
        seen |= {thing.label for thing in things}
        found.append(Picture(path, width, height, things, split_of(path.relative_to(folder))))
    missing = sorted(seen - set(names))
    notes = [f'names of classes: {source}']
    if missing and names:
        raise DataError(f'{source} names classes {short(sorted(names))}, and labels have {short(missing)} too')
    if missing:
        names = {number: f'class {number}' for number in range(max(missing) + 1)}
        notes = [f'no names of classes (looked for *.yaml with names, {", ".join(CLASS_FILES)}): they are called '
                 'class 0, class 1, ...']
    _note(notes, 'pictures have no label file: they show nothing', [path for path in pictures if path not in labels])
    return Found(f"YOLO's text ({len(labels)} files)", found, names, notes)


def _label_of(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path | None:
    parts = list(path.relative_to(folder).parts)
    candidates = [path.with_suffix('.txt')]
    for at in reversed([i for i, part in enumerate(parts) if part.lower() == 'images']):
        candidates.append(folder.joinpath(*parts[:at], 'labels', *parts[at + 1:]).with_suffix('.txt'))
    return next((each for each in candidates if each.is_file() and each.name not in CLASS_FILES), None)


def _numbers(line: str) -> list[float]:
    try:
        values = [float(part) for part in line.split()]
    except ValueError:
        return []
    fits = len(values) in (5, 6) or (len(values) >= 7 and len(values) % 2)
    return values if fits and values[0] >= 0 and values[0] == int(values[0]) else []


def _is_yolo(path: pathlib.Path) -> bool:
    lines = path.read_text(errors='replace').split('\n', 1)
    return bool(_numbers(lines[0]))


def _read_lines(path: pathlib.Path, width: int, height: int) -> list[Thing]:
    things = []
    for number, line in enumerate(path.read_text(errors='replace').splitlines(), 1):
        if not line.strip():
            continue
        values = _numbers(line)
        if not values:
            raise DataError(f'{path}, line {number}: expected `class x y width height` or `class x y x y x y ...`, got '
                            f'{short(line, 60)!r}')
        if max(values[1:5]) > 2:
            raise DataError(f'{path}, line {number}: expected parts of width and height, from 0 to 1, got '
                            f'{short(line, 60)!r}: are these pixels?')
        things.append(_yolo_thing(values, width, height))
    return things


def _yolo_thing(values: list[float], width: int, height: int) -> Thing:
    label = int(values[0])
    if len(values) <= 6:
        x, y, wide, tall = values[1:5]
        return Thing(label, ((x - wide / 2) * width, (y - tall / 2) * height,
                             (x + wide / 2) * width, (y + tall / 2) * height))
    xs, ys = [x * width for x in values[1::2]], [y * height for y in values[2::2]]
    outline = [value for point in zip(xs, ys) for value in point]
    return Thing(label, (min(xs), min(ys), max(xs), max(ys)), [outline], area=_area(xs, ys))


def _area(xs: list[float], ys: list[float]) -> float:
    """Computes the area of a polygon (shoelace formula)."""
    return abs(sum(x * ys[i - 1] - xs[i - 1] * y for i, (x, y) in enumerate(zip(xs, ys)))) / 2


def _class_names(folder: pathlib.Path) -> tuple[dict[int, str], str]:
    """Returns the names of classes by number, and the file that has them."""
    for path in _files(folder, '.yaml') + _files(folder, '.yml'):
        try:
            content = yaml.safe_load(path.read_text(encoding='utf-8'))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f'{path} is broken YAML: {error}') from error
        names = content.get('names') if isinstance(content, Mapping) else None
        if isinstance(names, (list, Mapping)) and names:
            pairs = names.items() if isinstance(names, Mapping) else enumerate(names)
            return {int(number): str(name) for number, name in pairs}, str(path)
    for pattern in CLASS_FILES:
        for path in sorted(folder.rglob(pattern)):
            lines = [line.strip() for line in path.read_text(encoding='utf-8').splitlines()]
            return dict(enumerate(line for line in lines if line)), str(path)
    return {}, ''


# --- COCO ------------------------------------------------------------------------------------------------------------

def read_coco(folder: pathlib.Path) -> Found | None:
    """Reads COCO's JSON files with instances, also where sizes, areas or ids of annotations are missing.

    Raises:
        DataError: Annotations point nowhere, or the pictures are not there.
    """
    files = {path: content for path in _files(folder, '.json') if (content := _instances(path)) is not None}
    if not files:
        return None
    by_name: dict[str, list[pathlib.Path]] = {}
    for path in list_pictures(folder):
        by_name.setdefault(path.name, []).append(path)
    found, missing = [], []
    classes: dict[Any, str] = {}
    for path, content in files.items():
        named = {category['id']: str(category['name']) for category in content['categories']}
        if any(classes.get(number, name) != name for number, name in named.items()):
            raise DataError(f'{path} has other categories than the files before it: {short(list(named.values()))}; '
                            f'{short(list(classes.values()))}')
        classes.update(named)
        things = _things_by_image(path, content, named)
        for image in content['images']:
            name = pathlib.PureWindowsPath(image['file_name']).as_posix()
            fitting = by_name.get(pathlib.PurePosixPath(name).name, [])
            if not fitting:
                missing.append(image['file_name'])
                continue
            best = max(fitting, key=lambda one: (one.as_posix().endswith('/' + name), _shared(one, path)))
            width, height = size_of(best)
            split = split_of(path.relative_to(folder)) or split_of(pathlib.PurePath(path.stem.replace(
                'instances_', ''), '')) or split_of(best.relative_to(folder))
            found.append(Picture(best, width, height, things.get(image['id'], []), split))
    if not found:
        raise DataError(f'none of the {len(missing)} pictures that {next(iter(files))} names, such as {missing[0]}, is '
                        f'in {folder}')
    notes: list[str] = []
    _note(notes, 'pictures that the JSON names are not there and were left out', missing)
    return Found(f"COCO's JSON ({len(files)} files)", found, dict(sorted(classes.items())), notes)


def _instances(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    lists = ('images', 'annotations', 'categories')
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        return None
    if not all(isinstance(each, dict) and {'id', 'file_name'} <= each.keys() for each in content['images']):
        return None
    if content['annotations'] and 'bbox' not in content['annotations'][0]:  # captions, panoptic
        return None
    return content


def _things_by_image(path: pathlib.Path, content: dict[str, Any], named: Mapping[Any, str]) -> dict[Any, list[Thing]]:
    things: dict[Any, list[Thing]] = {}
    for annotation in content['annotations']:
        if annotation.get('category_id') not in named:
            raise DataError(f'{path}: an annotation has the category_id {annotation.get("category_id")!r}, which the '
                            f'categories lack: {short(annotation)}')
        box = annotation.get('bbox')
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, (int, float)) for x in box):
            raise DataError(f'{path}: expected a bbox of four numbers, got {short(annotation)}')
        left, top, width, height = box
        area = annotation.get('area')
        things.setdefault(annotation.get('image_id'), []).append(Thing(
            annotation['category_id'], (left, top, left + width, top + height), annotation.get('segmentation') or None,
            bool(annotation.get('iscrowd', 0)), area if area and math.isfinite(area) else None))
    return things
