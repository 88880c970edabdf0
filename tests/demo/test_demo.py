"""The demo: its data set, and a training of three steps."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('pycocotools')
cv2 = pytest.importorskip('cv2')

import shapes  # noqa: E402
from tests import ROOT, environment  # noqa: E402

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


def write_voc(made, folder):
    """Writes the boxes of a data set of shapes as VOC's XML, in folders of the splits."""
    for split in ('train', 'val'):
        content = load(made, split)
        names = {category['id']: category['name'] for category in content['categories']}
        (folder / split).mkdir(parents=True)
        for image in content['images']:
            objects = ''
            for annotation in content['annotations']:
                if annotation['image_id'] == image['id']:
                    left, top, width, height = annotation['bbox']
                    objects += (f'<object><name>{names[annotation["category_id"]]}</name><bndbox>'
                                f'<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{left + width}</xmax>'
                                f'<ymax>{top + height}</ymax></bndbox></object>')
            shutil.copy(made / split / image['file_name'], folder / split)
            (folder / split / image['file_name']).with_suffix('.xml').write_text(f'<annotation>{objects}</annotation>')


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
        assert train.score({}, masks=False) == 'box AP 0.000'

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
        assert 'from hf-hub:san-backbones/san10_patchwise.distilled\n' in said
        assert said.index('iteration    1') < said.index('midway    mask AP 0.') < said.index('iteration    3 of 3')
        assert cv2.imread(str(tmp_path / 'sheet.png')) is not None

        # What was written is enough to use the detector.
        from mmdet.apis import inference_detector, init_detector
        model = init_detector(str(tmp_path / train.CONFIG.name), str(tmp_path / 'checkpoint.pth'), device='cpu')
        assert model.dataset_meta['classes'] == shapes.KINDS
        result = inference_detector(model, cv2.imread(str(made / 'val' / '000001.jpg')))
        assert result.pred_instances.masks.shape[1:] == (SIZE, SIZE)

        import timm
        import san_backbones  # noqa: F401

        # Three steps with a small learning rate leave the weights near those that it started from.
        shipped = timm.create_model('san10_patchwise.distilled', pretrained=True).state_dict()
        given = {name: weight for name, weight in model.backbone.state_dict().items() if name in shipped}
        assert len(given) > 300
        for name in ('stages.1.conv.weight', 'stages.4.blocks.0.conv.weight'):
            assert (given[name] - shipped[name]).norm() < .2 * shipped[name].norm()

    @pytest.mark.parametrize('weights, checkpoint', [
        (None, 'hf-hub:san-backbones/san10_patchwise.distilled'), ('mine.pth', 'mine.pth'), ('random', None)])
    def test_weights(self, made, tmp_path, weights, checkpoint):
        """What the network starts from, also in the config for a whole training; random weights are not frozen."""
        pytest.importorskip('mmdet')
        from mmengine.config import Config

        import train
        options = train.parse(['--data', str(made), *(['--weights', weights] if weights else [])])
        parts = train.get_data(options, lambda line: None)
        backbone = train.make_config(options, *parts, masks=True).model.backbone
        train.write_config(tmp_path / 'my_config.py', *parts, True, backbone.init_cfg)
        own = Config.fromfile(tmp_path / 'my_config.py').model.backbone
        for cfg in (backbone, own):
            assert (cfg.init_cfg and cfg.init_cfg.checkpoint) == checkpoint
        assert (backbone.frozen_stages, backbone.norm_eval) == ((2, True) if checkpoint else (-1, False))

    def test_weights_that_are_not_there(self, made, tmp_path):
        """Said in words, before the minutes of an evaluation."""
        pytest.importorskip('mmdet')
        import train
        with pytest.raises(SystemExit, match='^error: .*missing.pth'):
            train.main(['--data', str(made), '--weights', 'missing.pth', '--work-dir', str(tmp_path)])

    def test_boxes_of_voc(self, made, tmp_path, capsys, monkeypatch):
        """A Faster R-CNN, which says so; what it prints at last is pasted and works, from the same folder."""
        pytest.importorskip('mmdet')
        pytest.importorskip('typer', reason='needs the cli extra')
        from mmengine.config import Config

        import train
        write_voc(made, tmp_path / 'voc')
        work = tmp_path / 'work'
        monkeypatch.chdir(ROOT)
        before, after = train.main(['--data', str(tmp_path / 'voc'), '--iterations', '2', '--size', '64',
                                    '--val-images', '2', '--weights', 'random', '--work-dir', str(work)])
        said = capsys.readouterr().out
        assert 'coco/segm_mAP' not in {*before, *after} and 'mask AP' not in said
        assert 'was converted' in said and 'a Faster R-CNN is trained' in said and 'FasterRCNN on SANBackbone' in said
        assert cv2.imread(str(work / 'sheet.png')) is not None and 'from random weights\n' in said

        config = Config.fromfile(work / 'my_config.py')
        assert config.model.type == 'FasterRCNN' and config.model.roi_head.bbox_head.num_classes == 3
        assert config.model.backbone.init_cfg is None
        for part, count in (('train', 6), ('val', 4)):
            dataset = config[f'{part}_dataloader'].dataset
            assert tuple(dataset.metainfo.classes) == ('ring', 'square', 'star')
            assert len(json.loads(Path(dataset.ann_file).read_text())['images']) == count
            assert len(list(Path(dataset.data_prefix.img).iterdir())) == count
        commands = [shlex.split(line) for line in said.splitlines()
                    if re.match(' {4}.*(-m san_backbones|train.py)', line)]
        assert len(commands) == 4
        assert all(Path(word).exists() for words in commands for word in words if word.endswith('.py'))
        done = subprocess.run([sys.executable, *commands[0][1:]], capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
        assert len(json.loads((work / 'predicted/predictions.json').read_text())['images']) == 4
        for words in commands[1:3]:
            assert train.parse(words[2:]).weights == 'random'
        assert commands[3][1:3] == ['-m', 'san_backbones.mm.run'] and str(work / 'my_config.py') in commands[3]

    def test_some_objects_without_a_mask(self):
        from types import SimpleNamespace

        import train
        said, part = [], SimpleNamespace(without_masks=0, coco=dict(annotations=[1, 2, 3]))
        assert train.has_masks(part, part, said.append) and not said
        some = SimpleNamespace(without_masks=1, coco=part.coco)
        assert not train.has_masks(part, some, said.append) and '1 of 6 objects have no mask' in said[0]

    def test_sheet_of_many_objects(self, tmp_path, monkeypatch):
        """Many objects of a picture have no labels, which would cover it; few have. Masks are not needed."""
        import sheet
        labels = []
        monkeypatch.setattr(sheet, 'draw_label', lambda *given: labels.append(given[2]))
        boxes = np.array([[5., 5, 20, 20]])
        for count, expected in ((sheet.MOST_LABELS, 2 * sheet.MOST_LABELS), (sheet.MOST_LABELS + 1, 0)):
            labels.clear()
            objects = dict(boxes=boxes.repeat(count, 0), labels=np.zeros(count), scores=np.full(count, 0.9))
            sheet.draw(tmp_path / 'sheet.png', [dict(picture=np.zeros((30, 60, 3), np.uint8), truth=objects,
                                                     predicted=objects)], ('cell',), 'title')
            assert len(labels) == expected and cv2.imread(str(tmp_path / 'sheet.png')) is not None

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
