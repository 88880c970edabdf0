"""`weights publish` against a Hub on this machine: what arrives there, and that any interruption can be continued."""
import errno
import hashlib
import json
import os
import sys

import pytest
import timm
import torch
from huggingface_hub import HfApi, constants

from san_backbones.weights import authors, common, convert, publish
from tests.hub_server import HubServer

NAME = 'test_san_patchwise.in1k'
OTHER = 'test_san_pairwise.in1k'
FILES = {'README.md', 'config.json', 'model.safetensors'}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub on which the token may write to `org`."""
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)  # the server has no Xet storage
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.delenv('SAN_BACKBONES_AUTHORS', raising=False)
    monkeypatch.setenv('SAN_BACKBONES_CACHE', str(tmp_path / 'authors'))
    with HubServer() as server:
        server.add_token('secret', 'someone', organisations=['org'])
        yield server


@pytest.fixture
def drive(released):
    """Google Drive: `drive(id, path)` copies a file in the authors' format and counts."""

    def fetch(drive_id, path):
        fetch.calls.append(drive_id)
        released(drive_id.rpartition('-')[2], path)

    fetch.calls = []
    return fetch


@pytest.fixture
def run(hub, drive, manifest, monkeypatch, tmp_path):
    def call(*words, token='secret', org='org', fetch=drive):
        api = HfApi(endpoint=hub.endpoint, token=token)
        options = ['--org', org, '--work', tmp_path / 'work', '--manifest', manifest, *words]
        with monkeypatch.context() as patch:
            patch.setattr(authors, '_fetch', lambda url, path, title: fetch(url.partition('?id=')[2], path) or True)
            return publish.main([str(option) for option in options], api=api)

    return call


def changes(hub):
    """Requests that change something on the Hub."""
    return [request.path for request in hub.requests if request.method in ('POST', 'PUT', 'DELETE')
            and not request.path.endswith(('paths-info/main', 'validate-yaml'))]


def assert_published(hub, manifest, name=NAME):
    files = hub.files(f'org/{name}')
    assert set(files) - {'.gitattributes'} == FILES
    entry = common.read_manifest(manifest)[name]
    assert entry['sha256'] == sha256(files['model.safetensors']) and len(entry['source_sha256']) == 64
    assert entry['source_sha256'].encode() in files['README.md']
    assert f'hf-hub:org/{name}'.encode() in files['README.md']


def test_publishes_and_does_nothing_twice(run, hub, drive, manifest, tmp_path, monkeypatch, capsys):
    assert run('--all') == 0
    for name in (NAME, OTHER):
        assert_published(hub, manifest, name)
        assert len(hub.commits(f'org/{name}')) == 2  # with the initial one
    assert drive.calls == ['drive-id-of-test_san_pairwise', 'drive-id-of-test_san_patchwise']
    entry = common.read_manifest(manifest)[NAME]
    source = (tmp_path / 'work' / NAME / 'model_best.pth').read_bytes()
    assert entry['source_sha256'] == sha256(source) and entry['paper_top1'] == 74.9

    # what is there is what users get
    monkeypatch.setattr(constants, 'ENDPOINT', hub.endpoint)
    template = hub.endpoint + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    model = timm.create_model(f'hf-hub:org/{NAME}', pretrained=True)
    state = torch.load(tmp_path / 'work' / NAME / 'model_best.pth', weights_only=True)['state_dict']
    assert torch.equal(model.head.fc.bias, state['module.fc.bias'])

    before = manifest.read_text(), hub.files(f'org/{NAME}')
    hub.clear()
    capsys.readouterr()
    assert run('--all') == 0
    assert not changes(hub) and not hub.seen('*/resolve/*') and len(drive.calls) == 2
    assert (manifest.read_text(), hub.files(f'org/{NAME}')) == before
    assert run('--all', '--dry-run') == 0
    assert capsys.readouterr().out.count('would do nothing') == 2


def test_dry_run_changes_nothing(run, hub, drive, manifest, tmp_path, capsys):
    before = manifest.read_text()
    assert run('test_san_patchwise', '--dry-run') == 0
    said = capsys.readouterr().out
    assert f'would create org/{NAME}, upload README.md, config.json, model.safetensors, write the digests' in said
    assert not changes(hub) and manifest.read_text() == before
    converted = (tmp_path / 'work' / NAME / 'repository' / 'model.safetensors').read_bytes()
    assert sha256(converted) in said
    assert run(NAME) == 0 and len(drive.calls) == 1  # what was downloaded is used
    assert hub.files(f'org/{NAME}')['model.safetensors'] == converted


