"""`san-backbones predict`, against MMDetection's and MMSegmentation's functions for one picture."""
import copy
import json
import shutil

import pytest

pytest.importorskip('mmdet', reason='needs the mm extra')
pytest.importorskip('mmseg', reason='needs the mm extra')
pytest.importorskip('typer', reason='needs the cli extra')

import cv2
import numpy as np
import torch
from PIL import Image

import san_backbones.mm  # noqa: F401
from mmdet.apis import inference_detector, init_detector
from mmseg.apis import inference_model, init_model
from pycocotools.coco import COCO
from typer.testing import CliRunner

from san_backbones.mm.predict import Predictor, read_config
from san_backbones_cli.app import app
from tests.mm.small_configs import CLASSES, coco, detection, masks, picture, segmentation
from tests.mm.test_inference import save


def trained(folder, write, make):
    """A checkpoint as a training leaves it, with its config inside."""
    write(folder)
    cfg = make(folder)
    path = folder / 'net.pth'
    save(cfg, path)
    content = torch.load(path, weights_only=True)
    content['meta']['cfg'] = cfg.pretty_text
    torch.save(content, path)
    return cfg, path


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    return trained(tmp_path_factory.mktemp('detector'), coco, detection)


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    return trained(tmp_path_factory.mktemp('segmentor'), masks, segmentation)


