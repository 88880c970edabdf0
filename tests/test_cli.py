"""The command line, against facts from elsewhere: the README's table, the manifest, timm alone, drawn shapes."""
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import san_backbones
from san_backbones import hub, measure
from san_backbones._requirements import older

typer_testing = pytest.importorskip('typer.testing', reason='needs the cli extra')

import san_backbones_cli as cli  # noqa: E402
from san_backbones_cli.app import app  # noqa: E402
from tests import ROOT, environment  # noqa: E402

ROWS = re.findall(r'^\| `(\w+)`(?:, `\w+`)? \| ([\d.]+M) \| ([\d.]+G) \| ([\d.]+)G \| ([\d.]+) / ([\d.]+) \|$',
                  (ROOT / 'README.md').read_text(), re.M)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No weights from elsewhere, no network, and a folder to write to."""
    from huggingface_hub import constants
    for name in (hub.FOLDER_VARIABLE, hub.ORGANISATION_VARIABLE, hub.AUTHORS_VARIABLE, hub.MIRROR_VARIABLE,
                 'SAN_BACKBONES_BACKEND', 'COLUMNS'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(hub.CACHE_VARIABLE, str(tmp_path / 'cache' / 'authors'))
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.chdir(tmp_path)


def run(*arguments, code=0, **options):
    """A command's result; an exception that it does not explain is raised here."""
    result = typer_testing.CliRunner().invoke(app, [str(a) for a in arguments], prog_name='san-backbones', **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert '\x1b' not in result.output
    return result


def data(*arguments, code=0):
    return json.loads(run(*arguments, '--json', code=code).stdout)


def noise(path, height=64, width=96, seed=0, mode='RGB'):
    """A picture of random pixels."""
    shape = (height, width, 3) if mode == 'RGB' else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def prepared(pixels):
    """What models take, by hand."""
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    return ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)[None]


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """Folders `square`, `star` and `ring` of held-out shapes, cut out as the shipped weights were trained on them."""
    pytest.importorskip('pycocotools')
    pytest.importorskip('skimage', reason='the photographs come with scikit-image')
    import train_shapes
    folder = tmp_path_factory.mktemp('drawn')
    made = train_shapes.shapes.make(folder / 'data', train=1, val=8, seed=1, report=lambda line: None)
    for number, (image, kind) in enumerate(zip(*train_shapes.samples(made, 'val'), strict=True)):
        path = folder / 'cut' / train_shapes.shapes.KINDS[kind] / f'{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder / 'cut'


class TestList:

    def test_is_the_table_of_the_readme(self):
        lines = [line.split() for line in run('list').stdout.splitlines()]
        assert len(ROWS) == 6
        for name, parameters, multiply_adds, *_ in ROWS:
            assert [name, parameters, multiply_adds, 'not', 'here', 'mit'] in lines
        assert any(line[0] == 'test_san_patchwise' and line[-2:] == ['shipped', 'apache-2.0'] for line in lines)
        assert any(line[0] == 'test_san_pairwise' and line[-2:] == ['none', '-'] for line in lines)

    def test_says_what_would_be_downloaded(self, monkeypatch):
        from huggingface_hub import constants
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
        for name, _, _, *_ in ROWS:
            entry = data('list', name)[0]
            assert entry['weights'] == 'to download' and entry['download_bytes'] == 4 * entry['parameters']
            assert entry['license'] == 'mit'
        assert 'to download, 65 MB' in run('list', 'san15').stdout
        assert entry['path'] is None and data('list', 'test_san_pairwise')[0]['license'] is None

    def test_json_and_pattern(self):
        found = {model['name']: model for model in data('list', 'san1?_*')}
        manifest = json.loads((ROOT / 'weights/manifest.json').read_text())['models']
        assert {f'{name}.in1k': model['parameters'] for name, model in found.items() if '.' not in name} == {
            name: entry['parameters'] for name, entry in manifest.items() if name.endswith('.in1k')}
        assert [model['name'] for model in data('list', '*.distilled')] == [
            'san10_pairwise.distilled', 'san10_patchwise.distilled']

    def test_finds_weights(self, monkeypatch, tmp_path):
        folder = tmp_path / 'weights'
        for name in ('san10_pairwise.in1k.safetensors', 'san15_patchwise.in1k/model.safetensors'):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(weight=torch.zeros(1)), folder / name)
        cached = tmp_path / 'cache/models--san-backbones--san19_pairwise.in1k'
        (cached / 'refs').mkdir(parents=True)
        (cached / 'refs/main').write_text('0' * 40)
        (cached / 'snapshots' / ('0' * 40)).mkdir(parents=True)
        save_file(dict(weight=torch.zeros(1)), cached / 'snapshots' / ('0' * 40) / 'model.safetensors')
        monkeypatch.setenv(hub.FOLDER_VARIABLE, str(folder))
        states = {model['name']: model['weights'] for model in data('list')}
        assert states == dict(
            san10='not here', san10_pairwise='folder', san10_patchwise='not here', san15='folder',
            san15_pairwise='not here', san15_patchwise='folder', san19='not here', san19_pairwise='hub cache',
            san19_patchwise='not here', test_san_pairwise='none', test_san_patchwise='shipped',
            **{'san10_pairwise.distilled': 'shipped', 'san10_patchwise.distilled': 'shipped'})

        (folder / 'san10_pairwise.in1k.safetensors').write_bytes(b'nonsense')
        broken = run('list', '--json', code=1)
        assert json.loads(broken.stdout)[1]['weights'] == 'unusable'
        assert 'is not a safetensors file' in broken.stderr

    def test_nothing_matches(self):
        result = run('list', 'resnet*', code=2)
        assert result.stdout == '' and 'no model matches' in result.stderr and 'san15_patchwise' in result.stderr


