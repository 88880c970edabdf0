"""What the page shows, without the page: what is computed once for a picture is kept, and visitors share it."""
from __future__ import annotations

import collections
import functools
import html
import os
import pathlib
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import comparison, visualize
from ..checks import is_integer
from ..study import Study
from ..viewer import page_of
from . import code, pictures, predictions
from .networks import Choice, Network

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['NONE', 'SIZES', 'Chosen', 'Views']

NONE = 'none'
SIZES = (96, 160, 224, 320)
WIDTH = 640  # pixels of pictures on the page
DPI = 200  # letters and lines can be read at half the width, on a phone
KEPT = 8  # pictures in networks
MOST_KEPT = 20  # files to download
MOST_SENT = 20_000_000  # bytes of a page of footprints, to a browser that is near


class Chosen(NamedTuple):
    """What a visitor chose on the page of footprints."""
    pixel: tuple[float, float] | None = None
    channel: int | str = 'strongest'
    part: str = 'weights'

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Chosen:
        """Reads what the page of footprints told. It comes from a browser, so that nothing in it is taken on trust."""
        channel: Any = message.get('channel')
        part = message.get('part')
        known = is_integer(channel, 0) or channel in ('mean', 'all')
        x, y = (float(message[name]) for name in 'xy')
        return cls((x, y), channel if known else 'strongest',
                   'content' if part == 'content' else 'weights')


