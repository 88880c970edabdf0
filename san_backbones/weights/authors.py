"""Gets pretrained weights from the files that the authors of SAN published.

The manifest has their Google Drive ids. On first use a file is downloaded with gdown, or from the mirror that
SAN_BACKBONES_AUTHORS_URL names, read as tensors only, checked against the model, converted, and kept in `cache_folder`:
model.safetensors, and provenance.json with its origin, date and both digests. Later calls load it from there. While one
process gets a file, others that need it wait.

If the manifest pins no digest, the first file is taken on trust; another file for the same model is then an error.
"""
import contextlib
import datetime
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock, tqdm

from .. import hub
from .._requirements import check_pickles
from .._version import __version__
from ..hub import AUTHORS_VARIABLE, CACHE_VARIABLE, MIRROR_VARIABLE, Unavailable, WeightsError
from . import common

__all__ = ['PROVENANCE', 'Source', 'cache_folder', 'cached', 'check_trust', 'download', 'explain_disk_errors',
           'find_in_folder', 'provenance', 'refusal', 'weights']

PROVENANCE = 'provenance.json'
DRIVE = 'https://drive.google.com'
CONNECTION = 10  # seconds to connect
PATIENCE = 60  # seconds without data
FIRST_BYTE = 300  # seconds until the file starts, including all web pages before it
RETRIES = 3  # of a broken connection
STARTS = 3  # from the first byte, if the server cannot resume
FRESH = 24 * 60 * 60  # seconds; an older partial file may belong to another version of the file

_logger = logging.getLogger('san_backbones.hub')


class Source(NamedTuple):
    """An authors' file on this machine, and where it came from."""
    path: pathlib.Path
    origin: str
    ours: bool  # we downloaded it, so it may be removed


# --- The cache -------------------------------------------------------------------------------------------------------

def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Returns the folder of converted weights, which has a subfolder for each model.

    Args:
        cache_dir: Its parent, instead of huggingface_hub's cache or the folder that SAN_BACKBONES_CACHE names.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if cache_dir is None and named:
        return pathlib.Path(named).expanduser()
    return pathlib.Path(cache_dir or constants.HF_HOME).expanduser() / 'san-backbones'


def refusal(folder: str | os.PathLike[str] | None = None) -> str | None:
    """Says why the authors' files are not requested now; None if they are.

    Args:
        folder: Where the file was searched, for the message; default `cache_folder()`.
    """
    if hub.authors_off():
        return f"{AUTHORS_VARIABLE}={os.environ[AUTHORS_VARIABLE]} turns the authors' files off"
    if constants.HF_HUB_OFFLINE and not os.path.isdir(_mirror() or ''):
        return f'offline mode is on (HF_HUB_OFFLINE) and it is not in the cache ({folder or cache_folder()})'
    return None


