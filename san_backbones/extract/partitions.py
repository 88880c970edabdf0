"""What a job leaves behind: partitions that appear whole or not at all, and what says how they were made.

    FOLDER/job.json                            what was asked for
    FOLDER/features/SHARD-PARTITION.parquet    a row for each picture (or box), in the order of the source
    FOLDER/maps/SHARD-PARTITION-N.safetensors  of `pool='none'`: the maps of these rows
    FOLDER/errors.parquet                      pictures that could not be read, once all is done

A partition's errors are in its metadata, so that they appear with it.
"""
import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch

from .decode import Prepared
from .extractor import Extractor, Found
from .sources import Box, need

__all__ = ['Folder', 'Partition', 'text']

PREFIX = 'san_backbones.'
ROWS = 1024  # of a row group
MAP_BYTES = 256_000_000  # of a file of maps, at most, unless one picture has more
KEPT = {'version': 'version of san-backbones', 'model': 'model', 'weights': "digest of the weights",
        'transform': 'transform', 'settings': 'settings', 'source': 'source'}


def text(name: str) -> str:
    """A name as UTF-8 has it: bytes of a file's name that are not, as \\\\xNN."""
    return name.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')


def _pyarrow() -> Any:
    need('pyarrow', 'san-backbones[features]', 'features in Parquet files')
    import pyarrow
    import pyarrow.parquet
    return pyarrow


