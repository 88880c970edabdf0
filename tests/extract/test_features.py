"""Values, against timm's own transform and network, one picture at a time; every option."""
import hashlib
import json
import math

import numpy as np
import pytest
import timm
import torch
from tests.extract.noise_pictures import MODEL, noise
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torchvision.ops import roi_align
from torchvision.transforms.functional import to_tensor

from san_backbones.extract import Maps, Settings, extract
from san_backbones.ops import native

parquet = pytest.importorskip('pyarrow.parquet', reason='needs the features extra')

SMALL = dict(size=(64, 64), batch_size=2)


@pytest.fixture(scope='module')
def model():
    return timm.create_model(MODEL, pretrained=True).eval()


def prepared(path, model, size=(64, 64)):
    """As timm evaluates."""
    config = dict(resolve_model_data_config(model), input_size=(3, *size))
    return create_transform(**config, is_training=False)(Image.open(path).convert('RGB'))[None]


def run(sources, out, settings=None, model=MODEL, **options):
    """The table of all rows, and the report."""
    options = dict(workers=0, progress=False) | options
    report = extract(sources, out, model, settings or Settings(**SMALL), **options)
    return parquet.read_table(out / 'features'), report


def vectors(table, column='features'):
    return torch.tensor(np.array(table[column].to_pylist(), dtype=np.float32))


def pictures(folder):
    return [str(folder / name) for name in ('a.png', 'b.jpg', 'c.webp', 'd.bmp', 'sub/a.png', 'sub/e.jpg', 'sub/z.png')]


