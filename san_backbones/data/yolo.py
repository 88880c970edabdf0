"""Reads YOLO's text as it is found in the wild. Boxes are in pixels of the picture as it is seen."""
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from .labels import (
    UNLISTED,
    DataError,
    Found,
    Picture,
    Thing,
    files,
    list_pictures,
    note,
    short,
    size_of,
    split_of,
    text_of,
)

__all__ = ['CLASS_FILES', 'read_yolo']

CLASS_FILES = ('classes.txt', 'obj.names', '*.names', '_darknet.labels', 'labels.txt')


class _About(NamedTuple):
    """What a .yaml or .data file says of the data."""
    path: pathlib.Path
    names: dict[int, str]
    splits: dict[str, list[str]]  # folders of pictures, and lists of them
    root: str = ''
    keypoints: int = 0  # numbers of a label behind its box


def read_yolo(folder: pathlib.Path) -> Found | None:
    """Reads text labels of YOLO: lines `class x y width height`, or `class x y x y x y ...` for outlines; None if there
    are none.

    Numbers are parts of width and height; a sixth number, a confidence, is passed over, and so are key points where a
    .yaml file has `kpt_shape`. A label lies beside its picture, or in `labels` where the picture lies in `images`. A
    picture without one shows nothing. Names of classes come from `names` in a .yaml file, or from classes.txt,
    obj.names and the like; splits from `train`, `val` and `test` of a .yaml or .data file (folders, or lists of
    pictures), else from the folders' names.

    Raises:
        DataError: A line is something else, or a file names a split that is not there.
    """
    pictures = list_pictures(folder)
    labels = {path: label for path in pictures if (label := _label_of(path, folder)) is not None}
    if not labels or not any(_is_yolo(label) for label in labels.values()):
        return None
    about = _about(folder)
    notes: list[str] = []
    splits = _splits(pictures, folder, about, notes) if about else {}
    names, source = (about.names, str(about.path)) if about and about.names else _class_names(folder)
    listed = [path for path in pictures if splits.get(path) != UNLISTED]
    found, seen = [], set()
    for path in listed:
        split = splits.get(path, split_of(path.relative_to(folder)))
        width, height = size_of(path)
        things = _read_lines(labels[path], width, height, about.keypoints if about else 0) if path in labels else []
        seen |= {thing.label for thing in things}
        found.append(Picture(path, width, height, things, split))
    missing = sorted(seen - set(names))
    if missing and names:
        raise DataError(f'{source} names classes {short(sorted(names))}, and labels have {short(missing)} too')
    if missing:
        names = {number: f'class {number}' for number in range(max(missing) + 1)}
        notes.insert(0, f'no names of classes (looked for *.yaml with names, {", ".join(CLASS_FILES)}): they are '
                        'called class 0, class 1, ...')
    else:
        notes.insert(0, f'names of classes: {source}')
    if about and about.keypoints:
        notes.append(f'key points are left out ({about.path} has kpt_shape)')
    note(notes, 'pictures have no label file: they show nothing', [path for path in listed if path not in labels])
    return Found(f"YOLO's text ({len(labels)} files)", found, names, notes)


def _label_of(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path | None:
    parts = list(path.relative_to(folder).parts)
    candidates = [path.with_suffix('.txt')]
    for at in reversed([i for i, part in enumerate(parts) if part.lower() == 'images']):
        candidates.append(folder.joinpath(*parts[:at], 'labels', *parts[at + 1:]).with_suffix('.txt'))
    return next((each for each in candidates if each.is_file() and each.name not in CLASS_FILES), None)


# --- lines -----------------------------------------------------------------------------------------------------------

def _numbers(line: str) -> list[float]:
    """Returns a class and at least four numbers; nothing if a line is something else."""
    try:
        values = [float(part) for part in line.split()]
    except ValueError:
        return []
    return values if len(values) >= 5 and values[0] >= 0 and values[0] == int(values[0]) else []


def _is_yolo(path: pathlib.Path) -> bool:
    try:
        return bool(_numbers(text_of(path).partition('\n')[0]))
    except DataError:
        return False


def _read_lines(path: pathlib.Path, width: int, height: int, keypoints: int) -> list[Thing]:
    expected = '`class x y width height`'
    expected += f' and {keypoints} numbers of key points' if keypoints else ' or `class x y x y x y ...`'
    things = []
    for number, line in enumerate(text_of(path).splitlines(), 1):
        if not line.strip():
            continue
        values = _numbers(line)
        count = len(values)
        if not (count == 5 + keypoints or count == 5 if keypoints else count in (5, 6) or count >= 7 and count % 2):
            raise DataError(f'{path}, line {number}: expected {expected}, got {short(line, 60)!r}'
                            + ('' if keypoints or count < 8 else ': key points need kpt_shape in the .yaml file'))
        if max(values[1:5]) > 2:
            raise DataError(f'{path}, line {number}: expected parts of width and height, from 0 to 1, got '
                            f'{short(line, 60)!r}: are these pixels?')
        things.append(_thing(values[:5] if keypoints else values, width, height))
    return things


def _thing(values: list[float], width: int, height: int) -> Thing:
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


# --- what files say of the data --------------------------------------------------------------------------------------

def _about(folder: pathlib.Path) -> _About | None:
    """Returns what the first .yaml file with names of classes says, or the first .data file of Darknet."""
    for path in files(folder, '.yaml') + files(folder, '.yml'):
        try:
            content = yaml.safe_load(text_of(path))
        except yaml.YAMLError as error:
            raise DataError(f'{path} is broken YAML: {error}') from error
        names = content.get('names') if isinstance(content, Mapping) else None
        if isinstance(names, (list, Mapping)) and names:
            numbered = dict(names if isinstance(names, Mapping) else enumerate(names))
            shape = content.get('kpt_shape')
            return _About(path, {int(number): str(name) for number, name in numbered.items()}, _entries(content),
                          str(content.get('path') or ''), shape[0] * shape[1] if _is_shape(shape) else 0)
    for path in files(folder, '.data'):
        lines = path.read_text(encoding='utf-8-sig', errors='replace').splitlines()
        pairs = [line.partition('=')[::2] for line in lines if '=' in line]
        splits = _entries({key.strip(): value.strip() for key, value in pairs})
        if splits:  # others have files of that suffix, too
            return _About(path, {}, splits)
    return None


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) == 2 and all(isinstance(size, int) for size in shape)