class TestInfo:

    @pytest.mark.parametrize('row', ROWS, ids=lambda row: row[0])
    def test_papers_numbers(self, row):
        name, _, _, paper, top1, top5 = row
        facts = data('info', name)
        assert round(facts['multiply_adds_as_the_paper_counts'] / 1e9, 1) == float(paper)
        assert facts['paper'] == dict(top1=float(top1), top5=float(top5))
        assert "the paper's, not measured here" in run('info', name).stdout

    @pytest.mark.parametrize('name', ['test_san_pairwise', 'test_san_patchwise'])
    def test_parts_are_the_models(self, name):
        facts = data('info', name, '--size', '70x101')
        model = timm.create_model(name).eval()
        seen = []
        for part in (model.stem, *model.stages, model.head):
            part.register_forward_hook(lambda part, args, y: seen.append(list(y.shape[1:])))
        with torch.inference_mode():
            model(torch.rand(1, 3, 70, 101))
        assert [part['shape'] for part in facts['parts']] == seen
        assert [part['name'] for part in facts['parts']] == ['stem', *(f'stages.{i}' for i in range(5)), 'head']
        assert sum(part['parameters'] for part in facts['parts']) == sum(p.numel() for p in model.parameters())
        assert sum(part['multiply_adds'] for part in facts['parts']) == facts['multiply_adds']
        assert [part['footprint'] for part in facts['parts']] == [None, 3, 7, 7, 7, 7, None]
        assert facts['attention'] == name.rpartition('_')[2]

    def test_weights(self):
        facts = data('info', 'test_san_patchwise')
        assert facts['weights']['state'] == 'shipped'
        assert facts['pretrained']['first_classes'] == ['square', 'star', 'ring']
        assert load_file(facts['weights']['path'])['head.fc.weight'].shape[0] == 3
        assert data('info', 'san19_pairwise')['weights']['state'] == 'not here'
        folder = ROOT / 'weights/test_san_patchwise.shapes'
        assert data('info', f'local-dir:{folder}')['weights'] == dict(
            state='local-dir', path=str(folder), note='in the folder given')

    def test_not_a_san(self):
        assert 'describes SANs only' in run('info', 'resnet18', code=2).stderr.replace('\n', ' ')


class TestClassify:

    def test_shapes(self, drawn):
        results = data('classify', drawn, '-m', 'test_san_patchwise')
        files = {str(path) for path in drawn.rglob('*.png')}
        assert {result['file'] for result in results} == files and len(files) >= 12
        right = sum(result['classes'][0]['name'] == pathlib.Path(result['file']).parent.name for result in results)
        assert right >= 0.8 * len(files)
        for result in results:
            assert sum(entry['probability'] for entry in result['classes']) == pytest.approx(1, abs=1e-4)

    @pytest.mark.parametrize(('size', 'batches'), [(2, [2, 1]), (3, [3])])
    def test_batch_size(self, drawn, size, batches, monkeypatch):
        calls, forward = [], san_backbones.SAN.forward
        monkeypatch.setattr(san_backbones.SAN, 'forward',
                            lambda self, images: calls.append(len(images)) or forward(self, images))
        run('classify', *sorted((drawn / 'star').iterdir())[:3], '-m', 'test_san_patchwise', '--batch-size', size)
        assert calls == batches

    def test_batches_and_text(self, drawn):
        one = run('classify', drawn / 'star', '-m', 'test_san_patchwise', '--batch-size', 1, '--top', 1).stdout
        assert one == run('classify', drawn / 'star', '-m', 'test_san_patchwise', '--batch-size', 3, '--top', 1).stdout
        assert re.search(r'\d\.png\n +\d+\.\d %  star\n', one)
        path = min((drawn / 'star').iterdir())  # a picture that is given twice is answered twice
        assert run('classify', path, path, '-m', 'test_san_patchwise').stdout.count('star\n') == 2
        said = run('classify', 'no.png', 'no.png', path, '-m', 'test_san_patchwise', '--json', code=1)
        assert [entry['file'] for entry in json.loads(said.stdout)] == [str(path), 'no.png', 'no.png']
        assert '2 of 3 pictures could not be read' in said.stderr

    def test_what_cannot_be_read(self, tmp_path):
        noise(tmp_path / 'in/good.png')
        noise(tmp_path / 'in/deeper/grey10.JPG', mode='L')
        (tmp_path / 'in/broken.png').write_bytes((tmp_path / 'in/good.png').read_bytes()[:200])
        Image.fromarray(np.zeros((40, 40), np.uint16)).save(tmp_path / 'in/sixteen.png')
        (tmp_path / 'in/._good.png').write_bytes(b'')
        (tmp_path / 'in/notes.txt').write_text('no picture')
        result = run('classify', 'in', 'missing.png', '-m', 'test_san_patchwise', '--json', code=1)
        entries = {pathlib.Path(entry['file']).name: entry for entry in json.loads(result.stdout)}
        assert {name for name, entry in entries.items() if 'classes' in entry} == {'good.png', 'grey10.JPG'}
        assert {name for name, entry in entries.items() if 'error' in entry} == {
            'broken.png', 'sixteen.png', 'missing.png'}
        assert 'missing.png: No such file' in result.stderr and 'more than 8 bits' in result.stderr
        assert '3 of 5 pictures could not be read' in result.stderr
        said = run('attention', 'in/sixteen.png', '-m', 'test_san_patchwise', code=1).stderr
        assert 'in/sixteen.png: its pixels have more than 8 bits' in said

    def test_no_pictures(self, tmp_path):
        assert 'there are no pictures in' in run('classify', tmp_path, '-m', 'test_san_patchwise', code=1).stderr

    def test_no_weights(self, tmp_path):
        noise(tmp_path / 'a.png')
        result = run('classify', 'a.png', code=1)
        assert result.stdout == ''
        for way_out in ('offline mode is on', hub.FOLDER_VARIABLE, '--weights FILE', 'san-backbones list'):
            assert way_out in result.stderr
        assert '--weights FILE' in run('classify', 'a.png', '-m', 'test_san_pairwise', code=1).stderr
        with pytest.raises(RuntimeError, match='offline mode'):
            run('--traceback', 'classify', 'a.png')

    def test_own_checkpoint(self, tmp_path):
        """Its classes and channels are its own; the picture is turned as its camera was."""
        torch.manual_seed(1)
        model = timm.create_model('test_san_pairwise', num_classes=4, in_chans=1).eval()
        torch.save(dict(state_dict=model.state_dict()), 'own.pth')
        pixels = noise(tmp_path / 'a.png', 64, 64, mode='L')
        turned = Image.Exif()
        turned[0x0112] = 6  # to be turned clockwise
        Image.fromarray(np.rot90(pixels)).save('a.png', exif=turned)
        mean, std = sum(IMAGENET_DEFAULT_MEAN) / 3, sum(IMAGENET_DEFAULT_STD) / 3
        image = ((torch.from_numpy(pixels) / 255 - mean) / std)[None, None]
        with torch.inference_mode():
            expected = model(image[..., 4:60, 4:60]).softmax(1)[0]  # 0.875 of the picture's 64 pixels
        (tmp_path / 'names.txt').write_text('\ufeffa\nb\nc\nd\n', encoding='utf-8')  # as Windows writes it
        options = ('-m', 'test_san_pairwise', '--weights', 'own.pth')
        result, = data('classify', 'a.png', *options, '--names', 'names.txt', '--size', 56)
        assert {entry['name']: entry['probability'] for entry in result['classes']} == {
            name: pytest.approx(p, abs=1e-5) for name, p in zip('abcd', expected.tolist(), strict=True)}
        (tmp_path / 'names.txt').write_text('a\nb\n')
        assert '--names has 2 lines' in run('classify', 'a.png', *options, '--names', 'names.txt', code=2).stderr
        (tmp_path / 'names.txt').write_bytes(b'caf\xe9\n')
        assert 'names.txt is no text in UTF-8' in run(
            'classify', 'a.png', *options, '--names', 'names.txt', code=2).stderr.replace('\n', ' ')
        assert 'not of this model' in run(
            'classify', 'a.png', '-m', 'test_san_patchwise', '--weights', 'own.pth', code=1).stderr
        (tmp_path / 'own.pth').write_bytes(b'nonsense')
        assert 'cannot be read as a checkpoint' in run('classify', 'a.png', *options, code=1).stderr


