"""Files that appear whole or not at all."""
import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

__all__ = ['written_whole']


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A path to write to, of the same name beside `path`; moved there at the end of the block, unless that fails.

    Until then, and where the process is killed, what lay at `path` stays.
    """
    path = pathlib.Path(path).absolute()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'.{path.name}.') as folder:
        part = pathlib.Path(folder) / path.name
        yield part
        os.replace(part, path)
