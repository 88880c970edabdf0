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

__all__ = ['Settings', 'Size', 'distill', 'export']

CHECKPOINT = 'last.pt'
WEIGHTS = 'model.safetensors'
LOG = 'log.jsonl'
MEASURED = 256  # pictures from which the scales of the teacher's features are taken


@dataclasses.dataclass(frozen=True)
class Size:
    """A side of the student's pictures in pixels, the batch that goes with it, and how many pictures are seen so."""
    pixels: int
    batch: int = 64
    pictures: int | None = None

    @classmethod
    def parse(cls, text: str) -> 'Size':
        """PIXELS[xBATCH][:PICTURES], say '64', '64x32' or '48x64:100000'."""
        size, colon, pictures = text.partition(':')
        pixels, times, batch = size.partition('x')
        parts = [pixels] + [batch] * bool(times) + [pictures] * bool(colon)
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f'expected PIXELS[xBATCH][:PICTURES] such as 64, 64x32 or 48x64:100000, got {text!r}')
        return cls(int(pixels), int(batch) if times else 64, int(pictures) if colon else None)


@dataclasses.dataclass
class Settings:
    """What a distillation does. What decides its result is kept in the checkpoint, and must be the same to go on.

    Args:
        sizes: Sides of the student's pictures, one after the other; the last one stays.
        teacher_scale: Side of the teacher's pictures, as a multiple of the student's.
        crop: Least part of a picture's area that a view shows.
        levels: Strides of the feature maps that are compared.
        reuse: Take the teacher's classifier over.
        temperature: Of the logits.
        weights: Of the parts of the loss: logits, pooled features, each feature map.
        lr: Learning rate of AdamW, for `batch` pictures in all.
        projection_lr: Of the projections, as a part of `lr`.
        weight_decay: Of weights of two dimensions and more.
        warmup: Pictures over which the learning rate grows.
        decay: Part of the training, at its end, over which the learning rate falls to 0 as a cosine does.
        clip: Largest norm of the gradient; 0 for any.
        ema: Part of the averaged weights that one step keeps.
        seed: Of everything random.
        precision: 'fp32', or 'bf16' for autocast.
        teacher_precision: The same of the teacher.
    """
    sizes: tuple[Size, ...] = (Size(64),)
    teacher_scale: float = 2.
    crop: float = .4
    levels: tuple[int, ...] = LEVELS
    reuse: bool = True
    temperature: float = 1.
    weights: tuple[float, float, float] = (1., 1., 1.)
    lr: float = 2e-3
    projection_lr: float = .1
    weight_decay: float = .05
    warmup: int = 10000
    decay: float = .25
    clip: float = 1.
    ema: float = .999
    seed: int = 0
    precision: str = 'fp32'
    teacher_precision: str = 'fp32'

    def size(self, seen: int) -> Size:
        for size in self.sizes[:-1]:
            if size.pictures is None or seen < size.pictures:
                return size
            seen -= size.pictures
        return self.sizes[-1]

    def rate(self, seen: int, progress: float) -> float:
        """The learning rate after `seen` pictures, with `progress` of the training done, 0 to 1."""
        rate = self.lr * min(1., (seen + 1) / max(1, self.warmup))
        if self.decay and progress > 1 - self.decay:
            rate *= .5 * (1 + math.cos(math.pi * min(1., (progress - 1 + self.decay) / self.decay)))
        return rate


