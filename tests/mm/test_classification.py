"""Every classifier config builds its model, takes a training step and predicts; one trains with MMPretrain's own tool.

MMPretrain and transformers 5 break each other, so it is no part of the test environment: `make test-mmpretrain`.
"""
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

for name in ('mmpretrain', 'mmengine'):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f'needs {name}: make test-mmpretrain', allow_module_level=True)

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import san_backbones.mm  # noqa: E402, F401  before mmpretrain, which imports mmcv's operators
import mmpretrain  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, init_default_scope  # noqa: E402
from mmpretrain.structures import DataSample  # noqa: E402

from tests import ROOT  # noqa: E402
from tests.mm.tiny_data import ARCH  # noqa: E402

FOLDER = ROOT / 'mm_configs/classification'
CONFIGS = sorted(FOLDER.glob('*.py'))


@pytest.fixture
def scope():
    init_default_scope('mmpretrain')


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_builds_trains_and_predicts(path, scope):
    config = Config.fromfile(path)
    assert config.model.backbone.init_cfg is None
    assert config.custom_imports['imports'] == ['san_backbones.mm'] and config.default_scope == 'mmpretrain'
    assert config.custom_hooks == [dict(type='CheckSetupHook'), dict(type='CheckInvalidFeaturesHook')]
    name = path.stem[:5] + ('_pairwise' if 'pairwise' in path.stem else '_patchwise')
    assert config.model.backbone.arch == name
    model = MODELS.build(dict(**config.model, data_preprocessor=config.data_preprocessor))
    model.init_weights()
    classes = config.model.head.num_classes
    batch = dict(inputs=[torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8) for _ in range(2)],
                 data_samples=[DataSample().set_gt_label(label) for label in (0, classes - 1)])

    model.train()
    prepared = model.data_preprocessor(batch, True)
    losses, _ = model.parse_losses(model(**prepared, mode='loss'))
    losses.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad():
        scores = model(**prepared, mode='tensor')
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([0, classes - 1]), label_smoothing=0.1)
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-4, atol=1e-4)

    model.eval()
    with torch.no_grad():
        results = model(**model.data_preprocessor(batch, False), mode='predict')
    assert [tuple(r.pred_score.shape) for r in results] == [(classes,)] * 2
    assert all(abs(float(r.pred_score.sum()) - 1) < 1e-4 for r in results)


def test_recipe_of_the_paper():
    config = Config.fromfile(FOLDER / 'san15-patchwise_8xb32_in1k.py')
    assert config.train_cfg.max_epochs == config.param_scheduler.T_max == 100
    assert config.param_scheduler.type == 'CosineAnnealingLR'
    assert dict(config.optim_wrapper.optimizer) == dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4)
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 256
    assert [(step.type, step.get('scale', step.get('crop_size'))) for step in config.test_dataloader.dataset.pipeline] \
        == [('LoadImageFromFile', None), ('ResizeEdge', 256), ('CenterCrop', 224), ('PackInputs', None)]
    assert list(config.data_preprocessor.mean) == [123.675, 116.28, 103.53] and config.data_preprocessor.to_rgb


def test_a_folder_of_pictures_trains(tmp_path):
    """Bright against dark squares, with MMPretrain's own tools/train.py: the two classes are told apart."""
    random = np.random.RandomState(0)
    for part, count in (('train', 24), ('val', 4)):
        for label, level in (('dark', 40), ('bright', 200)):
            folder = tmp_path / 'data' / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                picture = random.randint(level - 20, level + 20, (40, 40, 3)).astype('uint8')
                cv2.imwrite(str(folder / f'{i}.png'), picture)
    (tmp_path / 'config.py').write_text(f'''
_base_ = {str(FOLDER / 'san10-patchwise_1xb16-4e_imagefolder-96px.py')!r}
model = dict(backbone=dict(_delete_=True, type='SANBackbone', out_indices=(4,), arch={ARCH}),
             head=dict(num_classes=2, in_channels=96))
data_preprocessor = dict(num_classes=2)
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
''')
    tool = pathlib.Path(mmpretrain.__file__).parent / '.mim/tools/train.py'
    result = subprocess.run(
        [sys.executable, str(tool), str(tmp_path / 'config.py'), '--work-dir', str(tmp_path / 'work')], text=True,
        capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'DATA': str(tmp_path / 'data')})
    log = result.stdout + result.stderr
    assert result.returncode == 0, log[-4000:]
    assert (tmp_path / 'work/epoch_4.pth').exists()
    last = [line for line in log.splitlines() if 'Epoch(val) [4]' in line][-1]
    assert float(last.split('accuracy/top1:')[1].split()[0]) == 100, last
