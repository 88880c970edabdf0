"""Pretrained weights: local folders, shipped weights, and the Hub, by the real client and a server on this machine."""
import builtins
import errno
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save, save_file

import san_backbones
from san_backbones import hub
from san_backbones._requirements import LEAST_FOR_CONVERSION, older
from san_backbones.hub import WeightsError
from tests import ROOT
from tests.hub_server import HubServer

REPOSITORY = 'someone/weights'


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub with one repository that holds a small file, and a client of this process that talks to it."""
    for name in (hub.FOLDER_VARIABLE, hub.ORGANISATION_VARIABLE, hub.AUTHORS_VARIABLE, 'HF_TOKEN'):
        monkeypatch.delenv(name, raising=False)
    with HubServer() as server:
        server.add_repo(REPOSITORY)
        server.put(REPOSITORY, hub.FILENAME, _content())
        _point_at(monkeypatch, server.endpoint)
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_TELEMETRY', True)
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')
        yield server


def _point_at(monkeypatch, endpoint):
    """HF_ENDPOINT for a client that has read it already."""
    monkeypatch.setattr(constants, 'ENDPOINT', endpoint)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', endpoint + '/{repo_id}/resolve/{revision}/{filename}')


def _content(value=1., size=10):
    return save({'weight': torch.full((size,), value)})


def _small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_san_patchwise.shapes', **kwargs)


def _run(code, *arguments, **environment):
    """Python code in a process of its own, with what it printed last as JSON."""
    done = subprocess.run([sys.executable, '-c', code, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, **environment, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# --- Where weights are looked for ------------------------------------------------------------------------------------

@pytest.mark.parametrize('form', ['{}/model.safetensors', '{}.safetensors'])
def test_a_named_folder_comes_first(monkeypatch, tmp_path, form):
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(tmp_path))
    path = tmp_path / form.format('test_san_patchwise.shapes')
    path.parent.mkdir(exist_ok=True)
    state = {name: torch.full_like(tensor, 2) for name, tensor in _small().state_dict().items()}
    save_file(state, path)
    monkeypatch.setattr(hub, 'manifest', dict)  # whose digest is that of the shipped file
    model = timm.create_model('test_san_patchwise', pretrained=True)
    assert torch.equal(model.stem.conv.weight, state['stem.conv.weight'])
    assert 'file' not in model.pretrained_cfg and model.pretrained_cfg['hf_hub_id'].startswith('san-backbones/')


def test_a_named_folder_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(tmp_path / 'none'))
    with pytest.raises(WeightsError, match=f"{hub.FOLDER_VARIABLE} names '.*none', which is not a folder"):
        timm.create_model('san10', pretrained=True)


def test_san15_is_san15_patchwise(monkeypatch, tmp_path):
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(tmp_path))
    state = timm.create_model('san10_patchwise').state_dict()
    save_file(state, tmp_path / 'san10_patchwise.in1k.safetensors')
    for name in ('san10', 'san10.in1k', 'san10_patchwise', 'san10_patchwise.in1k'):
        model = timm.create_model(name, pretrained=True)
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert model.pretrained_cfg['hf_hub_id'] == 'san-backbones/san10_patchwise.in1k'
    assert timm.get_pretrained_cfg('san15').hf_hub_id == 'san-backbones/san15_patchwise.in1k'


@pytest.mark.parametrize('variable, organisation', [(None, 'san-backbones'), ('elsewhere', 'elsewhere')])
def test_the_organisation(server, monkeypatch, variable, organisation):
    if variable:
        monkeypatch.setenv(hub.ORGANISATION_VARIABLE, variable)
    server.add_repo(f'{organisation}/model.tag')
    server.put(f'{organisation}/model.tag', hub.FILENAME, _content(3.))
    assert load_file(hub.weights('san-backbones/model.tag'))['weight'][0] == 3


def test_revisions(server):
    first = server.put(REPOSITORY, hub.FILENAME, _content(5.))
    server.put(REPOSITORY, hub.FILENAME, _content(6.))
    assert load_file(hub.weights(REPOSITORY))['weight'][0] == 6
    assert load_file(hub.weights(f'{REPOSITORY}@{first}'))['weight'][0] == 5
    with pytest.raises(WeightsError, match="no revision 'v9'"):
        hub.weights(f'{REPOSITORY}@v9')


def test_a_revision_is_not_looked_for_locally(server, monkeypatch, tmp_path):
    server.add_repo('san-backbones/model.tag')
    commit = server.put('san-backbones/model.tag', hub.FILENAME, _content(3.))
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(tmp_path))
    (tmp_path / 'model.tag.safetensors').write_bytes(_content(4.))
    assert load_file(hub.weights('san-backbones/model.tag'))['weight'][0] == 4
    assert load_file(hub.weights(f'san-backbones/model.tag@{commit}'))['weight'][0] == 3


@pytest.mark.parametrize('source', ['', 'name', '/name', 'org/', 'a/b/c'])
def test_what_names_no_repository(source):
    with pytest.raises(WeightsError, match='expected ORGANISATION/NAME'):
        hub.weights(source)


# --- What can go wrong -----------------------------------------------------------------------------------------------

def _error(source=REPOSITORY):
    with pytest.raises(WeightsError) as caught:
        hub.weights(source)
    message = str(caught.value)
    ours = source.startswith(f'{hub.ORGANISATION}/')  # our commands, and the authors' files, know nothing of others
    for words in ('weights convert', hub.FOLDER_VARIABLE, hub.MIRROR_VARIABLE):
        assert (words in message) == ours
    assert 'HF_ENDPOINT' in message and (ours or 'safe_serialization=True' in message)
    assert source.partition('@')[0] in message and hub.FILENAME in message
    return message


def test_no_such_repository(server):
    message = _error('someone/else')
    assert 'not published yet' in message and server.endpoint in message


def test_no_such_file(server):
    server.add_repo('someone/empty')
    server.put('someone/empty', 'README.md', b'hello')
    assert 'has no file model.safetensors' in _error('someone/empty')


def test_gated_and_private(server, monkeypatch):
    server.add_repo('someone/gated', gated=True, token='right')
    server.put('someone/gated', hub.FILENAME, _content())
    assert 'gated' in _error('someone/gated')
    server.add_repo('someone/private', private=True, token='right')
    server.put('someone/private', hub.FILENAME, _content(7.))
    assert 'token' in _error('someone/private')
    monkeypatch.setenv('HF_TOKEN', 'wrong')
    assert 'token' in _error('someone/private')
    monkeypatch.setenv('HF_TOKEN', 'right')
    assert load_file(hub.weights('someone/private'))['weight'][0] == 7


@pytest.mark.parametrize('status, words', [(429, 'answered 429 .too many requests'), (500, 'answered 500')])
def test_a_server_in_trouble(server, status, words, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # between the client's own attempts
    server.fault('*/resolve/*', status=status, times=None)
    with pytest.raises(WeightsError, match=words):
        hub.weights(REPOSITORY)


def test_nobody_there(server, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    _point_at(monkeypatch, 'http://127.0.0.1:9')
    assert 'cannot be reached' in _error()


def test_offline(server, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert 'offline mode is on' in _error()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    path = hub.weights(REPOSITORY)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert hub.weights(REPOSITORY) == path


def test_an_interrupted_download_goes_on(server):
    content = _content(size=4_000_000)  # the client keeps what has come in steps of 10 MiB
    server.put(REPOSITORY, hub.FILENAME, content)
    server.fault(f'*/{hub.FILENAME}', method='GET', cut_after=(10 << 20) + 1000)
    try:
        path = hub.weights(REPOSITORY)
    except WeightsError as error:  # the client of version 1.0 goes on in the next call
        assert 'run again' in str(error) and huggingface_hub.__version__.startswith('1.0.')
        path = hub.weights(REPOSITORY)
    assert pathlib.Path(path).read_bytes() == content
    assert [request.range for request in server.seen(method='GET') if request.range] == [f'bytes={10 << 20}-']


def test_a_broken_download_leaves_nothing(server, monkeypatch, tmp_path):
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    content = _content(size=500_000)
    server.put(REPOSITORY, hub.FILENAME, content)
    server.fault(f'*/{hub.FILENAME}', method='GET', cut_after=300_000, times=None)
    assert 'run again' in _error()
    assert not [path for path in (tmp_path / 'cache').rglob('*') if path.is_file() and path.stat().st_size > 1000]
    server.clear()
    assert pathlib.Path(hub.weights(REPOSITORY)).read_bytes() == content


def test_a_wrong_digest(server, monkeypatch):
    server.add_repo('san-backbones/model.tag')
    server.put('san-backbones/model.tag', hub.FILENAME, _content(1.))
    monkeypatch.setattr(hub, 'manifest', lambda: {'model.tag': {'sha256': '0' * 64}})
    for _ in range(2):  # nor is it found in the cache
        message = _error('san-backbones/model.tag')
        assert 'SHA-256' in message and '0' * 64 in message
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(pathlib.Path(constants.HF_HUB_CACHE)))
    (pathlib.Path(constants.HF_HUB_CACHE) / 'model.tag.safetensors').write_bytes(_content(1.))
    assert 'SHA-256' in _error_of_folder('san-backbones/model.tag')


def _error_of_folder(source):
    with pytest.raises(WeightsError) as caught:
        hub.weights(source)
    return str(caught.value)


@pytest.mark.parametrize('content', [b'', b'<html>not here</html>', b'\x80\x04pickle', _content()[:-8]])
def test_no_safetensors_file(server, content):
    server.put(REPOSITORY, hub.FILENAME, content)
    assert 'is not a safetensors file' in _error()


def test_a_file_without_tensors(server):
    server.put(REPOSITORY, hub.FILENAME, save({}))
    assert 'holds no tensors' in _error()


@pytest.fixture
def cached(server, monkeypatch):
    """The content of a file of the manifest, and where it lies in the cache."""
    content = _content(2.)
    server.add_repo('san-backbones/model.tag')
    server.put('san-backbones/model.tag', hub.FILENAME, content)
    monkeypatch.setattr(hub, 'manifest', lambda: {'model.tag': {'sha256': hashlib.sha256(content).hexdigest()}})
    return content, pathlib.Path(hub.weights('san-backbones/model.tag'))


def test_what_was_damaged_in_the_cache_is_fetched_anew(cached):
    content, path = cached
    path.resolve().write_bytes(content[:-1] + b'?')
    assert 'SHA-256' in _error('san-backbones/model.tag')
    assert pathlib.Path(hub.weights('san-backbones/model.tag')).read_bytes() == content


def test_a_file_that_cannot_be_read_now_stays(cached, server, monkeypatch):
    content, path = cached

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    with monkeypatch.context() as patch:
        patch.setattr(hub, 'digest', fail)
        assert os.strerror(errno.EIO) in _error('san-backbones/model.tag')
    assert path.read_bytes() == content


def test_a_pickle_is_not_read(server):
    server.put(REPOSITORY, 'pytorch_model.bin', b'\x80\x04pickle')
    with pytest.raises(WeightsError, match='no other kind is read'):
        hub.weights(REPOSITORY, 'pytorch_model.bin')


@pytest.mark.parametrize('number, message', [
    (errno.ENOSPC, r'the disk with the cache \(.*elsewhere\) is full'),
    (errno.EDQUOT, r'the disk with the cache \(.*elsewhere\) is full'),
    (errno.EROFS, r'the cache \(.*elsewhere\) cannot be written to, and the file is not in it'),
    (errno.EACCES, r'the cache \(.*elsewhere\) cannot be written to')])
def test_a_disk_that_cannot_be_written_to(number, message, server, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', fail)
    with pytest.raises(WeightsError, match=message):
        hub.weights(REPOSITORY, cache_dir=tmp_path / 'elsewhere')


def test_a_full_disk_below_another_error(server, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError('it broke off') from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', fail)
    assert 'is full' in _error()


def test_what_create_model_passes_on(server, monkeypatch, tmp_path):
    """The cache's folder, the file's name, what an overlay says besides, whether weights must fit."""
    state = timm.create_model('test_san_patchwise').state_dict()
    server.add_repo('someone/small')
    server.put('someone/small', 'other.safetensors', save({**state, 'stem.conv.weight': state['stem.conv.weight'] + 1}))
    overlay = dict(hf_hub_id='someone/small', hf_hub_filename='other.safetensors', mean=(0.1, 0.2, 0.3))
    model = timm.create_model('test_san_patchwise', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=1000,
                              cache_dir=tmp_path / 'elsewhere')
    assert torch.equal(model.stem.conv.weight, state['stem.conv.weight'] + 1)
    assert model.pretrained_cfg['mean'] == (0.1, 0.2, 0.3)
    assert not {'file', 'source'} & {key for key, value in model.pretrained_cfg.items() if value}
    assert [*(tmp_path / 'elsewhere').rglob('other.safetensors')] and not [*(tmp_path / 'cache').rglob('*.safetensors')]
    server.put('someone/small', 'other.safetensors', save({'stem.conv.weight': state['stem.conv.weight'] + 2}))
    with pytest.raises(WeightsError, match='missing'):
        timm.create_model('test_san_patchwise', pretrained=True, pretrained_cfg_overlay=overlay)
    model = timm.create_model('test_san_patchwise', pretrained=True, pretrained_cfg_overlay=overlay,
                              pretrained_strict=False)
    assert torch.equal(model.stem.conv.weight, state['stem.conv.weight'] + 2)


def test_only_the_model_file_lies_in_local_folders(server, monkeypatch):
    server.add_repo('san-backbones/test_san_patchwise.shapes')
    server.put('san-backbones/test_san_patchwise.shapes', 'other.safetensors', _content(3.))
    path = hub.weights('san-backbones/test_san_patchwise.shapes', 'other.safetensors')
    assert pathlib.Path(path).read_bytes() == _content(3.)
    monkeypatch.setenv(hub.ORGANISATION_VARIABLE, '')
    assert hub.repository('model') == 'san-backbones/model'


def test_a_wrong_file_that_cannot_be_removed(server, monkeypatch):
    server.put(REPOSITORY, hub.FILENAME, b'no safetensors')

    def fail(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(os, 'remove', fail)
    message = _error()
    assert 'is not a safetensors file' in message and 'could not be removed from the cache' in message


def test_what_the_hub_calls_by_another_digest(server):
    """Two halves of two files, say, of a server that changed between them: the name in the cache is the digest."""
    content = _content(2.)
    server.put(REPOSITORY, hub.FILENAME, content)
    path = pathlib.Path(hub.weights(REPOSITORY))
    assert path.resolve().name == hashlib.sha256(content).hexdigest()
    path.resolve().write_bytes(content[:-1] + b'?')
    assert 'not the file that the Hub has: SHA-256' in _error() and not path.exists()
    assert pathlib.Path(hub.weights(REPOSITORY)).read_bytes() == content


@pytest.mark.parametrize('what', ['folder', 'dangling link', 'loop'])
@pytest.mark.parametrize('name', ['model.tag.safetensors', f'model.tag/{hub.FILENAME}'])
def test_what_is_no_file_in_the_folder(name, what, monkeypatch, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if what == 'folder' else path.symlink_to(path if what == 'loop' else 'nowhere')
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(WeightsError, match=f'{path.name}, in the folder that SAN_BACKBONES_WEIGHTS names, is no file'):
        hub.find_local('model.tag')


def test_a_file_that_cannot_be_read(monkeypatch, tmp_path):
    (tmp_path / 'model.tag.safetensors').write_bytes(_content())
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(hub, 'manifest', lambda: {'model.tag': {'sha256': '0' * 64}})

    def fail(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr(hub, 'digest', fail)
    with pytest.raises(WeightsError, match='model.tag.safetensors, from .*, cannot be read'):
        hub.find_local('model.tag')


@pytest.mark.parametrize('module, name', [(builtins, 'open'), (os, 'stat')])
def test_what_the_user_may_not_read(module, name, monkeypatch, tmp_path):
    """A file, and what is in a folder, of another user."""
    path = tmp_path / 'model.tag.safetensors'
    path.write_bytes(_content())
    given, do = os.fspath(path), getattr(module, name)

    def fail(path, *args, **kwargs):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path) == given:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), given)
        return do(path, *args, **kwargs)
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(WeightsError, match='cannot be read .*Permission denied'):
        hub.find_local('model.tag')


@pytest.mark.parametrize('options', [{}, dict(num_classes=7), dict(features_only=True)])
def test_weights_of_another_model(monkeypatch, tmp_path, options):
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(tmp_path))
    path = tmp_path / 'san10_patchwise.in1k.safetensors'
    save_file(timm.create_model('san10_pairwise').state_dict(), path)
    with pytest.raises(WeightsError, match='missing .*attn.weight_mlp.*seem to be of san10_pairwise') as caught:
        timm.create_model('san10_patchwise', pretrained=True, **options)
    assert str(path) in str(caught.value)


def test_models_without_weights():
    with pytest.raises(RuntimeError, match='[Nn]o pretrained weights'):
        timm.create_model('test_san_pairwise', pretrained=True)


# --- What ships ------------------------------------------------------------------------------------------------------

def test_shipped_weights_load_offline(monkeypatch):
    _point_at(monkeypatch, 'http://127.0.0.1:9')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    model = timm.create_model('test_san_patchwise', pretrained=True)
    assert model.num_classes == 3 and model.pretrained_cfg['label_names'] == ('square', 'star', 'ring')
    path = hub.find_local('test_san_patchwise.shapes')
    state = load_file(path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < 2e6
    local = timm.create_model(f'local-dir:{path.parent}', pretrained=True)
    assert torch.equal(local.head.fc.weight, model.head.fc.weight)


def test_adapting_to_other_classes_and_channels():
    state = load_file(hub.find_local('test_san_patchwise.shapes'))
    other = timm.create_model('test_san_patchwise', pretrained=True, num_classes=11, in_chans=1)
    assert other.head.fc.weight.shape == (11, 128)
    torch.testing.assert_close(other.stem.conv.weight, state['stem.conv.weight'].sum(1, keepdim=True))
    features = timm.create_model('test_san_patchwise', pretrained=True, features_only=True, out_indices=(1, 2))
    assert torch.equal(features.stages_2.conv.weight, state['stages.2.conv.weight'])


@pytest.mark.parametrize('architecture, bound', [('san10_patchwise', 6.), ('san10_pairwise', None)])
def test_distilled_weights_load_offline(architecture, bound, monkeypatch):
    """By every road, in half precision, and none takes them without being asked by name."""
    _point_at(monkeypatch, 'http://127.0.0.1:9')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    name = f'{architecture}.distilled'
    assert name in timm.list_pretrained(f'{architecture}*')
    path = hub.find_local(name)
    state, entry = load_file(path), hub.manifest()[name]
    assert hub.digest(path) == entry['sha256']
    assert {tensor.dtype for tensor in state.values() if tensor.dim() > 1} == {torch.float16}
    assert {tensor.dtype for tensor in state.values() if tensor.dim() == 1} == {torch.float32}
    assert all(torch.equal(tensor.bfloat16(), tensor) for tensor in state.values() if tensor.dim() > 1)
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < 30e6
    model = timm.create_model(name, pretrained=True).eval()
    assert model.num_classes == 1000 and sum(p.numel() for p in model.parameters()) == entry['parameters']
    assert all(torch.equal(tensor, state[key].to(tensor.dtype)) for key, tensor in model.state_dict().items())
    assert {block.act1.limit for stage in model.stages for block in stage.blocks} == {bound}
    other = timm.create_model(name, pretrained=True, num_classes=10)
    assert other.head.fc.weight.shape == (10, 2048) and torch.equal(other.stem.conv.weight, model.stem.conv.weight)
    features = timm.create_model(name, pretrained=True, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(features(x)[-1], model.forward_features(x))
        assert model(torch.randn(2, 3, 64, 64)).isfinite().all()
    with open(path.parent / 'config.json') as file:
        assert json.load(file)['model_args']['relu_bound'] == (bound or 0)
    assert timm.get_pretrained_cfg(architecture).hf_hub_id.endswith(f'{architecture}.in1k')


def test_shipped_weights_of_a_package_in_an_archive(tmp_path):
    """As a zipapp has it; nothing stays behind."""
    root = pathlib.Path(san_backbones.__file__).parent
    with zipfile.ZipFile(tmp_path / 'app.pyz', 'w') as archive:
        for path in root.rglob('*.py'):
            archive.write(path, path.relative_to(root.parent))
        for name in ('manifest.json', f'test_san_patchwise.shapes/{hub.FILENAME}'):
            archive.write(hub.shipped() / name, f'san_backbones/.weights/{name}')
    code = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        import json, timm, san_backbones
        from san_backbones import hub
        model = timm.create_model('test_san_patchwise', pretrained=True)
        print(json.dumps([san_backbones.__file__, str(hub.shipped()), float(model.head.fc.weight.sum())]))"""
    where, folder, total = _run(code, tmp_path / 'app.pyz', HF_HUB_OFFLINE='1', TMPDIR=str(tmp_path))
    assert where.startswith(str(tmp_path / 'app.pyz')) and folder.startswith(str(tmp_path))
    assert not os.path.exists(folder)
    state = load_file(hub.find_local('test_san_patchwise.shapes'))
    assert total == pytest.approx(float(state['head.fc.weight'].sum()))


