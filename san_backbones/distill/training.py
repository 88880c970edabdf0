"""The training loop of a distillation: schedule, averaged weights, checkpoints, progress."""
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import safetensors.torch
import timm
import torch
import torch.distributed
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .._files import written_whole
from .networks import LEVELS, Answer, Student, Teacher, load_teacher
from .pictures import Files, Store, Views

__all__ = ['Settings', 'Size', 'distill']

CHECKPOINT = 'last.pt'
WEIGHTS = 'model.safetensors'
LOG = 'log.jsonl'
MEASURED = 256  # pictures from which the scales of the teacher's features are taken
STRIDE = 32  # of teachers, whose pictures have sides of a multiple of it
PRECISIONS = ('fp32', 'bf16')


@dataclasses.dataclass(frozen=True)
class Size:
    """A side of the student's pictures, and for how long.

    Args:
        pixels: The side.
        batch: Pictures of a step, of all processes.
        pictures: How many are seen at this size before the next one; None for all that follow.
    """
    pixels: int
    batch: int = 64
    pictures: int | None = None

    @classmethod
    def parse(cls, text: str) -> 'Size':
        """PIXELS[xBATCH][:PICTURES], say '64', '64x32' or '48x64:100000'.

        Raises:
            ValueError: It is something else.
        """
        size, colon, pictures = text.partition(':')
        pixels, times, batch = size.partition('x')
        parts = [pixels] + [batch] * bool(times) + [pictures] * bool(colon)
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f'expected PIXELS[xBATCH][:PICTURES] such as 64, 64x32 or 48x64:100000, got {text!r}')
        return cls(int(pixels), int(batch) if times else cls.batch, int(pictures) if colon else None)


@dataclasses.dataclass
class Settings:
    """What decides the result of a distillation. It is kept in checkpoints, and must be the same to go on with one.

    Args:
        sizes: Sides of the student's pictures, one after the other; the last one stays.
        teacher_scale: Side of the teacher's pictures as a multiple of the student's, rounded to one of 32.
        teacher_size: That side in pixels, for teachers that take one size only.
        crop: Least part of a picture's area that a view shows, in (0, 1].
        levels: Strides of the feature maps that are compared; none for logits alone. A `Teacher` brings its own.
        reuse: Where the teacher ends in a linear classifier, take it over, frozen, and learn the features in front of
            it (Chen et al., Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022).
        temperature: That logits of both are divided by.
        weights: Of the parts of the loss: logits, pooled features, each feature map.
        lr: Highest learning rate of AdamW.
        projection_lr: That of what is thrown away, as a part of `lr`.
        weight_decay: Of parameters of two dimensions and more.
        warmup: Pictures over which the learning rate grows.
        decay: Part of the training, at its end, over which the learning rate falls to 0 as a cosine does; 1 for all of
            it. A training without an end has no such part.
        clip: Largest norm of the gradient; 0 for any.
        ema: Part of the averaged weights that a step keeps, less in the first steps.
        seed: Of everything random.
        precision: Of the student, 'fp32' or 'bf16' (autocast).
        teacher_precision: Of the teacher.

    Raises:
        ValueError: One is out of range.
    """
    sizes: tuple[Size, ...] = (Size(64),)
    teacher_scale: float = 2.
    teacher_size: int | None = None
    crop: float = .4
    levels: tuple[int, ...] = LEVELS
    reuse: bool = True
    temperature: float = 1.
    weights: tuple[float, float, float] = (1., 4., 1.)
    lr: float = 1e-3
    projection_lr: float = .1
    weight_decay: float = .05
    warmup: int = 5000
    decay: float = .25
    clip: float = 1.
    ema: float = .999
    seed: int = 0
    precision: str = 'fp32'
    teacher_precision: str = 'fp32'

    def __post_init__(self) -> None:
        ends = [size.pictures for size in self.sizes]
        for name, holds, expected in (
                ('sizes', self.sizes and None not in ends[:-1], 'one or more, all but the last with their pictures'),
                ('teacher_scale', self.teacher_scale > 0, 'a number above 0'),
                ('teacher_size', self.teacher_size is None or self.teacher_size > 0, 'pixels, or none'),
                ('crop', 0 < self.crop <= 1, 'a number in (0, 1]'),
                ('levels', len(set(self.levels)) == len(self.levels) and all(x > 0 for x in self.levels), 'strides'),
                ('temperature', self.temperature > 0, 'a number above 0'),
                ('weights', len(self.weights) == 3 and min(self.weights) >= 0, 'three numbers, 0 or more'),
                ('lr', self.lr > 0, 'a number above 0'),
                ('projection_lr', self.projection_lr > 0, 'a number above 0'),
                ('weight_decay', self.weight_decay >= 0, '0 or more'),
                ('warmup', self.warmup >= 0, '0 or more'),
                ('decay', 0 <= self.decay <= 1, 'a number in [0, 1]'),
                ('clip', self.clip >= 0, '0 or more'),
                ('ema', 0 <= self.ema < 1, 'a number in [0, 1)'),
                ('precision', self.precision in PRECISIONS, ' or '.join(PRECISIONS)),
                ('teacher_precision', self.teacher_precision in PRECISIONS, ' or '.join(PRECISIONS))):
            if not holds:
                raise ValueError(f'{name}: expected {expected}, got {getattr(self, name)!r}')

    def size(self, seen: int) -> Size:
        """What holds after `seen` pictures."""
        for size in self.sizes[:-1]:
            if seen < (size.pictures or 0):
                return size
            seen -= size.pictures or 0
        return self.sizes[-1]

    def teacher_pixels(self, size: Size) -> int:
        """The side of the teacher's pictures."""
        return self.teacher_size or max(STRIDE, round(size.pixels * self.teacher_scale / STRIDE) * STRIDE)

    def rate(self, seen: int, done: float) -> float:
        """The learning rate after `seen` pictures, where a part `done` of the training is over, 0 to 1."""
        rate = self.lr * min(1., (seen + 1) / max(1, self.warmup))
        if self.decay and done > 1 - self.decay:
            rate *= .5 * (1 + math.cos(math.pi * min(1., (done - 1 + self.decay) / self.decay)))
        return rate


