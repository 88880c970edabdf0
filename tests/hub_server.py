"""A small Hugging Face Hub on 127.0.0.1 for tests; the clients are the real ones and find it through HF_ENDPOINT.

    with HubServer() as hub:
        hub.put('org/name', 'model.safetensors', content)
        hub.fault('*/model.safetensors', method='GET', cut_after=1000)
        subprocess.run([...], env=hub.environment(tmp_path))
        assert hub.seen('*/model.safetensors', method='GET')

Models only, in memory: downloads, information, publishing, tags and branches, private and gated repositories. Large
files come from a second port, `cdn`, as the Hub's come from another host; what `put` holds is what is served.

There is no Xet storage. Downloads don't notice, for they use it only where a file's headers name it. Uploads do: where
hf_xet is installed, huggingface_hub sends large files to Xet and nowhere else, and fails with ConnectionError at
xet-write-token, unless HF_HUB_DISABLE_XET=1, which `environment` sets. Pull requests, .gitignore, model cards' metadata
and multipart uploads are not there either.
"""
import base64
import contextlib
import dataclasses
import datetime
import fnmatch
import functools
import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Optional
from urllib.parse import parse_qs, quote, unquote

__all__ = ['HubServer', 'Request']

# what the Hub keeps as large files (LFS); a larger file is one whatever its name
LARGE_SUFFIXES = ('.bin', '.ckpt', '.h5', '.onnx', '.pkl', '.pt', '.pth', '.safetensors', '.zip')
LARGE_SIZE = 10 << 20


@dataclasses.dataclass
class Request:
    """A request that came in; `path` is unquoted and has no query, `headers` have names in lower case."""
    method: str
    path: str
    query: str
    headers: dict[str, str]
    cdn: bool
    status: int | None = None

    @property
    def range(self) -> str | None:
        return self.headers.get('range')

    @property
    def token(self) -> str | None:
        kind, _, token = self.headers.get('authorization', '').partition(' ')
        return token if kind == 'Bearer' else None


@dataclasses.dataclass
class _Fault:
    pattern: str
    method: str | None
    times: int | None
    status: int | None
    code: str | None
    message: str | None
    retry_after: int | None
    delay: float
    drop: bool
    cut_after: int | None
    hold: float
    reset: bool
    drip: tuple[int, float] | None
    corrupt: int | None
    hits: int = 0

    @property
    def in_transfer(self) -> bool:
        return self.cut_after is not None or self.drip is not None or self.corrupt is not None


@dataclasses.dataclass(frozen=True)
class _File:
    data: bytes
    large: bool

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @functools.cached_property
    def pointer(self) -> bytes:
        return (f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n'
                f'size {len(self.data)}\n').encode()

    @functools.cached_property
    def blob(self) -> str:
        """Returns git's name of the file."""
        data = self.pointer if self.large else self.data
        return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob


@dataclasses.dataclass(frozen=True)
class _Commit:
    id: str
    parent: Optional['_Commit']
    title: str
    user: str
    date: str
    tree: dict[str, _File]


@dataclasses.dataclass
class _Repository:
    name: str
    private: bool
    gated: bool
    readers: set[str]
    created: str
    commits: dict[str, _Commit] = dataclasses.field(default_factory=dict)
    branches: dict[str, _Commit] = dataclasses.field(default_factory=dict)
    tags: dict[str, _Commit] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _User:
    name: str
    write: bool
    organisations: tuple[str, ...] | None  # None: any

    def may_write(self, namespace: str) -> bool:
        return self.write and (self.organisations is None or namespace in (self.name, *self.organisations))


@dataclasses.dataclass
class _Answer:
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b''


