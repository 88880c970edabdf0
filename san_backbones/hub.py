"""Finds pretrained weights and checks them.

The weights of a model, such as `san15_patchwise.in1k`, are searched in this order:

1. the folder that the environment variable SAN_BACKBONES_WEIGHTS names, as `san15_patchwise.in1k/model.safetensors` or
   `san15_patchwise.in1k.safetensors`;
2. the weights that ship with the package;
3. the Hugging Face Hub, repository `san-backbones/san15_patchwise.in1k` (SAN_BACKBONES_HUB_ORG names another
   organisation, HF_ENDPOINT another server), through huggingface_hub with its cache, tokens, offline mode and progress
   bar. The Hub is not asked if the manifest says that it does not have the weights yet;
4. the authors' file on Google Drive, converted on first use and kept (`san_backbones.weights.authors`). A kept file is
   used before the Hub is asked, unless another organisation is named.

All files are safetensors except the authors', from which only tensors are read. If the manifest pins a digest, the file
must match it.
"""
import atexit
import errno
import functools
import hashlib
import importlib.resources
import json
import logging
import os
import pathlib
import re
import shutil
import stat
import tempfile
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors
from safetensors import SafetensorError, safe_open

__all__ = ['AUTHORS_VARIABLE', 'CACHE_VARIABLE', 'FILENAME', 'FOLDER_VARIABLE', 'MIRROR_VARIABLE', 'ORGANISATION',
           'ORGANISATION_VARIABLE', 'Unavailable', 'WeightsError', 'authors_off', 'check', 'digest', 'discard', 'fetch',
           'find_local', 'known_unpublished', 'manifest', 'repository', 'shipped', 'ways_out', 'weights']

FILENAME = 'model.safetensors'
FOLDER_VARIABLE = 'SAN_BACKBONES_WEIGHTS'
ORGANISATION_VARIABLE = 'SAN_BACKBONES_HUB_ORG'
ORGANISATION = 'san-backbones'
# for the authors' files
AUTHORS_VARIABLE = 'SAN_BACKBONES_AUTHORS'
MIRROR_VARIABLE = 'SAN_BACKBONES_AUTHORS_URL'
CACHE_VARIABLE = 'SAN_BACKBONES_CACHE'

HUB = 'https://huggingface.co'
FULL = {errno.ENOSPC, errno.EDQUOT}  # no space on the disk, or in the user's quota
_logger = logging.getLogger('san_backbones.hub')
_PACKAGE = pathlib.Path(__file__).resolve().parent


class WeightsError(RuntimeError):
    """Pretrained weights are not available or not the expected ones; the message says what to do."""


class Unavailable(WeightsError):
    """One source does not provide the weights, but another may; wrong weights are a plain WeightsError.

    Args:
        problem: What was requested from where, and the result; a sentence without its full stop.
        model: The model's name; the message goes on with what to do.
    """

    def __init__(self, problem: str, model: str):
        super().__init__(f'{problem}. {ways_out(model)}')
        self.problem = problem


def shipped() -> pathlib.Path:
    """Returns the folder of shipped weights: of the installed package, its unpacked archive, or the checkout."""
    installed = _PACKAGE / '.weights'
    if installed.is_dir():
        return installed
    return _unpack_shipped() or _PACKAGE.parent / 'weights'


@functools.cache
def _unpack_shipped() -> pathlib.Path | None:
    """Unpacks the weights if the package is inside an archive (a zipapp), for the life of this process; else None."""
    folder = importlib.resources.files(__package__) / '.weights'
    if not folder.is_dir():
        return None
    kept = tempfile.mkdtemp(prefix='san-backbones-')
    atexit.register(shutil.rmtree, kept, ignore_errors=True)
    pending: list[tuple[Any, pathlib.Path]] = [(folder, pathlib.Path(kept))]
    for source, target in pending:
        target.mkdir(exist_ok=True)
        for each in source.iterdir():
            if each.is_dir():
                pending.append((each, target / each.name))
            else:
                with each.open('rb') as file, open(target / each.name, 'wb') as copy:
                    shutil.copyfileobj(file, copy)
    return pathlib.Path(kept)