class TestValues:

    def test_are_timms(self, folder, tmp_path, model):
        table, report = run(folder, tmp_path / 'out', workers=2)
        assert table['file'].to_pylist() == pictures(folder)
        with torch.inference_mode():
            expected = torch.cat([
                model.forward_head(model.forward_features(prepared(path, model)), pre_logits=True)
                for path in pictures(folder)])
        torch.testing.assert_close(vectors(table), expected)
        assert (report.complete, report.pictures, report.rows, report.errors) == (True, 7, 7, 0)
        for row in table.to_pylist():
            with open(row['file'], 'rb') as file:
                assert row['sha1'] == hashlib.sha1(file.read()).hexdigest()
            assert (row['width'], row['height']) == Image.open(row['file']).size

    @pytest.mark.parametrize('pool, pooled', [
        ('avg', lambda maps: maps.mean((2, 3))), ('max', lambda maps: maps.flatten(2).max(2)[0]),
        ('gem', lambda maps: (maps.double().clamp(min=1e-6) ** 3).mean((2, 3)).pow(1 / 3).float())])
    def test_pools_of_stages(self, pool, pooled, folder, tmp_path, model):
        table, _ = run(folder / 'a.png', tmp_path / 'out', Settings(pool=pool, stages=(3, 1), **SMALL))
        with torch.inference_mode():
            maps = model.forward_intermediates(prepared(folder / 'a.png', model), [1, 3], intermediates_only=True)
        assert table.column_names[-2:] == ['features_1', 'features_3']
        for stage, expected in zip((1, 3), maps):
            torch.testing.assert_close(vectors(table, f'features_{stage}'), pooled(expected))

    def test_logits(self, folder, tmp_path, model):
        table, _ = run(folder, tmp_path / 'out', Settings(logits=True, **SMALL))
        with torch.inference_mode():
            expected = torch.cat([model(prepared(path, model)) for path in pictures(folder)])
        torch.testing.assert_close(vectors(table, 'logits'), expected)
        headless = timm.create_model(MODEL, num_classes=0)
        with pytest.raises(ValueError, match='no classifier'):
            run(folder, tmp_path / 'none', Settings(logits=True), headless)

    @pytest.mark.parametrize('dtype, relative', [('float16', 2 ** -11), ('bfloat16', 2 ** -8)])
    def test_dtypes(self, dtype, relative, folder, tmp_path):
        full, _ = run(folder, tmp_path / 'full')
        table, _ = run(folder, tmp_path / 'out', Settings(dtype=dtype, **SMALL))
        expected, found = vectors(full), vectors(table)
        assert torch.equal(found, expected.to(getattr(torch, dtype)).float()) and not torch.equal(found, expected)
        assert ((found - expected).abs() <= relative * expected.abs() + 1e-7).all()
        # a vector of half the bytes takes about half the room
        sizes = [parquet.read_metadata(tmp_path / name / 'features/000000-000000.parquet').row_group(0).column(4)
                 .total_compressed_size for name in ('full', 'out')]
        assert sizes[1] < 0.75 * sizes[0]

    def test_precision(self, folder, tmp_path):
        full, _ = run(folder, tmp_path / 'full')
        table, _ = run(folder, tmp_path / 'out', Settings(precision='bf16', **SMALL))
        assert not torch.equal(vectors(table), vectors(full))
        torch.testing.assert_close(vectors(table), vectors(full), rtol=0.1, atol=0.1 * vectors(full).abs().max().item())

    @pytest.mark.skipif(not native.has_int8(), reason='needs AVX-512 VNNI')
    def test_int8(self, folder, tmp_path):
        """Near the float32, and a picture's features do not depend on those beside it."""
        net = timm.create_model('test_san_patchwise', depths=(1, 1), widths=(64, 256), kernel_sizes=(3, 5),
                                stem_width=64).eval()
        full, _ = run(folder, tmp_path / 'full', Settings(**SMALL), net)
        table, _ = run(folder, tmp_path / 'out', Settings(precision='int8', **SMALL), net)
        alone, _ = run(folder, tmp_path / 'alone', Settings(precision='int8', **{**SMALL, 'batch_size': 1}), net)
        error = (vectors(table) - vectors(full)).norm() / vectors(full).norm()
        assert 0 < error < 0.05
        torch.testing.assert_close(vectors(alone), vectors(table))

    def test_int8_is_not_everywhere(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(native, 'has_int8', lambda: False)
        with pytest.raises(ValueError, match="precision 'int8': .*(AVX-512 VNNI|not installed).*another precision"):
            run(folder, tmp_path / 'out', Settings(precision='int8', **SMALL), 'test_san_pairwise', random=True)
        testing = pytest.importorskip('typer.testing')
        from san_backbones_cli.app import app
        done = testing.CliRunner().invoke(app, ['features', str(folder), '--out', str(tmp_path / 'out'), '--random',
                                                '-m', 'test_san_pairwise', '--precision', 'int8'])
        assert done.exit_code and "precision 'int8'" in f'{done.output} {done.exception}'
        with pytest.raises(ValueError, match="precision 'int8': .* and this is none"):
            run(folder, tmp_path / 'out', Settings(precision='int8', **SMALL), timm.create_model('test_resnet').eval())

    def test_another_model_of_timm(self, folder, tmp_path):
        torch.manual_seed(0)
        net = timm.create_model('test_resnet').eval()
        with torch.inference_mode():
            expected = net.forward_features(prepared(folder / 'a.png', net)).mean((2, 3))
        table, _ = run(folder / 'a.png', tmp_path / 'out', Settings(**SMALL), net)
        torch.testing.assert_close(vectors(table), expected)

    def test_checkpoint_of_grey_pictures(self, folder, tmp_path):
        torch.manual_seed(1)
        net = timm.create_model('test_san_pairwise', in_chans=1).eval()
        torch.save(net.state_dict(), tmp_path / 'own.pth')
        table, _ = run(folder / 'a.png', tmp_path / 'out', Settings(whole=True), 'test_san_pairwise',
                       weights=tmp_path / 'own.pth')
        config = resolve_model_data_config(net)
        mean, std = (sum(config[name][:3]) / 3 for name in ('mean', 'std'))
        image = (to_tensor(Image.open(folder / 'a.png').convert('L'))[None] - mean) / std
        with torch.inference_mode():
            torch.testing.assert_close(vectors(table), net.forward_features(image).mean((2, 3)))

    def test_random_weights_are_always_the_same(self, folder, tmp_path):
        first, second = (run(folder, tmp_path / name, model='test_san_pairwise', random=True)[0] for name in 'ab')
        assert first.equals(second)

    def test_no_weights(self, folder, tmp_path, monkeypatch):
        monkeypatch.setenv('SAN_BACKBONES_CACHE', str(tmp_path / 'none'))
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'none'))
        with pytest.raises(RuntimeError, match='--weights FILE'):
            run(folder, tmp_path / 'out', model='san15_patchwise')

    @pytest.mark.parametrize('given', [dict(weights='nothing.pth'), dict(random=True)])
    def test_weights_beside_a_model_that_has_some(self, given, folder, tmp_path):
        model = timm.create_model(MODEL)
        with pytest.raises(ValueError, match='for a model that is given by its name; this SAN has weights already'):
            run(folder, tmp_path / 'out', model=model, **given)

    @pytest.mark.parametrize('given, message', [
        (dict(pool='sum'), "pool 'sum': expected avg, max, gem, none"), (dict(dtype='int8'), 'expected float32'),
        (dict(precision='int4'), 'expected fp32, bf16, fp16, int8'),
        (dict(whole=True, size=(32, 32)), 'exclude each other'), (dict(partition=0), 'expected 1 or more'),
        *((dict(size=size), r'expected \(height, width\) in pixels')
          for size in (64, '64', (0, 4), (3, 64, 64), (64.0, 64.0)))])
    def test_settings(self, given, message):
        with pytest.raises(ValueError, match=message):
            Settings(**given)

    def test_no_such_stage(self, folder, tmp_path):
        with pytest.raises(IndexError, match='asked for 5, it has 0 to 4'):
            run(folder, tmp_path / 'out', Settings(stages=(5,)))


