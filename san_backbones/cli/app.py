"""The commands: what they take, what they print. They run in the process that imported torch, so nothing here is lazy
but matplotlib.
"""
import contextlib
import difflib
import json
import math
import os
import pathlib
import pickle
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import safetensors.torch
import timm
import torch
import torch.distributed
import typer
import typer.core

from .. import __version__, hub, measure
from .. import distill as distillation
from .._files import written_whole
from ..attention import _FootprintAttention
from ..count import count_multiply_adds, count_parameters, multiply_adds_by_part
from ..san import SAN
from ..weights import authors
from . import environment, pictures
from .weights import class_names, create, load, our_models, whereabouts

__all__ = ['app']

EXPLAINED = (RuntimeError, OSError, ValueError, ImportError, MemoryError, safetensors.SafetensorError,
             pickle.UnpicklingError, FloatingPointError,
             AssertionError)  # with which timm's own models refuse sizes
EXIT_CODES = """\b
Exit codes:
  0  done
  1  failed, or failed for some of the pictures; standard error says why
  2  wrong usage: an unknown option, model or value

Results go to standard output, everything else to standard error. COMMAND --help explains a command."""


class Group(typer.core.TyperGroup):
    """Turns errors of a job into a message and exit code 1, in one place."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # RuntimeErrors themselves
            raise
        except BrokenPipeError:  # `| head`: typer ends quietly
            raise
        except EXPLAINED as error:
            if ctx.params.get('traceback'):
                raise
            complain(f'Error: {str(error) or repr(error)}')
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=Group, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, epilog=EXIT_CODES,
    context_settings=dict(help_option_names=['-h', '--help'], max_content_width=120))


def complain(line: str) -> None:
    typer.echo(line, err=True)


def show_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def table(rows: Sequence[Sequence[Any]], align: str) -> str:
    """Rows, the heading first, in columns: 'l' and 'r' in `align` for left and right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return '\n'.join('  '.join(cell.ljust(width) if side == 'l' else cell.rjust(width)
                               for cell, width, side in zip(row, widths, align, strict=True)).rstrip()
                     for row in cells)


def amount(count: int) -> str:
    """A count with K, M or G, as the literature writes parameters and multiply-adds."""
    for unit, factor, digits in (('G', 1e9, 3), ('M', 1e6, 1), ('K', 1e3, 1)):
        if count >= factor:
            return f'{count / factor:.{digits}f}{unit}'
    return str(count)


# what options may be

def a_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f'san-backbones {__version__}')
        raise typer.Exit


def a_model(name: Any) -> Any:
    """A name, or several, that timm can create a model of."""
    for one in [name] if isinstance(name, str) else name or []:
        try:
            source, identifier = timm.models.parse_model_name(one)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        if source:
            continue
        variant, tag = timm.models.split_model_name_tag(identifier)
        if not timm.models.is_model(variant):
            near = difflib.get_close_matches(variant, our_models(), 3, 0.4)
            raise typer.BadParameter(f'there is no model {one!r}' + (f'; similar: {", ".join(near)}' if near else '') +
                                     '. `san-backbones list` has this package\'s; any other of timm\'s, '
                                     'hf-hub:ORG/NAME and local-dir:FOLDER work too')
        try:
            timm.models.resolve_pretrained_cfg(variant, tag)
        except RuntimeError as error:
            tags = [cfg.partition('.')[2] for cfg in timm.list_pretrained(f'{variant}.*')]
            raise typer.BadParameter(f'{error} It has: {", ".join(tags) or "none"}') from error
    return name


def model_names(incomplete: str) -> list[str]:
    """For the shell's completion."""
    return [name for name in our_models() if name.startswith(incomplete)]


def a_size(text: str) -> tuple[int, int]:
    """'224' or '800x1344', height first."""
    sides = text.lower().split('x')
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 1 for side in sides):
        raise typer.BadParameter(f'expected a side in pixels or HEIGHTxWIDTH, got {text!r}')
    return int(sides[0]), int(sides[-1])


def a_device(text: Any) -> torch.device:
    """'cpu', 'cuda', 'cuda:1'; what this machine has if not given."""
    if isinstance(text, torch.device):
        return text
    try:
        device = torch.device(text or ('cuda' if torch.cuda.is_available() else 'cpu'))
        if device.type not in ('cpu', 'cuda'):
            raise RuntimeError('only cpu and cuda are supported here')
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise typer.BadParameter(f'torch cannot use {text!r} here: {str(error).splitlines()[0]}. `san-backbones env` '
                                 'says what it can use') from error
    return device


def a_pixel(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(','))
    except ValueError as error:
        raise typer.BadParameter(f'expected X,Y in pixels of the picture from its upper left corner, '
                                 f'got {text!r}') from error
    return x, y


