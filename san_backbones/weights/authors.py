"""The files that the authors of SAN published, as a source of pretrained weights.

The manifest names them by their ids on Google Drive. On first use a file is downloaded with gdown, or taken from the
mirror that SAN_BACKBONES_AUTHORS_URL names, read as tensors only, checked against the model, converted, and kept in
`cache_folder` as model.safetensors beside provenance.json: where it came from, when, and both digests. From then on it
is loaded from there. Processes that want the same file wait for the one that gets it.

A file whose digest the manifest does not pin is taken on trust, once: another file for the same model is then an error.
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
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock, tqdm

from .. import hub
from .._requirements import check_pickles
from .._version import __version__
from ..hub import AUTHORS_VARIABLE, CACHE_VARIABLE, MIRROR_VARIABLE, Unavailable, WeightsError
from . import common

__all__ = ['PROVENANCE', 'Source', 'cache_folder', 'cached', 'check_trust', 'download', 'explained', 'provenance',
           'provided', 'refusal', 'weights']

PROVENANCE = 'provenance.json'
DRIVE = 'https://drive.google.com'
CONNECTION = 10  # seconds until an address answers at all
PATIENCE = 60  # seconds without a byte
FIRST_BYTE = 300  # seconds until the file begins, over all pages before it
RETRIES = 3  # of a connection that breaks off
STARTS = 3  # from the first byte, where the server cannot go on
FRESH = 24 * 60 * 60  # seconds; an older part may be of another version of the file

_logger = logging.getLogger('san_backbones.hub')


class Source(NamedTuple):
    """A file of the authors' on this machine, and where it came from."""
    path: pathlib.Path
    origin: str
    ours: bool  # downloaded, to be removed once it is converted


# --- What is here ----------------------------------------------------------------------------------------------------

def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Where converted weights are kept, a folder for each model.

    Args:
        cache_dir: Below which, instead of the folder that SAN_BACKBONES_CACHE names or that of huggingface_hub.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if cache_dir is None and named:
        return pathlib.Path(named).expanduser()
    return pathlib.Path(cache_dir or constants.HF_HOME).expanduser() / 'san-backbones'


def refusal(place: str | os.PathLike[str] | None = None) -> str | None:
    """Why the authors' files are not asked for now, in words; None if they are.

    Args:
        place: Where the file was looked for, for the message, instead of `cache_folder()`.
    """
    if hub.authors_off():
        return f"{AUTHORS_VARIABLE}={os.environ[AUTHORS_VARIABLE]} turns the authors' files off"
    if constants.HF_HUB_OFFLINE and not os.path.isdir(_mirror() or ''):
        return f'offline mode is on (HF_HUB_OFFLINE) and it is not in the cache ({place or cache_folder()})'
    return None


def provenance(model: str, cache_dir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """What was noted of the authors' file when it was converted; {} where it never was.

    Raises:
        WeightsError: The note cannot be read.
    """
    return _note(cache_folder(cache_dir) / model)


def _note(place: pathlib.Path) -> dict[str, Any]:
    path = place / PROVENANCE
    try:
        with explained(place):
            note = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
        if path.is_file():
            for key in ('origin', 'date', 'sha256', 'source_sha256', 'pinned', 'authors'):  # which others rely on
                note[key]
        return note
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f'{path} cannot be read ({error}); expected what was noted there when the weights were '
                           f'converted. Remove {place} to get them anew') from error


@contextlib.contextmanager
def explained(place: pathlib.Path, named_by: str = CACHE_VARIABLE) -> Iterator[None]:
    """Turns what the disk refuses into an error in words.

    Args:
        place: The folder at hand.
        named_by: The variable or option that names another.
    """
    try:
        yield
    except OSError as error:
        raise WeightsError(f'{_disk(error, place)}; make room or give rights there, or name another folder '
                           f'({named_by})') from error


def _disk(error: OSError, place: pathlib.Path) -> str:
    if error.errno in hub.FULL:
        return f'the disk with the cache ({place}) is full'
    return f'the cache ({place}) cannot be read or written ({error})'


