"""weights/convert.py: the authors' files and own checkpoints become what timm reads; everything else is an error."""
import argparse
import contextlib
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from san_backbones import _pickles, hub
from san_backbones.weights import common, convert
from tests import ROOT, environment, oracle
from tests.weights.small_models import SPECS

FILES = {'README.md', 'config.json', 'model.safetensors'}
SMALL = dict(depths=(1, 2, 1, 1, 1), widths=(32, 32, 64, 64, 96), stem_width=16, kernel_sizes=(3, 5, 5, 3, 3))


def run(*argv):
    return convert.main([str(argument) for argument in argv])


def error_of(capsys, *argv, code=1):
    assert run(*argv) == code
    message = capsys.readouterr().err
    assert message.startswith('error: ') and 'Traceback' not in message
    return message


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def digest_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def words_of(options):
    return [word for key, value in options.items() for word in ('--arch-option', f'{key}={value}')]


def card_of(folder):
    """The card's YAML block, and its text."""
    _, head, text = (folder / 'README.md').read_text().split('---\n', 2)
    return yaml.safe_load(head), text


# --- The manifest ----------------------------------------------------------------------------------------------------

def test_no_pickle_is_read_where_torch_may_run_it(tmp_path, monkeypatch):
    torch.save({'a': torch.ones(2)}, tmp_path / 'a.pth')
    save_file({'a': torch.ones(2)}, tmp_path / 'a.safetensors')
    monkeypatch.setattr(torch, '__version__', '2.5.1+cu124')
    with pytest.raises(convert.WeightsError, match=r'a\.pth needs torch 2\.6 or later, because .* found torch 2\.5\.1'):
        convert.read(tmp_path / 'a.pth')
    assert list(convert.read(tmp_path / 'a.safetensors')) == ['a']


def test_what_an_older_timm_cannot_write(tmp_path, monkeypatch):
    monkeypatch.setattr(timm, '__version__', '1.0.30')
    with pytest.raises(hub.WeightsError, match=r'weights convert needs timm 1\.0\.31 or later, found timm 1\.0\.30'):
        convert.config_json(timm.create_model('test_san_patchwise'), {})


def test_what_torch_load_may_read_elsewhere_stays_as_it_was(tmp_path):
    entry = _pickles.entries(_pickles.SCRIPTS)[0]
    was = torch.serialization.get_safe_globals()
    torch.save({'weight': torch.ones(1)}, tmp_path / 'file.pth')
    try:
        for allowed in (was, [*was, entry]):
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(allowed)
            convert.read(tmp_path / 'file.pth')
            assert set(torch.serialization.get_safe_globals()) == set(allowed)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(was)


def test_manifest_has_the_six_models():
    models = common.read_manifest(common.MANIFEST)
    released = {name: entry for name, entry in models.items() if 'drive_id' in entry}
    assert list(released) == [f'{name}.in1k' for name in oracle.MODELS]
    assert len({entry['drive_id'] for entry in released.values()}) == 6
    readme = (ROOT / 'README.md').read_text()
    for name, entry in released.items():
        assert name == f"{entry['architecture']}.{entry['tag']}"
        assert re.fullmatch(r'[\w-]{33}', entry['drive_id'])
        assert entry['parameters'] == oracle.parameter_count(entry['architecture'])
        line = next(line for line in readme.splitlines() if line.startswith(f"| `{entry['architecture']}`"))
        assert line.endswith(f"| {entry['paper_top1']:.1f} / {entry['paper_top5']:.1f} |")
        assert entry['license'] == 'mit' and entry['source_file'] == 'model_best.pth'
        for key in ('source_sha256', 'sha256'):
            assert entry[key] is None or re.fullmatch(r'[0-9a-f]{64}', entry[key])


