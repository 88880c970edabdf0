"""mmengine's own checkpoints under torch's weights-only loading: save, resume, load_from."""
from pickle import UnpicklingError

import pytest

pytest.importorskip('mmengine', reason='needs the mm extra')

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

import san_backbones.mm  # noqa: F401


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
