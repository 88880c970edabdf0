"""Pictures that visitors of the page bring, and photographs to begin with."""
from __future__ import annotations

import importlib.util
import pathlib
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from .._pictures import upright

__all__ = ['LONGEST', 'MEGABYTES', 'Example', 'Picture', 'examples', 'read']

MEGABYTES = 20
"""Most megabytes of an upload."""
LONGEST = 10_000
"""Most pixels of a side."""
MOST_PIXELS = 50_000_000
MOST_ELONGATED = 20
"""Most that a picture may be longer than wide, or wider than long: its shorter side is scaled to the chosen size."""

_PHOTOGRAPHS = dict(chelsea=('cat', 'chelsea.png'), astronaut=('astronaut', 'astronaut.png'),
                    coffee=('coffee', 'coffee.png'), rocket=('rocket', 'rocket.jpg'))


class Example(NamedTuple):
    """A photograph of scikit-image: its path, what it shows, and the Python that reads it."""
    path: str
    name: str
    code: str


class Picture(NamedTuple):
    """An upright RGB picture, its name, and the Python that gives it to a function of this package."""
    image: Any
    name: str
    code: str


def examples() -> list[Example]:
    """Returns the photographs that ship with scikit-image; none if it is not installed."""
    found = importlib.util.find_spec('skimage')
    if found is None or found.origin is None:
        return []
    folder = pathlib.Path(found.origin).parent / 'data'
    return [Example(str(folder / file), name, f'skimage.data.{function}()')
            for function, (name, file) in _PHOTOGRAPHS.items() if (folder / file).is_file()]


def read(path: str) -> Picture:
    """Reads a picture, within limits that a small machine can bear.

    Raises:
        ValueError: It is not a picture, broken, or too large; the message says what it is and what is allowed.
    """
    name = pathlib.Path(path).name
    try:
        with Image.open(path) as file:
            width, height = file.size
            if max(width, height) > LONGEST or width * height > MOST_PIXELS:
                raise ValueError(f'{name} has {width} x {height} pixels; the page takes up to {LONGEST} on a side and '
                                 f'{MOST_PIXELS // 1_000_000} million in all. Make it smaller first')
            if max(width, height) > MOST_ELONGATED * min(width, height):
                raise ValueError(f'{name} has {width} x {height} pixels; the page takes pictures whose sides differ up '
                                 f'to {MOST_ELONGATED} times. Cut a part out first')
            image = upright(file)
    except Image.DecompressionBombError:
        raise ValueError(f'{name} has far too many pixels; the page takes up to {LONGEST} on a side. Make it smaller '
                         'first') from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # SyntaxError: Pillow's, of broken PNG files
        raise ValueError(f'{name} cannot be read as a picture: it is of another kind (JPEG, PNG, WebP, GIF, BMP and '
                         'TIFF are known) or broken') from error
    known = {example.path: example for example in examples()}
    if path in known:
        return Picture(image, known[path].name, known[path].code)
    return Picture(image, name, repr(name))