class TestFeatures:
    """That options arrive; tests/extract has what they do."""

    def call(self, monkeypatch, *arguments):
        extract = pytest.importorskip('san_backbones.extract')
        calls = []

        def stub(*given, **options):
            calls.append((given, options))
            return extract.Report(str(given[1]), True, 7, 7, 0, 1.)

        monkeypatch.setattr(extract, 'extract', stub)
        result = run('features', *arguments)
        (sources, out, model, settings), options = calls[0]
        return result, sources, out, model, settings, options

    def test_defaults(self, monkeypatch):
        from san_backbones.extract import Settings
        result, sources, out, model, settings, options = self.call(monkeypatch, 'a', 's3://b/*.jpg', '--out', 'f')
        assert (sources, out, model) == (['a', 's3://b/*.jpg'], pathlib.Path('f'), 'san15_patchwise')
        assert settings == Settings() and set(options.values()) == {None, False, 1}
        assert result.stdout == f'7 rows of 7 pictures: {pathlib.Path("f/features")}\n'

    @pytest.mark.parametrize('arguments, expected', [
        ('--pool gem', dict(pool='gem')), ('--stage 3 --stage 1', dict(stages=(3, 1))), ('--logits', dict(logits=True)),
        ('--dtype bfloat16', dict(dtype='bfloat16')), ('--size 64x96', dict(size=(64, 96))),
        ('--whole', dict(whole=True)), ('--no-draft', dict(draft=False)), ('--precision bf16', dict(precision='bf16')),
        ('--batch-size 3', dict(batch_size=3)), ('--partition 9', dict(partition=9))])
    def test_settings(self, arguments, expected, monkeypatch):
        settings = self.call(monkeypatch, 'a', '--out', 'f', *arguments.split())[4]
        assert {name: getattr(settings, name) for name in expected} == expected

    @pytest.mark.parametrize('arguments, expected', [
        ('--random', dict(random=True)), (f'--weights {__file__}', dict(weights=pathlib.Path(__file__))),
        (f'--boxes {__file__}', dict(boxes=pathlib.Path(__file__))), ('--column image', dict(column='image')),
        ('--every 25', dict(every=25)), ('--workers 3', dict(workers=3)), ('--share 2/5', dict(share=(2, 5))),
        ('--ray auto', dict(ray='auto')), ('--device cpu', dict(device=torch.device('cpu')))])
    def test_options(self, arguments, expected, monkeypatch):
        options = self.call(monkeypatch, 'a', '--out', 'f', *arguments.split())[5]
        assert {name: options[name] for name in expected} == expected

    def test_a_run(self, tmp_path):
        parquet = pytest.importorskip('pyarrow.parquet')
        noise(tmp_path / 'in' / 'a.png')
        arguments = ('features', 'in', '-m', 'test_san_pairwise', '--random', '--size', '32', '--workers', 0, '--out',
                     'f')
        assert 'The weights are random' in run(*arguments).stderr
        assert parquet.read_table('f/features')['file'].to_pylist() == ['in/a.png']
        (tmp_path / 'in' / 'b.png').write_bytes(b'no picture')
        assert 'made otherwise' in run(*arguments, code=1).stderr
        result = run(*arguments[:-1], 'g', '--json', code=1)
        assert 'Error: 1 of the pictures could not be read: g/errors.parquet says why' in result.stderr
        report = json.loads(result.stdout)
        assert report.pop('seconds') > 0
        assert report == dict(folder='g', complete=True, pictures=2, rows=1, errors=1)
        assert 'has no such stage' in run(*arguments[:-1], 'h', '--stage', 5, code=2).stderr


