"""Reads COCO's JSON as it is found in the wild. Boxes are in pixels of the picture as it is seen."""
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from .labels import (
    DataError,
    Found,
    Picture,
    Thing,
    check_size,
    files,
    list_pictures,
    note,
    shared,
    short,
    split_in,
    split_of,
    text_of,
)

__all__ = ['read_coco']

_ORDER = ('train', 'val', 'test', '')  # of two splits of a picture the first is taken


def read_coco(folder: pathlib.Path) -> Found | None:
    """Reads COCO's JSON files with instances, also where sizes, areas or ids of annotations are missing; None if there
    are none.

    Splits are those of the folder's name, the JSON's, or the pictures' folder's. Objects of a picture that several
    files or entries name are put together.

    Raises:
        DataError: Entries contradict one another, pictures are not there, or are of another size.
    """
    contents = {path: content for path in files(folder, '.json') if (content := _instances(path)) is not None}
    if not contents:
        return None
    by_name: dict[str, list[pathlib.Path]] = {}
    for path in list_pictures(folder):
        by_name.setdefault(path.name, []).append(path)
    found: dict[pathlib.Path, Picture] = {}
    names: dict[pathlib.Path, str] = {}
    missing, other_size, again, two_splits, strays = [], [], [], [], []
    classes: dict[Any, str] = {}
    for path, content in contents.items():
        named = {category['id']: str(category['name']) for category in content['categories']}
        if any(classes.get(number, name) != name for number, name in named.items()):
            raise DataError(f'{path} has other categories than the files before it: {short(list(named.values()))}; '
                            f'{short(list(classes.values()))}')
        classes.update(named)
        things = _things_by_image(path, content, named)
        split_of_file = split_of(path.relative_to(folder)) or split_in(path.stem)
        for image in content['images']:
            name = pathlib.PureWindowsPath(image['file_name']).as_posix()
            mine = things.pop(image['id'], [])
            fitting = by_name.get(pathlib.PurePosixPath(name).name, [])
            if not fitting:
                missing.append(image['file_name'])
                continue
            best = _best(fitting, name, path, folder, split_of_file)
            other = names.setdefault(best, name)
            if not f'/{other}'.endswith(f'/{name}') and not f'/{name}'.endswith(f'/{other}'):
                raise DataError(f'{path} names {name}, and it or a file before it {other}, but there is {best} alone')
            width, height, differs = check_size(
                best, (image.get('width'), image.get('height')), (thing.box for thing in mine))
            other_size += [best] * differs
            split = split_of_file or split_of(best.relative_to(folder))
            if best in found:
                again.append(best)
                two_splits += [best] * (bool(split) and bool(found[best].split) and split != found[best].split)
                split = min(split, found[best].split, key=_ORDER.index)
                mine = _together(found[best].things, mine)
            found[best] = Picture(best, width, height, mine, split)
        strays += [f'{image_id!r} in {path}' for image_id, rest in things.items() for _ in rest]
    if not found:
        raise DataError(f'none of the {len(missing)} pictures that {next(iter(contents))} names, such as {missing[0]}, '
                        f'is in {folder}')
    notes: list[str] = []
    note(notes, 'pictures that the JSON names are not there and were left out', missing)
    note(notes, 'objects of pictures that the JSON does not name (image_id) were left out', strays)
    note(notes, 'pictures have another size than the JSON says, and boxes fit it', other_size)
    note(notes, 'pictures are named again, and their objects were put together', again)
    note(notes, 'of them are in two splits, and were taken for the first of train, val and test', two_splits)
    return Found(f"COCO's JSON ({len(contents)} files)", [*found.values()], dict(sorted(classes.items())), notes)


def _best(pictures: list[pathlib.Path], name: str, path: pathlib.Path, folder: pathlib.Path,
          split: str) -> pathlib.Path:
    """Returns the picture that a file of annotations of that split means by a name, which may recur."""
    def fitness(one: pathlib.Path) -> tuple[bool, bool, int]:
        return (one.as_posix().endswith(f'/{name}'), split_of(one.relative_to(folder)) == split != '',
                shared(one, path))

    return max(pictures, key=fitness)


def _instances(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns the content of a file of annotations with boxes; None for JSON of another kind.

    Raises:
        DataError: Several of its images have one id.
    """
    try:
        content = json.loads(text_of(path))
    except (json.JSONDecodeError, DataError):
        return None
    lists = ('images', 'annotations', 'categories')
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        return None
    if not all(isinstance(each, dict) and {'id', 'file_name'} <= each.keys() for each in content['images']):
        return None
    if content['annotations'] and 'bbox' not in content['annotations'][0]:  # captions, panoptic
        return None
    by_id: dict[Any, str] = {}
    for image in content['images']:
        if by_id.setdefault(image['id'], image['file_name']) != image['file_name']:
            raise DataError(f'{path}: two images have the id {image["id"]!r}: {by_id[image["id"]]} and '
                            f'{image["file_name"]}')
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


def _together(things: list[Thing], more: list[Thing]) -> list[Thing]:
    """Adds what is not there yet: of one class and box (to a hundredth of a pixel) an object is the same."""
    def key(thing: Thing) -> tuple[Any, ...]:
        return thing.label, *(round(side, 2) for side in thing.box)

    known = {key(thing) for thing in things}
    return things + [thing for thing in more if key(thing) not in known]
