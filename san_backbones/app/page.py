"""The page: what stands where, and what follows what. What it shows is computed in `views`."""
from __future__ import annotations

import functools
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from .. import comparison
from ..viewer import UNTRAINED
from . import pictures, predictions
from .views import NONE, SIZES, WIDTH, Chosen, Views

__all__ = ['CSS', 'THEME', 'build']

THEME = gr.themes.Base(font=('system-ui', 'sans-serif'), font_mono=('ui-monospace', 'monospace'))
CSS = """
.footprints { width: 100%; border: 0; min-height: 500px; background: #fff; display: block; }
#footprints, #footprints > div { padding: 0 !important; }
.photographs .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; height: auto !important; }
.scale { display: flex; gap: 8px; align-items: center; flex-wrap: wrap; }
.scale i { flex: 1 1 160px; max-width: 320px; height: 12px; border: 1px solid #999; }
.hidden-download { position: absolute; left: -9999px; }
"""
INTRODUCTION = """# What a SAN sees
Every pixel weighs its neighbours with a vector, one weight for each group of channels. Pictures stay on the machine
that runs this page."""
LISTEN = """
window.addEventListener('message', event => {
  const frame = element.querySelector('iframe');
  if (!frame || event.source !== frame.contentWindow || !event.data) return;
  if (event.data.san === 'height') frame.style.height = Math.min(20000, Number(event.data.height) + 8) + 'px';
  if (event.data.san === 'chosen') trigger('select', {index: 0, value: event.data});
});
"""
PRESS = "() => {{ setTimeout(() => document.querySelector('#{0} a, a#{0}, #{0}').click(), 100); }}"
# what a visitor does while something is computed counts, when that is done. 'always_last' would repeat the old event
LAST: Any = 'always_last'
EACH: Any = 'multiple'
KNOWN = (ValueError, RuntimeError, ImportError, OSError, MemoryError)


def _explained(function: Callable[..., Any]) -> Callable[..., Any]:
    """Shows errors as words on the page; what nobody foresaw goes to the terminal as well."""
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except gr.Error:
            raise
        except Exception as error:
            words = str(error) or type(error).__name__
            if not isinstance(error, KNOWN):
                traceback.print_exc(file=sys.stderr)
                words = f'{type(error).__name__}: {words}. The terminal says where.'
            raise gr.Error(words, duration=None, title='This does not work', print_exception=False) from None
    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return call


def build(views: Views, size: int = 224) -> gr.Blocks:
    """Returns the page, which `launch` starts.

    Args:
        views: What it shows.
        size: Shorter side of pictures for the networks, at the beginning.
    """
    examples = pictures.examples()
    names = list(views.choices)
    with gr.Blocks(title='What a SAN sees', analytics_enabled=False, delete_cache=(600, 3600)) as page:
        picture = gr.State(examples[0].path if examples else None)
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            dropped, gallery = _chooser('Your picture', examples, 'first')
            with gr.Column(min_width=260):
                network = gr.Dropdown(names, value=names[0], label='Network', elem_id='network')
                beside = gr.Dropdown([NONE, *names], value=names[1] if len(names) > 1 else NONE, elem_id='beside',
                                     label='Beside it, for the attention')
                sizes = gr.Dropdown([(f'{side} pixels', side) for side in sorted({*SIZES, size})], value=size,
                                    label='Shorter side of the picture', elem_id='size')
        tab = gr.State('attention')
        settings = [picture, network, sizes]
        with gr.Tabs():
            shows = [_attention(views, page, tab, settings, beside), _features(views, tab, settings, examples)]
            if views.predictor is not None:
                shows.append(_boxes(views, tab, settings))
        dropped.upload(_accepts(views), dropped, picture, trigger_mode=LAST)
        gallery.select(_chooses(examples), None, picture, trigger_mode=EACH)
        for event in (picture.change, network.change, sizes.change):
            for show in shows:
                show(event)
    return page


def _chooser(label: str, examples: Sequence[pictures.Example], name: str) -> tuple[gr.File, gr.Gallery]:
    with gr.Column(min_width=260):
        dropped = gr.File(label=f'{label}: drop a file here, up to {pictures.MEGABYTES} MB', type='filepath',
                          height=140, file_types=['image'], elem_id=f'{name}-file')
    with gr.Column(min_width=260):
        gallery = gr.Gallery([example.path for example in examples], columns=4, height=140, allow_preview=False,
                             label='Or a photograph', elem_id=f'{name}-gallery', elem_classes='photographs', buttons=[],
                             interactive=False, object_fit='cover', visible=bool(examples))
    return dropped, gallery


def _chooses(examples: Sequence[pictures.Example]) -> Callable[..., str]:
    def choose(event: gr.SelectData) -> str:
        return examples[event.index].path
    return choose


