"""The page in Gradio, its command and its Space. That it works in a browser is tested by `make app-check`."""
import html
import json
import re
import runpy
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import yaml
from PIL import Image

import san_backbones.app
from tests import ROOT

gradio = pytest.importorskip('gradio', reason='needs the app extra')
pytest.importorskip('matplotlib', reason='needs the app extra')

from san_backbones.app import networks, page  # noqa: E402
from san_backbones.app.views import Views  # noqa: E402


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path / 'uploads'))


@pytest.fixture(scope='module')
def built():
    return san_backbones.app.create('test_san_patchwise', size=100)


def parts(built, kind):
    return {part['props'].get('elem_id') or part['props'].get('label'): part['props']
            for part in built.get_config_file()['components'] if part['type'] == kind}


def test_what_stands_on_the_page(built):
    choices = parts(built, 'dropdown')
    assert choices['network']['value'] == 'test_san_patchwise'
    assert choices['beside']['value'] == 'test_san_pairwise, untrained' and choices['beside']['choices'][0][0] == 'none'
    assert choices['size']['value'] == 100 and ('100 pixels', 100) in map(tuple, choices['size']['choices'])
    assert [value for _, value in choices['block']['choices']][0] == 'stages.0.blocks.0'
    assert len(choices['stage']['choices']) == 5
    assert [tab['label'] for tab in parts(built, 'tabitem').values() if tab.get('label') not in ('View', 'Code')] == \
        ['Attention', 'Features']
    assert set(parts(built, 'code')) == {'attention-code', 'features-code'}
    assert {'attention-png', 'attention-svg', 'features-png', 'features-svg'} <= set(parts(built, 'button'))


def test_random_and_weights(tmp_path):
    built = san_backbones.app.create('test_san_pairwise', random=True)
    assert parts(built, 'dropdown')['network']['value'] == 'test_san_pairwise, untrained'
    with pytest.raises(RuntimeError, match='cannot be read as a checkpoint'):
        san_backbones.app.create('test_san_pairwise', __file__)
    with pytest.raises(ValueError, match='both its config and its checkpoint'):
        san_backbones.app.create('test_san_pairwise', random=True, config='a.py')


def function(built, name):
    """What a listener calls, by its name."""
    return next(listener.fn for listener in built.fns.values() if listener.fn and listener.fn.__name__ == name)


def test_errors_are_words(built, tmp_path, capsys):
    broken = tmp_path / 'broken.png'
    broken.write_bytes(b'these are words')
    with pytest.raises(gradio.Error, match=r'broken\.png cannot be read as a picture') as caught:
        function(built, 'accept')(str(broken))
    assert caught.value.duration is None and not caught.value.print_exception
    picture = tmp_path / 'a.png'
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
    assert function(built, 'accept')(str(picture)) == str(picture)

    def fail():
        return {}['key']
    with pytest.raises(gradio.Error, match='KeyError: .*The terminal says where'):
        page._explained(fail)()
    assert "return {}['key']" in capsys.readouterr().err


def test_only_what_is_seen_is_computed(built, tmp_path):
    picture = tmp_path / 'a.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)).save(picture)
    show = function(built, 'show')
    given = [str(picture), 'test_san_patchwise', 'stages.1.blocks.0', 96, page.Chosen((3, 3)), None, 'none']
    assert all(result == gradio.skip() for result in show('features', *given))
    block, frame, code, chosen, wanted = show('attention', *given)
    assert 'iframe' in frame and 'test_san_patchwise' in code and chosen == page.Chosen()  # of another picture
    assert all(result == gradio.skip() for result in show('attention', *given[:5], wanted, 'none'))
    other = list(given)
    other[2] = 'stages.2.blocks.0'
    *_, chosen, _ = show('attention', *other[:5], wanted, 'none')
    assert chosen == page.Chosen((3, 3))  # the same picture: the pixel stays


def test_detectors_have_a_view(monkeypatch):
    class Predictor:
        model = networks.given('test_san_pairwise', random=True).model

        def __init__(self, config, checkpoint):
            assert (config, checkpoint) == ('a.py', 'b.pth')

    monkeypatch.setattr('san_backbones.app.predictions.Predictor', Predictor)
    built = san_backbones.app.create('test_san_patchwise', config='a.py', checkpoint='b.pth')
    assert 'Detections' in parts(built, 'tabitem') and 'boxes-code' in parts(built, 'code')
    assert ['the backbone of a'] * 2 in map(list, parts(built, 'dropdown')['network']['choices'])


def test_launched_for_this_machine_alone(built, monkeypatch):
    given = {}
    monkeypatch.setattr(gradio.Blocks, 'launch', lambda self, **options: given.update(options))
    san_backbones.app.launch(built)
    assert (given['server_name'], given['share'], given['max_file_size']) == ('127.0.0.1', False, '20mb')
    san_backbones.app.launch(built, host='0.0.0.0', port=99, share=True, quiet=True)
    assert (given['server_name'], given['server_port'], given['share'], given['quiet']) == ('0.0.0.0', 99, True, True)


