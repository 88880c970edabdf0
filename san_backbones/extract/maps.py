"""Feature maps that `pool='none'` kept."""
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import safetensors
import torch

from .sources import need

__all__ = ['Maps']


class Maps:
    """The feature maps in a folder, in the order of the pictures; none is read before it is asked for.

    Args:
        folder: Of `extract(..., settings=Settings(pool='none'))`.

    Raises:
        FileNotFoundError: There are none.
        ImportError: pyarrow is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        parquet = need('pyarrow.parquet', 'san-backbones[features]', 'the index of maps')
        self._folder = pathlib.Path(folder) / 'maps'
        if not self._folder.is_dir():
            raise FileNotFoundError(f'{folder} has no feature maps: --pool none keeps them')
        # a table: file, sha1, width, height, and where the maps are
        self.index: Any = parquet.read_table(pathlib.Path(folder) / 'features')
        self._open: tuple[str, Any] = ('', None)

    def __len__(self) -> int:
        return self.index.num_rows

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """By stage, (C, H, W), of one row."""
        if not -len(self) <= row < len(self):
            raise IndexError(f'row {row} of {len(self)}')
        name, key = (self.index[column][row % len(self)].as_py() for column in ('maps', 'key'))
        if self._open[0] != name:
            self._open = name, safetensors.safe_open(self._folder / name, 'pt')
        file: Any = self._open[1]
        return {stored.partition('/')[2]: file.get_tensor(stored) for stored in file.keys()  # noqa: SIM118
                if stored.startswith(f'{key}/')}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[row] for row in range(len(self)))
