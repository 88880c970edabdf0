"""A model in several processes and threads at once, as tests/trust/test_concurrency.py starts it.

    python tests/trust/processes.py

Prints a line for each way in which it was run. Any deadlock ends after ten minutes with the stacks of all threads.
"""
import faulthandler
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings

import timm
import torch
from torch.utils.data import DataLoader, Dataset

import san_backbones

TIME = 600
NAMES = ('test_san_pairwise', 'test_san_patchwise')


def make(name: str, fused: bool) -> torch.nn.Module:
    """The same model in every process."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    return san_backbones.fuse_for_inference(model) if fused else model


def image(i: int) -> torch.Tensor:
    return torch.rand(1, 3, 32 + 16 * (i % 3), 48, generator=torch.Generator().manual_seed(i))


def digest(model: torch.nn.Module, i: int) -> str:
    """Which bits the logits of image i have."""
    with torch.inference_mode():
        return hashlib.sha256(model(image(i)).numpy().tobytes()).hexdigest()


def digests(models: list[torch.nn.Module], count: int = 3) -> list[str]:
    return [digest(model, i) for model in models for i in range(count)]


def every_model() -> list[torch.nn.Module]:
    return [make(name, fused) for name in NAMES for fused in (False, True)]


def in_threads(models: list[torch.nn.Module], count: int = 4) -> list[list[str]]:
    """`digests` of that many threads, which start at once."""
    barrier, found = threading.Barrier(count), {}

    def work(i: int) -> None:
        barrier.wait()
        found[i] = digests(models)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(count)]


def anew(_: int) -> list[str]:
    """In a worker: models of its own, first used, loops first loaded, by several threads at once."""
    torch.set_num_threads(1)
    first, *others = in_threads(every_model())
    assert all(other == first for other in others)
    return first


INHERITED: list[torch.nn.Module] = []


def inherited(_: int) -> list[str]:
    """In a forked worker: the models of the parent, in the state in which its calls left them."""
    torch.set_num_threads(1)
    return digests(INHERITED)


class Features(Dataset):
    """What a model makes of pictures, computed by the loader's workers."""

    def __init__(self, models: list[torch.nn.Module]):
        self.models = models

    def __len__(self) -> int:
        return 3 * len(self.models)

    def __getitem__(self, i: int) -> str:
        return digest(self.models[i // 3], i % 3)


def forked(work, more_tries: int = 1) -> None:
    """Runs `work` in a child of os.fork.

    Repeats it if it hangs: a thread that is just ending may hold the lock of MKL's allocator, for which the child then
    waits forever. Torch alone hangs in some of a hundred forks too.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(TIME // 4)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGALRM and more_tries:
        forked(work, more_tries - 1)
    else:
        assert status == 0


def main() -> None:
    faulthandler.register(signal.SIGALRM, chain=True)  # and so for children of fork
    signal.alarm(TIME)
    torch.set_num_threads(1)
    models = every_model()
    INHERITED.extend(models)
    expected = digests(models)

    def same(found: list[str]) -> None:
        assert found == expected

    spawning = multiprocessing.get_context('spawn').Pool(1)  # imports meanwhile
    from_spawn = spawning.map_async(anew, range(1))
    for found in in_threads(models):
        same(found)
    print('threads')
    forked(lambda: same(digests(models)))
    forked(lambda: [same(found) for found in in_threads(models, 3)])
    with multiprocessing.get_context('fork').Pool(2) as forks:
        for found in (*forks.map(anew, range(2)), *forks.map(inherited, range(2))):
            same(found)
    print('fork')
    for _ in range(2):
        same([text for texts in DataLoader(Features(models), batch_size=4, num_workers=2) for text in texts])
    print('loader')
    same(from_spawn.get(TIME)[0])
    spawning.terminate()
    print('spawn')

    # several OpenMP threads: a team of its own for each thread that calls, and none in a child of fork
    torch.set_num_threads(2)
    expected = digests(models)
    for found in in_threads(models):
        same(found)
    print('threads of OpenMP')

    def told_before() -> None:
        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert digests(models) == one_thread

    def told_nothing() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            assert digests(models) == one_thread
        assert torch.get_num_threads() == 1
        said, = {str(warning.message) for warning in caught}
        assert 'set_num_threads(1)' in said

    one_thread = None
    torch.set_num_threads(1)
    one_thread = digests(models)
    torch.set_num_threads(2)
    digests(models)
    forked(told_before)
    print('fork from threads of OpenMP')
    if sys.platform == 'linux' and san_backbones.ops.native.unavailable() is None:
        forked(told_nothing)
        print('fork from threads of OpenMP, warned')


if __name__ == '__main__':
    main()
