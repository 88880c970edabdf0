"""The authors' files as a source of weights: the real gdown, and a Google Drive, mirrors and disks on this machine."""
import contextlib
import errno
import hashlib
import importlib
import json
import logging
import multiprocessing
import os
import pathlib
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
import traceback

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save, save_file

from san_backbones import hub
from san_backbones.hub import Unavailable, WeightsError
from san_backbones.weights import authors, common
from tests import ROOT, oracle
from tests.drive_server import PAGES, DriveServer, missing
from tests.hub_server import HubServer

MODEL, OTHER = 'test_san_patchwise.in1k', 'test_san_pairwise.in1k'
SWITCHES = (hub.AUTHORS_VARIABLE, hub.MIRROR_VARIABLE, hub.CACHE_VARIABLE, hub.FOLDER_VARIABLE, 'HF_ENDPOINT',
            'HF_HUB_OFFLINE', hub.ORGANISATION_VARIABLE)

pytestmark = pytest.mark.skipif(torch.__version__.startswith(('2.4.', '2.5.')), reason='.pth files: torch 2.6 or later')
over_the_network = pytest.mark.skipif(bool(missing()), reason=missing() or 'nothing is missing')


@pytest.fixture
def cache(monkeypatch, manifest, tmp_path):
    """An empty cache, a manifest of small models, and no other source."""
    for name in (*SWITCHES, 'HF_TOKEN'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(hub, 'manifest', lambda: common.read_manifest(manifest))
    monkeypatch.setenv(hub.CACHE_VARIABLE, str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture
def drive(cache, released, monkeypatch, tmp_path):
    """A Google Drive with the small models' files, and a process that finds it; nobody waits."""
    gdown = importlib.import_module('gdown.download')
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    with DriveServer(tmp_path / 'drive') as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(gdown, 'DEFAULT_COOKIES_FILE', str(tmp_path / 'cookies.txt'))
        for seed, model in enumerate((MODEL, OTHER)):
            name = model.partition('.')[0]
            server.put(f'drive-id-of-{name}', released(name, seed=seed).read_bytes())
        yield server


@pytest.fixture
def mirror(cache, released, monkeypatch, tmp_path):
    """A folder with the file of one model, named as the mirror."""
    released('test_san_patchwise', tmp_path / 'mirror' / 'test_san_patchwise.pth')
    monkeypatch.setenv(hub.MIRROR_VARIABLE, str(tmp_path / 'mirror'))
    return tmp_path / 'mirror'


def file_of(drive, model=MODEL):
    return drive.files[f'drive-id-of-{model.partition(".")[0]}']


def assert_is(path, source, tmp_path):
    """The tensors of a file in the authors' format, by ours names, as the oracle's own reader has them."""
    (tmp_path / 'source.pth').write_bytes(source)
    given = torch.load(tmp_path / 'source.pth', weights_only=True)['state_dict']
    found = load_file(path)
    assert len(found) == len(given)
    assert torch.equal(found['stem.conv.weight'], given['module.conv_in.weight'])
    assert torch.equal(found['head.fc.bias'], given['module.fc.bias'])
    assert sorted(float(t.double().sum()) for t in found.values()) == sorted(
        float(t.double().sum()) for t in given.values())


def nothing_loads(cache):
    return not [*cache.rglob('*.safetensors')]


def fails(kind=WeightsError, model=MODEL):
    with pytest.raises(kind) as caught:
        authors.weights(model)
    return str(caught.value)


# --- First use, and ever after ---------------------------------------------------------------------------------------

@over_the_network
@pytest.mark.parametrize('redirect', [True, False])
@pytest.mark.parametrize('page', [None, 'confirm'])
def test_first_use_and_ever_after(page, redirect, drive, cache, monkeypatch, tmp_path, caplog):
    drive.page, drive.redirect = page if redirect else None, redirect
    with caplog.at_level(logging.WARNING):
        path = authors.weights(MODEL)
    assert path == cache / MODEL / hub.FILENAME
    assert_is(path, file_of(drive), tmp_path)
    note = json.loads((cache / MODEL / 'provenance.json').read_text())
    (tmp_path / 'source').write_bytes(file_of(drive))
    assert note['source_sha256'] == hub.digest(tmp_path / 'source') and note['sha256'] == hub.digest(path)
    assert note['origin'] == 'https://drive.google.com/uc?id=drive-id-of-test_san_patchwise'
    assert note['license'] == 'mit' and note['source_bytes'] == len(file_of(drive)) and note['pinned'] is False
    assert 'taken on trust' in caplog.text and note['source_sha256'] in caplog.text and note['origin'] in caplog.text
    assert {entry.name for entry in path.parent.iterdir()} == {'.lock', 'provenance.json', hub.FILENAME}

    drive.requests.clear()
    caplog.clear()
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert authors.weights(MODEL) == path == authors.cached(MODEL) and path.stat().st_mtime_ns == before
    assert not drive.requests and not caplog.records


@over_the_network
def test_a_pinned_file_is_not_taken_on_trust(drive, cache, manifest, tmp_path, caplog):
    (tmp_path / 'source').write_bytes(file_of(drive))
    common.record(manifest, MODEL, source_sha256=hub.digest(tmp_path / 'source'))
    authors.weights(MODEL)
    assert not caplog.records and authors.provenance(MODEL)['pinned'] is True


@pytest.fixture
def real_manifest(monkeypatch, tmp_path):
    """The package's own manifest, empty caches, and an empty folder for a mirror, which is returned."""
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setenv(hub.CACHE_VARIABLE, str(tmp_path / 'cache'))
    monkeypatch.setenv(hub.MIRROR_VARIABLE, str(tmp_path / 'mirror'))
    (tmp_path / 'mirror').mkdir()
    return tmp_path / 'mirror'


def put_model(mirror, name):
    """Puts the authors' file of a model into a mirror, and returns its tensors."""
    state = oracle.random_state(name, seed=3, dtype=torch.float32)
    torch.save(oracle.released_checkpoint(state), mirror / f'{name}.pth')
    return state


def test_create_model(real_manifest):
    """Of the real manifest, by name and alias, adapted and by parts; from the command line too."""
    state = put_model(real_manifest, 'san10_patchwise')
    model = timm.create_model('san10', pretrained=True)
    (real_manifest / 'san10_patchwise.pth').unlink()
    assert torch.equal(model.stem.conv.weight, state['conv_in.weight'])
    assert 'file' not in model.pretrained_cfg
    again = timm.create_model('san10_patchwise.in1k', pretrained=True, num_classes=7)
    assert again.num_classes == 7 and torch.equal(again.stem.conv.weight, model.stem.conv.weight)
    features = timm.create_model('san10_patchwise', pretrained=True, features_only=True)
    assert torch.equal(features.stem_conv.weight if hasattr(features, 'stem_conv') else next(features.parameters()),
                       model.stem.conv.weight)


def test_cache_dir_of_create_model(mirror, tmp_path):
    path = authors.weights(MODEL, tmp_path / 'elsewhere')
    assert path == tmp_path / 'elsewhere' / 'san-backbones' / MODEL / hub.FILENAME
    assert authors.cached(MODEL, tmp_path / 'elsewhere') == path and authors.cached(MODEL) is None
    assert authors.provenance(MODEL, tmp_path / 'elsewhere')['model'] == MODEL


def test_openmmlab(mirror):
    """`init_cfg` with hf-hub:san-backbones/... works in the same way."""
    pytest.importorskip('mmengine', reason='needs the mm extra')
    from mmengine.runner.checkpoint import CheckpointLoader

    import san_backbones.mm  # noqa: F401
    state = CheckpointLoader.load_checkpoint(f'hf-hub:san-backbones/{MODEL}')
    expected = load_file(authors.cached(MODEL))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items()) and len(state) == len(expected)


# --- What Drive says instead -----------------------------------------------------------------------------------------

@over_the_network
@pytest.mark.parametrize('page, words', [('quota', 'Too many users have viewed or downloaded this file recently'),
                                         ('other', 'a web page came instead')])
def test_pages_instead_of_the_file(page, words, drive, cache):
    drive.page = page
    message = fails(Unavailable)
    assert words in message and 'drive.google.com/uc?id=drive-id-of-test_san_patchwise' in message
    assert '--cookies-from-browser' in message and 'can last a day' in message
    assert 'san-backbones weights get test_san_patchwise' in message
    assert all(switch in message for switch in SWITCHES)
    assert nothing_loads(cache)
    drive.page = None
    authors.weights(MODEL)


@over_the_network
@pytest.mark.parametrize('status, words', [(404, 'a web page came instead'), (503, 'web page|refused|not understood')])
def test_a_drive_in_trouble(status, words, drive, cache):
    drive.status = status
    assert re.search(words, fails(Unavailable)) and nothing_loads(cache)


@over_the_network
def test_pages_without_end(drive, cache, monkeypatch):
    monkeypatch.setattr(authors, 'FIRST_BYTE', 0.5)
    drive.page, drive.word = 'confirm', 'another'
    assert 'no file came within 0.5 s, only web pages' in fails(Unavailable) and nothing_loads(cache)
    assert len(drive.requests) > 3


@over_the_network
def test_nobody_there(drive, cache, monkeypatch):
    monkeypatch.setenv(hub.MIRROR_VARIABLE, 'http://127.0.0.1:9/user')
    message = fails(Unavailable)
    assert 'the server cannot be reached' in message and 'Connection refused' in message
    assert 'broke off' not in message and 'kept' not in message and not [*cache.rglob('*.part')]


@over_the_network
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='fills a queue as Linux has it')
def test_an_address_that_does_not_answer(drive, cache, monkeypatch):
    """It times out sooner than a connection without data."""
    monkeypatch.setattr(authors, 'CONNECTION', 0.2)
    monkeypatch.setattr(authors, 'RETRIES', 0)
    assert authors.PATIENCE > 10
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(('127.0.0.1', 0), backlog=0))
        for _ in range(4):  # what the queue has no room for is not answered at all
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        monkeypatch.setenv(hub.MIRROR_VARIABLE, f'http://127.0.0.1:{server.getsockname()[1]}')
        start = time.monotonic()
        message = fails(Unavailable)
    assert 'the server cannot be reached' in message and time.monotonic() - start < 10


