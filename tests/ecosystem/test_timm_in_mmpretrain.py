"""MMPretrain's own TIMMBackbone builds SAN from timm, in MMPretrain and in MMDetection.

MMPretrain and transformers 5 break each other, so it is no part of the test environment: `make test-mmpretrain`.
"""
import importlib.util

import pytest

for name in ('mmpretrain', 'mmengine'):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f'needs {name}: make test-mmpretrain', allow_module_level=True)

import timm  # noqa: E402
import torch  # noqa: E402

import san_backbones.mm  # noqa: E402, F401  before mmpretrain, which imports mmcv's operators

# isort: split
import mmpretrain.models  # noqa: E402, F401
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from mmpretrain.structures import DataSample  # noqa: E402


def test_a_classifier_trains_from_weights_that_ship():
    config = dict(
        type='mmpretrain.ImageClassifier',
        backbone=dict(type='TIMMBackbone', model_name='test_san_patchwise', pretrained=True),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=3, in_channels=128, loss=dict(type='CrossEntropyLoss')))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config)
        model.init_weights()
    shipped = timm.create_model('test_san_patchwise', pretrained=True)
    body = model.backbone.timm_model
    assert torch.equal(body.stages[4].conv.weight, shipped.stages[4].conv.weight)
    before = {name: p.detach().clone() for name, p in body.named_parameters()}
    samples = [DataSample().set_gt_label(label) for label in (0, 2)]
    loss, _ = model.parse_losses(model.train()(torch.randn(2, 3, 64, 64), samples, mode='loss'))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.).step()
    moved = [not torch.equal(before[name], p) for name, p in body.named_parameters()]
    assert torch.isfinite(loss) and sum(moved) > 0.8 * len(moved)


def test_the_maps_of_a_detector():
    """How MMDetection's documentation takes backbones of timm: through MMPretrain."""
    import mmdet.models  # noqa: F401
    config = dict(type='mmpretrain.TIMMBackbone', model_name='test_san_patchwise', features_only=True, pretrained=False,
                  out_indices=(1, 2, 3, 4), norm_layer='BN')
    with DefaultScope.overwrite_default_scope('mmdet'):
        backbone = MODELS.build(config)
        neck = MODELS.build(dict(type='FPN', in_channels=[64, 64, 96, 128], out_channels=32, num_outs=5))
    maps = neck(backbone(torch.randn(1, 3, 64, 64)))
    assert [m.shape for m in maps] == [(1, 32, side, side) for side in (16, 8, 4, 2, 1)]
    sum(m.mean() for m in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())