class TestSizes:

    def test_whole(self, folder, tmp_path, model):
        """Each at its own size; those of equal sizes share batches, and rows keep their order."""
        for seed in range(9):
            noise(folder / f'n{seed}.png', 33 + 12 * (seed % 2), 40, seed + 20)
        noise(folder / 'one.png', 1, 1)
        table, report = run(folder, tmp_path / 'out', Settings(whole=True, batch_size=3))
        assert report.rows == 17 and table['file'].to_pylist()[-4:] == [
            str(folder / name) for name in ('one.png', 'sub/a.png', 'sub/e.jpg', 'sub/z.png')]
        mean, std = (torch.tensor(resolve_model_data_config(model)[name])[:, None, None] for name in ('mean', 'std'))
        for path, found in zip(table['file'].to_pylist(), vectors(table)):
            image = (to_tensor(Image.open(path).convert('RGB')) - mean) / std
            with torch.inference_mode():
                torch.testing.assert_close(found, model.forward_features(image[None]).mean((2, 3))[0])

    def test_batches_of_equal_sizes(self, folder, tmp_path, monkeypatch):
        from san_backbones.extract.network import Network
        sizes, call = [], Network.__call__
        monkeypatch.setattr(Network, '__call__', lambda self, images, rois=None: sizes.append(tuple(images.shape)) or
                            call(self, images, rois))
        for seed in range(40):
            noise(folder / 'n' / f'{seed}.png', 32 + 64 * (seed % 2), 40, seed)
        run(folder / 'n', tmp_path / 'out', Settings(whole=True, batch_size=1))
        # of the pixels of one picture at the weights' own size
        side = timm.create_model(MODEL).pretrained_cfg['input_size'][1]
        assert max(shape[0] for shape in sizes) == side * side // (32 * 40)
        assert sum(shape[0] for shape in sizes) == 40 and len(sizes) < 20

    def test_too_small_for_a_network_with_strides(self, tmp_path):
        noise(tmp_path / 'in' / 'a.png', 20, 70)
        _, report = run(tmp_path / 'in', tmp_path / 'out', Settings(whole=True), timm.create_model('test_resnet'))
        reason, = parquet.read_table(tmp_path / 'out' / 'errors.parquet')['reason'].to_pylist()
        assert report.errors == 1 and '70 x 20 pixels are too few: the model takes 32 x 32' in reason

    def test_size(self, folder, tmp_path, model):
        table, _ = run(folder / 'a.png', tmp_path / 'out', Settings(size=(32, 96)))
        with torch.inference_mode():
            expected = model.forward_features(prepared(folder / 'a.png', model, (32, 96))).mean((2, 3))
        torch.testing.assert_close(vectors(table), expected)

    def test_draft(self, tmp_path, model, monkeypatch):
        """A large JPEG is decoded at a quarter, nearly to the same features; others are left alone."""
        noise(tmp_path / 'in' / 'large.jpg', 600, 800, quality=95)
        from PIL import JpegImagePlugin
        decoded, draft = [], JpegImagePlugin.JpegImageFile.draft

        def watched(self, *given):
            result = draft(self, *given)
            decoded.append(self.size)
            return result

        monkeypatch.setattr(JpegImagePlugin.JpegImageFile, 'draft', watched)
        found, _ = run(tmp_path / 'in', tmp_path / 'out')
        assert decoded == [(200, 150)]
        full, _ = run(tmp_path / 'in', tmp_path / 'full', Settings(draft=False, **SMALL))
        assert len(decoded) == 1
        with torch.inference_mode():
            expected = model.forward_features(prepared(tmp_path / 'in' / 'large.jpg', model)).mean((2, 3))
        torch.testing.assert_close(vectors(full), expected)
        assert not torch.equal(vectors(found), expected)
        torch.testing.assert_close(vectors(found), expected, rtol=0.05, atol=0.02)
        assert found['width'].to_pylist() == [800] and found['height'].to_pylist() == [600]