class Views:
    """The views of pictures, by the names of networks and the paths of pictures.

    Args:
        choices: The networks, the first one first.
        predictor: A detector or segmenter, or None.
        files: Config and checkpoint of the predictor, as its code names them.
    """

    def __init__(self, choices: Sequence[Choice], predictor: predictions.Predictor | None = None,
                 files: tuple[str, str] = ('', '')) -> None:
        self.choices = {choice.name: choice for choice in choices}
        self.predictor, self.files = predictor, files
        self._lock = threading.RLock()  # a model is put into eval mode and back; and two cores compute one thing best
        self._kept: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        self._folder = tempfile.TemporaryDirectory(prefix='san-backbones-')
        self._made: collections.deque[pathlib.Path] = collections.deque()

    def network(self, name: str) -> Network:
        if name not in self.choices:
            raise ValueError(f'there is no network {name!r} here; there are {", ".join(self.choices)}')
        with self._lock:
            return self.choices[name].load()

    def _keep(self, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = compute()
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    def picture(self, path: str | None) -> pictures.Picture:
        if not path:
            raise ValueError('choose a picture first, or drop one of yours')
        return self._keep(('picture', *_file(path)), lambda: pictures.read(path))

    def study(self, network: str, path: str | None, size: int) -> Study:
        picture = self.picture(path)
        return self._keep((network, *_file(str(path)), size),
                          lambda: Study(self.network(network).model, picture.image, size))

    # --- Attention ---------------------------------------------------------------------------------------------------

    def blocks(self, network: str) -> list[str]:
        return list(visualize.attention_blocks(self.network(network).model))

    def block(self, network: str, block: str | None) -> str:
        """The block itself, if the network has it; else the last of its stage, or the last at stride 4."""
        names = self.blocks(network)
        if block in names:
            return str(block)
        same = [name for name in names if block and name.split('.')[1] == block.split('.')[1]]
        early = [name for name in names if name.startswith('stages.1.')]
        return (same or early or names)[-1]

    def footprints(self, path: str | None, network: str, beside: str, block: str, size: int, chosen: Chosen) -> str:
        """Returns the page of footprints in a frame of its own, whose script cannot reach the page around it."""
        shown = {name: self.block(name, block) for name in (network, beside) if name != NONE}
        chosen = self._within(shown, chosen)
        with self._lock:
            studies = {name: self.study(name, path, size) for name in shown}
            page = page_of(
                studies, shown, chosen.pixel, chosen.channel, chosen.part, title=self.picture(path).name,
                untrained=[name for name in shown if self.network(name).untrained], limit=MOST_SENT)
        return (f'<iframe title="What a block attends to" sandbox="allow-scripts" class="footprints" '
                f'srcdoc="{html.escape(page)}"></iframe>')

    def _within(self, blocks: Mapping[str, str], chosen: Chosen) -> Chosen:
        """The choice, without a weight channel that none of these blocks, by the names of their networks, has."""
        layers: list[Any] = [visualize.attention_blocks(self.network(name).model)[block]
                             for name, block in blocks.items()]
        most = max(layer.out_planes // layer.share_planes for layer in layers)
        beyond = isinstance(chosen.channel, int) and chosen.channel >= most
        return chosen._replace(channel='strongest') if beyond else chosen

    def _footprint_options(self, path: str | None, network: str, block: str, size: int,
                           chosen: Chosen) -> dict[str, Any]:
        chosen = self._within({network: block}, chosen)
        wide, tall = self.picture(path).image.size
        x, y = chosen.pixel or (wide // 2, tall // 2)
        options: dict[str, Any] = dict(pixels=[(round(x), round(y))])
        options |= dict(channel=chosen.channel) if isinstance(chosen.channel, int) else {}
        options |= dict(departures=True) if chosen.part == 'content' else {}
        return options | dict(size=size)

    def footprint_code(self, path: str | None, network: str, block: str, size: int, chosen: Chosen) -> str:
        block = self.block(network, block)
        return code.attention(self.network(network), self.picture(path), block,
                              self._footprint_options(path, network, block, size, chosen))

    def footprint_figure(self, path: str | None, network: str, block: str, size: int, chosen: Chosen) -> Figure:
        block = self.block(network, block)
        with self._lock:
            return visualize.footprint_figure(
                self.network(network).model, self.picture(path).image, block,
                **self._footprint_options(path, network, block, size, chosen))

    # --- Features ----------------------------------------------------------------------------------------------------

    def stages(self, network: str) -> int:
        return len(visualize.find_network(self.network(network).model).stages)

    def _comparison(self, paths: Sequence[str], network: str, stage: int, size: int) -> comparison.Comparison:
        return self._keep(('comparison', network, stage, size, *map(_file, paths)), lambda: comparison.Comparison(
            [self.study(network, path, size) for path in paths], stage))

    def panels(self, paths: Sequence[str], network: str, stage: int, size: int, pixel: tuple[float, float] | None,
               picture: int) -> tuple[list[list[np.ndarray]], float]:
        """Returns the panels of each picture, nearest patches, colours and likeness, and the share of the variance."""
        with self._lock:
            found = self._comparison(paths, network, stage, size)
            cell = found.at(pixel or self._centre(paths[picture]), picture)
            return [[_render(functools.partial(comparison.draw_panel, comparison=found, number=number, panel=panel,
                                               cell=cell, picture=picture), study)
                     for panel in comparison.PANELS] for number, study in enumerate(found.studies)], found.held

    def _centre(self, path: str) -> tuple[float, float]:
        wide, tall = self.picture(path).image.size
        return wide // 2, tall // 2

    def feature_code(self, paths: Sequence[str], network: str, stage: int, size: int, pixel: tuple[float, float] | None,
                     picture: int) -> str:
        x, y = pixel or self._centre(paths[picture])
        options = dict(picture=picture, size=size) if picture else dict(size=size)
        return code.features(self.network(network), [self.picture(path) for path in paths], (round(x), round(y)), stage,
                             options)

    def feature_figure(self, paths: Sequence[str], network: str, stage: int, size: int,
                       pixel: tuple[float, float] | None, picture: int) -> Figure:
        x, y = pixel or self._centre(paths[picture])
        with self._lock:
            return comparison.draw(self._comparison(paths, network, stage, size), (round(x), round(y)), picture)

    # --- Boxes -------------------------------------------------------------------------------------------------------

    def prediction(self, path: str | None) -> predictions.Prediction:
        assert self.predictor is not None
        predictor, picture = self.predictor, self.picture(path)
        return self._keep(('prediction', *_file(str(path))), lambda: predictor.predict(np.asarray(picture.image)))

    def _detector_study(self, path: str | None, size: int) -> Study:
        assert self.predictor is not None
        model, picture = self.predictor.model, self.picture(path)
        return self._keep(('detector', *_file(str(path)), size), lambda: Study(model, picture.image, size))

    def box_names(self, path: str | None, least: float) -> list[tuple[str, int]]:
        found = self.prediction(path)
        return [(f'{index}: {name} {score:.0%}', index) for index, (name, score) in enumerate(zip(
            found.labels, found.scores, strict=True)) if score >= least]

    def box_at(self, path: str | None, least: float, pixel: tuple[float, float]) -> int | None:
        """The smallest box around a pixel."""
        found, (x, y) = self.prediction(path), pixel
        inside = [((right - left) * (bottom - top), index)
                  for index, (left, top, right, bottom) in enumerate(found.boxes.tolist())
                  if found.scores[index] >= least and left <= x <= right and top <= y <= bottom]
        return min(inside)[1] if inside else None

    def box_panels(self, path: str | None, box: int | None, least: float,
                   size: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns what was found, and what the backbone looks at inside the box."""
        with self._lock:
            found, study = self.prediction(path), self._detector_study(path, size)
            picture = study.shown.original
            left = _render(lambda axes: predictions.draw_prediction(axes, picture, found, box, least), study)
            if box is None:
                return left, None
            return left, _render(lambda axes: predictions.draw_look(axes, study, found.boxes[box]), study)

    def box_code(self, path: str | None, box: int, least: float, size: int) -> str:
        return code.boxes(*self.files, self.picture(path), box, dict(least=least, size=size))

    def box_figure(self, path: str | None, box: int, least: float, size: int) -> Figure:
        with self._lock:
            return predictions.draw(self._detector_study(path, size), self.prediction(path), box, least)

    # --- Files -------------------------------------------------------------------------------------------------------

    def save(self, figure: Figure, name: str, kind: str) -> str:
        """Writes a figure for a download, and removes those that are long made."""
        with self._lock:
            folder = pathlib.Path(tempfile.mkdtemp(dir=self._folder.name))
            path = folder / f'{name}.{kind}'
            figure.savefig(path, dpi=150)
            self._made.append(path)
            while len(self._made) > MOST_KEPT:
                self._made.popleft().unlink(missing_ok=True)
        return str(path)


def _file(path: str) -> tuple[str, int, int]:
    """What tells a file from another that took its place."""
    try:
        found = os.stat(path)
    except OSError:
        raise ValueError('the picture is not here any more: drop it again') from None
    return path, found.st_mtime_ns, found.st_size


def _render(draw: Callable[[Axes], None], study: Study) -> np.ndarray:
    """Draws on axes without margins, and returns the pixels (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    tall, wide = study.shown.original.shape[:2]
    scale = WIDTH / max(tall, wide)
    figure = Figure(figsize=(wide * scale / DPI, tall * scale / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    draw(axes)
    axes.set_aspect('auto')
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
