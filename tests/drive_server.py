"""Google Drive on 127.0.0.1 for tests, as far as downloads go; the client is gdown as it is.

    with DriveServer(tmp_path) as drive:
        drive.put('the-id', content)
        drive.page = 'confirm'
        subprocess.run([...], env={**os.environ, **drive.environment})
        assert drive.seen(host=drive.CONTENT)

It is a proxy: clients ask it to CONNECT to drive.google.com, and it answers in that host's name, with a certificate
that `environment` makes them trust. Other hosts are refused, and noted: a test sees whoever else was asked. What is
asked directly, without the proxy, is a mirror with plain files, at `mirror`. Needs the program openssl.
"""
import contextlib
import dataclasses
import email.utils
import hashlib
import importlib.util
import pathlib
import re
import shutil
import socket
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ['DriveServer', 'missing']

FRONT, CONTENT = 'drive.google.com', 'drive.usercontent.google.com'
MODIFIED = email.utils.formatdate(1_590_000_000, usegmt=True)  # the files are of May 2020

PAGE = '<!DOCTYPE html><html><head><title>Google Drive - {title}</title></head><body>\n{body}\n</body></html>'
HIDDEN = ''.join(f'<input type="hidden" name="{name}" value="{value}">' for name, value in dict(
    id='ID', export='download', confirm='t', uuid='8f-27').items())
CONFIRM = PAGE.format(title='Virus scan warning', body=f'''<p class="uc-warning-caption">Too large to scan.</p>
<form id="download-form" action="https://{CONTENT}/download" method="get">{HIDDEN}<input type="submit"></form>''')
QUOTA = PAGE.format(title='Quota exceeded', body='''<p class="uc-error-caption">Sorry, you can't view or download this
file at this time.</p>
<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p>''')
PAGES = {'confirm': CONFIRM, 'quota': QUOTA, 'other': PAGE.format(title='Sign in', body='Sign in to continue')}


def missing() -> str:
    """Returns what tests with this server need and is not installed; '' if nothing is missing."""
    if importlib.util.find_spec('gdown') is None:
        return 'gdown is not installed'
    return '' if shutil.which('openssl') else 'needs the program openssl'


@dataclasses.dataclass
class Request:
    host: str  # 'mirror' for those without the proxy
    path: str
    query: dict[str, str]
    range: str | None
    cookie: str | None
    status: int = 0
    sent: int = 0  # bytes of the body


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    server: '_Server'
    host = 'mirror'

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(OSError):
            super().handle()

    def do_CONNECT(self):
        drive = self.server.drive
        host = self.path.partition(':')[0]
        if host not in (FRONT, CONTENT):
            drive.note(Request(host, '', {}, None, None, 403))
            self.send_error(403)
            return
        self.send_response(200, 'Connection established')
        self.end_headers()
        self.host = host
        self.connection = drive.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile('rb'), self.connection.makefile('wb', 0)
        self.close_connection = False

    def do_GET(self):
        drive, parts = self.server.drive, urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.seen = Request(
            self.host, unquote(parts.path), query, self.headers.get('Range'), self.headers.get('Cookie'))
        drive.note(self.seen)
        drive.closing.wait(drive.delay)
        if drive.status:
            self._text(drive.status, 'in trouble')
        elif self.host == 'mirror':
            content = drive.mirrored.get(self.seen.path.lstrip('/'))
            self._text(drive.lacking, 'not found') if content is None else self._file(content, None)
        else:
            self._drive(query)

    def _drive(self, query):
        drive, file = self.server.drive, query.get('id', '')
        if file not in drive.files:
            self._text(404, PAGES['other'])
        elif self.host == FRONT and drive.redirect:
            self.send_response(303)
            self.send_header('Location', f'https://{CONTENT}/download?id={file}&export=download')
            self.send_header('Content-Length', '0')
            self.end_headers()
        elif drive.page == 'confirm' and self.host == CONTENT and query.get('confirm') == drive.word:
            self._file(drive.files[file], 'model_best.pth')
        elif drive.page:
            self._text(200, PAGES[drive.page].replace('"ID"', f'"{file}"'))
        else:
            self._file(drive.files[file], 'model_best.pth')

    def _text(self, status: int, text: str) -> None:
        self._begin(status, {'Content-Type': 'text/html; charset=utf-8', 'Set-Cookie': 'NID=1; path=/'}, len(text))
        self.wfile.write(text.encode())

    def _begin(self, status: int, headers: dict[str, str], length: int) -> None:
        self.seen.status = status
        self.send_response(status)
        for name, value in {**headers, 'Content-Length': str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def _file(self, content: bytes, name: str | None) -> None:
        drive, start = self.server.drive, 0
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        headers = {'Content-Type': 'application/octet-stream', 'Last-Modified': MODIFIED, 'ETag': tag}
        if name:
            headers['Content-Disposition'] = f'attachment; filename="{name}"'
        wanted = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or '')
        if wanted and drive.ranges and self.headers.get('If-Range', tag) in (tag, MODIFIED):
            start = int(wanted[1])
            headers['Content-Range'] = f'bytes {start}-{len(content) - 1}/{len(content)}'
        body = content[start:]
        self._begin(206 if start else 200, headers, len(body))
        end = drive.end_of(start, len(body))
        for at in range(0, end, drive.step):
            piece = body[at:min(at + drive.step, end)]
            self.wfile.write(piece)
            self.seen.sent += len(piece)
            if drive.pause and drive.closing.wait(drive.pause):
                break
        if end < len(body):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, drive: 'DriveServer'):
        self.drive = drive
        super().__init__(('127.0.0.1', 0), _Handler)