@functools.cache
def manifest() -> dict[str, dict[str, Any]]:
    """Reads the manifest: what is known about each model's weights, by name and tag ('san15_patchwise.in1k')."""
    path = shipped() / 'manifest.json'
    if not path.is_file():
        return {}
    return json.loads(path.read_text())['models']


def repository(model: str) -> str:
    """Returns the Hub repository of a model's weights, `ORGANISATION/MODEL`."""
    return f'{os.environ.get(ORGANISATION_VARIABLE) or ORGANISATION}/{model}'


def digest(path: str | os.PathLike[str]) -> str:
    """Computes the SHA-256 of a file, in hexadecimal."""
    result = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            result.update(block)
    return result.hexdigest()


def known_unpublished(model: str) -> bool:
    """Whether the manifest says that the Hub lacks a model's weights; another Hub or organisation may have them."""
    entry = manifest().get(model) or {}
    return ('drive_id' in entry and entry['sha256'] is None and constants.ENDPOINT == HUB
            and repository(model) == f'{ORGANISATION}/{model}')


def authors_off() -> bool:
    """Whether SAN_BACKBONES_AUTHORS turns off the authors' files, including kept ones."""
    return os.environ.get(AUTHORS_VARIABLE, '').strip().lower() in ('0', 'false', 'no', 'off')


def ways_out(model: str) -> str:
    """Says what to do if a model's weights are not available, and which variables choose their source.

    Args:
        model: A name of this package's, or ORGANISATION/NAME for another repository of the Hub.
    """
    if '/' in model:
        offline = ', HF_HUB_OFFLINE=0' * constants.HF_HUB_OFFLINE
        return (f'Check the name {model!r}, the network, the server (HF_ENDPOINT){offline} and your token (hf auth '
                'login, HF_TOKEN). Only safetensors are read: timm.models.push_to_hf_hub writes them, and '
                'timm.models.save_for_hf with safe_serialization=True.')
    name = model.partition('.')[0]
    switches = f'{AUTHORS_VARIABLE}=1 ' * authors_off() + 'HF_HUB_OFFLINE=0 ' * constants.HF_HUB_OFFLINE
    return (f'To get them: {switches}san-backbones weights get {name}\nTo convert a file that you have: san-backbones '
            f'weights convert model_best.pth --model {name} --out FOLDER/{model}, then set {FOLDER_VARIABLE}=FOLDER. '
            f"Or name a mirror of the authors' files ({MIRROR_VARIABLE}) or of the Hub (HF_ENDPOINT), another "
            f"organisation ({ORGANISATION_VARIABLE}), another cache ({CACHE_VARIABLE}). {AUTHORS_VARIABLE}=0 turns the "
            "authors' files off, HF_HUB_OFFLINE=1 the network.")


def check(path: str | os.PathLike[str], model: str, origin: str, sha256: str | None = None,
          named_by: str = 'the manifest') -> None:
    """Checks that a file is the expected safetensors file.

    Args:
        path: The file.
        model: The model whose weights it should hold.
        origin: Where it comes from, for messages.
        sha256: The expected digest, if known.
        named_by: What pins the digest, for messages.

    Raises:
        WeightsError: The file is not safetensors, cannot be read, or has another digest.
    """
    try:
        with open(path, 'rb'):
            found = None if sha256 is None else digest(path)
    except OSError as error:
        raise WeightsError(f'{path}, from {origin}, cannot be read ({error}); expected the weights of {model}. '
                           f'{ways_out(model)}') from error
    if found != sha256:
        raise WeightsError(f'{path}, from {origin}, is not the file that {named_by} pins for {model}: SHA-256 '
                           f'{found}, expected {sha256}. {ways_out(model)}')
    try:
        with safe_open(path, 'pt') as file:
            names = file.keys()
    except (SafetensorError, OSError) as error:
        raise WeightsError(f'{path}, from {origin}, is not a safetensors file ({error}); expected the weights of '
                           f'{model} as model.safetensors. {ways_out(model)}') from error
    if not names:
        raise WeightsError(f'{path}, from {origin}, holds no tensors; expected the weights of {model}. '
                           f'{ways_out(model)}')


