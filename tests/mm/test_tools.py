"""MMDetection's own, unmodified tools on our configs: train, resume, test, and spawned workers, as processes."""
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip('mmdet', reason='needs the mm extra')

import mmdet

from tests import ROOT
from tests.mm.tiny_data import ARCH, CLASSES, WIDTHS, coco

TOOLS = pathlib.Path(mmdet.__file__).parent / '.mim' / 'tools'
CONFIG = ROOT / 'mm_configs/mask_rcnn/mask-rcnn_san15-patchwise_fpn_1x_coco.py'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Four pictures with a square each, and a small version of the COCO config."""
    folder = tmp_path_factory.mktemp('coco')
    coco(folder)
    (folder / 'config.py').write_text(f'''
_base_ = {str(CONFIG)!r}
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)
heads = dict(num_classes={len(CLASSES)})
model = dict(backbone=dict(_delete_=True, type='SANBackbone', arch={ARCH}),
             neck=dict(in_channels={WIDTHS}), roi_head=dict(bbox_head=heads, mask_head=heads))
train_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
                  dict(type='Resize', scale=(64, 64), keep_ratio=True), dict(type='PackDetInputs')]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64), keep_ratio=True),
                 dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
data = dict(data_root={str(folder)!r}, ann_file='coco.json', data_prefix=dict(img=''),
            metainfo=dict(classes={CLASSES}))
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(**data, pipeline=train_pipeline))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(**data, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={str(folder / 'coco.json')!r})
test_evaluator = val_evaluator
''')
    return folder


def _run(*command):
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


def test_train_resume_test(folder):
    work = folder / 'work'
    log = _run(TOOLS / 'train.py', folder / 'config.py', '--work-dir', work, '--cfg-options', 'train_cfg.max_epochs=1')
    assert 'Epoch(val) [1][4/4]' in log and (work / 'epoch_1.pth').exists()
    log = _run(TOOLS / 'train.py', folder / 'config.py', '--work-dir', work, '--resume',
               '--cfg-options', 'train_cfg.max_epochs=2', 'train_dataloader.num_workers=1')
    assert 'resumed epoch: 1' in log and (work / 'epoch_2.pth').exists()
    log = _run('-m', 'san_backbones.mm.run', TOOLS / 'test.py', folder / 'config.py', work / 'epoch_2.pth',
               '--work-dir', work, '--cfg-options', 'test_dataloader.num_workers=1',
               'env_cfg.mp_cfg.mp_start_method=spawn')
    assert 'Load checkpoint from' in log and 'Epoch(test) [4/4]' in log


def test_the_runner_names_what_it_needs():
    result = subprocess.run([sys.executable, '-m', 'san_backbones.mm.run', 'nowhere.py'], capture_output=True,
                            text=True)
    assert result.returncode != 0 and 'given: nowhere.py; expected the path of a Python script' in result.stderr
