"""The Hub that other tests use, hub_server.py, against the real huggingface_hub client."""
import os
import subprocess
import sys
import time

import pytest

# 1.x tries other things again; 2.0 and 2.1 take another port of the same host for the Hub, which keeps its token
huggingface_hub = pytest.importorskip('huggingface_hub', minversion='2.2')

import httpx2  # noqa: E402
from huggingface_hub import HfApi, constants, errors, hf_hub_download  # noqa: E402

from tests.hub_server import HubServer  # noqa: E402

SMALL, LARGE = 'config.json', 'model.safetensors'
CONFIG = b'{"architecture": "test"}\n'
WEIGHTS = bytes(range(256)) * (3 << 11)  # 1.5 MiB
REPO = 'org/name'


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with one repository, and a client that contacts no other server and sends no token of the user."""
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_TELEMETRY', True)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
    for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_OIDC_RESOURCE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    huggingface_hub.close_session()
    with HubServer() as server:
        server.add_token('writer')
        server.put(REPO, SMALL, CONFIG)
        server.put(REPO, LARGE, WEIGHTS)
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def waits(monkeypatch):
    """How long the client wanted to wait before it tried again; it doesn't."""
    result = []
    monkeypatch.setattr(time, 'sleep', result.append)
    return result


@pytest.fixture
def get(hub, tmp_path):
    def download(file=LARGE, repo=REPO, **arguments):
        path = hf_hub_download(repo, file, endpoint=hub.endpoint, cache_dir=tmp_path / 'cache', **arguments)
        with open(path, 'rb') as content:
            return content.read()

    return download


@pytest.mark.parametrize('redirect', ['cdn', 'absolute', 'relative', None])
def test_downloads(hub, get, redirect):
    hub.redirect = redirect
    assert get(SMALL) == CONFIG and get(LARGE, token='writer') == WEIGHTS
    last = hub.seen(f'*/{LARGE}')[-1]
    assert last.method == 'GET' and last.path.startswith('/cdn/' if redirect else '/org/')
    assert last.cdn == (redirect == 'cdn') and last.token == (None if last.cdn else 'writer')
    asked = len(hub.requests)
    assert get(LARGE) == WEIGHTS
    assert [request.method for request in hub.requests[asked:]][0] == 'HEAD' and not hub.seen(method='GET')[2:]


def test_revisions(hub, get):
    first = hub.put(REPO, SMALL, b'first')
    hub.tag(REPO, 'v1')
    hub.branch(REPO, 'refs/other', first)
    hub.put(REPO, SMALL, b'other', revision='refs/other')
    hub.put(REPO, SMALL, b'last')
    expected = {'v1': b'first', first: b'first', first[:8]: b'first', 'refs/other': b'other', 'main': b'last',
                None: b'last'}
    assert {revision: get(SMALL, revision=revision) for revision in expected} == expected
    api = HfApi(hub.endpoint)
    assert api.model_info(REPO, revision='v1').sha == first
    assert api.revision_exists(REPO, 'v1') and not api.revision_exists(REPO, 'v2')
    with pytest.raises(errors.RevisionNotFoundError, match='Invalid rev id: v2'):
        get(SMALL, revision='v2')
    with pytest.raises(errors.RemoteEntryNotFoundError):
        get('missing.json')


def test_information(hub):
    hub.put(REPO, 'folder/deep/notes.txt', b'text')
    api = HfApi(hub.endpoint)
    names = ['.gitattributes', SMALL, 'folder/deep/notes.txt', LARGE]
    assert sorted(api.list_repo_files(REPO)) == sorted(names) == sorted(hub.files(REPO))
    info = api.model_info(REPO, files_metadata=True)
    assert info.id == REPO and info.sha == hub.commits(REPO)[0][0] and not info.private
    sizes = {file.rfilename: (file.size, file.lfs is not None) for file in info.siblings}
    assert sizes[LARGE] == (len(WEIGHTS), True) and sizes[SMALL] == (len(CONFIG), False)
    assert [entry.path for entry in api.list_repo_tree(REPO, 'folder')] == ['folder/deep']
    assert [entry.path for entry in api.get_paths_info(REPO, [LARGE, 'missing'])] == [LARGE]
    assert [commit.commit_id for commit in api.list_repo_commits(REPO)] == [name for name, _ in hub.commits(REPO)]
    assert api.file_exists(REPO, SMALL) and not api.file_exists(REPO, 'missing')
    assert api.repo_exists(REPO) and not api.repo_exists('org/missing')


