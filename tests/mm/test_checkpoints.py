"""mmengine's own checkpoints under torch's weights-only loading: save, resume, load_from. No code of a file runs."""
import functools
import http.server
import os
import pathlib
import threading
from pickle import UnpicklingError

import pytest

pytest.importorskip('mmengine', reason='needs the mm extra')

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn
from torch.utils.data import Dataset

import san_backbones.mm


class Numbers(Dataset):
    METAINFO = dict(classes=('a', 'b'))
    metainfo = METAINFO

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((4,), float(index))


class Line(BaseModel):
    def __init__(self, stop_after=None):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.steps_left = stop_after

    def train_step(self, data, optim_wrapper):
        if self.steps_left is not None:
            if self.steps_left == 0:
                raise KeyboardInterrupt
            self.steps_left -= 1
        loss = (self.layer(data / 8) - 1).square().mean()
        optim_wrapper.update_params(loss)
        return dict(loss=loss.detach())

    def forward(self, x):
        return self.layer(x)


def _runner(folder, epochs, stop_after=None, **kwargs):
    torch.manual_seed(0)
    return Runner(
        model=Line(stop_after), work_dir=str(folder), default_scope='mmengine',
        train_dataloader=dict(batch_size=2, dataset=Numbers(), sampler=dict(type='DefaultSampler', shuffle=True),
                              collate_fn=dict(type='default_collate')),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        param_scheduler=[dict(type='CosineAnnealingLR', T_max=4, by_epoch=True)],
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        randomness=dict(seed=0), **{'experiment_name': f'{folder.name}_{stop_after}', **kwargs})


def test_resume_continues_where_training_stopped(tmp_path):
    whole = _runner(tmp_path / 'whole', 4)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        _runner(tmp_path / 'parts', 4, stop_after=2 * 4 + 1).train()  # in the third epoch of 4 steps
    resumed = _runner(tmp_path / 'parts', 4, resume=True)
    resumed.train()
    assert resumed.epoch == 4 and resumed.iter == 16
    # the same numbers only if weights, optimizer, schedule and message hub all came back
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)


def test_load_from(tmp_path):
    trained = _runner(tmp_path / 'a', 1)
    trained.train()
    loaded = _runner(tmp_path / 'b', 1, load_from=str(tmp_path / 'a' / 'epoch_1.pth'), experiment_name='load_from')
    loaded.load_or_resume()
    for a, b in zip(trained.model.parameters(), loaded.model.parameters()):
        assert torch.equal(a, b)


class _Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('evil', [
    _Evil(print, 'code of the file ran'),
    _Evil(getattr, nn.Linear, 'forward'),
    _Evil(getattr, np.ndarray, 'tofile'),
    _Evil(getattr, HistoryBuffer, '__init__'),
], ids=['function', 'attribute', 'attribute of an allowed class', 'private method'])
def test_other_classes_stay_refused(evil, tmp_path, capsys):
    torch.save({'state_dict': {}, 'meta': evil}, tmp_path / 'evil.pth')
    with pytest.raises(UnpicklingError):
        torch.load(tmp_path / 'evil.pth', weights_only=True)
    assert 'code of the file ran' not in capsys.readouterr().out


class _OtherSystem(_Evil):
    """Runs a command of the shell that leaves a file."""

    def __init__(self, trace):
        super().__init__(os.system, f'touch {trace}')


def _by_init_cfg(path):
    small = dict(depths=(1,), widths=(32,), kernel_sizes=(3,), stem_width=16)
    init_cfg = dict(type='Pretrained', checkpoint=path)
    san_backbones.mm.SANBackbone(small, out_indices=(0,), init_cfg=init_cfg).init_weights()


def _by_loading(path):
    CheckpointLoader.load_checkpoint(path)


def _by_http(path):
    folder = pathlib.Path(path).parent
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv('TORCH_HOME', str(folder / 'torch'))
        patch.setenv('no_proxy', '127.0.0.1')
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            _by_init_cfg(f'http://127.0.0.1:{server.server_port}/evil.pth')
        finally:
            server.shutdown()


def _by_another_store(path):
    """As mmengine reads s3:// and the like, from memory."""
    class Store:
        get = staticmethod(lambda name: pathlib.Path(path).read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmengine.runner.checkpoint.get_file_backend', lambda *args, **kwargs: Store)
        CheckpointLoader.load_checkpoint('s3://bucket/evil.pth')


def _by_runner(path):
    runner = _runner(pathlib.Path(path).parent, 1, load_from=path, experiment_name=f'load_{path}')
    runner.load_or_resume()


def _by_resuming(path):
    runner = _runner(pathlib.Path(path).parent, 1, load_from=path, resume=True, experiment_name=f'resume_{path}')
    runner.load_or_resume()


def _by_inferencer(path):
    inference = pytest.importorskip('mmseg.apis', reason='needs the mm extra')
    model = dict(type='EncoderDecoder', backbone=dict(
        type='SANBackbone', arch=dict(depths=(1,), widths=(32,), kernel_sizes=(3,), stem_width=16), out_indices=(0,)),
        decode_head=dict(type='FCNHead', in_channels=32, channels=4, num_classes=2, in_index=0))
    config = pathlib.Path(path).with_name('config.py')
    config.write_text(f'default_scope = "mmseg"\nmodel = {model!r}\n')
    inference.init_model(str(config), path, device='cpu')


@pytest.mark.parametrize('load', [_by_init_cfg, _by_loading, _by_http, _by_another_store, _by_runner,
                                  _by_resuming, _by_inferencer])
def test_code_of_a_checkpoint_is_never_run(load, tmp_path):
    """Also where mmengine has `weights_only` off: http, and in onedl-mmengine all that torch refuses."""
    path, trace = tmp_path / 'evil.pth', tmp_path / 'EVIL'
    torch.save({'state_dict': {}, 'meta': _OtherSystem(trace)}, path)
    with pytest.raises((UnpicklingError, RuntimeError), match='GLOBAL .*system'):
        load(str(path))
    assert not trace.exists()


def test_a_file_that_holds_more_than_data_says_so(tmp_path):
    path = tmp_path / 'evil.pth'
    torch.save({'state_dict': {}, 'meta': _Evil(print, 'code of the file ran')}, path)
    with pytest.raises(UnpicklingError, match=f'^{path} holds more than tensors.*GLOBAL .*print was.*save its'):
        CheckpointLoader.load_checkpoint(str(path))
