"""The demo: its data set, its errors about other people's data, and a training of three steps."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('pycocotools')
cv2 = pytest.importorskip('cv2')

DEMO = Path(__file__).resolve().parents[2] / 'demo'
sys.path.insert(0, str(DEMO))

import coco_folder  # noqa: E402
import shapes  # noqa: E402

SIZE = 96


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A small data set of shapes."""
    pytest.importorskip('skimage', reason='the photographs come with scikit-image')
    return shapes.make(tmp_path_factory.mktemp('demo') / 'shapes', train=6, val=4, size=SIZE, report=lambda line: None)


def load(folder, split):
    return json.loads((folder / 'annotations' / f'instances_{split}.json').read_text())


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


class TestShapes:

    def test_same_seed_same_files(self, made, tmp_path):
        again = shapes.make(tmp_path / 'again', train=6, val=4, size=SIZE, report=lambda line: None)
        assert files(again) == files(made)
        other = shapes.make(tmp_path / 'other', train=6, val=4, size=SIZE, seed=1, report=lambda line: None)
        assert files(other).keys() == files(made).keys() and files(other) != files(made)

    def test_made_once(self, made):
        before = {path: path.stat().st_mtime_ns for path in made.rglob('*')}
        said = []
        shapes.make(made, train=6, val=4, size=SIZE, report=said.append)
        assert {path: path.stat().st_mtime_ns for path in made.rglob('*')} == before
        assert 'made earlier' in said[0]

    def test_other_recipe_or_interruption_makes_anew(self, tmp_path):
        pytest.importorskip('skimage')
        folder = shapes.make(tmp_path / 'shapes', train=1, val=1, size=SIZE, report=lambda line: None)
        shapes.make(folder, train=2, val=1, size=SIZE, report=lambda line: None)
        assert len(load(folder, 'train')['images']) == 2
        (folder / 'recipe.json').unlink()
        (folder / 'train' / '000001.jpg').unlink()
        shapes.make(folder, train=2, val=1, size=SIZE, report=lambda line: None)
        assert (folder / 'train' / '000001.jpg').exists()
        for note in ('', (folder / 'recipe.json').read_text()[:20]):  # cut short while it was written
            (folder / 'recipe.json').write_text(note)
            (folder / 'train' / '000001.jpg').unlink()
            shapes.make(folder, train=2, val=1, size=SIZE, report=lambda line: None)
            assert (folder / 'train' / '000001.jpg').exists()

    def test_never_deletes_what_it_did_not_write(self, tmp_path):
        (tmp_path / 'thesis.tex').touch()
        with pytest.raises(FileExistsError, match='thesis.tex'):
            shapes.make(tmp_path, train=1, val=1, size=SIZE)
        assert (tmp_path / 'thesis.tex').exists()

    @pytest.mark.parametrize('split, count', [('train', 6), ('val', 4)])
    def test_valid_coco(self, made, split, count, capsys):
        from pycocotools.coco import COCO
        coco = COCO(str(made / 'annotations' / f'instances_{split}.json'))
        assert len(coco.imgs) == count
        assert [category['name'] for category in coco.cats.values()] == list(shapes.KINDS)
        for image in coco.imgs.values():
            picture = cv2.imread(str(made / split / image['file_name']))
            assert picture.shape == (image['height'], image['width'], 3) == (SIZE, SIZE, 3)
        for annotation in coco.anns.values():
            mask = coco.annToMask(annotation)
            rows, columns = np.nonzero(mask)
            left, top, width, height = annotation['bbox']
            assert annotation['area'] == mask.sum() > 0
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
            assert annotation['iscrowd'] == 0

    def test_masks_of_a_picture_are_disjoint(self, made, capsys):
        from pycocotools.coco import COCO
        coco = COCO(str(made / 'annotations' / 'instances_train.json'))
        for image_id in coco.imgs:
            masks = [coco.annToMask(annotation) for annotation in coco.imgToAnns[image_id]]
            assert len(masks) >= 1 and np.sum(masks, axis=0).max() == 1

    def test_held_out_photographs(self):
        assert not set(shapes.PHOTOGRAPHS['train']) & set(shapes.PHOTOGRAPHS['val'])

    def test_shapes_in_front_hide_those_behind(self, monkeypatch):
        """A mask is its whole shape without the shapes painted later, and at least the promised part of it."""
        painted = []
        paint = shapes.paint
        monkeypatch.setattr(shapes, 'paint', lambda picture, alpha, *rest: painted.append(alpha > 0.5) or paint(
            picture, alpha, *rest))
        photographs = [np.full((SIZE, SIZE, 3), 128, np.uint8)]
        hidden = 0
        for seed in range(20):
            painted.clear()
            _, kinds, masks = shapes.compose(photographs, SIZE, np.random.default_rng(seed))
            assert len(painted) == len(masks) == len(kinds) >= 1
            for number, (whole, mask) in enumerate(zip(painted, masks)):
                later = np.any([np.zeros_like(whole), *painted[number + 1:]], axis=0)
                np.testing.assert_array_equal(mask, whole & ~later)
                assert mask.sum() >= 0.9 * shapes.IN_SIGHT * whole.sum()  # 0.9: pixels against exact polygons
                hidden += (whole & later).any()
        assert hidden > 0

    def test_a_ring_has_a_hole(self):
        borders = [20 * border + 32 for border in shapes.outline('ring', np.random.default_rng(0))]
        alpha = shapes.draw(borders, 64)
        assert alpha.shape == (64, 64) and alpha[32, 32] == 0 and alpha.max() == 1

    def test_says_what_is_missing(self, monkeypatch):
        monkeypatch.setitem(shapes.PHOTOGRAPHS, 'train', ('nowhere.png',))
        with pytest.raises(FileNotFoundError, match='nowhere.png.*pip install scikit-image'):
            shapes.read_photographs('train')


