"""Writes files so that they appear complete or not at all."""
import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

__all__ = ['atomic_write']


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary path with the same file name, and moves it to `path` when the block succeeds.

    If the block fails or the process is killed, an existing file at `path` stays as it was.
    """
    path = pathlib.Path(path).absolute()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'.{path.name}.') as folder:
        part = pathlib.Path(folder) / path.name
        yield part
        os.replace(part, path)
