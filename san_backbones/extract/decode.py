"""From bytes to pixels as a network takes them, in worker processes."""
import contextlib
import hashlib
import io
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from queue import Full, Queue
from typing import Any, NamedTuple, TypeVar

import numpy as np
import timm.data
import torch.utils.data
from PIL import Image, UnidentifiedImageError

from .. import _pictures
from .sources import Box, Broken, Picture, content

__all__ = ['Decoded', 'Preparation', 'Prepared', 'Task', 'ahead', 'loader']

T = TypeVar('T')
FARTHEST = 1e9  # pixels, of boxes: operators in float32 must be able to compute with them


class Task(NamedTuple):
    """Consecutive pictures of a partition."""
    key: tuple[int, int]  # shard and chunk
    pictures: tuple[Picture, ...]
    ends: bool  # the partition
    ends_shard: bool


class Prepared(NamedTuple):
    """A picture, or why there is none."""
    name: str
    sha1: str
    width: int
    height: int
    pixels: np.ndarray | None  # (H, W, C), uint8
    boxes: tuple[Box, ...] | None = None
    scale: tuple[float, float] = (1., 1.)  # of the boxes, to pixels of `pixels`
    errors: tuple[str, ...] = ()


class Decoded(NamedTuple):
    """A task, done."""
    key: tuple[int, int]
    pictures: list[Prepared]
    ends: bool
    ends_shard: bool


class Preparation:
    """What is done to a picture before the network: timm's evaluation transform up to its last step, the normalisation.

    Args:
        cfg: The model's `pretrained_cfg`.
        size: (height, width) instead of the cfg's. With boxes, the lower one is that of the shorter side.
        whole: Keep the picture's own size.
        boxes: Pictures have boxes: nothing is cropped.
        draft: Decode JPEG at a reduced scale, at least twice as large as wanted.
        least: The shortest side that the network takes.
    """

    def __init__(self, cfg: Mapping[str, Any], size: tuple[int, int] | None = None, whole: bool = False,
                 boxes: bool = False, draft: bool = True, least: int = 1):
        self.config: dict[str, Any] = _pictures.config(cfg, size)
        self.channels: int = self.config['input_size'][0]
        self.least: int = least
        self._transform: Any = None if whole or boxes else timm.data.create_transform(
            **self.config, is_training=False, use_prefetcher=True)
        self._side: int | None = min(self.config['input_size'][1:]) if boxes and not whole else None
        height, width = self.config['input_size'][1:]
        shrunk = max(height, width) / (1 if boxes else self.config['crop_pct'])
        self._draft: int | None = int(2 * shrunk) if draft and not whole else None

    def describe(self) -> dict[str, Any]:
        """What decides the pixels, as plain data."""
        about: dict[str, Any] = dict(mean=list(self.config['mean']), std=list(self.config['std']))
        if self._transform is None and self._side is None:
            return dict(about, size='whole')
        about.update(interpolation=self.config['interpolation'], draft=self._draft is not None)
        if self._side is not None:
            return dict(about, size=f'shorter side {self._side}')
        return dict(about, size=list(self.config['input_size'][1:]), crop_pct=self.config['crop_pct'],
                    crop_mode=self.config['crop_mode'])

    def __call__(self, picture: Picture) -> Prepared:
        """A picture that cannot be read is one with an error."""
        try:
            return self._prepared(picture)
        except Exception as error:  # decoders raise all sorts of things at broken files
            return _failed(picture, _reason(error))

    def _prepared(self, picture: Picture) -> Prepared:
        if isinstance(picture.place, Broken):
            return _failed(picture, picture.place.reason)
        if isinstance(picture.place, np.ndarray):
            image = Image.fromarray(picture.place)
            return self._ready(picture, hashlib.sha1(picture.place.tobytes()).hexdigest(), image.size,
                               _pictures.upright(image, self.channels))
        data = content(picture.place)
        if not data:
            raise ValueError('the file is empty')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of Pillow, of metadata that nothing here depends on
            with Image.open(io.BytesIO(data)) as image:
                size, width, height = _pictures.size_upright(image), *image.size
                if self._draft is not None and min(size) > self._draft:
                    scale = self._draft / min(size)
                    image.draft(None, (round(width * scale), round(height * scale)))
                pixels = _pictures.upright(image, self.channels)
        return self._ready(picture, hashlib.sha1(data).hexdigest(), size, pixels)

    def _ready(self, picture: Picture, sha1: str, size: tuple[int, int], image: Image.Image) -> Prepared:
        errors: tuple[str, ...] = ()
        boxes = picture.boxes
        if boxes is not None:
            if picture.size is not None and picture.size != size:
                raise ValueError(f'the boxes are for {picture.size[0]} x {picture.size[1]} pixels, and the picture has '
                                 f'{size[0]} x {size[1]}')
            kept, errors = _sound(boxes, size)
            boxes = kept
        if self._transform is not None:
            pixels = np.asarray(self._transform(image)).transpose(1, 2, 0)  # of a tensor, in today's timm
        else:
            if self._side is not None:
                scale = self._side / min(image.size)
                image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))),
                                     timm.data.transforms.str_to_pil_interp(self.config['interpolation']))
            pixels = np.array(image)  # of its own: torch takes arrays that it may write to
            pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        height, width = pixels.shape[:2]
        if min(width, height) < self.least:
            raise ValueError(f'{width} x {height} pixels are too few: the model takes {self.least} x {self.least} or '
                             'more; --size N enlarges pictures')
        return Prepared(picture.name, sha1, *size, np.ascontiguousarray(pixels), boxes,
                        (width / size[0], height / size[1]), errors)