def _entries(content: Mapping[Any, Any]) -> dict[str, list[str]]:
    """Returns what a file names for each split."""
    splits: dict[str, list[str]] = {}
    for key, split in (('train', 'train'), ('val', 'val'), ('valid', 'val'), ('test', 'test')):
        entries = content.get(key)
        named = [entries] if isinstance(entries, str) else entries if isinstance(entries, list) else []
        splits.setdefault(split, []).extend(str(entry) for entry in named if str(entry).strip())
    return {split: named for split, named in splits.items() if named}


def _splits(pictures: list[pathlib.Path], folder: pathlib.Path, about: _About,
            notes: list[str]) -> dict[pathlib.Path, str]:
    """Returns the splits of the pictures that `about` names, or leaves out; a picture of two is the first one's."""
    found: dict[pathlib.Path, str] = {}
    again: list[pathlib.Path] = []
    nowhere: list[tuple[str, str]] = []
    for split, entries in about.splits.items():
        for entry in entries:
            named = _named(entry, pictures, folder, about)
            again += [path for path in named if found.setdefault(path, split) != split]
            if not named:
                nowhere.append((split, entry))
    note(notes, f'pictures are named for two splits by {about.path.name}, and are in the first', again)
    rest = {path: split_of(path.relative_to(folder)) for path in pictures if path not in found}
    unknown = [path for path, split in rest.items() if not split]
    needed = [f'{split}: {entry}' for split, entry in nowhere if split != 'test']
    if needed and unknown:
        raise DataError(f'{about.path} has `{needed[0]}`, which names no picture in {folder}, and {len(unknown)} '
                        f'pictures, such as {unknown[0]}, are in no split: correct the line, or remove it to have '
                        'pictures drawn')
    note(notes, f'entries of {about.path.name} name no picture', [f'{split}: {entry}' for split, entry in nowhere])
    if {'train', 'val'} <= {*found.values()}:
        left_out = [path for path, split in rest.items() if split != 'test']
        note(notes, f'pictures that {about.path.name} does not name were left out', left_out)
        found.update(dict.fromkeys(left_out, UNLISTED))
    return found


def _named(entry: str, pictures: list[pathlib.Path], folder: pathlib.Path, about: _About) -> list[pathlib.Path]:
    """Returns the pictures of an entry: those in a folder, or those that a list names."""
    starts = (about.path.parent, folder)
    path = _find(f'{about.root}/{entry}', starts, folder)
    if path is None:
        return []
    if path.is_dir():
        return [picture for picture in pictures if path in picture.parents]
    known = {*pictures}
    found = [_find(line.strip(), (path.parent, folder), folder) for line in text_of(path).splitlines() if line.strip()]
    return [picture for picture in found if picture in known]


def _find(name: str, starts: Sequence[pathlib.Path], folder: pathlib.Path) -> pathlib.Path | None:
    """Returns what a name means in a folder that was moved: the longest end of the name that is there."""
    path = pathlib.PureWindowsPath(name)
    parts = [part for part in path.parts[bool(path.anchor):] if part not in ('.', '..')]
    ends = (start.joinpath(*parts[skip:]) for skip in range(max(len(parts), 1)) for start in starts)
    return next((end for end in ends if end.exists() and folder in (end, *end.parents)), None)


def _class_names(folder: pathlib.Path) -> tuple[dict[int, str], str]:
    """Returns the names of classes by number, and the file that has them."""
    for pattern in CLASS_FILES:
        for path in sorted(folder.rglob(pattern)):
            lines = [line.strip() for line in text_of(path).rstrip().splitlines()]  # numbers are those of lines
            return {number: line or f'class {number}' for number, line in enumerate(lines)}, str(path)
    return {}, ''
