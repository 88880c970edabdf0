"""Unlabelled pictures: where they lie, decoded once, and the views of them that training takes.

Everything is a function of a sample's number: which picture it shows, how it is cut and whether it is mirrored. So
training goes on where it stopped by remembering one number, and several processes share the work by dividing numbers.
"""
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
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from .._files import written_whole

__all__ = ['SUFFIXES', 'Files', 'Store', 'Views']

SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')


class _File(NamedTuple):
    """A picture of `size` bytes: a file of its own, a member of a zip, or bytes of a tar from `offset` on."""
    path: str
    size: int
    member: str = ''
    offset: int = -1


def _is_picture(name: str) -> bool:
    base = name.rpartition('/')[2]
    return base.lower().endswith(SUFFIXES) and not base.startswith('.')


def _in(path: pathlib.Path) -> Iterator[_File]:
    if path.is_dir():
        for folder, folders, names in os.walk(path):
            folders.sort()
            for name in sorted(names):
                inside = pathlib.Path(folder, name)
                if _is_picture(name):
                    yield _File(str(inside), inside.stat().st_size)
                elif name.endswith(('.zip', '.tar')) and not name.startswith('.'):
                    yield from _in(inside)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                if _is_picture(info.filename):
                    yield _File(str(path), info.file_size, info.filename)
    elif tarfile.is_tarfile(path):
        try:
            with tarfile.open(path, 'r:') as tar:
                members = [member for member in tar if member.isfile() and _is_picture(member.name)]
        except tarfile.ReadError:
            raise ValueError(f'{path} is a compressed tar, whose pictures cannot be read one by one: unpack it, or '
                             'make a plain .tar of it') from None
        yield from (_File(str(path), member.size, member.name, member.offset_data) for member in members)
    elif _is_picture(path.name):
        yield _File(str(path), path.stat().st_size)
    else:
        raise ValueError(f'{path} is neither a folder, nor a zip or tar file (of a WebDataset), nor a picture')


class Files:
    """The pictures of folders (and of zips and tars in them), zips and tars (the shards of a WebDataset), sorted.

    Args:
        sources: Their paths; 'PATH//PART' takes only pictures whose path within it begins with PART.

    Raises:
        FileNotFoundError: One is not there.
        ValueError: One is none of these, or holds no picture.
    """

    def __init__(self, sources: Sequence[str | os.PathLike[str]]):
        self._files: list[_File] = []
        self._zips: dict[str, zipfile.ZipFile] = {}
        for source in sources:
            name, _, part = str(source).partition('//')
            path = pathlib.Path(name)
            if not path.exists():
                raise FileNotFoundError(f'{path} is not there: expected a folder, zip or tar file with pictures')
            found = [file for file in _in(path) if not part or _within(file, path).startswith(part)]
            if not found:
                where = f' whose path begins with {part!r}' if part else ''
                raise ValueError(f'{path} holds no picture{where}: expected files that end in {", ".join(SUFFIXES)}')
            self._files += found

    def __len__(self) -> int:
        return len(self._files)

    def digest(self) -> str:
        """Of the names and sizes, to tell whether these are the pictures of a run before."""
        result = hashlib.sha256()
        for file in self._files:
            result.update(f'{os.path.basename(file.path)}\0{file.member}\0{file.size}\n'.encode())
        return result.hexdigest()[:16]

    def read(self, index: int) -> Image.Image:
        """A picture the right way up, in colour.

        Raises:
            Exception: Pillow cannot read it, in one of several ways.
        """
        file = self._files[index]
        if file.offset >= 0:
            with open(file.path, 'rb') as archive:
                archive.seek(file.offset)
                data = archive.read(file.size)
        elif file.member:
            if file.path not in self._zips:  # whose table of contents may take longer to read than a picture
                self._zips[file.path] = zipfile.ZipFile(file.path)
            data = self._zips[file.path].read(file.member)
        else:
            data = pathlib.Path(file.path).read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode.startswith(('I', 'F')):
                raise ValueError(f'its pixels have more than 8 bits (mode {picture.mode})')
            return ImageOps.exif_transpose(picture).convert('RGB')

    def name(self, index: int) -> str:
        """Path, and the path within an archive."""
        file = self._files[index]
        return f'{file.path}//{file.member}' if file.member else file.path