@pytest.mark.parametrize('arguments, message', [
    (['nonsense'], 'No such command'),
    (['info', 'san15_pachwise'], 'similar: san15_patchwise'),
    (['info', 'san15_patchwise.foo'], 'It has: in1k'),
    (['info', 'someone/model'], 'hf-hub:'),
    (['info', 'san10', '--size', '0'], 'in pixels or HEIGHTxWIDTH'),
    (['info', 'san10', '--size', '64x64x3'], 'HEIGHTxWIDTH'),
    (['features', 'a.png', '--out', 'f', '--device', 'abacus'], 'san-backbones env'),
    (['features', 'a.png', '--out', 'f', '--whole', '--size', '64'], 'whole and size exclude each other'),
    (['features', 'a.png', '--out', 'f', '--random', '--weights', __file__],
     '--weights and --random exclude each other'),
    (['features', 'a.png'], '--out'),
    (['features', 'a.png', '--out', 'maps.safetensors'], '--pool none --out FOLDER'),
    (['features', 'a.png', '--out', 'nowhere/f'], "no folder 'nowhere'"),
    (['features', 'a.png', '--out', 'f', '--share', '4/4'], 'expected I/N, 0/4 to 3/4'),
    (['classify', 'a.png', '--weights', 'missing.pth'], 'missing.pth'),
    (['attention', __file__, '--pixel', '3'], 'expected X,Y'),
    (['attention', __file__, '--pixel', '3,4', '--grid', '2'], '--pixel and --grid exclude each other'),
    (['attention', __file__, '--kind', 'features', '--grid', '2'], 'does not take --grid'),
    (['attention', __file__, '--kind', 'heat'], 'heat'),
    (['attention', __file__, '--html', 'a.png'], 'must end in .html'),
    (['attention', __file__, '--html', 'a.html', '--grid', '2'], 'neither --grid, --out'),
    (['attention', __file__, '--html', 'a.html', '--out', 'a.png'], 'neither --grid, --out'),
    (['attention', __file__, '--html', 'a.html', '--dpi', '300'], 'neither --grid, --out'),
    (['attention', __file__, '--html', 'a.html', '--kind', 'rollout'], 'for --kind footprint'),
    (['attention', __file__, '--html', 'a.html', '--pixel', '1,1', '--pixel', '2,2'], 'one --pixel'),
    (['benchmark', '--fused', '--train'], 'leave out --train'),
    (['benchmark', 'san15', 'san20'], "no model 'san20'"),
])
def test_usage_errors(arguments, message):
    result = run(*arguments, code=2)
    assert result.stdout == '' and message in result.stderr


