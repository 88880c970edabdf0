"""Programs for runtimes. Those whose packages `make test` lacks run where they are installed (tools.run_exports)."""
import importlib.util
import pathlib
import re
import sys
import typing

import pytest
import torch
from PIL import Image

from san_backbones import SAN, runtimes
from san_backbones.runtimes import TARGETS, Target, export_to
from tests import ROOT
from tests.test_export import as_list, pictures, settle, small
from tools.run_exports import requirements


def tiny(form='patchwise', features=False, **kwargs):
    return small(form, features, **{**dict(depths=(0, 1)), **kwargs})


def write_as_is(model, example, path, open_sizes):
    torch.save(dict(model=model, shape=example.shape, open=open_sizes), path)


def read(path):
    return torch.load(path, weights_only=False)


@pytest.fixture
def fake(monkeypatch):
    """A runtime of the name ncnn that keeps the model as it is; what it computes can be changed."""
    def make(load=lambda path: read(path)['model'], write=write_as_is, **kwargs):
        target = Target('Fake', '.fake', (), '', 'either', write, load, **kwargs)
        monkeypatch.setitem(TARGETS, 'ncnn', target)
    return make


def test_all_runtimes_have_a_name():
    assert set(typing.get_args(runtimes.Runtime)) == set(TARGETS)
    pytest.importorskip('typer')
    from san_backbones_cli import app
    assert app.Runtime == runtimes.Runtime
    assert len({target.suffix for target in TARGETS.values()}) == len(TARGETS)


def test_the_page_has_all_of_them():
    """A row each, in the table of what they need and in the one that tools.run_exports writes."""
    page = (ROOT / 'docs/how-to/export.md').read_text()
    measured, = [part for part in page.split('\n\n') if part.startswith('| runtime | versions |')]
    for to, target in TARGETS.items():
        needs, = re.findall(rf'^\| `{to}` \|.*', page, re.M)
        assert f'| `{target.extra}` |' in needs if target.extra else '| - |' in needs
        assert len(re.findall(rf'^\| {re.escape(target.name)} \|', measured, re.M)) == 1, to
    assert all(requirements(target.extra) for target in TARGETS.values() if target.extra)


@pytest.mark.parametrize('form, features', [('pairwise', True), ('patchwise', False)])
@pytest.mark.parametrize('to', [to for to in TARGETS if to != 'aoti'])
def test_programs_compute_what_torch_does(to, form, features, tmp_path):
    """The numbers are compared by `export_to`; here again, in a runtime that starts from the file."""
    target = TARGETS[to]
    if not all(map(importlib.util.find_spec, target.packages)):
        pytest.skip(f'needs the extra {target.extra}')
    model = tiny(form, features)
    path = tmp_path / f'model{target.suffix}'
    report = export_to(model, to, str(path), (20, 24))
    assert [file.name for file in report.files][0] == path.name and sorted(report.files) == sorted(tmp_path.iterdir())
    assert report.bytes == sum(f.stat().st_size for f in tmp_path.rglob('*') if f.is_file()) > 10_000
    if target.only_on not in ('', sys.platform):
        assert report.difference is None and report.pictures == '' and 'converted only' in report.note
        return
    assert 0 <= report.difference < 1e-5 and report.note == ''
    images = pictures(1, 3, 20, 24)
    with torch.no_grad():
        for given, expected in zip(target.load(path)(images), as_list(model(images)), strict=True):
            torch.testing.assert_close(torch.as_tensor(given), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('to', ['onnx', 'openvino', 'torchscript'])
def test_open_sizes(to, tmp_path):
    target = TARGETS[to]
    if not all(map(importlib.util.find_spec, target.packages)):
        pytest.skip(f'needs the extra {target.extra}')
    model = tiny('pairwise')
    path = tmp_path / f'model{target.suffix}'
    export_to(model, to, path, 16, open_sizes=True)
    images = pictures(2, 3, 13, 22)
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(target.load(path)(images)[0]), model(images), rtol=1e-4, atol=1e-5)


