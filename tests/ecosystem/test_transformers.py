"""transformers: SAN as TimmBackbone, in UperNet and DETR, and as classifier through TimmWrapper."""
import pytest

transformers = pytest.importorskip('transformers', reason='needs the transformers extra')

import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import san_backbones  # noqa: E402
from san_backbones import PatchwiseAttention, hub  # noqa: E402
from san_backbones.activations import follow_bounds  # noqa: E402

STAGES = (1, 2, 3, 4)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    torch.manual_seed(0)


def backbone_config(**kwargs):
    return transformers.TimmBackboneConfig(**dict(dict(backbone='test_san_patchwise', out_indices=STAGES), **kwargs))


def upernet(**kwargs):
    return transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(
        backbone_config=backbone_config(), hidden_size=16, auxiliary_channels=8, num_labels=3, **kwargs))


def detr(**kwargs):
    size = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5)
    return transformers.DetrForObjectDetection(transformers.DetrConfig(
        backbone_config=backbone_config(**kwargs), num_labels=3, **size))


def step(model, backbone, **inputs):
    """Takes a step of SGD that must move the backbone's weights."""
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    model.train()
    loss = model(**inputs).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=1.).step()
    moved = [not torch.equal(before[name], p) for name, p in backbone.named_parameters()]
    assert sum(moved) > 0.8 * len(moved)


def test_features_are_those_of_timm():
    backbone = transformers.AutoBackbone.from_config(backbone_config(out_indices=(0, 2, -1))).eval()
    expected = timm.create_model('test_san_patchwise', features_only=True, out_indices=(0, 2, 4)).eval()
    expected.load_state_dict(backbone._backbone.state_dict())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps, expected = backbone(images).feature_maps, expected(images)
    assert backbone.channels == [m.shape[1] for m in maps] == [32, 64, 128]
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    assert backbone.stage_names == [f'stages.{i}' for i in range(5)]


@pytest.mark.parametrize('options, shape', [
    (dict(output_stride=8), (1, 128, 8, 8)), (dict(num_channels=1), (1, 128, 2, 2)),
    (dict(freeze_batch_norm_2d=True), (1, 128, 2, 2))])
def test_options(options, shape):
    backbone = transformers.TimmBackbone(backbone_config(out_indices=[-1], **options))
    images = torch.randn(1, options.get('num_channels', 3), 64, 64)
    assert [m.shape for m in backbone(images).feature_maps] == [shape]
    assert all(layer.gamma_is_plain() for layer in backbone.modules() if isinstance(layer, PatchwiseAttention))
    frozen = [name for name, module in backbone.named_modules() if 'Frozen' in type(module).__name__]
    assert bool(frozen) == options.get('freeze_batch_norm_2d', False)


def test_the_models_of_the_paper():
    with torch.device('meta'):
        backbone = transformers.TimmBackbone(backbone_config(backbone='san15_patchwise'))
    assert backbone.channels == [256, 512, 1024, 2048]


