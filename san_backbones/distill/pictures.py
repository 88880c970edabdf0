"""Unlabelled pictures: found, decoded once, and cropped to views for training.

A sample's number determines its picture, crop and mirroring. So a stopped training continues from one saved number, and
processes share the work by dividing the numbers.
"""
import contextlib
import hashlib
import io
import json
import os
import pathlib
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from .._files import atomic_write
from .._pictures import SUFFIXES, File, is_picture, members, read, upright, walk

__all__ = ['Files', 'Store', 'Views']

def _list_files(path: pathlib.Path) -> Iterator[File]:
    if path.is_dir():
        for inside in walk(path):
            yield from _list_files(pathlib.Path(inside))
    elif is_picture(path.name):
        yield File(str(path), path.stat().st_size)
    elif zipfile.is_zipfile(path) or tarfile.is_tarfile(path):
        try:
            yield from members(path)
        except (tarfile.TarError, zipfile.BadZipFile) as error:
            raise ValueError(f'{path} is damaged ({error}): fetch it again') from error
    else:
        raise ValueError(f'{path} is neither a folder, nor a zip or tar file (of a WebDataset), nor a picture')


class Files:
    """The pictures of folders (and of zips and tars in them), zips and tars (the shards of a WebDataset), sorted.

    Args:
        sources: Their paths; 'PATH//PART' takes only pictures whose path inside begins with PART.

    Raises:
        FileNotFoundError: A source does not exist.
        ValueError: A source is of another kind, damaged, or holds no picture.
    """

    def __init__(self, sources: Sequence[str | os.PathLike[str]]):
        self._files: list[File] = []
        for source in sources:
            name, _, part = str(source).partition('//')
            path = pathlib.Path(name)
            if not path.exists():
                raise FileNotFoundError(f'{path} is not there: expected a folder, zip or tar file with pictures')
            found = [file for file in _list_files(path) if not part or _within(file, path).startswith(part)]
            if not found:
                where = f' whose path begins with {part!r}' if part else ''
                raise ValueError(f'{path} holds no picture{where}: expected files that end in {", ".join(SUFFIXES)}')
            self._files += found

    def __len__(self) -> int:
        return len(self._files)

    def digest(self) -> str:
        """Returns a digest of names and sizes, to compare with the pictures of an earlier run."""
        result = hashlib.sha256()
        for file in self._files:
            line = f'{os.path.basename(file.path)}\0{file.member}\0{file.size}\n'
            result.update(line.encode(errors='surrogateescape'))  # a name may be no text
        return result.hexdigest()[:16]

    def changes(self) -> str:
        """Returns a digest of when the files were last written."""
        paths = dict.fromkeys(file.path for file in self._files)
        return hashlib.sha256(repr([os.stat(path).st_mtime_ns for path in paths]).encode()).hexdigest()[:16]

    def read(self, index: int) -> Image.Image:
        """Reads a picture as RGB, with its EXIF orientation applied.

        Raises:
            Exception: Pillow cannot read it; it raises many kinds of errors.
        """
        with Image.open(io.BytesIO(read(self._files[index]))) as picture:
            return upright(picture)

    def name(self, index: int) -> str:
        """Returns PATH, or ARCHIVE//MEMBER."""
        return self._files[index].name


def _within(file: File, source: pathlib.Path) -> str:
    return file.member or pathlib.Path(file.path).relative_to(source).as_posix()


def shrink(picture: Image.Image, side: int) -> Image.Image:
    """Scales the shorter side to at most `side` pixels, after cropping the longer to at most twice the shorter."""
    width, height = picture.size
    longest = 2 * min(width, height)
    if max(width, height) > longest:
        left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
        picture = picture.crop((left, top, width - left, height - top))
        width, height = picture.size
    if min(width, height) <= side:
        return picture
    scale = side / min(width, height)
    return picture.resize((max(side, round(width * scale)), max(side, round(height * scale))),
                          Image.Resampling.BICUBIC, reducing_gap=3.)