def cached(model: str, cache_dir: str | os.PathLike[str] | None = None) -> pathlib.Path | None:
    """The converted weights, checked; None if they are not here. Asks no network.

    Raises:
        WeightsError: What is here is not what was converted, or not what the manifest pins, and it is removed; or it
            cannot be read.
    """
    place = cache_folder(cache_dir) / model
    path = place / hub.FILENAME
    with explained(place):
        if not path.is_file():
            return None
    note, entry = _note(place), hub.manifest()[model]
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
    """The converted weights of a model: from the cache, else made of the authors' file now.

    Args:
        model: Name and tag, such as 'san15_patchwise.in1k'; one of the manifest's with a file of the authors.
        cache_dir: Below which to keep them, as in `cache_folder`.

    Raises:
        Unavailable: The file cannot be had; the message says from where, why, and what to do.
        WeightsError: It is not the authors' file for the model, cannot be kept, or torch is too old to read it safely.
    """
    place = cache_folder(cache_dir) / model
    path = None if hub.authors_off() else cached(model, cache_dir)
    if path is not None:
        shutil.rmtree(place / 'partial', ignore_errors=True)  # of a process that was killed once it was done
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
    with explained(place):
        place.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(place / '.lock'):  # whoever waited finds what the other made
            return cached(model, cache_dir) or _first_use(model, hub.manifest()[model], place)


def _first_use(model: str, entry: Mapping[str, Any], place: pathlib.Path) -> pathlib.Path:
    """Gets, checks, converts and keeps the authors' file, in a folder where no other process is."""
    from . import card, convert
    source = download(model, entry, place / 'partial')
    note = _note(place)
    try:
        found = hub.digest(source.path)
        check_trust(note, entry, found, place)
        content = convert.read(source.path, mmengine=False)
        if not convert.is_the_authors(content):
            raise WeightsError("it is a checkpoint, but not in the authors' format (no conv_in.weight): a training of "
                               'your own goes through san-backbones weights convert')
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
        common.replace_files(place, {PROVENANCE: json.dumps(note, indent=2).encode(), hub.FILENAME: converted})
    except WeightsError as error:
        raise WeightsError(f'{error} ({CACHE_VARIABLE})') from error
    shutil.rmtree(place / 'partial', ignore_errors=True)
    if not note['pinned']:
        _logger.warning(
            "%s: the authors' file (%s, licence %s) is taken on trust, for no digest of it is known yet. Its SHA-256 "
            'is %s, noted in %s; another file will be an error', model, source.origin, entry['license'], found,
            place / PROVENANCE)
    return place / hub.FILENAME


def check_trust(note: Mapping[str, Any], entry: Mapping[str, Any], found: str, place: pathlib.Path) -> None:
    """Makes sure that a file that the manifest does not pin is the one that was taken on trust, if one was.

    Args:
        note: As `provenance` gives it.
        entry: The manifest's.
        found: SHA-256 of the file.
        place: The folder with the note.

    Raises:
        WeightsError: It is another; the message is to follow one that names the file.
    """
    if entry['source_sha256'] is None and note and note['source_sha256'] != found:
        raise WeightsError(f'its SHA-256 is {found}, and the file taken on trust on {note["date"]}, from '
                           f'{note["origin"]}, had {note["source_sha256"]}. If you trust the new one, remove '
                           f'{place / PROVENANCE}')


# --- The file --------------------------------------------------------------------------------------------------------

def _mirror() -> str | None:
    named = os.environ.get(MIRROR_VARIABLE)
    return os.path.expanduser(named) if named else None


def _names(model: str, entry: Mapping[str, Any]) -> list[str]:
    """Where a mirror may have a model's file, from its root."""
    names = (model.partition('.')[0], model)
    return [place for name in names for place in (f'{name}/{entry["source_file"]}', f'{name}.pth')]


def provided(folder: pathlib.Path, model: str, entry: Mapping[str, Any]) -> pathlib.Path:
    """A model's file in a folder that has the authors' files.

    Raises:
        Unavailable: It is not there.
    """
    for name in _names(model, entry):
        if (folder / name).is_file():
            return folder / name
    expected = ' or '.join(str(folder / name) for name in _names(model, entry)[:2])
    raise Unavailable(f'{folder} has no file for {model}; expected {expected}', model)


