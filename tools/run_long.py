"""Searches memory leaks: long trainings, many inference calls, and models made, loaded and deleted repeatedly.

    python -m tools.run_long [training calls lives loads] [--steps 2000] [--calls 10000] [--rounds 200]

Prints a line for each run: memory after a warm-up and at the end, growth, and time. Exit status 1 if any run grew by
more than BOUNDS and NOISE. The runs of SANBackbone need the mm extra.
"""
import argparse
import array
import copy
import ctypes
import gc
import importlib.util
import io
import itertools
import os
import pickle
import random
import statistics
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F

import san_backbones
from san_backbones import ops

WINDOWS, WARM_UP = 10, 2
"""How often memory is read, and how many first readings do not count."""
NAMES = ('test_san_pairwise', 'test_san_patchwise')


# --- What is read ----------------------------------------------------------------------------------------------------

class Reading(NamedTuple):
    """Memory in use; None if the platform does not report it."""
    tensors: int  # Python tensors made since the run began
    objects: int  # objects that Python's collector tracks, made since the run began
    blocks: int  # blocks of Python's allocator, also of objects that the collector does not track
    heap: int | None  # bytes allocated by malloc: everything that torch and the native loops hold
    rss: int | None  # bytes of resident memory, after malloc returned what it could


BOUNDS = Reading(tensors=0, objects=20, blocks=200, heap=100_000, rss=1_000_000)
"""Accepted growth per 1,000 repetitions. One small tensor leaked per repetition is 1,000 tensors and objects and, even
if Python does not see it, more than 300,000 bytes of heap. Resident memory is less precise: it has fragments, and pages
that are touched late.
"""
NOISE = Reading(tensors=0, objects=20, blocks=1000, heap=30_000, rss=4_000_000)
"""Accepted growth over a whole run of any length: free lists of the interpreter, lists that were enlarged."""


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        'arena', 'ordblks', 'smblks', 'hblks', 'hblkhd', 'usmblks', 'fsmblks', 'uordblks', 'fordblks', 'keepcost')]


def _libc() -> ctypes.CDLL | None:
    """Returns glibc, 2.33 or newer, else None."""
    if not sys.platform.startswith('linux'):
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, 'mallinfo2'):
        return None
    libc.mallinfo2.restype = _Mallinfo2
    return libc


LIBC = _libc()


def read() -> Reading:
    """Reads memory in use after a garbage collection."""
    gc.collect()
    blocks = sys.getallocatedblocks()
    heap = rss = None
    if LIBC is not None:
        info = LIBC.mallinfo2()
        heap = info.uordblks + info.hblkhd
        LIBC.malloc_trim(0)
    if os.path.exists('/proc/self/statm'):
        with open('/proc/self/statm') as file:
            rss = int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    everything = gc.get_objects()
    tensors = sum(issubclass(type(x), torch.Tensor) for x in everything)
    return Reading(tensors, len(everything), blocks, heap, rss)


def slope(values: Sequence[int]) -> float:
    """Returns the growth from one value to the next: the median over all pairs.

    A cache that fills once, or a page that is allocated once, does not move the median; a leak moves every pair.
    """
    pairs = itertools.combinations(enumerate(values), 2)
    return statistics.median((b - a) / (j - i) for (i, a), (j, b) in pairs)


class Figures(NamedTuple):
    """The results of a run."""
    name: str
    repetitions: int
    counted: int  # without the warm-up
    seconds: float
    first: Reading  # after the warm-up
    last: Reading
    growth: dict[str, float]  # per 1,000 repetitions

    def excess(self) -> list[str]:
        """Lists what grew by more than is accepted."""
        return [f'{name} grew by {found:.0f} per 1,000, {getattr(BOUNDS, name)} are allowed'
                for name, found in self.growth.items()
                if found > getattr(BOUNDS, name) and found * self.counted / 1000 > getattr(NOISE, name)]

    def __str__(self) -> str:
        def parts(name: str, unit: str, factor: float, digits: int) -> str:
            if name not in self.growth:
                return f'{name} unknown'
            first, last = (getattr(x, name) / factor for x in (self.first, self.last))
            return f'{name} {first:.{digits}f} -> {last:.{digits}f}{unit} ({self.growth[name]:+.0f} per 1,000)'
        return (f'{self.name}: {self.repetitions} in {self.seconds:.0f} s; {parts("tensors", "", 1, 0)}, '
                f'{parts("objects", "", 1, 0)}, {parts("blocks", "", 1, 0)}, {parts("heap", " MB", 1e6, 2)}, '
                f'{parts("rss", " MB", 1e6, 1)}')


def watch(name: str, step: Callable[[int], None], count: int, period: int = 1, windows: int = WINDOWS) -> Figures:
    """Calls step(0), step(1), ... about `count` times, and reads memory at intervals, always after whole periods.

    Objects that existed before do not count, which keeps reading fast.
    """
    length = max(1, count // windows // period) * period
    numbers = itertools.count()
    start = time.monotonic()
    found = {name: array.array('q', [0] * windows) for name in Reading._fields}  # allocated before the first reading
    gc.collect()
    gc.freeze()
    try:
        for window in range(windows):
            for i in itertools.islice(numbers, length):
                step(i)
            for kind, value in read()._asdict().items():
                found[kind][window] = -1 if value is None else value
    finally:
        gc.unfreeze()
    first, last = (Reading(*(None if values[at] < 0 else values[at] for values in found.values()))  # type: ignore
                   for at in (WARM_UP, -1))
    return Figures(name, length * windows, length * (windows - WARM_UP), time.monotonic() - start, first, last,
                   {kind: slope(values[WARM_UP:]) * 1000 / length for kind, values in found.items() if values[0] >= 0})


# --- What is run -----------------------------------------------------------------------------------------------------

def images(count: int, batch: int = 1, largest: int = 128) -> list[torch.Tensor]:
    """Makes images of `count` different sizes."""
    sides = range(32, largest + 1, 2)
    sizes = random.Random(0).sample(list(itertools.product(sides, sides)), count)
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(batch, 3, *size, generator=generator) for size in sizes]