def test_served_without_anything_from_elsewhere(built, monkeypatch):
    """No analytics, no fonts, no scripts of others; and what is no upload is not given out."""
    monkeypatch.setenv('GRADIO_SHARE', 'True')  # which is not asked for here
    _, address, public = san_backbones.app.launch(built, prevent_thread_lock=True, quiet=True)
    try:
        assert public is None and address.startswith('http://127.0.0.1:')
        text = urllib.request.urlopen(address).read().decode()
        assert not re.search(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//', text)
        assert not re.search(r'@import|fonts\.g', text)
        styles = urllib.request.urlopen(address + 'theme.css').read().decode()
        assert 'http' not in styles.replace('http://www.w3.org/2000/svg', '') and 'system-ui' in styles
        settings = json.loads(urllib.request.urlopen(address + 'config').read())
        assert settings['analytics_enabled'] is False
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f'{address}gradio_api/file={ROOT / "setup.cfg"}')
    finally:
        built.close()


def test_examples_are_optional(monkeypatch):
    monkeypatch.setattr('san_backbones.app.pictures.examples', list)
    built = page.build(Views(networks.choices(networks.given('test_san_patchwise'), 'test_san_patchwise')))
    assert parts(built, 'gallery')['first-gallery']['visible'] is False


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(ImportError, match=re.escape("pip install 'san-backbones[app]'")):
        san_backbones.app.create()


class TestCommand:

    @pytest.fixture
    def called(self, monkeypatch):
        calls = []
        monkeypatch.setattr(san_backbones.app, 'create',
                            lambda *args, **options: calls.append((args, options)) or 'page')
        monkeypatch.setattr(san_backbones.app, 'launch', lambda *args, **options: calls.append((args, options)))
        return calls

    def test_options(self, called, tmp_path):
        from tests.test_cli import run
        run('app')
        assert called == [
            (('san10_patchwise.distilled', None), dict(random=False, config=None, checkpoint=None, size=224)),
            (('page',), dict(host='127.0.0.1', port=None, share=False))]
        called.clear()
        files = [tmp_path / name for name in ('a.py', 'b.pth', 'c.pth')]
        for file in files:
            file.touch()
        run('app', '--model', 'test_san_pairwise', '--weights', files[2], '--config', files[0],
            '--checkpoint', files[1], '--size', 160, '--host', '0.0.0.0', '--port', 99, '--share')
        assert called == [
            (('test_san_pairwise', files[2]), dict(random=False, config=files[0], checkpoint=files[1], size=160)),
            (('page',), dict(host='0.0.0.0', port=99, share=True))]

    @pytest.mark.parametrize(('options', 'message'), [
        (('--config', __file__), '--config and --checkpoint belong together'),
        (('--random', '--weights', __file__), 'exclude each other'), (('--size', 8), '32')])
    def test_wrong_usage(self, called, options, message):
        from tests.test_cli import run
        assert message in run('app', *options, code=2).stderr and not called

    def test_random(self, called):
        from tests.test_cli import run
        assert 'The weights are random' in run('app', '--random').stderr
        assert called[0][1]['random'] is True


class TestSpace:
    folder = ROOT / 'spaces'

    def test_header(self):
        header = yaml.safe_load((self.folder / 'README.md').read_text().split('---')[1])
        assert header['sdk'] == 'gradio' and header['suggested_hardware'] == 'cpu-basic'
        assert (self.folder / header['app_file']).is_file() and len(header['short_description']) <= 60
        least = re.search(r'gradio>=([\d.]+)', (ROOT / 'setup.cfg').read_text())[1]
        assert [int(part) for part in header['sdk_version'].split('.')] >= [int(part) for part in least.split('.')]
        assert re.search(rf'Python :: {header["python_version"]}$', (ROOT / 'setup.cfg').read_text(), re.M)

    def test_requirements(self):
        wanted, = (self.folder / 'requirements.txt').read_text().split()
        assert wanted == 'san-backbones[app]' and re.search('^app =', (ROOT / 'setup.cfg').read_text(), re.M)

    def test_script(self, monkeypatch):
        calls = []
        monkeypatch.setattr(san_backbones.app, 'create', lambda: 'page')
        monkeypatch.setattr(san_backbones.app, 'launch', lambda *args, **options: calls.append((args, options)))
        assert runpy.run_path(str(self.folder / 'app.py'))['demo'] == 'page' and not calls
        runpy.run_path(str(self.folder / 'app.py'), run_name='__main__')
        assert calls == [(('page',), dict(host='0.0.0.0', port=7860))]


def test_names_are_escaped(tmp_path):
    """A picture's name comes from a visitor."""
    path = tmp_path / 'a"><b onload=1>.png'
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(path)
    shown = Views(networks.choices(networks.given('test_san_patchwise'), 'test_san_patchwise'))
    frame = shown.footprints(str(path), 'test_san_patchwise', 'none', 'stages.1.blocks.0', 64, page.Chosen())
    assert frame.count('"') == 8 and '<b onload' not in html.unescape(frame)
