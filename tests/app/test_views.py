"""What the page shows, without Gradio: the code is that of the figures, and the maps of a picture are computed once."""
import concurrent.futures
import html
import json
import pathlib
import re
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import san_backbones  # noqa: F401, registers the models
from san_backbones import visualize
from san_backbones.app import networks, pictures, predictions, views
from san_backbones.app.views import NONE, Chosen, Views
from san_backbones.study import Study
from tests.test_visualize import small

pytest.importorskip('matplotlib', reason='needs the visualize extra')


def noise(path, height=48, width=60, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def shown():
    """A trained network, and an untrained one of the other form."""
    return Views(networks.choices(networks.given('test_san_patchwise'), 'test_san_patchwise'))


def page_in(frame):
    page = html.unescape(re.search('srcdoc="(.*)"', frame, re.S)[1])
    return json.loads(re.search('id="data">(.*?)</script>', page, re.S)[1])


# --- Pictures --------------------------------------------------------------------------------------------------------

def test_pictures(tmp_path):
    path = noise(tmp_path / 'a.png')
    found = pictures.read(path)
    np.testing.assert_array_equal(np.asarray(found.image), np.asarray(Image.open(path)))
    assert (found.name, found.code) == ('a.png', "'a.png'")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(tmp_path / 'turned.jpg', exif=exif)
    assert pictures.read(str(tmp_path / 'turned.jpg')).image.size == (48, 60)
    Image.open(path).convert('LA').save(tmp_path / 'grey.png')
    assert pictures.read(str(tmp_path / 'grey.png')).image.mode == 'RGB'


def test_pictures_that_are_refused(tmp_path, monkeypatch):
    data = pathlib.Path(noise(tmp_path / 'a.png')).read_bytes()
    for name, content in (('broken.png', data[:3000]), ('header.png', data[:20]), ('words.jpg', b'words'),
                          ('none.png', b'')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f'{name} cannot be read as a picture'):
            pictures.read(str(tmp_path / name))
    Image.new('1', (20_000, 4)).save(tmp_path / 'wide.png')
    with pytest.raises(ValueError, match='20000 x 4 pixels; the page takes up to 10000 on a side'):
        pictures.read(str(tmp_path / 'wide.png'))
    Image.new('1', (2, 3_000)).save(tmp_path / 'thin.png')
    with pytest.raises(ValueError, match='2 x 3000 pixels; the page takes pictures whose sides differ up to 20 times'):
        pictures.read(str(tmp_path / 'thin.png'))
    Image.new('1', (9_000, 9_000)).save(tmp_path / 'many.png')
    with pytest.raises(ValueError, match='50 million in all'):
        pictures.read(str(tmp_path / 'many.png'))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10_000)
    with pytest.raises(ValueError, match='far too many pixels'):
        pictures.read(str(tmp_path / 'many.png'))
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / 'deep.png')
    with pytest.raises(ValueError, match='more than 8 bits'):
        pictures.read(str(tmp_path / 'deep.png'))


def test_photographs():
    data = pytest.importorskip('skimage.data', reason='the photographs come with scikit-image')
    found = pictures.examples()
    assert [example.name for example in found] == ['cat', 'astronaut', 'coffee', 'rocket']
    for example in found:
        picture = pictures.read(example.path)
        assert picture.name == example.name and picture.code.startswith('skimage.data.')
        np.testing.assert_array_equal(np.asarray(picture.image), getattr(data, picture.code[13:-2])())


# --- Networks --------------------------------------------------------------------------------------------------------

def run(code):
    found = {}
    exec(code, dict(timm=timm, torch=torch), found)
    return found['model']


