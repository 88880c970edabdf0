"""anomalib: features of a SAN for PatchCore."""
import pytest

pytest.importorskip('anomalib')

import timm
import torch
from anomalib.models import Patchcore

import san_backbones  # noqa: F401

LAYERS = ['stages.2', 'stages.3']


def test_features_are_those_of_timm():
    from anomalib.models.components.feature_extractors import TimmFeatureExtractor
    extractor = TimmFeatureExtractor('test_san_patchwise', LAYERS, pre_trained=True)
    expected = timm.create_model('test_san_patchwise', pretrained=True, features_only=True, out_indices=(2, 3)).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        maps, expected = extractor(images), expected(images)
    assert list(maps) == LAYERS and extractor.out_dims == [64, 96]
    assert all(torch.equal(a, b) for a, b in zip(maps.values(), expected, strict=True))


def test_patchcore_finds_what_it_has_not_seen():
    torch.manual_seed(0)
    model = Patchcore('test_san_patchwise', LAYERS, pre_trained=True, coreset_sampling_ratio=0.5, num_neighbors=3).model
    usual = torch.rand(4, 3, 64, 64) / 10
    model.train()(usual)
    model.subsample_embedding(0.5)
    strange = usual[:1].clone()
    strange[..., 16:48, 16:48] = torch.rand(3, 1, 1)
    with torch.no_grad():
        scores = [model.eval()(image).pred_score.item() for image in (usual[:1], strange)]
        where = model(strange).anomaly_map[0, 0]
    assert scores[1] > 1.5 * scores[0]
    assert where[16:48, 16:48].mean() > where[:8].mean()
