"""Stopped, killed, out of room, and gone on with: to the bit what an undisturbed run leaves behind."""
import errno
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from tests.extract.noise_pictures import MODEL, noise

from san_backbones.extract import Settings, Share, extract, job, partitions

parquet = pytest.importorskip('pyarrow.parquet', reason='needs the features extra')

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = Settings(size=(32, 32), batch_size=2, partition=3)


def run(folder, out, settings=SETTINGS, model=MODEL, **options):
    return extract(folder, out, model, settings, **(dict(workers=0, progress=False) | options))


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob('*') if path.is_file()}


@pytest.fixture
def many(tmp_path):
    for seed in range(14):
        noise(tmp_path / 'in' / f'{seed:02d}.png', seed=seed)
    (tmp_path / 'in' / '05.png').write_bytes(b'no picture')
    return tmp_path / 'in'


@pytest.fixture
def whole(many, tmp_path):
    run(many, tmp_path / 'whole')
    return contents(tmp_path / 'whole')


def test_whole_partitions_are_left_alone(many, whole, tmp_path):
    assert sorted(whole) == ['errors.parquet', *(f'features/000000-{i:06d}.parquet' for i in range(5)), 'job.json']
    first, last = (tmp_path / 'whole' / 'features' / f'000000-00000{i}.parquet' for i in (1, 4))
    before = first.stat().st_mtime_ns
    last.unlink()
    assert run(many, tmp_path / 'whole').complete
    assert first.stat().st_mtime_ns == before and contents(tmp_path / 'whole') == whole


def test_workers_change_nothing(many, whole, tmp_path):
    for workers in (1, 3):
        run(many, tmp_path / str(workers), workers=workers)
        assert contents(tmp_path / str(workers)) == whole


@pytest.mark.parametrize('pool', ['avg', 'none'])
def test_an_error_under_way(pool, many, tmp_path, monkeypatch):
    """A disk that is full, at any write: the error is told, nothing half done stays, and the same call goes on."""
    settings = Settings(size=(32, 32), batch_size=2, partition=3, pool=pool)
    run(many, tmp_path / 'whole', settings)
    replace = os.replace
    for fails in range(1, 20):
        count = 0

        def full(source, target):
            nonlocal count
            count += 1
            if count == fails:
                raise OSError(errno.ENOSPC, 'No space left on device', str(target))
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, 'replace', full)
            try:
                run(many, tmp_path / 'out', settings)
                break
            except OSError as error:
                assert error.errno == errno.ENOSPC
        there = contents(tmp_path / 'out')
        assert all(content == (tmp_path / 'whole' / name).read_bytes() for name, content in there.items())
        assert not list((tmp_path / 'out').glob('.writing*'))
    else:
        pytest.fail('never came to an end')
    assert fails > 3 and contents(tmp_path / 'out') == contents(tmp_path / 'whole')