@pytest.fixture
def coco():
    """The least that is in COCO's format."""
    return dict(
        images=[dict(id=1, file_name='one.jpg', width=8, height=8)],
        annotations=[dict(id=1, image_id=1, category_id=3, bbox=[1, 1, 4, 4], area=16, iscrowd=0,
                          segmentation=[[1, 1, 5, 1, 5, 5, 1, 5]])],
        categories=[dict(id=3, name='thing')])


def write(root, train, val, train_json='annotations/instances_train2017.json',
          val_json='annotations/instances_val2017.json', train_images='train2017', val_images='val2017'):
    for name, content, images in (train_json, train, train_images), (val_json, val, val_images):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
        (root / images).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / images / 'one.jpg'), np.zeros((8, 8, 3), np.uint8))


class TestFind:

    @pytest.mark.parametrize('layout', [
        ('annotations/instances_train2017.json', 'annotations/instances_val2017.json', 'train2017', 'val2017'),
        ('annotations/instances_train.json', 'annotations/instances_val.json', 'images', 'images'),
        ('annotations/train.json', 'annotations/val.json', 'images/train', 'images/val'),
        ('train/_annotations.coco.json', 'valid/_annotations.coco.json', 'train', 'valid'),
        ('train.json', 'val.json', 'images', 'images'),
        ('train.json', 'val.json', '.', '.'),
        ('train/annotations.json', 'val/annotations.json', 'train/images', 'val/images'),
        ('train.json', 'test.json', 'train', 'test'),
    ])
    def test_usual_layouts(self, coco, tmp_path, layout):
        write(tmp_path, coco, coco, *layout)
        train, val = coco_folder.find(tmp_path)
        assert [train.json, val.json] == [tmp_path / name for name in layout[:2]]
        assert [train.images, val.images] == [tmp_path / name for name in layout[2:]]
        assert train.classes == ('thing',)

    def test_instances_before_captions(self, coco, tmp_path):
        write(tmp_path, coco, coco)
        (tmp_path / 'annotations' / 'captions_train2017.json').write_text('{}')
        (tmp_path / 'annotations' / 'person_keypoints_train2017.json').write_text('{}')
        assert coco_folder.find(tmp_path)[0].json.name == 'instances_train2017.json'

    def test_first_pictures(self, coco, tmp_path):
        coco['images'] = [dict(coco['images'][0], id=number) for number in range(5)]
        coco['annotations'] = [dict(coco['annotations'][0], id=number, image_id=number) for number in (1, 2, 3)]
        write(tmp_path, coco, coco)
        train, _ = coco_folder.find(tmp_path)
        assert train.first(0, tmp_path) is train
        few = train.first(2, tmp_path)
        assert [image['id'] for image in few.coco['images']] == [1, 2]  # 0 has no annotation
        assert [annotation['id'] for annotation in few.coco['annotations']] == [1, 2]
        assert json.loads(few.json.read_text()) == few.coco

    def test_not_a_folder(self, tmp_path):
        with pytest.raises(coco_folder.NotCoco, match='nowhere is not a folder'):
            coco_folder.find(tmp_path / 'nowhere')

    def test_nothing_there(self, tmp_path):
        (tmp_path / 'holiday').mkdir()
        with pytest.raises(coco_folder.NotCoco, match=r'(?s)no train annotations.*instances_train.*holiday/.*none'):
            coco_folder.find(tmp_path)

    def test_no_validation(self, coco, tmp_path):
        write(tmp_path, coco, coco)
        (tmp_path / 'annotations' / 'instances_val2017.json').unlink()
        with pytest.raises(coco_folder.NotCoco, match=r'(?s)no val annotations.*valid.*instances_train2017.json'):
            coco_folder.find(tmp_path)

    @pytest.mark.parametrize('content, message', [
        ('{"images": [', 'not readable as JSON'),
        ('[1, 2]', 'holds a list, and should'),
        ('{"info": {}, "images": []}', 'holds an object with images, info, and should'),
        ('{"images": [], "annotations": [], "categories": []}', 'list of images is empty'),
    ])
    def test_not_coco(self, coco, tmp_path, content, message):
        write(tmp_path, content, coco)
        with pytest.raises(coco_folder.NotCoco, match=f'instances_train2017.json.*{message}'):
            coco_folder.find(tmp_path)

    @pytest.mark.parametrize('path, value, message', [
        (('images', 0, 'file_name'), None, 'image number 0 has no file_name'),
        (('images', 0, 'width'), None, 'image number 0 has no width'),
        (('categories', 0, 'name'), None, 'category number 0 has no name'),
        (('annotations', 0, 'bbox'), None, 'annotation number 0 has no bbox'),
        (('annotations', 0, 'image_id'), 7, '1 of 1 annotations have an unknown image_id, such as 7'),
        (('annotations', 0, 'category_id'), 7, '1 of 1 annotations have an unknown category_id, such as 7'),
        (('annotations', 0, 'segmentation'), None, 'none of them has a mask'),
        (('annotations', 0, 'segmentation'), [], 'none of them has a mask'),
        (('annotations', 0, 'segments_info'), [], 'panoptic'),
    ])
    def test_broken_entries(self, coco, tmp_path, path, value, message):
        broken = copy.deepcopy(coco)
        *parents, key = path
        entry = broken
        for parent in parents:
            entry = entry[parent]
        if value is None:
            del entry[key]
        else:
            entry[key] = value
        write(tmp_path, coco, broken)
        with pytest.raises(coco_folder.NotCoco, match=f'instances_val2017.json.*{message}'):
            coco_folder.find(tmp_path)

    def test_some_without_mask(self, coco, tmp_path):
        coco['annotations'].append(dict(coco['annotations'][0], id=2, segmentation=[]))
        write(tmp_path, coco, coco)
        with pytest.raises(coco_folder.NotCoco, match='of 2 annotations 1 lack.* annotation 2'):
            coco_folder.find(tmp_path)

    def test_shared_ids(self, coco, tmp_path):
        coco['images'] *= 2
        write(tmp_path, coco, coco)
        with pytest.raises(coco_folder.NotCoco, match='several image entries share one id'):
            coco_folder.find(tmp_path)

    def test_missing_pictures(self, coco, tmp_path):
        two = dict(coco, images=coco['images'] + [dict(coco['images'][0], id=2, file_name='two.jpg')])
        write(tmp_path, two, coco)
        with pytest.raises(coco_folder.NotCoco, match='1 of the 2 pictures .*train2017.json.* not in .*: two.jpg'):
            coco_folder.find(tmp_path)
        for picture in tmp_path.rglob('one.jpg'):
            picture.unlink()
        with pytest.raises(coco_folder.NotCoco, match='none of the 2 pictures .*train2017.json.* such as one.jpg'):
            coco_folder.find(tmp_path)

    def test_different_categories(self, coco, tmp_path):
        write(tmp_path, coco, dict(coco, categories=[dict(id=3, name='other')]))
        with pytest.raises(coco_folder.NotCoco, match=r'(?s)same categories.*thing.*other'):
            coco_folder.find(tmp_path)


