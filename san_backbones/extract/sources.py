"""Where pictures lie: files, folders, globs, zips, tars, WebDataset and Parquet shards, datasets, videos, addresses.

A source is an order of pictures that never changes, read lazily. It comes in shards: an archive is one, and so are the
loose pictures between two archives. Whoever needs some of the pictures need not read the others, wherever the shard
says how many it has; in a tar and in a video, only reading tells.
"""
import contextlib
import glob
import hashlib
import importlib
import itertools
import json
import lzma
import os
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from .. import _pictures
from .._pictures import SUFFIXES, File, is_picture

__all__ = ['Box', 'Broken', 'Cut', 'Picture', 'Shard', 'Source', 'Survey', 'Unit', 'content', 'need', 'open_sources']

VIDEOS = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm')
TARS = ('.tar', '.tar.gz', '.tgz', '.tar.bz2', '.tar.xz')
IMAGE_COLUMNS = ('image', 'img', 'bytes', 'image_bytes', 'jpg', 'jpeg', 'png', 'webp', 'path', 'file', 'file_name',
                 'filename', 'image_path', 'url')
NAME_COLUMNS = ('file', 'path', 'file_name', 'filename', 'image_path', 'url', 'key', '__key__', 'id')
EXPECTED = ('expected a picture, folder, glob, zip, tar, .parquet, video, datasets:NAME or an address that fsspec '
            'opens (s3://, hf://, ...)')


def need(module: str, package: str, what: str) -> Any:
    """A module that is imported only where it is used.

    Raises:
        ImportError: It is not installed; the message has the command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if (error.name or '').partition('.')[0] != module.partition('.')[0]:
            raise
        raise ImportError(f"{what} needs {module}, which is not installed: pip install '{package}'") from error


class Cut(OSError):
    """A shard is damaged, or was cut short: trying again would not help."""


@contextlib.contextmanager
def _damage(what: str) -> Iterator[None]:
    """What readers raise at damaged files, as `Cut`; what the system raises stays."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise Cut(f'{what} ({error}): fetch it again') from error


class Broken(NamedTuple):
    """In the place of a picture that cannot be had: why."""
    reason: str


class Box(NamedTuple):
    """In pixels of the picture as it is shown, from its upper left corner."""
    id: int
    x1: float
    y1: float
    x2: float
    y2: float


class Picture(NamedTuple):
    """Its name, and where it is: in a file, at an address, or here, as bytes or as pixels (H, W, 3)."""
    name: str
    place: Any  # File, str, bytes, numpy.ndarray or Broken
    boxes: tuple[Box, ...] | None = None
    size: tuple[int, int] | None = None  # (width, height) that the boxes are for


def _is_address(path: str) -> bool:
    return '://' in path or path.startswith('pipe:')


def _token(path: str) -> str:
    """What changes when a file does."""
    if not _is_address(path):
        state = os.stat(path)
        return f'{state.st_size} {state.st_mtime_ns}'
    if path.startswith('pipe:'):
        return ''
    filesystem, inside = _filesystem(path)
    return _token_of(filesystem.info(inside))


def _token_of(info: dict[str, Any]) -> str:
    keys = ('ETag', 'etag', 'mtime', 'LastModified', 'last_modified', 'blob_id', 'created')
    version = next((info[key] for key in keys if info.get(key)), '')
    return f'{info.get("size")} {version}'


def _filesystem(address: str) -> tuple[Any, str]:
    import fsspec
    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:  # fsspec's own says what to install
        raise ImportError(f'{address}: {error}. For example: pip install s3fs') from error


def _open(path: str) -> BinaryIO:
    if path.startswith('pipe:'):
        return need('webdataset.gopen', 'webdataset', 'pipe:').gopen(path)
    if _is_address(path):
        filesystem, inside = _filesystem(path)
        return filesystem.open(inside, 'rb')
    return open(path, 'rb')