def test_only_what_differs_is_uploaded(run, hub, manifest, capsys):
    assert run(NAME) == 0
    weights = sha256(hub.files(f'org/{NAME}')['model.safetensors'])
    hub.put(f'org/{NAME}', 'extra.txt', b'kept')
    common.record(manifest, NAME, measured={'top1': 74.91, 'top5': 92.1, 'images': 50000, 'sha256': weights})
    hub.clear()
    capsys.readouterr()
    assert run(NAME) == 0
    assert 'uploaded README.md\n' in capsys.readouterr().out
    assert not hub.seen('*/lfs/*') and b'top-1 74.91' in hub.files(f'org/{NAME}')['README.md']
    assert hub.files(f'org/{NAME}')['extra.txt'] == b'kept'
    hub.put(f'org/{NAME}', 'model.safetensors', b'something else')
    assert run(NAME) == 0
    assert sha256(hub.files(f'org/{NAME}')['model.safetensors']) == weights


STEPS = ['fetch', 'convert', 'look', 'create', 'upload', 'download', 'record']


@pytest.mark.parametrize('when', ['before', 'after'])
@pytest.mark.parametrize('step', STEPS)
def test_stopped_at_any_step_and_run_again(step, when, run, hub, drive, manifest, monkeypatch, capsys):
    def stopping(real):
        def call(*args, **kwargs):
            try:
                return real(*args, **kwargs) if when == 'after' else None
            finally:
                raise KeyboardInterrupt
        return call

    fetch = drive
    with monkeypatch.context() as patch:
        if step == 'fetch':
            fetch = stopping(drive)
        elif step == 'convert':
            patch.setattr(convert, 'convert', stopping(convert.convert))
        elif step == 'record':
            patch.setattr(common, 'record', stopping(common.record))
        else:
            method = {'look': 'model_info', 'create': 'create_repo', 'upload': 'upload_folder',
                      'download': 'hf_hub_download'}[step]
            patch.setattr(HfApi, method, stopping(getattr(HfApi, method)))
        assert run(NAME, fetch=fetch) == 130
    recorded = common.read_manifest(manifest)[NAME]['sha256'] is not None
    assert recorded == (step == 'record' and when == 'after')
    assert 'the same command goes on' in capsys.readouterr().err
    assert run(NAME) == 0
    assert_published(hub, manifest)
    assert len(hub.commits(f'org/{NAME}')) == 2
    assert len(drive.calls) == 1


@pytest.mark.parametrize('pattern, fault', [
    ('/api/repos/create', dict(status=403)),
    ('/api/models/*/preupload/*', dict(status=403)),
    ('*/lfs/objects/batch', dict(status=401)),
    ('/upload/*', dict(status=403)),
    ('/api/models/*/commit/*', dict(status=412)),
    ('/api/models/*/commit/*', dict(cut_after=0)),  # the commit is made, its answer lost
    ('/cdn/*', dict(status=403)),
    ('/cdn/*', dict(corrupt=-1)),
])
def test_the_hub_fails_and_run_again(pattern, fault, run, hub, manifest, capsys):
    hub.fault(pattern, **fault)
    assert run(NAME) == 1
    message = capsys.readouterr().err
    assert f'error: {NAME}: ' in message and 'run again' in message.lower() and hub.endpoint in message
    assert 'Traceback' not in message and common.read_manifest(manifest)[NAME]['sha256'] is None
    assert run(NAME) == 0
    assert_published(hub, manifest)
    assert len(hub.commits(f'org/{NAME}')) == 2


def test_passing_troubles_are_not_noticed(run, hub, manifest):
    hub.fault('/upload/*', cut_after=1000, reset=True)
    hub.fault('/cdn/*', method='GET', cut_after=1000)
    assert run(NAME) == 0
    assert_published(hub, manifest)


def test_who_may_publish(run, hub, capsys):
    for options, part in ((dict(token='wrong'), 'hf auth login'), (dict(org='others'), 'allowed to write'),
                          (dict(token=False), 'hf auth login')):
        assert run(NAME, **options) == 1
        assert part in capsys.readouterr().err
    assert run(NAME, '--private') == 0
    assert hub._repositories[f'org/{NAME}'].private