# --- The authors' files ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', SPECS)
def test_the_authors_file(name, manifest, tmp_path, capsys):
    spec = SPECS[name]
    state = oracle.random_state(spec, seed=1)
    source, out = tmp_path / 'model_best.pth', tmp_path / f'{name}.in1k'
    torch.save(oracle.released_checkpoint(state), source)
    assert run(source, '--model', name, '--out', out, '--manifest', manifest, '--repository', 'org/weights') == 0
    assert set(content(out)) == FILES

    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = oracle.network(image.double(), state, **spec.structure())
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    features = timm.create_model(f'local-dir:{out}', pretrained=True, features_only=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(image).double(), expected['logits'], rtol=1e-4, atol=1e-4)
        for found, right in zip(features(image), expected['features']):
            torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4)

    config = json.loads((out / 'config.json').read_text())
    assert config['architecture'] == name and config['num_classes'] == 1000 and config['num_features'] == 128
    assert config['model_args']['relu_bound'] == 0
    assert config['global_pool'] == 'avg' and not {'file', 'url', 'hf_hub_id', 'source'} & set(config['pretrained_cfg'])
    with safe_open(out / 'model.safetensors', 'pt') as file:
        assert file.metadata() == {'format': 'pt'} and set(file.keys()) == set(model.state_dict())

    head, text = card_of(out)
    assert head['license'] == 'mit' and head['library_name'] == 'timm' and head['datasets'] == ['imagenet-1k']
    for part in (f'drive-id-of-{name}', 'https://github.com/hszhao/SAN', digest_of(source),
                 "timm.create_model('hf-hub:org/weights', pretrained=True", f'| **`{name}`** |', '**74.9**',
                 'has not been measured', 'features_only=True'):
        assert part in text, part
    digest = digest_of(out / 'model.safetensors')
    assert digest in text and digest in capsys.readouterr().out


def test_one_of_the_released_models_with_the_manifest_of_the_repository(released, tmp_path):
    source = released('san10_patchwise')
    out = tmp_path / 'san10_patchwise.in1k'
    if common.read_manifest(common.MANIFEST)[out.name]['source_sha256']:
        pytest.skip('the manifest pins the true file')
    for name in ('san10_patchwise', 'san10.in1k'):  # the same under each
        assert run(source, '--model', name, '--out', out) == 0
    model = timm.create_model(f'local-dir:{out}', pretrained=True)
    released_state = torch.load(source, weights_only=True)['state_dict']
    assert torch.equal(model.stages[3].blocks[2].attn.weight_mlp.fc2.weight,
                       released_state['module.layer3.2.sam.conv_w.5.weight'])
    cfg = json.loads((out / 'config.json').read_text())['pretrained_cfg']
    assert cfg['tag'] == 'in1k' and cfg['license'] == 'mit' and cfg['origin_url'] == 'https://github.com/hszhao/SAN'
    assert cfg['crop_pct'] == 0.875 and cfg['interpolation'] == 'bilinear' and cfg['input_size'] == [3, 224, 224]
    head, text = card_of(out)
    assert 'hf-hub:san-backbones/san10_patchwise.in1k' in text and text.count('| `san') == 5
    assert "init_cfg=dict(type='Pretrained', checkpoint='hf-hub:san-backbones/san10_patchwise.in1k')" in text


def test_same_tensors_same_bytes(released, manifest, tmp_path):
    source = released('test_san_pairwise')
    state = torch.load(source, weights_only=True)['state_dict']

    def scattered(tensor):
        wide = torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)
        return wide[..., 0]

    bare = {name[len('module.'):]: tensor for name, tensor in state.items()}
    variants = {
        'backwards': {'state_dict': dict(reversed(state.items()))},
        'bare': bare,
        'scattered': {'state_dict': {name: scattered(tensor) for name, tensor in state.items()}},
        'double': {'state_dict': {name: tensor.double() if tensor.is_floating_point() else tensor
                                  for name, tensor in state.items()}},
    }
    paths = [source]
    for name, variant in variants.items():
        paths.append(tmp_path / f'{name}.pth')
        torch.save(variant, paths[-1])
    paths.append(tmp_path / 'old-format.pth')
    torch.save({'state_dict': state}, paths[-1], _use_new_zipfile_serialization=False)
    paths.append(tmp_path / 'flat.safetensors')
    save_file(bare, paths[-1])
    digests = set()
    for path in paths:
        out = tmp_path / f'{path.name}-out'
        assert run(path, '--model', 'test_san_pairwise', '--out', out, '--manifest', manifest) == 0
        digests.add((out / 'model.safetensors').read_bytes())
    assert len(digests) == 1