def test_weights(monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', 'nowhere')
    monkeypatch.delenv(hub.FOLDER_VARIABLE, raising=False)
    pretrained = timm.create_model('test_san_patchwise', pretrained=True, features_only=True, out_indices=STAGES)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = pretrained.eval()(images)
        # transformers 5.23 resets the statistics of all BatchNorm2d of timm models it has loaded
        reloaded = transformers.TimmBackbone.from_pretrained('test_san_patchwise', out_indices=STAGES).eval()
        reloaded._backbone.load_state_dict(pretrained.state_dict())
        frozen = transformers.TimmBackbone(backbone_config(freeze_batch_norm_2d=True), pretrained=True).eval()
        for backbone in (reloaded, frozen):
            for a, b in zip(backbone(images).feature_maps, expected, strict=True):
                torch.testing.assert_close(a, b)
    with pytest.raises(hub.WeightsError, match='weights of san15_patchwise.*To get them'):
        transformers.TimmBackbone.from_pretrained('san15_patchwise')


def test_a_saved_backbone(tmp_path):
    """transformers 5 saves timm backbones; its from_pretrained takes timm names only, so it is read in two lines."""
    backbone = transformers.AutoBackbone.from_config(backbone_config()).train()
    backbone(torch.randn(2, 3, 64, 64))
    backbone.eval().save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    again = transformers.AutoBackbone.from_config(config).eval()
    again.load_state_dict(load_file(tmp_path / 'model.safetensors'))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(backbone(images).feature_maps, again(images).feature_maps, strict=True):
            assert torch.equal(a, b)


def test_upernet_trains_and_is_saved(tmp_path):
    model = upernet()
    # built from a config it has random weights; pretrained ones come from timm
    pretrained = timm.create_model('test_san_patchwise', pretrained=True, features_only=True, out_indices=STAGES)
    model.backbone._backbone.load_state_dict(pretrained.state_dict())
    images = torch.randn(2, 3, 64, 64)
    step(model, model.backbone, pixel_values=images, labels=torch.randint(0, 3, (2, 64, 64)))
    model.eval().save_pretrained(tmp_path)
    again = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    follow_bounds(again, {})  # the weights that it began with have none
    with torch.no_grad():
        logits = model(images).logits
        assert logits.shape == (2, 3, 64, 64)
        torch.testing.assert_close(again(images).logits, logits)


def test_weights_of_timm_survive_the_initialisation_of_the_host():
    """transformers initialises what it has built; the backbone must keep timm's initialisation."""
    torch.manual_seed(1)
    own = timm.create_model('test_san_patchwise').stages[2].blocks[0].attn.query.weight
    hosted = upernet().backbone._backbone.stages_2.blocks[0].attn.query.weight
    assert abs(hosted.std() / own.std() - 1) < 0.3 and own.std() > 0.05  # the host's own is 0.02


@pytest.mark.parametrize('frozen', [False, True], ids=['norms of DETR', 'norms of torchvision'])
def test_detr_trains_and_is_saved(frozen, tmp_path):
    model = detr(freeze_batch_norm_2d=frozen)
    encoder = next(m for m in model.modules() if type(m).__name__ == 'DetrConvEncoder')
    # DETR replaces batch norms by frozen ones: the attention must still take its fast paths
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in encoder.modules())
    layers = [m for m in encoder.modules() if isinstance(m, PatchwiseAttention)]
    assert len(layers) == 5 and all(layer.gamma_is_plain() for layer in layers)
    images = torch.randn(2, 3, 64, 64)
    pretrained = timm.create_model('test_san_patchwise', pretrained=True, features_only=True, out_indices=STAGES)
    encoder.model.load_state_dict(pretrained.state_dict())
    with torch.no_grad():
        for a, b in zip(encoder.model(images), pretrained.eval()(images), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    labels = [dict(class_labels=torch.tensor([label]), boxes=torch.tensor([[.5, .5, .4, .3]])) for label in (0, 2)]
    step(model, encoder, pixel_values=images, labels=labels)
    model.eval().save_pretrained(tmp_path)
    again = transformers.DetrForObjectDetection.from_pretrained(tmp_path).eval()
    follow_bounds(again, {})  # the weights that it began with have none
    with torch.no_grad():
        output = model(images)
        assert output.pred_boxes.shape == (2, 5, 4)
        torch.testing.assert_close(again(images).logits, output.logits)
        with san_backbones.ops.use_backend('reference'):
            torch.testing.assert_close(model(images).logits, output.logits, rtol=1e-4, atol=1e-5)


def test_a_folder_of_weights_as_classifier_with_its_image_processor(tmp_path):
    folder = hub.find_local('test_san_patchwise.shapes').parent
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert model.config.id2label == {0: 'square', 1: 'star', 2: 'ring'}
    picture = np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8)
    pixels = processor(picture)['pixel_values']
    assert pixels.shape == (1, 3, 96, 96)
    in_timm = timm.create_model('test_san_patchwise', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, in_timm(pixels))
        features = transformers.AutoModel.from_pretrained(folder).eval()(pixels, output_hidden_states=True)
        assert torch.equal(features.last_hidden_state, in_timm.forward_features(pixels))
    assert [m.shape[-1] for m in features.hidden_states] == [48, 24, 12, 6, 3]
    model(pixels, labels=torch.tensor([1])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())

    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(pixels), in_timm(pixels))