class _Losses(nn.Module):
    """What DistributedDataParallel wraps."""

    def __init__(self, student: Student, temperature: float):
        super().__init__()
        self.student, self.temperature = student, temperature

    def forward(self, x: Tensor, answer: Answer) -> dict[str, Tensor]:
        return self.student.losses(x, answer, self.temperature)


class _Trainer:
    """The state of a training, and what a step does to it."""

    def __init__(self, model: str | nn.Module, teacher: Teacher, views: Views, settings: Settings,
                 device: torch.device, workers: int):
        self.settings, self.teacher, self.views, self.device = settings, teacher.to(device), views, device
        self.rank, self.world = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for size in settings.sizes:
            if size.batch % self.world:
                raise ValueError(f'{self.world} processes cannot share batches of {size.batch} pictures evenly: '
                                 'expected a multiple')
        self.seen, self.steps, self.seconds = 0, 0, 0.
        self.begun, self.before = 0, 0.  # pictures and seconds of the run from which this one started
        self.pool = ThreadPoolExecutor(workers) if workers else None
        self.coming: dict[int, list[Future]] = {}
        torch.manual_seed(settings.seed)
        example = next(self._answers())
        logits = example.logits
        if isinstance(model, str):
            model = timm.create_model(model, num_classes=0 if logits is None else logits.shape[1])
        self.student = Student(model, teacher, example, settings.reuse).to(device)
        self.student.measure(self._answers())
        self.averaged = ModelEmaV3(self.student, decay=settings.ema, use_warmup=True, warmup_gamma=10, warmup_power=1)
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        ours = {id(p) for p in model.parameters()}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for parameter in self.parameters:
            groups.setdefault((id(parameter) in ours, parameter.dim() > 1), []).append(parameter)
        self.optimizer = torch.optim.AdamW([
            dict(params=params, weight_decay=settings.weight_decay * decays,
                 factor=1. if is_ours else settings.projection_lr)
            for (is_ours, decays), params in groups.items()], settings.lr)
        cfg: Any = model.pretrained_cfg
        self.mean, self.std = (255 * torch.tensor(cfg[name], device=device).view(-1, 1, 1) for name in ('mean', 'std'))
        self.losses: nn.Module = _Losses(self.student, settings.temperature)
        if self.world > 1:
            self.losses = nn.parallel.DistributedDataParallel(
                self.losses, device_ids=[device.index] if device.type == 'cuda' else None)

    def _autocast(self, precision: str) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == 'bf16')

    def _teach(self, images: Tensor) -> Answer:
        with self._autocast(self.settings.teacher_precision):
            return self.teacher(images.to(self.device))

    def _normalised(self, images: Tensor) -> Tensor:
        return (images.to(self.device) - self.mean) / self.std

    def _answers(self) -> Iterator[Answer]:
        """The teacher's, to the first pictures."""
        pixels = self.settings.teacher_pixels(self.settings.sizes[0])
        count = min(MEASURED, max(32, 4 * len(self.views.store)))
        for first in range(0, count, 32):
            yield self._teach(self.views.batch(range(first, first + 32), [pixels])[0])

    def size(self) -> Size:
        """The present one."""
        return self.settings.size(self.seen - self.begun)

    def _share(self, seen: int) -> tuple[range, list[int], int]:
        """This process's samples of a step, the sizes of their views, and the first sample of the next step."""
        size = self.settings.size(seen - self.begun)
        batch = size.batch // self.world
        first = seen + self.rank * batch
        return range(first, first + batch), [size.pixels, self.settings.teacher_pixels(size)], seen + size.batch

    def _batch(self) -> list[Tensor]:
        """The views of this step. Threads, if there are any, make those of the next two meanwhile."""
        numbers, sizes, _ = self._share(self.seen)
        if self.pool is None:
            return self.views.batch(numbers, sizes)
        at = self.seen
        for _ in range(3):
            numbers, sizes, after = self._share(at)
            if at not in self.coming:
                self.coming[at] = [self.pool.submit(self.views.batch, numbers[i:i + 16], sizes)
                                   for i in range(0, len(numbers), 16)]
            at = after
        return [torch.cat(parts) for parts in zip(*(part.result() for part in self.coming.pop(self.seen)))]

    def step(self, done: float) -> dict[str, float]:
        """One step, with a part `done` of the training over.

        Returns:
            The parts of the loss of this process, the norm of the gradient and the learning rate.

        Raises:
            FloatingPointError: The loss or the gradient is not finite. Nothing was changed.
        """
        settings = self.settings
        small, large = self._batch()
        answer = self._teach(large)
        # of dropout and stochastic depth
        torch.manual_seed((settings.seed * 1_000_003 + self.seen + self.rank) % 2 ** 63)
        self.student.train()
        rate = settings.rate(self.seen - self.begun, done)
        for group in self.optimizer.param_groups:
            group['lr'] = rate * group['factor']
        with self._autocast(settings.precision):
            parts = self.losses(self._normalised(small), answer)
        weights = dict(logits=settings.weights[0], pooled=settings.weights[1])
        loss: Any = sum(weights.get(name, settings.weights[2]) * part for name, part in parts.items())
        self.optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, settings.clip or float('inf')))
        if not math.isfinite(norm):
            raise FloatingPointError(f'after {self.seen} pictures the gradient is not finite (the loss is '
                                     f'{float(loss.detach())}): lower the learning rate, and go on from the last '
                                     'checkpoint')
        self.optimizer.step()
        self.averaged.update(self.student, self.steps)
        self.seen += self.size().batch
        self.steps += 1
        return {name: float(part.detach()) for name, part in parts.items()} | dict(norm=norm, lr=rate)

    def state(self) -> dict[str, Any]:
        """Everything that going on needs, but the settings."""
        return dict(student=self.student.state_dict(), averaged=self.averaged.module.state_dict(),
                    optimizer=self.optimizer.state_dict(), seen=self.seen, steps=self.steps, seconds=self.seconds,
                    begun=self.begun, before=self.before)

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.student.load_state_dict(state['student'])
        self.averaged.module.load_state_dict(state['averaged'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.seen, self.steps, self.seconds, self.begun = (
            state[name] for name in ('seen', 'steps', 'seconds', 'begun'))
        self.before = state.get('before', 0.)

    def start(self, path: pathlib.Path) -> None:
        """Starts from another run's checkpoint, with all it has learnt, or from a model's weights.

        Raises:
            RuntimeError: It cannot be read, or is of another network.
        """
        try:
            if path.suffix == '.safetensors':
                pixels = self.settings.sizes[0].pixels
                self.student.take(safetensors.torch.load_file(path), [
                    self._normalised(self.views.batch(range(i, i + 32), [pixels])[0]) for i in range(0, MEASURED, 32)])
                self.averaged.set(self.student)
                return
            self.load(_read(path))
        except (RuntimeError, KeyError, ValueError, OSError, safetensors.SafetensorError) as error:
            raise RuntimeError(f'cannot start from {path}: {error}') from error
        self.begun, self.before, self.seconds = self.seen, self.before + self.seconds, 0.

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights by the student's own names; matrices in half precision."""
        return {name: (each.half() if each.is_floating_point() and each.dim() > 1 else each).cpu().contiguous()
                for name, each in self.averaged.module.export().items()}


@contextlib.contextmanager
def _stops() -> Iterator[list[str]]:
    """A list that a signal to end puts its name into, instead of ending the process; a second one does that."""
    found: list[str] = []
    kept: dict[Any, Any] = {}

    def note(number: int, frame: Any) -> None:
        found.append(signal.Signals(number).name)
        signal.signal(number, kept[number])

    with contextlib.suppress(ValueError):  # not the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            kept[number] = signal.signal(number, note)
    try:
        yield found
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _same(mine: dict[str, Any], its: dict[str, Any], path: pathlib.Path) -> None:
    mine, its = ({**about['settings'], **{k: v for k, v in about.items() if k != 'settings'}} for about in (mine, its))
    wrong = [f'{name} {its.get(name)!r}, now {value!r}' for name, value in mine.items() if its.get(name) != value]
    if wrong:
        raise ValueError(f'{path} was made with other settings: {"; ".join(wrong)}. Give the same to go on with it; or '
                         'another folder, and start from it (--start) with the new ones')


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise RuntimeError('there is no such file') from None
    except Exception as error:  # torch raises of every kind
        raise RuntimeError(f'{path} cannot be read as a checkpoint of a distillation ({error})') from error


def _save(trainer: _Trainer, about: dict[str, Any], out: pathlib.Path, keep: bool) -> None:
    with written_whole(out / CHECKPOINT) as part:
        torch.save(dict(trainer.state(), about=about), part)
    weights = safetensors.torch.save(trainer.weights(), dict(format='pt', pictures=str(trainer.seen)))
    paths = [out / WEIGHTS]
    if keep:
        (out / 'kept').mkdir(exist_ok=True)
        paths.append(out / 'kept' / f'{trainer.seen:09}.safetensors')
    for path in paths:
        with written_whole(path) as part:
            part.write_bytes(weights)


class _Report:
    """Means of what the steps gave, told and logged now and then."""

    def __init__(self, trainer: _Trainer, out: pathlib.Path, tell: Callable[[str], None]):
        self.trainer, self.out, self.tell = trainer, out, tell
        self._begin()

    def _begin(self) -> None:
        self.sums: dict[str, float] = {}
        self.count, self.since, self.first = 0, time.monotonic(), self.trainer.seen

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.) + value
        self.count += 1

    def write(self, done: float) -> None:
        if not self.count:
            return
        trainer = self.trainer
        rate = (trainer.seen - self.first) / max(1e-9, time.monotonic() - self.since)
        means = {name: float(f'{value / self.count:.4g}') for name, value in self.sums.items()}
        line = dict(pictures=trainer.seen, rate=round(rate, 1), seconds=round(trainer.before + trainer.seconds),
                    size=trainer.size().pixels, **means)
        with open(self.out / LOG, 'a') as log:
            log.write(json.dumps(line) + '\n')
        left = f', {trainer.seconds * (1 - done) / done / 60:.0f} minutes left' if 0 < done < 1 else ''
        self.tell(f'{trainer.seen} pictures, {rate:.1f} a second{left}: '
                  + ', '.join(f'{name} {value:.3g}' for name, value in means.items()))
        self._begin()


def distill(
        model: str | nn.Module,
        teacher: Any,
        sources: Sequence[str | os.PathLike[str]],
        out: str | os.PathLike[str],
        settings: Settings | None = None,
        *,
        pictures: int | None = None,
        minutes: float | None = None,
        start: str | os.PathLike[str] | None = None,
        save_minutes: float = 5.,
        keep_pictures: int | None = None,
        store: str | os.PathLike[str] | None = None,
        workers: int = 0,
        device: str | torch.device | None = None,
        tell: Callable[[str], None] = print,
        tell_seconds: float = 30.,
) -> dict[str, Any]:
    """Trains a network to answer as a teacher does, on pictures without labels. Goes on with what lies in `out`.

    `out` gets `last.pt`, from which a run that was stopped or killed goes on to the same bits (on one device, with
    `pictures` for an end: a clock is never the same twice); `model.safetensors`, the averaged weights, matrices in half
    precision; `log.jsonl`; and `kept/`, averaged weights on the way. SIGINT and SIGTERM save and end. Where
    torch.distributed is initialised, processes share the batches.

    Args:
        model: The student, a timm model or the name of one.
        teacher: A `Teacher`, what `Teacher` takes, or a name for `load_teacher`.
        sources: Folders (with the zips and tars in them), zips, tars (shards of a WebDataset) of pictures; PATH//PART
            for those whose path within begins with PART. Those that cannot be read are left out.
        out: A folder.
        settings: What decides the result.
        pictures: End after so many, counted from the start; the same picture counts each time.
        minutes: End after so many of training, those of runs that were gone on with included.
        start: Checkpoint of another run, of which weights and optimizer are taken; or a model's .safetensors.
        save_minutes: Time between checkpoints.
        keep_pictures: Pictures between averaged weights that are kept.
        store: Where decoded pictures go, for several runs; `pictures.bin` in `out` by default.
        workers: Threads that cut views; with none, they are cut in between.
        device: CUDA where there is a GPU, else the CPU, by default.
        tell: Takes lines of progress.
        tell_seconds: Time between them.

    Returns:
        `pictures` seen, `seconds`, the `signal` that ended it or None, `left_out`, how many pictures are broken, and
        where the `weights` are.

    Raises:
        ValueError: Something given is not as it must be, or the checkpoint in `out` was made with other settings.
        OSError: A source is missing, or a disk full.
        RuntimeError: A checkpoint or the teacher's weights cannot be read.
        FloatingPointError: The training diverged.
    """
    settings, out = settings or Settings(), pathlib.Path(out)
    device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = not distributed or torch.distributed.get_rank() == 0
    if not first:
        def tell(line: str) -> None:
            pass
    for name, value in (('pictures', pictures), ('minutes', minutes), ('keep_pictures', keep_pictures)):
        if value is not None and value <= 0:
            raise ValueError(f'{name}: expected a number above 0, got {value!r}')
    out.mkdir(parents=True, exist_ok=True)
    files = Files(sources)
    side, path = max(size.pixels for size in settings.sizes) * 3 // 2, pathlib.Path(store or out / 'pictures.bin')
    if first:
        Store.of(files, side, path, tell)
    if distributed:
        torch.distributed.barrier()
    decoded = Store.of(files, side, path, tell)
    if isinstance(teacher, str):
        teacher = load_teacher(teacher)
    if not isinstance(teacher, Teacher):
        teacher = Teacher(teacher, settings.levels)
    settings = dataclasses.replace(settings, levels=teacher.levels)
    about = dict(
        model=model if isinstance(model, str) else type(model).__name__, pictures=files.digest(),
        settings=json.loads(json.dumps(dataclasses.asdict(settings))))
    trainer = _Trainer(model, teacher, Views(decoded, settings.seed, (settings.crop, 1.)), settings, device, workers)
    about['processes'] = trainer.world
    if (out / CHECKPOINT).exists():
        state = _read(out / CHECKPOINT)
        _same(about, state['about'], out / CHECKPOINT)
        trainer.load(state)
        tell(f'goes on with {out / CHECKPOINT}, behind {trainer.seen} pictures')
    elif start is not None:
        trainer.start(pathlib.Path(start))
        tell(f'starts from {start}' + f', which has seen {trainer.seen} pictures' * bool(trainer.seen))

    def part_done() -> float:
        parts = [0.]
        if pictures:
            parts.append((trainer.seen - trainer.begun) / pictures)
        if minutes:
            parts.append(trainer.seconds / 60 / minutes)
        return max(parts)

    report = _Report(trainer, out, tell)
    kept, saved, last = trainer.seen, time.monotonic(), time.monotonic()
    with _stops() as stops:
        while True:
            now = time.monotonic()
            trainer.seconds += now - last
            last = now
            done = part_done()
            ends = done >= 1 or bool(stops)
            if distributed:  # by the first process's clock and signals
                decided = torch.tensor([done, ends], dtype=torch.float64, device=device)
                torch.distributed.broadcast(decided, 0)
                done, ends = float(decided[0]), bool(decided[1])
            if first:
                if ends or now - report.since >= tell_seconds:
                    report.write(done)
                keeps = bool(keep_pictures) and trainer.seen // (keep_pictures or 1) > kept // (keep_pictures or 1)
                if ends or keeps or now - saved >= 60 * save_minutes:
                    _save(trainer, about, out, keeps)
                    saved, kept = time.monotonic(), trainer.seen
            if ends:
                break
            report.add(trainer.step(done))
    return dict(pictures=trainer.seen, seconds=trainer.seconds, signal=stops[0] if stops else None,
                left_out=decoded.about['left_out'], weights=str(out / WEIGHTS))
