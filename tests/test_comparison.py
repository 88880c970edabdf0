"""Features of two pictures: one projection for both, and nearest patches as numpy finds them."""
import numpy as np
import pytest
import torch

from san_backbones.comparison import Comparison, compare_figure, draw
from san_backbones.study import Study
from tests.test_visualize import small

pytest.importorskip('matplotlib', reason='needs the visualize extra')


def noise(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope='module')
def model():
    return small('patchwise')


@pytest.fixture(scope='module')
def pair(model):
    return [Study(model, noise(48, 60, 0)), Study(model, noise(40, 72, 1))]


def test_one_projection(pair):
    """The colours are a linear map of the features, the same in both pictures, but for where they are clipped."""
    comparison = Comparison(pair, 1)
    assert [colours.shape for colours in comparison.colours] == [(12, 15, 3), (10, 18, 3)] and comparison.stride == 4
    features = torch.cat([m.flatten(1).T for m in comparison.maps]).double()
    colours = torch.cat([c.flatten(0, 1) for c in comparison.colours]).double()
    inside = ((colours > 0) & (colours < 1)).all(1)
    assert inside.sum() > 100
    known = torch.cat([features, torch.ones(len(features), 1)], 1)
    fitted = known @ torch.linalg.lstsq(known[inside], colours[inside], driver='gelsd').solution
    torch.testing.assert_close(fitted[inside], colours[inside], rtol=0, atol=1e-3)
    centred = features - features.mean(0)
    share = torch.linalg.svdvals(centred).square()
    assert comparison.held == pytest.approx((share[:3].sum() / share.sum()).item(), abs=0.02)
    assert not torch.allclose(Comparison(pair[:1], 1).colours[0], comparison.colours[0], atol=1e-2)


def test_same_picture_same_colours(model):
    twice = Comparison([Study(model, noise(48, 60, 0))] * 2, -1)
    torch.testing.assert_close(*twice.colours)  # but for the order in which sums are taken
    assert twice.stage == 2


@pytest.mark.parametrize('picture', [0, 1])
def test_nearest(pair, picture):
    comparison, cell = Comparison(pair, 2), (3, 4)
    flat = [m.flatten(1).T.double().numpy() for m in comparison.maps]
    mean = np.concatenate(flat).mean(0)
    width = comparison.maps[picture].shape[2]
    chosen = flat[picture][cell[0] * width + cell[1]] - mean
    likeness, nearest = comparison.likeness(cell, picture), comparison.nearest(cell, picture, 3)
    for number, vectors in enumerate(flat):
        expected = (vectors - mean) @ chosen / np.linalg.norm(vectors - mean, axis=1) / np.linalg.norm(chosen)
        np.testing.assert_allclose(likeness[number].flatten(), expected, atol=1e-5)
        order = [index for index in np.argsort(-expected)
                 if number != picture or index != cell[0] * width + cell[1]][:3]
        columns = comparison.maps[number].shape[2]
        assert [(p.picture, p.row * columns + p.column) for p in nearest[number]] == [(number, i) for i in order]
        np.testing.assert_allclose([p.likeness for p in nearest[number]], expected[order], atol=1e-5)


def test_figure(model, pair):
    pictures = [noise(48, 60, 0), noise(40, 72, 1)]
    figure = compare_figure(model, pictures, (30, 20), 1, picture=1, count=3, size=80)
    panels = [axes for axes in figure.axes if axes.images]
    comparison = Comparison([Study(model, picture, 80) for picture in pictures], 1)
    cell = comparison.at((30, 20), 1)
    assert cell == (10, 15)  # twice the size, stride 4
    likeness = comparison.likeness(cell, 1)
    for number in range(2):
        np.testing.assert_allclose(panels[3 * number + 1].images[0].get_array(), comparison.colours[number], atol=1e-6)
        np.testing.assert_allclose(panels[3 * number + 2].images[0].get_array(), likeness[number], atol=1e-6)
    assert [len(axes.patches) for axes in panels] == [3, 0, 0, 4, 1, 1]
    assert panels[3].patches[-1].get_bbox().extents.tolist() == [29.5, 19.5, 31.5, 21.5]
    assert len([axes for axes in figure.axes if not axes.images]) == 1  # one colour bar
    assert 'stage 1, stride 4, 64 channels' in figure.get_suptitle()
    assert len(draw(Comparison(pair[:1]), None).axes[0].patches) == 6


@pytest.mark.parametrize(('options', 'message'), [
    (dict(stage=3), 'stage must be 0 to 2'), (dict(picture=1), 'one of the 1 pictures'),
    (dict(pixel=(60, 0)), 'not on the picture')])
def test_errors(model, options, message):
    with pytest.raises(ValueError, match=message):
        compare_figure(model, [noise(48, 60, 0)], **options)
    with pytest.raises(ValueError, match='0 pictures'):
        compare_figure(model, [])
    with pytest.raises(ValueError, match='at least one picture'):
        Comparison([])
    with pytest.raises(ValueError, match=r'got a tensor \[3, 48, 60\]'):
        compare_figure(model, [torch.zeros(3, 48, 60)])


def test_one_picture_alone(model):
    assert len(compare_figure(model, noise(48, 60, 0)).axes) == len(compare_figure(model, [noise(48, 60, 0)]).axes)