def test_hub_out_of_reach(released, manifest, tmp_path, capsys):
    api = HfApi(endpoint='http://127.0.0.1:9', token='secret')
    released('test_san_patchwise', tmp_path / 'test_san_patchwise.pth')
    options = ['--org', 'org', '--work', tmp_path, '--manifest', manifest, '--source', tmp_path, NAME]
    assert publish.main([str(option) for option in options], api=api) == 1
    assert 'can be reached' in capsys.readouterr().err


def test_one_that_fails_does_not_keep_the_others(run, drive, hub, manifest, capsys):
    def fetch(drive_id, path):
        if 'pairwise' in drive_id:
            raise publish.WeightsError('Google Drive said no')
        drive(drive_id, path)

    assert run('--all', fetch=fetch) == 1
    message = capsys.readouterr().err
    assert f'error: {OTHER}: Google Drive said no' in message and f'not done: {OTHER};' in message
    assert_published(hub, manifest)
    assert run('--all') == 0
    assert_published(hub, manifest, OTHER)


# --- The authors' files ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['page', 'cut', 'another', 'ours', 'damaged', 'sparse'])
def test_a_bad_download_is_not_kept(kind, run, hub, drive, released, manifest, tmp_path, capsys):
    def fetch(drive_id, path):
        drive(drive_id, path)
        if kind in ('page', 'cut'):
            path.write_bytes(b'<html>quota exceeded' if kind == 'page' else path.read_bytes()[:-1000])
        elif kind == 'another':
            released('test_san_pairwise', path)
        elif kind == 'ours':
            torch.save(timm.create_model('test_san_patchwise').state_dict(), path)
        else:
            bias = torch.full((1000,), float('nan')) if kind == 'damaged' else torch.ones(1000).to_sparse()
            released('test_san_patchwise', path, **{'fc.bias': bias})

    assert run(NAME, fetch=fetch) == 1
    assert 'It was deleted: run again' in capsys.readouterr().err
    assert not (tmp_path / 'work' / NAME / 'model_best.pth').exists() and not changes(hub)
    assert run(NAME) == 0
    assert_published(hub, manifest)


def test_a_source_below_work_is_the_users(run, hub, manifest, tmp_path, released):
    common.record(manifest, NAME, source_sha256='0' * 64)
    path = released('test_san_patchwise', tmp_path / 'work' / 'mine' / 'test_san_patchwise.pth')
    assert run(NAME, '--source', tmp_path / 'work' / 'mine') == 1 and path.exists()
    path.write_bytes(b'<html>')
    assert run(NAME, '--source', tmp_path / 'work' / 'mine') == 1 and path.exists()


@pytest.mark.parametrize('switch', ['SAN_BACKBONES_AUTHORS', 'HF_HUB_OFFLINE'])
def test_switches(switch, run, drive, monkeypatch, capsys):
    if switch == 'HF_HUB_OFFLINE':
        monkeypatch.setattr(constants, switch, True)
    else:
        monkeypatch.setenv(switch, '0')
    assert run(NAME) == 1 and not drive.calls
    assert switch in capsys.readouterr().err.partition('To get them')[0]


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses(number, run, hub, drive, tmp_path, monkeypatch, capsys):
    """The words name --work, not the cache of `pretrained=True`."""
    def failing(*args):
        raise OSError(number, os.strerror(number))
    assert run(NAME, fetch=failing) == 1
    message = capsys.readouterr().err
    assert str(tmp_path / 'work') in message and '--work' in message and 'SAN_BACKBONES_CACHE' not in message
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', failing)
        assert run(NAME) == 1
    assert '--work' in capsys.readouterr().err and not changes(hub)


def test_another_file_than_the_one_taken_on_trust(run, hub, manifest, released, monkeypatch, tmp_path, capsys):
    mirror = tmp_path / 'mirror' / 'test_san_patchwise.pth'
    with monkeypatch.context() as patch:
        released('test_san_patchwise', mirror, seed=5)
        patch.setenv('SAN_BACKBONES_AUTHORS_URL', str(mirror.parent))
        patch.setattr('san_backbones.hub.manifest', lambda: common.read_manifest(manifest))
        path = authors.weights(NAME)
    assert run(NAME) == 1
    assert 'taken on trust' in capsys.readouterr().err and not changes(hub)
    (path.parent / 'provenance.json').unlink()  # as the message says
    assert run(NAME) == 0


