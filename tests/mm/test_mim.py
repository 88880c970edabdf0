"""The wheel as OpenMMLab's `mim` sees it: list, search, download, train and test, from an installed wheel.

The metafiles are read here as plain YAML. The commands themselves run where openmim is installed: `make test-mim`.
"""
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

pytest.importorskip('mmengine', reason='needs the mm extra')

import cv2
import numpy as np
import yaml

from tests import ROOT
from tests.mm.tiny_data import ARCH, CLASSES, WIDTHS, coco

CONFIG = 'mask-rcnn_san15-patchwise_fpn_1x_coco'
needs_mim = pytest.mark.skipif(importlib.util.find_spec('mim') is None, reason='needs openmim: make test-mim')


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """A folder with the installed wheel of this tree, less the C loops, which mim does not need."""
    folder = tmp_path_factory.mktemp('wheel')
    shutil.copytree(ROOT, folder / 'tree', ignore=shutil.ignore_patterns(
        '.*', 'build', '*.egg-info', '*.so', '__pycache__', 'tests', 'benchmarks', 'work_dirs'))
    built = f'build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}'
    stale = folder / 'tree' / built / 'san_backbones/.mim/mm_configs/renamed/old.py'
    stale.parent.mkdir(parents=True)
    stale.touch()
    result = subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', '--disable-pip-version-check', '--no-index', '--no-deps',
         '--no-build-isolation', '--wheel-dir', folder, folder / 'tree'],
        capture_output=True, text=True, env={**os.environ, 'CC': 'false'})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    wheel, = folder.glob('*.whl')
    with zipfile.ZipFile(wheel) as archive:  # --target does no more than this for a wheel without scripts
        archive.extractall(folder / 'site')
    return folder / 'site'


def _entries(mim):
    """The collections and the models of all metafiles that model-index.yml names."""
    collections, models = [], []
    for pattern in yaml.safe_load((mim / 'model-index.yml').read_text())['Import']:
        files = sorted(mim.glob(pattern))
        assert files, f'model-index.yml: nothing is called {pattern}'
        for file in files:
            content = yaml.safe_load(file.read_text())
            collections += content['Collections']
            models += content['Models']
    return collections, models


def test_the_wheel_holds_every_config(installed):
    mim = installed / 'san_backbones/.mim'
    shipped = {str(path.relative_to(mim)) for path in mim.rglob('*') if path.is_file()}
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / 'mm_configs').rglob('*')
               if path.is_file() and '__pycache__' not in path.parts}
    assert shipped == tracked | {'model-index.yml', 'tools/train.py', 'tools/test.py'}
    top_level, = installed.glob('*.dist-info/top_level.txt')
    assert top_level.read_text().split()[0] == 'san_backbones'  # where mim looks for .mim


def test_metafiles_name_every_config(installed):
    mim = installed / 'san_backbones/.mim'
    collections, models = _entries(mim)
    names = [collection['Name'] for collection in collections]
    assert len(names) == len(set(names))
    assert all((mim / collection['README']).is_file() for collection in collections)
    configs = {path.relative_to(mim).as_posix() for path in (mim / 'mm_configs').glob('[!_]*/*.py')}
    assert len(models) == len(configs) and {model['Config'] for model in models} == configs
    for model in models:
        assert model['Name'] == pathlib.PurePath(model['Config']).stem == model['Name'].lower()
        assert model['In Collection'] in names
        # mim downloads what follows the last slash, unless that is nothing; without Weights it fails
        assert re.fullmatch(r'none yet/|https://[^,]+[^/,]', model.get('Weights', '')), model


def _run(installed, *command, **variables):
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', *map(str, command)], capture_output=True, text=True, cwd=installed.parent,
        env={**os.environ, 'PYTHONPATH': str(installed), 'OMP_NUM_THREADS': '1', 'PAGER': 'cat', **variables})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def _mim(installed, *command):
    return _run(installed, '-c', 'from mim.cli import cli; cli()', *command, http_proxy='http://127.0.0.1:9',
                https_proxy='http://127.0.0.1:9')  # no network


@needs_mim
def test_list(installed):
    from san_backbones import __version__
    found = _run(installed, '-c', 'from importlib.util import find_spec; print(find_spec("san_backbones").origin)')
    assert pathlib.Path(found.strip()).parent == installed / 'san_backbones'  # and no other that is installed
    lines = [line.split()[:2] for line in _mim(installed, 'list').splitlines()]
    assert ['san-backbones', __version__] in lines