def test_what_trainers_save_beside_the_tensors_is_read(released, manifest, tmp_path):
    source = released('test_san_patchwise')
    checkpoint = torch.load(source, weights_only=True)
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint.update(optimizer=optimizer.state_dict(), top1=np.float64(77.1), n=np.int64(3), best=np.float32(1),
                      scheduler=torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60]).state_dict())
    torch.save(checkpoint, source)
    text = pickle.dumps(np.float64(1), protocol=2)
    assert b'numpy' in text
    assert run(source, '--model', 'test_san_patchwise', '--out', tmp_path / 'out', '--manifest', manifest) == 0


def test_pinned_digests(released, manifest, tmp_path, capsys):
    name = 'test_san_patchwise'
    source = released(name)
    options = ('--model', name, '--manifest', manifest)
    assert run(source, *options, '--out', tmp_path / 'a') == 0
    pins = {'source_sha256': digest_of(source), 'sha256': digest_of(tmp_path / 'a' / 'model.safetensors')}
    common.record(manifest, f'{name}.in1k', **pins)
    assert run(source, *options, '--out', tmp_path / 'b') == 0
    assert content(tmp_path / 'a') == content(tmp_path / 'b')

    message = error_of(capsys, released(name, seed=1), *options, '--out', tmp_path / 'c')
    assert pins['source_sha256'] in message and f'drive-id-of-{name}' in message and '--tag' in message
    assert run(released(name, seed=1), *options, '--out', tmp_path / 'c', '--tag', 'mine') == 0
    assert 'drive-id' not in (tmp_path / 'c' / 'README.md').read_text()

    common.record(manifest, f'{name}.in1k', sha256='0' * 64)
    assert '0' * 64 in error_of(capsys, source, *options, '--out', tmp_path / 'd')
    assert not (tmp_path / 'd').exists()


def test_measured_accuracy_is_in_the_card(released, manifest, tmp_path):
    name, source = 'test_san_patchwise', released('test_san_patchwise')
    options = (source, '--model', name, '--out', tmp_path / 'out', '--manifest', manifest, '--force')
    run(*options)
    sha256 = digest_of(tmp_path / 'out' / 'model.safetensors')
    for digest, said in ((sha256, 'top-1 74.93, top-5 92.04'), ('0' * 64, 'has not been measured')):
        measured = {'top1': 74.931, 'top5': 92.04, 'images': 50000, 'sha256': digest}
        common.record(manifest, f'{name}.in1k', measured=measured)
        run(*options)
        assert said in (tmp_path / 'out' / 'README.md').read_text()


# --- Checkpoints that do not fit -------------------------------------------------------------------------------------

def test_another_architecture_is_named(released, manifest, tmp_path, capsys):
    source = released('test_san_pairwise')
    message = error_of(capsys, source, '--model', 'test_san_patchwise', '--out', tmp_path / 'out',
                       '--manifest', manifest)
    assert '--model test_san_pairwise' in message and 'attn.position' in message
    assert 'missing' not in message.split('.')[0] and 'unexpected: ' in message and 'of another shape: ' in message
    assert not (tmp_path / 'out').exists()


def test_all_that_is_wrong_is_in_one_message(released, manifest, tmp_path, capsys):
    source = released('test_san_patchwise')
    checkpoint = torch.load(source, weights_only=True)
    state = checkpoint['state_dict']
    del state['module.conv_in.weight'], state['module.fc.bias']
    state['module.bn_in.weight'] = torch.ones(17)
    state['module.bn_in.bias'] = torch.ones(16, dtype=torch.int64)
    state['module.extra.weight'] = torch.ones(1)
    torch.save(checkpoint, source)
    message = error_of(capsys, source, '--model', 'test_san_patchwise', '--out', tmp_path / 'out', '--tag', 'mine')
    for part in ('2 missing: stem.conv.weight, head.fc.bias', '1 unexpected: extra.weight',
                 'stem.norm.weight [17] instead of [16]', 'stem.norm.bias torch.int64 instead of torch.float32',
                 '2 of another shape', '--arch-option', str(source)):
        assert part in message, message


