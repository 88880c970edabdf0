"""fastai: SAN in a learner of pictures, and as the encoder of its U-Net."""
import pytest

pytest.importorskip('fastai')

import timm
import torch
from fastai.vision.learner import create_timm_model
from fastai.vision.models.unet import DynamicUnet

import san_backbones  # noqa: F401
from tests.ecosystem.steps import check_step


def test_a_classifier():
    torch.manual_seed(0)
    model, _ = create_timm_model('test_san_patchwise', 3, pretrained=True)
    expected = timm.create_model('test_san_patchwise', pretrained=True).eval()
    images = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model[0].eval()(images), expected.forward_features(images))
    loss = torch.nn.functional.cross_entropy(model.train()(images), torch.tensor([0, 1, 2, 0]))
    check_step(loss, model, model[0])


def test_a_unet():
    torch.manual_seed(0)
    features = timm.create_model('test_san_patchwise', pretrained=True, features_only=True)
    encoder = torch.nn.Sequential(*features.children())
    model = DynamicUnet(encoder, 3, (64, 64))
    images = torch.rand(2, 3, 64, 64)
    masks = model(images)
    assert masks.shape == (2, 3, 64, 64)
    assert len(model.sfs) == 4  # a skip for every stride above the last
    check_step(torch.nn.functional.cross_entropy(masks, torch.randint(0, 3, (2, 64, 64))), model, encoder)