@pytest.mark.skipif(sys.platform == 'win32', reason='limits of Unix')
def test_a_file_that_may_not_grow(many, whole, tmp_path):
    """The system refuses to write, in the middle of a partition."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
            try:
                run(many, tmp_path / 'out')
            except OSError as error:
                status = 7 if 'File too large' in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert run(many, tmp_path / 'out').complete and contents(tmp_path / 'out') == whole


@pytest.mark.parametrize('change, words', [
    (dict(model='test_san_pairwise', random=True), 'model: test_san_patchwise there, test_san_pairwise asked for'),
    (dict(random=True), 'digest of the weights: sha256:'),
    (dict(settings=Settings(size=(48, 48), partition=3)), r'transform: size \[32, 32\] there, size \[48, 48\] asked'),
    (dict(settings=Settings(size=(32, 32), partition=3, draft=False)), 'transform: draft True there, draft False'),
    (dict(settings=Settings(whole=True, partition=3)), 'transform: '),
    (dict(settings=Settings(size=(32, 32), partition=4)), 'settings: partition 3 there, partition 4 asked for'),
    (dict(settings=Settings(size=(32, 32), partition=3, pool='max')), 'settings: pool avg there, pool max'),
    (dict(settings=Settings(size=(32, 32), partition=3, dtype='float16')), 'dtype float32 there, dtype float16'),
    (dict(settings=Settings(size=(32, 32), partition=3, precision='bf16')), 'precision fp32 there, precision bf16'),
    (dict(settings=Settings(size=(32, 32), partition=3, stages=(1,))), r'stages \[4\] there, stages \[1\]'),
    (dict(settings=Settings(size=(32, 32), partition=3, logits=True)), 'logits False there, logits True'),
    (dict(folder='in/00.png'), 'source: sha256:')])
def test_another_job_in_the_same_folder_is_refused(change, words, many, whole, tmp_path):
    change = dict(change)
    given = tmp_path / change.pop('folder', 'in')
    with pytest.raises(ValueError, match=f'features that were made otherwise: .*{words}.*Name another folder'):
        run(given, tmp_path / 'whole', **change)
    assert contents(tmp_path / 'whole') == whole
    run(many, tmp_path / 'whole', Settings(size=(32, 32), batch_size=3, partition=3))  # which decides nothing


def test_weights_that_were_written_to_are_other_weights(many, whole, tmp_path):
    model = timm.create_model(MODEL, pretrained=True)
    with torch.no_grad():
        model.head.fc.bias[0] += 1
    with pytest.raises(ValueError, match='digest of the weights'):
        run(many, tmp_path / 'whole', model=model)


def test_another_version_is_refused(many, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(job, '__version__', '9.9')
    with pytest.raises(ValueError, match='version of san-backbones: .* there, 9.9 asked for'):
        run(many, tmp_path / 'whole')


@pytest.mark.parametrize('change', ['more', 'less', 'other', 'touched'])
def test_another_source_is_refused(change, many, whole, tmp_path):
    path = many / '07.png'
    if change == 'more':
        noise(many / '15.png')
    elif change == 'less':
        path.unlink()
    elif change == 'other':
        noise(path, 50, 50)
    else:
        os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match='source: sha256'):
        run(many, tmp_path / 'whole')
    assert contents(tmp_path / 'whole') == whole


def test_a_source_that_changes_under_way(many, tmp_path, monkeypatch):
    close, count = partitions.Partition.close, 0

    def then(self, ends_shard):
        nonlocal count
        close(self, ends_shard)
        count += 1
        if count == 2:
            noise(many / '01.png', 50, 50, 99)

    monkeypatch.setattr(partitions.Partition, 'close', then)
    with pytest.raises(ValueError, match='the source changed while it was read.*begin anew'):
        run(many, tmp_path / 'out')
    with pytest.raises(ValueError, match='source: sha256'):
        run(many, tmp_path / 'out')


def test_other_folders_are_refused(many, tmp_path):
    noise(tmp_path / 'photos' / 'a.png')
    with pytest.raises(ValueError, match=r'photos is not empty, and no folder of features \(it has a.png\)'):
        run(many, tmp_path / 'photos')
    with pytest.raises(ValueError, match='is within .*in, where pictures are looked for'):
        run(many, many / 'out')
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'job.json').write_text('{')
    with pytest.raises(ValueError, match='job.json cannot be read'):
        run(many, tmp_path / 'broken')


def test_a_partition_that_was_damaged_is_named(many, whole, tmp_path):
    path = tmp_path / 'whole' / 'features' / '000000-000001.parquet'
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match='000000-000001.parquet cannot be read as a partition.*remove it'):
        run(many, tmp_path / 'whole')
    path.unlink()
    run(many, tmp_path / 'whole')
    assert contents(tmp_path / 'whole') == whole


def test_the_schema_says_how_it_was_made(many, whole, tmp_path):
    for path in (tmp_path / 'whole' / 'features').iterdir():
        metadata = {key.decode(): value.decode() for key, value in parquet.read_schema(path).metadata.items()}
        noted = json.loads((tmp_path / 'whole' / 'job.json').read_text())
        for name in ('version', 'model', 'weights', 'transform', 'settings', 'source'):
            value = metadata[f'san_backbones.{name}']
            assert (value if isinstance(noted[name], str) else json.loads(value)) == noted[name]
    assert noted['model'] == MODEL and noted['transform']['size'] == [32, 32]


class TestShares:

    @pytest.mark.parametrize('ranks', [2, 3, 7])
    def test_each_its_part(self, ranks, many, whole, tmp_path):
        for rank in reversed(range(ranks)):
            report = run(many, tmp_path / 'out', share=Share(rank, ranks))
            names = {name for name in contents(tmp_path / 'out') if name.startswith('features')}
            assert report.complete == (rank == 0)
            assert {f'features/000000-{i:06d}.parquet' for i in range(rank, 5, ranks)} <= names
            assert (tmp_path / 'out' / 'errors.parquet').exists() == report.complete
        assert contents(tmp_path / 'out') == whole

    def test_another_number_of_processes_goes_on(self, many, whole, tmp_path):
        run(many, tmp_path / 'out', share=Share(1, 2))
        report = run(many, tmp_path / 'out')
        assert (report.pictures, report.errors) == (14, 1) and contents(tmp_path / 'out') == whole

    @pytest.mark.parametrize('names', [('RANK', 'WORLD_SIZE'), ('SLURM_PROCID', 'SLURM_STEP_NUM_TASKS')])
    def test_of_launchers(self, names, many, whole, tmp_path, monkeypatch):
        for rank in range(2):
            for name, value in zip(names, (rank, 2)):
                monkeypatch.setenv(name, str(value))
            assert run(many, tmp_path / 'out').complete == (rank == 1)
            assert contents(tmp_path / 'out').keys() < whole.keys() or rank
        assert contents(tmp_path / 'out') == whole

    def test_torchrun(self, many, tmp_path):
        """Two processes at the same time."""
        command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=2', '--master-port=29671', '-m',
                   'san_backbones', 'features', str(many), '--out', str(tmp_path / 'out'), '-m', MODEL, '--size', '32',
                   '--partition', '3', '--batch-size', '2', '--workers', '0', '--json']
        environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert '1 of the pictures could not be read' in done.stderr, done.stderr
        run(many, tmp_path / 'whole')
        assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')

    @pytest.mark.skipif(sys.platform == 'win32', reason='locks of Unix')
    def test_two_of_one_share_are_refused(self, many, tmp_path):
        folder = partitions.Folder(tmp_path / 'out')
        (tmp_path / 'out').mkdir()
        with folder.writing():
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    run(many, tmp_path / 'out')
                except ValueError as error:
                    status = 7 if 'another process is writing into' in str(error) else 2
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    def test_what_other_shares_left_is_removed(self, many, whole, tmp_path):
        left = tmp_path / 'out' / '.writing-3-of-4'
        left.mkdir(parents=True)
        (left / 'lock').write_text('')
        (left / '000000-000001.parquet').write_bytes(b'half')
        run(many, tmp_path / 'out')
        assert contents(tmp_path / 'out') == whole


@pytest.mark.skipif(sys.platform == 'win32', reason='signals of Unix')
def test_ctrl_c(tmp_path):
    for seed in range(200):
        noise(tmp_path / 'in' / f'{seed:03d}.png', seed=seed)
    command = [sys.executable, '-m', 'san_backbones', 'features', str(tmp_path / 'in'), '--out', str(tmp_path / 'out'),
               '-m', MODEL, '--size', '128', '--partition', '4', '--workers', '1']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    # a suite that runs in the background has its processes ignore SIGINT
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while job.poll() is None and not list((tmp_path / 'out').glob('features/*.parquet')):
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    out, told = job.communicate()
    assert (job.returncode, out) == (1, ''), told
    assert 'the same command goes on' in told and 'Traceback' not in told
    assert not list((tmp_path / 'out').glob('.writing*'))
    assert len(list((tmp_path / 'out').glob('features/*.parquet'))) < 50


class TestProgress:

    def test_silent_unless_on_a_terminal(self, many, tmp_path, capfd):
        run(many, tmp_path / 'out', progress=None)
        assert capfd.readouterr() == ('', '')

    def test_pictures_and_time_left(self, many, tmp_path, capfd):
        run(many, tmp_path / 'half', share=Share(0, 2))
        run(many, tmp_path / 'half', progress=True)
        told = capfd.readouterr().err
        assert '14/14' in told and 'pictures/s' in told
        assert ' 0/14' not in told  # goes on from what is there