def content(place: Any) -> bytes:
    """The bytes of a picture. Other machines are asked up to three times.

    Raises:
        OSError: They cannot be read.
    """
    if isinstance(place, bytes):
        return place
    if isinstance(place, File):
        data = _pictures.read(place)
        if place.kind == 'tar' and len(data) < place.size:
            raise OSError(f'the tar ends {place.size - len(data)} bytes before the picture does')
        return data
    for wait in (1, 4, 0):
        try:
            with _open(place) as file:
                return file.read()
        except (OSError, TimeoutError) as error:
            if not wait or isinstance(error, (FileNotFoundError, PermissionError)):
                raise
            time.sleep(wait)
    raise AssertionError


class Shard:
    """Pictures in an order.

    Args:
        name: Path or address.
        token: What changes when the content does.
    """

    def __init__(self, name: str, token: str | None = None):
        self.name: str = name
        self.token: str = _token(name) if token is None else token

    def count(self) -> int | None:
        """How many pictures there are; None where only reading tells."""
        return None

    def pictures(self, start: int = 0, stop: int | None = None) -> Iterator[Picture]:
        """Those from `start` on and before `stop`.

        Raises:
            Exception: The rest cannot be read.
        """
        raise NotImplementedError


class _Zip(Shard):

    def _files(self) -> list[File]:
        if not hasattr(self, '_found'):
            with _damage('no zip file, or one that was cut short'), _open(self.name) as file, \
                    zipfile.ZipFile(file) as archive:
                self._found = list(_pictures.members_of_zip(self.name, archive))
        return self._found

    def count(self) -> int | None:
        try:
            return len(self._files())
        except Cut:  # told when it is read
            return None

    def pictures(self, start: int = 0, stop: int | None = None) -> Iterator[Picture]:
        files = self._files()[start:stop]
        if not _is_address(self.name):  # whoever decodes them reads them
            yield from (Picture(file.name, file) for file in files)
            return
        with _open(self.name) as opened, zipfile.ZipFile(opened) as archive:
            for file in files:
                try:
                    place: Any = archive.read(archive.infolist()[file.at])
                except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:  # RuntimeError: it needs a password
                    place = Broken(_pictures.reason(error))
                yield Picture(file.name, place)


class _Tar(Shard):

    def pictures(self, start: int = 0, stop: int | None = None) -> Iterator[Picture]:
        return itertools.islice(self._all(), start, stop)

    def _all(self) -> Iterator[Picture]:
        with _damage('no tar, or one that was cut short; it ends behind the pictures before this row'):
            if not _is_address(self.name) and self.name.endswith('.tar'):  # whoever decodes them reads them
                yield from (Picture(file.name, file) for file in _pictures.members(self.name))
                return
            with _open(self.name) as opened, tarfile.open(fileobj=opened, mode='r|*') as tar:
                for member in tar:
                    if member.isfile() and is_picture(member.name):
                        data = tar.extractfile(member)
                        assert data is not None
                        yield Picture(f'{self.name}//{member.name}', data.read())
                    tar.members = []  # type: ignore[attr-defined]
                _pictures.check_end(tar)