@over_the_network
def test_a_certificate_file_that_is_not_there(drive, cache, monkeypatch, tmp_path):
    monkeypatch.setenv('REQUESTS_CA_BUNDLE', str(tmp_path / 'none.pem'))
    message = fails(Unavailable)
    assert 'none.pem' in message and 'the cache (' not in message


def test_without_gdown(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gdown', None)
    assert "pip install 'gdown" in fails(Unavailable)


# --- What the file may be instead ------------------------------------------------------------------------------------

class Malicious:
    def __reduce__(self):
        return os.system, ('touch was-run',)


def checkpoint(tmp_path, content, **options):
    torch.save(content, tmp_path / 'made.pth', **options)
    return (tmp_path / 'made.pth').read_bytes()


def wrong_files(source, released, tmp_path):
    """What may come, by what the error says."""
    (tmp_path / 'good.pth').write_bytes(source)
    good = torch.load(tmp_path / 'good.pth', weights_only=True)
    ours = timm.create_model('test_san_patchwise', num_classes=1000).state_dict()
    spoilt = [{'state_dict': {**good['state_dict'], name: good['state_dict'][name] * 0 + value}} for name, value in (
        ('module.conv_in.weight', float('nan')), ('module.bn_in.running_var', -1.))]
    return {
        'looks like a web page': PAGES['quota'].encode(),
        'cannot be read as a checkpoint': source[:len(source) // 2],
        r'(posix|nt)\.system': checkpoint(tmp_path, {**good, 'epoch': Malicious()}),
        r'(posix|nt)\.system.*': checkpoint(tmp_path, {**good, 'epoch': Malicious()},
                                            _use_new_zipfile_serialization=False),
        'give --model test_san_pairwise': released('test_san_pairwise', tmp_path / 'o.pth').read_bytes(),
        "not in the authors' format": checkpoint(tmp_path, ours),
        'infinite or not numbers': checkpoint(tmp_path, spoilt[0]),
        'variances below zero': checkpoint(tmp_path, spoilt[1]),
    }


@over_the_network
def test_wrong_files_from_drive(drive, cache, released, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    good = file_of(drive)
    for words, content in wrong_files(good, released, tmp_path).items():
        drive.put('drive-id-of-test_san_patchwise', content)
        message = fails()
        assert re.search(words, message), message
        assert 'drive.google.com/uc?id=' in message and 'removed from the cache' in message and '.. ' not in message
        assert nothing_loads(cache) and not [*cache.rglob('*.pth')] and not (tmp_path / 'was-run').exists()
    drive.put('drive-id-of-test_san_patchwise', good)
    assert_is(authors.weights(MODEL), good, tmp_path)


def test_wrong_files_of_a_mirror_stay_where_they_are(mirror, cache, released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = mirror / 'test_san_patchwise.pth'
    good = path.read_bytes()
    for words, content in wrong_files(good, released, tmp_path).items():
        path.write_bytes(content)
        message = fails()
        assert re.search(words, message) and str(path) in message and 'removed' not in message
        assert path.read_bytes() == content and nothing_loads(cache) and not (tmp_path / 'was-run').exists()


def test_another_file_than_the_pinned(mirror, cache, manifest):
    common.record(manifest, MODEL, source_sha256='0' * 64)
    assert '0' * 64 in fails() and nothing_loads(cache)
    common.record(manifest, MODEL, source_sha256=None, sha256='1' * 64)
    assert '1' * 64 in fails() and nothing_loads(cache)


def test_trust_is_given_once(mirror, cache, released, tmp_path):
    first = authors.weights(MODEL)
    first.unlink()
    source = mirror / 'test_san_patchwise.pth'
    good = source.read_bytes()
    released('test_san_patchwise', source, seed=9)
    message = fails()
    assert 'taken on trust' in message and hub.digest(source) in message and str(first.parent) in message
    assert nothing_loads(cache)
    source.write_bytes(good)
    assert_is(authors.weights(MODEL), good, tmp_path)
    released('test_san_patchwise', source, seed=9)
    first.unlink()
    (first.parent / 'provenance.json').unlink()  # as the message says
    assert_is(authors.weights(MODEL), source.read_bytes(), tmp_path)


def test_classes_of_mmengine_are_not_allowed_for_the_authors_files(mirror, cache, monkeypatch):
    from san_backbones.weights import convert

    calls = []

    def refusing(path, allowed):
        calls.append(path)
        raise pickle.UnpicklingError('Unsupported global: GLOBAL mmengine.logging.HistoryBuffer was not an allowed one')
    monkeypatch.setattr(convert, '_load', refusing)
    assert 'asks for mmengine.logging.HistoryBuffer' in fails() and len(calls) == 1  # not again, with more allowed


def test_no_file_is_read_where_torch_may_run_it(mirror, cache, monkeypatch):
    monkeypatch.setattr(torch, '__version__', '2.5.1')
    monkeypatch.setattr(authors, 'download', lambda *args: pytest.fail('something was asked for'))
    assert 'needs torch 2.6 or later, because' in fails()


# --- What is in the cache --------------------------------------------------------------------------------------------

def test_a_damaged_file_in_the_cache(mirror, cache):
    path = authors.weights(MODEL)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    message = fails()
    assert 'SHA-256' in message and 'running again' in message and not path.exists()
    assert authors.weights(MODEL).read_bytes() == good


@pytest.mark.parametrize('number', [errno.EIO, errno.ESTALE])
def test_a_file_in_the_cache_that_cannot_be_read_now(number, mirror, cache, monkeypatch):
    """It may be good: it stays."""
    path = authors.weights(MODEL)

    def failing(path):
        raise OSError(number, os.strerror(number))
    with monkeypatch.context() as patch:
        patch.setattr(hub, 'digest', failing)
        message = fails()
    assert os.strerror(number) in message and 'left in the cache' in message
    assert authors.cached(MODEL) == path


def test_a_pin_that_came_later(mirror, cache, manifest):
    path = authors.weights(MODEL)
    good = authors.provenance(MODEL)
    common.record(manifest, MODEL, source_sha256=good['source_sha256'], sha256=good['sha256'])
    assert authors.cached(MODEL) == path
    for pin in ('sha256', 'source_sha256'):
        authors.weights(MODEL)
        common.record(manifest, MODEL, **{pin: '0' * 64})
        with pytest.raises(WeightsError, match='the manifest now pins 0000'):
            authors.cached(MODEL)
        assert not path.exists()
        common.record(manifest, MODEL, **{pin: good[pin]})


@pytest.mark.parametrize('content', [
    '{"origin": ', '[]', '{}', '{"origin": "", "date": "", "sha256": "", "source_sha256": "", "authors": ""}',
    '{"origin": "", "date": "", "sha256": "", "source_sha256": "", "pinned": true}'])
def test_a_note_that_cannot_be_read(content, mirror, cache):
    path = authors.weights(MODEL)
    (path.parent / 'provenance.json').write_text(content)
    assert 'provenance.json cannot be read' in fails()
    (path.parent / 'provenance.json').unlink()  # without one, the file is not of our making
    assert authors.cached(MODEL) is None and authors.weights(MODEL) == path
    assert authors.provenance(MODEL)['model'] == MODEL


# --- Interruptions ---------------------------------------------------------------------------------------------------

@over_the_network
def test_a_connection_that_is_cut_goes_on(drive, cache, tmp_path):
    drive.cut_after, drive.cuts = 600_000, 1
    assert len(file_of(drive)) > 700_000
    assert_is(authors.weights(MODEL), file_of(drive), tmp_path)
    ranges = [request.range for request in drive.seen(host=drive.CONTENT) if request.range]
    assert len(ranges) == 1 and int(ranges[0][6:-1]) > 0
    assert sum(request.sent for request in drive.requests) <= len(file_of(drive)) + (1 << 20)


@over_the_network
@pytest.mark.parametrize('page', [None, 'confirm'])
def test_an_interrupted_download_goes_on(page, drive, cache, tmp_path):
    drive.page, drive.cut_after, drive.cuts = page, 600_000, 99
    message = fails(Unavailable)
    assert 'broke off' in message and 'run again' in message
    assert nothing_loads(cache)
    part, = cache.rglob('*.part')
    kept = part.stat().st_size
    assert 0 < kept < len(file_of(drive))
    drive.cuts = 0
    drive.requests.clear()
    assert_is(authors.weights(MODEL), file_of(drive), tmp_path)
    assert [request.range for request in drive.seen(host=drive.CONTENT) if request.range] == [f'bytes={kept}-']
    assert not [*cache.rglob('*.part')]


@over_the_network
def test_a_server_that_cannot_go_on_begins_anew(drive, cache, tmp_path):
    drive.ranges, drive.cut_after, drive.cuts = False, 600_000, 1
    assert_is(authors.weights(MODEL), file_of(drive), tmp_path)


@over_the_network
def test_a_part_of_another_source_is_not_gone_on_from(drive, cache, monkeypatch, released, tmp_path):
    drive.cut_after, drive.cuts = 600_000, 99
    fails(Unavailable)
    drive.cuts = 0
    other = released('test_san_patchwise', seed=7).read_bytes()
    drive.mirrored['test_san_patchwise.pth'] = other
    monkeypatch.setenv(hub.MIRROR_VARIABLE, drive.mirror)
    assert_is(authors.weights(MODEL), other, tmp_path)


@over_the_network
@pytest.mark.parametrize('pinned', [False, True])
def test_a_part_of_another_day(pinned, drive, cache, manifest, tmp_path):
    """It may belong to another version of the file, so it is resumed only if a digest would detect that."""
    (tmp_path / 'source').write_bytes(file_of(drive))
    common.record(manifest, MODEL, source_sha256=hub.digest(tmp_path / 'source') if pinned else None)
    drive.cut_after, drive.cuts = 600_000, 99
    fails(Unavailable)
    part, = cache.rglob('*.part')
    os.utime(part, (time.time() - 90_000,) * 2)
    drive.cuts = 0
    drive.requests.clear()
    assert_is(authors.weights(MODEL), file_of(drive), tmp_path)
    assert bool([request.range for request in drive.requests if request.range]) == pinned


@over_the_network
def test_a_server_that_never_goes_on(drive, cache):
    drive.ranges, drive.cut_after, drive.cuts = False, 600_000, 99
    message = fails(Unavailable)
    assert 'does not go on from there' in message and 'kept' not in message and not [*cache.rglob('*.part')]


@over_the_network
def test_slow_bytes(drive, cache, tmp_path):
    drive.step, drive.pause = 1 << 14, 0.002
    assert_is(authors.weights(MODEL), file_of(drive), tmp_path)


@over_the_network
def test_a_server_that_falls_silent(drive, cache, monkeypatch):
    monkeypatch.setattr(authors, 'PATIENCE', 0.2)
    drive.delay = 30
    message = fails(Unavailable)
    assert 'the server cannot be reached' in message and 'Read timed out' in message and 'kept' not in message


@over_the_network
def test_a_short_answer_of_which_only_gdown_knows(drive, cache, monkeypatch):
    """urllib3 1.26 does not check the length; then gdown's error has no cause, but the part can still be resumed."""
    from gdown.exceptions import DownloadError

    def short(url, output, **options):
        assert not [*cache.rglob('*.part')]  # not begun anew
        pathlib.Path(f'{output}12345678.part').write_bytes(b'half')
        options['progress'](4, 8)
        raise DownloadError('Download is incomplete: received 4 bytes but the server announced 8 bytes.')
    monkeypatch.setattr('gdown.download', short)
    message = fails(Unavailable)
    assert 'the download broke off (Download is incomplete' in message and 'is kept: run again' in message
    assert [*cache.rglob('*.part')]


@over_the_network
def test_what_was_downloaded_is_used_after_a_failed_conversion(drive, cache, monkeypatch, tmp_path):
    def full(*args):
        raise WeightsError('no room')
    with monkeypatch.context() as patch:
        patch.setattr(common, 'replace_files', full)
        assert 'no room' in fails()
    drive.requests.clear()
    assert_is(authors.weights(MODEL), file_of(drive), tmp_path)
    assert not drive.requests


# --- Mirrors and switches --------------------------------------------------------------------------------------------

@over_the_network
@pytest.mark.parametrize('name', ['test_san_patchwise.pth', 'test_san_patchwise/model_best.pth'])
def test_a_mirror_on_the_network(name, drive, cache, monkeypatch, tmp_path):
    drive.mirrored[f'some/where/{name}'] = file_of(drive)
    monkeypatch.setenv(hub.MIRROR_VARIABLE, drive.mirror.replace('//', '//someone:secret@') + '/some/where/')
    assert_is(authors.weights(MODEL), file_of(drive), tmp_path)
    assert not drive.seen(host=drive.FRONT) and drive.requests
    text = (cache / MODEL / 'provenance.json').read_text()
    assert f'some/where/{name}' in text and 'secret' not in text
    message = fails(Unavailable, OTHER)
    assert 'has no file for' in message and 'test_san_pairwise.pth' in message and 'secret' not in message
    drive.status = 500
    assert 'secret' not in fails(Unavailable, OTHER)


@over_the_network
@pytest.mark.parametrize('status', [403, 404, 500])
def test_passwords_of_a_mirror_are_not_shown(status, drive, cache, monkeypatch):
    """Nor by the cause of an error."""
    drive.status = status
    for scheme in ('http', 'HTTP', 'ftp'):
        monkeypatch.setenv(hub.MIRROR_VARIABLE, drive.mirror.replace('http://', f'{scheme}://user:secret@'))
        for get in (authors.weights, lambda model: hub.weights(f'san-backbones/{model}')):
            with pytest.raises(Unavailable) as caught:
                get(MODEL)
            text = ''.join(traceback.format_exception(caught.value))
            assert 'secret' not in text and '127.0.0.1' in text and '.. ' not in str(caught.value)
            assert ('neither a folder' in text) == (scheme == 'ftp')


@over_the_network
def test_a_mirror_that_forbids_what_it_does_not_have(drive, cache, monkeypatch, tmp_path):
    drive.lacking = 403
    monkeypatch.setenv(hub.MIRROR_VARIABLE, drive.mirror)
    assert 'the server refused (403' in fails(Unavailable) and len(drive.requests) == 4
    drive.mirrored['test_san_patchwise.in1k.pth'] = file_of(drive)  # the last of the names
    assert_is(authors.weights(MODEL), file_of(drive), tmp_path)


@pytest.mark.parametrize('name', ['test_san_patchwise.pth', 'test_san_patchwise/model_best.pth'])
def test_a_mirror_in_a_folder(name, mirror, cache, monkeypatch, tmp_path):
    source = mirror / 'test_san_patchwise.pth'
    (mirror / name).parent.mkdir(exist_ok=True)
    source.rename(mirror / name)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)  # it is no network
    assert_is(authors.weights(MODEL), (mirror / name).read_bytes(), tmp_path)
    assert authors.provenance(MODEL)['origin'] == str(mirror / name)
    assert 'has no file for test_san_pairwise.in1k; expected' in fails(Unavailable, OTHER)


def test_a_mirror_that_is_none(cache, monkeypatch, tmp_path):
    monkeypatch.setenv(hub.MIRROR_VARIABLE, str(tmp_path / 'none'))
    assert "none', which is neither a folder nor begins with http" in fails(Unavailable)


@pytest.mark.parametrize('value', ['0', 'false', 'No', 'OFF'])
def test_turned_off(value, mirror, cache, monkeypatch):
    path = authors.weights(MODEL)
    assert hub.weights(f'san-backbones/{MODEL}') == str(path)
    monkeypatch.setenv(hub.AUTHORS_VARIABLE, value)
    for weights in (lambda: authors.weights(MODEL), lambda: hub.weights(f'san-backbones/{MODEL}')):
        with pytest.raises(Unavailable) as caught:
            weights()
        assert f'{hub.AUTHORS_VARIABLE}={value} turns' in str(caught.value)
        assert f'To get them: {hub.AUTHORS_VARIABLE}=1 san-backbones weights get test_san_patch' in str(caught.value)
    monkeypatch.setenv(hub.AUTHORS_VARIABLE, '1')
    assert authors.weights(MODEL) == path


@over_the_network
def test_offline_asks_nobody(drive, cache, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    message = fails(Unavailable)
    assert 'offline mode is on (HF_HUB_OFFLINE)' in message and str(cache) in message
    assert 'HF_HUB_OFFLINE=0 san-backbones weights get' in message and not drive.requests
    with pytest.raises(Unavailable, match='elsewhere'):
        authors.weights(MODEL, cache / 'elsewhere')


def test_where_the_cache_is(monkeypatch):
    """Beside huggingface_hub's, which follows HF_HOME and XDG_CACHE_HOME, unless named."""
    monkeypatch.delenv(hub.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(constants, 'HF_HOME', '/x/huggingface')
    assert authors.cache_folder() == pathlib.Path('/x/huggingface/san-backbones')
    monkeypatch.setenv(hub.CACHE_VARIABLE, '~/c')
    monkeypatch.setenv('HOME', '/home/me')
    assert authors.cache_folder() == pathlib.Path('/home/me/c')
    assert authors.cache_folder('/y') == pathlib.Path('/y/san-backbones')


# --- Several at once, and disks that refuse --------------------------------------------------------------------------

def _child(barrier, queue):
    barrier.wait()
    try:
        queue.put(('got', hub.digest(authors.weights(MODEL))))
    except BaseException as error:
        queue.put(('failed', str(error)))


@over_the_network
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')
@pytest.mark.parametrize('trouble', [False, True])
def test_eight_processes_at_once(trouble, drive, cache):
    """One downloads; where the one that does is refused, the others have the same words."""
    drive.step, drive.pause, drive.page = 1 << 16, 0.005, 'quota' if trouble else None
    context = multiprocessing.get_context('fork')
    barrier, queue = context.Barrier(8), context.Queue()
    children = [context.Process(target=_child, args=(barrier, queue)) for _ in range(8)]
    for child in children:
        child.start()
    results = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    if trouble:
        assert all(kind == 'failed' and 'Too many users' in text for kind, text in results)
    else:
        assert {kind for kind, _ in results} == {'got'} and len({text for _, text in results}) == 1
        assert len(drive.seen(host=drive.CONTENT)) == 1


@contextlib.contextmanager
def somebody_else():
    """Drops superuser rights of this process, if it has them."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def reachable(tmp_path):
    """Folders above the cache that anybody may pass through."""
    folder = tmp_path
    while folder != pathlib.Path('/tmp') and folder != folder.parent:
        with contextlib.suppress(OSError):
            folder.chmod(0o755)
        folder = folder.parent


@pytest.mark.skipif(os.name == 'nt', reason="rights of POSIX")
def test_a_cache_that_cannot_be_written_to(mirror, cache, reachable):
    cache.mkdir(mode=0o555)
    with somebody_else():
        message = fails()
    assert str(cache) in message and 'cannot be read or written' in message and hub.CACHE_VARIABLE in message
    cache.chmod(0o755)
    path = authors.weights(MODEL)
    (path.parent / '.lock').unlink()
    path.parent.chmod(0o555)
    cache.chmod(0o555)
    with somebody_else():  # what is there is read all the same
        assert authors.weights(MODEL) == path
        path.parent.chmod(0o700) if os.geteuid() != 65534 else None
    path.parent.chmod(0o700)
    with somebody_else():
        if os.geteuid() == 65534:  # of another user
            assert 'cannot be read or written' in fails()
    cache.chmod(0o755)


@pytest.mark.skipif(os.name == 'nt', reason='rights of POSIX')
def test_a_damaged_file_that_cannot_be_removed(mirror, cache, reachable):
    path = authors.weights(MODEL)
    path.write_bytes(path.read_bytes()[:-4])
    path.parent.chmod(0o555)
    with somebody_else():
        message = fails()
    path.parent.chmod(0o755)
    assert 'could not be removed from the cache' in message and path.exists()


@contextlib.contextmanager
def small_disk(folder, size):
    folder.mkdir(parents=True)
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', folder], capture_output=True).returncode:
        pytest.skip('cannot mount a small disk here')
    try:
        yield
    finally:
        subprocess.run(['umount', folder], check=True)


@over_the_network
@pytest.mark.skipif(not shutil.which('mount'), reason='needs mount')
@pytest.mark.parametrize('share', [0.5, 1.5])
def test_a_full_disk(share, drive, cache, tmp_path):
    """That fills during the download, or during the conversion."""
    with small_disk(cache, int(share * len(file_of(drive)))):
        message = fails()
        assert re.search('is full|No space left', message) and str(cache) in message and nothing_loads(cache)
        assert hub.CACHE_VARIABLE in message or 'make room' in message
        assert share > 1 or not [*cache.rglob('*.part')]
    cache.rmdir()
    assert_is(authors.weights(MODEL), file_of(drive), tmp_path)


def test_a_full_disk_without_one(mirror, cache, monkeypatch):
    def full(folder, contents):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(common, '_replace_files', full)
    message = fails()
    assert 'No space left' in message and 'make room' in message and nothing_loads(cache)
    assert message.endswith(f'({hub.CACHE_VARIABLE})')


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT])
def test_a_share_of_the_disk_that_is_full(number, tmp_path):
    with pytest.raises(WeightsError, match='is full'), authors.explain_disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))


# --- Beside the Hub --------------------------------------------------------------------------------------------------

@over_the_network
def test_the_hub_is_not_asked_for_what_it_does_not_have(drive, cache, manifest, monkeypatch):
    source = f'san-backbones/{MODEL}'
    path = hub.weights(source)
    assert not drive.seen(host='huggingface.co') and drive.seen(host=drive.FRONT)
    monkeypatch.setenv(hub.AUTHORS_VARIABLE, '0')
    with pytest.raises(Unavailable, match='nobody has published them on the Hub yet'):
        hub.weights(source)
    assert not drive.seen(host='huggingface.co')
    common.record(manifest, MODEL, sha256=hub.digest(path))  # somebody has published it
    huggingface_hub.close_session()
    with pytest.raises(Unavailable, match='cannot get model.safetensors'):
        hub.weights(source)
    assert drive.seen(host='huggingface.co')  # the server does see who asks there
    monkeypatch.delenv(hub.AUTHORS_VARIABLE)
    drive.requests.clear()
    assert hub.weights(source) == path and not drive.requests  # nor is it asked for what is here
    huggingface_hub.close_session()


def test_what_the_hubs_cache_has_is_taken(mirror, cache, tmp_path):
    commit = '0' * 40
    folder = tmp_path / 'hub' / f'models--san-backbones--{MODEL}'
    (folder / 'refs').mkdir(parents=True)
    (folder / 'refs' / 'main').write_text(commit)
    (folder / 'snapshots' / commit).mkdir(parents=True)
    (folder / 'snapshots' / commit / hub.FILENAME).write_bytes(save({'weight': torch.ones(3)}))
    assert hub.weights(f'san-backbones/{MODEL}') == str(folder / 'snapshots' / commit / hub.FILENAME)
    assert not cache.exists()


def test_what_is_damaged_in_the_hubs_cache_is_not_taken(mirror, cache, tmp_path):
    """Large files are there under their digests."""
    folder = tmp_path / 'hub' / f'models--san-backbones--{MODEL}'
    commit, content = '0' * 40, save({'weight': torch.ones(3)})
    for name in ('refs', 'blobs', f'snapshots/{commit}'):
        (folder / name).mkdir(parents=True)
    (folder / 'refs' / 'main').write_text(commit)
    blob = folder / 'blobs' / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content[:-1] + b'!')
    (folder / 'snapshots' / commit / hub.FILENAME).symlink_to(blob)
    with pytest.raises(WeightsError, match='SHA-256'):
        hub.weights(f'san-backbones/{MODEL}')
    assert not blob.exists()
    assert hub.weights(f'san-backbones/{MODEL}') == str(cache / MODEL / hub.FILENAME)


@pytest.fixture
def other_hub(monkeypatch):
    with HubServer() as server:
        monkeypatch.setattr(constants, 'ENDPOINT', server.endpoint)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE',
                            server.endpoint + '/{repo_id}/resolve/{revision}/{filename}')
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')
        yield server


def test_a_hub_that_has_them_comes_first_and_one_that_has_not_is_passed_over(
        mirror, cache, other_hub, monkeypatch, caplog):
    source = f'san-backbones/{MODEL}'
    monkeypatch.setenv(hub.ORGANISATION_VARIABLE, 'mine')
    path = hub.weights(source)
    assert pathlib.Path(path) == cache / MODEL / hub.FILENAME and "took the authors' file instead" in caplog.text
    other_hub.put(f'mine/{MODEL}', hub.FILENAME, save({'weight': torch.ones(3)}))
    assert list(load_file(hub.weights(source))) == ['weight']
    monkeypatch.setenv(hub.AUTHORS_VARIABLE, '0')
    monkeypatch.setenv(hub.ORGANISATION_VARIABLE, 'nobody')
    with pytest.raises(Unavailable) as caught:
        hub.weights(source)
    assert 'no such repository' in str(caught.value) and 'turns the authors' in str(caught.value)
    assert str(caught.value).count('To get them') == 1


def test_a_hub_with_a_wrong_file_is_an_error(mirror, cache, manifest, other_hub):
    common.record(manifest, MODEL, sha256='0' * 64)
    other_hub.put(f'san-backbones/{MODEL}', hub.FILENAME, save({'weight': torch.ones(3)}))
    with pytest.raises(WeightsError, match='SHA-256'):
        hub.weights(f'san-backbones/{MODEL}')
    assert not cache.exists()


# --- Commands --------------------------------------------------------------------------------------------------------

def command(*words):
    from san_backbones.weights.__main__ import main
    return main([str(word) for word in words])


@pytest.fixture
def real(real_manifest, tmp_path):
    """The package's own manifest, with a mirror of one model."""
    put_model(real_manifest, 'san10_pairwise')
    return tmp_path


def test_get(real, capsys, monkeypatch):
    assert command('get', 'san10_pairwise', 'test_san_patchwise') == 0
    said = capsys.readouterr().out
    note = authors.provenance('san10_pairwise.in1k')
    for part in (str(real / 'cache' / 'san10_pairwise.in1k' / hub.FILENAME), 'licence mit', 'licence apache-2.0',
                 note['sha256'], note['source_sha256'], 'taken on trust', 'test_san_patchwise.shapes: '):
        assert part in said
    assert command('get', 'san10_pairwise.in1k', '--out', real / 'out') == 0
    assert f'{hub.FOLDER_VARIABLE}={real / "out"}' in capsys.readouterr().out
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(real / 'out'))
    save_file(load_file(real / 'out' / 'san10_pairwise.in1k' / hub.FILENAME), real / 'other.safetensors', {'a': 'b'})
    (real / 'other.safetensors').rename(real / 'out' / 'san10_pairwise.in1k' / hub.FILENAME)
    assert command('get', 'san10_pairwise') == 0
    said = capsys.readouterr().out
    assert str(real / 'out') in said and 'made of' not in said  # though the cache has a note of that model
    monkeypatch.setenv(hub.AUTHORS_VARIABLE, '0')
    timm.create_model('san10_pairwise', pretrained=True)
    assert command('get', '--all') == 1  # the others are not here
    result = capsys.readouterr()
    assert result.err.count('error: ') == 5 and 'san10_pairwise.in1k: ' in result.out
    assert 'Traceback' not in result.err


def test_get_from_a_disk_that_refuses(real, capsys, monkeypatch):
    def failing(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    command('get', 'san10_pairwise')
    capsys.readouterr()
    monkeypatch.setattr(pathlib.Path, 'read_bytes', failing)
    assert command('get', 'san10_pairwise', '--out', real / 'out') == 1
    assert os.strerror(errno.EIO) in capsys.readouterr().err
    monkeypatch.setattr(hub, 'digest', failing)
    assert command('get', 'test_san_patchwise') == 1
    assert os.strerror(errno.EIO) in capsys.readouterr().err


@pytest.mark.parametrize('words, part, code', [
    (['san99'], "there is no model 'san99'", 2), (['test_san_pairwise'], 'no pretrained weights', 1),
    (['san10.other'], 'other', 2)])
def test_get_what_there_is_not(words, part, code, real, capsys):
    assert command('get', *words) == code
    assert part in capsys.readouterr().err


def test_commands(capsys, monkeypatch):
    assert command('--help') == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ('get', 'convert', 'verify', 'publish'))
    assert command() == 0
    monkeypatch.setattr(sys, 'argv', ['san-backbones-weights'])
    assert importlib.import_module('san_backbones.weights.__main__').main() == 0
    assert capsys.readouterr().out == 2 * said
    assert command('sell') == 2 and "no command 'sell'" in capsys.readouterr().err
    for name in ('get', 'convert', 'verify', 'publish'):
        with pytest.raises(SystemExit) as ended:
            command(name, '--help')
        assert ended.value.code == 0 and f'usage: san-backbones weights {name}' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command('get')


@pytest.mark.parametrize('script', ['get', 'convert', 'verify', 'publish'])
def test_scripts_of_the_checkout_are_the_commands(script):
    text = (ROOT / 'weights' / f'{script}.py').read_text()
    assert f'from san_backbones.weights.{script} import main' in text and len(text.splitlines()) < 10


def test_what_the_command_line_says_of_places(real, monkeypatch):
    pytest.importorskip('typer', reason='needs the cli extra')
    from san_backbones.cli.weights import our_models, locate_weights

    def states():
        return {name: locate_weights(timm.create_model(name, device='meta').pretrained_cfg)
                for name in our_models() if name.startswith(('san10', 'test'))}
    found = states()
    assert {name: place.state for name, place in found.items()} == dict(
        san10='to download', san10_pairwise='to download', san10_patchwise='to download', test_san_pairwise='none',
        test_san_patchwise='shipped')
    assert found['san10_pairwise'].download_bytes == 4 * 10_531_848
    assert '42 MB or more' in found['san10_pairwise'].note
    command('get', 'san10_pairwise')
    place = states()['san10_pairwise']
    assert place.state == 'authors cache' and place.path == str(authors.cached('san10_pairwise.in1k'))
    from typer.testing import CliRunner

    from san_backbones_cli.app import app
    said = CliRunner().invoke(app, ['info', 'san10_pairwise']).stdout
    note = authors.provenance('san10_pairwise.in1k')
    for part in (place.path, 'mit', 'https://github.com/hszhao/SAN', note['origin'], note['source_sha256'],
                 'taken on trust', note['date']):
        assert part in said
    facts = json.loads(CliRunner().invoke(app, ['info', 'san10_pairwise', '--json']).stdout)
    assert facts['provenance'] == note and facts['weights']['state'] == 'authors cache'
    monkeypatch.setenv(hub.AUTHORS_VARIABLE, '0')
    place = states()['san10_pairwise']
    assert place.state == 'not here' and hub.AUTHORS_VARIABLE in place.note and place.download_bytes is None
    monkeypatch.setenv(hub.AUTHORS_VARIABLE, '1')
    monkeypatch.setenv(hub.ORGANISATION_VARIABLE, 'mine')
    assert states()['san10'].state == 'not here' and 'mine/san10_patchwise.in1k' in states()['san10'].note
    authors.cached('san10_pairwise.in1k').write_bytes(b'damaged')
    assert states()['san10_pairwise'].state == 'unusable'


def test_names_that_timm_calls_pretrained_can_be_had():
    """From somewhere: the package, the Hub or the authors."""
    pretrained = {name.partition('.')[0] for name in timm.list_models('*san*', module='san', pretrained=True)}
    assert pretrained == {*timm.list_models(module='san')} - {'test_san_pairwise'}
    assert not timm.is_model_pretrained('test_san_pairwise')
    known = hub.manifest()
    for name in pretrained:
        model = timm.get_pretrained_cfg(name).hf_hub_id.partition('/')[2]
        assert 'drive_id' in known[model] or hub.find_local(model)


def test_without_a_network_it_fails_at_once(real, monkeypatch):
    """In one line with the one command; gdown, which would try again, is not asked."""
    monkeypatch.delenv(hub.MIRROR_VARIABLE, raising=False)
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)

    def nowhere(host, *rest):
        raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')
    monkeypatch.setattr('socket.getaddrinfo', nowhere)
    monkeypatch.setattr('gdown.download', lambda *arguments, **options: pytest.fail('asked for'))
    with pytest.raises(hub.Unavailable) as caught:
        timm.create_model('san15_patchwise', pretrained=True)
    first = str(caught.value).splitlines()[0]
    assert 'the server cannot be reached (Name or service not known)' in first
    assert first.endswith('To get them: san-backbones weights get san15_patchwise')
