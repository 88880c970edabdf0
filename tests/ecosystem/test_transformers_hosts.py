"""transformers: detectors and segmenters over a `TimmBackboneConfig` learn with a SAN and are saved.

DETR and UperNet, the simplest of them, are looked at closely in test_transformers.py.
"""
import pytest

transformers = pytest.importorskip('transformers', reason='needs the transformers extra')

import timm  # noqa: E402
import torch  # noqa: E402

from san_backbones.activations import follow_bounds  # noqa: E402
from tests.ecosystem.steps import check_step  # noqa: E402

pytest.importorskip('scipy', reason='losses of detectors match by it')

ATTENTION = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                 encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, num_labels=3)
PYRAMID = dict(ATTENTION, d_model=16, decoder_layers=2, encoder_hidden_dim=16, encoder_in_channels=[64, 96, 128],
               decoder_in_channels=[16, 16, 16], num_queries=20, num_denoising=2)
MASKS = dict(mask_feature_size=32, num_labels=3)
LAST, FIRST_THREE, LAST_THREE, LAST_FOUR = (4,), (1, 2, 3), (2, 3, 4), (1, 2, 3, 4)
# model: which maps it takes, its sizes
DETECTORS = {
    'TableTransformer': (LAST, dict(ATTENTION, d_model=16)),
    'ConditionalDetr': (LAST, dict(ATTENTION, d_model=16)),
    'DabDetr': (LAST, dict(ATTENTION, hidden_size=16)),
    'DeformableDetr': (LAST_THREE, dict(ATTENTION, d_model=32, decoder_layers=2, disable_custom_kernels=True)),
    'RTDetr': (LAST_THREE, PYRAMID),
    'RTDetrV2': (LAST_THREE, PYRAMID),
    'DFine': (LAST_THREE, PYRAMID),
    'Deimv2': (LAST_THREE, PYRAMID),
}
SEGMENTERS = {
    # the hybrid form: two maps of the backbone, and two of a transformer on the third
    'DPTForSemanticSegmentation': (FIRST_THREE, dict(
        is_hybrid=True, image_size=64, backbone_featmap_shape=(1, 96, 4, 4), backbone_out_indices=[0, 1, 0, 1],
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        neck_hidden_sizes=[64, 64, 16, 16], reassemble_factors=[1, 1, 1, 0.5], fusion_hidden_size=16, num_labels=3)),
    'Mask2FormerForUniversalSegmentation': (LAST_FOUR, dict(
        MASKS, feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, dim_feedforward=16, num_queries=5, train_num_points=64)),
    'MaskFormerForInstanceSegmentation': (LAST_FOUR, dict(MASKS, fpn_feature_size=32)),
}


def build(name, maps, sizes):
    """The model with pretrained weights in its backbone, as the documentation puts them there."""
    torch.manual_seed(0)
    config = getattr(transformers, name.rpartition('For')[0] + 'Config')
    backbone = transformers.TimmBackboneConfig(backbone='test_san_patchwise', out_indices=maps)
    if name.startswith('MaskFormer'):
        small = transformers.DetrConfig(**dict(ATTENTION, d_model=16))
        sizes = dict(sizes, decoder_config=small)
    model = getattr(transformers, name)(config(backbone_config=backbone, **sizes))
    pretrained = timm.create_model('test_san_patchwise', pretrained=True, features_only=True, out_indices=maps)
    body(model).load_state_dict(pretrained.state_dict())
    return model


def body(model):
    """The timm model in it."""
    found = [module for module in model.modules() if isinstance(module, timm.models.FeatureListNet)]
    assert len(found) == 1, found
    return found[0]


def inputs(name):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 64, 64, generator=generator)
    if 'Detection' in name:
        box = torch.tensor([[.5, .5, .4, .3]])
        labels = [dict(class_labels=torch.tensor([label]), boxes=box) for label in (0, 2)]
        return dict(pixel_values=pixels, labels=labels)
    if 'Semantic' in name:
        return dict(pixel_values=pixels, labels=torch.randint(0, 3, (2, 64, 64), generator=generator))
    masks = torch.zeros(2, 64, 64)
    masks[0, :, :32] = masks[1, :, 32:] = 1
    classes = [torch.tensor([0, 2]), torch.tensor([1, 2])]
    return dict(pixel_values=pixels, mask_labels=[masks, masks], class_labels=classes)


def answer(model, pixels):
    output = model(pixels)
    return [value for key, value in output.items() if 'logits' in key and isinstance(value, torch.Tensor)]


@pytest.mark.parametrize('name, maps, sizes', [
    *(pytest.param(f'{name}ForObjectDetection', *rest, id=name) for name, rest in DETECTORS.items()),
    *(pytest.param(name, *rest, id=name.rpartition('For')[0]) for name, rest in SEGMENTERS.items())])
def test_a_step_moves_the_backbone_and_a_saved_model_says_the_same(name, maps, sizes, tmp_path):
    model = build(name, maps, sizes).train()
    given = inputs(name)
    check_step(model(**given).loss, model, body(model))

    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    follow_bounds(again, {})  # the weights that it began with have none
    with torch.no_grad():
        said, repeated = answer(model, given['pixel_values']), answer(again, given['pixel_values'])
    assert said
    for a, b in zip(said, repeated, strict=True):
        torch.testing.assert_close(b, a)