def test_classes_that_are_not_imagenets_need_a_tag(released, manifest, tmp_path, capsys):
    source = released('test_san_patchwise', num_classes=10)
    options = (source, '--model', 'test_san_patchwise', '--out', tmp_path / 'out', '--manifest', manifest)
    message = error_of(capsys, *options)
    assert 'head.fc.weight [10, 128] instead of [1000, 128]' in message and '--tag' in message
    assert run(*options, '--tag', 'ten') == 0


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e300])
def test_values_must_be_finite(value, released, manifest, tmp_path, capsys):
    bias = torch.zeros(1000, dtype=torch.float64)
    bias[3] = value
    source = released('test_san_patchwise', **{'fc.bias': bias})
    message = error_of(capsys, source, '--model', 'test_san_patchwise', '--out', tmp_path / 'out',
                       '--manifest', manifest)
    assert '1 values in head.fc.bias' in message and not (tmp_path / 'out').exists()


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f'touch {self.target}',)


@pytest.mark.parametrize('form', ['zip', 'old', 'nested', 2, 3, 4, 5])
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_nothing_of_a_pickle_is_run(form, released, manifest, tmp_path, capsys):
    source, target = tmp_path / 'model_best.pth', tmp_path / 'was-run'
    payload = {'state_dict': {}, 'epoch': Malicious(target)}
    if isinstance(form, int):
        source.write_bytes(pickle.dumps(payload, protocol=form))
    elif form == 'nested':
        checkpoint = torch.load(released('test_san_patchwise'), weights_only=True)
        torch.save({**checkpoint, 'args': argparse.Namespace(hook=Malicious(target))}, source)
    else:
        torch.save(payload, source, _use_new_zipfile_serialization=form == 'zip')
    message = error_of(capsys, source, '--model', 'test_san_patchwise', '--out', tmp_path / 'out',
                       '--manifest', manifest)
    assert re.search(r'(posix|nt|os)\.system', message) or form in (4, 5) and 'cannot be read' in message
    assert 'weights_only' not in message
    assert not target.exists() and not (tmp_path / 'out').exists()


