"""autotimm: SAN in its classifier, detector and segmenter."""
import pytest

autotimm = pytest.importorskip('autotimm')

import timm  # noqa: E402
import torch  # noqa: E402

import san_backbones  # noqa: E402, F401
from tests.ecosystem.steps import check_step  # noqa: E402

NAME = 'test_san_patchwise'


def test_a_classifier():
    torch.manual_seed(0)
    model = autotimm.ImageClassifier(NAME, num_classes=3, compile_model=False)
    loss = torch.nn.functional.cross_entropy(model(torch.rand(2, 3, 64, 64)), torch.tensor([0, 2]))
    check_step(loss, model, model.backbone)


def test_a_segmenter():
    torch.manual_seed(0)
    model = autotimm.SemanticSegmentor(NAME, num_classes=3, compile_model=False)
    batch = dict(image=torch.rand(2, 3, 64, 64), mask=torch.randint(0, 3, (2, 64, 64)))
    check_step(model.training_step(batch, 0), model, model.backbone)


def test_a_detector():
    torch.manual_seed(0)
    model = autotimm.ObjectDetector(NAME, num_classes=3, fpn_channels=32, head_num_convs=1, compile_model=False)
    box = torch.tensor([[8., 8., 40., 40.]])
    batch = dict(image=torch.rand(2, 3, 64, 64), boxes=[box, box], labels=[torch.tensor([0]), torch.tensor([2])])
    check_step(model.training_step(batch, 0), model, model.backbone)
    expected = timm.create_model(NAME, features_only=True, out_indices=(2, 3, 4))
    assert model.backbone.feature_info.channels() == expected.feature_info.channels()