def make(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **options)


def training(model: torch.nn.Module, backend: str, pictures: list[torch.Tensor]) -> Callable[[int], None]:
    """Returns a step of AdamW on images of changing sizes; the model may return logits, or a tuple of maps."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses: list[float] = []

    def step(i: int) -> None:
        with ops.use_backend(backend):
            out = model(pictures[i % len(pictures)])
            out = out if isinstance(out, torch.Tensor) else torch.cat([x.mean((2, 3)) for x in out], 1)
            loss = F.cross_entropy(out, torch.arange(len(out)) % out.shape[1])
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        losses[:] = [loss.item()]
        assert losses[0] < 1e3

    return step


def calls(model: torch.nn.Module, pictures: list[torch.Tensor], mode: Callable = torch.inference_mode
          ) -> Callable[[int], None]:
    """Returns an inference call, with another image size each time."""
    model.eval()

    def step(i: int) -> None:
        with mode():
            model(pictures[i % len(pictures)])

    return step


def lives(name: str) -> Callable[[int], None]:
    """Returns a step that makes, uses and deletes models of every kind; they must be freed without the collector."""
    image = images(1, largest=40)[0]

    def used(model: torch.nn.Module) -> torch.nn.Module:
        with torch.inference_mode():
            model(image)
        return model

    def step(i: int) -> None:
        gc.disable()
        try:
            plain = used(make(name).eval())
            fused = used(san_backbones.fuse_for_inference(make(name).eval()))
            features = used(make(name, features_only=True).eval())
            copied, pickled = used(copy.deepcopy(fused)), used(pickle.loads(pickle.dumps(fused)))
            file = io.BytesIO()
            torch.save(fused, file)
            file.seek(0)
            loaded = used(torch.load(file, weights_only=False))
            trained = make(name)
            training(trained, 'auto', [torch.cat([image, image])])(0)
            thread = threading.Thread(target=used, args=(fused,))
            thread.start()
            thread.join()
            gone = [weakref.ref(module) for model in (plain, fused, features, copied, pickled, loaded, trained)
                    for module in model.modules()]
            del plain, fused, features, copied, pickled, loaded, trained, thread
            alive = [type(ref()).__name__ for ref in gone if ref() is not None]
            assert not alive, f'{len(alive)} modules are still alive: {alive}'
        finally:
            gc.enable()

    return step


def loads(name: str) -> Callable[[int], None]:
    """Returns a step that loads other weights into a fused model, whose outputs must follow."""
    image = images(1, largest=40)[0]
    states, expected = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=3).eval()
        states.append(copy.deepcopy(model.state_dict()))
        with torch.inference_mode():
            expected.append(san_backbones.fuse_for_inference(model)(image))

    def step(i: int) -> None:
        model.load_state_dict(states[i % 2], assign=i % 4 >= 2)  # later loads overwrite the assigned tensors
        with torch.inference_mode():
            assert torch.equal(model(image), expected[i % 2])

    assert not torch.equal(*expected)
    return step


def backbone() -> torch.nn.Module:
    """Returns an MMDetection backbone."""
    from san_backbones.mm import SANBackbone
    torch.manual_seed(0)
    return SANBackbone(arch=dict(attention='pairwise', depths=(1, 1, 1, 1, 1), widths=(32, 64, 64, 96, 128)))


# --- All of it -------------------------------------------------------------------------------------------------------

def runs(kind: str, steps: int, count: int, rounds: int) -> Iterator[Figures]:
    """Does the runs of a kind."""
    if kind == 'training':
        pictures = images(8, batch=2, largest=48)
        for name, backend in itertools.product(NAMES, ('native', 'tiled')):
            if backend in ops.available_backends():
                yield watch(f'training {name}, {backend}', training(make(name), backend, pictures), steps, 8)
        if importlib.util.find_spec('mmdet'):
            yield watch('training SANBackbone', training(backbone(), 'auto', pictures), steps, 8)
    elif kind == 'calls':
        pictures = images(100)
        for name in NAMES:
            for text, model in (('', make(name)), (', fused', san_backbones.fuse_for_inference(make(name)))):
                yield watch(f'calls {name}{text}', calls(model, pictures), count, 100)
        features = san_backbones.fuse_for_inference(make(NAMES[0], features_only=True))
        yield watch(f'calls {NAMES[0]}, features_only, fused, no_grad', calls(features, pictures, torch.no_grad),
                    count // 5, 100)
        with ops.use_backend('tiled'):
            yield watch(f'calls {NAMES[0]}, tiled', calls(make(NAMES[0]), pictures), count // 5, 100)
    else:
        for name in NAMES:
            yield watch(f'{kind} {name}', dict(lives=lives, loads=loads)[kind](name), rounds, 4)


def main() -> int:
    kinds = ['training', 'calls', 'lives', 'loads']
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', nargs='*', choices=[*kinds, []], default=[])
    parser.add_argument('--steps', type=int, default=2000, help='of each training')
    parser.add_argument('--calls', type=int, default=10000, help='of each model; a fifth by slower ways')
    parser.add_argument('--rounds', type=int, default=200, help='of making and deleting, and of loading')
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for kind in options.what or kinds:
        for figures in runs(kind, options.steps, options.calls, options.rounds):
            print(figures, flush=True)
            for text in figures.excess():
                print(f'FAILED: {text}', flush=True)
                failed = True
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
