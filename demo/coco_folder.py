"""Finds and checks a folder of data in COCO's format, and says plainly what is wrong with one that is not."""

import json
from dataclasses import dataclass
from pathlib import Path

WORDS = dict(train=('train',), val=('val', 'valid', 'validation', 'test'))
# Where a split's annotations usually lie. {} stands for a word above; an earlier word wins, then an earlier place.
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


class NotCoco(ValueError):
    """The data is not in COCO's format. The message names the file, what was found and what was looked for."""


@dataclass
class Split:
    """One checked part of a data set.

    Attributes:
        json: The file with the annotations.
        images: The folder that the file names in it start from.
        coco: What is in the file.
    """
    json: Path
    images: Path
    coco: dict

    @property
    def classes(self):
        """Names of the categories, in the file's order."""
        return tuple(category['name'] for category in self.coco['categories'])

    def first(self, count, folder):
        """The same data cut down to the first `count` annotated pictures, in a JSON file of its own in `folder`.

        A cut-down file, and not only a cut-down loader, because MMDetection's COCO metric counts every picture of the
        file that it is given.
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
        return Split(path, self.images, coco)


def find(folder):
    """Finds the training and the validation part of a data set.

    Args:
        folder: Folder with annotations in one of the usual places, such as `annotations/instances_train2017.json`
            beside `train2017/`, `train.json` beside `images/`, or `train/_annotations.coco.json`.

    Returns:
        Two `Split`s: training, validation.

    Raises:
        NotCoco: Something is missing or is not in COCO's format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotCoco(f'{folder} is not a folder')
    train, val = (read(find_annotations(folder, split), split, folder) for split in ('train', 'val'))
    if categories(train) != categories(val):
        raise NotCoco(f'{train.json} and {val.json} must list the same categories in the same order, but one has\n'
                      f'  {short(categories(train))}\nand the other\n  {short(categories(val))}')
    return train, val


def categories(split):
    return [(category['id'], category['name']) for category in split.coco['categories']]


def find_annotations(folder, split):
    """The JSON file with the annotations of one split."""
    patterns = [layout.format(word) for word in WORDS[split] for layout in LAYOUTS]
    for pattern in patterns:
        matches = sorted(folder.glob(pattern))
        if matches:
            return matches[-1]  # of instances_train2014 and instances_train2017, the later
    usual = ', '.join(layout.format(WORDS[split][0]) for layout in LAYOUTS[:4])
    others = f' ({" or ".join(WORDS[split][1:])} will do for {split})' if WORDS[split][1:] else ''
    names = sorted(path.name + '/' * path.is_dir() for path in folder.iterdir())
    inside = sorted(path.relative_to(folder).as_posix() for path in folder.glob('**/*.json'))
    raise NotCoco(f'no {split} annotations in {folder}\n'
                  f'  looked for: {usual} and the like{others}\n'
                  f'  found:      {short(names) or "an empty folder"}\n'
                  f'  JSON files: {short(inside) or "none"}')


def read(path, split, folder):
    """Reads and checks one file of annotations, and finds its pictures somewhere below `folder`."""
    try:
        coco = json.loads(path.read_text(encoding='utf-8'))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NotCoco(f'{path} is not readable as JSON: {error}') from None

    if not isinstance(coco, dict) or not {'images', 'annotations', 'categories'} <= coco.keys():
        what = f'an object with {short(sorted(coco))}' if isinstance(coco, dict) else f'a {type(coco).__name__}'
        raise NotCoco(f'{path} is not in COCO\'s format: it holds {what}, and should hold an object with '
                      'images, annotations, categories')
    for key in ('images', 'annotations', 'categories'):
        if not isinstance(coco[key], list) or not coco[key]:
            raise NotCoco(f'{path}: the list of {key} is empty, or not a list')

    check_entries(path, 'image', coco['images'], ('id', 'file_name', 'width', 'height'))
    check_entries(path, 'category', coco['categories'], ('id', 'name'))
    check_annotations(path, coco)
    return Split(path, find_images(path, coco['images'], split, folder), coco)


def check_entries(path, kind, entries, keys):
    """Every entry is an object that holds all the keys, and no two share an id."""
    for number, entry in enumerate(entries):
        missing = [key for key in keys if key not in entry] if isinstance(entry, dict) else list(keys)
        if missing:
            raise NotCoco(f'{path}: {kind} number {number} has no {", ".join(missing)}: {short(entry)}')
    if len({entry['id'] for entry in entries}) < len(entries):
        raise NotCoco(f'{path}: several {kind} entries share one id')


def check_annotations(path, coco):
    """Every annotation has a box and a mask, and belongs to a known picture and category."""
    annotations = coco['annotations']
    if 'segments_info' in annotations[0]:
        raise NotCoco(f'{path} holds panoptic annotations (segments_info); instance annotations are needed')
    check_entries(path, 'annotation', annotations, ('id', 'image_id', 'category_id', 'bbox', 'area'))

    for key, known in dict(image_id=coco['images'], category_id=coco['categories']).items():
        known = {entry['id'] for entry in known}
        strays = [annotation for annotation in annotations if annotation[key] not in known]
        if strays:
            raise NotCoco(f'{path}: {len(strays)} of {len(annotations)} annotations have an unknown {key}, such as '
                          f'{short(strays[0][key])} in annotation {strays[0]["id"]}')

    bare = [annotation['id'] for annotation in annotations if not annotation.get('segmentation')]
    if bare:
        which = 'none of them has a mask' if len(bare) == len(annotations) else f'{len(bare)} lack one'
        raise NotCoco(f'{path}: Mask R-CNN learns from masks, and of {len(annotations)} annotations {which} '
                      f'(no segmentation, or an empty one, as in annotation {bare[0]})')


def find_images(path, images, split, folder):
    """The folder that the file names of `images` start from: the one that has most of them.

    Of several (names such as 0001.jpg recur in every split), the one that is called like the split.
    """
    names = [image['file_name'] for image in images]
    sample = names[::max(1, len(names) // 20)]
    places = [path.parent, path.parent / 'images', folder]
    places += sorted(place for depth in ('*', '*/*', '*/*/*') for place in folder.glob(depth) if place.is_dir())

    def fitness(place):
        called = place.relative_to(folder).as_posix()
        rank = min([rank for rank, word in enumerate(WORDS[split]) if word in called], default=len(WORDS[split]))
        return sum((place / name).is_file() for name in sample), -rank

    best = max(places, key=fitness)
    missing = [name for name in names if not (best / name).is_file()]
    if len(missing) == len(names):
        raise NotCoco(f'none of the {len(names)} pictures that {path} names, such as {names[0]}, is in {folder} '
                      'or the folders in it')
    if missing:
        raise NotCoco(f'{len(missing)} of the {len(names)} pictures that {path} names are not in {best}: '
                      f'{short(missing)}')
    return best


def short(thing, limit=300):
    """Text for an error message, cut where it gets long."""
    text = ', '.join(map(str, thing)) if isinstance(thing, (list, tuple)) else str(thing)
    return text if len(text) <= limit else text[:limit] + ' ...'
