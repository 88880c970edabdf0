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

from .._files import atomic_write
from .networks import LEVELS, Answer, Student, Teacher, load_teacher
from .pictures import Files, Store, Views

__all__ = ['Settings', 'Size', 'distill']

CHECKPOINT = 'last.pt'
WEIGHTS = 'model.safetensors'
LOG = 'log.jsonl'
MEASURED = 256  # pictures for the statistics of the teacher's features
STRIDE = 32  # the sides of the teacher's pictures are multiples of it
PRECISIONS = ('fp32', 'bf16')


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of the student's pictures, and how long it is used.

    Args:
        pixels: Side of the pictures.
        batch: Pictures per step, over all processes.
        pictures: How many pictures to train on before the next size; None for all.
    """
    pixels: int
    batch: int = 64
    pictures: int | None = None

    @classmethod
    def parse(cls, text: str) -> 'Size':
        """Parses PIXELS[xBATCH][:PICTURES], such as '64', '64x32' or '48x64:100000'.

        Raises:
            ValueError: The text has another form.
        """
        size, colon, pictures = text.partition(':')
        pixels, times, batch = size.partition('x')
        parts = [pixels] + [batch] * bool(times) + [pictures] * bool(colon)
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f'expected PIXELS[xBATCH][:PICTURES] such as 64, 64x32 or 48x64:100000, got {text!r}')
        return cls(int(pixels), int(batch) if times else cls.batch, int(pictures) if colon else None)


@dataclasses.dataclass
class Settings:
    """Settings that determine the result of a distillation. Checkpoints hold them, and a run that continues needs the
    same.

    Args:
        sizes: Sizes of the student's pictures, one after the other; the last one stays.
        teacher_scale: Side of the teacher's pictures as a multiple of the student's, rounded to a multiple of 32.
        teacher_size: Side of the teacher's pictures in pixels, for teachers with a fixed size.
        crop: Smallest part of a picture's area that a view shows, in (0, 1].
        levels: Strides of the feature maps that are compared; () for logits only. A `Teacher` brings its own.
        reuse: If the teacher ends in a linear classifier, reuse it, frozen, and learn the features before it (Chen et
            al., Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022).
        temperature: Divides the logits of both.
        weights: Weights of the parts of the loss: logits, pooled features, each feature map.
        lr: Peak learning rate of AdamW.
        projection_lr: Learning rate of the projections, as a part of `lr`.
        weight_decay: Weight decay of parameters with two or more dimensions.
        warmup: Pictures over which the learning rate grows.
        decay: Last part of the training, over which the learning rate falls to 0 as a cosine; 1 for all of it. Without
            an end of the training it does not fall.
        clip: Largest norm of the gradient; 0 for any.
        ema: Decay of the averaged weights per step, lower in the first steps.
        seed: Random seed.
        precision: Precision of the student, 'fp32' or 'bf16' (autocast).
        teacher_precision: Precision of the teacher.

    Raises:
        ValueError: A setting is out of range.
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
        """Returns the size in use after `seen` pictures."""
        for size in self.sizes[:-1]:
            if seen < (size.pictures or 0):
                return size
            seen -= size.pictures or 0
        return self.sizes[-1]

    def teacher_pixels(self, size: Size) -> int:
        """Returns the side of the teacher's pictures."""
        return self.teacher_size or max(STRIDE, round(size.pixels * self.teacher_scale / STRIDE) * STRIDE)

    def rate(self, seen: int, done: float) -> float:
        """Returns the learning rate after `seen` pictures and a part `done` of the training, 0 to 1."""
        rate = self.lr * min(1., (seen + 1) / max(1, self.warmup))
        if self.decay and done > 1 - self.decay:
            rate *= .5 * (1 + math.cos(math.pi * min(1., (done - 1 + self.decay) / self.decay)))
        return rate


class _Losses(nn.Module):
    """The losses as a module, for DistributedDataParallel."""

    def __init__(self, student: Student, temperature: float):
        super().__init__()
        self.student, self.temperature = student, temperature

    def forward(self, x: Tensor, answer: Answer) -> dict[str, Tensor]:
        return self.student.losses(x, answer, self.temperature)