def test_private_gated_and_absent(hub, get):
    hub.add_repo('org/private', private=True, token='reader')
    hub.add_repo('org/gated', gated=True, token='reader')
    hub.add_token('stranger', 'stranger', write=False)
    for repo in ('org/private', 'org/gated'):
        hub.put(repo, LARGE, WEIGHTS)
        assert get(repo=repo, token='reader') == get(repo=repo, token='writer') == WEIGHTS
    api = HfApi(hub.endpoint)
    for token, status in ((False, 401), ('stranger', 404)):
        for repo in ('org/private', 'org/absent'):
            with pytest.raises(errors.RepositoryNotFoundError) as caught:
                get(SMALL, repo, token=token)
            assert caught.type is errors.RepositoryNotFoundError and caught.value.response.status_code == status
            with pytest.raises(errors.RepositoryNotFoundError):
                api.model_info(repo, token=token)
    for token, status in ((False, 401), ('stranger', 403)):
        for call in (lambda: get(SMALL, 'org/gated', token=token), lambda: api.auth_check('org/gated', token=token)):
            with pytest.raises(errors.GatedRepoError, match='is restricted') as caught:
                call()
            assert caught.value.response.status_code == status
        assert api.repo_exists('org/gated', token=token) and api.model_info('org/gated', token=token).gated == 'manual'
    with pytest.raises(errors.HfHubHTTPError, match='Invalid credentials') as caught:
        get(SMALL, token='expired')
    assert caught.value.response.status_code == 401


def test_resumes_a_download_that_was_cut(hub, get, waits):
    step = constants.DOWNLOAD_CHUNK_SIZE  # the client keeps whole steps of an answer that breaks off
    weights = WEIGHTS * 8
    hub.put(REPO, LARGE, weights)
    hub.fault('/cdn/*', cut_after=step + 1000)
    assert get() == weights
    assert [request.range for request in hub.seen('/cdn/*')] == [None, f'bytes={step}-'] and waits == [1]


def test_starts_again_where_less_than_a_step_had_come(hub, get, waits):
    fault = hub.fault('/cdn/*', cut_after=1000, times=2)
    assert get() == WEIGHTS
    assert [request.range for request in hub.seen('/cdn/*')] == [None] * 3 and waits == [1, 1] and fault.hits == 2


def test_ranges(hub):
    url = f'{hub.endpoint}/{REPO}/resolve/main/{SMALL}'
    for header, expected in (('bytes=3-', CONFIG[3:]), ('bytes=3-5', CONFIG[3:6]), ('bytes=-4', CONFIG[-4:])):
        answer = httpx2.get(url, headers={'Range': header})
        assert (answer.status_code, answer.content) == (206, expected)
    assert httpx2.get(url, headers={'Range': 'bytes=100-'}).status_code == 416


def test_downloads_that_fail_for_good(hub, get, waits):
    for fault, error, expected in (
            (dict(cut_after=1000), httpx2.RemoteProtocolError, [1] * 5),
            (dict(drop=True), httpx2.RemoteProtocolError, [1] * 5),
            (dict(cut_after=1000, reset=True), httpx2.ReadError, []),
            (dict(status=503), errors.HfHubHTTPError, []),
            (dict(status=429, retry_after=7), errors.HfHubHTTPError, [8] * 5)):
        hub.clear()
        waits.clear()
        hub.fault('/cdn/*', times=None, **fault)
        with pytest.raises(error):
            get()
        assert waits == expected and len(hub.seen('/cdn/*', 'GET')) == len(waits) + 1


def test_the_question_for_a_file_is_asked_again(hub, get, waits):
    fault = hub.fault('*/resolve/*', method='HEAD', status=503, times=3)
    assert get() == WEIGHTS and fault.hits == 3 and waits == [1, 2]
    hub.clear()
    hub.fault('*/resolve/*', status=500, times=None)
    assert get() == WEIGHTS  # the cache's
    with pytest.raises(errors.LocalEntryNotFoundError) as caught:
        get(SMALL)
    assert caught.value.__cause__.response.status_code == 500


def test_other_faults(hub, get, waits):
    hub.fault('*', status=403, message='Come back tomorrow')
    with pytest.raises(errors.LocalEntryNotFoundError) as caught:
        get()
    assert 'Come back tomorrow' in str(caught.value.__cause__)
    hub.fault('*', status=403, code='GatedRepo')
    with pytest.raises(errors.GatedRepoError):
        get()
    hub.fault('*', method='GET', corrupt=-1)
    assert get() == WEIGHTS[:-1] + b'\0'
    start = time.monotonic()
    hub.fault('*', method='GET', drip=(1 << 18, 0.05), delay=0.05)
    assert get(force_download=True) == WEIGHTS and time.monotonic() - start >= 0.2
    hub.fault('*', method='HEAD', delay=30, times=None)
    assert get(etag_timeout=0.1) == WEIGHTS


