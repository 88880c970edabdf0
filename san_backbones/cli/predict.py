"""Applies a detector or segmentor to pictures and videos, and writes what it finds."""
import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .. import _files
from ..mm.predict import Found, Predictor, VideoWriter, frames
from . import pictures

__all__ = ['VIDEOS', 'predict']

VIDEOS = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.webm')
NAME = 'predictions.json'


class Report(NamedTuple):
    """How many pictures (frames of videos count) were looked at and objects found, and which files failed, and why."""
    pictures: int
    objects: int
    failed: dict[str, str]


def predict(predictor: Predictor, sources: Sequence[pathlib.Path], out: pathlib.Path,
            tell: Callable[[str], None]) -> Report:
    """Writes `predictions.json`, pictures with what was found in `pictures/`, videos in `videos/`.

    What was found before an interruption is written, too.

    Of a detector the JSON is in COCO's format, with a `score` for each annotation, and categories from 1 in the order
    of the classes. Of a segmentor it lists the classes and the PNG files in `masks/`, whose values are numbers of
    classes from 0.

    Args:
        predictor: The network.
        sources: Pictures, videos, and folders with both.
        out: A folder; files of the same names are replaced.
        tell: Called with a line for each file that cannot be read or looked at.

    Raises:
        ValueError: There are no pictures or videos.
    """
    files = list(_list(sources))
    if not files:
        raise ValueError(f'there are no pictures or videos in {", ".join(map(str, sources))}: looked for files whose '
                         f'names end in {", ".join((*pictures.SUFFIXES, *VIDEOS))}')
    collected = _Collected(predictor, out)
    failed: dict[str, str] = {}
    try:
        for path, name, stem in files:
            try:
                if path.suffix.lower() in VIDEOS:
                    collected.add_video(path, name, stem)
                else:
                    picture = np.asarray(pictures.read(path))
                    _save(collected.add(picture, name.as_posix(), stem), out / 'pictures' / stem, path.suffix)
            except Exception as error:  # decoders, and OpenMMLab's drawing, raise many kinds of errors
                failed[str(path)] = pictures.reason(error)
                tell(f'{path}: {failed[str(path)]}')
    finally:
        collected.write()
    return Report(len(collected.images), len(collected.annotations), failed)


def _list(sources: Sequence[pathlib.Path]) -> Iterator[tuple[pathlib.Path, pathlib.Path, pathlib.Path]]:
    """Yields files, their names, and names of results without a suffix: those in a given folder keep their subfolders.

    No two have the same: `a.jpg` and `a.png` have results `a` and `a-2`, two files `a.png` are also called that.
    """
    names: set[pathlib.Path] = set()
    stems: set[pathlib.Path] = set()
    for source in sources:
        for path in pictures.find([source], (*pictures.SUFFIXES, *VIDEOS)):
            name = path.relative_to(source) if source.is_dir() else pathlib.Path(path.name)
            stem, number = name.with_name(path.stem), 2
            while stem in stems:
                stem, number = name.with_name(f'{path.stem}-{number}'), number + 1
            if name in names:
                name = stem.with_name(stem.name + path.suffix)
            names.add(name)
            stems.add(stem)
            yield path, name, stem


def _save(found: Found, stem: pathlib.Path, suffix: str) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    lossy = suffix.lower() in ('.jpg', '.jpeg', '.webp')
    Image.fromarray(found.drawn).save(stem.with_name(stem.name + (suffix if lossy else '.png')))


class _Collected:
    """What was found so far."""

    def __init__(self, predictor: Predictor, out: pathlib.Path):
        self.predictor, self.out = predictor, out
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, picture: np.ndarray, name: str, stem: pathlib.Path, **more: Any) -> Found:
        found = self.predictor(picture, name)
        image = dict(id=len(self.images) + 1, file_name=name, width=picture.shape[1], height=picture.shape[0], **more)
        self.images.append(image)
        if found.classes is not None:
            mask = pathlib.Path('masks', stem.with_name(f'{stem.name}.png'))
            image['mask'] = mask.as_posix()
            (self.out / mask).parent.mkdir(parents=True, exist_ok=True)
            kind = np.uint8 if len(self.predictor.classes) <= 256 else np.uint16
            Image.fromarray(found.classes.astype(kind)).save(self.out / mask)
        for thing in found.objects or ():
            self.annotations.append(dict(
                id=len(self.annotations) + 1, image_id=image['id'], category_id=thing.pop('label') + 1, iscrowd=0,
                area=_area(thing), **thing))
        return found

    def add_video(self, path: pathlib.Path, name: pathlib.Path, stem: pathlib.Path) -> None:
        target = self.out / 'videos' / stem.with_name(f'{stem.name}.mp4')
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(VideoWriter(target, path)) as video:
            for number, frame in enumerate(frames(path)):
                one = stem / f'{number:06d}'
                video.write(self.add(frame, f'{one.as_posix()}.png', one, video=name.as_posix(), frame=number).drawn)

    def write(self) -> None:
        classes = self.predictor.classes
        if self.predictor.is_detector:
            categories = [dict(id=number, name=name) for number, name in enumerate(classes, 1)]
            content: dict[str, Any] = dict(images=self.images, annotations=self.annotations, categories=categories)
        else:
            content = dict(images=self.images, classes=list(classes))
        self.out.mkdir(parents=True, exist_ok=True)
        with _files.atomic_write(self.out / NAME) as part:
            part.write_text(json.dumps(content))


def _area(thing: dict[str, Any]) -> float:
    if 'segmentation' not in thing:
        return round(thing['bbox'][2] * thing['bbox'][3], 2)
    from pycocotools import mask
    return float(mask.area(thing['segmentation']))
