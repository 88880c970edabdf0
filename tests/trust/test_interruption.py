"""A few kills of each kind (tools/run_kills.py does many), and files truncated at any offset."""
import logging
import os
import signal
import sys
import types

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save

from san_backbones import _requirements, hub
from san_backbones._files import atomic_write
from tests import drive_server
from tools import kills

if sys.platform == 'win32':
    pytest.skip('kills children of fork', allow_module_level=True)

needs_conversion = pytest.mark.skipif(
    _requirements.older(timm.__version__, _requirements.LEAST_FOR_CONVERSION['timm']),
    reason='config.json needs a newer timm')


needs_drive = pytest.mark.skipif(bool(drive_server.missing()), reason=drive_server.missing() or 'nothing is missing')


def interrupt(job, folder, times, exact):
    figures = kills.interrupt(job, folder / 'trials', times, exact)
    assert figures['killed after a random time'] == times and figures['killed at a change'] >= exact // 2


@needs_conversion
@pytest.mark.parametrize('over', [False, True])
def test_conversion(over, tmp_path):
    job = kills.Conversion(tmp_path / 'files', over)
    interrupt(job, tmp_path, 1, 6)


def test_download(tmp_path):
    interrupt(kills.Download(), tmp_path, 1, 4)


@needs_drive
def test_first_use(tmp_path):
    interrupt(kills.FirstUse(tmp_path / 'files'), tmp_path, 1, 6)


@needs_conversion
def test_publishing(tmp_path):
    interrupt(kills.Publishing(tmp_path / 'files'), tmp_path, 1, 4)


@pytest.mark.parametrize('pool, workers', [('avg', 0), ('none', 1)])
def test_features(pool, workers, tmp_path):
    pytest.importorskip('pyarrow', reason='needs the features extra')
    interrupt(kills.Extraction(tmp_path / 'files', pool, workers), tmp_path, 1, 6)


# --- Trainings -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def training(tmp_path_factory):
    """A training that keeps two checkpoints, and checkpoints of it."""
    pytest.importorskip('mmseg', reason='needs the mm extra')
    folder = tmp_path_factory.mktemp('training')
    with pytest.MonkeyPatch.context() as patch:
        for name in ('mmengine.config.config.FormatCode', 'yapf.yapflib.yapf_api.FormatCode'):  # OneDL's
            patch.setattr(name, lambda text, **kwargs: (text, True), raising=False)
        job = kills.Training(folder / 'pictures')
        job.open(folder / 'whole')
        job.work()
        job.remember()
        yield job


def test_training(training, tmp_path):
    interrupt(training, tmp_path, 1, 3)


def _interrupted(training, tmp_path, cut, last):
    """A work_dir in which the last checkpoint is cut to a share of its length, and what last_checkpoint says."""
    whole = training.folder
    folder = tmp_path / 'work'
    folder.mkdir()
    torch.save({}, folder / 'iter_1.pth')  # whole, but older: taking it would be an error
    for name in ('iter_2.pth', 'iter_4.pth'):
        content = (whole / name).read_bytes()
        (folder / name).write_bytes(content if name == 'iter_2.pth' else content[:int(len(content) * cut)])
    if last is not None:
        (folder / 'last_checkpoint').write_text(last.format(folder))
    return folder


@pytest.mark.parametrize('cut, last', [
    (0., '{}/iter_4.pth'), (0.5, '{}/iter_2.pth'), (0.99, '{}/iter_4.pth'), (0.7, ''), (0.7, '{}/ite'), (0.7, None),
    (0.7, '/moved/iter_4.pth')])
def test_resumes_from_the_last_whole_checkpoint(cut, last, training, tmp_path, monkeypatch):
    folder = _interrupted(training, tmp_path, cut, last)
    monkeypatch.setattr(training, 'folder', folder)
    training.work()
    (folder / 'iter_1.pth').unlink()
    training.check_done()


def test_says_what_to_do_where_no_checkpoint_is_whole(training, tmp_path, monkeypatch):
    folder = _interrupted(training, tmp_path, 0.5, '{}/iter_4.pth')
    for name in ('iter_1.pth', 'iter_2.pth'):
        (folder / name).unlink()
    monkeypatch.setattr(training, 'folder', folder)
    with pytest.raises(RuntimeError, match=r'iter_4.pth, which is missing or cut short.*load_from.*remove'):
        training.work()
    (folder / 'last_checkpoint').unlink()  # as it is while the first checkpoint is saved
    training.work()
    training.check_done()
    said = ''.join(path.read_text() for path in folder.rglob('*.log'))
    assert f'training from the beginning: {folder / "iter_4.pth"} was cut short' in said


def test_one_checkpoint_is_too_few(training, tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'keep', 1)
    monkeypatch.setattr(training, 'folder', tmp_path)
    training.work()
    assert 'keep 2 or more' in ''.join(path.read_text() for path in tmp_path.rglob('*.log'))


@pytest.mark.parametrize('case, taken', [
    ('cut', 'iter_10.pth'), ('not resumed', None), ('another is named', None), ('of an address', None),
    ('a folder', None), ('elsewhere', 'iter_10.pth'), ('nothing saved', RuntimeError)])