def _failed(picture: Picture, reason: str) -> Prepared:
    return Prepared(picture.name, '', 0, 0, None, errors=(reason,))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return 'no picture in a format that Pillow knows'
    if isinstance(error, FileNotFoundError):
        return 'the file is gone: No such file or directory'
    return _pictures.reason(error)


def _sound(boxes: tuple[Box, ...], size: tuple[int, int]) -> tuple[tuple[Box, ...], tuple[str, ...]]:
    """The boxes that have an area within the picture, and what is wrong with the others."""
    kept, errors = [], []
    for box in boxes:
        wrong = _wrong(box, size)
        if wrong is None:
            kept.append(box)
        else:
            said = ', '.join('nothing' if at is None else f'{at:g}' for at in box[1:])
            errors.append(f'box {box.id} ({said}) {wrong}')
    return tuple(kept), tuple(errors)


def _wrong(box: Box, size: tuple[int, int]) -> str | None:
    x1, y1, x2, y2 = box[1:]
    if not all(at is not None and abs(at) <= FARTHEST for at in (x1, y1, x2, y2)):
        return f'is not in pixels: expected x1, y1, x2 and y2, numbers up to {FARTHEST:g}'
    if x2 > x1 and y2 > y1 and x1 < size[0] and y1 < size[1] and x2 > 0 and y2 > 0:
        return None
    return f'has no area within the {size[0]} x {size[1]} pixels of the picture: expected x1 < x2 and y1 < y2'


class _Pictures(torch.utils.data.Dataset):

    def __init__(self, prepare: Callable[[Picture], Prepared]):
        self._prepare = prepare

    def __getitem__(self, task: Any) -> Decoded:
        return Decoded(task.key, [self._prepare(picture) for picture in task.pictures], task.ends, task.ends_shard)


class _Tasks(torch.utils.data.Sampler):

    def __init__(self, tasks: Iterator[Task]):
        self._tasks = tasks

    def __iter__(self) -> Iterator[Any]:
        return ahead(self._tasks, 2)


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The items, of which a thread gets `count` ahead: shards elsewhere are read while the network computes."""
    queue: Queue[Any] = Queue(count)
    end, stopped = object(), threading.Event()

    def put(item: Any, error: BaseException | None = None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(Full):
                queue.put((item, error), timeout=0.1)
                return

    def get() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(end)
        except BaseException as error:
            put(end, error)

    thread = threading.Thread(target=get, name='pictures', daemon=True)
    thread.start()
    try:
        while True:
            item, error = queue.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stopped.set()
        thread.join(1)  # no longer: it may wait for another machine


def _same(decoded: T) -> T:
    return decoded


def loader(tasks: Iterator[Task], prepare: Callable[[Picture], Prepared], workers: int) -> Iterator[Decoded]:
    """The tasks, done in their order by processes, or here where there are to be none."""
    return iter(torch.utils.data.DataLoader(
        _Pictures(prepare), batch_size=None, sampler=_Tasks(tasks), num_workers=workers, collate_fn=_same,
        prefetch_factor=4 if workers else None))
