"""What the commands beside this file share: the manifest's file, files that appear whole or not at all, errors."""
import contextlib
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import timm
from timm.models import resolve_pretrained_cfg

from .. import hub
from ..hub import WeightsError
from ..san import DEPTHS

MANIFEST = hub.shipped() / 'manifest.json'
TAG = 'in1k'  # of the authors' weights


@contextlib.contextmanager
def _alone_in(folder: pathlib.Path) -> Iterator[None]:
    """Waits until no other process is in this block, with this folder; a process that dies leaves it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def replace_files(folder: pathlib.Path, contents: Mapping[str, bytes]) -> None:
    """Writes files into a folder, made if it is not there; those that hold the same already stay.

    All of them are written beside their places before the first is moved. Of several that change, the last is moved
    last, and what lay in its place is removed first: an interruption leaves all as it was, or all as it is to be, or
    the last file missing, but never the last of one set beside others of another. The next call overwrites what lies
    beside. Processes that write into the same folder wait for one another.

    Raises:
        WeightsError: They cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder):
            _replace_files(folder, contents)
    except OSError as error:
        raise WeightsError(f'cannot write {", ".join(contents)} to {folder} ({error}); make room or name a folder that '
                           'can be written to') from error


def _replace_files(folder: pathlib.Path, contents: Mapping[str, bytes]) -> None:
    contents = {name: content for name, content in contents.items()
                if not (folder / name).is_file() or (folder / name).read_bytes() != content}
    beside = {name: folder / f'.{name}.tmp' for name in contents}
    try:
        for name, content in contents.items():
            with open(beside[name], 'wb') as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if len(contents) > 1:
            (folder / [*contents][-1]).unlink(missing_ok=True)
        for name in contents:
            os.replace(beside[name], folder / name)
    finally:
        for path in beside.values():
            if path.exists():
                path.unlink()


def read_manifest(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The manifest's models by name and tag, read anew: the commands change the file.

    Raises:
        WeightsError: There is no such file, or it is no manifest.
    """
    try:
        return dict(json.loads(path.read_text(encoding='utf-8'))['models'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f'the manifest {path} cannot be read ({type(error).__name__}: {error}); expected a JSON '
                           f"file with an object 'models', as weights/manifest.json") from error


def record(path: pathlib.Path, model: str, **fields: Any) -> None:
    """Sets fields of a model in the manifest, leaving the rest of it as it is, and what another process wrote there.

    Raises:
        WeightsError: It cannot be written.
    """
    try:
        with _alone_in(path.parent):
            content = json.loads(path.read_text(encoding='utf-8'))
            content['models'][model].update(fields)
            _replace_files(path.parent, {path.name: (json.dumps(content, indent=2) + '\n').encode()})
    except OSError as error:
        raise WeightsError(f'cannot write {path} ({error}); make room or name another manifest') from error


def architecture_of(model: str) -> str:
    """'san15_patchwise' of 'san15_patchwise.in1k', 'san15_patchwise', 'san15'."""
    name = model.partition('.')[0]
    return f'{name}_patchwise' if name in DEPTHS else name


def repository_of(model: str) -> str:
    """The Hub repository that a model's default weights, or those of its tag, belong to: 'san-backbones/...'.

    Raises:
        WeightsError: There is no such model, or no weights of it.
    """
    name, _, tag = model.partition('.')
    ours = timm.list_models(module='san')
    if name not in ours:
        raise WeightsError(f'there is no model {model!r}; expected one of {", ".join(ours)}, or the folder of weights')
    try:
        source = resolve_pretrained_cfg(name, tag).hf_hub_id
    except RuntimeError as error:
        raise WeightsError(str(error)) from error
    if not source:
        raise WeightsError(f'{model} has no pretrained weights: it is there for tests')
    return source


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Makes a command's `main` print errors that a user can mend, and return 1 for them, 130 if stopped by the user."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None, **options: Any) -> int:
        try:
            return main(argv, **options)
        except WeightsError as error:
            print(f'error: {error}', file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print('stopped; the same command goes on from here', file=sys.stderr)
            return 130

    return run