def _accepts(views: Views) -> Callable[..., str]:
    """A picture that cannot be read is refused at once, and the page goes on with the one before."""
    def accept(path: str) -> str:
        views.picture(path)
        return path
    return _explained(accept)


def _downloads(name: str, figure: Callable[..., Any], inputs: Sequence[Any], save: Callable[..., str]) -> None:
    """Buttons that make the figure of the code when they are pressed, not before."""
    with gr.Row():
        for kind in ('png', 'svg'):
            button = gr.Button(f'Download {kind.upper()}', elem_id=f'{name}-{kind}', size='sm')
            file = gr.DownloadButton(elem_id=f'{name}-{kind}-file', elem_classes='hidden-download')
            made = _explained(lambda *args, kind=kind: save(figure(*args), name, kind))
            button.click(made, list(inputs), file).success(None, js=PRESS.format(f'{name}-{kind}-file'))


def _code(name: str) -> gr.Code:
    return gr.Code(language='python', label='The same figure in Python', elem_id=f'{name}-code', wrap_lines=True)


def _attention(views: Views, page: gr.Blocks, tab: gr.State, settings: list[Any], beside: gr.Dropdown) -> Any:
    picture, network, sizes = settings
    first = next(iter(views.choices))
    with gr.Tab('Attention', id='attention') as this:
        block = gr.Dropdown(views.blocks(first), value=views.block(first, None), label='Stage and block',
                            elem_id='block')
        chosen, shown = gr.State(Chosen()), gr.State(None)
        with gr.Tabs():
            with gr.Tab('View'):
                frame = gr.HTML(js_on_load=LISTEN, elem_id='footprints')
            with gr.Tab('Code'):
                code = _code('attention')
        given = [picture, network, block, sizes, chosen]
        _downloads('attention', views.footprint_figure, given, views.save)

    @_explained
    def show(tab: str, picture: str, network: str, block: str, size: int, chosen: Chosen, shown: Any,
             beside: str) -> Any:
        block = views.block(network, block)
        wanted = picture, network, beside, block, size
        if tab != 'attention' or shown == wanted:
            return [gr.skip()] * 5
        chosen = chosen if shown and shown[0] == picture else Chosen()
        return (gr.Dropdown(views.blocks(network), value=block),
                views.footprints(picture, network, NONE if beside == network else beside, block, size, chosen),
                views.footprint_code(picture, network, block, size, chosen), chosen, wanted)

    @_explained
    def choose(event: gr.SelectData, picture: str, network: str, block: str, size: int) -> Any:
        chosen = Chosen.of(event.value)
        return chosen, views.footprint_code(picture, network, block, size, chosen)

    def listen(event: Any) -> None:
        event(show, [tab, *given, shown, beside], [block, frame, code, chosen, shown], trigger_mode=LAST)

    listen(page.load)
    listen(block.input)
    listen(beside.change)
    this.select(lambda: 'attention', None, tab).then(
        show, [tab, *given, shown, beside], [block, frame, code, chosen, shown])
    frame.select(choose, given[:4], [chosen, code], show_progress='hidden', trigger_mode=EACH)
    return listen


