"""Kills jobs at random times and at exact moments, and starts them again.

A job runs in a forked child of a process that has imported everything already, so a child only costs its own work.
Children are killed by SIGKILL after a random time, or just before or after one of their changes to files: opening for
writing, renaming, removing. Linux and macOS.
"""
import collections
import contextlib
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from tests.hub_server import HubServer

PATIENCE = 300  # seconds
CHANGES = {'os.rename', 'os.remove', 'os.mkdir', 'os.link', 'os.symlink', 'os.truncate', 'os.rmdir'}


class Moment(NamedTuple):
    """When to kill a child: after some seconds, or before or after a change to files."""
    kind: str  # 'time', 'before', 'after'
    at: float  # seconds, or number of the change, from 1
    delay: float = 0.  # seconds after the change


class Ended(NamedTuple):
    status: int  # as in subprocess: -9 for a killed child
    output: str
    seconds: float
    changes: int


def _is_change(event: str, arguments: tuple, folder: str) -> bool:
    if event == 'open':
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR) if isinstance(flags, int) else set(mode or '') & set('wax+')
        return bool(writes) and isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(folder)
    return event in CHANGES and any(
        isinstance(a, (str, bytes, os.PathLike)) and os.fsdecode(a).startswith(folder) for a in arguments)


def run(work: Callable[[], None], folder: pathlib.Path, moment: Moment | None = None) -> Ended:
    """Runs `work` in a child, to its end or to a moment; counts changes to files below `folder`."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as counter:
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
                sys.stdout, sys.stderr = (os.fdopen(stream, 'w', closefd=False) for stream in (1, 2))
                changes = 0

                def watch(event, arguments):
                    nonlocal changes
                    if not _is_change(event, arguments, str(folder)):
                        return
                    changes += 1
                    if moment is not None and changes == moment.at and moment.kind == 'before':
                        os.kill(os.getpid(), signal.SIGKILL)
                    elif moment is not None and changes == moment.at and moment.kind == 'after':
                        signal.setitimer(signal.ITIMER_REAL, max(moment.delay, 1e-6))  # SIGALRM is not caught

                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                sys.addaudithook(watch)
                work()
                os.write(counter.fileno(), str(changes).encode())
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        if moment is not None and moment.kind == 'time':
            time.sleep(moment.at)
            os.kill(child, signal.SIGKILL)
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - start > PATIENCE:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise AssertionError('deadlock')
            time.sleep(0.002)
        seconds = time.monotonic() - start
        output.seek(0)
        counter.seek(0)
        return Ended(os.waitstatus_to_exitcode(status), output.read().decode(errors='replace'), seconds,
                     int(counter.read() or b'0'))


class Job:
    """A job that can be interrupted."""

    name = ''

    def open(self, folder: pathlib.Path) -> None:
        """Prepares the job in a fresh folder, in the parent."""

    def close(self) -> None:
        """Releases what `open` acquired."""

    def work(self) -> None:
        """Does the job, in the child; an exception is a failure."""
        raise NotImplementedError

    def remember(self) -> None:
        """Stores the result of a complete run as the expected result."""
        raise NotImplementedError

    def check_killed(self) -> None:
        """Fails if an incomplete result would be accepted as complete."""

    def check_done(self) -> None:
        """Fails unless the result equals that of a complete run."""
        raise NotImplementedError


def _whole_runs(job: Job, base: pathlib.Path) -> tuple[float, int]:
    """Runs the job twice without interruption; returns seconds and changes of the second run."""
    for _ in range(2):
        with _fresh(job, base) as folder:
            ended = run(job.work, folder)
            assert ended.status == 0, ended.output
            job.remember()
            job.check_done()
    assert ended.changes, f'{job.name} changes no file'
    return ended.seconds, ended.changes


@contextlib.contextmanager
def _fresh(job: Job, base: pathlib.Path) -> Iterator[pathlib.Path]:
    folder = base / 'trial'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job.open(folder)
    try:
        yield folder
    finally:
        job.close()


def interrupt(job: Job, base: pathlib.Path, kills: int, exact: int, seed: int = 0) -> dict[str, Any]:
    """Kills a job `kills` times after a random time and `exact` times at changes to files; runs it again each time.

    Returns:
        Figures: how many were killed, how many had ended before (not counted in `kills`), seconds and changes of a
        complete run.

    Raises:
        AssertionError: An incomplete result was accepted, or running again did not complete it.
    """
    rng = random.Random(seed)
    seconds, changes = _whole_runs(job, base)
    points = [(kind, at) for kind in ('before', 'after') for at in range(1, changes + 1)]
    chosen = rng.sample(points, min(exact, len(points))) + rng.choices(points, k=max(0, exact - len(points)))
    moments = [Moment(kind, at, 10 ** rng.uniform(-6, -2)) for kind, at in chosen]
    figures: collections.Counter = collections.Counter()
    latest = seconds  # lowered if runs are now faster than the complete one, as on a machine that was busy then
    while moments or figures['killed after a random time'] < kills:
        moment = moments.pop() if moments else Moment('time', rng.uniform(0, latest))
        with _fresh(job, base) as folder:
            ended = run(job.work, folder, moment)
            assert ended.status <= 0, f'{job.name} failed before it was killed at {moment}:\n{ended.output}'
            kind = 'after a random time' if moment.kind == 'time' else 'at a change'
            figures[f'killed {kind}' if ended.status else 'ended before'] += 1
            if moment.kind == 'time':
                latest = seconds if ended.status else moment.at
            assert figures['ended before'] <= 10 + 3 * (kills + exact), 'nearly every kill comes too late'
            try:
                job.check_killed()
                again = run(job.work, folder)
                assert again.status == 0, again.output
                job.check_done()
            except Exception as error:
                raise AssertionError(f'{job.name}, killed at {moment} of {seconds:.2f} s and {changes} changes: '
                                     f'{type(error).__name__}: {error}') from error
    return dict(job=job.name, seed=seed, **figures, seconds=round(seconds, 2), changes=changes)


# --- The jobs --------------------------------------------------------------------------------------------------------

def _contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}


def _assert_equal(found: Any, expected: Any, where: str = '') -> None:
    """Compares nested dicts and lists of tensors and plain values bit for bit."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            _assert_equal(found[key], expected[key], f'{where}.{key}')
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            _assert_equal(found[i], value, f'{where}[{i}]')
    else:
        assert found == expected, where