class _Parquet(Shard):

    def __init__(self, name: str, column: str | None):
        super().__init__(name)
        self._column = column

    def _file(self) -> Any:
        parquet = need('pyarrow.parquet', 'san-backbones[features]', f'{self.name}: to read Parquet')
        with _damage('no Parquet file, or one that was cut short'):
            return parquet.ParquetFile(_open(self.name) if _is_address(self.name) else self.name)

    def _columns(self, schema: Any) -> tuple[str, str | None]:
        """The column of pictures, and that of their names."""
        import pyarrow
        image: Any = self._column or next((name for name in IMAGE_COLUMNS if name in schema.names), None)
        if image not in schema.names:
            raise ValueError(f'{self.name} has no column {image or "of pictures"}: it has {", ".join(schema.names)}; '
                             '--column NAME says which has the bytes or paths of pictures')
        kind = schema.field(image).type
        if not (pyarrow.types.is_struct(kind) or pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
                or _is_text(kind)):
            raise ValueError(f'{self.name}: the column {image!r} holds {kind}, expected bytes, paths, or a struct of '
                             '`bytes` and `path`; --column NAME says which has them')
        return image, next((name for name in NAME_COLUMNS if name in schema.names and name != image and
                            _is_text(schema.field(name).type)), None)

    def count(self) -> int | None:
        try:
            with self._file() as file:
                self._columns(file.schema_arrow)
                return file.metadata.num_rows
        except Cut:
            return None

    def pictures(self, start: int = 0, stop: int | None = None) -> Iterator[Picture]:
        with _damage('the Parquet file is damaged'), self._file() as file:
            image, name = self._columns(file.schema_arrow)
            row = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if row + size <= start or stop is not None and row >= stop:
                    row += size
                    continue
                for batch in file.iter_batches(16, row_groups=[group], columns=[image, *([name] if name else [])]):
                    if row + len(batch) > start and (stop is None or row < stop):
                        for at, entry in enumerate(batch.to_pylist(), row):
                            if start <= at and (stop is None or at < stop):
                                yield self._picture(entry[image], entry.get(name) if name else None, at)
                    row += len(batch)

    def _picture(self, value: Any, name: str | None, row: int) -> Picture:
        path = None
        if isinstance(value, dict):
            value, path = value.get('bytes'), value.get('path')
        if isinstance(value, str):
            value, path = None, value
        known = name or path
        title = f'{self.name}//{row}' + (f'//{known}' if known else '')
        if value is None and path is None:
            return Picture(title, Broken('the row has neither bytes nor a path'))
        return Picture(title, value if value is not None else _beside(self.name, path or ''))


def _is_text(kind: Any) -> bool:
    """Whether a column of this pyarrow type holds strings, as pandas, polars and others write them."""
    import pyarrow
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return kind in (pyarrow.string(), pyarrow.large_string(), getattr(pyarrow, 'string_view', pyarrow.string)())


def _beside(path: str, name: str) -> Any:
    """A path that a list at `path` names."""
    if _is_address(name):
        return name
    if _is_address(path):
        return f'{path.rpartition("/")[0]}/{name}'
    return File(os.path.join(os.path.dirname(path), name), -1)


class _Dataset(Shard):
    """A Dataset or IterableDataset of Hugging Face."""

    def __init__(self, dataset: Any, name: str, column: str | None):
        datasets = need('datasets', 'datasets', 'a Hugging Face dataset')
        features = dataset.features or {}
        image = column or next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None) \
            or next((key for key in IMAGE_COLUMNS if key in features), None)
        if image not in features:
            raise ValueError(f'{name} has no column {image or "of pictures"}: it has {", ".join(features)}; --column '
                             'NAME says which')
        super().__init__(name, str(getattr(dataset, '_fingerprint', '')))
        if isinstance(features[image], datasets.Image):
            dataset = dataset.cast_column(image, datasets.Image(decode=False))
        self._dataset, self._image = dataset.select_columns([image]), image

    def count(self) -> int | None:
        return len(self._dataset) if hasattr(self._dataset, '__len__') else None

    def pictures(self, start: int = 0, stop: int | None = None) -> Iterator[Picture]:
        if hasattr(self._dataset, '__len__'):
            length = len(self._dataset)
            rows: Iterable[Any] = self._dataset.select(range(start, length if stop is None else min(stop, length)))
        else:
            rows = itertools.islice(self._dataset, start, stop)
        for number, row in enumerate(rows, start):
            value, path = row[self._image], None
            if isinstance(value, dict):
                value, path = value['bytes'], value['path']
            place: Any = value
            if not isinstance(value, bytes):
                known = value or path
                place = Broken('the row has neither bytes nor a path')
                if known:
                    place = known if _is_address(known) else File(known, -1)
            yield Picture(f'{self.name}//{number}' + (f'//{os.path.basename(path)}' if path else ''), place)


