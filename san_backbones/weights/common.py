"""Shared by the commands in this folder: the manifest, complete or no files, errors."""
import argparse
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


class UsageError(WeightsError):
    """A command was given a name that does not exist."""


def parser(command: str, text: str) -> argparse.ArgumentParser:
    """Returns a parser for `san-backbones weights COMMAND`, with the docstring of its module as help."""
    lines = text.splitlines()
    return argparse.ArgumentParser(
        prog=f'san-backbones weights {command}', description=lines[0], epilog='\n'.join(lines[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter)


@contextlib.contextmanager
def _lock_folder(folder: pathlib.Path) -> Iterator[None]:
    """Locks a folder for one process at a time; the lock ends with the process."""
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
    """Writes files into a folder, which is made if needed; unchanged files are not touched.

    All files are written under temporary names and then moved. If several change, the old version of the last file is
    removed first and its new version moved last. So an interruption leaves all old files, all new files, or the last
    file missing, but never the last file of one set with other files of the other. The next call overwrites leftover
    temporary files. Processes that write into the same folder wait for each other.

    Raises:
        WeightsError: They cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock_folder(folder):
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
    """Reads the manifest's models by name and tag, without a cache: the commands change the file.

    Raises:
        WeightsError: The file does not exist or is not a manifest.
    """
    try:
        return dict(json.loads(path.read_text(encoding='utf-8'))['models'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f'the manifest {path} cannot be read ({type(error).__name__}: {error}); expected a JSON '
                           f"file with an object 'models', as weights/manifest.json") from error


def record(path: pathlib.Path, model: str, **fields: Any) -> None:
    """Sets fields of a model in the manifest, and keeps the rest, including what other processes wrote.

    Raises:
        WeightsError: It cannot be written.
    """
    try:
        with _lock_folder(path.parent):
            content = json.loads(path.read_text(encoding='utf-8'))
            content['models'][model].update(fields)
            _replace_files(path.parent, {path.name: (json.dumps(content, indent=2) + '\n').encode()})
    except OSError as error:
        raise WeightsError(f'cannot write {path} ({error}); make room or name another manifest') from error


def architecture_of(model: str) -> str:
    """Returns 'san15_patchwise' for 'san15_patchwise.in1k', 'san15_patchwise' and 'san15'."""
    name = model.partition('.')[0]
    return f'{name}_patchwise' if name in DEPTHS else name


def repository_of(model: str) -> str:
    """Returns the Hub repository of a model's weights, or of those with its tag: 'san-backbones/...'.

    Raises:
        UsageError: There is no such model or tag.
        WeightsError: It has no weights.
    """
    name, _, tag = model.partition('.')
    ours = timm.list_models(module='san')
    if name not in ours:
        raise UsageError(f'there is no model {model!r}; expected one of {", ".join(ours)}, or the folder of weights')
    try:
        source = resolve_pretrained_cfg(name, tag).hf_hub_id
    except RuntimeError as error:
        raise UsageError(str(error)) from error
    if not source:
        raise WeightsError(f'{model} has no pretrained weights: it is for tests')
    return source


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Makes a command's `main` print a WeightsError and return 1, or 2 for wrong usage; 130 if the user interrupts it.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None, **options: Any) -> int:
        try:
            return main(argv, **options)
        except WeightsError as error:
            print(f'error: {error}', file=sys.stderr)
            return 2 if isinstance(error, UsageError) else 1
        except BrokenPipeError:  # `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails to flush it
            return 1
        except KeyboardInterrupt:
            print('stopped; the same command goes on from here', file=sys.stderr)
            return 130

    return run