def provenance(model: str, cache_dir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Reads what was recorded when the authors' file was converted; {} if it was not.

    Raises:
        WeightsError: provenance.json cannot be read.
    """
    return _read_note(cache_folder(cache_dir) / model)


def _read_note(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / PROVENANCE
    try:
        with explain_disk_errors(folder):
            note = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
        if path.is_file():
            for key in ('origin', 'date', 'sha256', 'source_sha256', 'pinned', 'authors'):  # required by callers
                note[key]
        return note
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f'{path} cannot be read ({error}); expected what was noted there when the weights were '
                           f'converted. Remove {folder} to get them anew') from error


@contextlib.contextmanager
def explain_disk_errors(folder: pathlib.Path, named_by: str = CACHE_VARIABLE) -> Iterator[None]:
    """Turns errors of the disk into a WeightsError that says what to do.

    Args:
        folder: The folder in use.
        named_by: The variable or option with which the user can choose another.
    """
    try:
        yield
    except OSError as error:
        raise WeightsError(f'{_disk(error, folder)}; make room or give rights there, or name another folder '
                           f'({named_by})') from error


def _disk(error: OSError, folder: pathlib.Path) -> str:
    if error.errno in hub.FULL:
        return f'the disk with the cache ({folder}) is full'
    return f'the cache ({folder}) cannot be read or written ({error})'


def cached(model: str, cache_dir: str | os.PathLike[str] | None = None) -> pathlib.Path | None:
    """Returns the kept converted weights, checked; None if there are none. Does not use the network.

    Raises:
        WeightsError: The file cannot be read; or it differs from what was converted or from the manifest, and was
            removed.
    """
    folder = cache_folder(cache_dir) / model
    path = folder / hub.FILENAME
    with explain_disk_errors(folder):
        if not path.is_file():
            return None
    note, entry = _read_note(folder), hub.manifest()[model]
    if not note:
        return None
    origin = f"the authors' file ({note['origin']})"
    try:
        hub.check(path, model, origin, note['sha256'], PROVENANCE)
        if entry['source_sha256'] not in (None, note['source_sha256']):
            raise WeightsError(f'{path} was made of {origin} with the SHA-256 {note["source_sha256"]}; the manifest '
                               f'now pins {entry["source_sha256"]}.')
        if entry['sha256'] not in (None, note['sha256']):
            raise WeightsError(f'{path} has the SHA-256 {note["sha256"]}; the manifest now pins {entry["sha256"]}.')
    except WeightsError as error:
        raise hub.discard(error, path) from error
    return path


# --- First use -------------------------------------------------------------------------------------------------------

def weights(model: str, cache_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Returns the converted weights of a model: from the cache, or by getting and converting the authors' file.

    Args:
        model: Name and tag, such as 'san15_patchwise.in1k', of a model in the manifest with an authors' file.
        cache_dir: Parent of the cache folder, see `cache_folder`.

    Raises:
        Unavailable: The file is not available; the message says from where, why, and what to do.
        WeightsError: It is not the authors' file for the model, cannot be kept, or torch is too old to read it safely.
    """
    folder = cache_folder(cache_dir) / model
    path = None if hub.authors_off() else cached(model, cache_dir)
    if path is not None:
        shutil.rmtree(folder / 'partial', ignore_errors=True)  # left by a process that was killed after converting
        return path
    reason = refusal(cache_folder(cache_dir))
    if reason is not None:
        hub_too = ', nobody has published them on the Hub yet' if hub.known_unpublished(model) else ''
        raise Unavailable(f"the weights of {model} are not here{hub_too}, and their authors' file is not asked for: "
                          f'{reason}', model)
    try:
        check_pickles(f"reading the authors' file of {model}")
    except ImportError as error:
        raise WeightsError(f'{error}. {hub.ways_out(model)}') from None
    with explain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / '.lock'):  # a process that waited finds the file in the cache
            return cached(model, cache_dir) or _first_use(model, hub.manifest()[model], folder)