class TestTrain:

    def test_options(self, capsys):
        import train
        for arguments, message in {
            ('--iterations', '0'): '--iterations must be at least 1',
            ('--size', '8'): '--size must be at least 32',
            ('--minutes', '0'): '--minutes must be more than 0',
        }.items():
            with pytest.raises(SystemExit):
                train.parse(arguments)
            assert message in capsys.readouterr().err

    def test_score_of_a_network_that_finds_nothing(self):
        import train
        assert train.score({}) == 'mask AP 0.000, box AP 0.000'
        assert train.score({'coco/segm_mAP': 0.25, 'coco/bbox_mAP': 0.5}) == 'mask AP 0.250, box AP 0.500'

    def test_error_without_traceback(self, tmp_path):
        import train
        with pytest.raises(SystemExit, match='error: .*nowhere is not a folder'):
            train.main(['--data', str(tmp_path / 'nowhere'), '--work-dir', str(tmp_path / 'work')])

    def test_end_to_end(self, made, tmp_path, capsys):
        pytest.importorskip('mmdet')
        pytest.importorskip('san_backbones.mm')
        import train
        before, after = train.main(['--data', str(made), '--iterations', '3', '--size', '64', '--train-images', '4',
                                    '--val-images', '2', '--work-dir', str(tmp_path)])
        said = capsys.readouterr().out
        assert before.keys() == after.keys() >= {'coco/segm_mAP', 'coco/bbox_mAP'}
        assert 'train 4 pictures' in said and 'val   2 pictures' in said and 'iteration    3 of 3' in said
        assert cv2.imread(str(tmp_path / 'sheet.png')) is not None

        # What was written is enough to use the detector.
        from mmdet.apis import inference_detector, init_detector
        model = init_detector(str(tmp_path / train.CONFIG.name), str(tmp_path / 'checkpoint.pth'), device='cpu')
        assert model.dataset_meta['classes'] == shapes.KINDS
        result = inference_detector(model, cv2.imread(str(made / 'val' / '000001.jpg')))
        assert result.pred_instances.masks.shape[1:] == (SIZE, SIZE)

    def test_too_slow_a_machine_ends_in_time(self):
        """With no time left, the schedule runs to its end and the training stops."""
        pytest.importorskip('mmengine')
        torch = pytest.importorskip('torch')
        from types import SimpleNamespace

        from mmengine.optim import CosineAnnealingLR

        from pace import Pace
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        optimizer.step()
        schedule = CosineAnnealingLR(optimizer, T_max=100, by_epoch=False)
        runner = SimpleNamespace(max_iters=100, param_schedulers=[schedule],
                                 train_loop=SimpleNamespace(stop_training=False))
        said = []
        pace = Pace(seconds=1e-9, say=said.append)
        pace.before_train(runner)
        schedule.step()
        pace.after_train_iter(runner, 0, outputs=dict(loss=torch.tensor(1.0)))
        assert runner.train_loop.stop_training
        assert optimizer.param_groups[0]['lr'] == pytest.approx(0, abs=1e-6)
        assert 'iteration    1 of 100' in said[-1]
