"""The stem: the paper's 1x1 convolution, or a convolution over patches; and the strides of all parts."""
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import san_backbones
from san_backbones import SAN
from san_backbones.count import count_multiply_adds
from san_backbones.export import export_onnx
from san_backbones.visualize import attention_rollout

FORMS = ('pairwise', 'patchwise')
SMALL = dict(depths=(1,) * 5, widths=(32, 32, 64, 64, 96), stem_width=16, kernel_sizes=(3, 5, 3, 3, 3), num_classes=7)


def small(form='patchwise', stem='patch', **options):
    torch.manual_seed(0)
    return SAN(form, stem=stem, **SMALL, **options).eval()


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('size', [(64, 64), (67, 90), (3, 130), (1, 1)])
def test_a_patch_is_four_pixels_square(form, size):
    """The map that the stages get is torch's convolution over patches of 4x4 pixels, its norm and ReLU, in float64."""
    model = small(form).double()
    norm = model.stem.norm
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    seen = []
    model.stages.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(image)
    whole = F.pad(image, [0, max(4 - size[1], 0), 0, max(4 - size[0], 0)])
    height, width = (side // 4 for side in whole.shape[2:])
    patches = whole[:, :, :4 * height, :4 * width].reshape(2, 3, height, 4, width, 4)
    expected = torch.einsum('ncyaxb,ocab->noyx', patches, model.stem.conv.weight)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    expected = ((expected - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]).relu()
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('stem, output_stride, strides, dilations', [
    ('point', 32, (2, 4, 8, 16, 32), (1, 1, 1, 1, 1)), ('point', 16, (2, 4, 8, 16, 16), (1, 1, 1, 1, 2)),
    ('patch', 32, (4, 4, 8, 16, 32), (1, 1, 1, 1, 1)), ('patch', 8, (4, 4, 8, 8, 8), (1, 1, 1, 2, 4))])
def test_strides(form, stem, output_stride, strides, dilations):
    """The maps have the sizes that `feature_info`, the parts' strides and the diagrams' say."""
    model = small(form, stem, output_stride=output_stride, position_ref_size=224)
    _, maps = model.forward_intermediates(torch.randn(1, 3, 64, 128))
    assert [tuple(x.shape[2:]) for x in maps] == [(64 // s, 128 // s) for s in strides]
    assert [entry['reduction'] for entry in model.feature_info] == list(strides)
    parts = [model.stem, *model.stages]
    assert [math.prod(part.stride for part in parts[:n + 2]) for n in range(5)] == list(strides)
    layers = [block.attn for stage in model.stages for block in stage.blocks]
    assert [layer.dilation for layer in layers] == list(dilations)
    if form == 'pairwise':  # a step of the map is a step of a 224-pixel image at the stride without dilation
        undilated = [max(2 << i, model.stem.stride) for i in range(5)]
        for layer, stride, dilation in zip(layers, undilated, dilations):
            assert layer.position_step == pytest.approx(2 / (224 // stride - 1) / dilation)


@pytest.mark.parametrize('form', FORMS)
def test_multiply_adds_are_those_that_torch_counts(form):
    model = small(form)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 96, 96))
    pixels = sum((96 // entry['reduction']) ** 2 for entry in model.feature_info)  # one block a stage
    positions = 4 * pixels if form == 'pairwise' else 0  # mapped without a convolution, which torch would count
    assert count_multiply_adds(model, 96) == counter.get_total_flops() // 2 + positions


@pytest.mark.parametrize('form', FORMS)
def test_patches_in_timm(form):
    """Feature extractors, other image channels, scripts, folding and checkpointing, as with the paper's stem."""
    torch.manual_seed(0)
    name = f'test_san_{form}'
    model = timm.create_model(name, stem='patch', num_classes=5).eval()
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        logits = model(image)
        torch.testing.assert_close(torch.jit.script(model)(image), logits, rtol=1e-4, atol=1e-5)
        features = timm.create_model(name, stem='patch', features_only=True).eval()
        assert features.feature_info.reduction() == [4, 4, 8, 16, 32]
        assert [x.shape[-1] for x in features(image)] == [24, 24, 12, 6, 3]
        traced = timm.create_model(name, stem='patch', features_only=True, feature_cls='fx').eval()
        traced.load_state_dict(features.state_dict(), strict=False)
        assert [x.shape[-1] for x in traced(image)] == [24, 24, 12, 6, 3]
        folded = san_backbones.fuse_for_inference(model)(image)
        torch.testing.assert_close(folded, logits, rtol=1e-4, atol=1e-5)
    grey = timm.create_model(name, stem='patch', in_chans=1, num_classes=5).train()
    grey.set_grad_checkpointing()
    grey(torch.randn(2, 1, 32, 32)).sum().backward()
    assert grey.stem.conv.weight.grad.shape[1:] == (1, 4, 4)
    with pytest.raises(ValueError, match='dtype of the weights'):
        model(image.double())


def test_weights_of_the_other_stem_do_not_fit():
    with pytest.raises(RuntimeError, match=r'stem\.conv\.weight'):
        small(stem='patch').load_state_dict(small(stem='point').state_dict())
    with pytest.raises(ValueError, match="stem must be one of 'point', 'patch', got 'conv'"):
        small(stem='conv')


@pytest.mark.parametrize('size', [(64, 64), (70, 97), (3, 40)])
def test_rolled_out_to_every_pixel_of_a_patch(size):
    """Mass is kept, and all pixels of a patch get the same."""
    mass = attention_rollout(small(), torch.randn(1, 3, *size), [(0, 0)], 'stages.1.blocks.0')
    assert mass.shape == (1, 1, *size) and mass.sum().item() == pytest.approx(1, abs=1e-5)
    patch = mass[0, 0, :4, :4]
    assert patch.max() == patch.min() > 0
    assert attention_rollout(small(), torch.randn(1, 3, 64, 64), [(0, 0)], to='finest').shape == (1, 1, 16, 16)


@pytest.mark.parametrize('ceil_mode', [False, True])
def test_patches_in_mmengine(ceil_mode):
    """Maps of strides 4, 8, 16 and 32, of a ResNet's sizes where they are rounded up."""
    backbone = pytest.importorskip('san_backbones.mm').SANBackbone(
        dict(attention='pairwise', stem='patch', depths=(1,) * 5, widths=(32, 32, 64, 64, 96), stem_width=16),
        ceil_mode=ceil_mode).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 70, 97))
    down = (lambda side: -(-side // 2)) if ceil_mode else (lambda side: side // 2)
    for x in maps:
        expected = [70, 97]
        for _ in range(round(math.log2(97 / x.shape[-1]))):
            expected = [down(side) for side in expected]
        assert list(x.shape[2:]) == expected
    assert maps[0].shape[2:] == ((18, 25) if ceil_mode else (17, 24))


@pytest.mark.parametrize('form', FORMS)
def test_patches_exported(form, tmp_path):
    """The ONNX file computes what torch does, at the size it was made at and at others."""
    runtime = pytest.importorskip('onnxruntime')
    model = small(form)
    export_onnx(model, tmp_path / 'model.onnx', 64)
    session = runtime.InferenceSession(str(tmp_path / 'model.onnx'))
    for size in ((64, 64), (65, 98)):
        image = torch.randn(1, 3, *size)
        logits, = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(image), rtol=1e-4, atol=1e-5)