class _Refusal(Exception):
    """An answer with an error, in the Hub's form."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None,
                 **fields: Any):
        super().__init__(message)
        self.answer = _json({'error': message, **fields}, status)
        self.answer.headers['X-Error-Message'] = message
        if code is not None:
            self.answer.headers['X-Error-Code'] = code
        self.answer.headers.update(headers or {})


class _Cut(Exception):
    """The connection ends here."""


def _json(value: Any, status: int = 200) -> _Answer:
    return _Answer(status, {'Content-Type': 'application/json; charset=utf-8'}, json.dumps(value).encode())


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%dT%H:%M:%S.000Z')


def _is_large(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LARGE_SUFFIXES) or size > LARGE_SIZE)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # or headers and body, two writes, would wait for one another
    server: '_Server'

    def setup(self):
        super().setup()
        self.server.connections.add(self.connection)

    def handle(self):
        with contextlib.suppress(_Cut, ConnectionError):
            super().handle()

    def finish(self):
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub = self.server.hub
        path, _, query = self.path.partition('?')
        request = self.request_seen = Request(
            self.command, unquote(path), query, {k.lower(): v for k, v in self.headers.items()}, self.server.cdn)
        hub._record(request)
        fault = hub._take(request, in_transfer=False)
        if fault is not None:
            hub._closing.wait(fault.delay)
            if fault.drop:
                self._cut(fault)
        if self.command == 'PUT':
            interrupted = hub._take(request, in_transfer=True)
            if interrupted is not None:
                hub._closing.wait(interrupted.delay)
                self._read(interrupted.cut_after)
                self._cut(interrupted)
        body = self._read()
        if fault is not None and fault.status is not None:
            headers = {} if fault.retry_after is None else {'Retry-After': str(fault.retry_after)}
            message = fault.message or self.responses.get(fault.status, ('Fault',))[0]
            answer = _Refusal(fault.status, message, fault.code, headers).answer
        else:
            answer = hub._answer(request, path, body)
        self._send(answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read(self, limit: int | None = None) -> bytes:
        """The request's body, or its first bytes."""
        if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            size = int(self.headers.get('Content-Length', 0))
            return self.rfile.read(size if limit is None else min(size, limit))
        body = b''
        while limit is None or len(body) < limit:
            size = int(self.rfile.readline().split(b';')[0] or b'0', 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                break
        return body

    def _send(self, answer: _Answer) -> None:
        hub, body = self.server.hub, answer.body
        self.request_seen.status = answer.status
        fault = None
        if body and self.command != 'HEAD' and answer.status < 300:
            fault = hub._take(self.request_seen, in_transfer=True)
        if fault is not None:
            hub._closing.wait(fault.delay)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command == 'HEAD':
            return
        if fault is None:
            self.wfile.write(body)
            return
        if fault.corrupt is not None:
            changed = bytearray(body)
            changed[fault.corrupt] ^= 0xFF
            body = bytes(changed)
        cut = fault.cut_after is not None and fault.cut_after < len(body)
        if cut:
            body = body[:fault.cut_after]
        size, pause = fault.drip or (len(body) or 1, 0)
        for start in range(0, len(body), size):
            self.wfile.write(body[start:start + size])
            if hub._closing.wait(pause):
                raise _Cut
        if cut:
            self._cut(fault)

    def _cut(self, fault: _Fault) -> None:
        self.server.hub._closing.wait(fault.hold)
        if fault.reset:  # no lingering: closing sends RST rather than FIN, once nothing else holds the socket
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            self.rfile.close()
            self.wfile.close()
            self.connection.close()
        raise _Cut


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: 'HubServer', cdn: bool):
        self.hub, self.cdn, self.connections = hub, cdn, set()
        super().__init__(('127.0.0.1', 0), _Handler)
        self.url = f'http://127.0.0.1:{self.server_address[1]}'


_ROUTES: list[tuple[str, 're.Pattern', str]] = []


def _route(method: str, pattern: str):
    """Registers a method of HubServer for paths; REPO and REV stand for those parts, which arrive unquoted."""
    pattern = pattern.replace('REPO', '(?P<repo>[^/]+/[^/]+)').replace('REV', '(?P<revision>[^/]+)')

    def register(function):
        _ROUTES.append((method, re.compile(pattern), function.__name__))
        return function

    return register