def _decoded_bytes(files: Files, side: int, sample: int = 64) -> float:
    """Estimates what all pictures take in a store, from some of them."""
    sizes = []
    for index in range(0, len(files), -(-len(files) // sample)):
        with contextlib.suppress(Exception):  # it is told when all are decoded
            width, height = shrink(files.read(index), side).size
            sizes.append(width * height * 3)
    return len(files) * sum(sizes) / len(sizes) if sizes else 0.


class Store:
    """Decoded pictures in a memory-mapped file.

    Args:
        path: `pictures.bin`, with `pictures.npz` beside it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        path = pathlib.Path(path)
        with np.load(path.with_suffix('.npz')) as index:
            self.offsets: np.ndarray = index['offsets']
            self.heights: np.ndarray = index['heights']
            self.widths: np.ndarray = index['widths']
            self.about: dict[str, Any] = json.loads(str(index['about']))
        self._bytes = np.memmap(path, np.uint8, 'r')

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Image.Image:
        start, height, width = (int(x[index]) for x in (self.offsets, self.heights, self.widths))
        return Image.frombuffer('RGB', (width, height), self._bytes[start:start + height * width * 3], 'raw', 'RGB',
                                0, 1)

    @classmethod
    def of(cls, files: Files, side: int, path: str | os.PathLike[str], tell: Callable[[str], None]) -> 'Store':
        """Opens the store at `path`; makes it unless it exists for these pictures.

        Args:
            files: The pictures.
            side: Longest shorter side, in pixels.
            path: The file to write.
            tell: Called with lines about progress and skipped pictures.

        Raises:
            ValueError: No picture can be read.
            OSError: The disk does not have enough space.
        """
        path = pathlib.Path(path)
        wanted = dict(files=files.digest(), changes=files.changes(), side=side)
        if path.exists() and path.with_suffix('.npz').exists():
            store = cls(path)
            if {name: store.about.get(name) for name in wanted} == wanted:
                return store
        path.parent.mkdir(parents=True, exist_ok=True)
        needed, free = _decoded_bytes(files, side), shutil.disk_usage(path.parent).free
        if needed > free:
            raise OSError(f'{len(files)} decoded pictures of {side} pixels need about {needed / 1e9:.1f} GB, and '
                          f'{path.parent} has {free / 1e9:.1f} GB free: take fewer, smaller sizes, or another folder')
        path.with_suffix('.npz').unlink(missing_ok=True)  # must never exist beside the new pictures.bin
        shapes: list[tuple[int, ...]] = []
        offsets: list[int] = []
        broken: list[str] = []
        end = 0

        def decode(index: int) -> np.ndarray | Exception:
            try:
                return np.asarray(shrink(files.read(index), side))
            except Exception as error:  # Pillow raises many kinds of errors
                return error

        # threads are enough: Pillow releases the GIL while it decodes
        with atomic_write(path) as part, open(part, 'wb') as file, \
                ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            for first in range(0, len(files), 1000):
                for index, pixels in enumerate(pool.map(decode, range(first, min(first + 1000, len(files)))), first):
                    if isinstance(pixels, Exception):
                        broken.append(files.name(index))
                        if len(broken) <= 10:
                            tell(f'left out: {files.name(index)}: {pixels or type(pixels).__name__}')
                        continue
                    file.write(pixels.tobytes())
                    shapes.append(pixels.shape[:2])
                    offsets.append(end)
                    end += pixels.size
                tell(f'decoded {min(first + 1000, len(files))} of {len(files)} pictures'
                     + f', {len(broken)} broken' * bool(broken))
            if not shapes:
                raise ValueError(f'none of the {len(files)} pictures can be read; the first: {broken[0]}')
        about = json.dumps(dict(wanted, broken=broken[:100], left_out=len(broken)))
        heights, widths = np.array(shapes, np.int32).T
        with atomic_write(path.with_suffix('.npz')) as part:
            np.savez(part, offsets=np.array(offsets, np.int64), heights=heights, widths=widths, about=about)
        return cls(path)


class Views:
    """Random views of pictures: a crop, mirrored or not, at several sizes.

    Args:
        store: Pictures, by index.
        seed: Random seed.
        scale: Smallest and largest area of a crop, as a part of the picture's.
        ratio: Smallest and largest aspect ratio (width / height) of a crop.
    """

    def __init__(self, store: Sequence[Image.Image] | Store, seed: int = 0, scale: tuple[float, float] = (.4, 1.),
                 ratio: tuple[float, float] = (3 / 4, 4 / 3)):
        self.store: Sequence[Image.Image] | Store = store
        self.seed: int = seed
        self.scale: tuple[float, float] = scale
        self.ratio: tuple[float, float] = ratio
        self._order = -1, np.arange(0)  # epoch, and its permutation

    def _picture(self, number: int) -> int:
        epoch, position = divmod(number, len(self.store))
        known, order = self._order
        if epoch != known:  # each epoch has every picture once, in a new order
            order = np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.store))
            self._order = epoch, order  # in one assignment: threads share it
        return int(order[position])

    def sample(self, number: int, sizes: Sequence[int]) -> list[np.ndarray]:
        """Returns the same view at each of the sizes, as (size, size, 3) uint8."""
        picture = self.store[self._picture(number)]
        draw = np.random.default_rng((self.seed, 2, number))
        width, height = picture.size
        for _ in range(10):
            area = width * height * draw.uniform(*self.scale)
            ratio = np.exp(draw.uniform(*np.log(self.ratio)))
            w, h = (area * ratio) ** .5, (area / ratio) ** .5
            if w <= width and h <= height:
                break
        else:
            w = h = min(width, height)
        left, top = draw.uniform(0, width - w), draw.uniform(0, height - h)
        mirrored = draw.random() < .5
        box = (left, top, min(left + w, width), min(top + h, height))
        views = [np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box)) for size in sizes]
        return [view[:, ::-1] if mirrored else view for view in views]

    def batch(self, numbers: Sequence[int], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Returns views (N, 3, size, size), uint8 in channels_last, one tensor for each size."""
        views = [self.sample(number, sizes) for number in numbers]
        return [torch.from_numpy(np.stack(each)).permute(0, 3, 1, 2) for each in zip(*views)]