class Training(Job):
    """MMEngine's Runner with ExactResumeHook, augmentation and stochastic depth; each run asks to resume."""

    def __init__(self, pictures: pathlib.Path, loop: str = 'iters', keep: int = -1):
        from tests.mm import tiny_training
        self.tiny, self.keep = tiny_training, keep
        self.pictures = pictures if (pictures / 'coco.json').exists() else tiny_training.make_pictures(pictures)
        self.loop, self.name = dict(iters=dict(iters=6), epochs=dict(epochs=2))[loop], f'training by {loop}'
        self.expected: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:  # runs once for imports on first use
            self.folder = pathlib.Path(folder)
            self.work()

    def open(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def work(self) -> None:
        config = self.tiny.segmentation(
            self.pictures, self.folder, augment=True, batch_size=1, dropout=0.3, backbone=dict(drop_path_rate=0.3),
            custom_hooks=[dict(type='ExactResumeHook')], **self.loop)
        for part in ('val', 'test'):
            for what in ('cfg', 'dataloader', 'evaluator'):
                config[f'{part}_{what}'] = None
        config.train_cfg.pop('val_interval')
        config.default_hooks.checkpoint.max_keep_ckpts = self.keep
        config.resume = True
        self.tiny.train(config)

    def _checkpoints(self) -> dict[str, Any]:
        from mmengine.runner.checkpoint import CheckpointLoader
        found = {}
        for path in sorted(self.folder.glob('*.pth')):
            try:
                content = CheckpointLoader.load_checkpoint(str(path), map_location='cpu', logger='silent')
            except RuntimeError as error:
                assert str(path) in str(error) and 'remove it' in str(error)
            else:
                found[path.name] = {key: content[key] for key in ('state_dict', 'optimizer', 'param_schedulers')}
        return found

    def remember(self) -> None:
        found = self._checkpoints()
        if self.expected:
            _assert_equal(found, self.expected)
        self.expected = found

    def check_killed(self) -> None:
        for name, content in self._checkpoints().items():
            if name in self.expected:
                _assert_equal(content, self.expected[name], name)

    def check_done(self) -> None:
        _assert_equal(self._checkpoints(), self.expected)


class _HubJob(Job):
    def open(self, folder: pathlib.Path) -> None:
        self.folder, self.hub = folder, HubServer()
        self.hub.__enter__()

    def close(self) -> None:
        self.hub.__exit__()

    def _use_hub(self, **more: Any) -> None:
        from huggingface_hub import constants
        template = self.hub.endpoint + '/{repo_id}/resolve/{revision}/{filename}'
        for name, value in dict(ENDPOINT=self.hub.endpoint, HUGGINGFACE_CO_URL_TEMPLATE=template, HF_HUB_OFFLINE=False,
                                HF_HUB_DISABLE_XET=True, HF_HUB_DISABLE_PROGRESS_BARS=True, **more).items():
            setattr(constants, name, value)


class Download(_HubJob):
    """`hub.weights`, from a slow Hub."""
    name = 'download'

    def __init__(self):
        from safetensors.torch import save

        from san_backbones import hub
        self.weights = hub.weights
        self.content = save({'weight': torch.rand(1 << 17, generator=torch.Generator().manual_seed(0))})

    def open(self, folder: pathlib.Path) -> None:
        super().open(folder)
        self.hub.put('org/name', 'model.safetensors', self.content)
        self.hub.fault('*/model.safetensors', method='GET', times=None, drip=(1 << 15, 0.01))
        self.hub.fault('/cdn/*', method='GET', times=None, drip=(1 << 15, 0.01))

    def _get(self) -> bytes:
        return pathlib.Path(self.weights('org/name', cache_dir=self.folder / 'cache')).read_bytes()

    def work(self) -> None:
        self._use_hub()
        assert self._get() == self.content

    def _get_offline(self) -> None:
        from san_backbones.hub import WeightsError
        self._use_hub()
        from huggingface_hub import constants
        constants.HF_HUB_OFFLINE = True
        try:
            assert self._get() == self.content
        except WeightsError as error:
            assert 'model.safetensors' in str(error) and 'HF_HUB_OFFLINE' in str(error)

    def remember(self) -> None:
        pass

    def check_killed(self) -> None:
        ended = run(self._get_offline, self.folder)
        assert ended.status == 0, ended.output
        for path in self.folder.rglob('model.safetensors'):
            assert path.read_bytes() == self.content

    def check_done(self) -> None:
        path, = self.folder.rglob('model.safetensors')
        assert path.read_bytes() == self.content


def _released(path: pathlib.Path, seed: int) -> None:
    """Writes a file in the authors' format."""
    from tests import oracle
    from tests.weights.small_models import SPECS
    state = oracle.random_tensors(oracle.state_shapes(SPECS['test_san_patchwise'], 1000), seed)
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    torch.save(oracle.released_checkpoint(state), path)


def _manifest(path: pathlib.Path) -> None:
    entry = dict(architecture='test_san_patchwise', tag='in1k', drive_id='drive-id', source_file='model_best.pth',
                 source_sha256=None, sha256=None, parameters=1, paper_top1=74.9, paper_top5=92.1, measured=None,
                 license='mit')
    path.write_text(json.dumps({'models': {'test_san_patchwise.in1k': entry}}))


class Conversion(Job):
    """`weights convert`, into a new folder, or over another checkpoint's conversion."""

    def __init__(self, base: pathlib.Path, over: bool = False):
        from san_backbones.weights import convert
        self.main, self.name = convert.main, 'conversion over another' if over else 'conversion'
        base.mkdir(parents=True, exist_ok=True)
        self.sources = [base / 'other.pth', base / 'model_best.pth']
        for seed, source in enumerate(self.sources):
            _released(source, seed)
        self.manifest = base / 'manifest.json'
        _manifest(self.manifest)
        self.before: dict[str, bytes] = {}
        self.expected: dict[str, bytes] = {}
        if over:
            self.folder = base
            self.convert(self.sources[0])
            self.before = _contents(base / 'out')

    def convert(self, source: pathlib.Path) -> None:
        words = [source, '--model', 'test_san_patchwise', '--out', self.folder / 'out', '--manifest', self.manifest]
        assert self.main([str(word) for word in words] + ['--force'] * bool(self.before)) == 0

    def open(self, folder: pathlib.Path) -> None:
        self.folder = folder
        if self.before:
            (folder / 'out').mkdir()
            for name, content in self.before.items():
                (folder / 'out' / name).write_bytes(content)

    def work(self) -> None:
        self.convert(self.sources[1])

    def remember(self) -> None:
        self.expected = _contents(self.folder / 'out')
        assert len(self.expected) == 3 and self.expected != self.before

    def check_killed(self) -> None:
        found = {name: content for name, content in _contents(self.folder / 'out').items() if not name.endswith('.tmp')}
        for name, content in found.items():
            assert content in (self.expected[name], self.before.get(name)), name
        if 'model.safetensors' in found:  # never with the config and the card of another checkpoint
            assert found in (self.expected, self.before)

    def check_done(self) -> None:
        assert _contents(self.folder / 'out') == self.expected


class FirstUse(Job):
    """`authors.weights`: gdown from a slow Google Drive that asks for confirmation, and the conversion.

    A partial download is resumed or restarted, also by a second process.
    """
    name = 'first use'

    def __init__(self, base: pathlib.Path):
        import gdown  # noqa: F401, imported before the children are forked

        from san_backbones import hub
        from san_backbones.weights import authors, convert  # noqa: F401
        self.hub, self.authors = hub, authors
        base.mkdir(parents=True, exist_ok=True)
        _released(base / 'source.pth', 1)
        self.content = (base / 'source.pth').read_bytes()
        _manifest(base / 'manifest.json')
        self.manifest = json.loads((base / 'manifest.json').read_text())['models']
        self.base = base

    def open(self, folder: pathlib.Path) -> None:
        from tests.drive_server import DriveServer
        self.folder, self.drive = folder, DriveServer(self.base / 'server')
        self.drive.put('drive-id', self.content)
        self.drive.page, self.drive.step, self.drive.pause = 'confirm', 1 << 15, 0.01
        self.drive.__enter__()

    def close(self) -> None:
        self.drive.__exit__()

    def _get(self, offline: bool) -> pathlib.Path:
        from huggingface_hub import constants
        os.environ.update(self.drive.environment, SAN_BACKBONES_CACHE=str(self.folder / 'cache'),
                          SAN_BACKBONES_AUTHORS='1')
        constants.HF_HUB_OFFLINE = offline
        self.hub.manifest = lambda: self.manifest
        return self.authors.weights('test_san_patchwise.in1k')

    def work(self) -> None:
        self._get(False)

    def _get_offline(self) -> None:
        try:
            assert self._get(True).read_bytes() == self.expected
        except self.hub.WeightsError as error:
            assert 'HF_HUB_OFFLINE' in str(error)

    def remember(self) -> None:
        path, = self.folder.rglob('model.safetensors')
        self.expected = path.read_bytes()

    def check_killed(self) -> None:
        ended = run(self._get_offline, self.folder)
        assert ended.status == 0, ended.output
        for path in self.folder.rglob('model.safetensors'):
            assert path.read_bytes() == self.expected

    def check_done(self) -> None:
        folder = self.folder / 'cache' / 'test_san_patchwise.in1k'
        found = {path.name: path for path in folder.iterdir()}
        assert found.keys() == {'.lock', 'provenance.json', 'model.safetensors'}, found
        assert found['model.safetensors'].read_bytes() == self.expected


class Publishing(_HubJob):
    """`weights publish`, with a slow Google Drive and a slow Hub."""
    name = 'publishing'

    def __init__(self, base: pathlib.Path):
        from san_backbones.weights import authors, publish
        self.main, self.authors = publish.main, authors
        base.mkdir(parents=True, exist_ok=True)
        self.source = base / 'drive.pth'
        _released(self.source, 1)
        self.expected: dict[str, bytes] = {}

    def open(self, folder: pathlib.Path) -> None:
        super().open(folder)
        self.hub.add_token('secret', 'someone', organisations=['org'])
        self.hub.fault('/cdn/*', method='GET', times=None, drip=(1 << 17, 0.01))
        _manifest(folder / 'manifest.json')

    def _fetch(self, url: str, path: pathlib.Path, title: str) -> bool:
        content = self.source.read_bytes()
        part = path.with_suffix('.part')  # as gdown does
        with open(part, 'wb', buffering=0) as file:
            for start in range(0, len(content), 1 << 17):
                file.write(content[start:start + (1 << 17)])
                time.sleep(0.01)
        os.replace(part, path)
        return True

    def work(self) -> None:
        from huggingface_hub import HfApi
        self.authors._fetch = self._fetch
        self._use_hub(HF_HUB_CACHE=str(self.folder / 'cache'))
        os.environ.update(SAN_BACKBONES_AUTHORS='1', SAN_BACKBONES_CACHE=str(self.folder / 'authors'))
        tempfile.tempdir = str(self.folder)
        words = ['--org', 'org', '--work', str(self.folder / 'work'), '--manifest', str(self.folder / 'manifest.json')]
        api = HfApi(endpoint=self.hub.endpoint, token='secret')
        assert self.main([*words, '--all'], api=api) == 0

    def _published(self) -> dict[str, bytes]:
        try:
            files = self.hub.files('org/test_san_patchwise.in1k')
        except Exception:
            return {}
        return {name: content for name, content in files.items() if name != '.gitattributes'}

    def _digests(self) -> tuple:
        entry = json.loads((self.folder / 'manifest.json').read_text())['models']['test_san_patchwise.in1k']
        return entry['source_sha256'], entry['sha256']

    def remember(self) -> None:
        self.expected = self._published()
        assert len(self.expected) == 3
        self.digests = tuple(hashlib.sha256(content).hexdigest() for content in (
            self.source.read_bytes(), self.expected['model.safetensors']))

    def check_killed(self) -> None:
        published = self._published()
        assert published in ({}, self.expected)
        assert self._digests() in ((None, None), self.digests)
        assert published or self._digests() == (None, None), 'recorded before it was published'

    def check_done(self) -> None:
        assert self._published() == self.expected and self._digests() == self.digests
        assert len(self.hub.commits('org/test_san_patchwise.in1k')) == 2  # the first makes the repository


class Extraction(Job):
    """`extract`, from single pictures, some of them broken, and a tar."""

    def __init__(self, base: pathlib.Path, pool: str = 'avg', workers: int = 0):
        import tarfile

        import numpy as np
        from PIL import Image

        from san_backbones import extract
        self.extract, self.pool, self.workers = extract, pool, workers
        self.name = f'features, {"maps" if pool == "none" else "vectors"}, {workers} workers'
        self.pictures = base / 'pictures'
        self.pictures.mkdir(parents=True, exist_ok=True)
        draw = np.random.default_rng(0)
        with tarfile.open(self.pictures / 'shard.tar', 'w') as tar:
            for number in range(12):
                path = self.pictures / f'{number:02d}.png'
                Image.fromarray(draw.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
                if number % 5 == 2:
                    path.write_bytes(path.read_bytes()[:100])
                tar.add(path, f'{number}.png')
        self.expected: dict[str, bytes] = {}

    def open(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def work(self) -> None:
        report = self.extract.extract(
            self.pictures, self.folder / 'out', 'test_san_patchwise', self.extract.Settings(
                size=(32, 32), partition=5, batch_size=2, pool=self.pool), workers=self.workers, progress=False)
        assert (report.complete, report.pictures, report.rows, report.errors) == (True, 24, 20, 4)

    def _contents(self, *, hidden: bool = True) -> dict[str, bytes]:
        out = self.folder / 'out'
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob('*')
                if path.is_file() and (hidden or not any(part.startswith('.') for part in path.parts))}

    def remember(self) -> None:
        self.expected = self._contents()
        parts = [name for name in self.expected if name.startswith('features')]
        assert len(parts) == 6 and {'job.json', 'errors.parquet'} < self.expected.keys()

    def check_killed(self) -> None:
        for name, content in self._contents(hidden=False).items():
            assert content == self.expected[name], name

    def check_done(self) -> None:
        found = self._contents()
        assert found.keys() == self.expected.keys()
        for name, content in found.items():
            assert content == self.expected[name], name
