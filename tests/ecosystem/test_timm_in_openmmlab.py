"""OpenMMLab's own TIMMBackbone builds SAN from timm, for who has configs around it."""
import pytest

pytest.importorskip('mmseg', reason='needs the mm extra')

import timm
import torch

import san_backbones.mm  # noqa: F401  before mmseg.models

# isort: split
import mmseg.models  # noqa: F401
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from san_backbones.norms import SyncBatchNorm

CONFIG = '''
_base_ = ['mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py']
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(_delete_=True, type='TIMMBackbone', model_name='test_san_patchwise', features_only=True,
                  pretrained=False, out_indices=(1, 2, 3, 4), norm_layer='SyncBN'),
    decode_head=dict(in_channels=[64, 64, 96, 128], channels=16, num_classes=3, norm_cfg=dict(type='BN')),
    auxiliary_head=dict(in_channels=96, channels=8, num_classes=3, norm_cfg=dict(type='BN')))
'''


@pytest.fixture
def build():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield lambda **kwargs: MODELS.build(dict(dict(
            type='mmseg.TIMMBackbone', model_name='test_san_patchwise', features_only=True, pretrained=False,
            out_indices=(1, 2, 3, 4)), **kwargs))


def test_upernet_trains_and_predicts(build, tmp_path):
    (tmp_path / 'config.py').write_text(CONFIG)
    model = MODELS.build(Config.fromfile(tmp_path / 'config.py').model)
    model.init_weights()
    norms = [m for m in model.backbone.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and (torch.cuda.is_available() or all(isinstance(m, SyncBatchNorm) for m in norms))
    assert all(m.gamma_is_plain() for m in model.backbone.modules() if hasattr(m, 'gamma_is_plain'))
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 3, (1, 64, 64)))) for _ in range(2)]
    losses = model.train()(torch.randn(2, 3, 64, 64), samples, mode='loss')
    loss, _ = model.parse_losses(losses)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.).step()
    moved = [not torch.equal(before[name], p) for name, p in model.backbone.named_parameters()]
    assert torch.isfinite(loss) and sum(moved) > 0.8 * len(moved)
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 64, 64), mode='tensor').shape == (1, 3, 16, 16)


def test_weights(build, tmp_path):
    """Those of a trained classifier, through a timm option; `checkpoint_path` expects a file of features_only."""
    trained = timm.create_model('test_san_patchwise', num_classes=7)
    torch.save(trained.state_dict(), tmp_path / 'trained.pth')
    backbone = build(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'trained.pth')))
    shipped = build(pretrained=True)
    assert torch.equal(backbone.timm_model.stages_4.conv.weight, trained.stages[4].conv.weight)
    backbone.init_weights()
    assert torch.equal(backbone.timm_model.stages_4.conv.weight, trained.stages[4].conv.weight)
    assert not torch.equal(shipped.timm_model.stages_4.conv.weight, trained.stages[4].conv.weight)


def test_options_and_mmdet_around_it(build):
    """MMDetection has no TIMMBackbone of its own, and takes MMSegmentation's by its scope."""
    import mmdet.models  # noqa: F401
    with DefaultScope.overwrite_default_scope('mmdet'):
        backbone = build(output_stride=8, in_channels=4)
    assert [m.shape[-1] for m in backbone(torch.randn(1, 4, 64, 64))] == [16, 8, 8, 8]