def same(model, other):
    expected = other.state_dict()
    return model.training == other.training and all(
        torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_networks(tmp_path):
    trained = networks.given('test_san_patchwise')
    assert not trained.untrained and same(run(trained.code), trained.model)
    random = networks.given('test_san_pairwise', random=True)
    assert random.untrained and random.name == 'test_san_pairwise, untrained' and same(run(random.code), random.model)
    path = tmp_path / 'mine.pth'
    torch.manual_seed(3)
    torch.save(timm.create_model('test_san_pairwise', num_classes=4).state_dict(), path)
    own = networks.given('test_san_pairwise', path)
    assert own.name == 'test_san_pairwise: mine.pth' and not own.untrained and same(run(own.code), own.model)
    with pytest.raises(RuntimeError, match='--weights FILE'):
        networks.given('san15_pairwise')


def test_choices(monkeypatch):
    first = networks.given('test_san_patchwise')
    names = ['test_san_patchwise', 'test_san_pairwise, untrained', 'san10_patchwise.distilled',
             'san10_pairwise.distilled', 'test_san_patchwise.shapes']
    found = networks.choices(first, 'test_san_patchwise')
    assert [choice.name for choice in found] == names
    assert found[0].load() is first and found[1].load().untrained and found[1].load() is found[1].load()
    distilled = networks.choices(first._replace(name='san10_patchwise.distilled'), 'san10_patchwise.distilled')
    assert [choice.name for choice in distilled] == [
        'san10_patchwise.distilled', 'san10_pairwise.distilled', 'test_san_patchwise.shapes']
    assert not distilled[1].load().untrained
    monkeypatch.setattr('san_backbones.hub.find_local', lambda name: name)
    assert networks.choices(first, 'san10_patchwise')[1].name == 'san10_pairwise'


# --- Attention -------------------------------------------------------------------------------------------------------

def test_footprints(shown, tmp_path):
    path = noise(tmp_path / 'a.png')
    runs = []
    shown.network('test_san_patchwise').model.stem.register_forward_hook(lambda *args: runs.append(1))
    both = 'test_san_patchwise', 'test_san_pairwise, untrained'
    frame = shown.footprints(path, *both, 'stages.1.blocks.0', 96, Chosen())
    assert 'sandbox="allow-scripts"' in frame
    data = page_in(frame)
    assert [(network['name'], network['untrained']) for network in data['networks']] == [
        (both[0], False), (both[1], True)]
    assert not data['held'] and data['pixel'] == [30, 24]
    data = page_in(shown.footprints(path, both[0], NONE, 'stages.2.blocks.0', 96, Chosen((3, 4), 1, 'content')))
    block, = data['networks'][0]['blocks']
    assert (block['name'], block['height']) == ('stages.2.blocks.0', 12)
    assert (data['held'], data['pixel'], data['channel'], data['part']) == (True, [3, 4], 1, 'content')
    assert len(runs) == 1  # the maps of a picture are computed once
    shown.footprints(path, both[0], NONE, 'stages.2.blocks.0', 160, Chosen())
    assert len(runs) == 2
    noise(path, seed=1)  # another picture of the same name
    again = page_in(shown.footprints(path, both[0], NONE, 'stages.2.blocks.0', 96, Chosen()))
    assert len(runs) == 3 and again['networks'][0]['blocks'][0]['mean'] != block['mean']


def test_a_channel_of_a_wider_block(shown, tmp_path):
    path, network, chosen = noise(tmp_path / 'a.png'), 'test_san_patchwise', Chosen((3, 4), 3)
    channels = {}
    for block in ('stages.4.blocks.0', 'stages.0.blocks.0'):
        channels[block] = page_in(shown.footprints(path, network, NONE, block, 96, chosen))['channel']
        assert ('channel=3' in shown.footprint_code(path, network, block, 96, chosen)) == (channels[block] == 3)
        shown.footprint_figure(path, network, block, 96, chosen)
    assert channels == {'stages.4.blocks.0': 3, 'stages.0.blocks.0': 'strongest'}


def test_blocks_of_another_network():
    found = Views([networks.Choice(name, lambda model=model: networks.Network(name, model, True, ''))
                   for name, model in (('a', small('patchwise')), ('b', small('pairwise', depths=(1, 1, 1))))])
    assert found.block('a', 'stages.1.blocks.1') == 'stages.1.blocks.1'
    assert found.block('b', 'stages.1.blocks.1') == 'stages.1.blocks.0'
    assert found.block('b', 'stages.9.blocks.1') == 'stages.1.blocks.0' == found.block('b', None)
    with pytest.raises(ValueError, match="no network 'c' here; there are a, b"):
        found.network('c')


@pytest.mark.parametrize(('message', 'expected'), [
    (dict(x=3, y=4), Chosen((3, 4))), (dict(x=3, y=4, channel=2, part='content'), Chosen((3, 4), 2, 'content')),
    (dict(x='3', y=4, channel="0); import os", part='os'), Chosen((3, 4))),
    (dict(x=1, y=2, channel='all'), Chosen((1, 2), 'all')), (dict(x=1, y=2, channel=True), Chosen((1, 2))),
    (dict(x=1, y=2, channel=-1), Chosen((1, 2)))])
def test_what_a_browser_tells(message, expected):
    assert Chosen.of(message) == expected


def drawn_by(code, name):
    """The pixels of the figure that some code saves."""
    exec(code, {})
    return np.asarray(Image.open(f'{name}.png'))


@pytest.mark.parametrize(('network', 'chosen'), [
    ('test_san_patchwise', Chosen()), ('test_san_patchwise', Chosen((7, 5), 1, 'content')),
    ('test_san_pairwise, untrained', Chosen((7.4, 5), 'all'))])
def test_the_code_makes_the_figure(shown, network, chosen, tmp_path):
    path = noise(tmp_path / 'a.png')
    given = path, network, 'stages.1.blocks.0', 96, chosen
    code = shown.footprint_code(*given)
    expected = np.asarray(Image.open(shown.save(shown.footprint_figure(*given), 'figure', 'png')))
    np.testing.assert_array_equal(drawn_by(code, 'attention'), expected)
    assert ('UNTRAINED' in shown.footprint_figure(*given).get_suptitle()) == ('untrained' in network)
    assert ('UNTRAINED' in shown.feature_figure([path], network, 2, 96, None, 0).get_suptitle()) == (
        'untrained' in network)
    assert ('channel=1' in code, 'departures=True' in code) == ((chosen.channel == 1,) * 2)
    assert '<svg' in pathlib.Path(shown.save(shown.footprint_figure(*given), 'figure', 'svg')).read_text()


def test_files_go(shown, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    monkeypatch.setattr(views, 'MOST_KEPT', 2)
    made = [shown.save(Figure((1, 1)), 'a', 'png') for _ in range(4)]
    assert [Image.open(path).size for path in made[2:]] == [(150, 150)] * 2
    assert not any((tmp_path / path).exists() for path in made[:2])
    assert len(set(made)) == 4


def test_two_visitors_at_once(shown, tmp_path):
    paths = [noise(tmp_path / f'{number}.png', 40 + 8 * number, 64, number) for number in range(4)]

    def visit(number):
        name = ('test_san_patchwise', 'test_san_pairwise, untrained')[number % 2]
        return page_in(shown.footprints(paths[number], name, NONE, 'stages.1.blocks.0', 96, Chosen()))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(visit, range(4)))
    assert [page['height'] for page in together] == [40, 48, 56, 64]
    for number, page in enumerate(together):
        assert page['networks'][0]['blocks'][0]['mean'] == visit(number)['networks'][0]['blocks'][0]['mean']
    assert len(shown._kept) <= views.KEPT


def test_errors(shown, tmp_path):
    with pytest.raises(ValueError, match='choose a picture first'):
        shown.study('test_san_patchwise', None, 96)
    with pytest.raises(ValueError, match='not here any more'):
        shown.study('test_san_patchwise', str(tmp_path / 'gone.png'), 96)
    with pytest.raises(ValueError, match='not on the picture'):
        shown.footprints(noise(tmp_path / 'a.png'), 'test_san_patchwise', NONE, '1.0', 96, Chosen((1e9, 0)))


# --- Features --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('picture', [0, 1])
def test_features(shown, picture, tmp_path):
    paths = [noise(tmp_path / 'a.png'), noise(tmp_path / 'b.png', 40, 72, 1)]
    given = paths, 'test_san_patchwise', 2, 96, (30, 20), picture
    panels, held = shown.panels(*given)
    assert [[panel.shape for panel in row] for row in panels] == [[(512, 640, 3)] * 3, [(355, 640, 3)] * 3]
    assert 0 < held <= 1 and all(panel.std() > 5 for row in panels for panel in row)
    elsewhere, _ = shown.panels(*given[:4], (5, 5), picture)
    assert (elsewhere[0][2] != panels[0][2]).any() and (elsewhere[picture][1] == panels[picture][1]).mean() > 0.9
    expected = np.asarray(Image.open(shown.save(shown.feature_figure(*given), 'figure', 'png')))
    np.testing.assert_array_equal(drawn_by(shown.feature_code(*given), 'features'), expected)
    assert len(shown.panels(paths[:1], *given[1:4], None, 0)[0]) == 1


# --- Boxes -----------------------------------------------------------------------------------------------------------

def test_box_mass():
    """The mean of the roll-outs of the pixels in the box; here the map has 6 x 7 of them, 8 pixels wide."""
    model = small('patchwise')
    study = Study(model, np.random.default_rng(0).integers(0, 256, (48, 60, 3), np.uint8))
    block = predictions.look_block(study)
    assert (block.name, block.stride) == ('stages.2.blocks.0', 8)
    for box, cells in (((9, 17, 24, 30), [(r, c) for r in (2, 3) for c in (1, 2)]),
                       ((-5, -5, 5, 5), [(0, 0)]), ((50, 44, 90, 90), [(5, 6)])):
        expected = visualize.attention_rollout(model, study.shown.images, cells)[0].mean(0)
        torch.testing.assert_close(predictions.box_mass(study, box), expected)
    mass = predictions.box_mass(study, (0, 0, 60, 48), 'stages.0.blocks.0')  # of 24 x 30 pixels
    torch.testing.assert_close(mass.sum(), torch.tensor(1.))


def test_regions():
    labels = np.zeros((6, 8), int)
    labels[1:3, 2:7], labels[5, 7] = 4, 2
    found = predictions._regions(labels, list('abcde'))
    assert found.labels == ['a', 'e', 'c'] and found.boxes.tolist() == [[0, 0, 8, 6], [2, 1, 7, 3], [7, 5, 8, 6]]
    np.testing.assert_allclose(found.scores, [37 / 48, 10 / 48, 1 / 48])
    np.testing.assert_array_equal(found.masks[1], labels == 4)


@pytest.fixture(scope='module', params=['detection', 'segmentation'])
def files(request, tmp_path_factory):
    """Config and checkpoint of an untrained detector and of an untrained segmenter."""
    pytest.importorskip('mmdet', reason='needs the mm extra')
    pytest.importorskip('mmseg', reason='needs the mm extra')
    from mmengine.registry import MODELS

    from tests.mm import small_configs
    folder = tmp_path_factory.mktemp(request.param)
    config = getattr(small_configs, request.param)(folder)
    config.dump(folder / 'config.py')
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(
        classes=small_configs.CLASSES, palette=[[0, 0, 0]] * len(small_configs.CLASSES)))), folder / 'model.pth')
    return str(folder / 'config.py'), str(folder / 'model.pth')