def test_which_checkpoint_is_taken(case, taken, tmp_path):
    checkpoints = pytest.importorskip('san_backbones.mm.checkpoints', reason='needs the mm extra')
    from mmengine.hooks import CheckpointHook
    work = tmp_path / 'work'
    folder = tmp_path / 'elsewhere' / 'work' if case == 'elsewhere' else work
    for path in (work, folder):
        path.mkdir(parents=True, exist_ok=True)
    for name in ('iter_2.pth', 'iter_9.pth', 'iter_10.pth') if case != 'nothing saved' else ():
        torch.save({}, folder / name)
    named = {'of an address': 's3://bucket/iter_9.pth',
             'a folder': str(work / 'iter_9')}.get(case, f'{work}/iter_11.pth')
    (work / 'last_checkpoint').write_text(named)
    (work / 'iter_9').mkdir()
    hook = CheckpointHook(interval=1)
    hook.out_dir, hook.filename_tmpl = str(tmp_path / 'elsewhere' if case == 'elsewhere' else work), 'iter_{}.pth'
    runner = types.SimpleNamespace(
        _resume=case != 'not resumed', _load_from='given.pth' if case == 'another is named' else None, hooks=[hook],
        work_dir=str(work), logger=logging.getLogger('test'))
    if taken is RuntimeError:
        with pytest.raises(RuntimeError, match='iter_11.pth, which is missing or cut short.*found: none'):
            checkpoints.resume_from_whole(runner)
        return
    checkpoints.resume_from_whole(runner)
    expected = 'given.pth' if case == 'another is named' else None if taken is None else str(folder / taken)
    assert runner._load_from == expected


@pytest.mark.parametrize('share', [0., 0.001, 0.3, 0.999])
def test_a_checkpoint_that_is_cut_short_is_named(share, training, tmp_path):
    from mmengine.runner.checkpoint import CheckpointLoader
    whole = (training.folder / 'iter_4.pth').read_bytes()
    for name, content in (('cut.pth', whole[:int(share * len(whole))]), ('page.pth', b'<html>no such file</html>')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RuntimeError, match=rf'{name} \(\d+ bytes\) cannot be read.*remove it'):
            CheckpointLoader.load_checkpoint(str(tmp_path / name), map_location='cpu')


def test_a_whole_checkpoint_is_not_called_damaged(tmp_path, monkeypatch):
    checkpoints = pytest.importorskip('san_backbones.mm.checkpoints', reason='needs the mm extra')
    torch.save({'state_dict': {}}, tmp_path / 'whole.pth')

    def no_memory(*arguments):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setenv('HOME', str(tmp_path))
    assert checkpoints.load_from_local('~/whole.pth', 'cpu') == {'state_dict': {}}
    monkeypatch.setattr(checkpoints, 'load_data', no_memory)
    with pytest.raises(torch.OutOfMemoryError, match='^CUDA out of memory$'):
        checkpoints.load_from_local(str(tmp_path / 'whole.pth'), 'cpu')
    (tmp_path / 'old.pth').write_bytes(b'of a format that is no archive')
    with pytest.raises(torch.OutOfMemoryError, match='^CUDA out of memory$'):
        checkpoints.load_from_local(str(tmp_path / 'old.pth'), 'cpu')

    def other(*arguments):
        raise RuntimeError('something else')

    monkeypatch.setattr(checkpoints, 'load_data', other)
    with pytest.raises(RuntimeError, match='^something else$'):
        checkpoints.load_from_local(str(tmp_path / 'whole.pth'), 'cpu')


# --- Files of exports and features ---------------------------------------------------------------------------------

@pytest.mark.parametrize('ends', ['whole', 'error', 'killed'])
def test_what_lay_there_stays_until_all_is_written(ends, tmp_path):
    path = tmp_path / 'file.npz'
    path.write_bytes(b'older')
    child = os.fork()
    if child == 0:
        try:
            with atomic_write(path) as part:
                assert part.name == path.name
                part.write_bytes(b'newer, the first half')
                if ends == 'error':
                    raise OSError('no room')
                if ends == 'killed':
                    os.kill(os.getpid(), signal.SIGKILL)
                part.write_bytes(b'newer')
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert path.read_bytes() == (b'newer' if ends == 'whole' else b'older')
    assert ends == 'killed' or [*tmp_path.iterdir()] == [path]


# --- Safetensors -----------------------------------------------------------------------------------------------------

def test_a_safetensors_file_that_is_cut_short_is_never_taken(tmp_path, monkeypatch):
    """At each length: in the folder that the environment names, as in the cache of the Hub."""
    model = 'san10_pairwise.in1k'
    content = save({'weight': torch.rand(9)})
    path = tmp_path / f'{model}.safetensors'
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(hub.WeightsError, match=path.name):
            hub.weights(f'{hub.ORGANISATION}/{model}')
    path.write_bytes(content)
    assert hub.weights(f'{hub.ORGANISATION}/{model}') == str(path)