# --- The whole road, in processes of their own -----------------------------------------------------------------------

CREATE = '''
import hashlib, json, sys, timm, torch, san_backbones
model = timm.create_model(sys.argv[1], pretrained=True).eval()
with torch.inference_mode():
    y = model(torch.linspace(-1, 1, 3 * 64 * 96).reshape(1, 3, 64, 96))
print(json.dumps(hashlib.sha256(y.numpy().tobytes()).hexdigest()))
'''


@pytest.mark.skipif(torch.__version__.startswith(('2.4.', '2.5.')), reason='.pth files are read from torch 2.6 on')
@pytest.mark.skipif(older(timm.__version__, LEAST_FOR_CONVERSION['timm']), reason='config.json needs a newer timm')
def test_from_the_authors_file_to_pretrained(tmp_path):
    """Released format, convert, publish, `pretrained=True` with an empty cache, offline: the same bits."""
    from tests import oracle
    source = tmp_path / 'source' / 'san10_pairwise'
    source.mkdir(parents=True)
    state = oracle.random_state('san10_pairwise', seed=3, dtype=torch.float32)
    torch.save(oracle.released_checkpoint(state), source / 'model_best.pth')
    with HubServer() as server:
        server.add_token('maintainer', 'maintainer', organisations=['san-backbones'])
        environment = server.environment(tmp_path / 'home', 'maintainer')
        command = [sys.executable, ROOT / 'weights' / 'publish.py', 'san10_pairwise', '--org', 'san-backbones',
                   '--source', tmp_path / 'source', '--work', tmp_path / 'work',
                   '--manifest', tmp_path / 'manifest.json']
        (tmp_path / 'manifest.json').write_text((ROOT / 'weights' / 'manifest.json').read_text())
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        recorded = json.loads((tmp_path / 'manifest.json').read_text())['models']['san10_pairwise.in1k']
        repository = tmp_path / 'work' / 'san10_pairwise.in1k' / 'repository'
        assert recorded['sha256'] == hub.digest(repository / 'model.safetensors')

        user = server.environment(tmp_path / 'user')
        expected = _run(CREATE.replace('pretrained=True', "checkpoint_path=sys.argv[2]"), 'san10_pairwise',
                        source / 'model_best.pth')
        assert _run(CREATE, 'san10_pairwise.in1k', **user) == expected
        assert _run(CREATE, 'hf-hub:san-backbones/san10_pairwise.in1k', **user) == expected
    user['HF_HUB_OFFLINE'] = '1'
    assert _run(CREATE, 'san10_pairwise', **user) == expected