def _first_use(model: str, entry: Mapping[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """Gets, checks, converts and keeps the authors' file in a locked folder."""
    from . import card, convert
    source = download(model, entry, folder / 'partial')
    note = _read_note(folder)
    try:
        found = hub.digest(source.path)
        check_trust(note, entry, found, folder)
        content = convert.read(source.path, mmengine=False)
        if not convert.is_the_authors(content):
            raise WeightsError("it is a checkpoint, but not in the authors' format (no conv_in.weight): convert your "
                               'own trainings with san-backbones weights convert')
        converted = convert.released(content, source.path, model, entry, found)
    except WeightsError as error:
        problem = str(error).rstrip('.')
        wrong = WeightsError(f"{source.origin} is not the authors' file of {model}: {problem}.")
        raise (hub.discard(wrong, source.path) if source.ours else wrong) from error
    note = dict(
        model=model, origin=source.origin, source_sha256=found, source_bytes=source.path.stat().st_size,
        sha256=hashlib.sha256(converted).hexdigest(), license=entry['license'], authors=card.AUTHORS,
        pinned=entry['source_sha256'] is not None, date=datetime.date.today().isoformat(), san_backbones=__version__)
    try:
        common.replace_files(folder, {PROVENANCE: json.dumps(note, indent=2).encode(), hub.FILENAME: converted})
    except WeightsError as error:
        raise WeightsError(f'{error} ({CACHE_VARIABLE})') from error
    shutil.rmtree(folder / 'partial', ignore_errors=True)
    if not note['pinned']:
        _logger.warning(
            "%s: the authors' file (%s, licence %s) is taken on trust, since its digest is not known yet. Its SHA-256 "
            'is %s, noted in %s; another file will be an error', model, source.origin, entry['license'], found,
            folder / PROVENANCE)
    return folder / hub.FILENAME


def check_trust(note: Mapping[str, Any], entry: Mapping[str, Any], found: str, folder: pathlib.Path) -> None:
    """Checks that an unpinned file is the one that was taken on trust earlier, if any was.

    Args:
        note: As `provenance` returns it.
        entry: The model's entry in the manifest.
        found: SHA-256 of the file.
        folder: The folder of provenance.json.

    Raises:
        WeightsError: It is another file. The caller puts the file's name before the message.
    """
    if entry['source_sha256'] is None and note and note['source_sha256'] != found:
        raise WeightsError(f'its SHA-256 is {found}, and the file taken on trust on {note["date"]}, from '
                           f'{note["origin"]}, had {note["source_sha256"]}. If you trust the new one, remove '
                           f'{folder / PROVENANCE}')


# --- The file --------------------------------------------------------------------------------------------------------

def _mirror() -> str | None:
    named = os.environ.get(MIRROR_VARIABLE)
    return os.path.expanduser(named) if named else None


def _names(model: str, entry: Mapping[str, Any]) -> list[str]:
    """Returns the paths where a mirror may have a model's file."""
    names = (model.partition('.')[0], model)
    return [path for name in names for path in (f'{name}/{entry["source_file"]}', f'{name}.pth')]


def find_in_folder(folder: pathlib.Path, model: str, entry: Mapping[str, Any]) -> pathlib.Path:
    """Finds a model's file in a folder with the authors' files.

    Raises:
        Unavailable: It is not there.
    """
    for name in _names(model, entry):
        if (folder / name).is_file():
            return folder / name
    expected = ' or '.join(str(folder / name) for name in _names(model, entry)[:2])
    raise Unavailable(f'{folder} has no file for {model}; expected {expected}', model)


def download(model: str, entry: Mapping[str, Any], folder: pathlib.Path, named_by: str = CACHE_VARIABLE) -> Source:
    """Gets the authors' file from the mirror that the environment names, else from Google Drive.

    Args:
        model: Name and tag.
        entry: The model's entry in the manifest.
        folder: Where to download to. Complete files from an earlier call are used, partial ones are resumed; but if no
            digest is pinned, parts older than a day are dropped, since the file may have changed.
        named_by: The variable or option with which the user can choose another folder, for messages.

    Raises:
        Unavailable: It is not available.
        WeightsError: The folder cannot be written to.
    """
    mirror = _mirror()
    if mirror is None:
        urls = [f'{DRIVE}/uc?id={entry["drive_id"]}']
    elif re.match('https?://', mirror, re.IGNORECASE):
        urls = [f'{mirror.rstrip("/")}/{name}' for name in _names(model, entry)]
    elif os.path.isdir(mirror):
        path = find_in_folder(pathlib.Path(mirror), model, entry)
        return Source(path, str(path), False)
    else:
        raise Unavailable(f'{MIRROR_VARIABLE} names {hide_passwords(mirror)!r}, which is neither a folder nor begins '
                          'with http:// or https://', model)
    with explain_disk_errors(folder, named_by):
        folder.mkdir(parents=True, exist_ok=True)
    problem = f'{hide_passwords(mirror or DRIVE)} has no file for {model}; asked for {hide_passwords(", ".join(urls))}'
    for url in urls:
        # named by its source, so that parts of different sources are not joined
        path = folder / f'{hashlib.sha256(url.encode()).hexdigest()[:8]}-{entry["source_file"]}'
        try:
            with explain_disk_errors(folder, named_by):
                if entry['source_sha256'] is None:
                    _remove_parts(path, older_than=FRESH)
                if path.is_file() or _fetch(url, path, f"{model}, the authors' file"):
                    return Source(path, hide_passwords(url), True)
        except _Refused as error:
            remedy = '' if mirror or isinstance(error, _Unreachable) else (
                f'. In a browser it is {DRIVE}/file/d/{entry["drive_id"]}/view. A quota there can last a day: wait, or '
                f'use a Google account (gdown --cookies-from-browser firefox {entry["drive_id"]} leaves cookies that '
                'are used here too), or a mirror')
            problem = hide_passwords(f"cannot get the authors' file of {model} from {url}: {error}") + remedy
            if not isinstance(error, _Forbidden):
                break
    raise Unavailable(problem, model)  # not chained: the cause contains the address with its password


class _Refused(Exception):
    """The server sent something else than the file; the message says what."""


class _Forbidden(_Refused):
    """The server answered 403, as some do for files that they do not have."""


class _Unreachable(_Refused):
    """There is no way to the server; the message says why."""


def hide_passwords(text: str) -> str:
    """Removes passwords from the addresses in a text."""
    return re.sub(r'//[^/\s]*@', '//', text)


def _check_network(url: str) -> None:
    """Raises _Unreachable where the server has no address here, for which gdown would try again for seconds."""
    if urllib.request.getproxies():  # which look the address up
        return
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None)
    except OSError as error:
        raise _Unreachable(f'the server cannot be reached ({error.strerror})') from error


def _fetch(url: str, path: pathlib.Path, title: str) -> bool:
    """Downloads a file, resuming from a part beside `path`; returns False if the server does not have the file.

    Raises:
        _Forbidden: The server answered 403.
        _Refused: The server sent something else, or nothing.
        OSError: The disk is full or cannot be written.
    """
    try:
        import gdown
        from gdown.exceptions import DownloadCancelled, DownloadError, FileURLRetrievalError
        from requests import HTTPError, RequestException
    except ImportError as error:
        raise _Refused(f"gdown, which downloads it, is not installed ({error}): pip install 'gdown>=6.4'") from error
    _check_network(url)
    for _ in range(STARTS):
        late = threading.Event()
        watch = threading.Timer(FIRST_BYTE, late.set)  # gdown follows web pages without a limit
        watch.daemon = True
        watch.start()
        try:
            with tqdm(desc=title, unit='B', unit_scale=True) as bar:
                def progress(done: int, total: int | None, bar: Any = bar, watch: Any = watch) -> None:
                    watch.cancel()
                    bar.total = total
                    bar.update(done - bar.n)
                gdown.download(url, str(path), quiet=True, resume=True, timeout=(CONNECTION, PATIENCE),
                               retries=RETRIES, progress=progress, cancel=late)
            return True
        except DownloadCancelled as error:
            raise _Refused(f'no file came within {FIRST_BYTE} s, only web pages or nothing') from error
        except FileURLRetrievalError as error:
            said = re.search('Failed to retrieve file url:(.*)You may still', str(error), re.DOTALL)
            words = ' '.join((said[1] if said else str(error)).split()).rstrip('.')
            raise _Refused(f'a web page came instead, which says: {words}') from error
        except DownloadError as error:
            # else the network is fine, but the server cannot resume from the end of the part
            if error.__cause__ is not None or 'is incomplete' in str(error):
                what = 'the download broke off' if watch.finished.is_set() else 'the server cannot be reached'
                kept = '; what came is kept: run again' if any(part.stat().st_size for part in _parts(path)) else ''
                raise _Refused(f'{what} ({error}){kept}') from error
            _remove_parts(path)
        except HTTPError as error:
            status = None if error.response is None else error.response.status_code
            if status in (404, 410):
                return False
            raise (_Forbidden if status == 403 else _Refused)(f'the server refused ({error})') from error
        except (RequestException, ConnectionError, TimeoutError) as error:
            raise _Refused(f'the server cannot be reached ({type(error).__name__}: {error})') from error
        except OSError as error:
            if error.errno is None:  # from requests: a file that the environment names is missing
                raise _Refused(f'the download cannot begin ({error})') from error
            if error.errno in hub.FULL:  # free the disk: with it full the download cannot be resumed
                _remove_parts(path)
            raise
        except (KeyError, TypeError, ValueError, AssertionError) as error:  # an answer that gdown does not expect
            raise _Refused(f'the server gave an answer that is not understood ({type(error).__name__}: {error})'
                           ) from error
        finally:
            watch.cancel()
    raise _Refused(f'the download broke off, and the server does not go on from there ({STARTS} times)')


def _parts(path: pathlib.Path) -> Iterator[pathlib.Path]:
    return path.parent.glob(f'{path.name}*.part')


def _remove_parts(path: pathlib.Path, older_than: float | None = None) -> None:
    for part in _parts(path):
        if older_than is None or time.time() - part.stat().st_mtime > older_than:
            part.unlink()