def download(model: str, entry: Mapping[str, Any], folder: pathlib.Path, named_by: str = CACHE_VARIABLE) -> Source:
    """The authors' file: from the mirror that the environment names, else from Google Drive.

    Args:
        model: Name and tag.
        entry: The manifest's.
        folder: Where to put what is downloaded. What an earlier call left there is used: a whole file as it is, a part
            to go on from; but where no digest would tell, not one of another day, of which the file may have changed.
        named_by: The variable or option that names another folder, for messages.

    Raises:
        Unavailable: It cannot be had.
        WeightsError: The folder cannot be written to.
    """
    mirror = _mirror()
    if mirror is None:
        urls = [f'{DRIVE}/uc?id={entry["drive_id"]}']
    elif re.match('https?://', mirror, re.IGNORECASE):
        urls = [f'{mirror.rstrip("/")}/{name}' for name in _names(model, entry)]
    elif os.path.isdir(mirror):
        path = provided(pathlib.Path(mirror), model, entry)
        return Source(path, str(path), False)
    else:
        raise Unavailable(f'{MIRROR_VARIABLE} names {public(mirror)!r}, which is neither a folder nor begins with '
                          'http:// or https://', model)
    with explained(folder, named_by):
        folder.mkdir(parents=True, exist_ok=True)
    problem = f'{public(mirror or DRIVE)} has no file for {model}; asked for {public(", ".join(urls))}'
    for url in urls:
        # under a name of its source, so that no part of one is taken for the beginning of another
        path = folder / f'{hashlib.sha256(url.encode()).hexdigest()[:8]}-{entry["source_file"]}'
        try:
            with explained(folder, named_by):
                if entry['source_sha256'] is None:
                    _remove_parts(path, older_than=FRESH)
                if path.is_file() or _fetch(url, path, f"{model}, the authors' file"):
                    return Source(path, public(url), True)
        except _Refused as error:
            remedy = '' if mirror else (
                f'. In a browser it is {DRIVE}/file/d/{entry["drive_id"]}/view. A quota there can last a day: wait, or '
                f'use a Google account (gdown --cookies-from-browser firefox {entry["drive_id"]} leaves cookies that '
                'are used here too), or a mirror')
            problem = f"cannot get the authors' file of {model} from {public(url)}: {public(str(error))}{remedy}"
            if not isinstance(error, _Forbidden):
                break
    raise Unavailable(problem, model)  # not from what was refused: that has the address with its password


class _Refused(Exception):
    """What came instead of a file, in words."""


class _Forbidden(_Refused):
    """What some servers also say of a file that they do not have."""


def public(text: str) -> str:
    """A text without the passwords of addresses in it."""
    return re.sub(r'//[^/\s]*@', '//', text)


def _fetch(url: str, path: pathlib.Path, title: str) -> bool:
    """Downloads a file, going on from the part that lies beside `path`; False if the server says that it has none.

    Raises:
        _Forbidden: The server says that it may not be had.
        _Refused: Something else came, or nothing.
        OSError: The disk refused.
    """
    try:
        import gdown
        from gdown.exceptions import DownloadCancelled, DownloadError, FileURLRetrievalError
        from requests import HTTPError, RequestException
    except ImportError as error:
        raise _Refused(f"gdown, which downloads it, is not installed ({error}): pip install 'gdown>=6.4'") from error
    for _ in range(STARTS):
        late = threading.Event()
        watch = threading.Timer(FIRST_BYTE, late.set)  # gdown follows pages for as long as they come
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
            raise _Refused(f'no file came within {FIRST_BYTE} s, only pages or nothing') from error
        except FileURLRetrievalError as error:
            said = re.search('Failed to retrieve file url:(.*)You may still', str(error), re.DOTALL)
            words = ' '.join((said[1] if said else str(error)).split()).rstrip('.')
            raise _Refused(f'a web page came instead, which says: {words}') from error
        except DownloadError as error:
            # otherwise it is not the network: the server does not go on from where the part ends
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
            if error.errno is None:  # not of the system: requests misses a file that the environment names
                raise _Refused(f'the download cannot begin ({error})') from error
            if error.errno in hub.FULL:  # nobody can go on with it while it fills the disk
                _remove_parts(path)
            raise
        except (KeyError, TypeError, ValueError, AssertionError) as error:  # of an answer that gdown does not expect
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
