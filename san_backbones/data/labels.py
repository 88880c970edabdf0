"""What readers of labels share: pictures, their objects and splits, and the text of files."""
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from PIL import Image

from .._pictures import is_picture, size_upright, walk

__all__ = ['UNLISTED', 'DataError', 'Found', 'Picture', 'Thing', 'check_size', 'files', 'list_pictures', 'note',
           'shared', 'short', 'size_of', 'split_in', 'split_of', 'text_of']

WORDS = {'train': 'train', 'training': 'train', 'trainval': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val',
         'minival': 'val', 'test': 'test', 'testing': 'test'}
UNLISTED = 'unlisted'
"""The split of a picture that the data's own lists leave out."""


class DataError(ValueError):
    """The data cannot be used. The message names the file, what was found and what was expected."""


class Thing(NamedTuple):
    """A labelled object."""
    label: Any  # a class: a name for VOC, else a number
    box: tuple[float, float, float, float]
    segmentation: Any = None  # polygons [[x, y, ...], ...] or an RLE, as in COCO's format
    crowd: bool = False  # not to be learned, nor counted when it is not found
    area: float | None = None


class Picture(NamedTuple):
    """A picture and what is labelled in it; split is 'train', 'val', 'test', '' or `UNLISTED`."""
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
    return _sizes(path)[0]


def _sizes(path: pathlib.Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns width and height as the picture is seen, and as it is stored."""
    try:
        with Image.open(path) as picture:
            return size_upright(picture), picture.size
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f'{path} cannot be read as a picture: {error}') from error


def check_size(path: pathlib.Path, noted: tuple[Any, Any], boxes: Iterable[tuple[float, ...]]) -> tuple[int, int, bool]:
    """Returns width and height of a picture as it is seen, and whether its labels note others.

    Args:
        path: Of the picture.
        noted: Width and height that its labels say it has; no number above 0 is none.
        boxes: Left, top, right and bottom, in pixels.

    Raises:
        DataError: There are boxes, and that size is the picture's before it is turned, or scaled; or one of them leaves
            the picture.
    """
    (width, height), stored = _sizes(path)
    known = all(isinstance(side, (int, float)) and side > 0 for side in noted)
    if not known or noted == (width, height):
        return width, height, False
    boxes = list(boxes)
    outside = next((box for box in boxes if box[2] > width + 1 or box[3] > height + 1), None)
    turned = noted == stored
    scaled = abs(noted[0] * height - noted[1] * width) <= max(*noted, width, height) and abs(noted[0] - width) > 2
    if outside is None and not (boxes and (turned or scaled)):
        return width, height, True
    what = f'its labels are of {noted[0]:g} x {noted[1]:g} pixels, and the picture that is seen has {width} x {height}'
    if turned:
        raise DataError(f'{path}: {what}: it was labelled as it is stored, before its EXIF orientation. Remove the '
                        'orientation (such as by `exiftool -Orientation= FILE`), or label it as it is seen')
    sides = ', '.join(f'{side:.4g}' for side in outside or ())
    leaves = f', so that the box {sides} leaves it' if outside else ''
    raise DataError(f'{path}: {what}{leaves}: take the pictures that were labelled, or scale the labels')


def split_in(name: str) -> str:
    """Returns the split whose word is in a name, such as 'val' for 'coco_val2017'; '' if there is none, or several."""
    words = re.findall('[A-Z]?[a-z]+|[A-Z]+', name)
    found = {WORDS[word.lower()] for word in words if word.lower() in WORDS}
    return found.pop() if len(found) == 1 else ''


def split_of(path: pathlib.PurePath) -> str:
    """Returns the split that a folder in the path is named after, the nearest one; '' if none is."""
    return next((split for part in reversed(path.parts[:-1]) if (split := split_in(part))), '')


def list_pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the pictures in a folder and in those in it."""
    return [pathlib.Path(path) for path in walk(folder) if is_picture(path)]


def files(folder: pathlib.Path, suffix: str) -> list[pathlib.Path]:
    """Returns the files of a suffix in a folder and in those in it, without hidden ones."""
    return sorted(path for path in folder.rglob(f'*{suffix}') if path.is_file() and not path.name.startswith('.'))


def text_of(path: pathlib.Path) -> str:
    """Returns the text of a file in UTF-8, or in UTF-16 with a byte order mark, without the mark.

    Raises:
        DataError: It is in another encoding.
    """
    content = path.read_bytes()
    try:
        return content.decode('utf-16' if content[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig')
    except UnicodeDecodeError as error:
        raise DataError(f'{path} is not text in UTF-8: {error}: save it in UTF-8') from error


def shared(one: pathlib.Path, other: pathlib.Path) -> int:
    """Counts the parts that two paths have in common at their beginnings."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one.parts, other.parts)))


def note(notes: list[str], what: str, cases: Iterable[Any]) -> None:
    """Adds how many cases there are, and the first of them, if there are any."""
    cases = list(cases)
    if cases:
        notes.append(f'{len(cases)} {what}, such as {cases[0]}')


def short(thing: Any, limit: int = 300) -> str:
    """Formats text for an error message, truncated if long."""
    text = ', '.join(map(str, thing)) if isinstance(thing, (list, tuple)) else str(thing)
    return text if len(text) <= limit else text[:limit] + ' ...'