def test_onnx_files_of_one_size_have_it(tmp_path):
    onnx = pytest.importorskip('onnxscript') and pytest.importorskip('onnxruntime')
    export_to(tiny(), 'onnx', tmp_path / 'model.onnx', (20, 24))
    assert onnx.InferenceSession(tmp_path / 'model.onnx').get_inputs()[0].shape == [1, 3, 20, 24]


class TestComparison:

    def test_on_photographs(self, fake, tmp_path):
        data = pytest.importorskip('skimage.data', reason='the photographs come with scikit-image')
        seen = []

        def load(path):
            def run(images):
                seen.append(images)
                return read(path)['model'](images)
            return run
        fake(load)
        report = export_to(tiny(), 'ncnn', tmp_path / 'model.fake', 16)
        assert report.pictures == '3 photographs of scikit-image' and report.difference == 0
        from timm.data import create_transform
        prepare = create_transform((3, 16, 16), is_training=False, interpolation='bicubic')
        torch.testing.assert_close(seen[0], prepare(Image.fromarray(data.astronaut()))[None])
        assert len({image.sum().item() for image in seen}) == 3
        seen.clear()
        export_to(tiny(), 'ncnn', tmp_path / 'model.fake', (16, 24), open_sizes=True)
        assert {image.shape[2:] for image in seen} == {(16, 24), (48, 43)}

    def test_on_noise(self, fake, tmp_path, monkeypatch):
        fake()
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'skimage' else found(name))
        assert export_to(tiny(), 'ncnn', tmp_path / 'model.fake', 16).pictures == 'seeded noise'

    @pytest.mark.parametrize('change, message', [
        (lambda outputs: [output * 1.01 for output in outputs], r'differs from torch by 0\.01 .* 0\.001 is accepted'),
        (lambda outputs: [output * torch.nan for output in outputs], 'differs from torch by nan'),
        (lambda outputs: [output[:, 1:] for output in outputs], r'shapes \[\[1, 4\]\], expected \[\[1, 5\]\]'),
        (lambda outputs: [*outputs, *outputs], 'gives outputs of shapes'),
        (lambda outputs: 1 / 0, 'does not run model.fake, which is not kept: ZeroDivisionError'),
    ], ids=['other numbers', 'no numbers', 'other shapes', 'more outputs', 'an error'])
    def test_what_is_wrong_is_not_kept(self, change, message, fake, tmp_path):
        def load(path):
            return lambda images: change(read(path)['model'](images))
        fake(load)
        (tmp_path / 'model.fake').write_text('an older one')
        with pytest.raises(RuntimeError, match=message):
            export_to(tiny(), 'ncnn', tmp_path / 'model.fake', 16, tolerance=1e-3)
        assert [file.read_text() for file in tmp_path.iterdir()] == ['an older one']

    def test_the_tolerance_is_the_callers(self, fake, tmp_path):
        fake(lambda path: lambda images: [output * 1.01 for output in read(path)['model'](images)])
        report = export_to(tiny(), 'ncnn', tmp_path / 'model.fake', 16, tolerance=0.02)
        assert report.difference == pytest.approx(0.01, rel=0.01)

    def test_one_wrong_map_of_several(self, fake, tmp_path):
        """Each output is measured by its own largest value."""
        def load(path):
            def run(images):
                first, second = read(path)['model'](images)
                return [first, second + second.abs().max() / 10]
            return run
        fake(load)
        with pytest.raises(RuntimeError, match=r'differs from torch by 0\.[01]'):
            export_to(tiny(features=True), 'ncnn', tmp_path / 'model.fake', 16)

    def test_values_that_are_not_finite(self, fake, tmp_path):
        fake()
        model = tiny()
        model.head.fc.bias.data.fill_(torch.inf)
        with pytest.raises(RuntimeError, match='torch itself computes values that are not finite'):
            export_to(model, 'ncnn', tmp_path / 'model.fake', 16)
        assert not list(tmp_path.iterdir())