def _features(views: Views, tab: gr.State, settings: list[Any], examples: Sequence[pictures.Example]) -> Any:
    picture, network, sizes = settings
    stages = views.stages(next(iter(views.choices)))
    with gr.Tab('Features', id='features') as this:
        stage = gr.Dropdown([(f'stage {index}', index) for index in range(stages)], value=min(2, stages - 1),
                            label='Stage', elem_id='stage')
        with gr.Row():
            dropped, gallery = _chooser('A second picture', examples, 'second')
        second, chosen = gr.State(examples[1].path if len(examples) > 1 else None), gr.State((None, 0))
        shown = gr.State(None)
        with gr.Tabs():
            with gr.Tab('View'):
                gr.Markdown('Click on a patch of either picture. Green: the chosen patch. Orange: those nearest to it.')
                rows = [_feature_row(words, panel) for panel, words in (
                    ('nearest', 'nearest patches'), ('colours', 'main components as colours'),
                    ('likeness', 'likeness to the chosen patch'))]
                gr.HTML(_colour_bar(comparison.SCALE))
                note = gr.Markdown(elem_id='features-note')
            with gr.Tab('Code'):
                code = _code('features')

        def paths(picture: str, second: str | None) -> list[str]:
            return [picture, *([second] if second else [])]

        given = [picture, second, network, stage, sizes, chosen]
        _downloads('features', lambda picture, second, network, stage, size, chosen: views.feature_figure(
            paths(picture, second), network, stage, size, *chosen), given, views.save)
        columns = list(zip(*rows, strict=True))
        outputs = [panel for column in columns for panel in column]

    @_explained
    def show(tab: str, picture: str, second: str | None, network: str, stage: int, size: int, chosen: Any,
             shown: Any) -> Any:
        if tab != 'features':
            return [gr.skip()] * 11
        count = views.stages(network)
        stage = min(stage, count - 1)
        chosen = chosen if shown == (picture, second) else (None, 0)
        pixel, which = chosen
        panels, held = views.panels(paths(picture, second), network, stage, size, pixel, which)
        words = f'{held:.0%} of the variance is in the three colours, which are the same projection for both pictures.'
        if views.network(network).untrained:
            words = f'**{UNTRAINED}** {words}'
        return ([gr.Dropdown([(f'stage {index}', index) for index in range(count)], value=stage), chosen,
                 (picture, second)] + panels[0] + (panels[1] if len(panels) > 1 else [None] * 3)
                + [words, views.feature_code(paths(picture, second), network, stage, size, pixel, which)])

    inputs, results = [tab, *given, shown], [stage, chosen, shown, *outputs, note, code]

    def listen(event: Any) -> None:
        event(show, inputs, results, trigger_mode=LAST)

    def click(which: int) -> Callable[..., Any]:
        def choose(event: gr.SelectData, picture: str, second: str) -> Any:
            path = (picture, second)[which]
            wide, tall = views.picture(path).image.size
            scale = max(wide, tall) / WIDTH
            return ((min(wide - 1, event.index[0] * scale), min(tall - 1, event.index[1] * scale)), which)
        return _explained(choose)

    for which, column in enumerate(columns):
        for panel in column:
            panel.select(click(which), [picture, second], chosen, trigger_mode=EACH).success(show, inputs, results)
    dropped.upload(_accepts(views), dropped, second, trigger_mode=LAST)
    gallery.select(_chooses(examples), None, second, trigger_mode=EACH)
    listen(second.change)
    listen(stage.input)
    this.select(lambda: 'features', None, tab).then(show, inputs, results)
    return listen


def _feature_row(words: str, panel: str) -> list[gr.Image]:
    with gr.Row():
        return [_image(f'{label}: {words}', f'{name}-{panel}')
                for label, name in (('This picture', 'this'), ('The second picture', 'that'))]


def _image(label: str, name: str) -> gr.Image:
    with gr.Column(min_width=280):  # Gradio's own label would lie on the picture
        gr.Markdown(label)
        return gr.Image(label=label, show_label=False, interactive=False, buttons=[], elem_id=name, format='png')


def _colour_bar(scale: Any) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex
    colours = ', '.join(to_hex(colormaps[scale.name](step / 8)) for step in range(9))
    return (f'<div>{scale.label}</div><div class="scale">{scale.least:g} '
            f'<i style="background: linear-gradient(to right, {colours})"></i> {scale.most:g}</div>')


def _boxes(views: Views, tab: gr.State, settings: list[Any]) -> Any:
    picture, _, sizes = settings
    with gr.Tab('Detections', id='boxes') as this:
        with gr.Row():
            least = gr.Slider(0, 1, value=0.3, step=0.05, label='Least score', elem_id='least')
            box = gr.Dropdown([], label='Box', elem_id='box')
        shown = gr.State(None)
        with gr.Tabs():
            with gr.Tab('View'):
                with gr.Row():
                    found = _image('What is found. Click on a box', 'found')
                    look = _image('What the features in the box are made of', 'look')
                gr.HTML(_colour_bar(predictions.SCALE))
            with gr.Tab('Code'):
                code = _code('boxes')
        given = [picture, box, least, sizes]
        _downloads('boxes', views.box_figure, given, views.save)

    @_explained
    def show(tab: str, picture: str, box: int | None, least: float, size: int, shown: Any) -> Any:
        if tab != 'boxes':
            return [gr.skip()] * 5
        names = views.box_names(picture, least)
        numbers = [number for _, number in names]
        if shown != picture or box not in numbers:
            box = numbers[0] if numbers else None
        left, right = views.box_panels(picture, box, least, size)
        lines = '# nothing was found' if box is None else views.box_code(picture, box, least, size)
        return gr.Dropdown(names, value=box), left, right, lines, picture

    inputs, results = [tab, *given, shown], [box, found, look, code, shown]

    def listen(event: Any) -> None:
        event(show, inputs, results, trigger_mode=LAST)

    @_explained
    def click(event: gr.SelectData, picture: str, least: float, box: int | None) -> Any:
        scale = max(views.picture(picture).image.size) / WIDTH
        inside = views.box_at(picture, least, (event.index[0] * scale, event.index[1] * scale))
        return box if inside is None else inside

    found.select(click, [picture, least, box], box, trigger_mode=EACH).success(show, inputs, results)
    listen(box.input)
    listen(least.release)
    this.select(lambda: 'boxes', None, tab).then(show, inputs, results)
    return listen
