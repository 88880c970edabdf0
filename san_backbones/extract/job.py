"""The job: pictures in, partitions of features out; stopped, gone on with, and shared."""
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from .. import __version__
from . import decode
from .extractor import Extractor, Settings
from .partitions import Folder, Partition
from .sources import Broken, Cut, Picture, Source, Survey, Unit, need, open_sources

__all__ = ['Job', 'Report', 'Share', 'extract', 'share_of_environment']


class Share(NamedTuple):
    """Number `rank` of `ranks` processes that share the work."""
    rank: int = 0
    ranks: int = 1


class Report(NamedTuple):
    """What is in the folder, of all processes."""
    folder: str
    complete: bool  # nothing is left to do
    pictures: int  # those that could not be read included
    rows: int
    errors: int
    seconds: float  # of this run


def share_of_environment() -> Share:
    """That of a process which torchrun or Slurm's srun started, or all."""
    for rank, ranks in (('RANK', 'WORLD_SIZE'), ('SLURM_PROCID', 'SLURM_STEP_NUM_TASKS')):
        if os.environ.get(rank, '').isdecimal() and os.environ.get(ranks, '').isdecimal():
            return Share(int(os.environ[rank]), int(os.environ[ranks]))
    return Share()


class Job:
    """Features of the pictures of a source, into a folder.

    Args:
        source: The pictures.
        out: The folder.
        extractor: The network, and what is taken of it.
        workers: Processes that decode; None: as many as suit the machine.
        who: This process, among those that write into the folder.

    Raises:
        ValueError: The folder has other things in it, or is among the pictures.
    """

    def __init__(self, source: Source, out: str | os.PathLike[str], extractor: Extractor, workers: int | None = None,
                 who: str = '0-of-1'):
        target = pathlib.Path(out).resolve()
        for one in source.folders:
            if pathlib.Path(one).resolve() in (target, *target.parents):
                raise ValueError(f'{out} is within {one}, where pictures are looked for: put it elsewhere')
        self.source, self.extractor, self.folder = source, extractor, Folder(out, who)
        self.rows: int = extractor.settings.rows
        self.survey: Survey = source.survey(self.rows)
        if workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
            workers = min(16, cores if extractor.network.device.type == 'cuda' else max(1, cores // 2))
        self._workers = workers
        self.about: dict[str, Any] = dict(
            version=__version__, **extractor.about, source=f'sha256:{self.survey.fingerprint}')
        self.folder.claim(self.about)
        self._units: Iterator[Unit] | None = None
        self._position = 0

    def unit(self, number: int) -> Unit:
        """A unit of work; in growing order they are found without going through the source anew."""
        if self._units is None or number < self._position:
            self._units, self._position = self.source.units(self.rows), 0
        for unit in self._units:
            self._position += 1
            if self._position == number + 1:
                return unit
        raise RuntimeError(f'the source changed while it was read: it has no unit {number} any more')

    def left(self) -> list[int]:
        """Numbers of the units that are not done."""
        done = self.folder.done()
        return [number for number, unit in enumerate(self.source.units(self.rows)) if not self._keys(unit, done)]

    def _keys(self, unit: Unit, done: Mapping[int, set[int]]) -> list[tuple[int, int]]:
        """The partitions of a unit that is done; none, if it is not."""
        there = done.get(unit.shard, set())
        if unit.chunk is not None:
            return [(unit.shard, unit.chunk)] if unit.chunk in there else []
        whole = there and there == set(range(len(there))) and \
            self.folder.notes((unit.shard, len(there) - 1))['ends_shard']
        return [(unit.shard, chunk) for chunk in sorted(there)] if whole else []

    def _tasks(self, numbers: Iterator[int], done: Mapping[int, set[int]]) -> Iterator[decode.Task]:
        for number in numbers:
            unit = self.unit(number)
            if not self._keys(unit, done):
                yield from self._tasks_of(unit, done)

    def _tasks_of(self, unit: Unit, done: Mapping[int, set[int]]) -> Iterator[decode.Task]:
        rows, step, chunk = self.rows, self.extractor.step, unit.chunk or 0
        pictures = _guarded(unit)
        following = next(pictures, None)
        while True:
            taken, skip = 0, chunk in done.get(unit.shard, ())
            while True:
                part: list[Picture] = []
                while following is not None and len(part) < min(step, rows - taken):
                    part.append(following)
                    following = next(pictures, None)
                taken += len(part)
                ends = taken == rows or following is None
                if not skip:
                    yield decode.Task((unit.shard, chunk), tuple(part), ends, following is None)
                if ends:
                    break
            if following is None:
                return
            chunk += 1

    def perform(self, numbers: Iterator[int], tell: Callable[[int], Any] = lambda count: None,
                done: Mapping[int, set[int]] | None = None) -> None:
        """Makes the partitions of these units that are not there.

        Args:
            numbers: Of units.
            tell: Takes the number of pictures done since it was called last.
            done: Partitions to leave alone, as `Folder.done` lists them; None: looks what is there.
        """
        done = self.folder.done() if done is None else done
        partition: Partition | None = None
        waiting: list[decode.Prepared] = []
        with self.folder.writing():
            try:
                tasks = self._tasks(numbers, done)
                for decoded in decode.loader(tasks, self.extractor.prepare, self._workers):
                    if partition is None:
                        partition = Partition(self.folder, decoded.key, self.extractor, self.about)
                    waiting += decoded.pictures
                    if decoded.ends or self.extractor.enough(waiting):
                        for picture, found in zip(waiting, self.extractor(waiting)):
                            partition.add(picture, found)
                        waiting = []
                    if decoded.ends:
                        partition.close(decoded.ends_shard)
                        partition = None
                    tell(len(decoded.pictures))
            finally:
                if partition is not None:
                    partition.abandon()

    def finish(self, since: float) -> Report:
        """Counts what is there and, where that is all, writes errors.parquet.

        Raises:
            ValueError: The source is another than at the beginning.
        """
        done, complete = self.folder.done(), True
        keys: list[tuple[int, int]] = []
        for unit in self.source.units(self.rows):
            there = self._keys(unit, done)
            complete = complete and bool(there)
            keys += there
        if self.source.survey(self.rows).fingerprint != self.survey.fingerprint:
            raise ValueError('the source changed while it was read, so the features are of neither state: remove '
                             f'{self.folder.path}, and begin anew')
        if complete:
            counts = self.folder.finish(keys)
            if not counts['pictures']:
                raise ValueError(f'there are no pictures in {", ".join(map(str, self.source.given))}')
        else:
            notes = [self.folder.notes((shard, chunk)) for shard, chunks in done.items() for chunk in chunks]
            counts = {name: sum(len(note[name]) if name == 'errors' else note[name] for note in notes)
                      for name in ('pictures', 'rows', 'errors')}
        return Report(str(self.folder.path), complete, **counts, seconds=time.monotonic() - since)


def _guarded(unit: Unit) -> Iterator[Picture]:
    """The pictures of a unit; if a shard is damaged, an error instead of the rest."""
    try:
        yield from unit.pictures()
    except Cut as error:
        yield Picture(unit.name, Broken(str(error)))


def extract(sources: Any, out: str | os.PathLike[str], model: Any = 'san15_patchwise',
            settings: Settings = Settings(), *, weights: str | os.PathLike[str] | None = None,  # noqa: B008
            random: bool = False, boxes: str | os.PathLike[str] | None = None, column: str | None = None,
            every: int = 1, workers: int | None = None, device: str | torch.device | None = None,
            share: Share | None = None, ray: str | None = None, progress: bool | None = None) -> Report:
    """Features of any number of pictures, as Parquet files (or maps, as safetensors files with an index).

    Never more than some batches of pictures are in memory. Partitions appear whole or not at all, and the same call
    goes on behind those that are there; on one kind of machine the result is the same to the bit, wherever it was
    stopped. A picture that cannot be read is a row of errors.parquet.

    Args:
        sources: One or several: files, folders, globs, zips, tars, Parquet files, videos, addresses that fsspec opens,
            `datasets:NAME[:SPLIT]`, a Dataset of Hugging Face.
        out: The folder for features; what it has is gone on with.
        model: A name, as timm has it, or a model of timm's; that is changed: moved, and fused where it is a SAN.
        settings: What is taken of the pictures.
        weights: A checkpoint, .safetensors or .pth, instead of the pretrained weights.
        random: Random weights instead of them, always the same.
        boxes: A list of boxes within pictures, a row for each: COCO's JSON, or CSV or Parquet with the columns file,
            x1, y1, x2, y2, in pixels. `sources` is then the folder that the paths in it begin from.
        column: That of the pictures, in Parquet files and datasets; None: the first of usual names.
        every: Every n-th frame of a video.
        workers: Processes that decode; 0: none. None: on CUDA as many as there are cores, 16 at most, else half.
        device: Where to compute; None: CUDA, where it is.
        share: This process's part of the partitions; None: as torchrun or Slurm says, or all.
        ray: Address of a Ray cluster whose nodes see `sources` and `out` by the same names; 'local' begins one here.
        progress: Whether to show a bar; None: on a terminal.

    Returns:
        What is in the folder.

    Raises:
        FileNotFoundError: A source is not there.
        ValueError: There are no pictures; or `out` has features of another model, transform or source; or the source
            changed meanwhile.
        ImportError: A package is missing; the message has the command.
        OSError: A folder cannot be listed, or the disk is full; the same call goes on.
    """
    since = time.monotonic()
    for module in ('pyarrow', 'tqdm'):  # before a model is loaded
        need(module, 'san-backbones[features]', 'the extraction of features')
    source = open_sources(sources, boxes=boxes, column=column, every=every)
    if ray is not None:
        from .cluster import spread
        made_by = dict(model=model, settings=settings, weights=weights, random=random, boxes=boxes is not None,
                       device=device)
        return spread(ray, source, os.path.abspath(out), made_by, workers or 0, since, progress)
    share = share_of_environment() if share is None else share
    if device is None and torch.cuda.is_available() and os.environ.get('LOCAL_RANK', '').isdecimal():
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
    extractor = Extractor(model, settings, weights=weights, random=random, boxes=boxes is not None, device=device)
    job = Job(source, out, extractor, workers, f'{share.rank}-of-{share.ranks}')
    numbers = range(share.rank, job.survey.units, share.ranks)
    with bar(job, share, progress) as shown:
        job.perform(iter(numbers), shown.update)
    return job.finish(since)


def bar(job: Job, share: Share, progress: bool | None = None) -> Any:
    """A progress bar on standard error: pictures a second, and the time left if shards say how many they have."""
    import tqdm
    progress = sys.stderr.isatty() if progress is None else progress
    there = sum(job.folder.notes((shard, chunk))['pictures'] for shard, chunks in job.folder.done().items()
                for chunk in chunks) if progress else 0
    return tqdm.tqdm(
        total=None if job.survey.uncounted else job.survey.pictures // share.ranks, initial=there // share.ranks,
        unit=' pictures', smoothing=0.1, disable=not progress, file=sys.stderr, dynamic_ncols=True)