class _Trainer:
    """State, and what a step does to it."""

    def __init__(self, model: Any, teacher: Teacher, views: Views, settings: Settings, device: torch.device,
                 workers: int = 0):
        self.settings, self.teacher, self.views, self.device = settings, teacher.to(device), views, device
        self.rank, self.world = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.seen, self.steps, self.seconds = 0, 0, 0.
        self.begun = 0  # pictures that the run had seen which this one starts from
        self.batches = _Batches(self, workers)
        torch.manual_seed(settings.seed)
        answers = self._answers()
        self.student = Student(model, teacher, answers[0], settings.reuse).to(device)
        self.student.measure(answers)
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
        cfg = model.pretrained_cfg
        self.mean, self.std = (255 * torch.tensor(cfg[name], device=device).view(-1, 1, 1) for name in ('mean', 'std'))
        self.losses: nn.Module = _Losses(self.student, settings.temperature)
        if self.world > 1:
            self.losses = nn.parallel.DistributedDataParallel(
                self.losses, device_ids=[device.index] if device.type == 'cuda' else None)

    def _answers(self) -> list[Answer]:
        """The teacher's answers to the first pictures."""
        size = self.settings.sizes[0]
        numbers = range(min(MEASURED, 4 * len(self.views.store)))
        return [self._teach(self.views.batch(numbers[i:i + 32], [self.teacher_pixels(size)])[0])
                for i in range(0, len(numbers), 32)]

    def size(self, seen: int) -> Size:
        """What holds after `seen` pictures."""
        return self.settings.size(seen - self.begun)

    def teacher_pixels(self, size: Size) -> int:
        """The side of the teacher's pictures, a multiple of its stride."""
        return max(32, round(size.pixels * self.settings.teacher_scale / 32) * 32)

    def _autocast(self, precision: str):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == 'bf16')

    def _teach(self, images: Tensor) -> Answer:
        with self._autocast(self.settings.teacher_precision):
            return self.teacher(images.to(self.device))

    def step(self, progress: float) -> dict[str, float]:
        """One step; returns the parts of the loss, those of this process."""
        settings = self.settings
        small, large = self.batches(self.seen)
        answer = self._teach(large)
        torch.manual_seed(hash((settings.seed, self.seen, self.rank)) % 2 ** 32)  # of dropout and stochastic depth
        self.student.train()
        rate = settings.rate(self.seen - self.begun, progress)
        for group in self.optimizer.param_groups:
            group['lr'] = rate * group['factor']
        with self._autocast(settings.precision):
            parts = self.losses((small.to(self.device) - self.mean) / self.std, answer)
        weights = dict(logits=settings.weights[0], pooled=settings.weights[1])
        loss = sum(weights.get(name, settings.weights[2]) * part for name, part in parts.items())
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.clip or float('inf'))
        self.optimizer.step()
        self.averaged.update(self.student, self.steps)
        self.seen += len(small) * self.world
        self.steps += 1
        return {name: float(part.detach()) for name, part in parts.items()} | dict(norm=float(norm), lr=rate)

    def state(self) -> dict[str, Any]:
        """Everything that going on needs, but for the settings."""
        return dict(student=self.student.state_dict(), averaged=self.averaged.module.state_dict(),
                    optimizer=self.optimizer.state_dict(), seen=self.seen, steps=self.steps, seconds=self.seconds,
                    begun=self.begun)

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.student.load_state_dict(state['student'])
        self.averaged.module.load_state_dict(state['averaged'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.seen, self.steps, self.seconds, self.begun = (
            state[name] for name in ('seen', 'steps', 'seconds', 'begun'))

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, of the student's own names, in half precision."""
        exported = self.averaged.module.export()
        return {name: (each.half() if each.is_floating_point() and each.dim() > 1 else each).cpu().contiguous()
                for name, each in exported.items()}


class _Losses(nn.Module):
    """What DistributedDataParallel wraps."""

    def __init__(self, student: Student, temperature: float):
        super().__init__()
        self.student, self.temperature = student, temperature

    def forward(self, x: Tensor, answer: Answer) -> dict[str, Tensor]:
        return self.student.losses(x, answer, self.temperature)


class _Batches:
    """Batches of views, made by threads ahead of time; with no threads when asked for."""

    def __init__(self, trainer: '_Trainer', workers: int):
        self.trainer, self.ahead = trainer, 2
        self.pool = ThreadPoolExecutor(workers) if workers else None
        self.waiting: dict[int, list[Future]] = {}

    def _numbers(self, seen: int) -> tuple[range, list[int], int]:
        trainer, size = self.trainer, self.trainer.size(seen)
        batch = size.batch // trainer.world
        first = seen + trainer.rank * batch
        return range(first, first + batch), [size.pixels, trainer.teacher_pixels(size)], seen + batch * trainer.world

    def __call__(self, seen: int) -> list[Tensor]:
        views = self.trainer.views
        numbers, sizes, following = self._numbers(seen)
        if self.pool is None:
            return views.batch(numbers, sizes)
        at = seen
        for _ in range(1 + self.ahead):
            those, their_sizes, after = self._numbers(at)
            if at not in self.waiting:
                self.waiting[at] = [self.pool.submit(views.batch, those[i:i + 16], their_sizes)
                                    for i in range(0, len(those), 16)]
            at = after
        return [torch.cat(parts) for parts in zip(*(part.result() for part in self.waiting.pop(seen)))]


@contextlib.contextmanager
def _stops() -> Iterator[list[str]]:
    """A list that a signal to end puts its name into, instead of ending the process at once; a second one does."""
    found: list[str] = []
    kept = {}

    def note(number: int, frame: Any) -> None:
        found.append(signal.Signals(number).name)
        signal.signal(number, kept[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            kept[number] = signal.signal(number, note)
    except ValueError:  # not the main thread
        pass
    try:
        yield found
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _same(mine: dict[str, Any], its: dict[str, Any], path: pathlib.Path) -> None:
    wrong = [f'{name} {its.get(name)!r}, now {mine[name]!r}' for name in mine if its.get(name) != mine[name]]
    if wrong:
        raise ValueError(f'{path} was made with other settings: {"; ".join(wrong)}. Give the same to go on, or another '
                         'folder to begin anew (a run can start from that checkpoint)')


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        raise RuntimeError(f'{path} cannot be read as a checkpoint of a distillation ({error}): remove it to begin '
                           'anew') from error


def _save(trainer: _Trainer, about: dict[str, Any], out: pathlib.Path, keep: bool) -> None:
    with written_whole(out / CHECKPOINT) as part:
        torch.save(dict(trainer.state(), about=about), part)
    export(trainer.weights(), out / WEIGHTS, trainer.seen)
    if keep:
        (out / 'kept').mkdir(exist_ok=True)
        export(trainer.weights(), out / 'kept' / f'{trainer.seen:09}.safetensors', trainer.seen)


def export(weights: dict[str, Tensor], path: pathlib.Path, seen: int) -> None:
    """Writes weights as safetensors."""
    with written_whole(path) as part:
        safetensors.torch.save_file(weights, part, dict(format='pt', pictures=str(seen)))


def distill(
        model: str | nn.Module,
        teacher: Any,
        sources: Sequence[str | os.PathLike],
        out: str | os.PathLike,
        settings: Settings | None = None,
        pictures: int | None = None,
        minutes: float | None = None,
        start: str | os.PathLike | None = None,
        teacher_weights: str | os.PathLike | None = None,
        save_minutes: float = 5.,
        keep_pictures: int | None = None,
        store: str | os.PathLike | None = None,
        workers: int = 0,
        device: str | torch.device | None = None,
        tell: Callable[[str], None] = print,
        tell_seconds: float = 30.,
) -> dict[str, Any]:
    """Trains a network on unlabelled pictures to answer as a teacher does; goes on with what lies in `out`."""
    settings = settings or Settings()
    out = pathlib.Path(out)
    device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = not distributed or torch.distributed.get_rank() == 0
    out.mkdir(parents=True, exist_ok=True)
    files = Files(sources)
    side = max(size.pixels for size in settings.sizes) * 3 // 2
    path = pathlib.Path(store or out / 'pictures.bin')
    if first:
        Store.of(files, side, path, tell)
    if distributed:
        torch.distributed.barrier()
    views = Views(Store.of(files, side, path, tell), settings.seed, (settings.crop, 1.))
    if isinstance(teacher, str):
        teacher = load_teacher(teacher, teacher_weights)
    if not isinstance(teacher, Teacher):
        teacher = Teacher(teacher, settings.levels)
    torch.manual_seed(settings.seed)
    name = model if isinstance(model, str) else type(model).__name__
    if isinstance(model, str):
        model = timm.create_model(model, num_classes=1000)
    trainer = _Trainer(model, teacher, views, settings, device, workers)
    about = dict(model=name, pictures=files.digest(), processes=trainer.world, settings=json.loads(json.dumps(
        dataclasses.asdict(settings))))
    if (out / CHECKPOINT).exists():
        state = _read(out / CHECKPOINT)
        _same(about, state['about'], out / CHECKPOINT)
        trainer.load(state)
        tell(f'goes on behind {trainer.seen} pictures')
    elif start is not None:
        trainer.load(_read(pathlib.Path(start)))
        trainer.begun, trainer.seconds = trainer.seen, 0.
        tell(f'starts from {start}, which has seen {trainer.seen} pictures')
    sums: dict[str, float] = {}
    count, kept = 0, trainer.seen
    told = saved = last = time.monotonic()
    told_seen = trainer.seen

    def progress() -> float:
        done = [0.]
        if pictures:
            done.append((trainer.seen - trainer.begun) / pictures)
        if minutes:
            done.append(trainer.seconds / 60 / minutes)
        return max(done)

    with _stops() as stops:
        while True:
            done = progress()
            stop = done >= 1 or bool(stops)
            if trainer.world > 1:
                both = torch.tensor([done, stop], dtype=torch.float64, device=device)
                torch.distributed.broadcast(both, 0)
                done, stop = float(both[0]), bool(both[1])
            now = time.monotonic()
            trainer.seconds += now - last
            last = now
            if first and count and (stop or now - told >= tell_seconds):
                rate = (trainer.seen - told_seen) / (now - told)
                means = {key: value / count for key, value in sums.items()}
                left = trainer.seconds * (1 - done) / done if done else None
                line = dict(pictures=trainer.seen, rate=round(rate, 1), seconds=round(trainer.seconds),
                            size=trainer.size(trainer.seen).pixels) | {k: float(f'{v:.4g}') for k, v in means.items()}
                with open(out / LOG, 'a') as log:
                    log.write(json.dumps(line) + '\n')
                tell(f'{trainer.seen} pictures, {rate:.1f} a second' + (
                    f', {left / 60:.0f} minutes left' if left is not None else '') + ': '
                    + ', '.join(f'{key} {value:.3g}' for key, value in means.items()))
                sums, count, told, told_seen = {}, 0, now, trainer.seen
            keep = bool(keep_pictures) and trainer.seen // (keep_pictures or 1) > kept // (keep_pictures or 1)
            if first and (stop or keep or now - saved >= 60 * save_minutes):
                _save(trainer, about, out, keep or stop)
                saved = time.monotonic()
                kept = trainer.seen
            if stop:
                break
            for key, value in trainer.step(done).items():
                sums[key] = sums.get(key, 0.) + value
            count += 1
    return dict(pictures=trainer.seen, seconds=trainer.seconds, stopped=stops[0] if stops else None)