@needs_mim
def test_search(installed):
    _, models = _entries(installed / 'san_backbones/.mim')
    for package in ('san-backbones', 'san_backbones'):
        listed = re.findall(r"'([^']+)'", _mim(installed, 'search', package, '--valid-config'))
        assert sorted(listed) == sorted(model['Name'] for model in models)
    found = _mim(installed, 'search', 'san-backbones', '--config', CONFIG)
    assert re.search(r'weight +none yet/', found) and re.search(r'training_data +coco', found)
    found = _mim(installed, 'search', 'san-backbones', '--dataset', 'ade20k', '--field', 'config')
    assert 'san15-patchwise_upernet' in found and 'mask-rcnn' not in found


@pytest.fixture(scope='module')
def downloaded(installed):
    # the others are based on configs of mmpretrain, which is not in this environment
    names = [model['Name'] for model in _entries(installed / 'san_backbones/.mim')[1]
             if not model['Config'].startswith('mm_configs/classification/')]
    folder = installed.parent / 'downloaded'
    _mim(installed, 'download', 'san-backbones', '--config', *names, '--dest', folder)
    return names, folder


@needs_mim
def test_download(downloaded):
    names, folder = downloaded
    assert sorted(path.name for path in folder.iterdir()) == sorted(f'{name}.py' for name in names)
    from mmengine.config import Config
    for name in names:
        path, = (ROOT / 'mm_configs').glob(f'*/{name}.py')
        assert '_base_' not in (folder / f'{name}.py').read_text().splitlines()[0]
        assert Config.fromfile(folder / f'{name}.py').model == Config.fromfile(path).model


BACKBONE = f"dict(_delete_=True, type='SANBackbone', arch={ARCH})"


def _small_detection(folder, config):
    """Two pictures with a square each, and a small model on them."""
    coco(folder, 2)
    (folder / 'small.py').write_text(f'''
_base_ = {str(config)!r}
heads = dict(num_classes={len(CLASSES)})
model = dict(backbone={BACKBONE}, neck=dict(in_channels={WIDTHS}), roi_head=dict(bbox_head=heads, mask_head=heads))
resize = dict(type='Resize', scale=(64, 64), keep_ratio=True)
pack = dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
data = dict(data_root={str(folder)!r}, ann_file='coco.json', data_prefix=dict(img=''),
            metainfo=dict(classes={CLASSES}))
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(**data, pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True), resize, pack]))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(**data, pipeline=[
    dict(type='LoadImageFromFile'), resize, pack]))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={str(folder / 'coco.json')!r})
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
''')


def _small_segmentation(folder, config):
    for part in ('training', 'validation'):
        for kind in ('images', 'annotations'):
            (folder / kind / part).mkdir(parents=True)
        for i in range(2):
            cv2.imwrite(str(folder / 'images' / part / f'{i}.jpg'), np.full((64, 64, 3), 90 * i, np.uint8))
            cv2.imwrite(str(folder / 'annotations' / part / f'{i}.png'), np.full((64, 64), i + 1, np.uint8))
    (folder / 'small.py').write_text(f'''
_base_ = {str(config)!r}
crop_size = (64, 64)
model = dict(backbone={BACKBONE}, data_preprocessor=dict(size=crop_size),
             decode_head=dict(in_channels={WIDTHS}, channels=16, num_classes=150))
if {'auxiliary_head' in config.read_text()}:
    model.update(auxiliary_head=dict(in_channels=64, channels=16, num_classes=150))
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root={str(folder)!r}, pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True), dict(type='PackSegInputs')]))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root={str(folder)!r}, pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True), dict(type='PackSegInputs')]))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2))
''')


CASES = [('mmdet', CONFIG, _small_detection, 'epoch_1.pth'),
         ('mmseg', 'san15-patchwise_upernet_8xb2-160k_ade20k-512x512', _small_segmentation, 'iter_2.pth')]


@needs_mim
@pytest.mark.parametrize('package, name, make_small, checkpoint', CASES, ids=['mmdet', 'mmseg'])
def test_train_and_test(installed, downloaded, tmp_path, package, name, make_small, checkpoint):
    """A config as `mim download` writes it, made small: trained as the framework's users do, tested through ours."""
    make_small(tmp_path, downloaded[1] / f'{name}.py')
    work = tmp_path / 'work'
    common = (tmp_path / 'small.py', '--gpus', 0, '--launcher', 'none', '--work-dir', work)
    assert 'Training finished successfully' in _mim(installed, 'train', package, *common)
    assert (work / checkpoint).exists()
    tested = _mim(installed, 'test', 'san-backbones', *common, '--checkpoint', work / checkpoint)
    assert 'Testing finished successfully' in tested and 'Load checkpoint from' in tested


def test_the_tool_names_what_it_needs(tmp_path):
    from san_backbones.mm.mim_tool import find_tool
    config = tmp_path / 'config.py'
    config.write_text("default_scope = 'mmnothing'\n")
    with pytest.raises(ValueError, match=r"config.py: default_scope is 'mmnothing'; expected an installed package"):
        find_tool('test.py', str(config))
