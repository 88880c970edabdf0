"""The job on several machines, by Ray Data."""

from typing import Any

import numpy as np
import torch

from .decode import Prepared
from .extractor import Extractor, Settings
from .job import Job, Report, Share, bar
from .sources import File, Picture, Source, need

__all__ = ['ray_actor', 'spread']


def _ray() -> Any:
    need('ray.data', 'san-backbones[ray]', 'Ray')
    import ray
    import ray.data
    return ray


class _Worker:
    """Makes partitions, by the number of a unit of work; done twice, as Ray may after a failure, they are the same."""

    def __init__(self, source: Source, out: str, made_by: dict[str, Any], workers: int):
        ray = _ray()
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get('CPU', 1))))
        who = f'ray-{ray.get_runtime_context().get_actor_id()}'
        self._job = Job(source, out, Extractor(**made_by), workers, who)
        self._done = self._job.folder.done()  # once: for each unit would be a listing of all partitions

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        counts: list[int] = []
        self._job.perform((int(number) for number in batch['unit']), counts.append, self._done)
        return dict(pictures=[sum(counts)])


def spread(address: str, source: Source, out: str, made_by: dict[str, Any], workers: int, since: float,
           progress: bool | None) -> Report:
    """`extract` on a Ray cluster: actors make partitions in a folder that all nodes see.

    Args:
        address: Of the cluster, or 'local'.
        source: The pictures; all nodes see them by the same names.
        out: The folder.
        made_by: Arguments of `Extractor`.
        workers: Processes of each actor that decode.
        since: When the job began, by `time.monotonic`.
        progress: Whether to show a bar.
    """
    ray = _ray()
    if not ray.is_initialized():
        ray.init(address=None if address == 'local' else address, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    job = Job(source, out, Extractor(**dict(made_by, device='cpu')), 0, 'ray-driver')
    resources = ray.cluster_resources()
    on_gpu = resources.get('GPU', 0) and str(made_by['device'] or 'cuda') != 'cpu'
    actors = max(1, int(resources.get('GPU' if on_gpu else 'CPU', 1)))
    units = [dict(unit=number) for number in job.left()]
    with bar(job, Share(), progress) as shown:
        if units:
            done = ray.data.from_items(units, override_num_blocks=min(len(units), 1000)).map_batches(
                _Worker, fn_constructor_args=(source, out, made_by, workers), batch_size=1,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors), num_cpus=1, num_gpus=int(bool(on_gpu)))
            for row in done.iter_rows():
                shown.update(row['pictures'])
    return job.finish(since)


def ray_actor(model: Any = 'san15_patchwise', settings: Settings = Settings(), *, weights: Any = None,  # noqa: B008
              random: bool = False, device: str | None = None) -> type:
    """A class for Ray Data's `map_batches`, whose objects put features beside pictures.

        ds = ray.data.read_binary_files('s3://bucket/pictures', include_paths=True)
        ds = ds.map_batches(ray_actor('san15_patchwise'), batch_size=16, concurrency=4, num_gpus=1)

    Batches have a column `bytes`, or a column `path` or `file`. They get `sha1`, `width`, `height`, `features` (and
    those of `Settings`), float32, and `error`: '' or why the picture could not be read; features are then NaN.

    Args:
        model: A name, as timm has it, or a model of timm's.
        settings: What is taken of the pictures: vectors, at one size.
        weights: A checkpoint, instead of the pretrained weights.
        random: Random weights instead of them.
        device: Where to compute; None: CUDA, where the actor has a GPU.

    Raises:
        ValueError: Maps are asked for.
    """
    if settings.pool == 'none':
        raise ValueError("a batch of Ray Data has vectors: pool 'none' is for extract()")

    class Features:

        def __init__(self) -> None:
            self._extractor = Extractor(model, settings, weights=weights, random=random, device=device)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            column = next((name for name in ('bytes', 'path', 'file') if name in batch), None)
            if column is None:
                raise ValueError(f'a batch has the columns {", ".join(batch)}: expected bytes, path or file')
            pictures: list[Prepared] = []
            for value in batch[column]:
                origin = bytes(value) if column == 'bytes' else value if '://' in value else File(value, -1)
                pictures.append(self._extractor.prepare(Picture('', origin)))
            found = self._extractor(pictures)
            result = dict(batch, **{name: np.array([getattr(picture, name) for picture in pictures])
                                    for name in ('sha1', 'width', 'height')})
            result['error'] = np.array(['; '.join(picture.errors) for picture in pictures])
            for name, length in self._extractor.network.columns.items():
                result[name] = np.stack([np.full(length, np.nan, np.float32) if each is None
                                         else each.vectors[name][0].numpy() for each in found])
            return result

    return Features