class _Video(Shard):

    def __init__(self, name: str, every: int):
        super().__init__(name)
        self._cv2 = need('cv2', 'opencv-python-headless', f'{name}: to read a video')
        self._every = every

    def pictures(self, start: int = 0, stop: int | None = None) -> Iterator[Picture]:
        video = self._cv2.VideoCapture(self.name)
        try:
            if not video.isOpened():
                raise Cut('no video that OpenCV can read')
            for number in itertools.count():
                if not video.grab():
                    break
                taken, skipped = divmod(number, self._every)
                if skipped or taken < start:
                    continue
                if stop is not None and taken >= stop:
                    return
                found, frame = video.retrieve()
                place = frame[..., ::-1].copy() if found else Broken('the frame cannot be decoded')
                yield Picture(f'{self.name}//{number}', place)
            else:
                return
            if number == 0:
                raise Cut('the video has no frame')
        finally:
            video.release()


# boxes

def _boxes(path: str, base: str) -> Iterator[Picture]:
    """The pictures that a list of boxes names, in its order."""
    if path.endswith('.json'):
        try:
            with _open(path) as file:
                listed = json.load(file)
        except ValueError as error:
            raise ValueError(f'{path} is no JSON file: {error}') from error
        try:
            of_picture: dict[Any, list[Box]] = {image['id']: [] for image in listed['images']}
            for entry in listed['annotations']:
                x, y, width, height = entry['bbox']
                if not isinstance(entry['id'], int):
                    raise ValueError(f'the id {entry["id"]!r} of an annotation is no integer')
                if not all(isinstance(at, (int, float)) for at in (x, y, width, height)):
                    raise ValueError(f'the bbox {entry["bbox"]} of annotation {entry["id"]} is not of numbers')
                of_picture[entry['image_id']].append(Box(entry['id'], x, y, x + width, y + height))
            found: list[Any] = [
                (image['file_name'], tuple(of_picture[image['id']]), (image.get('width'), image.get('height')))
                for image in listed['images'] if of_picture[image['id']]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{path} is not in COCO\'s format ({type(error).__name__}: {error}): expected "images" '
                             'with id and file_name, and "annotations" with id, image_id and bbox [x, y, width, '
                             'height]') from error
    else:
        found = [(name, boxes, None) for name, boxes in _listed_boxes(path)]
    for name, boxes, size in found:
        path = f'{base.rstrip("/")}/{name}' if _is_address(base) else os.path.join(base, name)
        yield Picture(path, path if _is_address(base) else File(path, -1), boxes,
                      size if size and all(size) else None)


def _listed_boxes(path: str) -> Iterator[tuple[str, tuple[Box, ...]]]:
    need('pyarrow', 'san-backbones[features]', f'{path}: to read a list of boxes')
    import pyarrow.csv
    import pyarrow.parquet
    try:
        table = pyarrow.parquet.read_table(path) if path.endswith('.parquet') else pyarrow.csv.read_csv(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f'{path} is no {"Parquet" if path.endswith(".parquet") else "CSV"} file: {error}') from error
    name = next((name for name in NAME_COLUMNS if name in table.column_names), None)
    missing = [column for column in ('x1', 'y1', 'x2', 'y2') if column not in table.column_names]
    if name is None or missing:
        raise ValueError(f'{path} has the columns {", ".join(table.column_names)}: expected x1, y1, x2 and y2, in '
                         'pixels, and file, the path of the picture')
    for column in ('x1', 'y1', 'x2', 'y2'):
        kind = table[column].type
        if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_null(kind)):
            raise ValueError(f'{path} has words in its column {column} (it holds {kind}): expected pixels as numbers')
    columns = [table[column].to_pylist() for column in (name, 'x1', 'y1', 'x2', 'y2')]
    rows = ((row[0], Box(number, *row[1:])) for number, row in enumerate(zip(*columns)))
    for file, group in itertools.groupby(rows, key=lambda row: row[0]):
        if not isinstance(file, str):
            raise ValueError(f'{path} has {file!r} in its column {name!r}: expected the path of a picture in each row')
        yield file, tuple(box for _, box in group)


# all together

class Survey(NamedTuple):
    """What a source has, without having read the pictures."""
    fingerprint: str  # of the names, sizes and times of all files
    pictures: int  # as far as it is known
    uncounted: int  # shards that do not say how many they have
    units: int