def test_boxes(files, tmp_path):
    predictor = predictions.Predictor(*files)
    shown = Views(networks.choices(networks.given('test_san_patchwise'), 'test_san_patchwise'), predictor, files)
    path = noise(tmp_path / 'a.png', 64, 80)
    found = shown.prediction(path)
    assert shown.prediction(path) is found and (np.diff(found.scores) <= 0).all() and len(found.labels)
    least = float(found.scores[0]) - 1e-6
    names = shown.box_names(path, 0)
    assert [number for _, number in names] == list(range(len(found.labels))) and found.labels[0] in names[0][0]
    assert len(shown.box_names(path, least)) < max(2, len(names)) or len(names) == 1
    left, top, right, bottom = found.boxes[0]
    inside = shown.box_at(path, 0, ((left + right) / 2, (top + bottom) / 2))
    areas = (found.boxes[:, 2] - found.boxes[:, 0]) * (found.boxes[:, 3] - found.boxes[:, 1])
    assert areas[inside] <= areas[0] and shown.box_at(path, 0, (-9, -9)) is None
    drawn, look = shown.box_panels(path, 0, 0, 64)
    assert drawn.shape == look.shape == (512, 640, 3) and drawn.std() > 5 and look.std() > 5
    assert shown.box_panels(path, None, 0, 64)[1] is None
    given = path, 0, 0.25, 64
    expected = np.asarray(Image.open(shown.save(shown.box_figure(*given), 'figure', 'png')))
    np.testing.assert_array_equal(drawn_by(shown.box_code(*given), 'boxes'), expected)
    with pytest.raises(ValueError, match=f'no box 99: {len(found.boxes)} were found'):
        shown.box_figure(path, 99, 0.25, 64)
    network = networks.of_predictor(predictor.model, *files).load()
    assert network.name == 'the backbone of config' and not network.untrained
    assert isinstance(Study(network.model, pictures.read(path).image).maps[0], torch.Tensor)


def test_other_configs(tmp_path):
    pytest.importorskip('mmengine', reason='needs the mm extra')
    (tmp_path / 'config.py').write_text("default_scope = 'mmpretrain'\n")
    with pytest.raises(ValueError, match="default_scope 'mmpretrain'; the page shows models of mmdet and mmseg"):
        predictions.Predictor(tmp_path / 'config.py', 'none.pth')


def test_without_openmmlab(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmengine.config', None)
    with pytest.raises(ImportError, match=r"pip install 'san-backbones\[mm\]'"):
        predictions.Predictor('config.py', 'none.pth')