class TestMaps:

    @pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
    def test_are_the_networks(self, dtype, folder, tmp_path, model, monkeypatch):
        monkeypatch.setattr('san_backbones.extract.partitions.MAP_BYTES', 60_000)
        settings = Settings(pool='none', stages=(1, 4), dtype=dtype, partition=5, **SMALL)
        table, _ = run(folder, tmp_path / 'out', settings)
        maps = Maps(tmp_path / 'out')
        assert len(maps) == 7 and maps.index.equals(table) and len({*table['maps'].to_pylist()}) > 3
        assert max(path.stat().st_size for path in (tmp_path / 'out' / 'maps').iterdir()) < 80_000
        for path, found in zip(table['file'].to_pylist(), maps):
            with torch.inference_mode():
                expected = model.forward_intermediates(prepared(path, model), [1, 4], intermediates_only=True)
            assert list(found) == ['stages.1', 'stages.4']
            for each, wanted in zip(found.values(), expected):
                assert each.dtype == getattr(torch, dtype)
                tolerance = dict(rtol=1e-2, atol=1e-3) if dtype == 'bfloat16' else {}
                torch.testing.assert_close(each.float(), wanted[0], **tolerance)
        assert torch.equal(maps[-1]['stages.4'], found['stages.4'])
        with pytest.raises(IndexError, match='row 7 of 7'):
            maps[7]

    def test_there_are_none(self, folder, tmp_path):
        run(folder, tmp_path / 'out')
        with pytest.raises(FileNotFoundError, match='--pool none'):
            Maps(tmp_path / 'out')