class TestAttention:

    def test_calls(self, monkeypatch, tmp_path):
        """What `visualize` is asked for; pixels are those of the picture as it is."""
        calls, resolutions = [], []

        class Figure:
            def savefig(self, path, dpi):
                pathlib.Path(path).write_bytes(b'drawn')
                resolutions.append(dpi)

        def stub(kind):
            def figure(model, image, **options):
                calls.append((kind, type(model).__name__, model.training, image.size, options))
                return Figure()
            return figure
        module = types.SimpleNamespace(**{f'{kind}_figure': stub(kind) for kind in ('footprint', 'feature', 'rollout')})
        monkeypatch.setitem(sys.modules, 'san_backbones.visualize', module)
        monkeypatch.setattr(san_backbones, 'visualize', module, raising=False)
        noise(tmp_path / 'a.png', 64, 96)
        model = ('attention', 'a.png', '-m', 'test_san_patchwise')
        assert run(*model, '--pixel', '90,10', '--pixel', '3,60', '--size', 48, '--block', '-1',
                   '--channel', 1).stdout \
            == 'a-footprint.png\n'
        run(*model, '--kind', 'rollout', '--grid', 2, '--out', 'b.pdf', '--dpi', 300)
        assert resolutions == [150, 300]
        assert data(*model, '--kind', 'features')['figure'] == 'a-features.png'
        assert calls == [
            ('footprint', 'SAN', False, (96, 64),
             dict(block='-1', pixels=[(90., 10.), (3., 60.)], grid=None, channel=1, size=48)),
            ('rollout', 'SAN', False, (96, 64), dict(pixels=None, grid=2, size=None)),
            ('feature', 'SAN', False, (96, 64), dict(size=None))]
        assert all((tmp_path / name).exists() for name in ('a-footprint.png', 'b.pdf', 'a-features.png'))
        run(*model, '--pixel', '95.4,-0.4')  # on the last and the first pixel
        for beyond in ('96,10', '95.5,10', '3,63.5', '-0.6,3'):
            assert 'outside of the picture' in run(*model, f'--pixel={beyond}', code=2).stderr
        assert "--block: there is no block 'foo'" in run(*model, '--block', 'foo', code=2).stderr
        assert '--channel 4: expected a weight channel, 0 to 0' in run(
            *model, '--block', '0.0', '--channel', 4, code=2).stderr
        said = run(*model, '--channel', 2, code=2).stderr
        assert '--channel 2: expected a weight channel, 0 to 1' in said  # of the block at stride 4: the last one has 4

    @pytest.mark.parametrize('kind', ['footprint', 'features', 'rollout'])
    def test_draws(self, kind, tmp_path):
        pytest.importorskip('matplotlib', reason='needs the visualize extra')
        pytest.importorskip('san_backbones.visualize', exc_type=ImportError)
        noise(tmp_path / 'a.png')
        path = run('attention', 'a.png', '-m', 'test_san_patchwise', '--kind', kind).stdout.strip()
        drawn = np.asarray(Image.open(path))
        assert min(drawn.shape[:2]) > 100 and drawn.std() > 5

    def test_page(self, tmp_path):
        pytest.importorskip('matplotlib', reason='needs the visualize extra')
        noise(tmp_path / 'a.png', 64, 96)
        command = ('attention', 'a.png', '-m', 'test_san_patchwise', '--html', 'a.html')
        assert run(*command).stdout == 'a.html\n'

        def page():
            return json.loads(re.search('id="data">(.*?)</script>', (tmp_path / 'a.html').read_text(), re.S)[1])

        assert len(page()['networks'][0]['blocks']) == 5 and not page()['networks'][0]['untrained']
        assert page()['networks'][0]['name'] == 'test_san_patchwise'
        options = ('--block', '1.0', '--pixel', '90,10', '--channel', 1, '--size', 48, '--random')
        assert data(*command, *options)['page'] == 'a.html'
        network, = page()['networks']
        block, = network['blocks']
        assert (block['name'], block['height'], network['untrained']) == ('stages.1.blocks.0', 12, True)
        assert (page()['pixel'], page()['channel']) == ([90, 10], 1)
        assert '--channel 99: expected a weight channel' in run(*command, '--channel', 99, code=2).stderr
        assert data(*command, '--channel', 3)['page'] == 'a.html'  # which the last block alone has