class DriveServer:
    """The server; a context manager. Its attributes may be changed at any time.

    Args:
        folder: For its certificate and the clients' home.

    Attributes:
        redirect: Whether drive.google.com sends clients on to drive.usercontent.google.com, as it does.
        word: That the file comes for after a page 'confirm', whose form says 't'.
        page: What comes instead of a file: 'confirm', after which the file does come; 'quota'; 'other'; or None.
        ranges: Whether the server goes on from where a client asks it to.
        cut_after, cuts: The connection ends at this byte of a file, so many times.
        step, pause: How many bytes come at a time, and seconds between them.
        delay: Seconds before any answer.
        status: Of every answer, if not 0.
        lacking: Status of what the mirror does not have.
        mirrored: The mirror's files, by path.
        environment: Variables that bring a client here.
    """
    FRONT, CONTENT = FRONT, CONTENT

    def __init__(self, folder: pathlib.Path):
        self.redirect, self.page, self.ranges, self.status, self.lacking = True, None, True, 0, 404
        self.word = 't'
        self.cut_after, self.cuts, self.step, self.pause, self.delay = 0, 0, 1 << 16, 0., 0.
        self.files: dict[str, bytes] = {}
        self.mirrored: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        key, certificate = folder / 'key.pem', folder / 'certificate.pem'
        subprocess.run(
            ['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days',
             '2', '-subj', '/CN=test', '-addext', f'subjectAltName=DNS:{FRONT},DNS:{CONTENT}', '-keyout', str(key),
             '-out', str(certificate)], check=True, capture_output=True)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(certificate, key)
        self._server = _Server(self)
        self.mirror = f'http://127.0.0.1:{self._server.server_address[1]}'
        self.environment = dict(
            HTTPS_PROXY=self.mirror, https_proxy=self.mirror, REQUESTS_CA_BUNDLE=str(certificate),
            NO_PROXY='127.0.0.1', no_proxy='127.0.0.1', HOME=str(folder / 'home'))

    def __enter__(self) -> 'DriveServer':
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def put(self, drive_id: str, content: bytes) -> None:
        self.files[drive_id] = content

    def note(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def end_of(self, start: int, length: int) -> int:
        """Returns how many of `length` bytes from offset `start` are sent before the connection ends."""
        with self._lock:
            if not self.cuts:
                return length
            self.cuts -= 1
            return min(length, max(self.cut_after - start, 0))

    def seen(self, **fields: Any) -> list[Request]:
        """Returns the requests with these fields."""
        with self._lock:
            return [request for request in self.requests
                    if all(getattr(request, name) == value for name, value in fields.items())]