class HubServer:
    """The server; a context manager.

    Args:
        redirect: Where a request for a large file is sent: 'cdn' (to the second port, without the token), 'absolute' or
            'relative' (both to this one), or None (it is answered at once). May be changed at any time.

    Attributes:
        endpoint: For HF_ENDPOINT and `endpoint=`.
        cdn: The second port's address.
    """

    def __init__(self, redirect: str | None = 'cdn'):
        self.redirect = redirect
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._repositories: dict[str, _Repository] = {}
        self._users: dict[str, _User] = {}
        self._uploaded: dict[str, bytes] = {}
        self._requests: list[Request] = []
        self._faults: list[_Fault] = []
        self._servers = [_Server(self, cdn=False), _Server(self, cdn=True)]
        self.endpoint, self.cdn = (server.url for server in self._servers)

    def __enter__(self) -> 'HubServer':
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stops the server and closes open connections."""
        self._closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
            for connection in list(server.connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def environment(self, home: Any, token: str | None = None, **more: str) -> dict[str, str]:
        """Variables for a subprocess whose Hub this is; `home` is its folder for cache and token."""
        result = {name: value for name, value in os.environ.items()
                  if not name.startswith(('HF_', 'HUGGING')) and name != 'TRANSFORMERS_OFFLINE'}
        local = '127.0.0.1,localhost'
        result.update(HF_ENDPOINT=self.endpoint, HF_HOME=str(home), HF_HUB_DISABLE_XET='1', NO_PROXY=local,
                      no_proxy=local, HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_DISABLE_PROGRESS_BARS='1')
        if token is not None:
            result['HF_TOKEN'] = token
        result.update(more)
        return result

    # what is on the Hub

    def add_token(
            self,
            token: str,
            user: str = 'someone',
            write: bool = True,
            organisations: Sequence[str] | None = None,
    ) -> None:
        """Makes a token valid. It may publish as `user` and for `organisations` (None: for all), if `write`."""
        with self._lock:
            self._users[token] = _User(user, write, None if organisations is None else tuple(organisations))

    def add_repo(self, name: str, private: bool = False, gated: bool = False, token: str | None = None) -> str:
        """Makes a repository, with the file .gitattributes as on the Hub, and returns its first commit.

        A private repository is there for `token` only, a gated one's files are; so they are for tokens that may
        publish there. An unknown `token` becomes a valid one that may not publish.
        """
        with self._lock:
            assert name not in self._repositories, name
            if token is not None and token not in self._users:
                self.add_token(token, 'reader', write=False)
            repo = _Repository(name, private, gated, set() if token is None else {token}, _now())
            self._repositories[name] = repo
            attributes = ''.join(f'*{suffix} filter=lfs diff=lfs merge=lfs -text\n' for suffix in LARGE_SUFFIXES)
            tree = {'.gitattributes': _File(attributes.encode(), False)}
            return self._add_commit(repo, 'main', None, tree, 'initial commit', name.split('/')[0]).id

    def put(self, repo: str, path: str, data: bytes, revision: str = 'main', title: str = 'put') -> str:
        """Commits a file to a branch, makes the repository where it is missing, and returns the commit."""
        with self._lock:
            if repo not in self._repositories:
                self.add_repo(repo)
            repository = self._repositories[repo]
            head = repository.branches[revision]
            tree = {**head.tree, path: _File(bytes(data), _is_large(path, len(data)))}
            return self._add_commit(repository, revision, head, tree, title, 'someone').id

    def tag(self, repo: str, name: str, commit: str | None = None) -> None:
        """Tags a commit, without one the main branch's last."""
        with self._lock:
            repository = self._repositories[repo]
            repository.tags[name] = self._commit_of(repository, commit or 'main')

    def branch(self, repo: str, name: str, commit: str | None = None) -> None:
        """Makes a branch that starts at a commit, without one at the main branch's last."""
        with self._lock:
            repository = self._repositories[repo]
            repository.branches[name] = self._commit_of(repository, commit or 'main')

    def files(self, repo: str, revision: str = 'main') -> dict[str, bytes]:
        """Content by path, .gitattributes included."""
        with self._lock:
            tree = self._commit_of(self._repositories[repo], revision).tree
            return {path: file.data for path, file in sorted(tree.items())}

    def commits(self, repo: str, revision: str = 'main') -> list[tuple[str, str]]:
        """Identifier and title of each commit, the last first."""
        with self._lock:
            return [(commit.id, commit.title) for commit in self._history(self._repositories[repo], revision)]

    # what goes wrong, and what was asked

    def fault(
            self,
            pattern: str,
            *,
            method: str | None = None,
            times: int | None = 1,
            status: int | None = None,
            code: str | None = None,
            message: str | None = None,
            retry_after: int | None = None,
            delay: float = 0,
            drop: bool = False,
            cut_after: int | None = None,
            hold: float = 0,
            reset: bool = False,
            drip: tuple[int, float] | None = None,
            corrupt: int | None = None,
    ) -> _Fault:
        """Lets requests fail whose path matches a pattern (fnmatch, `*` matches slashes too).

        A large file's path is `/org/name/resolve/REVISION/FILE` and, where that redirects, `/cdn/org/name/COMMIT/FILE`.

        Args:
            pattern: Of the unquoted path.
            method: Only these requests. HEAD comes before GET, and counts.
            times: So many requests, or None for all.
            status: Answer with this status,
            code: with this X-Error-Code,
            message: with this message,
            retry_after: and with this Retry-After.
            delay: Wait so many seconds first; alone, the right answer follows.
            drop: Close the connection without an answer.
            cut_after: Close the connection after so many bytes of an answer's body, or of an upload (PUT).
            hold: Before a connection is closed, do nothing for so many seconds.
            reset: Close the connection with RST, like a failing network, rather than FIN, like a server that stops.
            drip: Send the body in pieces of so many bytes and wait so many seconds after each.
            corrupt: Index of a byte of the body that arrives inverted (-1: the last); headers remain as they were.

        `cut_after`, `drip` and `corrupt` wait for an answer with a body, so HEAD and redirects pass and don't count.

        Returns:
            The fault; its `hits` count.
        """
        fault = _Fault(pattern, method, times, status, code, message, retry_after, delay, drop, cut_after, hold, reset,
                       drip, corrupt)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forgets faults and requests."""
        with self._lock:
            self._faults.clear()
            self._requests.clear()

    @property
    def requests(self) -> list[Request]:
        with self._lock:
            return list(self._requests)

    def seen(self, pattern: str = '*', method: str | None = None) -> list[Request]:
        """Returns the requests whose path matches a pattern."""
        return [request for request in self.requests
                if fnmatch.fnmatchcase(request.path, pattern) and method in (None, request.method)]

    def _record(self, request: Request) -> None:
        with self._lock:
            self._requests.append(request)

    def _take(self, request: Request, in_transfer: bool) -> _Fault | None:
        with self._lock:
            for fault in self._faults:
                if (fault.in_transfer == in_transfer and fault.times != 0 and fault.method in (None, request.method)
                        and fnmatch.fnmatchcase(request.path, fault.pattern)):
                    fault.hits += 1
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    # repositories

    def _add_commit(self, repo: _Repository, branch: str, parent: _Commit | None, tree: dict[str, _File], title: str,
                    user: str) -> _Commit:
        state = json.dumps([repo.name, len(repo.commits), parent and parent.id, title,
                            sorted((path, file.blob) for path, file in tree.items())])
        commit = _Commit(hashlib.sha1(state.encode()).hexdigest(), parent, title, user, _now(), tree)
        repo.commits[commit.id] = repo.branches[branch] = commit
        return commit

    def _commit_of(self, repo: _Repository, revision: str) -> _Commit:
        for commits in (repo.branches, repo.tags, repo.commits):
            if revision in commits:
                return commits[revision]
        if len(revision) >= 7:
            for identifier, commit in repo.commits.items():
                if identifier.startswith(revision):
                    return commit
        raise _Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')

    def _history(self, repo: _Repository, revision: str) -> list[_Commit]:
        commit, result = self._commit_of(repo, revision), []
        while commit is not None:
            result.append(commit)
            commit = commit.parent
        return result

    def _user(self, request: Request) -> _User | None:
        if request.token is None:
            return None
        if request.token not in self._users:
            raise _Refusal(401, 'Invalid credentials in Authorization header')
        return self._users[request.token]

    def _repository(self, request: Request, name: str, content: bool = False) -> _Repository:
        """A repository, if this request may know of it, and with `content` have its files."""
        user = self._user(request)
        repo = self._repositories.get(name)
        allowed = repo is not None and (
            request.token in repo.readers or user is not None and user.may_write(name.split('/')[0]))
        if repo is None or repo.private and not allowed:
            # without the code the client would take only https addresses for the Hub's and see a nameless 401
            if user is None:
                raise _Refusal(401, 'Invalid username or password.', 'RepoNotFound')
            raise _Refusal(404, 'Repository not found', 'RepoNotFound')
        if content and repo.gated and not allowed:
            restricted = f'Access to model {name} is restricted'
            if user is None:
                raise _Refusal(401, f'{restricted}. You must have access to it and be authenticated to access it. '
                                    f'Please log in.', 'GatedRepo')
            raise _Refusal(403, f'{restricted} and you are not in the authorized list. Visit '
                                f'https://huggingface.co/{name} to ask for access.', 'GatedRepo')
        return repo

    def _writer(self, request: Request, namespace: str) -> _User:
        user = self._user(request)
        if user is None:
            raise _Refusal(401, 'Invalid username or password.')
        if not user.write:
            raise _Refusal(403, 'Forbidden: you must use a write token to upload to a repository.')
        if not user.may_write(namespace):
            raise _Refusal(403, f'You don\'t have the rights to publish under the namespace "{namespace}"')
        return user

    def _writable(self, request: Request, name: str) -> tuple[_Repository, _User]:
        repo = self._repository(request, name)
        return repo, self._writer(request, name.split('/')[0])

    # answers

    def _answer(self, request: Request, path: str, body: bytes) -> _Answer:
        method = 'GET' if request.method == 'HEAD' else request.method
        for route_method, pattern, name in _ROUTES:
            match = pattern.fullmatch(path)
            if match and route_method == method:
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                with self._lock:
                    try:
                        result = getattr(self, name)(request, body, **parts)
                    except _Refusal as refusal:
                        return refusal.answer
                return result if isinstance(result, _Answer) else _json(result)
        return _Refusal(404, f'This server has no {request.method} {path}').answer

    def _content(self, request: Request, commit: _Commit, file: _File) -> _Answer:
        size = len(file.data)
        headers = {'ETag': f'"{file.etag}"', 'X-Repo-Commit': commit.id, 'Accept-Ranges': 'bytes',
                   'Content-Type': 'application/octet-stream' if file.large else 'text/plain; charset=utf-8'}
        if file.large:
            headers.update({'X-Linked-Etag': f'"{file.etag}"', 'X-Linked-Size': str(size)})
        match = re.fullmatch(r'bytes=(\d*)-(\d*)', request.range or '')
        if not match or not any(match.groups()):
            return _Answer(200, headers, file.data)
        first, last = match.groups()
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= stop:
            return _Refusal(416, 'Range Not Satisfiable', headers={'Content-Range': f'bytes */{size}'}).answer
        headers['Content-Range'] = f'bytes {start}-{stop - 1}/{size}'
        return _Answer(206, headers, file.data[start:stop])

    @_route('GET', '/REPO/resolve/REV/(?P<path>.+)')
    def _resolve(self, request, body, repo, revision, path):
        repository = self._repository(request, repo, content=True)
        commit = self._commit_of(repository, revision)
        file = commit.tree.get(path)
        if file is None:
            raise _Refusal(404, 'Entry not found', 'EntryNotFound', {'X-Repo-Commit': commit.id})
        if not file.large or self.redirect is None:
            return self._content(request, commit, file)
        base = {'cdn': self.cdn, 'absolute': self.endpoint, 'relative': ''}[self.redirect]
        headers = {'Location': f'{base}/cdn/{repo}/{commit.id}/{quote(path)}', 'X-Repo-Commit': commit.id,
                   'X-Linked-Etag': f'"{file.etag}"', 'X-Linked-Size': str(len(file.data)),
                   'Content-Type': 'text/plain; charset=utf-8'}
        return _Answer(302, headers, f'Found. Redirecting to {headers["Location"]}'.encode())

    @_route('GET', '/cdn/REPO/REV/(?P<path>.+)')
    def _cdn(self, request, body, repo, revision, path):
        # whoever has the address may have the file; the Hub's are signed, and the clients send no token there
        repository = self._repositories.get(repo)
        commit = repository and repository.commits.get(revision)
        if not commit or path not in commit.tree:
            raise _Refusal(404, 'Not Found')
        return self._content(request, commit, commit.tree[path])

    @_route('GET', '/api/whoami-v2')
    def _whoami(self, request, body):
        user = self._user(request)
        if user is None:
            raise _Refusal(401, 'Invalid username or password.')
        return {'type': 'user', 'id': user.name, 'name': user.name, 'fullname': user.name, 'isPro': False,
                'orgs': [{'type': 'org', 'id': name, 'name': name, 'fullname': name,
                          'roleInOrg': 'write' if user.write else 'read'} for name in user.organisations or ()],
                'auth': {'type': 'access_token', 'accessToken': {
                    'displayName': 'test', 'role': 'write' if user.write else 'read'}}}

    @_route('GET', '/api/models/REPO(/revision/REV)?')
    def _info(self, request, body, repo, revision='main'):
        repository = self._repository(request, repo)
        commit = self._commit_of(repository, revision)
        siblings = []
        for path, file in sorted(commit.tree.items()):
            sibling: dict[str, Any] = {'rfilename': path}
            if 'blobs' in parse_qs(request.query):
                sibling.update(size=len(file.data), blobId=file.blob)
                if file.large:
                    sibling['lfs'] = {'sha256': file.sha256, 'size': len(file.data), 'pointerSize': len(file.pointer)}
            siblings.append(sibling)
        return {'_id': repo, 'id': repo, 'modelId': repo, 'author': repo.split('/')[0], 'sha': commit.id,
                'createdAt': repository.created, 'lastModified': commit.date, 'private': repository.private,
                'gated': 'manual' if repository.gated else False, 'disabled': False, 'downloads': 0, 'likes': 0,
                'tags': [], 'siblings': siblings}

    @staticmethod
    def _entry(path: str, file: _File) -> dict[str, Any]:
        entry: dict[str, Any] = {'type': 'file', 'oid': file.blob, 'size': len(file.data), 'path': path}
        if file.large:
            entry['lfs'] = {'oid': file.sha256, 'size': len(file.data), 'pointerSize': len(file.pointer)}
        return entry

    @_route('GET', '/api/models/REPO/tree/REV(/(?P<path>.+))?')
    def _tree(self, request, body, repo, revision, path=''):
        tree = self._commit_of(self._repository(request, repo), revision).tree
        recursive = parse_qs(request.query).get('recursive', [''])[0].lower() in ('1', 'true')
        prefix = f'{path.strip("/")}/' if path else ''
        entries: dict[str, dict[str, Any]] = {}
        for name, file in sorted(tree.items()):
            if not name.startswith(prefix):
                continue
            steps = name[len(prefix):].split('/')
            folders = ['/'.join(steps[:depth]) for depth in range(1, len(steps))]
            for folder in folders if recursive else folders[:1]:
                oid = hashlib.sha1(folder.encode()).hexdigest()
                entries[prefix + folder] = {'type': 'directory', 'oid': oid, 'size': 0, 'path': prefix + folder}
            if recursive or not folders:
                entries[name] = self._entry(name, file)
        if prefix and not entries:
            raise _Refusal(404, f'{path} does not exist on "{revision}"', 'EntryNotFound')
        return list(entries.values())

    @_route('POST', '/api/models/REPO/paths-info/REV')
    def _paths(self, request, body, repo, revision):
        tree = self._commit_of(self._repository(request, repo), revision).tree
        return [self._entry(path, tree[path]) for path in parse_qs(body.decode()).get('paths', []) if path in tree]

    @_route('GET', '/api/models/REPO/refs')
    def _refs(self, request, body, repo):
        repository = self._repository(request, repo)
        kinds = {'branches': ('heads', repository.branches), 'tags': ('tags', repository.tags)}
        refs = {kind: [{'name': name, 'ref': f'refs/{folder}/{name}', 'targetCommit': commit.id}
                       for name, commit in commits.items()] for kind, (folder, commits) in kinds.items()}
        return {**refs, 'converts': [], 'pullRequests': []}

    @_route('GET', '/api/models/REPO/commits/REV')
    def _commits(self, request, body, repo, revision):
        return [{'id': commit.id, 'title': commit.title, 'message': '', 'authors': [{'user': commit.user}],
                 'date': commit.date} for commit in self._history(self._repository(request, repo), revision)]

    @_route('GET', '/api/models/REPO/auth-check(?P<write>/write)?')
    def _auth_check(self, request, body, repo, write=None):
        self._repository(request, repo, content=True)
        if write:
            self._writable(request, repo)
        return {}

    @_route('POST', '/api/repos/create')
    def _create(self, request, body):
        wanted = json.loads(body)
        user = self._user(request)
        name = f'{wanted.get("organization") or (user.name if user else "")}/{wanted["name"]}'
        self._writer(request, name.split('/')[0])
        url = f'{self.endpoint}/{name}'
        if wanted.get('type') not in (None, 'model'):
            raise _Refusal(400, 'This server has models only')
        if name in self._repositories:
            raise _Refusal(409, 'You already created this model repo', url=url)
        self.add_repo(name, private=wanted.get('visibility') == 'private' or bool(wanted.get('private')))
        return {'url': url, 'name': name, 'id': name}

    @_route('DELETE', '/api/repos/delete')
    def _delete(self, request, body):
        wanted = json.loads(body)
        user = self._user(request)
        name = f'{wanted.get("organization") or (user.name if user else "")}/{wanted["name"]}'
        self._writable(request, name)
        del self._repositories[name]
        return {}

    @_route('POST', '/api/validate-yaml')
    def _validate(self, request, body):
        if json.loads(body)['content'].startswith('---\n'):
            return {'errors': [], 'warnings': []}
        return {'errors': [], 'warnings': [{'message': 'empty or missing yaml metadata in repo card'}]}

    @_route('POST', '/api/models/REPO/preupload/REV')
    def _preupload(self, request, body, repo, revision):
        repository, _ = self._writable(request, repo)
        tree = self._commit_of(repository, revision).tree
        files = []
        for file in json.loads(body)['files']:
            path = file['path']
            files.append({'path': path, 'uploadMode': 'lfs' if _is_large(path, file['size']) else 'regular',
                          'shouldIgnore': False, **({'oid': tree[path].etag} if path in tree else {})})
        return {'files': files}

    @_route('POST', r'/REPO\.git/info/lfs/objects/batch')
    def _batch(self, request, body, repo):
        self._writable(request, repo)
        objects = []
        for wanted in json.loads(body)['objects']:
            item = {'oid': wanted['oid'], 'size': wanted['size'], 'authenticated': True}
            if wanted['oid'] not in self._uploaded:
                item['actions'] = {'upload': {'href': f'{self.cdn}/upload/{wanted["oid"]}', 'header': {}},
                                   'verify': {'href': f'{self.endpoint}/api/models/{repo}/verify', 'header': {}}}
            objects.append(item)
        return {'transfer': 'basic', 'objects': objects}

    @_route('PUT', '/upload/(?P<oid>[0-9a-f]{64})')
    def _upload(self, request, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refusal(400, 'The content does not have the digest that was announced')
        self._uploaded[oid] = body
        return _Answer()

    @_route('POST', '/api/models/REPO/verify')
    def _verify(self, request, body, repo):
        self._writable(request, repo)
        wanted = json.loads(body)
        if len(self._uploaded.get(wanted['oid'], b'')) != wanted['size']:
            raise _Refusal(404, 'No such upload')
        return {}

    @_route('GET', '/api/models/REPO/xet-(?P<kind>read|write)-token/REV')
    def _xet(self, request, body, repo, kind, revision):
        raise _Refusal(404, 'This server has no Xet storage: set HF_HUB_DISABLE_XET=1')

    @_route('POST', '/api/models/REPO/commit/REV')
    def _commit(self, request, body, repo, revision):
        repository, user = self._writable(request, repo)
        if 'create_pr' in parse_qs(request.query):
            raise _Refusal(403, 'This server has no pull requests')
        head = repository.branches.get(revision)
        if head is None:
            raise _Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        header, *operations = [json.loads(line) for line in body.split(b'\n') if line.strip()]
        if header['value'].get('parentCommit') not in (None, head.id):
            raise _Refusal(412, 'A commit has happened since. Please refresh and try again.')
        tree = dict(head.tree)
        for operation in operations:
            key, value = operation['key'], operation['value']
            path = value['path']
            if key == 'file':
                tree[path] = _File(base64.b64decode(value['content']), False)
            elif key == 'lfsFile':
                if value['oid'] not in self._uploaded:
                    raise _Refusal(400, 'Your push was rejected because an LFS pointer pointed to a file that does not '
                                        'exist.')
                tree[path] = _File(self._uploaded[value['oid']], True)
            elif key in ('deletedFile', 'deletedFolder'):
                gone = [name for name in tree if name == path or (
                    key == 'deletedFolder' and name.startswith(f'{path.rstrip("/")}/'))]
                if not gone:
                    raise _Refusal(404, "A file with this name doesn't exist", 'EntryNotFound')
                for name in gone:
                    del tree[name]
            else:
                raise _Refusal(400, f'This server has no operation {key}')
        commit = self._add_commit(repository, revision, head, tree, header['value']['summary'], user.name)
        return {'success': True, 'commitOid': commit.id, 'commitUrl': f'{self.endpoint}/{repo}/commit/{commit.id}',
                'hookOutput': ''}

    @_route('POST', '/api/models/REPO/tag/REV')
    def _make_tag(self, request, body, repo, revision):
        repository, _ = self._writable(request, repo)
        commit, name = self._commit_of(repository, revision), json.loads(body)['tag']
        if name in repository.tags:
            raise _Refusal(409, f'Tag reference exists already: {name}')
        repository.tags[name] = commit
        return {}

    @_route('POST', '/api/models/REPO/branch/REV')
    def _make_branch(self, request, body, repo, revision):
        repository, _ = self._writable(request, repo)
        if revision in repository.branches:
            raise _Refusal(409, f'Reference already exists: {revision}')
        start = (json.loads(body or b'{}') or {}).get('startingPoint') or 'main'
        repository.branches[revision] = self._commit_of(repository, start)
        return {}

    @_route('DELETE', '/api/models/REPO/(?P<kind>tag|branch)/REV')
    def _delete_reference(self, request, body, repo, kind, revision):
        repository, _ = self._writable(request, repo)
        references = repository.tags if kind == 'tag' else repository.branches
        if revision not in references:
            raise _Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        if kind == 'branch' and revision == 'main':
            raise _Refusal(403, 'The main branch cannot be deleted')
        del references[revision]
        return {}