def find_local(model: str) -> pathlib.Path | None:
    """Finds and checks the model's file in the folder named by the environment or in the package; None if neither.

    Raises:
        WeightsError: The named folder does not exist, or the file in it is not the expected one.
    """
    folders = [(shipped(), 'the package')]
    named = os.path.expanduser(os.environ.get(FOLDER_VARIABLE) or '')
    if named:
        if not os.path.isdir(named):
            raise WeightsError(f'{FOLDER_VARIABLE} names {named!r}, which is not a folder; expected one with '
                               f'{model}/{FILENAME} or {model}.safetensors, or the variable unset')
        folders.insert(0, (pathlib.Path(named), f'the folder that {FOLDER_VARIABLE} names'))
    for folder, origin in folders:
        for path in (folder / model / FILENAME, folder / f'{model}.safetensors'):
            try:
                is_file = stat.S_ISREG(os.stat(path).st_mode)
            except PermissionError as error:
                raise WeightsError(f'{folder}, {origin}, cannot be read ({error}); expected the weights of {model}, or '
                                   'leave to look for them') from error
            except OSError:  # it is not there, or a link in a circle
                is_file = False
            if is_file:
                check(path, model, origin, (manifest().get(model) or {}).get('sha256'))
                return path
            if os.path.lexists(path):
                raise WeightsError(f'{path}, in {origin}, is no file (a folder, or a link to nothing); expected the '
                                   f'weights of {model}, or nothing of this name')
            _logger.debug('no %s', path)
    return None


def _explain(error: BaseException, where: str, filename: str, revision: str | None, cache: str) -> str:
    """Explains to the user why a download failed."""
    cause = error.__cause__ or error
    status = getattr(getattr(cause, 'response', None), 'status_code', None)
    numbers = {getattr(error, 'errno', None), getattr(cause, 'errno', None)}
    if numbers & FULL:
        return f'the disk with the cache ({cache}) is full'
    if numbers & {errno.EROFS, errno.EACCES}:
        return f'the cache ({cache}) cannot be written to, and the file is not in it'
    if isinstance(error, errors.GatedRepoError):
        return 'the repository is gated: accept its terms on its page, then log in (hf auth login) or set HF_TOKEN'
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return ('there is no such repository for you: it is not published yet, it is private, or the token (HF_TOKEN, '
                'hf auth login) is wrong')
    if isinstance(error, errors.RevisionNotFoundError):
        return f'the repository has no revision {revision!r}'
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE or isinstance(cause, errors.OfflineModeIsEnabled):
            return f'offline mode is on (HF_HUB_OFFLINE) and the file is not in the cache ({cache})'
        if status is not None:
            return f'{where} answered {status}' + (' (too many requests: wait, or log in)' if status == 429 else '')
        return f'{where} cannot be reached ({type(cause).__name__}: {cause}) and the file is not in the cache'
    if isinstance(error, errors.EntryNotFoundError):
        return f'the repository has no file {filename}'
    if status is not None:
        return f'{where} answered {status}' + (' (too many requests: wait, or log in)' if status == 429 else '')
    return f'the download broke off ({type(error).__name__}: {error}); nothing half is kept: run again'


def discard(error: WeightsError, *paths: str | os.PathLike[str]) -> WeightsError:
    """Removes wrong files from a cache, so that the next call does not find them again.

    Files that could not be read stay: they may be good, and readable next time.

    Returns:
        The error, which also says what happened to the files.
    """
    if isinstance(error.__cause__, OSError):
        return WeightsError(f'{error} The file was left in the cache: it may be readable the next time.')
    try:
        for path in paths:
            if os.path.lexists(path):
                os.remove(path)
    except OSError as reason:
        return WeightsError(f'{error} The file could not be removed from the cache ({reason}): remove it, or it will '
                            'be found again.')
    return WeightsError(f'{error} The file was removed from the cache: running again downloads it anew.')


