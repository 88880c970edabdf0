"""Finds and checks a folder of data in COCO's format, and explains what is wrong."""
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .labels import DataError, check_size, short, text_of

__all__ = ['Split', 'annotations', 'find']

WORDS = dict(train=('train',), val=('val', 'valid', 'validation', 'test'))
# Where a split's annotations usually lie. {} stands for a word above; an earlier word wins, then an earlier pattern.
LAYOUTS = (
    'annotations/instances_{}*.json',
    'annotations/{}*.json',
    '{}/_annotations.coco.json',
    'instances_{}*.json',
    '{}.json',
    '{}*.json',
    '{}/*.json',
    'annotations/*{}*.json',
)


@dataclass
class Split:
    """One checked part of a data set.

    Attributes:
        json: The file with the annotations.
        images: The folder that the file names of pictures are relative to.
        coco: The content of the file.
        whole: Of a part that `first` made, the data that it is a part of.
    """
    json: Path
    images: Path
    coco: dict[str, Any]
    whole: 'Split | None' = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the categories, in the file's order."""
        return tuple(category['name'] for category in self.coco['categories'])

    @property
    def without_masks(self) -> int:
        """How many annotations have a box only."""
        return sum(not annotation.get('segmentation') for annotation in self.coco['annotations'])

    def first(self, count: int, folder: Path) -> 'Split':
        """Reduces the data to the first `count` annotated pictures, in a new JSON file in `folder`.

        Reducing the data loader would not be enough: MMDetection's COCO metric counts every picture of the file.
        """
        annotated = {annotation['image_id'] for annotation in self.coco['annotations']}
        images = [image for image in self.coco['images'] if image['id'] in annotated]
        if not count or len(images) <= count:
            return self
        images = images[:count]
        kept = {image['id'] for image in images}
        annotations = [annotation for annotation in self.coco['annotations'] if annotation['image_id'] in kept]
        coco = dict(self.coco, images=images, annotations=annotations)
        path = Path(folder) / f'{self.json.stem}_first{count}.json'
        path.write_text(json.dumps(coco))
        return Split(path, self.images, coco, self)