class _Trainer:
    """The state of a training, and its steps."""

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
        self.begun, self.before = 0, 0.  # pictures and seconds of an earlier run that this one started from
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
        """Yields the teacher's answers to the first pictures."""
        pixels = self.settings.teacher_pixels(self.settings.sizes[0])
        count = min(MEASURED, max(32, 4 * len(self.views.store)))
        for first in range(0, count, 32):
            yield self._teach(self.views.batch(range(first, first + 32), [pixels])[0])

    def size(self) -> Size:
        """Returns the current size."""
        return self.settings.size(self.seen - self.begun)

    def _share(self, seen: int) -> tuple[range, list[int], int]:
        """Returns this process's samples of a step, the sizes of their views, and the next step's first sample."""
        size = self.settings.size(seen - self.begun)
        batch = size.batch // self.world
        first = seen + self.rank * batch
        return range(first, first + batch), [size.pixels, self.settings.teacher_pixels(size)], seen + size.batch

    def _batch(self) -> list[Tensor]:
        """Returns the views of this step; threads, if any, prepare those of the next two."""
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
        """Trains one step after a part `done` of the training.

        Returns:
            The parts of this process's loss, the norm of the gradient and the learning rate.

        Raises:
            FloatingPointError: The loss or the gradient is not finite. The weights are unchanged.
        """
        settings = self.settings
        small, large = self._batch()
        answer = self._teach(large)
        # for dropout and stochastic depth
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
        """Returns everything that a run needs to continue, except the settings."""
        return dict(student=self.student.state_dict(), averaged=self.averaged.module.state_dict(),
                    optimizer=self.optimizer.state_dict(), seen=self.seen, steps=self.steps, seconds=self.seconds,
                    begun=self.begun, before=self.before)

    def load(self, state: dict[str, Any]) -> None:
        """Continues from a state."""
        self.student.load_state_dict(state['student'])
        self.averaged.module.load_state_dict(state['averaged'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.seen, self.steps, self.seconds, self.begun = (
            state[name] for name in ('seen', 'steps', 'seconds', 'begun'))
        self.before = state.get('before', 0.)

    def start(self, path: pathlib.Path) -> None:
        """Starts from another run's checkpoint or from a model's weights.

        Raises:
            RuntimeError: The file cannot be read, or is another network's.
        """
        try:
            if path.suffix == '.safetensors':
                pixels = self.settings.sizes[0].pixels
                self.student.take(safetensors.torch.load_file(path), [
                    self._normalised(self.views.batch(range(i, i + 32), [pixels])[0]) for i in range(0, MEASURED, 32)])
                self.averaged.set(self.student)
                return
            groups = [{name: group[name] for name in ('weight_decay', 'factor')}
                      for group in self.optimizer.param_groups]
            self.load(_read(path))
            for group, own in zip(self.optimizer.param_groups, groups, strict=True):
                group.update(own)  # of these settings, not of the other run's
        except (RuntimeError, KeyError, ValueError, OSError, safetensors.SafetensorError) as error:
            raise RuntimeError(f'cannot start from {path}: {error}') from error
        self.begun, self.before, self.seconds = self.seen, self.before + self.seconds, 0.

    def weights(self) -> dict[str, Tensor]:
        """Returns the averaged weights under the student's names, with matrices in half precision."""
        return {name: (each.half() if each.is_floating_point() and each.dim() > 1 else each).cpu().contiguous()
                for name, each in self.averaged.module.export().items()}


@contextlib.contextmanager
def _catch_signals() -> Iterator[list[str]]:
    """Yields a list that gets the name of the first SIGINT or SIGTERM; a second signal ends the process."""
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


def _check_same(mine: dict[str, Any], its: dict[str, Any], path: pathlib.Path) -> None:
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
    except Exception as error:  # torch raises many kinds of errors
        raise RuntimeError(f'{path} cannot be read as a checkpoint of a distillation ({error})') from error


def _save(trainer: _Trainer, about: dict[str, Any], out: pathlib.Path, keep: bool) -> None:
    with atomic_write(out / CHECKPOINT) as part:
        torch.save(dict(trainer.state(), about=about), part)
    weights = safetensors.torch.save(trainer.weights(), dict(format='pt', pictures=str(trainer.seen)))
    paths = [out / WEIGHTS]
    if keep:
        (out / 'kept').mkdir(exist_ok=True)
        paths.append(out / 'kept' / f'{trainer.seen:09}.safetensors')
    for path in paths:
        with atomic_write(path) as part:
            part.write_bytes(weights)


class _Report:
    """Averages the results of steps, and logs and prints them at intervals."""

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
    """Trains a network on pictures without labels to give a teacher's outputs. Continues the run in `out`, if any.

    `out` gets `last.pt`, from which a stopped or killed run continues, bit for bit if it runs on one device and
    `pictures` sets its end; `model.safetensors`, the averaged weights, with matrices in half precision; `log.jsonl`;
    and `kept/`, earlier averaged weights. SIGINT and SIGTERM save and end. If torch.distributed is initialised,
    processes share the batches.

    Args:
        model: The student, a timm model or its name.
        teacher: A `Teacher`, a model for `Teacher`, or a name for `load_teacher`.
        sources: Folders (also with zips and tars in them), zips or tars (shards of a WebDataset) of pictures;
            PATH//PART for paths inside that begin with PART. Pictures that cannot be read are skipped.
        out: The output folder.
        settings: Settings that determine the result.
        pictures: End after so many pictures, counted from the start; repeated ones count again.
        minutes: End after so many minutes of training, including those before an interruption.
        start: Checkpoint of another run, for its weights and optimizer; or a model's .safetensors.
        save_minutes: Minutes between checkpoints.
        keep_pictures: Keep a copy of the averaged weights every so many pictures.
        store: File for the decoded pictures, to share between runs; default `pictures.bin` in `out`.
        workers: Threads that crop views; 0 crops them in the main thread.
        device: Default CUDA if available, else the CPU.
        tell: Called with lines of progress.
        tell_seconds: Seconds between them.

    Returns:
        `pictures` seen, `seconds`, the `signal` that ended the run or None, `left_out`, the number of unreadable
        pictures, and `weights`, the path of the weights.

    Raises:
        ValueError: An argument is wrong, or the checkpoint in `out` was made with other settings.
        OSError: A source is missing, or a disk is full.
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
        _check_same(about, state['about'], out / CHECKPOINT)
        trainer.load(state)
        tell(f'continues from {out / CHECKPOINT}, after {trainer.seen} pictures')
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
    with _catch_signals() as stops:
        while True:
            now = time.monotonic()
            trainer.seconds += now - last
            last = now
            done = part_done()
            ends = done >= 1 or bool(stops)
            if distributed:  # all follow the first process's clock and signals
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