class Folder:
    """A folder of features.

    Args:
        path: Where it is, or is to be.
        who: Which of several processes this is, as part of a file's name.
    """

    def __init__(self, path: str | os.PathLike[str], who: str = '0-of-1'):
        self.path: pathlib.Path = pathlib.Path(path)
        self.features: pathlib.Path = self.path / 'features'
        self.maps: pathlib.Path = self.path / 'maps'
        self.part: pathlib.Path = self.path / f'.writing-{who}'

    def claim(self, about: Mapping[str, Any]) -> None:
        """Notes what is to be made here, or compares it with what is.

        Raises:
            ValueError: Other things are here, or features of another model, source, ...
        """
        job = self.path / 'job.json'
        if not job.exists():
            others = [path.name for path in self.path.iterdir() if not path.name.startswith('.')] \
                if self.path.is_dir() else []
            if others and not job.exists():  # another process may have been quicker
                raise ValueError(f'{self.path} is not empty, and no folder of features (it has '
                                 f'{", ".join(others[:3])}): name another')
            with self.writing():
                (self.part / job.name).write_text(json.dumps(about, indent=2) + '\n', encoding='utf-8')
                os.replace(self.part / job.name, job)
            return
        try:
            there = json.loads(job.read_text(encoding='utf-8'))
        except ValueError as error:
            raise ValueError(f'{job} cannot be read ({error}): remove {self.path}, or name another folder') from error
        different = [f'{words}: {_short(there.get(key), wanted)} there, {_short(wanted, there.get(key))} asked for'
                     for (key, words), wanted in zip(KEPT.items(), map(about.get, KEPT)) if there.get(key) != wanted]
        if different:
            raise ValueError(f'{self.path} holds features that were made otherwise: {"; ".join(different)}. Name '
                             'another folder, or remove this one')

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While this process writes here.

        Raises:
            ValueError: Another does, as the same of several.
        """
        self.part.mkdir(parents=True, exist_ok=True)
        with open(self.part / 'lock', 'w') as lock:
            if not _locked(lock):
                raise ValueError(f'another process is writing into {self.path}: wait for it, or give each its share '
                                 '(--share 0/2 and 1/2)')
            for path in self.part.iterdir():  # of one that was killed
                if path.name != 'lock':
                    path.unlink()
            try:
                yield
            finally:
                shutil.rmtree(self.part, ignore_errors=True)

    def done(self) -> dict[int, set[int]]:
        """Lists the numbers of the partitions that are there, by shard."""
        found: dict[int, set[int]] = {}
        for path in self.features.glob('*-*.parquet'):
            shard, _, chunk = path.stem.partition('-')
            if shard.isdecimal() and chunk.isdecimal():
                found.setdefault(int(shard), set()).add(int(chunk))
        return found

    def partition(self, key: tuple[int, int]) -> pathlib.Path:
        """Where a partition is, or is to be."""
        return self.features / f'{key[0]:06d}-{key[1]:06d}.parquet'

    def notes(self, key: tuple[int, int]) -> dict[str, Any]:
        """A partition's own: pictures, rows, errors, whether its shard ends with it.

        Raises:
            ValueError: It cannot be read.
        """
        path = self.partition(key)
        try:
            metadata = _pyarrow().parquet.read_metadata(path)
            return json.loads(metadata.metadata[f'{PREFIX}partition'.encode()])
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f'{path} cannot be read as a partition ({type(error).__name__}: {error}): remove it, and '
                             'the same command makes it again') from error

    def finish(self, keys: list[tuple[int, int]]) -> dict[str, int]:
        """Writes errors.parquet from all partitions, removes what killed processes left, and counts."""
        pyarrow = _pyarrow()
        counts = dict(pictures=0, rows=0, errors=0)
        schema = pyarrow.schema([('file', pyarrow.string()), ('reason', pyarrow.string())])
        with self.writing():
            with pyarrow.parquet.ParquetWriter(self.part / 'errors.parquet', schema) as writer:
                for key in sorted(keys):
                    notes = self.notes(key)
                    counts['pictures'] += notes['pictures']
                    counts['rows'] += notes['rows']
                    counts['errors'] += len(notes['errors'])
                    if notes['errors']:
                        columns = [list(column) for column in zip(*notes['errors'])]
                        writer.write_batch(pyarrow.record_batch(columns, schema=schema))
            os.replace(self.part / 'errors.parquet', self.path / 'errors.parquet')
            for other in self.path.glob('.writing-*'):
                if other != self.part:
                    with contextlib.suppress(OSError), open(other / 'lock', 'w') as lock:
                        if _locked(lock):
                            shutil.rmtree(other, ignore_errors=True)
        return counts


def _short(value: Any, other: Any) -> str:
    """A value in words; of a dict, what differs."""
    if isinstance(value, dict) and isinstance(other, dict):
        return ', '.join(f'{key} {value.get(key)}' for key in {**value, **other} if value.get(key) != other.get(key))
    return str(value)[:60]


def _locked(file: Any) -> bool:
    """Whether this process could lock a file; where the system has no such locks, always."""
    try:
        import fcntl
    except ModuleNotFoundError:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by children, which may live longer
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


class Partition:
    """A partition that is being written.

    Args:
        folder: Where to.
        key: Shard and number.
        extractor: What is taken of pictures.
        about: What goes into the schema's metadata.
    """

    def __init__(self, folder: Folder, key: tuple[int, int], extractor: Extractor, about: Mapping[str, Any]):
        self._arrow = pyarrow = _pyarrow()
        self._folder, self._key = folder, key
        self._columns: dict[str, int] = extractor.network.columns
        self._dtype: str = extractor.settings.dtype
        self._number = pyarrow.float16() if self._dtype == 'float16' else pyarrow.float32()
        fields = [('file', pyarrow.string()), ('sha1', pyarrow.string()), ('width', pyarrow.int32()),
                  ('height', pyarrow.int32())]
        if extractor.network.boxes:
            fields += [('box', pyarrow.int64()), *((side, pyarrow.float32()) for side in ('x1', 'y1', 'x2', 'y2'))]
            if len(extractor.network.stages) > 1:
                fields += [('stage', pyarrow.int32())]
        if extractor.network.maps:
            fields += [('maps', pyarrow.string()), ('key', pyarrow.int32())]
        # of boxes with vectors of one stage each, the others are null; only pyarrow 26 reads null lists of fixed length
        several = extractor.network.boxes and len(extractor.network.stages) > 1
        self._lengths = {name: -1 if several and name != 'logits' else length for name, length in self._columns.items()}
        fields += [(name, pyarrow.list_(self._number, length)) for name, length in self._lengths.items()]
        described = {f'{PREFIX}{name}': value if isinstance(value, str) else json.dumps(value)
                     for name, value in about.items()}
        self._schema = pyarrow.schema(fields, metadata=described)
        self._rows: list[tuple[Any, ...]] = []
        self._vectors: dict[str, list[Any]] = {name: [] for name in self._columns}
        self._maps: dict[str, torch.Tensor] = {}
        self._bytes = self._files = 0
        self._pictures = self._count = 0
        self._errors: list[tuple[str, str]] = []
        self._path = folder.part / folder.partition(key).name
        # values that are rounded to bfloat16 are shorter by half when each byte of theirs has a stream of its own
        split = {f'{name}.list.element': 'BYTE_STREAM_SPLIT' for name in self._columns}
        split = split if self._dtype != 'float16' else {}
        self._writer = pyarrow.parquet.ParquetWriter(
            self._path, self._schema, compression='zstd', use_dictionary=False, column_encoding=split or None)

    def add(self, picture: Prepared, found: Found | None) -> None:
        """A picture: its row, or one for each of its boxes; its errors."""
        self._pictures += 1
        self._errors += [(text(picture.name), text(reason)) for reason in picture.errors]
        if found is None:
            return
        boxes: list[Box | None] = [None] if picture.boxes is None else list(picture.boxes)
        for at, box in enumerate(boxes):
            row: tuple[Any, ...] = text(picture.name), picture.sha1, picture.width, picture.height, *(box or ())
            if found.stages is not None:
                row += (found.stages[at],)
            if found.maps:
                row += self._keep({stage: x[at] for stage, x in found.maps.items()})
            self._rows.append(row)
            self._count += 1
        for name, x in found.vectors.items():
            everywhere = found.stages is None or name == 'logits'
            x = x.bfloat16().float() if self._dtype == 'bfloat16' else x
            self._vectors[name] += [row if everywhere or name == f'features_{found.stages[at]}' else None  # type: ignore
                                    for at, row in enumerate(x.numpy())]
        if len(self._rows) >= ROWS:
            self._flush()

    def _keep(self, maps: Mapping[str, torch.Tensor]) -> tuple[str, int]:
        size = sum(x.numel() * x.element_size() for x in maps.values())
        if self._bytes and self._bytes + size > MAP_BYTES:
            self._flush_maps()
        for stage, x in maps.items():
            x = x.to(getattr(torch, self._dtype)).contiguous()
            self._maps[f'{self._count}/{stage}'] = x
            self._bytes += x.numel() * x.element_size()
        return self._maps_name(), self._count

    def _maps_name(self) -> str:
        return f'{self._folder.partition(self._key).stem}-{self._files:03d}.safetensors'

    def _flush_maps(self) -> None:
        if self._maps:
            path = self._folder.part / self._maps_name()
            safetensors.torch.save_file(self._maps, path)
            self._folder.maps.mkdir(exist_ok=True)
            os.replace(path, self._folder.maps / path.name)
            self._files += 1
        self._maps, self._bytes = {}, 0

    def _flush(self) -> None:
        if not self._rows:
            return
        pyarrow = self._arrow
        names = self._schema.names[:len(self._rows[0])]
        arrays = [pyarrow.array(column, self._schema.field(name).type)
                  for name, column in zip(names, zip(*self._rows))]
        for name, length in self._lengths.items():
            given = self._vectors[name]
            flat = np.concatenate([row for row in given if row is not None] or [np.empty(0, np.float32)])
            values = pyarrow.array(flat.astype(self._number.to_pandas_dtype()))
            if length > 0:
                arrays.append(pyarrow.FixedSizeListArray.from_arrays(values, length))
            else:
                ends = np.cumsum([0, *(0 if row is None else len(row) for row in given)]).tolist()
                begins = [None if row is None else at for row, at in zip(given, ends)]
                offsets = pyarrow.array([*begins, ends[-1]], pyarrow.int32())
                arrays.append(pyarrow.ListArray.from_arrays(offsets, values))
            given.clear()
        self._writer.write_batch(pyarrow.record_batch(arrays, schema=self._schema))
        self._rows.clear()

    def close(self, ends_shard: bool) -> None:
        """Lets it appear."""
        self._flush()
        self._flush_maps()
        notes = dict(pictures=self._pictures, rows=self._count, ends_shard=ends_shard, errors=self._errors)
        self._writer.add_key_value_metadata({f'{PREFIX}partition': json.dumps(notes)})
        self._writer.close()
        with open(self._path, 'rb+') as file:
            os.fsync(file.fileno())
        self._folder.features.mkdir(exist_ok=True)
        os.replace(self._path, self._folder.partition(self._key))

    def abandon(self) -> None:
        """Closes the file, which is not whole."""
        with contextlib.suppress(Exception):
            self._writer.close()