def an_output(suffixes: Sequence[str]) -> Any:
    def check(path: pathlib.Path | None) -> pathlib.Path | None:
        if path is not None and path.suffix not in suffixes:
            raise typer.BadParameter(f'the name must end in {" or ".join(suffixes)}, got {str(path)!r}')
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f'there is no folder {str(path.parent)!r}')
        return path
    return check


DEFAULTS = distillation.Settings()
RANDOM = 'The weights are random: the shapes are right, the values mean nothing.'
FIGURES = ('.png', '.pdf', '.svg', '.jpg')
TENSORS = ('.safetensors', '.npz')

Json = Annotated[bool, typer.Option('--json', help='Print JSON instead of text.')]
Model = Annotated[str, typer.Option(
    '--model', '-m', metavar='NAME', callback=a_model, autocompletion=model_names,
    help="A model of `san-backbones list`, or any other of timm's; hf-hub:ORG/NAME; local-dir:FOLDER.")]
Weights = Annotated[pathlib.Path | None, typer.Option(
    '--weights', '-w', metavar='FILE', exists=True, dir_okay=False,
    help='A checkpoint, .safetensors or .pth, instead of the pretrained weights.')]
Random = Annotated[bool, typer.Option(
    '--random', help='Random weights instead of pretrained ones: the shapes are right, the values mean nothing.')]
Device = Annotated[str | None, typer.Option(
    '--device', metavar='NAME', parser=a_device,
    help='cpu, cuda, cuda:1, ... [default: cuda if there is one, else cpu]')]
Pictures = Annotated[list[pathlib.Path], typer.Argument(
    metavar='PICTURE', help='Picture files; of a folder, all pictures in it and below.')]
Size = Annotated[Any | None, typer.Option(
    '--size', metavar='N|HxW', parser=a_size,
    help="What pictures are scaled and cropped to. [default: the weights' own, as timm evaluates them]")]
SizeOf = Annotated[Any, typer.Option(
    '--size', metavar='N|HxW', parser=a_size, help='Size of the image.')]
BatchSize = Annotated[int, typer.Option('--batch-size', '-b', min=1, metavar='N', help='Images computed at a time.')]


@app.callback()
def common(
        version: Annotated[bool, typer.Option('--version', callback=a_version, is_eager=True,
                                              help='Print the version and exit.')] = False,
        traceback: Annotated[bool, typer.Option('--traceback', help='Show where an error was raised.')] = False,
) -> None:
    """SAN vision backbones: what there is, what they see, and how fast they run here.

    \b
      san-backbones list
      san-backbones info san15_patchwise
      san-backbones classify photo.jpg --model test_san_patchwise
      san-backbones features photo.jpg --out features.safetensors
    """


# what the package has

@app.command('list')
def list_models(
        pattern: Annotated[str, typer.Argument(metavar='PATTERN', help='For example: san15*, *pairwise',
                                               show_default=False, autocompletion=model_names)] = '*',
        size: SizeOf = '224',
        as_json: Json = False,
) -> None:
    """Models, how much they compute, and which weights are here.

    \b
    Weights, as far as can be said without the network:
      folder         in the folder that SAN_BACKBONES_WEIGHTS names
      shipped        in the package
      hub cache      downloaded from the Hugging Face Hub before
      authors cache  made of the authors' file before
      to download    the authors' file, on first use: how large it is at least
      not here       the Hub would be asked; without a network, nobody
      none           the model is there for tests, untrained
      unusable       there, and not what they should be (an error says why)
    """
    found: list[dict[str, Any]] = []
    problems: set[str] = set()
    for name in our_models(pattern):
        model = create(name, device='meta')
        weights = whereabouts(model.pretrained_cfg)
        problems |= {weights.note} if weights.state == 'unusable' else set()
        found.append(dict(
            name=name, pretrained=_pretrained_name(model.pretrained_cfg), parameters=count_parameters(model),
            multiply_adds=count_multiply_adds(model, size), size=list(size), weights=weights.state, path=weights.path,
            download_bytes=weights.download_bytes,
            license=None if weights.state == 'none' else model.pretrained_cfg.get('license')))
    if not found:
        raise ValueError(f'no model matches {pattern!r}; there are {", ".join(our_models())}')
    if as_json:
        show_json(found)
    else:
        sizes = [f', {m["download_bytes"] / 1e6:.0f} MB' if m['download_bytes'] else '' for m in found]
        rows = [(m['name'], amount(m['parameters']), amount(m['multiply_adds']), m['weights'] + size_of_file,
                 m['license'] or '-') for m, size_of_file in zip(found, sizes, strict=True)]
        heading = ('model', 'parameters', f'multiply-adds at {_by(size)}', 'weights', 'licence')
        typer.echo(table([heading, *rows], 'lrrll'))
    if problems:
        raise hub.WeightsError('\n'.join(sorted(problems)))


def _by(size: Sequence[int]) -> str:
    return f'{size[0]}x{size[1]}'


