"""torchgeo: SAN classifies and segments pictures of any number of bands."""
import pytest

pytest.importorskip('torchgeo')

import timm
import torch
from torchgeo.trainers import ClassificationTask, SemanticSegmentationTask

import san_backbones  # noqa: F401
from tests.ecosystem.steps import check_step

IMAGES = torch.rand(2, 4, 64, 64)


def test_a_classifier():
    torch.manual_seed(0)
    task = ClassificationTask('test_san_patchwise', weights=True, in_channels=4, num_classes=3)
    expected = timm.create_model('test_san_patchwise', pretrained=True, in_chans=4).eval()
    with torch.no_grad():
        assert torch.equal(task.model.eval().forward_features(IMAGES), expected.forward_features(IMAGES))
    loss = torch.nn.functional.cross_entropy(task.train()(IMAGES), torch.tensor([0, 2]))
    check_step(loss, task, task.model)


def test_a_unet():
    torch.manual_seed(0)
    task = SemanticSegmentationTask('unet', 'tu-test_san_patchwise', weights=True, in_channels=4, num_classes=3)
    masks = task(IMAGES)
    assert masks.shape == (2, 3, 64, 64)
    check_step(torch.nn.functional.cross_entropy(masks, torch.randint(0, 3, (2, 64, 64))), task, task.model.encoder)