def find(folder: Path | str) -> tuple[Split, Split]:
    """Finds the training and the validation part of a data set.

    Args:
        folder: Folder with annotations in one of the usual layouts, such as `annotations/instances_train2017.json`
            beside `train2017/`, `train.json` beside `images/`, or `train/_annotations.coco.json`.

    Returns:
        Training and validation. Annotations have boxes; masks are not needed (`Split.without_masks`).

    Raises:
        DataError: Something is missing or is not in COCO's format, or pictures are of another size than was labelled.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f'{folder} is not a folder')
    train, val = (read(find_annotations(folder, split), split, folder) for split in ('train', 'val'))
    if categories(train) != categories(val):
        raise DataError(f'{train.json} and {val.json} must list the same categories in the same order, but one has\n'
                      f'  {short(categories(train))}\nand the other\n  {short(categories(val))}')
    return train, val


def categories(split: Split) -> list[tuple[Any, str]]:
    return [(category['id'], category['name']) for category in split.coco['categories']]


def annotations(folder: Path, split: str) -> Path | None:
    """Finds the JSON file with the annotations of one split; None if there is none."""
    for word in WORDS[split]:
        for layout in LAYOUTS:
            matches = sorted(folder.glob(layout.format(word)))
            if matches:
                return matches[-1]  # takes instances_train2017, not instances_train2014
    return None


def find_annotations(folder: Path, split: str) -> Path:
    found = annotations(folder, split)
    if found is not None:
        return found
    usual = ', '.join(layout.format(WORDS[split][0]) for layout in LAYOUTS[:4])
    others = f' ({" or ".join(WORDS[split][1:])} will do for {split})' if WORDS[split][1:] else ''
    names = sorted(path.name + '/' * path.is_dir() for path in folder.iterdir())
    inside = sorted(path.relative_to(folder).as_posix() for path in folder.glob('**/*.json'))
    raise DataError(f'no {split} annotations in {folder}\n'
                  f'  looked for: {usual} and the like{others}\n'
                  f'  found:      {short(names) or "an empty folder"}\n'
                  f'  JSON files: {short(inside) or "none"}')


def read(path: Path, split: str, folder: Path) -> Split:
    """Reads and checks one file of annotations, and finds its pictures somewhere below `folder`."""
    try:
        coco = json.loads(text_of(path))
    except json.JSONDecodeError as error:
        raise DataError(f'{path} is not readable as JSON: {error}') from None

    if not isinstance(coco, dict) or not {'images', 'annotations', 'categories'} <= coco.keys():
        what = f'an object with {short(sorted(coco))}' if isinstance(coco, dict) else f'a {type(coco).__name__}'
        raise DataError(f'{path} is not in COCO\'s format: it holds {what}, and should hold an object with '
                      'images, annotations, categories')
    for key in ('images', 'annotations', 'categories'):
        if not isinstance(coco[key], list) or not coco[key]:
            raise DataError(f'{path}: the list of {key} is empty, or not a list')

    check_entries(path, 'image', coco['images'], ('id', 'file_name', 'width', 'height'))
    check_entries(path, 'category', coco['categories'], ('id', 'name'))
    check_annotations(path, coco)
    images = find_images(path, coco['images'], split, folder)
    check_sizes(images, coco)
    return Split(path, images, coco)


def check_sizes(folder: Path, coco: Mapping[str, Any]) -> None:
    """Checks that some of the pictures have the size that their entry says, or that their boxes fit them."""
    boxes: dict[Any, list[tuple[float, ...]]] = {image['id']: [] for image in sample(coco['images'])}
    for annotation in coco['annotations']:
        if annotation['image_id'] in boxes:
            left, top, width, height = annotation['bbox']
            boxes[annotation['image_id']].append((left, top, left + width, top + height))
    for image in sample(coco['images']):
        check_size(folder / image['file_name'], (image['width'], image['height']), boxes[image['id']])


def sample(entries: Sequence[Any]) -> Sequence[Any]:
    """Takes some twenty of them, at equal distances."""
    return entries[::max(1, len(entries) // 20)]


def check_entries(path: Path, kind: str, entries: Sequence[Any], keys: Sequence[str]) -> None:
    """Checks that every entry is an object with all the keys, and that ids are unique."""
    for number, entry in enumerate(entries):
        missing = [key for key in keys if key not in entry] if isinstance(entry, dict) else list(keys)
        if missing:
            raise DataError(f'{path}: {kind} number {number} has no {", ".join(missing)}: {short(entry)}. '
                            '`san-backbones convert-data` fills in sizes, areas and ids')
    if len({entry['id'] for entry in entries}) < len(entries):
        raise DataError(f'{path}: several {kind} entries share one id')


def check_annotations(path: Path, coco: Mapping[str, Any]) -> None:
    """Checks that every annotation has a box, and belongs to a known picture and category."""
    annotations = coco['annotations']
    if 'segments_info' in annotations[0]:
        raise DataError(f'{path} holds panoptic annotations (segments_info); instance annotations are needed')
    check_entries(path, 'annotation', annotations, ('id', 'image_id', 'category_id', 'bbox', 'area'))

    for key, known in dict(image_id=coco['images'], category_id=coco['categories']).items():
        known = {entry['id'] for entry in known}
        strays = [annotation for annotation in annotations if annotation[key] not in known]
        if strays:
            raise DataError(f'{path}: {len(strays)} of {len(annotations)} annotations have an unknown {key}, such as '
                          f'{short(strays[0][key])} in annotation {strays[0]["id"]}')


def find_images(path: Path, images: Sequence[Mapping[str, Any]], split: str, folder: Path) -> Path:
    """Finds the folder that the file names of `images` are relative to: the one that has most of them.

    If several have equally many (names such as 0001.jpg recur in every split), the one named after the split.
    """
    names = [image['file_name'] for image in images]
    candidates = [path.parent, path.parent / 'images', folder]
    candidates += sorted(path for depth in ('*', '*/*', '*/*/*') for path in folder.glob(depth) if path.is_dir())

    def fitness(candidate: Path) -> tuple[int, int]:
        called = candidate.relative_to(folder).as_posix()
        rank = min([rank for rank, word in enumerate(WORDS[split]) if word in called], default=len(WORDS[split]))
        return sum((candidate / name).is_file() for name in sample(names)), -rank

    best = max(candidates, key=fitness)
    missing = [name for name in names if not (best / name).is_file()]
    if len(missing) == len(names):
        raise DataError(f'none of the {len(names)} pictures that {path} names, such as {names[0]}, is in {folder} '
                      'or the folders in it')
    if missing:
        raise DataError(f'{len(missing)} of the {len(names)} pictures that {path} names are not in {best}: '
                      f'{short(missing)}')
    return best