class Unit(NamedTuple):
    """Work that can be done apart from all other: partition `chunk` of a shard, or all of them (None)."""
    shard: int
    chunk: int | None
    name: str  # of the shard
    pictures: Callable[[], Iterator[Picture]]


class Source:
    """Pictures of all kinds of places.

    Args:
        given: Paths, globs, addresses, datasets.
        boxes: A list of boxes: COCO's JSON, or CSV or Parquet with file, x1, y1, x2, y2. `given` is then the folder
            that its paths are in.
        column: That of the pictures, in Parquet and datasets.
        every: Every n-th frame of a video.

    Raises:
        FileNotFoundError: One is not there.
        ValueError: One is nothing that has pictures, or nothing is given.
        TypeError: One is neither text, a path nor a dataset.
    """

    def __init__(self, given: Sequence[Any], boxes: str | os.PathLike[str] | None = None, column: str | None = None,
                 every: int = 1):
        self.given: list[Any] = [os.fspath(one) if isinstance(one, os.PathLike) else one for one in given]
        self.boxes, self.column, self.every = boxes and os.fspath(boxes), column, every
        if not self.given:
            raise ValueError(f'nothing is given to read pictures from: {EXPECTED}')
        for one in self.given:
            if not isinstance(one, str) and not hasattr(one, 'select_columns'):
                raise TypeError(f'pictures cannot be read from a {type(one).__name__}: {EXPECTED}, a Hugging Face '
                                'dataset, or a list of these')
        if boxes and (len(self.given) != 1 or not isinstance(self.given[0], str)):
            raise ValueError(f'boxes go with one folder, which their paths are in; got {len(self.given)} sources')

    @property
    def folders(self) -> list[str]:
        """Those given that are local."""
        return [one for one in self.given if isinstance(one, str) and os.path.isdir(one)]

    def entries(self) -> Iterator[Picture | Shard]:
        """Loose pictures and shards, in order."""
        if self.boxes:
            yield from _boxes(self.boxes, self.given[0])
            return
        for one in self.given:
            if not isinstance(one, str):
                yield _Dataset(one, 'datasets', self.column)
            elif one.startswith('datasets:'):
                yield self._named_dataset(one)
            else:
                for path in _expanded(one):
                    yield from self._at(path)

    def _named_dataset(self, given: str) -> Shard:
        datasets = need('datasets', 'datasets', given)
        name, _, split = given.removeprefix('datasets:').partition(':')
        if os.path.exists(os.path.join(name, 'state.json')):
            alone = datasets.load_from_disk(name)
            if split and split != str(alone.split):
                raise ValueError(f'{name} holds one split, {alone.split or "without a name"}, and {split!r} was asked '
                                 f'for: leave ":{split}" out')
            return _Dataset(alone, given, self.column)
        return _Dataset(datasets.load_dataset(name, split=split or 'train'), given, self.column)

    def _at(self, path: str, listed: bool = False) -> Iterator[Picture | Shard]:
        """What is at a path; of a folder, the pictures and archives in it and below."""
        name = (path.partition('?')[0] if _is_address(path) else path).lower()
        if not _is_address(path) and os.path.isdir(path):
            for inside in _pictures.walk(path):
                yield from self._at(inside, True)
        elif is_picture(name.replace(os.sep, '/')):
            if _is_address(path):
                yield Picture(path, path)
            else:
                yield Picture(path, File(path, -1))
        elif name.endswith('.zip'):
            yield _Zip(path)
        elif name.endswith(TARS):
            yield _Tar(path)
        elif path.startswith('pipe:'):
            need('webdataset', 'webdataset', 'pipe:')
            yield _Tar(path)
        elif name.endswith('.parquet'):
            yield _Parquet(path, self.column)
        elif name.endswith(VIDEOS) and not _is_address(path):
            yield _Video(path, self.every)
        elif _is_address(path) and not listed:
            filesystem, inside = _filesystem(path)
            if not filesystem.isdir(inside):
                raise FileNotFoundError(f'{path} is not there: {EXPECTED}')
            for folder, folders, names in filesystem.walk(inside):
                folders.sort()
                for file in sorted(names):
                    if is_picture(file) or file.endswith(_pictures.ARCHIVES) and not file.startswith('.'):
                        yield from self._at(filesystem.unstrip_protocol(f'{folder}/{file}'), True)
        else:
            raise ValueError(f'{path} has no pictures that can be read: {EXPECTED}')

    def _tokens(self) -> Iterator[tuple[Picture | Shard, str]]:
        for entry in self.entries():
            if isinstance(entry, Shard):
                yield entry, entry.token
            else:
                try:
                    token = _token(entry.place.path if isinstance(entry.place, File) else entry.place)
                except OSError:
                    token = 'gone'  # an error when it is read
                yield entry, f'{token} {entry.boxes}' if entry.boxes else token

    def survey(self, rows: int) -> Survey:
        """Goes through the names of all files once.

        Raises:
            ValueError: There are no pictures.
            OSError: A folder cannot be listed.
        """
        digest, pictures, uncounted, units = hashlib.sha256(), 0, 0, 0
        run = 0  # of loose pictures
        for entry, token in self._tokens():
            digest.update(f'{entry.name}\0{token}\n'.encode(errors='surrogateescape'))
            if isinstance(entry, Picture):
                units += run % rows == 0
                run += 1
                pictures += 1
                continue
            run = 0
            count = entry.count()
            pictures += count or 0
            uncounted += count is None
            units += 1 if count is None else max(1, -(-count // rows))
        if not pictures and not uncounted:
            if self.boxes:
                raise ValueError(f'{self.boxes} lists no boxes')
            said = ', '.join(str(one) if isinstance(one, str) else 'the dataset' for one in self.given)
            raise ValueError(f'there are no pictures in {said}: looked for files whose names end in '
                             f'{", ".join((*SUFFIXES, *_pictures.ARCHIVES))}; Parquet files, videos and compressed '
                             'tars are taken where they are named, say as FOLDER/*.parquet')
        return Survey(digest.hexdigest(), pictures, uncounted, units)

    def units(self, rows: int) -> Iterator[Unit]:
        """The work, in order: partitions of at most `rows` pictures, that do not reach over the end of a shard."""
        shard = 0
        for loose, group in itertools.groupby(self.entries(), key=lambda entry: isinstance(entry, Picture)):
            if loose:
                pictures: Iterator[Any] = iter(group)
                chunk = 0
                while part := list(itertools.islice(pictures, rows)):
                    yield Unit(shard, chunk, part[0].name, lambda part=part: iter(part))  # type: ignore[misc]
                    chunk += 1
                shard += 1
                continue
            for archive in group:
                assert isinstance(archive, Shard)
                count = archive.count()
                if count is None:
                    yield Unit(shard, None, archive.name, archive.pictures)
                else:
                    for chunk in range(max(1, -(-count // rows))):
                        start = chunk * rows
                        yield Unit(shard, chunk, archive.name, lambda archive=archive, start=start:  # type: ignore[misc]
                                   archive.pictures(start, start + rows))
                shard += 1


def _expanded(path: str) -> list[str]:
    """Braces, and globs, sorted."""
    if path.startswith('pipe:'):
        return [path]
    if '{' in path and not os.path.exists(path):
        expanded = list(need('braceexpand', 'webdataset', f'{path}: braces').braceexpand(path))
        if expanded != [path]:  # {1} stands for itself
            return [one for each in expanded for one in _expanded(each)]
    if _is_address(path):
        if not glob.has_magic(path.partition('?')[0]):
            return [path]
        filesystem, inside = _filesystem(path)
        found = [filesystem.unstrip_protocol(one) for one in sorted(filesystem.glob(inside))]
    elif os.path.exists(path):
        return [path]
    else:
        found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []
    if not found:
        raise FileNotFoundError(f'{path} is not there: {EXPECTED}')
    return found


def open_sources(given: Any, **options: Any) -> Source:
    """A `Source` of one thing or of several."""
    several = isinstance(given, (list, tuple))
    return Source(given if several else [given], **options)