@pytest.fixture
def sources(tmp_path):
    """Two pictures of the same name and a video of three frames."""
    folder = tmp_path / 'in'
    for name, seed in (('a.png', 1), ('deeper/a.png', 2)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), picture(seed))
    video = cv2.VideoWriter(str(folder / 'clip.mp4'), cv2.VideoWriter_fourcc(*'mp4v'), 5, (64, 64))
    for level in (50, 100, 150):
        video.write(np.full((64, 64, 3), level, np.uint8))
    video.release()
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ['predict', *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_detector(detector, sources, tmp_path):
    cfg, path = detector
    model = init_detector(copy.deepcopy(cfg), str(path), device='cpu')
    expected = {name: inference_detector(model, cv2.imread(str(sources / name))).pred_instances
                for name in ('a.png', 'deeper/a.png')}
    scores = torch.cat([each.scores for each in expected.values()]).sort().values
    threshold = float(scores[len(scores) // 2 - 1:len(scores) // 2 + 1].mean())  # which takes some and leaves some
    said = run(path, sources, '--out', tmp_path / 'out', '--threshold', threshold, '--device', 'cpu').stdout
    found = COCO(str(tmp_path / 'out' / 'predictions.json'))
    names = ['a.png', 'clip/000000.png', 'clip/000001.png', 'clip/000002.png', 'deeper/a.png']
    assert sorted(image['file_name'] for image in found.imgs.values()) == names
    assert [category['name'] for category in found.cats.values()] == list(CLASSES)
    assert said == f'5 pictures, {len(found.anns)} objects: {tmp_path / "out/predictions.json"}\n'
    counts = []
    for image in found.imgs.values():
        if 'video' in image:
            assert image['video'] == 'clip.mp4' and image['frame'] == int(image['file_name'][-5])
            continue
        right = expected[image['file_name']]
        right = right[right.scores >= threshold]
        mine = found.imgToAnns[image['id']]
        counts.append(len(mine))
        boxes = right.bboxes.clone()
        boxes[:, 2:] -= boxes[:, :2]
        np.testing.assert_allclose(np.reshape([each['bbox'] for each in mine], (-1, 4)), boxes.numpy(), atol=0.006)
        assert [each['category_id'] - 1 for each in mine] == right.labels.tolist()
        for each, mask, score in zip(mine, right.masks.numpy(), right.scores.tolist()):
            np.testing.assert_array_equal(found.annToMask(each), mask)
            assert each['area'] == mask.sum() and each['score'] == pytest.approx(score, abs=1e-4)
        drawn = np.asarray(Image.open(tmp_path / 'out/pictures' / image['file_name']).convert('RGB')).astype(int)
        original = cv2.imread(str(sources / image['file_name']))[..., ::-1].astype(int)
        assert drawn.shape == original.shape and (drawn != original).any() == bool(mine)
        untouched = (drawn == original).all(2).mean()  # colours are in the order of the picture's
        assert untouched > 0.05
    assert sum(counts) == len(scores) // 2
    video = cv2.VideoCapture(str(tmp_path / 'out/videos/clip.mp4'))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and video.get(cv2.CAP_PROP_FPS) == 5


def test_segmentor(segmentor, sources, tmp_path):
    cfg, path = segmentor
    report = json.loads(run(path, sources / 'a.png', sources / 'deeper', '--out', tmp_path / 'out', '--json').stdout)
    assert report == dict(pictures=2, objects=0, failed={})
    content = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert content['classes'] == list(CLASSES)
    assert [image['file_name'] for image in content['images']] == ['a.png', 'a-2.png']
    model = init_model(copy.deepcopy(cfg), str(path), device='cpu')
    for image, source in zip(content['images'], ('a.png', 'deeper/a.png')):
        expected = inference_model(model, cv2.imread(str(sources / source))).pred_sem_seg.data[0].numpy()
        mine = np.asarray(Image.open(tmp_path / 'out' / image['mask']))
        np.testing.assert_array_equal(mine, expected)
        assert len(np.unique(mine)) > 1
        drawn = np.asarray(Image.open(tmp_path / 'out/pictures' / image['file_name']).convert('RGB')).astype(float)
        original = cv2.imread(str(sources / source))[..., ::-1].astype(float)
        for number, colour in enumerate([[220, 20, 60], [0, 90, 230]]):  # the palette, in RGB
            change = (drawn - original)[mine == number]
            toward = np.array(colour) - original[mine == number]
            assert (change * toward).sum() > 0.5 * np.linalg.norm(change) * np.linalg.norm(toward)


def test_files_that_differ_in_their_suffix(segmentor, sources, tmp_path):
    """Each has results of its own: none is written over another's."""
    for name, seed in (('a.jpg', 3), ('a.bmp', 4), ('b.c.png', 5)):
        cv2.imwrite(str(sources / name), picture(seed))
    shutil.copy(sources / 'clip.mp4', sources / 'clip.avi')
    run(segmentor[1], sources, '--out', tmp_path / 'out')
    images = json.loads((tmp_path / 'out/predictions.json').read_text())['images']
    files = {image['file_name']: image['mask'] for image in images if 'video' not in image}
    assert set(files) == {'a.bmp', 'a.jpg', 'a.png', 'b.c.png', 'deeper/a.png'}
    assert len({image['file_name'] for image in images}) == len({image['mask'] for image in images}) == 5 + 2 * 3
    assert files['b.c.png'] == 'masks/b.c.png' and files['deeper/a.png'] == 'masks/deeper/a.png'
    found = {path.relative_to(tmp_path / 'out').as_posix() for path in (tmp_path / 'out').rglob('*') if path.is_file()}
    assert {'pictures/a.png', 'pictures/a-2.jpg', 'pictures/a-3.png', 'pictures/b.c.png', 'videos/clip.mp4',
            'videos/clip-2.mp4'} <= found and set(files.values()) <= found


def test_config_of_ones_own(detector, sources, tmp_path):
    """--config is taken in place of the checkpoint's, and needed where there is none."""
    cfg, path = detector
    bare = tmp_path / 'bare.pth'
    content = torch.load(path, weights_only=True)
    del content['meta']['cfg']
    torch.save(content, bare)
    said = run(bare, sources / 'a.png', '--out', tmp_path / 'out', code=1).stderr
    assert 'holds no config' in said
    cfg.dump(tmp_path / 'config.py')
    run(bare, sources / 'a.png', '--out', tmp_path / 'out', '--config', tmp_path / 'config.py')
    torch.save(dict(weight=torch.zeros(1)), bare)
    assert 'no state_dict' in run(bare, sources / 'a.png', '--out', tmp_path / 'out', code=1).stderr


def test_what_cannot_be_read_is_reported(detector, sources, tmp_path):
    (sources / 'broken.jpg').write_bytes(b'no picture')
    (sources / 'broken.mp4').write_bytes(b'no video')
    shutil.rmtree(sources / 'deeper')
    said = run(detector[1], sources, '--out', tmp_path / 'out', code=1).stderr
    assert 'broken.jpg: ' in said and 'broken.mp4 cannot be read as a video' in said
    assert '2 of 6 pictures could not be read' in said
    (tmp_path / 'empty').mkdir()
    assert 'looked for files' in run(detector[1], tmp_path / 'empty', '--out', tmp_path / 'o', code=1).stderr


def test_nothing_found_is_lost(detector, sources, tmp_path, monkeypatch):
    """Neither by a picture at which a library fails, nor by an interruption."""
    look, errors = Predictor.__call__, {}

    def fails(self, image, name):
        if name in errors:
            raise errors[name]
        return look(self, image, name)

    monkeypatch.setattr(Predictor, '__call__', fails)
    for name in 'abc':
        shutil.copy(sources / 'a.png', tmp_path / f'{name}.png')
    files = [tmp_path / f'{name}.png' for name in 'abc']
    for fail, error, said, names in (
            ('a.png', IndexError('out of bounds'), 'a.png: IndexError: out of bounds', ['b.png', 'c.png']),
            ('b.png', Image.DecompressionBombError('vast'), 'b.png: DecompressionBombError: vast', ['a.png', 'c.png']),
            ('c.png', KeyboardInterrupt(), 'stopped; ', ['a.png', 'b.png'])):
        errors.clear()
        errors[fail] = error
        assert said in run(detector[1], *files, '--out', tmp_path / fail[0], code=1).stderr
        content = json.loads((tmp_path / fail[0] / 'predictions.json').read_text())
        assert [image['file_name'] for image in content['images']] == names


@pytest.mark.parametrize('text, message', [
    ('import os', 'expected NAME = VALUE'), ('model = os.system("true")', 'malformed'),
    ('model = dict(type="os.system", command="true")', "names the type 'os.system'"),
    ('a = [dict(b=dict(type="mmengine.fileio.remove"))]', 'mmengine.fileio.remove'),
    ('a = [dict(type="mmengine.remove")]', 'mmengine.remove'), ('a = ', 'no plain data')])
def test_a_config_in_a_checkpoint_is_data(text, message, detector, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_config(text)
    content = torch.load(detector[1], weights_only=True)
    content['meta']['cfg'] = text
    torch.save(content, tmp_path / 'net.pth')
    with pytest.raises(ValueError, match='Name a config file that you trust'):
        Predictor(tmp_path / 'net.pth')


def test_reads_what_mmengine_writes(detector, segmentor):
    for cfg, _ in (detector, segmentor):
        mine = read_config(cfg.pretty_text).to_dict()
        expected = cfg.to_dict()
        expected.pop('custom_imports', None)
        assert mine == expected