def test_damaged_files(released, manifest, tmp_path, capsys):
    source = released('test_san_patchwise')
    whole = source.read_bytes()
    old, flat = tmp_path / 'old.pth', tmp_path / 'flat.safetensors'
    state = torch.load(source, weights_only=True)['state_dict']
    torch.save({'state_dict': state}, old, _use_new_zipfile_serialization=False)
    save_file(state, flat)
    damaged = tmp_path / 'damaged.pth'
    cases = [(damaged, whole[:size]) for size in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    cases += [(damaged, old.read_bytes()[:size]) for size in (100, old.stat().st_size // 2, old.stat().st_size - 100)]
    cases += [(flat, flat.read_bytes()[:size]) for size in (4, 100, flat.stat().st_size - 1)]
    cases += [(damaged, b'<!DOCTYPE html><html>quota exceeded</html>')]
    for path, data in cases:
        path.write_bytes(data)
        message = error_of(capsys, path, '--model', 'test_san_patchwise', '--out', tmp_path / 'out',
                           '--manifest', manifest)
        assert f'{path} ({len(data)} bytes)' in message and 'get it again' in message
    assert 'looks like a web page' in message
    for value in ([1, 2], {1: torch.ones(1)}, {'state_dict': {}}, {'epoch': 3}):
        torch.save(value, damaged)
        assert 'expected a dict of tensors' in error_of(
            capsys, damaged, '--model', 'test_san_patchwise', '--out', tmp_path / 'out', '--manifest', manifest)
    assert 'is no file' in error_of(capsys, tmp_path / 'none.pth', '--model', 'test_san_patchwise', '--out',
                                    tmp_path / 'out', '--manifest', manifest)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('kind', ['sparse_coo', 'sparse_csr', 'meta', 'qint8'])
@pytest.mark.filterwarnings('ignore')  # that such tensors are new or old
def test_tensors_that_are_no_plain_ones(kind, released, manifest, tmp_path, capsys):
    weight = torch.ones(1000, 32)
    odd = {'sparse_coo': weight.to_sparse, 'sparse_csr': weight.to_sparse_csr, 'meta': lambda: weight.to('meta'),
           'qint8': lambda: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)}[kind]()
    source = released('test_san_patchwise')
    checkpoint = torch.load(source, weights_only=True)
    checkpoint['state_dict']['module.fc.weight'] = odd
    torch.save(checkpoint, source)
    message = error_of(capsys, source, '--model', 'test_san_patchwise', '--out', tmp_path / 'out', '--manifest',
                       manifest)
    assert 'head.fc.weight' in message and {'qint8': 'quantised'}.get(kind, kind) in message
    assert not (tmp_path / 'out').exists()


def test_wrong_arguments(released, manifest, tmp_path, capsys):
    source = released('test_san_patchwise')
    assert 'san19_pairwise' in error_of(capsys, source, '--model', 'resnet50', '--out', tmp_path / 'out', code=2)
    assert 'cannot be read' in error_of(capsys, source, '--model', 'san10', '--out', tmp_path / 'out', '--manifest',
                                        tmp_path / 'none.json')
    (tmp_path / 'file').touch()
    options = (source, '--model', 'test_san_patchwise', '--manifest', manifest)
    assert 'is a file' in error_of(capsys, *options, '--out', tmp_path / 'file')
    assert 'cannot write' in error_of(capsys, *options, '--out', tmp_path / 'file' / 'below')
    out = ('--out', tmp_path / 'out')
    assert 'kernel_sizes' in error_of(capsys, *options, *out, '--arch-option', 'kernel=3')
    assert 'cannot be built' in error_of(capsys, *options, *out, '--arch-option', 'kernel_sizes=(3,3)')
    assert 'crop_pct' in error_of(capsys, *options, *out, '--data-option', 'size=3')
    assert 'do not fit' in error_of(capsys, *options, *out, '--data-option', 'mean=(0.5,0.5)')
    assert 'do not fit' in error_of(capsys, *options, *out, '--data-option', 'input_size=(1,64,64)')
    assert 'Markdown' in error_of(capsys, *options, *out, '--card-text', tmp_path / 'none.md')
    with pytest.raises(SystemExit):
        run(*options, *out, '--arch-option', 'kernel_sizes')
    assert not (tmp_path / 'out').exists()


# --- Writing ---------------------------------------------------------------------------------------------------------

def test_other_content_is_not_overwritten(released, manifest, tmp_path, capsys):
    out = tmp_path / 'out'
    options = ('--model', 'test_san_patchwise', '--out', out, '--manifest', manifest)
    assert run(released('test_san_patchwise'), *options) == 0
    (out / 'notes.txt').write_text('mine')
    before, times = content(out), {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(released('test_san_patchwise'), *options) == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    other = released('test_san_patchwise', seed=1)
    message = error_of(capsys, other, *options)
    assert 'README.md and model.safetensors' in message and '--force' in message and content(out) == before
    assert run(other, *options, '--force') == 0
    after = content(out)
    assert after['notes.txt'] == b'mine' and after['model.safetensors'] != before['model.safetensors']


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
def test_side_by_side_into_one_folder(tmp_path):
    """All files are of one of them, and nobody meets half a file."""
    sets = [{name: bytes([i]) * 300_000 for name in ('README.md', 'config.json', 'model.safetensors')} for i in (1, 2)]
    running = set()
    for i in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for _ in range(30):
                    common.replace_files(tmp_path, sets[i % 2])
                status = 0
            finally:
                os._exit(status)
        running.add(child)
    while running:
        for path in tmp_path.glob('[!.]*'):
            with contextlib.suppress(FileNotFoundError):
                assert path.read_bytes() in [files[path.name] for files in sets]
        for child in [*running]:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                running.remove(child)
                assert status == 0
    assert content(tmp_path) in sets


def test_who_comes_second_waits(tmp_path, monkeypatch):
    sets = [{name: bytes([i]) for name in ('README.md', 'model.safetensors')} for i in (1, 2)]
    real, first_writes, first_may_end = os.replace, threading.Event(), threading.Event()

    def replace(*paths):
        first_writes.set()
        assert first_may_end.wait(60)
        real(*paths)

    monkeypatch.setattr(os, 'replace', replace)
    first, second = (threading.Thread(target=common.replace_files, args=(tmp_path, files)) for files in sets)
    first.start()
    assert first_writes.wait(60)
    second.start()
    second.join(0.5)
    assert (tmp_path / '.README.md.tmp').read_bytes() == sets[0]['README.md']
    first_may_end.set()
    first.join()
    second.join()
    assert content(tmp_path) == sets[1]


@contextlib.contextmanager
def interruption(monkeypatch, after):
    """Interrupts the replacing of files after so many."""
    real, calls = os.replace, []

    def replace(*paths):
        calls.append(paths)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        real(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', replace)
        yield


@pytest.mark.parametrize('interrupted_at', [0, 1, 2])
def test_interrupted_while_writing_over_others(interrupted_at, tmp_path, monkeypatch):
    """The weights lie beside what belongs to them or not at all."""
    sets = [{name: bytes([i]) for name in ('README.md', 'config.json', 'model.safetensors')} for i in (1, 2)]
    common.replace_files(tmp_path, sets[0])
    with interruption(monkeypatch, interrupted_at):
        with pytest.raises(KeyboardInterrupt):
            common.replace_files(tmp_path, sets[1])
    assert content(tmp_path) in sets or 'model.safetensors' not in content(tmp_path)
    common.replace_files(tmp_path, sets[1])
    assert content(tmp_path) == sets[1]


@pytest.mark.parametrize('interrupted_at', [0, 1, 2])
def test_interrupted_while_writing(interrupted_at, released, manifest, tmp_path, monkeypatch):
    source, out = released('test_san_patchwise'), tmp_path / 'out'
    options = (source, '--model', 'test_san_patchwise', '--out', out, '--manifest', manifest)
    with interruption(monkeypatch, interrupted_at):
        assert run(*options) == 130
    assert len(content(out)) == interrupted_at and 'model.safetensors' not in content(out)
    assert run(*options) == 0
    assert set(content(out)) == FILES


# --- Weights of one's own --------------------------------------------------------------------------------------------

def own(architecture='test_san_patchwise', **kwargs):
    """A model with weights and statistics of its own."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, **kwargs)
    model.train()(torch.randn(4, kwargs.get('in_chans', 3), 64, 64))
    return model.eval()


@pytest.mark.parametrize('form', ['timm', 'safetensors', 'compiled', 'parallel'])
def test_a_training_with_timm(form, tmp_path, capsys):
    model = own(num_classes=7, in_chans=1)
    state = model.state_dict()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    prefix = {'compiled': '_orig_mod.', 'parallel': 'module._orig_mod.'}.get(form, '')
    source, out, text = tmp_path / 'model_best.pth.tar', tmp_path / 'out', tmp_path / 'card.md'
    if form == 'safetensors':
        source = tmp_path / 'model.safetensors'
        save_file(state, source)
    else:
        torch.save({'epoch': 3, 'arch': 'test_san_patchwise', 'version': 2, 'args': argparse.Namespace(lr=0.1),
                    'optimizer': {'state': {0: {'momentum_buffer': torch.ones(1)}}, 'param_groups': [{'lr': 0.1}]},
                    'state_dict': zeros, 'metric': 71.2,
                    'state_dict_ema': {prefix + name: tensor for name, tensor in state.items()}}, source)
    text.write_text('Trained on the seven seas.\n')
    assert run(source, '--model', 'test_san_patchwise', '--out', out, '--tag', 'seas', '--license', 'cc-by-4.0',
               '--card-text', text, '--repository', 'me/seas', '--data-option', 'input_size=1,96,96', '--data-option',
               'mean=0.5', '--data-option', 'std=0.25', '--data-option', 'crop_pct=0.9') == 0
    image = torch.randn(2, 1, 64, 64)
    loaded = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))
    config = json.loads((out / 'config.json').read_text())
    assert config['num_classes'] == 7 and config['model_args']['in_chans'] == 1
    assert 'num_classes' not in config['model_args']  # transformers' TimmWrapper would pass it twice
    cfg = config['pretrained_cfg']
    assert cfg['tag'] == 'seas' and cfg['license'] == 'cc-by-4.0' and 'origin_url' not in cfg
    assert cfg['input_size'] == [1, 96, 96] and cfg['mean'] == [0.5] and cfg['std'] == [0.25] and cfg['crop_pct'] == 0.9
    other = timm.create_model(f'local-dir:{out}', pretrained=True, num_classes=3, in_chans=3)
    assert torch.equal(other.stages[4].conv.weight, model.stages[4].conv.weight) and other.num_classes == 3
    head, card = card_of(out)
    assert head['license'] == 'cc-by-4.0' and 'datasets' not in head and 'Trained on the seven seas.' in card
    assert 'hszhao' not in card and 'hf-hub:me/seas' in card and '# test_san_patchwise.seas' in card


@pytest.mark.parametrize('architecture, options', [
    ('test_san_pairwise', dict(kernel_sizes=5, relation='dot', position='absolute', position_ref_size=224)),
    ('test_san_patchwise', dict(relation='star', output_stride=16, share_planes=4)),
    ('san15_patchwise', SMALL),
    ('san10_pairwise', dict(SMALL, depths=(1, 1, 1, 1), widths=(32, 32, 64, 64), kernel_sizes=3)),
])
def test_structure_is_kept_in_the_config(architecture, options, tmp_path, capsys):
    model = own(architecture, num_classes=5, **options)
    source, out = tmp_path / 'last.pth', tmp_path / 'out'
    torch.save(model.state_dict(), source)
    assert run(source, '--model', architecture, '--out', out, *words_of(options)) == 0
    assert 'states no licence' in capsys.readouterr().out
    saved = json.loads((out / 'config.json').read_text())
    for key, value in options.items():
        assert saved['model_args'][key] == (list(value) if isinstance(value, tuple) else value)
    assert 'tag' not in saved['pretrained_cfg'] and 'license' not in saved['pretrained_cfg']
    loaded = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    image = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))
    features = timm.create_model(f'local-dir:{out}', pretrained=True, features_only=True, out_indices=(1, 2))
    assert features.feature_info.channels() == [stage.conv.out_channels for stage in model.stages[1:3]]
    card = (out / 'README.md').read_text()
    assert f'out_indices={tuple(range(1, len(model.stages)))}' in card
    assert ('SANBackbone' in card) == architecture.startswith('san1')


def test_a_backbone_of_openmmlab(tmp_path, capsys):
    pytest.importorskip('mmdet', reason='needs the mm extra')
    from mmengine.config import Config
    from mmengine.logging import HistoryBuffer
    from san_backbones.mm import SANBackbone
    torch.manual_seed(0)
    backbone = SANBackbone(dict(attention='pairwise', **SMALL), output_stride=16)
    backbone.train()(torch.randn(2, 3, 64, 64))
    state = {f'backbone.{name}': tensor for name, tensor in backbone.state_dict().items()}
    state.update({'neck.lateral_convs.0.bn1.weight': torch.ones(3), 'roi_head.fc.bias': torch.ones(2)})
    source, out = tmp_path / 'epoch_1.pth', tmp_path / 'out'
    buffer = HistoryBuffer([1., 2.], [1, 1])
    torch.save({'meta': {'epoch': 1, 'cfg': 'model = dict()'}, 'state_dict': state, 'optimizer': {},
                'message_hub': {'log_scalars': {'train/loss': buffer}, 'runtime_info': {'score': np.float64(1)}}},
               source)
    assert run(source, '--model', 'san15_pairwise', '--out', out, *words_of(dict(SMALL, output_stride=16)),
               '--tag', 'coco', '--repository', 'me/b') == 0
    said = capsys.readouterr().out
    assert 'left out 2 others' in said and 'position_ref_size=224' in said
    saved = json.loads((out / 'config.json').read_text())
    assert saved['num_classes'] == 0 and saved['model_args']['position_ref_size'] == 224

    image = torch.randn(1, 3, 64, 96)
    features = timm.create_model(f'local-dir:{out}', pretrained=True, features_only=True, out_indices=(1, 2, 3, 4))
    with torch.no_grad():
        expected = backbone.eval()(image)
        for found, right in zip(features.eval()(image), expected):
            assert torch.equal(found, right)
    # the card's config rebuilds it
    card = (out / 'README.md').read_text()
    snippet = card[card.index('custom_imports'):].partition('```')[0]
    snippet = snippet.replace('hf-hub:me/b', str(out / 'model.safetensors'))
    config = Config.fromstring(snippet, '.py').model.backbone
    config.pop('_delete_')
    assert config.pop('type') == 'SANBackbone'
    rebuilt = SANBackbone(**config)
    rebuilt.init_weights()
    with torch.no_grad():
        for found, right in zip(rebuilt.eval()(image), expected):
            assert torch.equal(found, right)


@pytest.mark.parametrize('option', ['crop_pct=abc', 'interpolation=foo'])
def test_data_options_that_cannot_prepare_a_picture(option, tmp_path, capsys):
    source = tmp_path / 'last.pth'
    torch.save(own().state_dict(), source)
    assert 'do not fit the model' in error_of(capsys, source, '--model', 'test_san_patchwise', '--out',
                                              tmp_path / 'out', '--data-option', option)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('architecture, data, said', [
    ('san10_pairwise', ('--data-option', 'input_size=3,96,96'), True),  # SANBackbone would take 224
    ('san10_pairwise', (), False),  # its own value
    ('san10_patchwise', ('--data-option', 'input_size=3,96,96'), False),  # no positions
])
def test_the_side_in_training_is_in_the_card(architecture, data, said, tmp_path):
    source, out = tmp_path / 'last.pth', tmp_path / 'out'
    torch.save(own(architecture, **SMALL).state_dict(), source)
    assert run(source, '--model', architecture, '--out', out, *words_of(SMALL), *data) == 0
    card = (out / 'README.md').read_text()
    assert ('        position_ref_size=96,\n' in card) == said and ('position_ref_size' in card) == said


def test_what_was_converted_converts_again(released, manifest, tmp_path):
    options = ('--model', 'test_san_patchwise', '--manifest', manifest)
    assert run(released('test_san_patchwise'), *options, '--out', tmp_path / 'a') == 0
    assert run(tmp_path / 'a' / 'model.safetensors', *options, '--out', tmp_path / 'b', '--tag', 'copy') == 0
    first, second = (load_file(tmp_path / name / 'model.safetensors') for name in 'ab')
    assert all(torch.equal(first[name], second[name]) for name in first) and first.keys() == second.keys()
    assert (tmp_path / 'a' / 'model.safetensors').read_bytes() == (tmp_path / 'b' / 'model.safetensors').read_bytes()


def test_as_a_script(released, manifest, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / 'weights/convert.py', released('test_san_patchwise'), '--model', 'test_san_patchwise',
         '--out', tmp_path / 'out', '--manifest', manifest], cwd=tmp_path, capture_output=True, text=True,
        env=environment())
    assert done.returncode == 0, done.stderr
    assert set(content(tmp_path / 'out')) == FILES and 'SHA-256 of model.safetensors' in done.stdout


def test_half_precision(tmp_path, capsys):
    """Matrices are rounded, norms are not; the model is the same but for that."""
    torch.manual_seed(0)
    model = timm.create_model('test_san_patchwise', num_classes=4).eval()
    torch.save(model.state_dict(), tmp_path / 'mine.pth')
    common = (tmp_path / 'mine.pth', '--model', 'test_san_patchwise', '--tag', 'mine')
    assert run(*common, '--out', tmp_path / 'half', '--half') == run(*common, '--out', tmp_path / 'whole') == 0
    half, whole = (load_file(tmp_path / name / 'model.safetensors') for name in ('half', 'whole'))
    for name, tensor in whole.items():
        assert half[name].dtype == (torch.float16 if tensor.dim() > 1 else tensor.dtype)
        assert torch.equal(half[name], tensor.to(half[name].dtype))
    again = timm.create_model(f'local-dir:{tmp_path / "half"}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=.02, atol=.02)
    state = model.state_dict()
    state['head.fc.weight'][0, 0] = 1e6
    torch.save(state, tmp_path / 'mine.pth')
    assert run(*common, '--out', tmp_path / 'large', '--half') == 1
    assert 'values in head.fc.weight that are too large for half precision' in capsys.readouterr().err


def test_the_authors_weights_stay_whole(tmp_path, capsys, manifest):
    source = tmp_path / 'model_best.pth'
    name = next(iter(SPECS))
    torch.save(oracle.released_checkpoint(oracle.random_state(SPECS[name], seed=1)), source)
    assert run(source, '--model', name, '--out', tmp_path / 'out', '--manifest', manifest, '--half') == 1
    assert '--half is not for' in capsys.readouterr().err
