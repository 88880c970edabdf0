"""Reads VOC's XML as it is found in the wild. Boxes are in pixels of the picture as it is seen."""
import pathlib
import re
import xml.etree.ElementTree as ElementTree

from .._pictures import is_picture
from .labels import (
    UNLISTED,
    DataError,
    Found,
    Picture,
    Thing,
    check_size,
    files,
    list_pictures,
    note,
    shared,
    split_of,
    text_of,
)

__all__ = ['read_voc']

_Sets = dict[pathlib.Path, dict[str, str]]  # by the folder in which ImageSets lies, the split of each name


def read_voc(folder: pathlib.Path) -> Found | None:
    """Reads `<annotation>` files of PASCAL VOC, LabelImg and others; None if there are none.

    Coordinates start at 1, as the devkit's do. Objects marked as difficult become crowds. Splits are those of
    ImageSets/Main of the same data set (VOC2007 and VOC2012 have one each), else of the folders' names.

    Raises:
        DataError: An XML file is broken, no picture belongs to any or is in a list, or pictures are of another size.
    """
    roots = {path: root for path in files(folder, '.xml') if (root := _annotation(path)) is not None}
    if not roots:
        return None
    by_stem: dict[str, list[pathlib.Path]] = {}
    for path in list_pictures(folder):
        by_stem.setdefault(path.stem, []).append(path)
    sets = _image_sets(folder)
    pictures, alone, other_size = [], [], []
    for path, root in roots.items():
        stems = (path.stem, pathlib.PureWindowsPath(root.findtext('filename') or '').stem)
        fitting = next((by_stem[stem] for stem in stems if stem in by_stem), [])
        if not fitting:
            alone.append(path)
            continue
        picture = max(fitting, key=lambda one: shared(one, path))  # of two splits may have the same name
        things = [_thing(path, each) for each in root.iter('object')]
        noted = _side(root, 'width'), _side(root, 'height')
        width, height, differs = check_size(picture, noted, (thing.box for thing in things))
        other_size += [picture] * differs
        pictures.append(Picture(picture, width, height, things, _split(path, folder, sets)))
    if not pictures:
        raise DataError(f'none of the {len(alone)} XML files in {folder}, such as {alone[0]}, has a picture of its '
                        'name there')
    listed = [picture for picture in pictures if picture.split != UNLISTED]
    if not listed:
        names = [name for each in sets.values() for name in each]
        raise DataError(f'none of the {len(pictures)} pictures with XML, such as {pictures[0].path}, is in the lists '
                        f'of ImageSets/Main in {folder}, whose names are such as {names[0]}')
    notes: list[str] = []
    note(notes, 'XML files without a picture were left out', alone)
    note(notes, 'pictures that ImageSets/Main does not list were left out',
         [picture.path for picture in pictures if picture.split == UNLISTED])
    note(notes, 'pictures have another size than their XML says, and boxes fit it', other_size)
    names = sorted({thing.label for picture in listed for thing in picture.things})
    return Found(f"VOC's XML ({len(roots)} files)", listed, {name: name for name in names}, notes)


def _annotation(path: pathlib.Path) -> ElementTree.Element | None:
    """Returns the root of an XML file with objects of pictures; None for XML of another kind."""
    content = path.read_bytes()
    declared = re.match(rb'\s*<\?xml[^>]*?encoding=["\']([\w.-]+)', content)
    try:
        text = content.decode(declared[1].decode()) if declared else text_of(path)
    except (UnicodeDecodeError, LookupError, DataError) as error:
        if b'<annotation' not in content:
            return None
        raise DataError(f'{path} is not in the encoding that its first line names, or UTF-8: {error}') from error
    if '<annotation' not in text or '<!ENTITY' in text:  # entities can blow up a parser
        return None
    try:
        root = ElementTree.fromstring(re.sub(r'^\s*<\?xml[^>]*\?>', '', text))  # it is decoded already
    except ElementTree.ParseError as error:
        raise DataError(f'{path} is broken XML: {error}') from error
    return root if root.tag == 'annotation' else None


def _side(root: ElementTree.Element, name: str) -> float | None:
    try:
        return float(root.findtext(f'size/{name}') or '')
    except ValueError:
        return None


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


def _image_sets(folder: pathlib.Path) -> _Sets:
    sets: _Sets = {}
    for main in sorted({path.parent for path in folder.rglob('ImageSets/Main/*.txt')}):
        lists = {path.stem: path for path in main.glob('*.txt')}
        found: dict[str, str] = {}
        for name, split in (('trainval', 'train'), ('train', 'train'), ('test', 'test'), ('val', 'val')):  # last wins
            if name in lists and (name != 'trainval' or 'train' not in lists):
                lines = [line.split()[0] for line in text_of(lists[name]).splitlines() if line.strip()]
                found.update((pathlib.PurePath(line).stem if is_picture(line) else line, split) for line in lines)
        if found:
            sets[main.parent.parent] = found
    return sets


def _split(path: pathlib.Path, folder: pathlib.Path, sets: _Sets) -> str:
    """Returns the split of an XML file: by the lists beside it, or, if there are none, by all."""
    if not sets:
        return split_of(path.relative_to(folder))
    nearest = next((sets[parent] for parent in path.parents if parent in sets), None)
    for names in sets.values() if nearest is None else [nearest]:
        if path.stem in names:
            return names[path.stem]
    return UNLISTED
