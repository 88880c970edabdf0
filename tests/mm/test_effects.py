"""What `import san_backbones.mm` changes elsewhere: each change is made, and gone after `undo`."""
import contextlib
import pickle
import sys
from functools import partial

import pytest

pytest.importorskip('mmdet', reason='needs the mm extra')
pytest.importorskip('mmseg', reason='needs the mm extra')

import mmengine.registry
import torch
from mmengine.config import Config, utils
from mmengine.logging import HistoryBuffer
from mmengine.registry import DATASETS, MODELS, Registry
from mmengine.runner import checkpoint

from san_backbones.mm import effects, mmcv_ops  # before mmdet
from san_backbones.norms import SyncBatchNorm
from tests import ROOT

import mmdet.datasets
import mmdet.registry


@contextlib.contextmanager
def undone(effect):
    """An effect taken back; made again at the end, and as it was, however often either is asked for."""
    assert effect.installed
    for _ in range(2):
        effect.undo()
    try:
        assert not effect.installed
        yield
    finally:
        for _ in range(2):
            effect.install()
        assert effect.installed


def both(effect, look):
    """What a function sees without an effect, and with it; it sees the same before and after."""
    before = look()
    with undone(effect):
        without = look()
    assert look() == before
    return without, before


def test_all_are_installed_and_listed():
    assert all(effect.installed for effect in effects.EFFECTS)
    assert [line[3:].partition('`')[0] for line in effects.__doc__.splitlines() if line.startswith('- `')] == [
        effect.__name__ for effect in effects.EFFECTS]


@pytest.mark.skipif(mmcv_ops.operators_in_use() == 'compiled', reason='mmcv brings its operators')
def test_operators():
    assert both(effects.operators, mmcv_ops.operators_in_use) == ('none', 'torchvision')
    assert both(effects.operators, lambda: any(isinstance(finder, mmcv_ops.StandInFinder) for finder in sys.meta_path)
                ) == (False, True)
    with undone(effects.operators), pytest.raises(ModuleNotFoundError, match='_ext'):
        import mmcv._ext  # noqa: F401


def test_pickles(tmp_path):
    torch.save(HistoryBuffer([1., 2.], [1, 1]), tmp_path / 'buffer.pth')

    def look():
        try:
            return torch.load(tmp_path / 'buffer.pth', weights_only=True).mean()
        except pickle.UnpicklingError:
            return 'refused'

    assert both(effects.pickles, look) == ('refused', 1.5)
    torch.serialization.add_safe_globals([Config])  # somebody else's stays
    try:
        without, with_it = both(effects.pickles, lambda: set(map(str, torch.serialization.get_safe_globals())))
        assert str(Config) in without < with_it
    finally:
        with undone(effects.pickles):
            torch.serialization.clear_safe_globals()


def test_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr('san_backbones.hub.weights', lambda name: f'{name}.safetensors')
    monkeypatch.setattr('safetensors.torch.load_file', lambda path, device: path)

    def hub():
        try:
            return checkpoint.CheckpointLoader.load_checkpoint('hf-hub:org/name')
        except FileNotFoundError:
            return 'no such file'

    def damaged():
        (tmp_path / 'cut.pth').write_bytes(b'cut short')
        try:
            checkpoint.CheckpointLoader.load_checkpoint(str(tmp_path / 'cut.pth'))
        except Exception as error:
            return 'remove it' in str(error)

    assert both(effects.checkpoints, hub) == ('no such file', 'org/name.safetensors')
    assert both(effects.checkpoints, damaged) == (False, True)
    without, with_it = both(effects.checkpoints, lambda: (
        checkpoint.load_url.keywords if isinstance(checkpoint.load_url, partial) else None))
    assert without is None and with_it == dict(weights_only=True)
    without, with_it = both(effects.checkpoints, lambda: dict(checkpoint.CheckpointLoader._schemes))
    assert with_it.keys() - without.keys() == {'hf-hub:'}
    assert {scheme for scheme in without if with_it[scheme] is not without[scheme]} == {''}


def test_configs(monkeypatch):
    """OneDL's mmseg is called onedl-mmsegmentation, which mmengine does not know of."""
    name = ROOT / 'mm_configs/upernet/san15-patchwise_upernet_8xb2-160k_ade20k-512x512.py'
    with undone(effects.configs):
        monkeypatch.setitem(utils.MODULE2PACKAGE, 'mmseg', 'no-such-distribution')
        with pytest.raises(ModuleNotFoundError, match='no-such-distribution is not installed'):
            Config.fromfile(name)
        effects.configs.install()
        assert utils.MODULE2PACKAGE['mmseg'] == 'mmseg' and utils.MODULE2PACKAGE['mmtrack'] == 'mmtrack'
        assert Config.fromfile(name).model.decode_head.type == 'UPerHead'
        effects.configs.undo()
        assert utils.MODULE2PACKAGE['mmseg'] == 'no-such-distribution'
        monkeypatch.undo()


def test_datasets(tmp_path):
    """Also in a registry that was made while the effect was there."""
    broken = tmp_path / 'broken.json'
    broken.write_text('{')
    made = Registry('dataset of a test', parent=DATASETS, scope='a_test')

    def errors():
        for registry in (DATASETS, mmdet.registry.DATASETS, made):
            with pytest.raises((ValueError, RuntimeError)) as error:
                registry.build(dict(type='mmdet.CocoDataset', ann_file=str(broken)))
            yield str(error.value).startswith(f'CocoDataset cannot be read from {broken}: ')

    try:
        assert both(effects.datasets, lambda: [*errors()]) == ([False] * 3, [True] * 3)
    finally:
        del DATASETS.children['a_test']


@pytest.mark.skipif(torch.cuda.is_available(), reason='torch has its own there')
def test_sync_bn():
    without, with_it = both(effects.sync_bn, lambda: type(MODELS.build(dict(type='SyncBN', num_features=2))))
    assert with_it is SyncBatchNorm and not issubclass(without, SyncBatchNorm)


@pytest.mark.parametrize('registry, module, name', effects.REGISTERED)
def test_classes(registry, module, name):
    registry = getattr(mmengine.registry, registry)
    without, with_it = both(effects.classes, lambda: registry.module_dict.get(name))
    assert without is None and with_it.__module__ == f'san_backbones.mm.{module}' and with_it.__name__ == name


def test_undo_takes_back_all():
    effects.undo()
    try:
        assert not any(effect.installed for effect in effects.EFFECTS)
    finally:
        effects.install()
    assert all(effect.installed for effect in effects.EFFECTS)
