"""What is taken of pictures, and the network that it is taken of."""
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._loading import load
from ..checks import is_integer
from ..san import SAN
from .decode import Preparation, Prepared
from .network import POOLS, PRECISIONS, Network, digest

__all__ = ['DTYPES', 'Extractor', 'Found', 'Settings']

DTYPES = ('float32', 'float16', 'bfloat16')
TOGETHER = 8  # batches of pictures of their own sizes among which equal sizes are looked for


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is taken of pictures.

    Args:
        pool: 'avg', 'max' or 'gem' over positions; 'none' keeps the maps.
        stages: Those whose outputs are taken, counted from 0; none: the last (with boxes, the last four).
        logits: The classifier's, too.
        dtype: 'float32', 'float16' or 'bfloat16'; vectors of bfloat16 are float32 rounded to it, which packs well.
        size: (height, width) that pictures are scaled and cropped to; with boxes, the lower one is that of the shorter
            side. None: the weights' own, as timm evaluates them; with boxes, the pictures'.
        whole: Pictures as they are, neither scaled nor cropped.
        draft: Decode a JPEG at a reduced scale where it is more than twice as large as wanted.
        precision: In which the network computes: 'fp32', 'bf16' or 'fp16'; 'int8' for the 1x1 convolutions of a SAN
            on a processor with AVX-512 VNNI (`fuse_for_inference`).
        partition: Most pictures of a partition. None: 2048, with maps 128.
        batch_size: Pictures that the network computes at a time; of their own sizes, as many pixels.

    Raises:
        ValueError: One is none of these.
    """
    pool: Literal['avg', 'max', 'gem', 'none'] = 'avg'
    stages: tuple[int, ...] = ()
    logits: bool = False
    dtype: Literal['float32', 'float16', 'bfloat16'] = 'float32'
    size: tuple[int, int] | None = None
    whole: bool = False
    draft: bool = True
    precision: Literal['fp32', 'bf16', 'fp16', 'int8'] = 'fp32'
    partition: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name, allowed in (('pool', tuple(POOLS)), ('dtype', DTYPES), ('precision', tuple(PRECISIONS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} {getattr(self, name)!r}: expected {", ".join(allowed)}')
        if self.size is not None and not (isinstance(self.size, (tuple, list)) and len(self.size) == 2
                                          and all(is_integer(side) for side in self.size)):
            raise ValueError(f'size {self.size!r}: expected (height, width) in pixels, each 1 or more, or None')
        if self.whole and self.size:
            raise ValueError('whole and size exclude each other')
        if self.batch_size < 1 or self.rows < 1:
            raise ValueError(f'batch_size {self.batch_size} and partition {self.partition}: expected 1 or more')

    @property
    def rows(self) -> int:
        """Most pictures of a partition."""
        return self.partition if self.partition is not None else 128 if self.pool == 'none' else 2048


class Found(NamedTuple):
    """Of one picture, or of its boxes."""
    vectors: dict[str, Tensor]  # by column, (rows, D), float32
    maps: dict[str, Tensor]  # by stage, (rows, C, H, W), float32
    stages: list[int] | None  # of each box, where it is of one of several


class Extractor:
    """Features of pictures that are in memory.

    Args:
        model: A name, as timm has it, or a model; it is changed: moved, and fused where it is a SAN.
        settings: What is taken.
        weights: A checkpoint, instead of the pretrained weights.
        random: Random weights instead of them.
        boxes: Pictures have boxes.
        device: Where to compute; None: CUDA, where it is.

    Raises:
        IndexError: The model has no such stage.
        ValueError: It has no classifier, or gives no feature maps; or weights are given beside a model that has some.
        RuntimeError: There are no weights.
    """

    def __init__(self, model: Any = 'san15_patchwise', settings: Settings = Settings(), *,
                 weights: str | os.PathLike[str] | None = None, random: bool = False, boxes: bool = False,
                 device: str | torch.device | None = None):
        self.settings: Settings = settings
        name = model
        if isinstance(model, str):
            model = load(model, None if weights is None else pathlib.Path(weights), random)
        elif weights is not None or random:
            raise ValueError('weights and random are for a model that is given by its name; this '
                             f'{type(model).__name__} has weights already')
        else:
            name = model.pretrained_cfg.get('architecture') or type(model).__name__
        cfg, weight = model.pretrained_cfg, digest(model)  # before it is converted
        whole = settings.whole or boxes and settings.size is None
        self.network: Network = Network(
            model, settings.stages, settings.pool, settings.logits, boxes, torch.device(
                device or ('cuda' if torch.cuda.is_available() else 'cpu')), settings.precision)
        self.prepare: Preparation = Preparation(
            cfg, settings.size, whole, boxes, settings.draft, 1 if isinstance(model, SAN) else self.network.strides[-1])
        config = self.prepare.config
        self.network.normalise(config['mean'], config['std'])
        self._alike = not whole and not boxes
        self._budget = settings.batch_size * config['input_size'][1] * config['input_size'][2]
        kept = dict(dataclasses.asdict(settings), stages=self.network.stages, partition=settings.rows)
        for elsewhere in ('size', 'whole', 'draft', 'batch_size'):  # in the transform; not what is computed
            kept.pop(elsewhere)
        self.about: dict[str, Any] = dict(
            model=name, weights=f'sha256:{weight}', transform=self.prepare.describe(), settings=kept)

    @property
    def step(self) -> int:
        """How many pictures are best decoded together."""
        return self.settings.batch_size if self._alike else min(4, self.settings.batch_size)

    def enough(self, pictures: Sequence[Prepared]) -> bool:
        """Whether to compute these, before more are waited for."""
        pixels = sum(picture.pixels.size for picture in pictures if picture.pixels is not None)
        return self._alike or pixels >= TOGETHER * self._budget * self.prepare.channels

    def __call__(self, pictures: Sequence[Prepared]) -> list[Found | None]:
        """In batches of equal sizes; None for those without pixels or without boxes."""
        results: list[Found | None] = [None] * len(pictures)
        sizes: dict[tuple[int, ...], list[int]] = {}
        for at, picture in enumerate(pictures):
            if picture.pixels is not None and picture.boxes != ():
                sizes.setdefault(picture.pixels.shape, []).append(at)
        for (height, width, _), indices in sizes.items():
            count = max(1, self._budget // (height * width))
            for start in range(0, len(indices), count):
                some = indices[start:start + count]
                for at, found in zip(some, self._batch([pictures[at] for at in some])):
                    results[at] = found
        return results

    def _batch(self, pictures: list[Prepared]) -> Iterator[Found]:
        images = torch.stack([torch.from_numpy(picture.pixels) for picture in pictures]).permute(0, 3, 1, 2)
        counts, levels, rois = [1] * len(pictures), None, None
        if self.network.boxes:
            rois = [torch.tensor([box[1:] for box in picture.boxes or ()]) * torch.tensor(picture.scale * 2)
                    for picture in pictures]
            counts = [len(roi) for roi in rois]
        vectors, maps, levels = self.network(images, rois)
        stop = 0
        for count in counts:
            start, stop = stop, stop + count
            stages = None if levels is None or len(self.network.stages) == 1 else [
                self.network.stages[level] for level in levels[start:stop].tolist()]
            yield Found({name: x[start:stop] for name, x in vectors.items()},
                        {name: x[start:stop] for name, x in maps.items()}, stages)