def _pretrained_name(cfg: dict[str, Any]) -> str:
    """What the weights are called: 'san15_patchwise.in1k', also for the model `san15`, which is that one."""
    return (cfg.get('hf_hub_id') or f'{cfg["architecture"]}.{cfg.get("tag") or ""}').rpartition('/')[2].strip('.')


@app.command()
def info(
        name: Annotated[str, typer.Argument(metavar='MODEL', callback=a_model, autocompletion=model_names,
                                            help='A name of `san-backbones list`; hf-hub:ORG/NAME; local-dir:FOLDER.')],
        size: SizeOf = '224',
        as_json: Json = False,
) -> None:
    """A model: attention, stages, input, and where weights are."""
    model = create(name, device='meta')
    if not isinstance(model, SAN):
        raise ValueError(f'{name} is a {type(model).__name__}, and this command describes SANs only: '
                         f'{", ".join(our_models())}')
    facts = _describe(model, size)
    if as_json:
        show_json(facts)
        return
    stages = [('part', 'stride', 'output', 'blocks', 'footprint', 'dilation', 'params', 'mult-adds')]
    stages += [(
        part['name'], part['stride'] or '', 'x'.join(map(str, part['shape'])), part['blocks'] or '',
        f'{part["footprint"]}x{part["footprint"]}' if part['footprint'] else '', part['dilation'] or '',
        amount(part['parameters']), amount(part['multiply_adds'])) for part in facts['parts']]
    cfg, paper, weights = facts['pretrained'], facts['paper'], facts['weights']
    lines = [
        ('parameters', amount(facts['parameters'])),
        ('multiply-adds', f'{amount(facts["multiply_adds"])} at {_by(size)}; as the paper counts '
                          f'{amount(facts["multiply_adds_as_the_paper_counts"])}'),
        ('attention', f'{facts["attention"]}, relation {facts["relation"]}, {facts["share_planes"]} channels share a '
                      'weight'),
        ('position', facts['position']),
        ('input', f'{cfg["input_size"][0]} x {cfg["input_size"][1]} x {cfg["input_size"][2]}, crop {cfg["crop_pct"]}, '
                  f'{cfg["interpolation"]}'),
        ('mean, std', f'{_numbers(cfg["mean"])}; {_numbers(cfg["std"])}'),
        ('classes', f'{cfg["num_classes"]}: {", ".join(name.partition(",")[0] for name in cfg["first_classes"])}'
                    f'{", ..." if cfg["num_classes"] > 3 else ""}'),
        ('weights', f'{facts["pretrained_name"]}: {weights["note"]}'),
        *([('', weights['path'])] if weights['path'] else []),
        ('licence', cfg['license'] or 'not said'),
        ('source', cfg['origin_url'] or 'not said'),
    ]
    if facts['provenance']:
        note = facts['provenance']
        lines.append(('', f'{note["origin"]}, SHA-256 {note["source_sha256"]}, '
                          f'{"as pinned" if note["pinned"] else "taken on trust"}, {note["date"]}'))
    if paper:
        lines.append(('ImageNet', f'top-1 {paper["top1"]} %, top-5 {paper["top5"]} %: the paper\'s, not measured here'))
    typer.echo(f'{name}\n')
    typer.echo(table(lines, 'll'))
    typer.echo('\n' + table(stages, 'lrlrlrrr'))


def _numbers(values: Iterable[float]) -> str:
    return ' '.join(f'{value:g}' for value in values)


