"""Finds and reads pictures in folders, zips and tars, and prepares them for models; commands and jobs share this."""
import functools
import os
import pathlib
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from PIL import ExifTags, Image
from timm.data import resolve_data_config

__all__ = [
    'ARCHIVES', 'SUFFIXES', 'File', 'check_end', 'config', 'is_picture', 'members', 'members_of_zip', 'read', 'reason',
    'size_upright', 'upright', 'walk']

SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
ARCHIVES = ('.tar', '.zip')
_TURNS = {  # what makes a picture of each EXIF orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}


class File(NamedTuple):
    """A picture of `size` bytes: a file, member number `at` of a zip, or bytes of a tar from offset `at`."""
    path: str
    size: int
    member: str = ''
    kind: str = ''  # '', 'zip', 'tar'
    at: int = 0

    @property
    def name(self) -> str:
        """PATH, or ARCHIVE//MEMBER."""
        return f'{self.path}//{self.member}' if self.member else self.path


def is_picture(name: str) -> bool:
    """Whether a path has a picture's suffix and is not hidden."""
    base = name.rpartition('/')[2]
    return base.lower().endswith(SUFFIXES) and not base.startswith('.')


def walk(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yields paths of the pictures and archives in a folder and its subfolders, sorted, a folder's own files first.

    Raises:
        OSError: A folder cannot be listed.
    """
    def refuse(error: OSError) -> None:
        raise error

    for inside, folders, names in os.walk(folder, onerror=refuse):
        folders.sort()
        for name in sorted(names):
            if is_picture(name) or name.lower().endswith(ARCHIVES) and not name.startswith('.'):
                yield os.path.join(inside, name)


def members(path: str | os.PathLike[str]) -> Iterator[File]:
    """Yields the pictures of a zip, sorted, or of an uncompressed tar, in its order.

    Raises:
        ValueError: The file is neither, or the tar is compressed.
        tarfile.ReadError: The tar is truncated; raised after its complete members.
    """
    path = os.fspath(path)
    if zipfile.is_zipfile(path) and not tarfile.is_tarfile(path):  # a tar whose last member is a zip passes for one
        with zipfile.ZipFile(path) as archive:
            yield from members_of_zip(path, archive)
        return
    try:
        tar = tarfile.open(path, 'r:')  # noqa: SIM115
    except tarfile.ReadError:
        compressed = tarfile.is_tarfile(path)
        raise ValueError(f'{path} is a compressed tar, and its pictures cannot be read one by one: unpack it, or make '
                         'it a plain .tar' if compressed else f'{path} is neither a zip nor a tar file') from None
    with tar:
        for member in tar:
            if member.isfile() and is_picture(member.name):
                yield File(path, member.size, member.name, 'tar', member.offset_data)
            tar.members = []  # type: ignore[attr-defined]  # else it keeps all of them in memory
        check_end(tar)


def check_end(tar: Any) -> None:
    """Raises tarfile.ReadError if a tar, read to its end, was cut within a member's head: tarfile says nothing then."""
    if 0 < tar.fileobj.tell() - tar.offset < tarfile.BLOCKSIZE:
        raise tarfile.ReadError('unexpected end of data')


def members_of_zip(path: str, archive: zipfile.ZipFile) -> Iterator[File]:
    """Yields the pictures of an open zip, sorted."""
    for at, info in sorted(enumerate(archive.infolist()), key=lambda entry: entry[1].filename):
        if is_picture(info.filename):
            yield File(path, info.file_size, info.filename, 'zip', at)


@functools.lru_cache(8)  # reading the table of contents may take longer than reading a picture
def _zip(path: str, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def read(file: File) -> bytes:
    """Returns the bytes of a picture.

    Raises:
        OSError, zipfile.BadZipFile: It cannot be read.
    """
    if file.kind == 'zip':
        archive = _zip(file.path, os.getpid())  # per process: after fork, parent and child share the file offset
        return archive.read(archive.infolist()[file.at])
    if file.kind == 'tar':
        with open(file.path, 'rb') as tar:
            tar.seek(file.at)
            return tar.read(file.size)
    return pathlib.Path(file.path).read_bytes()


def reason(error: Exception) -> str:
    """Says in a line why a picture failed: the message, with the kind of the error if that is an unusual one."""
    said = getattr(error, 'strerror', None) or str(error) or repr(error)
    return said if isinstance(error, (OSError, ValueError)) else f'{type(error).__name__}: {said}'


def _orientation(picture: Image.Image) -> int:
    """Returns the EXIF orientation that is still to be applied, 1 to 8; 1, upright, if the metadata are damaged."""
    if picture.format == 'TIFF':  # Pillow applies it
        return 1
    try:
        found = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # many kinds: the pixels can be read all the same
        return 1
    return found if isinstance(found, int) and found in _TURNS else 1


def size_upright(picture: Image.Image) -> tuple[int, int]:
    """Returns width and height with the EXIF orientation applied."""
    width, height = picture.size
    return (height, width) if _orientation(picture) >= 5 else (width, height)


def upright(picture: Image.Image, channels: int = 3) -> Image.Image:
    """Applies the EXIF orientation and converts to RGB, or to grey for one channel. Animations give the first frame.

    The result has no metadata. Where these are damaged, the picture stays as it lies.

    Raises:
        ValueError: The pixels are integers of more than 8 bits or floats of one channel, which Pillow would clip, or
            channels is not 1 or 3.
    """
    if channels not in (1, 3):
        raise ValueError(f'the model takes {channels} channels, and pictures have 1 or 3')
    if picture.mode.startswith(('I', 'F')):
        raise ValueError(f'its pixels have more than 8 bits (mode {picture.mode}); convert it to 8 bits first')
    picture.load()  # PNG may have its EXIF data behind the pixels
    turn = _TURNS.get(_orientation(picture))
    result = (picture if turn is None else picture.transpose(turn)).convert('RGB' if channels == 3 else 'L')
    result.info = {}
    return result


def config(cfg: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Resolves how timm evaluates a model: size, crop, interpolation, and mean and standard deviation per channel.

    Args:
        cfg: The model's `pretrained_cfg`.
        size: (height, width) instead of the cfg's.
    """
    channels = cfg['input_size'][0]
    found = resolve_data_config(dict(input_size=(channels, *size)) if size else {}, pretrained_cfg=dict(cfg))
    for name in ('mean', 'std'):
        if len(found[name]) != channels:  # RGB statistics, for a model of grey pictures
            found[name] = (sum(found[name]) / len(found[name]),) * channels
    return found
