"""Maps of pytorch-grad-cam, and the order of layers that its FullGrad takes for that of the computation."""
import copy

import pytest
import timm
import torch

import san_backbones  # noqa: F401

MODELS = pytest.mark.parametrize('name', ['test_san_patchwise', 'test_san_pairwise'])


def _model(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3).eval()


def _in_order_of_computation(model):
    """As docs/how-to/other-libraries.md says: the norm that ends a stage comes last."""
    for stage in model.stages:
        for name in ('norm', 'act'):
            stage._modules[name] = stage._modules.pop(name)
    return model


@MODELS
def test_layers_can_be_put_into_the_order_of_computation(name):
    """Without a change to what they compute and are called."""
    model, image = _model(name), torch.randn(1, 3, 48, 64)
    ordered = _in_order_of_computation(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(ordered(image), model(image), rtol=0, atol=0)
    assert ordered.state_dict().keys() == model.state_dict().keys()
    called, expected = [], [layer for layer in ordered.modules() if not list(layer.children()) and list(
        layer.parameters(recurse=False))]
    for layer in expected:
        layer.register_forward_hook(lambda module, given, output: called.append(module))
    ordered(image)
    assert called == expected and len(expected) > 40


@MODELS
def test_grad_cam_is_the_formula(name):
    """Selvaraju et al., equations 1 and 2, by torch.autograd."""
    library = pytest.importorskip('pytorch_grad_cam')
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    model, images = _model(name), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    compared = 0
    for label in range(3):
        features = model.forward_features(images)
        gradient, = torch.autograd.grad(model.forward_head(features)[:, label].sum(), features)
        expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu().detach()
        expected = torch.nn.functional.interpolate(expected[:, None], size=64, mode='bilinear')[:, 0]
        targets = [ClassifierOutputTarget(label)] * 2
        found = torch.from_numpy(library.GradCAM(model, [model.stages[-1]])(images, targets))
        for mine, theirs in zip(expected, found, strict=True):
            assert (mine.max() > 0) == (theirs.max() > 0)
            if mine.max() > 0:  # their resizing is OpenCV's
                assert torch.corrcoef(torch.stack([mine.flatten(), theirs.flatten()]))[0, 1] > 0.99
                compared += 1
    assert compared


@MODELS
def test_full_grad(name):
    library = pytest.importorskip('pytorch_grad_cam')
    model, image = _in_order_of_computation(_model(name)), torch.randn(1, 3, 64, 64)
    found = library.FullGrad(model, [])(image, None)
    assert found.shape == (1, 64, 64) and found.std() > 0.01
