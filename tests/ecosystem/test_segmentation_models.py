"""segmentation_models_pytorch: SAN as a `tu-` encoder of its networks."""
import pytest

smp = pytest.importorskip('segmentation_models_pytorch', reason='needs the smp extra')

import timm  # noqa: E402
import torch  # noqa: E402
from huggingface_hub import constants  # noqa: E402

import san_backbones  # noqa: E402
from san_backbones.hub import FOLDER_VARIABLE, WeightsError  # noqa: E402

SMALL = 'tu-test_san_patchwise'
CHANNELS = [32, 64, 64, 96, 128]
# PSPNet looks at the first three maps only
NETWORKS = {'Unet': 32, 'FPN': 32, 'PSPNet': 8, 'DeepLabV3': 8, 'DeepLabV3Plus': 16, 'UPerNet': 32, 'Segformer': 32}


def encoder(name=SMALL, weights=None, **kwargs):
    return smp.encoders.get_encoder(name, weights=weights, **kwargs)


@pytest.mark.parametrize('name, output_stride', NETWORKS.items())
def test_a_step_moves_every_weight_of_the_encoder(name, output_stride):
    torch.manual_seed(0)
    network = getattr(smp, name)(SMALL, encoder_weights=None, classes=2)
    assert network.encoder.output_stride == output_stride
    before = {key: p.detach().clone() for key, p in network.encoder.named_parameters()}
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 2, (2, 64, 64))
    logits = network(images)
    assert logits.shape == (2, 2, 64, 64)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    for key, p in network.encoder.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), key
    torch.optim.SGD(network.parameters(), lr=1.).step()
    moved = [not torch.equal(before[key], p) for key, p in network.encoder.named_parameters()]
    assert sum(moved) > 0.8 * len(moved)  # a constant before a norm changes nothing, and so does not move


@pytest.mark.parametrize('depth', range(1, 6))
def test_maps_are_those_of_timm_at_every_depth(depth):
    torch.manual_seed(0)
    own = encoder(depth=depth, in_channels=4).eval()
    images = torch.randn(1, 4, 64, 96)
    with torch.no_grad():
        first, *maps = own(images)
        expected = timm.create_model('test_san_patchwise', features_only=True, in_chans=4).eval()
        expected.load_state_dict(own.model.state_dict(), strict=False)
        expected = expected(images)[:depth]
    assert torch.equal(first, images) and len(maps) == depth
    assert own.out_channels == [4, *CHANNELS[:depth]] and own.output_stride == 2 ** depth
    assert [m.shape[1:] for m in maps] == [(c, 64 >> i, 96 >> i) for i, c in enumerate(CHANNELS[:depth], 1)]
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_output_stride_and_one_channel(output_stride):
    maps = encoder(output_stride=output_stride, in_channels=1)(torch.randn(2, 1, 64, 64))
    assert [64 // m.shape[-1] for m in maps] == [min(stride, output_stride) for stride in (1, 2, 4, 8, 16, 32)]


@pytest.mark.parametrize('name', ['san10_pairwise', 'san15_patchwise'])
def test_the_models_of_the_paper(name):
    with torch.device('meta'):
        own = encoder(f'tu-{name}')
        maps = own(torch.empty(1, 3, 64, 64))
    assert own.out_channels == [3, 64, 256, 512, 1024, 2048]
    assert [m.shape[-1] for m in maps] == [64, 32, 16, 8, 4, 2]


def test_weights_that_ship_and_their_preprocessing():
    network = smp.Unet(SMALL, encoder_weights=True)
    shipped = timm.create_model('test_san_patchwise', pretrained=True)
    assert torch.equal(network.encoder.model.stages_4.conv.weight, shipped.stages[4].conv.weight)
    params = smp.encoders.get_preprocessing_params(SMALL)
    assert params['mean'] == list(shipped.pretrained_cfg['mean']) and params['input_space'] == 'RGB'
    grey = encoder(weights=True, in_channels=1)  # timm adds up the weights of the colours
    torch.testing.assert_close(grey.model.stem.conv.weight, shipped.stem.conv.weight.sum(1, keepdim=True))


def test_weights_in_a_folder(monkeypatch, tmp_path):
    import safetensors.torch
    trained = timm.create_model('san10_pairwise')
    (tmp_path / 'san10_pairwise.in1k').mkdir()
    safetensors.torch.save_file(trained.state_dict(), tmp_path / 'san10_pairwise.in1k/model.safetensors')
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    own = encoder('tu-san10_pairwise', weights=True, depth=3)
    assert torch.equal(own.model.stages_2.conv.weight, trained.stages[2].conv.weight)


def test_weights_that_are_not_there(monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', 'nowhere')
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    with pytest.warns(UserWarning, match="encoder_weights='imagenet'"), \
            pytest.raises(WeightsError, match='weights of san15_patchwise.*To get them'):
        smp.Unet('tu-san15_patchwise', encoder_weights='imagenet')
    with pytest.raises(RuntimeError, match='No pretrained weights exist for test_san_pairwise'):
        smp.Unet('tu-test_san_pairwise', encoder_weights=True)


def test_a_frozen_encoder_stays_as_it_is():
    network = smp.FPN(SMALL, encoder_weights=None)
    network.freeze_encoder()
    network.train()
    before = {key: tensor.clone() for key, tensor in network.encoder.state_dict().items()}
    network(torch.randn(2, 3, 64, 64)).mean().backward()
    torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.).step()
    assert all(torch.equal(before[key], tensor) for key, tensor in network.encoder.state_dict().items())
    assert network.segmentation_head[0].weight.grad.abs().sum() > 0


def test_classes_beside_masks_and_a_saved_network(tmp_path):
    network = smp.UPerNet(SMALL, encoder_weights=None, aux_params=dict(classes=3)).eval()
    network.save_pretrained(str(tmp_path / 'network'))
    again = smp.from_pretrained(str(tmp_path / 'network')).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        masks, classes = network(images)
        assert masks.shape == (1, 1, 64, 64) and classes.shape == (1, 3)
        assert torch.equal(again(images)[0], masks) and torch.equal(again(images)[1], classes)


def test_fused_for_inference():
    network = smp.Unet(SMALL, encoder_weights=True).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = network(images)
        san_backbones.fuse_for_inference(network)
        torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-4)