def test_converters_errors_are_explained(fake, tmp_path):
    def write(model, example, path, open_sizes):
        path.write_text('half')
        raise KeyError('aten::unfold')
    fake(write=write)
    with pytest.raises(RuntimeError, match="Fake cannot be made of this model: KeyError: 'aten::unfold'"):
        export_to(tiny(), 'ncnn', tmp_path / 'model.fake', 16)
    assert not list(tmp_path.iterdir())


def test_folders_replace_folders(fake, tmp_path):
    """Core ML's files are folders."""
    def write(model, example, path, open_sizes):
        path.mkdir()
        (path / 'new').write_text('')
    fake(write=write, only_on='elsewhere')
    (tmp_path / 'model.fake').mkdir()
    (tmp_path / 'model.fake' / 'old').write_text('')
    report = export_to(tiny(), 'ncnn', tmp_path / 'model.fake', 16)
    assert report.note == 'converted only: Fake runs on elsewhere only'
    assert [file.relative_to(tmp_path) for file in tmp_path.rglob('*')] == list(
        map(pathlib.Path, ('model.fake', 'model.fake/new')))


@pytest.mark.parametrize('kwargs, message', [
    (dict(to='tensorrt'), "one of onnx, .*, got 'tensorrt'"),
    (dict(image_size=0), r'got \(0, 0\)'),
    (dict(image_size=(16, 2.5)), r'got \(16, 2.5\)'),
    (dict(image_size=16.), r'an integer or \(height, width\), got 16.0'),
    (dict(image_size=(16,)), r'an integer or \(height, width\), got \(16,\)'),
    (dict(path='model.onnx'), r"files of TorchScript end in .pt, got 'model.onnx'"),
    (dict(path='absent/model.pt'), 'there is no folder absent'),
    (dict(to='aoti', path='model.pt2', open_sizes=True), 'one size: .* onnx, openvino, torchscript take others'),
])
def test_bad_arguments(kwargs, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        export_to(tiny(), **{**dict(to='torchscript', path='model.pt', image_size=16), **kwargs})


@pytest.mark.parametrize('model, message', [
    (lambda: tiny().train(), r'the model itself is in training mode: call model.eval\(\)'),
    (lambda: tiny().double(), r'in torch.float64 on cpu: call model.float\(\).cpu\(\)'),
    (lambda: torch.nn.Conv2d(3, 4, 1).eval(), 'no SAN attention in this Conv2d'),
])
def test_models_that_do_not_fit(model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_to(model(), 'torchscript', tmp_path / 'model.pt', 16)


@pytest.mark.parametrize('to', [to for to, target in TARGETS.items() if target.packages])
def test_missing_packages_are_named(to, monkeypatch, tmp_path):
    package = TARGETS[to].packages[-1]
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == package else found('torch'))
    with pytest.raises(ImportError, match=rf"'{package}', which is not .*pip install 'san-backbones\[{to}\]'"):
        export_to(tiny(), to, tmp_path / f'model{TARGETS[to].suffix}')


def test_torch_that_cannot_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, '__version__', '2.7.1')
    with pytest.raises(ImportError, match=r'export_to aoti needs torch 2\.8 or later'):
        export_to(tiny(), 'aoti', tmp_path / 'model.pt2')


def test_grey_pictures(fake, tmp_path):
    fake()
    model = settle(SAN('patchwise', depths=(0, 1), widths=(32, 64), kernel_sizes=(3, 5), stem_width=16, in_chans=1))
    assert export_to(model, 'ncnn', tmp_path / 'model.fake', 16).difference == 0
    assert read(tmp_path / 'model.fake')['shape'] == (1, 1, 16, 16)