def _describe(model: SAN, size: tuple[int, int]) -> dict[str, Any]:
    """All that `info` says, as plain data."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    parts, weights = [], whereabouts(cfg)
    first: Any = next(iter(layer for layer in model.modules() if isinstance(layer, _FootprintAttention)))
    stride, shapes = 2, {'stem': (model.stem.conv.out_channels, size[0] // 2, size[1] // 2)}
    for entry in model.feature_info:
        pools = (entry['reduction'] // 2).bit_length()
        shapes[entry['module']] = (entry['num_chs'], max(size[0] >> pools, 1), max(size[1] >> pools, 1))
    for part, macs in multiply_adds_by_part(model, size).items():
        module = model.get_submodule(part)
        blocks = list(getattr(module, 'blocks', []))
        stride = next((entry['reduction'] for entry in model.feature_info if entry['module'] == part), stride)
        parts.append(dict(
            name=part, stride=None if part == 'head' else stride,
            shape=list(shapes.get(part, (model.num_classes,))), blocks=len(blocks),
            footprint=blocks[0].attn.kernel_size if blocks else None,
            dilation=blocks[0].attn.dilation if blocks else None,
            parameters=count_parameters(module), multiply_adds=macs))
    position = 'none: the patchwise form has no positions'
    if first.is_pairwise:
        reference = first.position_ref_size and f'those of an image of {2 * first.position_ref_size} pixels'
        position = f'{first.position_mode}, coordinates {reference or "from -1 to 1 over the image at hand"}'
    name = _pretrained_name(cfg)
    known = hub.manifest().get(name) or {}
    paper = dict(top1=known['paper_top1'], top5=known['paper_top5']) if known.get('paper_top1') else None
    return dict(
        name=cfg['architecture'], attention='pairwise' if first.is_pairwise else 'patchwise', relation=first.relation,
        position=position, share_planes=first.share_planes, parameters=count_parameters(model),
        multiply_adds=count_multiply_adds(model, size), size=list(size),
        multiply_adds_as_the_paper_counts=count_multiply_adds(model, size, paper=True), parts=parts,
        pretrained_name=name, paper=paper, weights=dict(state=weights.state, path=weights.path, note=weights.note),
        provenance=authors.provenance(name) if weights.state == 'authors cache' else {},
        pretrained=dict(
            {key: cfg.get(key) for key in ('input_size', 'crop_pct', 'interpolation', 'mean', 'std', 'num_classes',
                                           'license', 'hf_hub_id', 'paper_ids', 'origin_url')},
            first_classes=class_names(model, model.num_classes)[:3]))


@app.command(add_help_option=False, context_settings=dict(ignore_unknown_options=True, allow_extra_args=True))
def weights(context: typer.Context) -> None:
    """Weights: get, convert, verify and publish them."""
    from ..weights.__main__ import main
    raise typer.Exit(main(context.args))


# what a model makes of pictures

@contextlib.contextmanager
def _reported(path: pathlib.Path, failed: dict[pathlib.Path, str]) -> Iterator[None]:
    """A file that cannot be read is named, and the others go on."""
    try:
        yield
    except Exception as error:  # decoders raise all sorts of things at broken files
        said = getattr(error, 'strerror', None) or str(error)
        failed[path] = said if isinstance(error, (OSError, ValueError)) else f'{type(error).__name__}: {said}'
        complain(f'{path}: {failed[path]}')


def _files(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    files = pictures.find(paths)
    if not files:
        raise ValueError(f'there are no pictures in {", ".join(map(str, paths))}: looked for files whose names end in '
                         f'{", ".join(pictures.SUFFIXES)}')
    return files


def _either(weights: pathlib.Path | None, random: bool) -> None:
    if weights is not None and random:
        raise typer.BadParameter('--weights and --random exclude each other')


def _end(failed: dict[pathlib.Path, str], count: int) -> None:
    if failed:
        raise ValueError(f'{len(failed)} of {count} pictures could not be read')


@app.command()
def classify(
        paths: Pictures,
        model: Model = 'san15_patchwise',
        weights: Weights = None,
        names: Annotated[typer.FileText | None, typer.Option(
            metavar='FILE', help='Names of the classes, one a line. [default: those that come with the weights]',
        )] = None,
        top: Annotated[int, typer.Option(min=1, metavar='N', help='Classes to show for a picture.')] = 5,
        size: Size = None,
        batch_size: BatchSize = 8,
        device: Device = None,
        as_json: Json = False,
) -> None:
    """Classes of pictures, the most probable first.

    A picture that cannot be read is reported, the others go on, and the exit code is 1.
    """
    files = _files(paths)
    where = a_device(device)
    network = load(model, weights).to(where)
    if not network.num_classes:
        raise RuntimeError(f'{model} has no classifier, so it tells no classes apart: use `san-backbones features`, or '
                           'weights with a classifier')
    channels, prepare = pictures.transform(network.pretrained_cfg, size)
    classes = names.read().splitlines() if names else class_names(network, network.num_classes)
    if len(classes) != network.num_classes:
        raise typer.BadParameter(f'--names has {len(classes)} lines, and the model tells {network.num_classes} '
                                 'classes apart')
    failed: dict[pathlib.Path, str] = {}
    results: list[dict[str, Any]] = []
    for start in range(0, len(files), batch_size):
        tensors = {}
        for path in files[start:start + batch_size]:
            with _reported(path, failed):
                tensors[path] = prepare(pictures.read(path, channels))
        if not tensors:
            continue
        with torch.inference_mode():
            probabilities = network(torch.stack(list(tensors.values())).to(where)).softmax(1).cpu()
        for path, row in zip(tensors, probabilities, strict=True):
            values, indices = row.topk(min(top, len(row)))
            best = [dict(index=i, name=classes[i], probability=p)
                    for p, i in zip(values.tolist(), indices.tolist(), strict=True)]
            results.append(dict(file=str(path), classes=best))
            if not as_json:
                typer.echo(str(path))
                typer.echo('\n'.join(f'  {100 * b["probability"]:5.1f} %  {b["name"]}' for b in best))
    if as_json:
        show_json(results + [dict(file=str(path), error=error) for path, error in failed.items()])
    _end(failed, len(files))


@app.command()
def features(
        paths: Pictures,
        model: Model = 'san15_patchwise',
        weights: Weights = None,
        random: Random = False,
        stage: Annotated[list[int] | None, typer.Option(
            min=0, metavar='N', help='A stage, counted from 0; give it again for more. [default: all]')] = None,
        size: Size = None,
        whole: Annotated[bool, typer.Option(
            '--whole', help='Take pictures as they are, neither scaled nor cropped.')] = False,
        out: Annotated[pathlib.Path | None, typer.Option(
            metavar='FILE', callback=an_output(TENSORS), dir_okay=False,
            help='Save the maps: .safetensors or .npz, one (C, H, W) for each PICTURE/STAGE.')] = None,
        device: Device = None,
        as_json: Json = False,
) -> None:
    """Feature maps of pictures: shapes, and with --out the maps.

    A picture that cannot be read is reported, the others go on, and the exit code is 1.
    """
    _either(weights, random)
    if whole and size:
        raise typer.BadParameter('--whole and --size exclude each other')
    files = _files(paths)
    where = a_device(device)
    chosen: dict[str, Any] = dict(out_indices=sorted(set(stage))) if stage else {}
    try:
        network = load(model, weights, random, features_only=True, **chosen).to(where)
    except (AssertionError, IndexError) as error:  # what timm raises at stages that are not there
        raise typer.BadParameter(f'--stage {stage}: {model} has no such stage') from error
    channels, prepare = pictures.transform(network.pretrained_cfg, size, whole)
    if random:
        complain(RANDOM)
    stages, strides = network.feature_info.module_name(), network.feature_info.reduction()
    labels = {path: path.name if [p.name for p in files].count(path.name) == 1 else path.as_posix() for path in files}
    failed: dict[pathlib.Path, str] = {}
    results, tensors = [], {}
    for path in files:
        with _reported(path, failed):
            image = prepare(pictures.read(path, channels))
            if min(image.shape[1:]) < max(strides):
                raise ValueError(f'{image.shape[2]} x {image.shape[1]} pixels are too few: the last stage takes '
                                 f'{max(strides)} x {max(strides)} or more')
        if path in failed:
            continue
        with torch.inference_mode():
            maps = [m[0].cpu() for m in network(image[None].to(where))]
        if out:
            tensors.update({f'{labels[path]}/{name}': m.contiguous() for name, m in zip(stages, maps, strict=True)})
        entries = [dict(stage=name, stride=stride, shape=list(m.shape))
                   for name, stride, m in zip(stages, strides, maps, strict=True)]
        results.append(dict(file=str(path), input=list(image.shape), features=entries))
        if not as_json:
            typer.echo(f'{path} as {" x ".join(map(str, image.shape))}')
            typer.echo(table([('  stage', 'stride', 'shape'), *(
                (f'  {e["stage"]}', e['stride'], ' x '.join(map(str, e['shape']))) for e in entries)], 'lrl'))
    if out and tensors:
        _save(out, tensors, dict(model=model, weights='random' if random else str(weights or 'pretrained')))
        complain(f'wrote {out}')
    if as_json:
        show_json(results + [dict(file=str(path), error=error) for path, error in failed.items()])
    _end(failed, len(files))


def _save(path: pathlib.Path, tensors: dict[str, torch.Tensor], about: dict[str, str]) -> None:
    with written_whole(path) as part:
        if path.suffix == '.npz':
            import numpy
            numpy.savez(part, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]
        else:
            safetensors.torch.save_file(tensors, part, metadata=about)


@app.command()
def attention(
        picture: Annotated[pathlib.Path, typer.Argument(metavar='PICTURE', exists=True, dir_okay=False)],
        model: Model = 'san15_patchwise',
        weights: Weights = None,
        random: Random = False,
        kind: Annotated[Literal['footprint', 'features', 'rollout'], typer.Option(
            help='footprint: the weights of one block. rollout: what reaches a pixel over all blocks. features: maps.',
        )] = 'footprint',
        block: Annotated[str | None, typer.Option(
            metavar='NAME', help='For footprint: a block, say stages.3.blocks.4 or -1. [default: the last at '
            'stride 4]')] = None,
        pixel: Annotated[list[Any] | None, typer.Option(
            metavar='X,Y', parser=a_pixel, help='A pixel of the picture; give it again for more.')] = None,
        grid: Annotated[int | None, typer.Option(min=1, metavar='N', help='N x N pixels instead.')] = None,
        channel: Annotated[int | None, typer.Option(
            min=0, metavar='K', help='For footprint: one weight channel. [default: those that differ '
            'most; with --grid, their mean]')] = None,
        size: Annotated[int | None, typer.Option(
            min=32, metavar='N', help='Scale the picture so that its shorter side has N pixels. [default: what the '
            'weights take]')] = None,
        out: Annotated[pathlib.Path | None, typer.Option(
            metavar='FILE', callback=an_output(FIGURES), dir_okay=False,
            help='Where the figure goes. [default: PICTURE-KIND.png, in the current folder]')] = None,
        device: Device = None,
        as_json: Json = False,
) -> None:
    """Draws what a model attends to in a picture. Needs the extra 'visualize' (matplotlib).

    --pixel and --grid are for footprint and rollout; coordinates are the picture's own, whatever it is scaled to.
    """
    _either(weights, random)
    if pixel and grid:
        raise typer.BadParameter('--pixel and --grid exclude each other')
    only_some: dict[str, dict[str, Any]] = dict(
        features=dict(block=block, pixel=pixel, grid=grid, channel=channel), rollout=dict(block=block, channel=channel))
    given = [f'--{option}' for option, value in only_some.get(kind, {}).items() if value is not None]
    if given:
        raise typer.BadParameter(f'--kind {kind} does not take {", ".join(given)}')
    from .. import visualize
    image = pictures.read(picture)
    width, height = image.size
    for x, y in pixel or ():
        if not (0 <= x < width and 0 <= y < height):
            raise typer.BadParameter(f'--pixel {x:g},{y:g} is outside of the picture, which is {width} pixels wide and '
                                     f'{height} high')
    network = load(model, weights, random).to(a_device(device))
    if random:
        complain(RANDOM)
    if kind == 'footprint':
        figure = visualize.footprint_figure(
            network, image, block=block, pixels=pixel or None, grid=grid, channel=channel, size=size)
    elif kind == 'rollout':
        figure = visualize.rollout_figure(network, image, pixels=pixel or None, grid=grid, size=size)
    else:
        figure = visualize.feature_figure(network, image, size=size)
    out = out or pathlib.Path(f'{picture.stem}-{kind}.png')
    figure.savefig(out)
    if as_json:
        show_json(dict(file=str(picture), model=model, kind=kind, figure=str(out), pixels=pixel or None,
                       block=block, size=size))
    else:
        typer.echo(out)


# this machine

@app.command()
def benchmark(
        models: Annotated[list[str] | None, typer.Argument(
            metavar='MODEL', callback=a_model, autocompletion=model_names, show_default=False,
            help='Beside resnet50. [default: san15_patchwise]')] = None,
        size: SizeOf = '224',
        batch_size: BatchSize = 8,
        rounds: Annotated[int, typer.Option(min=1, metavar='N', help='Times that every model runs.')] = 5,
        threads: Annotated[int | None, typer.Option(
            min=1, metavar='N', help="Threads of the CPU. [default: torch's choice]")] = None,
        device: Device = None,
        train: Annotated[bool, typer.Option(
            '--train', help='A training step (forward and backward), not inference.')] = False,
        fused: Annotated[bool, typer.Option('--fused', help='SANs also folded for inference.')] = False,
        memory: Annotated[bool, typer.Option(help='Measure peak memory, in a process for each model.')] = True,
        as_json: Json = False,
) -> None:
    """Speed and memory here, beside timm's resnet50.

    Models have random weights, float32 and channels_last, and run in turns: one call of each to warm up, then rounds
    in which each runs once (one that has used up 20 seconds sits out the rest). Seconds are medians of a call. Peak
    memory is that of a process of its own: on a GPU what torch had allocated, on the CPU (Linux only) what the process
    held beyond its state after the imports. Close other programs first.
    """
    if fused and train:
        raise typer.BadParameter('--fused is for inference: leave out --train')
    where = a_device(device)
    if threads:
        torch.set_num_threads(threads)
    peer = 'resnet50'
    names = dict.fromkeys([peer, *(models or ['san15_patchwise'])])
    cases: dict[str, Any] = {name: dict(name=name, fused=False) for name in names}
    if fused:
        ours = [name for name in cases if name.partition('.')[0] in our_models() or ':' in name]
        cases.update({f'{name}, fused': dict(name=name, fused=True) for name in ours})
        for name in names:
            if name not in ours and name != peer:
                complain(f'{name} is no SAN: it is not folded')
    settings: dict[str, Any] = dict(batch_size=batch_size, image_size=size, training=train)
    complain(f'{measure.machine(where)}; {"training step" if train else "inference"}, {_by(size)}, batch {batch_size}, '
             f'{rounds} rounds')
    peaks: dict[str, int | None] = dict.fromkeys(cases)
    if memory:
        for title, case in cases.items():
            arguments = json.dumps(dict(case, **settings, device=str(where), threads=threads))
            peaks[title] = measure.peak_memory(
                [sys.executable, '-m', 'san_backbones.measure', arguments], title, complain)
    medians = measure.alternate(
        {title: measure.make(device=where, **case, **settings) for title, case in cases.items()}, rounds, where,
        report=complain)
    results: list[dict[str, Any]] = [dict(
        model=title, seconds=_known(medians[title]), images_per_second=_known(batch_size / medians[title]),
        throughput_to_resnet50=_known(medians[peer] / medians[title]), peak_bytes=peaks[title]) for title in cases]
    if as_json:
        show_json(dict(machine=measure.machine(where), device=str(where), size=list(size), batch_size=batch_size,
                       rounds=rounds, training=train, models=results))
    else:
        rows = [(r['model'], _figure(r['seconds'], '.4g'), _figure(r['images_per_second'], '.4g'),
                 _figure(r['throughput_to_resnet50'], '.2f'), _figure(r['peak_bytes'] and r['peak_bytes'] / 1e6, '.0f'))
                for r in results]
        typer.echo(table([('model', 'seconds', 'images/s', 'to resnet50', 'peak MB'), *rows], 'lrrrr'))
    if any(r['seconds'] is None for r in results):
        raise RuntimeError('not every model could run')


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _figure(value: float | None, digits: str) -> str:
    return '-' if value is None else format(value, digits)


def _sizes(texts: Iterable[str]) -> tuple[distillation.Size, ...]:
    try:
        return tuple(distillation.Size.parse(text) for text in texts)
    except ValueError as error:
        raise typer.BadParameter(f'--size: {error}') from error


@app.command()
def distill(
        sources: Annotated[list[str], typer.Argument(
            metavar='SOURCE', help='Pictures: folders, zips, tars (the shards of a WebDataset), with those in them; '
                                   'SOURCE//PART for what begins with PART in it.')],
        teacher: Annotated[str, typer.Option(
            metavar='NAME', help="A model of timm's with pretrained weights, or MODULE:FUNCTION, which returns one or "
                                 'any callable.')],
        out: Annotated[pathlib.Path, typer.Option(
            metavar='FOLDER', help='For weights, checkpoints and the log. What lies there is gone on with.')],
        model: Model = 'san10_patchwise',
        teacher_weights: Annotated[pathlib.Path | None, typer.Option(
            metavar='FILE', exists=True, dir_okay=False, help="The teacher's weights, instead of its own.")] = None,
        count: Annotated[int | None, typer.Option(
            '--pictures', min=1, metavar='N', help='End after N pictures; one counts as often as it is seen.')] = None,
        minutes: Annotated[float | None, typer.Option(
            min=0, metavar='N', help='End after N minutes of training, those before an interruption included. With '
                                     'neither: until it is stopped.')] = None,
        start: Annotated[pathlib.Path | None, typer.Option(
            metavar='FILE', exists=True, dir_okay=False,
            help='Begin from last.pt of another run, or from the .safetensors of the model.')] = None,
        size: Annotated[list[str], typer.Option(
            metavar='PIXELS[xBATCH][:PICTURES]',
            help="The student's pictures; several times for several sizes, each for so many pictures.")] = ['64'],  # noqa: B006
        teacher_scale: Annotated[float, typer.Option(
            metavar='X', help="The teacher's pictures, as a multiple of the student's.")] = DEFAULTS.teacher_scale,
        teacher_size: Annotated[int | None, typer.Option(
            min=1, metavar='PIXELS', help='That side, for a teacher that takes one only.')] = None,
        level: Annotated[list[int], typer.Option(
            metavar='STRIDE', help='Strides of the feature maps to compare; 0 for none.')] = list(DEFAULTS.levels),  # noqa: B006
        crop: Annotated[float, typer.Option(
            metavar='X', help='Least part of a picture that a view shows.')] = DEFAULTS.crop,
        reuse: Annotated[bool, typer.Option(help="Take the teacher's classifier over.")] = DEFAULTS.reuse,
        temperature: Annotated[float, typer.Option(metavar='T', help='Of the logits.')] = DEFAULTS.temperature,
        loss: Annotated[tuple[float, float, float], typer.Option(
            metavar='LOGITS POOLED MAPS', help='Weights of the parts of the loss.')] = DEFAULTS.weights,
        lr: Annotated[float, typer.Option(metavar='X', help='Highest learning rate.')] = DEFAULTS.lr,
        projection_lr: Annotated[float, typer.Option(
            metavar='X', help='That of the projections, as a part of it.')] = DEFAULTS.projection_lr,
        weight_decay: Annotated[float, typer.Option(metavar='X', help="AdamW's.")] = DEFAULTS.weight_decay,
        warmup: Annotated[int, typer.Option(
            metavar='PICTURES', help='Over which the learning rate grows.')] = DEFAULTS.warmup,
        decay: Annotated[float, typer.Option(
            metavar='X', help='Last part of the training, over which it falls to 0; 1: all of it, a cosine.',
        )] = DEFAULTS.decay,
        clip: Annotated[float, typer.Option(metavar='X', help='Largest norm of the gradient; 0: any.')] = DEFAULTS.clip,
        ema: Annotated[float, typer.Option(
            metavar='X', help='Part of the averaged weights that a step keeps.')] = DEFAULTS.ema,
        seed: Annotated[int, typer.Option(min=0, metavar='N')] = DEFAULTS.seed,
        precision: Annotated[str | None, typer.Option(
            metavar='fp32|bf16', help='Of the student. [default: bf16 on CUDA, else fp32]')] = None,
        teacher_precision: Annotated[str | None, typer.Option(
            metavar='fp32|bf16', help='Of the teacher. [default: as --precision]')] = None,
        save_minutes: Annotated[float, typer.Option(min=0, metavar='N', help='Between checkpoints.')] = 5.,
        keep: Annotated[int | None, typer.Option(
            min=1, metavar='PICTURES', help='Keep averaged weights now and then, after so many pictures.')] = None,
        store: Annotated[pathlib.Path | None, typer.Option(
            metavar='FILE', help='Decoded pictures, for several runs. [default: pictures.bin in --out]')] = None,
        workers: Annotated[int | None, typer.Option(
            min=0, metavar='N', help='Threads that cut views. [default: 0 on the CPU, else its cores, 16 at most]',
        )] = None,
        device: Device = None,
        as_json: Json = False,
) -> None:
    """Train a SAN on pictures without labels, to answer as a trained network does.

    Weights are averaged and written to model.safetensors in --out now and then. Ctrl-C saves and ends; the same command
    goes on, to the same bits where --pictures ends it. Processes of `torchrun -m san_backbones distill ...` share the
    batches.
    """
    processes = int(os.environ.get('WORLD_SIZE', 1))
    where = a_device(device or (f'cuda:{os.environ["LOCAL_RANK"]}' if processes > 1 and torch.cuda.is_available()
                                else None))
    precision = precision or ('bf16' if where.type == 'cuda' else 'fp32')
    try:
        settings = distillation.Settings(
            sizes=_sizes(size), teacher_scale=teacher_scale, teacher_size=teacher_size, crop=crop,
            levels=() if level == [0] else tuple(level), reuse=reuse, temperature=temperature, weights=loss, lr=lr,
            projection_lr=projection_lr, weight_decay=weight_decay, warmup=warmup, decay=decay, clip=clip, ema=ema,
            seed=seed, precision=precision, teacher_precision=teacher_precision or precision)
        network = distillation.load_teacher(teacher, teacher_weights)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if workers is None:
        workers = 0 if where.type == 'cpu' else max(1, min(16, (os.cpu_count() or 1) // processes))
    if processes > 1:
        if where.type == 'cuda':
            torch.cuda.set_device(where)
        torch.distributed.init_process_group('nccl' if where.type == 'cuda' else 'gloo')
    try:
        done = distillation.distill(
            model, network, sources, out, settings, pictures=count, minutes=minutes, start=start,
            save_minutes=save_minutes, keep_pictures=keep, store=store, workers=workers, device=where, tell=complain)
        first = processes == 1 or torch.distributed.get_rank() == 0
    finally:
        if processes > 1:
            torch.distributed.destroy_process_group()
    if first and as_json:
        show_json(done)
    elif first:
        typer.echo(f'{done["pictures"]} pictures in {done["seconds"] / 60:.1f} minutes: {done["weights"]}')
    if done['signal']:
        complain(f'stopped by {done["signal"]}; the same command goes on')
        raise typer.Exit(1)


@app.command()
def env(as_json: Json = False) -> None:
    """What to paste into a bug report.

    Versions, the machine, which operator paths can run here and why others cannot, and environment variables.

    Tokens and passwords are left out, and the home folder is written ~.
    """
    facts = environment.facts()
    if as_json:
        show_json(facts)
        return
    machine, loops = facts['machine'], facts['compiled_loops']
    rows = [(name, version) for name, version in facts['versions'].items() if version]
    missing = [name for name, version in facts['versions'].items() if not version]
    rows += [
        ('not installed', ', '.join(missing) or '-'),
        ('system', machine['system']),
        ('processor', f'{machine["processor"]}, {machine["cores"]} cores, {machine["threads"]} threads, '
                      f'{machine["instructions"]}'),
        ('GPU', ', '.join(machine['gpus']) or f'none that torch can use (built for CUDA {machine["cuda"]})'),
        ('compiled loops', f'{", ".join(loops["found"]) or "none"}; '
                           f'{"serving: " + loops["serving"] if loops["serving"] else loops["problem"]}'),
        ('their threads', f'{loops["threads"]}, of {loops["runtime"]}' if loops['serving'] else '-')]
    for device, paths in facts['paths'].items():
        rows += [(f'path {name}, {device}', 'can run' if reason is None else f'cannot run: {reason}')
                 for name, reason in paths.items()]
    rows += list(facts['variables'].items())
    typer.echo(table(rows, 'll'))