class TestBoxes:
    """One row a box; the level by equation 1 of the FPN paper, k = floor(4 + log2(sqrt(w h) / 224))."""

    BOXES = [(1, 'b.png', (10., 20., 200., 150.)), (2, 'a.png', (0., 0., 500., 480.)), (3, 'a.png', (5., 5., 45., 50.)),
             (4, 'a.png', (100., 50., 330., 290.))]

    @pytest.fixture
    def listed(self, tmp_path):
        for seed, name in enumerate(('a.png', 'b.png', 'c.png')):
            noise(tmp_path / 'in' / name, 500, 520, seed)
        images = [dict(id=number, file_name=name, width=520, height=500)
                  for number, name in enumerate(('b.png', 'a.png', 'c.png'))]
        annotations = [dict(id=number, image_id=('b.png', 'a.png').index(name), category_id=1,
                            bbox=[x1, y1, x2 - x1, y2 - y1]) for number, name, (x1, y1, x2, y2) in self.BOXES]
        (tmp_path / 'coco.json').write_text(json.dumps(dict(images=images, annotations=annotations)))
        return tmp_path

    def expected(self, model, path, box, factor=1.):
        image = Image.open(path)
        if factor != 1:
            image = image.resize((round(image.width * factor), round(image.height * factor)),
                                 Image.Resampling[model.pretrained_cfg['interpolation'].upper()])
        mean, std = (torch.tensor(resolve_model_data_config(model)[name])[:, None, None] for name in ('mean', 'std'))
        with torch.inference_mode():
            maps = model.forward_intermediates(((to_tensor(image) - mean) / std)[None], intermediates_only=True)
        x1, y1, x2, y2 = (factor * side for side in box)
        level = min(5, max(2, math.floor(4 + math.log2(math.sqrt((x2 - x1) * (y2 - y1)) / 224))))
        stage = level - 1  # of stride 2 ** level
        rois = torch.tensor([[0, x1, y1, x2, y2]])
        return stage, roi_align(maps[stage], rois, 7, 1 / 2 ** level, 2, aligned=True)[0]

    @pytest.mark.parametrize('size, factor', [(None, 1.), ((250, 250), 0.5)])
    def test_coco(self, size, factor, listed, model):
        table, report = run(listed / 'in', listed / 'out', Settings(size=size), boxes=listed / 'coco.json')
        assert (report.rows, report.pictures) == (4, 2)
        # pyarrow before 26 reads no null lists of fixed length
        assert all(str(table.schema.field(f'features_{stage}').type).startswith('list<') for stage in range(1, 5))
        for (number, name, box), row in zip(self.BOXES, table.to_pylist()):
            stage, expected = self.expected(model, listed / 'in' / name, box, factor)
            assert (row['file'], row['box'], row['stage']) == (str(listed / 'in' / name), number, stage)
            assert (row['x1'], row['y1'], row['x2'], row['y2']) == box
            torch.testing.assert_close(torch.tensor(row[f'features_{stage}']), expected.mean((1, 2)), rtol=1e-3,
                                       atol=1e-5)
            assert all(row[f'features_{other}'] is None for other in range(1, 5) if other != stage)
        assert size or {row['stage'] for row in table.to_pylist()} == {1, 2, 3, 4}

    def test_one_stage_and_columns(self, listed, model):
        (listed / 'boxes.csv').write_text('file,x1,y1,x2,y2\n' + ''.join(
            f'{name},{",".join(map(str, box))}\n' for _, name, box in self.BOXES))
        table, _ = run(listed / 'in', listed / 'out', Settings(stages=(2,), logits=True), boxes=listed / 'boxes.csv')
        assert table['box'].to_pylist() == [0, 1, 2, 3] and 'stage' not in table.column_names
        assert all(str(table.schema.field(name).type).startswith('fixed_size_list<') for name in ('features', 'logits'))
        mean, std = (torch.tensor(resolve_model_data_config(model)[name])[:, None, None] for name in ('mean', 'std'))
        image = ((to_tensor(Image.open(listed / 'in' / 'a.png')) - mean) / std)[None]
        with torch.inference_mode():
            last, (level,) = model.forward_intermediates(image, [2])
            logits = model.forward_head(last)
        for row, (_, _, box) in list(zip(table.to_pylist(), self.BOXES))[1:]:
            expected = roi_align(level, torch.tensor([[0, *box]]), 7, 1 / 8, 2, aligned=True)[0].mean((1, 2))
            torch.testing.assert_close(torch.tensor(row['features']), expected, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(torch.tensor(row['logits']), logits[0], rtol=1e-3, atol=1e-4)

    def test_maps(self, listed, model):
        run(listed / 'in', listed / 'out', Settings(pool='none', stages=(2,)), boxes=listed / 'coco.json')
        maps = Maps(listed / 'out')
        assert [tuple(each['stages.2'].shape) for each in maps] == [(64, 7, 7)] * 4

    def test_bad_boxes(self, listed):
        coco = json.loads((listed / 'coco.json').read_text())
        coco['annotations'] += [dict(id=7, image_id=1, bbox=[10, 10, 0, 5]),
                                dict(id=8, image_id=0, bbox=[600, 0, 9, 9])]
        coco['images'][2].update(width=500, height=520)
        coco['annotations'] += [dict(id=9, image_id=2, bbox=[0, 0, 100, 100])]
        coco['annotations'] += [dict(id=10, image_id=2, bbox=[0, 0, float('inf'), 9]),
                                dict(id=11, image_id=2, bbox=[0, float('nan'), 9, 9])]
        (listed / 'bad.json').write_text(json.dumps(coco))
        table, report = run(listed / 'in', listed / 'out', boxes=listed / 'bad.json')
        assert table.num_rows == 4 and report.errors == 3
        errors = parquet.read_table(listed / 'out' / 'errors.parquet').to_pylist()
        assert 'box 8' in errors[0]['reason'] and 'no area within the 520 x 500' in errors[1]['reason']
        assert 'the boxes are for 500 x 520 pixels, and the picture has 520 x 500' in errors[2]['reason']

    def test_numbers_that_are_none(self, listed):
        (listed / 'a.csv').write_text('file,x1,y1,x2,y2\na.png,0,0,40,40\na.png,0,,40,40\na.png,0,0,3e39,40\n')
        table, _ = run(listed / 'in', listed / 'out', boxes=listed / 'a.csv')
        assert table['box'].to_pylist() == [0]
        reasons = [row['reason'] for row in parquet.read_table(listed / 'out' / 'errors.parquet').to_pylist()]
        assert reasons == [f'box {said} is not in pixels: expected x1, y1, x2 and y2, numbers up to 1e+09'
                           for said in ('1 (0, nothing, 40, 40)', '2 (0, 0, 3e+39, 40)')]

    @pytest.mark.parametrize('name, content, message', [
        ('a.json', '', 'a.json is no JSON file: Expecting value'),
        ('a.csv', '', 'a.csv is no CSV file: Empty CSV file'),
        ('a.parquet', '', 'a.parquet is no Parquet file'),
        ('a.csv', 'file,x1,y1,x2,y2\na.png,1,2,three,4\n', 'a.csv has words in its column x2'),
        ('a.csv', 'file,x1,y1,x2,y2\n', 'a.csv lists no boxes'),
        ('a.json', '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"id": 3, "image_id": 1, "bbox": '
                   '["0", "0", "4", "4"]}]}', 'of annotation 3 is not of numbers'),
        ('a.json', '{"pictures": []}', 'not in COCO\'s format'),
        ('a.json', '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"id": "x", "image_id": 1, "bbox": '
                   '[0, 0, 4, 4]}]}', "the id 'x' of an annotation is no integer"),
        ('a.csv', 'file,left,top\na.png,1,2\n', 'has the columns file, left, top: expected x1')])
    def test_bad_lists(self, name, content, message, listed):
        (listed / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            run(listed / 'in', listed / 'out', boxes=listed / name)
        with pytest.raises(ValueError, match='boxes go with one folder'):
            run([listed / 'in', listed / 'in'], listed / 'out', boxes=listed / name)