def fetch(
        repository: str,
        model: str,
        revision: str | None = None,
        sha256: str | None = None,
        filename: str = FILENAME,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
) -> str:
    """Downloads a file of a Hub repository, or takes it from the cache, and checks it.

    Args:
        repository: ORGANISATION/NAME.
        model: The model's name, or of a repository of others ORGANISATION/NAME, for messages.
        revision: Branch, tag or commit; None for the main branch.
        sha256: The expected digest; None for the one in the file's name in the cache, if there is one. A file with
            another digest is removed from the cache.
        filename: The file in the repository.
        cache_dir: Another cache than huggingface_hub's.
        local_files_only: Use only the cache.

    Returns:
        Path of the file in the cache.

    Raises:
        Unavailable: It cannot be downloaded; the message says which file from where, and what to do.
        WeightsError: It is not the expected file.
    """
    where = constants.ENDPOINT
    origin = f'{where}/{repository}' + (f'@{revision}' if revision else '')
    try:
        path = huggingface_hub.hf_hub_download(
            repository, filename, revision=revision, cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            library_name='san-backbones', local_files_only=local_files_only)
    except Exception as error:
        reason = _explain(error, where, filename, revision, str(cache_dir or constants.HF_HUB_CACHE))
        raise Unavailable(f'cannot get {filename}, the weights of {model}, from {origin}: {reason}', model) from error
    if not filename.endswith('.safetensors'):
        raise WeightsError(f'{filename} of {origin} is not a safetensors file, and no other kind is read. '
                           f'{ways_out(model)}')
    try:
        check(path, model, origin, sha256)
        name = os.path.basename(os.path.realpath(path))  # large files are named by their digest
        if sha256 is None and re.fullmatch('[0-9a-f]{64}', name) and digest(path) != name:
            raise WeightsError(f'{path}, from {origin}, is not the file that the Hub has: SHA-256 {digest(path)}, '
                               f'expected {name}. {ways_out(model)}')
    except WeightsError as error:
        raise discard(error, os.path.realpath(path), path) from error
    return path


def weights(source: str, filename: str = FILENAME, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Returns the path of the weights that a cfg's `hf_hub_id`, or the name after `hf-hub:`, stands for.

    Args:
        source: ORGANISATION/NAME[@REVISION]. For this package's own organisation, all sources are searched in the order
            that the module describes; with a revision, only the Hub.
        filename: The file in the repository.
        cache_dir: Another cache than huggingface_hub's; weights made from the authors' files are kept below it too.

    Returns:
        The path.

    Raises:
        WeightsError: As `find_local`, `fetch` and `san_backbones.weights.authors.weights`.
    """
    name, _, revision = source.partition('@')
    organisation, _, model = name.partition('/')
    if not organisation or not model or '/' in model:
        raise WeightsError(f'{source!r} names no Hub repository: expected ORGANISATION/NAME or '
                           'ORGANISATION/NAME@REVISION')
    if organisation == ORGANISATION:
        name = repository(model)
    if organisation != ORGANISATION or revision or filename != FILENAME:
        return fetch(name, model if organisation == ORGANISATION else name, revision or None, None, filename, cache_dir)
    local = find_local(model)
    if local is not None:
        return str(local)
    entry = manifest().get(model) or {}
    pinned = entry.get('sha256')
    if 'drive_id' in entry:
        return _authors_weights(name, model, pinned, cache_dir)
    return fetch(name, model, None, pinned, filename, cache_dir)


def _authors_weights(name: str, model: str, pinned: str | None, cache_dir: str | os.PathLike[str] | None) -> str:
    """Returns weights that the authors published: converted earlier, from the Hub, or converted now."""
    from .weights import authors
    if name == f'{ORGANISATION}/{model}' and not authors_off():  # another organisation may have other weights
        made = authors.cached(model, cache_dir)
        if made is not None:
            return str(made)
    if known_unpublished(model):
        folder = None if cache_dir is None else str(cache_dir)
        path = huggingface_hub.try_to_load_from_cache(name, FILENAME, cache_dir=folder)
        if isinstance(path, str):  # published since
            return fetch(name, model, cache_dir=cache_dir, local_files_only=True)
        return str(authors.weights(model, cache_dir))
    try:
        return fetch(name, model, None, pinned, FILENAME, cache_dir)
    except Unavailable as error:
        try:
            made = authors.weights(model, cache_dir)
        except Unavailable as other:
            raise Unavailable(f'{error.problem}; {other.problem}', model) from other
        _logger.warning("%s; took the authors' file instead", error.problem)
        return str(made)
