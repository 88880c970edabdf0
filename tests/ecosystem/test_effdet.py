"""effdet: SAN under the BiFPN of EfficientDet."""
import pytest

effdet = pytest.importorskip('effdet')

import timm  # noqa: E402
import torch  # noqa: E402

import san_backbones  # noqa: E402, F401
from tests.ecosystem.steps import check_step  # noqa: E402


def test_efficientdet():
    torch.manual_seed(0)
    config = effdet.get_efficientdet_config('tf_efficientdet_d0')
    config.update(backbone_name='test_san_patchwise', backbone_args={}, backbone_indices=(2, 3, 4), num_classes=3,
                  image_size=(128, 128), fpn_channels=16, fpn_cell_repeats=1, box_class_repeats=1)
    model = effdet.EfficientDet(config, pretrained_backbone=True)
    images = torch.rand(2, 3, 128, 128)
    expected = timm.create_model('test_san_patchwise', pretrained=True, features_only=True, out_indices=(2, 3, 4))
    with torch.no_grad():
        for a, b in zip(model.backbone.eval()(images), expected.eval()(images), strict=True):
            assert torch.equal(a, b)
        found = effdet.DetBenchPredict(model).eval()(images)
    assert found.shape == (2, 100, 6)
    bench = effdet.DetBenchTrain(model).train()
    targets = dict(bbox=torch.tensor([[[8., 8., 60., 40.]]] * 2), cls=torch.tensor([[1.], [2.]]))
    check_step(bench(images, targets)['loss'], bench, model.backbone)