def test_pinned_source(run, hub, drive, manifest, tmp_path, released, capsys):
    assert run(NAME, '--dry-run') == 0
    right = sha256((tmp_path / 'work' / NAME / 'model_best.pth').read_bytes())
    common.record(manifest, NAME, source_sha256='0' * 64)
    assert run(NAME) == 1
    message = capsys.readouterr().err
    assert right in message and '0' * 64 in message and 'It was deleted' in message
    assert not (tmp_path / 'work' / NAME / 'model_best.pth').exists()
    path = released('test_san_patchwise', tmp_path / 'files' / 'test_san_patchwise.pth')
    assert run(NAME, '--source', tmp_path / 'files') == 1
    assert path.exists() and 'Download it again' in capsys.readouterr().err and not changes(hub)
    common.record(manifest, NAME, source_sha256=right, sha256='0' * 64)
    assert run(NAME) == 1
    assert 'has changed' in capsys.readouterr().err and not changes(hub)
    common.record(manifest, NAME, sha256=None)
    assert run(NAME) == 0
    assert_published(hub, manifest)


@pytest.mark.parametrize('form', ['test_san_patchwise.pth', 'test_san_patchwise/model_best.pth', f'{NAME}.pth'])
def test_files_that_are_here(form, run, hub, drive, manifest, tmp_path, released):
    path = released('test_san_patchwise', tmp_path / 'files' / form)
    assert run(NAME, '--source', tmp_path / 'files') == 0
    assert_published(hub, manifest)
    assert not drive.calls and path.exists()


def test_files_that_are_not_the_authors(run, hub, tmp_path, released, capsys):
    assert run(NAME, '--source', tmp_path) == 1
    assert 'test_san_patchwise.pth' in capsys.readouterr().err
    torch.save(timm.create_model('test_san_patchwise').state_dict(), tmp_path / 'test_san_patchwise.pth')
    assert run(NAME, '--source', tmp_path) == 1
    assert "not in the authors' format" in capsys.readouterr().err
    released('test_san_pairwise', tmp_path / 'test_san_patchwise.pth')
    assert run(NAME, '--source', tmp_path) == 1
    assert '--model test_san_pairwise' in capsys.readouterr().err
    assert not changes(hub)


def test_the_same_road_as_users_take(hub, drive, manifest, released, monkeypatch, tmp_path, capsys):
    """What keeps `pretrained=True` from a file keeps `publish` from it; the mirror of the environment serves both."""
    def main():
        options = ['--org', 'org', '--work', tmp_path / 'work', '--manifest', manifest, NAME]
        return publish.main([str(option) for option in options], api=HfApi(endpoint=hub.endpoint, token='secret'))

    monkeypatch.setitem(sys.modules, 'gdown', None)
    assert main() == 1
    message = capsys.readouterr().err
    assert "pip install 'gdown" in message and 'SAN_BACKBONES_AUTHORS_URL' in message
    path = released('test_san_patchwise', tmp_path / 'mirror' / 'test_san_patchwise.pth')
    before = path.read_bytes()
    monkeypatch.setenv('SAN_BACKBONES_AUTHORS_URL', str(tmp_path / 'mirror'))
    assert main() == 0 and path.read_bytes() == before
    assert_published(hub, manifest)


def test_only_what_passes_on_pictures_is_published(run, hub, manifest, tmp_path, capsys):
    from PIL import Image
    for number, wnid in enumerate(('n01440764', 'n01443537')):
        for index in range(3):
            (tmp_path / 'pictures' / wnid).mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (48, 48), (80 * number, 60 * index, 9)).save(tmp_path / 'pictures' / wnid / f'{index}.png')
    assert run(NAME, '--images', tmp_path / 'pictures') == 1  # random weights
    result = capsys.readouterr()
    assert 'over 6 pictures of 2 of 1000 classes' in result.out and 'FAIL' in result.out
    assert 'it was not published' in result.err and not changes(hub)
    common.record(manifest, NAME, paper_top1=1., paper_top5=1.)  # which anything passes
    assert run(NAME, '--images', tmp_path / 'pictures') == 0
    assert_published(hub, manifest)


def test_wrong_arguments(run, manifest, capsys):
    assert run('resnet50') == 1
    assert 'resnet50' in capsys.readouterr().err
    for words in ([], ['--all', NAME]):
        with pytest.raises(SystemExit):
            run(*words)
    manifest.write_text('{')
    assert run('--all') == 1
    assert 'cannot be read' in capsys.readouterr().err
    manifest.write_text(json.dumps({'models': {'test_san_pairwise.untrained': {'sha256': None}}}))
    assert run('--all') == 0  # what no file of the authors belongs to