@pytest.mark.filterwarnings('ignore:Use .content')  # of the client's own upload
def test_publishes(hub, tmp_path):
    folder = tmp_path / 'folder'
    (folder / 'sub').mkdir(parents=True)
    published = {'README.md': b'---\nlicense: apache-2.0\n---\n# Title\n', SMALL: CONFIG, LARGE: WEIGHTS,
                 'sub/empty.txt': b''}
    for path, content in published.items():
        (folder / path).write_bytes(content)
    api = HfApi(hub.endpoint, token='writer')
    assert api.whoami()['name'] == 'someone'
    assert api.create_repo('new', private=True).repo_id == 'someone/new'
    repo = 'someone/new'
    with pytest.raises(errors.HfHubHTTPError, match='already created'):
        api.create_repo(repo)
    assert api.create_repo(repo, exist_ok=True).repo_id == repo
    api.auth_check(repo, write=True)

    interrupted = hub.fault('/upload/*', cut_after=1000)
    first = api.upload_folder(repo_id=repo, folder_path=folder, commit_message='weights')
    assert interrupted.hits == 1 and len(hub.seen('/upload/*')) == 2
    assert {**hub.files(repo), '.gitattributes': b''} == {**published, '.gitattributes': b''}
    assert hub.commits(repo)[0] == (first.oid, 'weights')
    api.create_tag(repo, tag='v1')
    with pytest.raises(errors.HfHubHTTPError, match='exists already'):
        api.create_tag(repo, tag='v1')
    api.create_tag(repo, tag='v1', exist_ok=True)

    hub.clear()
    assert api.upload_folder(repo_id=repo, folder_path=folder).oid == first.oid
    assert not hub.seen('/upload/*') and len(hub.commits(repo)) == 2
    (folder / SMALL).write_bytes(b'{}')
    second = api.upload_folder(repo_id=repo, folder_path=folder, delete_patterns='sub/*')
    assert hub.files(repo)[SMALL] == b'{}' and hub.files(repo, 'v1')[SMALL] == CONFIG and not hub.seen('/upload/*')
    api.upload_file(repo_id=repo, path_in_repo='copy.safetensors', path_or_fileobj=WEIGHTS)
    api.delete_file('sub/empty.txt', repo)
    assert set(hub.files(repo)) == {'.gitattributes', 'copy.safetensors', *published} - {'sub/empty.txt'}
    assert [ref.name for ref in api.list_repo_refs(repo).tags] == ['v1']
    with pytest.raises(errors.HfHubHTTPError, match='A commit has happened since'):
        api.upload_file(repo_id=repo, path_in_repo='a', path_or_fileobj=b'a', parent_commit=second.oid)
    api.delete_repo(repo)
    assert not api.repo_exists(repo)


def test_who_may_publish(hub):
    hub.add_token('read-only', write=False)
    hub.add_token('elsewhere', organisations=['elsewhere'])
    for token, status in ((False, 401), ('unknown', 401), ('read-only', 403), ('elsewhere', 403)):
        api = HfApi(hub.endpoint, token=token)
        for call in (lambda: api.create_repo('org/new'), lambda: api.create_tag(REPO, tag='v1'),
                     lambda: api.upload_file(repo_id=REPO, path_in_repo=LARGE, path_or_fileobj=b'a')):
            with pytest.raises(errors.HfHubHTTPError) as caught:
                call()
            assert caught.value.response.status_code == status
    assert hub.files(REPO)[LARGE] == WEIGHTS and len(hub.commits(REPO)) == 3


def test_the_environment_leads_a_subprocess_to_it(hub, tmp_path):
    code = ('import huggingface_hub as h; api = h.HfApi(); repo = api.create_repo("org/new").repo_id; '
            'api.upload_file(repo_id=repo, path_in_repo="model.safetensors", path_or_fileobj=b"weights"); '
            'print(open(h.hf_hub_download(repo, "model.safetensors")).read())')
    result = subprocess.run([sys.executable, '-c', code], env=hub.environment(tmp_path, token='writer'),
                            capture_output=True, text=True)
    assert result.stdout == 'weights\n', result.stderr
    assert {request.token for request in hub.requests if not request.cdn} == {'writer'}
    assert os.path.isdir(tmp_path / 'hub' / 'models--org--new')


def test_nothing_answers_afterwards(hub, get, waits):
    assert get(SMALL) == CONFIG
    hub.__exit__()
    assert get(SMALL) == CONFIG
    with pytest.raises(errors.LocalEntryNotFoundError):
        get(LARGE)
