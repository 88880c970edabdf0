"""The page to point at pixels: what it holds are the weights of the definition, and it asks the network for nothing.

That it draws them is tested in a browser: `make app-check`.
"""
import base64
import io
import json
import re
import zlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import san_backbones  # noqa: F401, registers the models
from san_backbones import visualize
from san_backbones.study import Study
from san_backbones.viewer import attention_page, page_of
from tests import oracle
from tests.test_visualize import small

pytest.importorskip('matplotlib', reason='needs the visualize extra')


@pytest.fixture(scope='module')
def picture():
    return np.random.default_rng(0).integers(0, 256, (48, 60, 3), np.uint8)


def read(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def floats(text):
    return np.frombuffer(base64.b64decode(text), np.float32)


def weights_in(facts):
    """(P, G, k, k) and the largest error that rounding may make, (G, 1, 1), as the page's script reads them."""
    groups, k, pixels = facts['groups'], facts['kernel'], facts['height'] * facts['width']
    steps = np.array(facts['step'])[:, None, None]
    departures = np.frombuffer(zlib.decompress(base64.b64decode(facts['departures'])), np.int8)
    departures = departures.reshape(groups, k, k, pixels).transpose(3, 0, 1, 2) * steps
    return floats(facts['mean']).reshape(groups, k, k) + departures, steps / 2


@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
def test_holds_the_weights(attention, picture):
    model = small(attention).train()
    data = read(attention_page(model, picture, size=96))
    assert model.training
    net = visualize.find_network(model.eval())
    images = visualize.prepare_picture(model, net, picture, 96).images
    network, = data['networks']
    assert [facts['name'] for facts in network['blocks']] == [
        'stages.0.blocks.0', 'stages.1.blocks.1', 'stages.2.blocks.0']
    for facts in network['blocks']:
        expected = visualize.attention_weights(model, images, facts['name'])[0].numpy()
        if attention == 'pairwise':  # in multiples of average pooling
            expected = expected * facts['kernel'] ** 2
        found, error = weights_in(facts)
        assert found.shape == expected.shape
        assert (np.abs(found - expected) <= error + 1e-5 * np.abs(expected).max()).all()
        assert (error[:, 0, 0] < 0.005 * np.abs(expected - expected.mean(0)).max((0, 2, 3)) + 1e-9).all()
        mean = expected.mean(0)
        departs = np.linalg.norm((expected - mean).reshape(len(expected), -1), axis=1) / np.linalg.norm(mean)
        np.testing.assert_allclose(floats(facts['departs']), departs, rtol=1e-3, atol=1e-5)
        share = np.abs(expected) / np.abs(expected).sum((2, 3), keepdims=True)
        uses = np.exp(-(share * np.log(share + 1e-30)).sum((2, 3))).mean(1)
        np.testing.assert_allclose(floats(facts['uses']), uses, rtol=1e-3)
        assert facts['fixed'] == pytest.approx((mean ** 2).sum() / (expected ** 2).sum((1, 2, 3)).mean(), rel=1e-3)
        most = [*np.abs(expected).max((0, 2, 3)), np.abs(expected.mean(1)).max(), np.abs(expected).max()]
        np.testing.assert_allclose(facts['most'], most, rtol=1e-4)
        np.testing.assert_allclose(facts['most_content'][-1], np.abs(expected - mean).max(), rtol=1e-3)


def test_places(picture):
    """A pixel of the map is a cell of the picture, and neighbours beyond the border are those they mirror."""
    facts = read(attention_page(small('patchwise'), picture, '1.0', size=96))['networks'][0]['blocks'][0]
    assert facts['cell'] == [2, 2] and (facts['height'], facts['width']) == (24, 30)  # stride 4 at twice the size
    assert facts['rows'] == [oracle.reflect(row - 2, 24) for row in range(28)]
    assert facts['columns'] == [oracle.reflect(column - 2, 30) for column in range(34)]
    page = attention_page(small('patchwise'), picture, '1.0')
    assert read(page)['networks'][0]['blocks'][0]['height'] == 12
    shown = Image.open(io.BytesIO(base64.b64decode(read(page)['picture'].partition(',')[2])))
    assert shown.size == (60, 48)


def test_options(picture):
    models = {'one': small('patchwise'), 'two <b>': small('pairwise')}
    page = attention_page(models, picture, ['0.0', '1.0'], (7, 40), 1, untrained=['two <b>'], title='a <i> & b')
    data = read(page)
    assert [[facts['name'] for facts in network['blocks']] for network in data['networks']] == \
        2 * [['stages.0.blocks.0', 'stages.1.blocks.0']]
    assert [network['untrained'] for network in data['networks']] == [False, True]
    assert (data['pixel'], data['channel'], data['held'], data['block']) == ([7, 40], 1, True, 'stages.1.blocks.0')
    assert 'a &lt;i&gt; &amp; b' in page and '<b>' not in page and '<i>' not in page
    data = read(attention_page(models['one'], picture, (1, 1)))
    assert (data['pixel'], data['channel'], data['held'], data['part']) == ([30, 24], 'strongest', False, 'weights')
    assert [facts['name'] for facts in data['networks'][0]['blocks']] == ['stages.1.blocks.1']
    assert read(page_of({'': Study(models['one'], picture)}, 0, part='content'))['part'] == 'content'
    page = attention_page(dict(one=models['one'], on=models['one']), picture, '1.0', np.array([7, 40]), np.int64(1),
                          untrained='one', title='__DATA__')
    data = read(page)
    assert (data['pixel'], data['channel'], page.count('__DATA__')) == ([7, 40], 1, page.count('<title>') + 1)
    assert [network['untrained'] for network in data['networks']] == [True, False]


@pytest.mark.parametrize(('options', 'message'), [
    (dict(channel=4), r"0 to 2, or one of strongest, mean, all, got 4"),
    (dict(channel='some'), "got 'some'"), (dict(pixel=(60, 0)), 'not on the picture'), (dict(blocks='9.0'), "no block"),
    (dict(blocks=[]), 'blocks is empty'), (dict(blocks=()), 'blocks is empty'),
    (dict(limit=40_000), r'take a smaller size, or fewer blocks')])
def test_errors(options, message, picture):
    with pytest.raises(ValueError, match=message):
        attention_page(small('patchwise'), picture, **options)
    with pytest.raises(ValueError, match='at least one network'):
        attention_page({}, picture)


def test_rounds_more_coarsely_to_fit(picture):
    model = small('patchwise')
    full = attention_page(model, picture, size=224)
    less = attention_page(model, picture, size=224, limit=len(full) - 1)
    assert len(less) < len(full) and '1/127' in full and '1/63' in less
    facts = read(less)['networks'][0]['blocks'][0]
    images = visualize.prepare_picture(model, visualize.find_network(model), picture, 224).images
    found, error = weights_in(facts)
    assert (np.abs(found - visualize.attention_weights(model, images, '0.0')[0].numpy()) <= error + 1e-5).all()


def test_one_small_file(picture):
    """A 224-pixel picture and all stages of a network of full size: under 5 MB, with nothing from elsewhere."""
    model = timm.create_model('san10_patchwise.distilled', pretrained=True)
    page = attention_page(model, np.resize(picture, (224, 224, 3)), size=224)
    assert len(page) < 5_000_000 and '1/127' in page
    assert len(read(page)['networks'][0]['blocks']) == 5
    assert "default-src 'none'" in page
    script = re.sub(r'<script type="application/json".*?</script>', '', page, flags=re.S)
    assert not re.search(r'https?:|//\w+\.\w|<link|@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket', script)


def test_runs_once(picture):
    model, runs = small('patchwise'), []
    model.stem.register_forward_hook(lambda *args: runs.append(1))
    study = Study(model, picture)
    first = study.seen('1.0')
    assert study.seen('stages.1.blocks.0') is first and len(runs) == 1
    torch.testing.assert_close(first.weights, visualize.attention_weights(model, study.shown.images, '1.0')[0])
    with torch.no_grad():  # as the study does: with gradients other operators round otherwise
        maps = model.forward_intermediates(study.shown.images, intermediates_only=True)
    for found, expected in zip(study.maps, maps[-len(study.maps):], strict=True):
        torch.testing.assert_close(found, expected[0])