def _within(file: _File, source: pathlib.Path) -> str:
    return file.member or pathlib.Path(file.path).relative_to(source).as_posix()


def shrink(picture: Image.Image, side: int) -> Image.Image:
    """The shorter side at most `side` pixels, the longer at most twice that: what is beyond is cut off."""
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


class Store:
    """Pictures decoded once, in a file of bytes that is mapped into memory.

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
        """The store at `path`, made unless it is there and of these pictures.

        Args:
            files: The pictures.
            side: Longest that a shorter side may be, in pixels.
            path: Where the bytes go.
            tell: Takes lines about progress and pictures left out.

        Raises:
            ValueError: No picture can be read.
            OSError: The disk has no room.
        """
        path = pathlib.Path(path)
        wanted = dict(files=files.digest(), side=side)
        if path.exists() and path.with_suffix('.npz').exists():
            store = cls(path)
            if {name: store.about.get(name) for name in wanted} == wanted:
                return store
        path.parent.mkdir(parents=True, exist_ok=True)
        needed, free = len(files) * side * side * 4, shutil.disk_usage(path.parent).free
        if needed > free:
            raise OSError(f'{len(files)} decoded pictures of {side} pixels need about {needed / 1e9:.1f} GB, and '
                          f'{path.parent} has {free / 1e9:.1f} GB free: take fewer, smaller sizes, or another place')
        path.with_suffix('.npz').unlink(missing_ok=True)  # which must not be found beside other bytes
        shapes: list[tuple[int, ...]] = []
        offsets: list[int] = []
        broken: list[str] = []
        end = 0

        def decode(index: int) -> np.ndarray | Exception:
            try:
                return np.asarray(shrink(files.read(index), side))
            except Exception as error:  # Pillow raises of every kind
                return error

        # threads: Pillow lets go of the lock while it decodes
        with written_whole(path) as part, open(part, 'wb') as file, \
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
        with written_whole(path.with_suffix('.npz')) as part:
            np.savez(part, offsets=np.array(offsets, np.int64), heights=heights, widths=widths, about=about)
        return cls(path)


class Views:
    """Random views of pictures: a crop, mirrored or not, at two sizes.

    Args:
        store: Pictures, by index.
        seed: Of everything random.
        scale: Least and largest area of a crop, as parts of the picture's.
        ratio: Least and largest width by height of a crop.
    """

    def __init__(self, store: Sequence[Image.Image] | Store, seed: int = 0, scale: tuple[float, float] = (.4, 1.),
                 ratio: tuple[float, float] = (3 / 4, 4 / 3)):
        self.store: Sequence[Image.Image] | Store = store
        self.seed: int = seed
        self.scale: tuple[float, float] = scale
        self.ratio: tuple[float, float] = ratio
        self._order = -1, np.arange(0)  # of an epoch

    def _picture(self, number: int) -> int:
        epoch, place = divmod(number, len(self.store))
        known, order = self._order
        if epoch != known:  # every picture once, then again in another order
            order = np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.store))
            self._order = epoch, order  # at once: threads share it
        return int(order[place])

    def sample(self, number: int, sizes: Sequence[int]) -> list[np.ndarray]:
        """One view at each of these sizes, as (size, size, 3) uint8."""
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
        """Views (N, 3, size, size), uint8 in channels_last, one tensor for each size."""
        views = [self.sample(number, sizes) for number in numbers]
        return [torch.from_numpy(np.stack(each)).permute(0, 3, 1, 2) for each in zip(*views)]