class TestExport:

    def test_a_program(self, tmp_path):
        """Of the shipped weights, in torch again."""
        found = data('export', 'test_san_patchwise', '--to', 'torchscript', '--size', '32x64')
        assert found['files'] == ['test_san_patchwise.pt'] and found['size'] == [32, 64]
        assert found['bytes'] == (tmp_path / 'test_san_patchwise.pt').stat().st_size
        assert found['difference'] < 1e-5 and found['pictures'] in ('3 photographs of scikit-image', 'seeded noise')
        images = torch.rand(1, 3, 32, 64)
        model = timm.create_model('test_san_patchwise', pretrained=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(torch.jit.load('test_san_patchwise.pt')(images)[0], model(images))

    def test_options(self, tmp_path):
        model = timm.create_model('test_san_pairwise', num_classes=3).eval()
        save_file(model.state_dict(), 'mine.safetensors')
        said = run('export', 'test_san_pairwise', '--to', 'torchscript', '--size', 32, '--checkpoint',
                   'mine.safetensors', '--out', 'program.pt').stdout
        assert re.fullmatch(r'program.pt: 0.\d MB, differs from torch by \de-\d\d of the largest value, on .*\n',
                            re.sub(r'(\d)\.\de', r'\1e', said))
        images = torch.rand(1, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(torch.jit.load('program.pt')(images)[0], model(images))
        run('export', 'test_san_pairwise', '--to', 'torchscript', '--size', 32, '--random', '--features', '--out',
            'maps.pt')
        assert [tuple(output.shape[1:]) for output in torch.jit.load('maps.pt')(images)] == [
            (info['num_chs'], 32 // info['reduction'], 32 // info['reduction'])
            for info in timm.create_model('test_san_pairwise', features_only=True).feature_info.get_dicts()]

    def test_what_differs_is_not_kept(self, tmp_path):
        said = run('export', 'test_san_patchwise', '--to', 'torchscript', '--size', 64, '--tolerance', 0, code=1).stderr
        assert 'Error: test_san_patchwise.pt is wrong, and is not kept: TorchScript differs' in said
        assert not list(tmp_path.glob('*'))

    def test_open_sizes(self, monkeypatch):
        """What they are is tested where programs are; here, that they are asked for."""
        from san_backbones import runtimes
        asked = []
        monkeypatch.setattr(runtimes, 'export_to', lambda model, *arguments: asked.append(arguments)
                            or runtimes.Report((), 1e-7, 'seeded noise', '', 0))
        for options in ((), ('--open-sizes', '--tolerance', 0.1)):
            run('export', 'test_san_patchwise', '--to', 'torchscript', '--size', '64x32', *options)
        path = pathlib.Path('test_san_patchwise.pt')
        assert asked == [('torchscript', path, (64, 32), False, 1e-4), ('torchscript', path, (64, 32), True, 0.1)]

    def test_wrong_usage(self, monkeypatch):
        assert 'must end in .pt' in run('export', 'test_san_patchwise', '--to', 'torchscript', '--out', 'model.pth',
                                        code=2).stderr
        assert 'tensorrt' in run('export', 'test_san_patchwise', '--to', 'tensorrt', code=2).stderr
        monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
        said = run('export', 'test_san_patchwise', '--to', 'ncnn', code=1).stderr
        wanted = "'torch>=2.8'" if older(torch.__version__, '2.8') else "'san-backbones[ncnn]'"
        assert wanted in said


class TestBenchmark:

    def test_rows(self, monkeypatch):
        commands = []
        monkeypatch.setattr(measure, 'peak_memory', lambda command, name, report: commands.append(command) or 5_000_000)
        monkeypatch.setattr(measure, 'alternate', lambda cases, rounds, device, report: dict(
            zip(cases, (2., 1., .5), strict=True)))
        options = ('benchmark', 'test_san_pairwise', '--size', '32x64', '-b', 4, '--fused')
        result = data(*options)
        rows = [(row['model'], row['images_per_second'], row['throughput_to_resnet50']) for row in result['models']]
        assert rows == [
            ('resnet50', 2., 1.), ('test_san_pairwise', 4., 2.), ('test_san_pairwise, fused', 8., 4.)]
        assert result['rounds'] == 5
        assert json.loads(commands[2][-1]) == dict(name='test_san_pairwise', fused=True, batch_size=4,
                                                   image_size=[32, 64], training=False, device='cpu', threads=None)
        assert re.search(r'test_san_pairwise +1 +4 +2\.00 +5\n', run(*options).stdout)

    def test_rounds_and_threads(self, monkeypatch):
        seen = []
        monkeypatch.setattr(measure, 'alternate', lambda cases, rounds, device, report: seen.append(
            (rounds, torch.get_num_threads())) or dict.fromkeys(cases, 1.))
        before = torch.get_num_threads()
        try:
            data('benchmark', 'test_san_pairwise', '--size', 32, '-b', 1, '--rounds', 3, '--threads', before + 1,
                 '--no-memory')
        finally:
            torch.set_num_threads(before)
        assert seen == [(3, before + 1)]

    @pytest.mark.parametrize('how', ['--fused', '--train'])
    def test_runs(self, how):
        result = data('benchmark', 'test_san_pairwise', '--size', 32, '-b', 2, '--rounds', 1, '--no-memory', how)
        rows = result['models']
        assert len(rows) == (3 if how == '--fused' else 2) and all(row['seconds'] > 0 for row in rows)

    def test_one_fails(self, monkeypatch):
        make = measure.make
        monkeypatch.setattr(measure, 'make', lambda name, **options: make(name, **options) if name != 'resnet50' else
                            lambda: 1 / 0)
        result = run('benchmark', 'test_san_pairwise', '--size', 32, '-b', 1, '--rounds', 1, '--no-memory', code=1)
        assert re.search(r'resnet50 +- +- +- +-', result.stdout) and 'resnet50 failed' in result.stderr

    @pytest.mark.skipif(not sys.platform.startswith('linux'), reason='peak memory on the CPU is measured on Linux')
    def test_memory(self):
        """A model's peak holds at least its weights and its images."""
        arguments = dict(name='test_san_pairwise', batch_size=64, image_size=[64, 64], device='cpu', threads=1)
        peak = measure.peak_memory([sys.executable, '-m', 'san_backbones.measure', json.dumps(arguments)], 'test')
        least = 4 * (64 * 3 * 64 * 64 + 178_000)
        assert least < peak < 100 * least


class TestEnv:

    def test_facts(self, monkeypatch, tmp_path):
        monkeypatch.setenv('HF_TOKEN', 'hf_secret')
        monkeypatch.setenv('HF_ENDPOINT', 'https://someone:password@mirror.example/hub')
        monkeypatch.setenv('HOME', str(tmp_path))
        monkeypatch.setenv(hub.FOLDER_VARIABLE, f'{tmp_path}/weights')
        monkeypatch.setenv(hub.MIRROR_VARIABLE, 'https://mirror.example/x?token=secret')
        text = run('env').stdout
        assert re.search(rf'^torch +{re.escape(torch.__version__)}$', text, re.M)
        assert re.search(rf'^timm +{re.escape(timm.__version__)}$', text, re.M)
        assert re.search(r'^backend reference, cpu +can run$', text, re.M)
        loops = data('env')['compiled_loops']
        if loops['serving'] and loops['runtime'] != 'none':
            assert loops['threads'] == torch.get_num_threads()
            assert re.search(rf'^their threads +{torch.get_num_threads()}, of lib(gomp|omp|iomp5)[-.]', text, re.M)
        assert 'https://mirror.example/hub' in text and re.search(r'^SAN_BACKBONES_WEIGHTS +~/weights$', text, re.M)
        assert 'secret' not in text and 'password' not in text and str(tmp_path) not in text
        assert tuple(name for name, reason in data('env')['paths']['cpu'].items() if reason is None) \
            == san_backbones.ops.available_backends('cpu')

    def test_says_why_not(self, monkeypatch):
        from san_backbones.ops.native import library
        monkeypatch.setattr(library, '_load', lambda: (None, 'the dog ate it'))
        text = run('env').stdout
        assert 'backend native, cpu' in text and 'cannot run: the dog ate it' in text
        loops = data('env')['compiled_loops']
        assert loops['serving'] is None and loops['problem'] == 'the dog ate it' and loops['threads'] is None
        assert loops['found'] == sorted(path.name for path in pathlib.Path(library.__file__).parent.glob('_*.so'))

    def test_packages_of_onedl(self, monkeypatch):
        """They are listed under their own names, and OpenMMLab's are then not listed as missing."""
        there = {'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6', 'onedl-mmdetection': '3.5.1', 'timm': '1.0.31'}

        def version(package):
            if package not in there:
                raise importlib.metadata.PackageNotFoundError(package)
            return there[package]
        monkeypatch.setattr('importlib.metadata.version', version)
        versions = data('env')['versions']
        assert {name: versions[name] for name in there} == there
        assert not {'mmengine', 'mmcv', 'mmdet'} & set(versions) and versions['mmsegmentation'] is None
        there = {'mmdet': '3.3.0'}
        assert data('env')['versions']['mmdet'] == '3.3.0'


class TestProgram:

    @pytest.mark.parametrize('columns', [80, 120])
    @pytest.mark.parametrize('command', [
        [], ['list'], ['info'], ['classify'], ['features'], ['attention'], ['app'], ['export'], ['benchmark'], ['env'],
    ], ids=lambda command: command[0] if command else 'none')
    def test_help_fits(self, command, columns, monkeypatch):
        text = run(*command, '--help', env=dict(COLUMNS=str(columns), FORCE_COLOR='1', GITHUB_ACTIONS='true')).stdout
        assert max(map(len, text.splitlines())) <= columns
        assert 'Exit codes:\n    0  done\n    1  failed' in text or command

    @pytest.mark.parametrize('command', [['list'], ['info', 'san15_patchwise']], ids=lambda command: command[0])
    def test_tables_fit(self, command):
        assert max(len(line) for line in run(*command).stdout.splitlines() if not line.startswith('weights ')) <= 80

    def test_completes_names(self):
        completed = run(env=dict(_SAN_BACKBONES_COMPLETE='complete_bash', COMP_WORDS='san-backbones info san15_pai',
                                 COMP_CWORD='2'))
        assert completed.stdout.split() == ['san15_pairwise']

    def test_version(self):
        assert run('--version').stdout == f'san-backbones {san_backbones.__version__}\n'

    def test_without_typer(self, monkeypatch):
        monkeypatch.setitem(sys.modules, 'typer', None)
        with pytest.raises(SystemExit, match=re.escape("pip install 'san-backbones[cli]'")):
            cli.main()

    def test_as_a_program(self):
        """In a process of its own, whose output goes into a pipe; typer is not imported with the package."""
        code = ('import sys, runpy, san_backbones; assert "typer" not in sys.modules; sys.argv[1:] = ["list", "*15", '
                '"--json"]; runpy.run_module("san_backbones", run_name="__main__", alter_sys=True)')
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                              env=environment(TERM='dumb'))
        assert done.returncode == 0 and done.stderr == ''
        assert [model['name'] for model in json.loads(done.stdout)] == ['san15']


    @pytest.mark.parametrize('words', [['weights', 'get', *3 * ['test_san_patchwise']], ['list', '*15']])
    def test_a_closed_pipe(self, words):
        code = f'import sys; sys.argv[1:] = {words!r}; import san_backbones_cli; san_backbones_cli.main()'
        reader, writer = os.pipe()
        os.close(reader)
        try:
            done = subprocess.run([sys.executable, '-u', '-c', code], stdout=writer, stderr=subprocess.PIPE, text=True,
                                  env=environment())
        finally:
            os.close(writer)
        assert done.returncode == 1 and done.stderr == ''

    def test_names_that_are_not_utf8(self, tmp_path):
        noise(tmp_path / 'a.png')
        os.rename('a.png', b'a\xff.png')
        code = ("import sys, os; sys.argv[1:] = ['classify', os.fsdecode(b'a\\xff.png'), '-m', 'test_san_patchwise']; "
                'import san_backbones_cli; san_backbones_cli.main()')
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                              env=environment(PYTHONIOENCODING='utf-8:strict'))
        assert done.returncode == 0 and done.stdout.startswith('a\\udcff.png\n'), done.stderr


class TestWeights:
    """The commands themselves are tried in tests/weights; here, that they are reached."""

    def test_through_the_command_line(self, capsys):
        assert 'convert' in run('weights', '--help').stdout
        assert 'test_san_patchwise.shapes: ' in run('weights', 'get', 'test_san_patchwise').stdout
        assert 'no command' in run('weights', 'sell', code=2).stderr
        assert "there is no model 'san99'" in run('weights', 'get', 'san99', code=2).stderr
        assert '--out' in run('weights', 'get', '--help').stdout

    def test_without_the_extra(self, monkeypatch, capsys):
        monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
        for words, code in ((['weights', 'get', 'test_san_patchwise'], 0), (['weights', 'get', 'san99'], 2)):
            monkeypatch.setattr(sys, 'argv', ['san-backbones', *words])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert ended.value.code == code
        assert 'licence apache-2.0' in capsys.readouterr().out


def test_distill(tmp_path, monkeypatch):
    """Options reach the training: what the checkpoint says, against what was given."""
    for i in range(6):
        noise(tmp_path / 'in' / f'{i}.png', seed=i)
    (tmp_path / 'my_teachers.py').write_text('def colours():\n    return lambda x: x.mean((2, 3))\n')
    monkeypatch.syspath_prepend(tmp_path)
    options = ('in', '--teacher', 'my_teachers:colours', '--level', '0', '--model', 'test_san_patchwise', '--out',
               'out')
    result = run('distill', *options, '--size', '32x2:4', '--size', '64x3', '--pictures', '10', '--device', 'cpu')
    assert re.fullmatch(r'10 pictures in 0\.\d minutes: out/model.safetensors\n', result.stdout)
    assert '10 pictures, ' in result.stderr and load_file('out/model.safetensors')['head.fc.weight'].shape == (3, 128)
    settings = torch.load('out/last.pt', weights_only=True)['about']['settings']
    assert settings['sizes'] == [dict(pixels=32, batch=2, pictures=4), dict(pixels=64, batch=3, pictures=None)]
    given = dict(teacher_scale=1.5, teacher_size=96, crop=.7, temperature=2., lr=.002, projection_lr=.3,
                 weight_decay=.1, warmup=7, decay=.6, clip=.4, ema=.9, seed=3, precision='bf16',
                 teacher_precision='fp32')
    flags = [str(x) for name, value in given.items() for x in ('--' + name.replace('_', '-'), value)]
    done = data('distill', *options[:-1], 'other', '--size', '32x2', '--pictures', 4, '--no-reuse', '--loss', 3, 2, 1,
                '--keep', 2, '--save-minutes', 0, '--store', 'pixels.bin', '--workers', 2, '--start', 'out/last.pt',
                '--minutes', 60, *flags)
    assert done['pictures'] == 14 and done['left_out'] == 0 and done['signal'] is None
    settings = torch.load('other/last.pt', weights_only=True)['about']['settings']
    expected = dict(given, levels=[], reuse=False, weights=[3, 2, 1], sizes=[dict(pixels=32, batch=2, pictures=None)])
    assert settings == expected and pathlib.Path('pixels.bin').is_file()
    assert len(list(pathlib.Path('other/kept').iterdir())) == 2


@pytest.mark.parametrize('arguments, message, code', [
    (['--size', 'large'], 'expected PIXELS[xBATCH][:PICTURES]', 2), (['--teacher', 'nobody'], 'no teacher', 2),
    (['--crop', '2'], 'crop: expected a number in (0, 1]', 2), (['--precision', 'fp8'], 'expected fp32 or bf16', 2),
    ([], 'nowhere is not there', 1)])
def test_distill_refuses(tmp_path, monkeypatch, arguments, message, code):
    (tmp_path / 'my_teachers.py').write_text('def colours():\n    return lambda x: x.mean((2, 3))\n')
    monkeypatch.syspath_prepend(tmp_path)
    result = run('distill', 'nowhere', '--teacher', 'my_teachers:colours', '--out', 'out', *arguments, code=code)
    assert message in ' '.join(result.stderr.replace('│', '').split())


class TestStart:
    """What answers at once: nothing heavy is imported, neither torch and timm nor the package that imports them."""

    @pytest.mark.parametrize('words, code, said', [
        ('--help', 0, 'Exit codes:'), ('--version', 0, san_backbones.__version__), ('attention --help', 0, '--pixel'),
        ('lsit', 2, "Did you mean 'list'?"), ('classify', 2, 'Missing argument'), ('list --jsn', 2, '--json'),
        ('info san15_pachwise', 2, 'similar: san15_patchwise'),
        ('distill pictures --out a', 2, '--teacher'), ('features a', 2, '--out')])
    def test_imports_nothing_heavy(self, words, code, said):
        self.start(words, code, said)

    @pytest.mark.parametrize('line, said', [
        ('san-backbones inf', 'info'), ('san-backbones info san15_pai', 'san15_pairwise'),
        ('san-backbones classify --mo', '--model')])
    def test_completes_without_imports(self, line, said):
        self.start('', 0, said, _SAN_BACKBONES_COMPLETE='complete_bash', COMP_WORDS=line,
                   COMP_CWORD=str(line.count(' ')))

    def start(self, words, code, said, **variables):
        program = ('import atexit, sys\n'
                   'heavy = {"torch", "timm", "torchvision", "numpy", "PIL", "san_backbones"}\n'
                   'atexit.register(lambda: print("imported:", *heavy & set(sys.modules)))\n'
                   'from san_backbones_cli import main; main()')
        done = subprocess.run([sys.executable, '-c', program, *words.split()], capture_output=True, text=True,
                              env=environment(TERM='dumb', COLUMNS='120', **variables))
        assert done.returncode == code and said in done.stdout + done.stderr, done
        assert done.stdout.splitlines()[-1] == 'imported:'

    def test_names_are_the_packages(self):
        from san_backbones.cli.weights import our_models
        from san_backbones_cli.app import MODELS
        assert list(MODELS) == our_models()

    def test_defaults_of_distill_are_the_settings(self, monkeypatch, tmp_path):
        from san_backbones import distill
        given = []
        monkeypatch.setattr(distill, 'load_teacher', lambda name, weights: None)
        monkeypatch.setattr(distill, 'distill', lambda *arguments, **options: given.append(arguments[4]) or dict(
            pictures=0, seconds=0, weights='', signal=None))
        run('distill', tmp_path, '--teacher', 'any', '--out', 'out', '--device', 'cpu')
        assert given == [distill.Settings()]

    @pytest.mark.parametrize('name', ['resnet18', 'san15_patchwise.in1k', 'test_san_pairwise'])
    def test_other_names_are_timms_to_judge(self, name):
        from san_backbones_cli.app import check_model
        assert check_model(name) == name


def examples():
    """The commands that every `--help` and the README show."""
    from typer.main import get_command
    commands = get_command(app)
    texts = [(ROOT / 'README.md').read_text(), *(each.help or '' for each in (commands, *commands.commands.values()))]
    return sorted({line for text in texts
                   for line in re.findall(r'^ {2,}san-backbones (\S.*?) *(?:#.*)?$', text, re.M)})


@pytest.mark.parametrize('line', examples())
def test_examples_run_as_printed(line, tmp_path):
    """On a fresh machine: no network, nothing in a cache; they name weights that ship."""
    if 'features' in line:
        pytest.importorskip('pyarrow', reason='needs the features extra')
    if 'attention' in line:
        pytest.importorskip('matplotlib', reason='needs the visualize extra')
    for name in ('photo.jpg', 'PICTURES/a.png', 'pictures/a.png'):
        noise(tmp_path / name)
    run(*line.split())


def test_there_are_examples():
    assert {line.split()[0] for line in examples()} >= {'list', 'info', 'classify', 'features', 'attention'}
