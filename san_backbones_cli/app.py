"""The commands, their options and output.

Nothing heavy is imported with this module: neither torch and timm nor `san_backbones`, which imports them. A command
imports what it needs when it runs, so that `--help`, wrong usage and completion in the shell answer at once.
"""
import contextlib
import difflib
import importlib.util
import json
import math
import os
import pathlib
import pickle
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import typer.core

if TYPE_CHECKING:
    import torch

    from san_backbones import distill as distillation

__all__ = ['MODELS', 'app']

MODELS = (
    'san10', 'san10_pairwise', 'san10_patchwise', 'san15', 'san15_pairwise', 'san15_patchwise', 'san19',
    'san19_pairwise', 'san19_patchwise', 'test_san_pairwise', 'test_san_patchwise')
EXPLAINED = (RuntimeError, OSError, ValueError, ImportError, MemoryError, pickle.UnpicklingError, FloatingPointError,
             AssertionError)  # raised by timm's models for unsupported sizes
EXIT_CODES = """\b
Exit codes:
  0  done
  1  failed, or failed for some of the pictures; standard error says why
  2  wrong usage: an unknown option, model or value

Results go to standard output, everything else to standard error. COMMAND --help explains a command."""


def is_explained(error: Exception) -> bool:
    """Whether an error's own message is enough; others are faults of the program, and end in a traceback."""
    if isinstance(error, EXPLAINED):
        return True
    from safetensors import SafetensorError
    return isinstance(error, SafetensorError)


class Group(typer.core.TyperGroup):
    """Turns errors of all commands into a message and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # these are RuntimeErrors too
            raise
        except BrokenPipeError:  # `| head`: typer exits quietly
            raise
        except Exception as error:
            if ctx.params.get('traceback') or not is_explained(error):
                raise
            to_stderr(f'Error: {str(error) or repr(error)}')
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=Group, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, epilog=EXIT_CODES,
    context_settings=dict(help_option_names=['-h', '--help'], max_content_width=120))


def to_stderr(line: str) -> None:
    typer.echo(line, err=True)


def show_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def table(rows: Sequence[Sequence[Any]], align: str) -> str:
    """Formats rows, the heading first, in columns; `align` has 'l' or 'r' for each."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return '\n'.join('  '.join(cell.ljust(width) if side == 'l' else cell.rjust(width)
                               for cell, width, side in zip(row, widths, align, strict=True)).rstrip()
                     for row in cells)


def format_count(count: int) -> str:
    """Formats a count of parameters or multiply-adds with K, M or G."""
    for unit, factor, digits in (('G', 1e9, 3), ('M', 1e6, 1), ('K', 1e3, 1)):
        if count >= factor:
            return f'{count / factor:.{digits}f}{unit}'
    return str(count)


# parsers and checks of options

def print_version(wanted: bool) -> None:
    if wanted:
        package: Any = importlib.util.find_spec('san_backbones')  # found, not imported
        text = package.loader.get_data(os.path.join(os.path.dirname(package.origin), '_version.py')).decode()
        typer.echo('san-backbones ' + re.findall("__version__ = '(.+)'", text)[0])
        raise typer.Exit


def no_such_model(name: str) -> typer.BadParameter:
    near = difflib.get_close_matches(name.partition('.')[0], MODELS, 3, 0.4)
    return typer.BadParameter(f'there is no model {name!r}' + (f'; similar: {", ".join(near)}' if near else '') +
                              '. `san-backbones list` lists this package\'s models; timm\'s other models, '
                              'hf-hub:ORG/NAME and local-dir:FOLDER work too')


def check_model(name: Any) -> Any:
    """Checks that timm has a model of this name; also takes several names.

    timm is only asked for names that it may know: not for this package's own, nor for those that resemble them.
    """
    for one in [name] if isinstance(name, str) else name or []:
        if one in MODELS:
            continue
        if one.startswith('san') and one.partition('.')[0] not in MODELS and ':' not in one:
            raise no_such_model(one)
        import timm
        import san_backbones  # noqa: F401, registers the models
        try:
            source, identifier = timm.models.parse_model_name(one)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        if source:
            continue
        variant, tag = timm.models.split_model_name_tag(identifier)
        if not timm.models.is_model(variant):
            raise no_such_model(one)
        try:
            timm.models.resolve_pretrained_cfg(variant, tag)
        except RuntimeError as error:
            tags = [cfg.partition('.')[2] for cfg in timm.list_pretrained(f'{variant}.*')]
            raise typer.BadParameter(f'{error} It has: {", ".join(tags) or "none"}') from error
    return name


def model_names(incomplete: str) -> list[str]:
    """Completes model names in the shell."""
    return [name for name in MODELS if name.startswith(incomplete)]


def parse_size(text: str) -> tuple[int, int]:
    """Parses '224' or '800x1344', height first."""
    sides = text.lower().split('x')
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 1 for side in sides):
        raise typer.BadParameter(f'expected a side in pixels or HEIGHTxWIDTH, got {text!r}')
    return int(sides[0]), int(sides[-1])


def parse_device(text: Any) -> 'torch.device':
    """Parses 'cpu', 'cuda' or 'cuda:1'; None chooses CUDA if available, else the CPU."""
    import torch
    if isinstance(text, torch.device):
        return text
    try:
        device = torch.device(text or ('cuda' if torch.cuda.is_available() else 'cpu'))
        if device.type not in ('cpu', 'cuda'):
            raise RuntimeError('only cpu and cuda are supported here')
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was not built for the device
        raise typer.BadParameter(f'torch cannot use {text!r} here: {str(error).splitlines()[0]}. `san-backbones env` '
                                 'says what it can use') from error
    return device


def parse_pixel(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(','))
    except ValueError as error:
        raise typer.BadParameter(f'expected X,Y in pixels of the picture from its upper left corner, '
                                 f'got {text!r}') from error
    return x, y


def output_check(suffixes: Sequence[str]) -> Any:
    def check(path: pathlib.Path | None) -> pathlib.Path | None:
        if path is not None and path.suffix not in suffixes:
            raise typer.BadParameter(f'the name must end in {" or ".join(suffixes)}, got {str(path)!r}')
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f'there is no folder {str(path.parent)!r}')
        return path
    return check


def check_folder(path: pathlib.Path) -> pathlib.Path:
    if path.suffix in TENSORS or path.is_file():
        raise typer.BadParameter(f'{str(path)!r} is no folder; for feature maps: --pool none --out FOLDER')
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f'there is no folder {str(path.parent)!r}')
    return path


def parse_share(text: str) -> Any:
    """Parses I/N, such as '0/4' to '3/4'."""
    from san_backbones.extract import Share
    parts = text.split('/')
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not int(parts[0]) < int(parts[1]):
        raise typer.BadParameter(f'expected I/N, 0/4 to 3/4 for four processes, got {text!r}')
    return Share(int(parts[0]), int(parts[1]))


Runtime = Literal['onnx', 'openvino', 'torchscript', 'executorch', 'litert', 'coreml', 'ncnn', 'aoti']
RANDOM = 'The weights are random: the shapes are right, the values mean nothing.'
FIGURES = ('.png', '.pdf', '.svg', '.jpg')
TENSORS = ('.safetensors', '.npz')

Json = Annotated[bool, typer.Option('--json', help='Print JSON instead of text.')]
Model = Annotated[str, typer.Option(
    '--model', '-m', metavar='NAME', callback=check_model, autocompletion=model_names,
    help="A model of `san-backbones list`, or any other of timm's; hf-hub:ORG/NAME; local-dir:FOLDER.")]
Weights = Annotated[pathlib.Path | None, typer.Option(
    '--weights', '-w', metavar='FILE', exists=True, dir_okay=False,
    help='A checkpoint, .safetensors or .pth, instead of the pretrained weights.')]
Random = Annotated[bool, typer.Option(
    '--random', help='Random weights instead of pretrained ones: the shapes are right, the values mean nothing.')]
Device = Annotated[str | None, typer.Option(
    '--device', metavar='NAME', parser=parse_device,
    help='cpu, cuda, cuda:1, ... [default: cuda if there is one, else cpu]')]
Pictures = Annotated[list[pathlib.Path], typer.Argument(
    metavar='PICTURE', help='Picture files; of a folder, all pictures in it and below.')]
Size = Annotated[Any | None, typer.Option(
    '--size', metavar='N|HxW', parser=parse_size,
    help="What pictures are scaled and cropped to. [default: the weights' own, as timm evaluates them]")]
SizeOf = Annotated[Any, typer.Option(
    '--size', metavar='N|HxW', parser=parse_size, help='Size of the image.')]
BatchSize = Annotated[int, typer.Option('--batch-size', '-b', min=1, metavar='N', help='Images computed at a time.')]


@app.callback()
def common(
        version: Annotated[bool, typer.Option('--version', callback=print_version, is_eager=True,
                                              help='Print the version and exit.')] = False,
        traceback: Annotated[bool, typer.Option('--traceback', help='Show where an error was raised.')] = False,
) -> None:
    """SAN vision backbones: list models, apply them to pictures, and measure their speed.

    \b
      san-backbones list
      san-backbones info san15_patchwise
      san-backbones classify photo.jpg --model test_san_patchwise
      san-backbones features pictures/ -m san10_patchwise.distilled --out out
      san-backbones attention photo.jpg -m san10_patchwise.distilled
    """


# models and weights

@app.command('list')
def list_models(
        pattern: Annotated[str, typer.Argument(metavar='PATTERN', help='For example: san15*, *pairwise',
                                               show_default=False, autocompletion=model_names)] = '*',
        size: SizeOf = '224',
        as_json: Json = False,
) -> None:
    """Models, parameters, multiply-adds (MACs), and which weights are here.

    A name with a tag is another set of weights of a model; the name alone stands for the first.

    \b
    Weights, as known without the network:
      folder         in the folder that SAN_BACKBONES_WEIGHTS names
      shipped        in the package
      hub cache      downloaded from the Hugging Face Hub before
      authors cache  made from the authors' file before
      to download    the authors' file, on first use; with its minimum size
      not here       not on this machine; the Hub would be asked
      none           an untrained model for tests
      unusable       present, but not the expected weights (an error says why)
    """
    from san_backbones import hub
    from san_backbones.cli.weights import create, locate_weights, our_models, our_weights
    from san_backbones.count import count_multiply_adds, count_parameters
    found: list[dict[str, Any]] = []
    problems: set[str] = set()
    for name in our_models(pattern) + our_weights(pattern):
        model = create(name, device='meta')
        weights = locate_weights(model.pretrained_cfg)
        problems |= {weights.note} if weights.state == 'unusable' else set()
        found.append(dict(
            name=name, pretrained=_pretrained_name(model.pretrained_cfg), parameters=count_parameters(model),
            multiply_adds=count_multiply_adds(model, size), size=list(size), weights=weights.state, path=weights.path,
            download_bytes=weights.download_bytes,
            license=None if weights.state == 'none' else model.pretrained_cfg.get('license')))
    if not found:
        raise typer.BadParameter(f'no model matches {pattern!r}; there are {", ".join(MODELS)}')
    if as_json:
        show_json(found)
    else:
        sizes = [f', {m["download_bytes"] / 1e6:.0f} MB' if m['download_bytes'] else '' for m in found]
        rows = [(m['name'], format_count(m['parameters']), format_count(m['multiply_adds']),
                 m['weights'] + size_of_file, m['license'] or '-')
                for m, size_of_file in zip(found, sizes, strict=True)]
        heading = ('model', 'params', f'MACs at {size[0] if size[0] == size[1] else _by(size)}', 'weights', 'licence')
        typer.echo(table([heading, *rows], 'lrrll'))
    if problems:
        raise hub.WeightsError('\n'.join(sorted(problems)))


def _by(size: Sequence[int]) -> str:
    return f'{size[0]}x{size[1]}'


def _pretrained_name(cfg: dict[str, Any]) -> str:
    """Returns the name of a model's weights; 'san15_patchwise.in1k' also for its alias `san15`."""
    return (cfg.get('hf_hub_id') or f'{cfg["architecture"]}.{cfg.get("tag") or ""}').rpartition('/')[2].strip('.')


@app.command()
def info(
        name: Annotated[str, typer.Argument(metavar='MODEL', callback=check_model, autocompletion=model_names,
                                            help='A name of `san-backbones list`; hf-hub:ORG/NAME; local-dir:FOLDER.')],
        size: SizeOf = '224',
        as_json: Json = False,
) -> None:
    """A model: attention, stages, input, and where weights are."""
    from san_backbones import SAN
    from san_backbones.cli.weights import create
    model = create(name, device='meta')
    if not isinstance(model, SAN):
        raise typer.BadParameter(f'{name} is a {type(model).__name__}, and this command describes SANs only: '
                                 f'{", ".join(MODELS)}')
    facts = _describe(model, size)
    if as_json:
        show_json(facts)
        return
    stages = [('part', 'stride', 'output', 'blocks', 'footprint', 'dilation', 'params', 'mult-adds')]
    stages += [(
        part['name'], part['stride'] or '', 'x'.join(map(str, part['shape'])), part['blocks'] or '',
        f'{part["footprint"]}x{part["footprint"]}' if part['footprint'] else '', part['dilation'] or '',
        format_count(part['parameters']), format_count(part['multiply_adds'])) for part in facts['parts']]
    cfg, paper, weights = facts['pretrained'], facts['paper'], facts['weights']
    lines = [
        ('parameters', format_count(facts['parameters'])),
        ('multiply-adds', f'{format_count(facts["multiply_adds"])} at {_by(size)}; as the paper counts '
                          f'{format_count(facts["multiply_adds_as_the_paper_counts"])}'),
        ('attention', f'{facts["attention"]}, relation {facts["relation"]}, {facts["share_planes"]} channels share a '
                      'weight'),
        ('position', facts['position']),
        ('input', f'{cfg["input_size"][0]} x {cfg["input_size"][1]} x {cfg["input_size"][2]}, crop {cfg["crop_pct"]}, '
                  f'{cfg["interpolation"]}'),
        ('mean, std', f'{_format_numbers(cfg["mean"])}; {_format_numbers(cfg["std"])}'),
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


def _format_numbers(values: Iterable[float]) -> str:
    return ' '.join(f'{value:g}' for value in values)


def _describe(model: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Collects everything that `info` prints, as plain data."""
    from san_backbones import hub
    from san_backbones.attention import FootprintAttention
    from san_backbones.cli.weights import class_names, locate_weights
    from san_backbones.count import count_multiply_adds, count_parameters, multiply_adds_by_part
    from san_backbones.weights import authors
    cfg: dict[str, Any] = model.pretrained_cfg
    parts, weights = [], locate_weights(cfg)
    first: Any = next(iter(layer for layer in model.modules() if isinstance(layer, FootprintAttention)))
    strides = {'stem': model.stem.stride, **{entry['module']: entry['reduction'] for entry in model.feature_info}}
    channels = {'stem': model.stem.conv.out_channels, **{e['module']: e['num_chs'] for e in model.feature_info}}
    shapes = {part: (channels[part], *(max(side // stride, 1) for side in size)) for part, stride in strides.items()}
    for part, macs in multiply_adds_by_part(model, size).items():
        module = model.get_submodule(part)
        blocks = list(getattr(module, 'blocks', []))
        parts.append(dict(
            name=part, stride=strides.get(part),
            shape=list(shapes.get(part, (model.num_classes,))), blocks=len(blocks),
            footprint=blocks[0].attn.kernel_size if blocks else None,
            dilation=blocks[0].attn.dilation if blocks else None,
            parameters=count_parameters(module), multiply_adds=macs))
    position = 'none: the patchwise form has no positions'
    if first.is_pairwise:
        reference = first.position_ref_size and \
            f'those of an image of {model.feature_info[0]["reduction"] * first.position_ref_size} pixels'
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
    from san_backbones.weights.__main__ import main
    raise typer.Exit(main(context.args))


# models on pictures

@contextlib.contextmanager
def _report_failures(path: pathlib.Path, failed: list[tuple[pathlib.Path, str]]) -> Iterator[None]:
    """Reports a file that cannot be read instead of ending the command."""
    from san_backbones.cli import pictures
    try:
        yield
    except Exception as error:  # decoders raise many kinds of errors for broken files
        failed.append((path, pictures.reason(error)))
        to_stderr(f'{path}: {failed[-1][1]}')


def _files(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    from san_backbones.cli import pictures
    files = pictures.find(paths)
    if not files:
        raise ValueError(f'there are no pictures in {", ".join(map(str, paths))}: looked for files whose names end in '
                         f'{", ".join(pictures.SUFFIXES)}')
    return files


def _refuse_both(weights: pathlib.Path | None, random: bool) -> None:
    if weights is not None and random:
        raise typer.BadParameter('--weights and --random exclude each other')


def _fail_if_any(failed: int, count: int) -> None:
    if failed:
        raise ValueError(f'{failed} of {count} pictures could not be read')


@app.command()
def classify(
        paths: Pictures,
        model: Model = 'san15_patchwise',
        weights: Weights = None,
        names: Annotated[typer.FileText | None, typer.Option(
            metavar='FILE', encoding='utf-8-sig',
            help='Names of the classes, one a line. [default: those that come with the weights]',
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
    import torch

    from san_backbones.cli import pictures
    from san_backbones.cli.weights import class_names, load
    files = _files(paths)
    where = parse_device(device)
    network = load(model, weights).to(where)
    if not network.num_classes:
        raise RuntimeError(f'{model} has no classifier, so it tells no classes apart: use `san-backbones features`, or '
                           'weights with a classifier')
    channels, prepare = pictures.transform(network.pretrained_cfg, size)
    try:
        classes = names.read().splitlines() if names else class_names(network, network.num_classes)
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f'--names {getattr(names, "name", "")} is no text in UTF-8: {error}') from None
    if len(classes) != network.num_classes:
        raise typer.BadParameter(f'--names has {len(classes)} lines, and the model tells {network.num_classes} '
                                 'classes apart')
    failed: list[tuple[pathlib.Path, str]] = []
    results: list[dict[str, Any]] = []
    for start in range(0, len(files), batch_size):
        shown, tensors = [], []
        for path in files[start:start + batch_size]:
            with _report_failures(path, failed):
                tensors.append(prepare(pictures.read(path, channels)))
                shown.append(path)
        if not shown:
            continue
        with torch.inference_mode():
            probabilities = network(torch.stack(tensors).to(where)).softmax(1).cpu()
        for path, row in zip(shown, probabilities, strict=True):
            values, indices = row.topk(min(top, len(row)))
            best = [dict(index=i, name=classes[i], probability=p)
                    for p, i in zip(values.tolist(), indices.tolist(), strict=True)]
            results.append(dict(file=str(path), classes=best))
            if not as_json:
                typer.echo(str(path))
                typer.echo('\n'.join(f'  {100 * b["probability"]:5.1f} %  {b["name"]}' for b in best))
    if as_json:
        show_json(results + [dict(file=str(path), error=error) for path, error in failed])
    _fail_if_any(len(failed), len(files))


@app.command()
def features(
        sources: Annotated[list[str], typer.Argument(
            metavar='SOURCE', help='Pictures: files, folders, globs, zips, tars (the shards of a WebDataset), Parquet '
                                   'files, videos, datasets:NAME, addresses (s3://, hf://).')],
        out: Annotated[pathlib.Path, typer.Option(
            metavar='FOLDER', callback=check_folder, help='For the features. A job that was stopped is continued.')],
        model: Model = 'san15_patchwise',
        weights: Weights = None,
        random: Random = False,
        pool: Annotated[Literal['avg', 'max', 'gem', 'none'], typer.Option(
            help='Pooling over the positions of a map; none keeps the maps.')] = 'avg',
        stage: Annotated[list[int] | None, typer.Option(
            min=0, metavar='N', help='A stage, counted from 0; repeat for more. [default: the last]')] = None,
        logits: Annotated[bool, typer.Option('--logits', help="Also save the classifier's logits.")] = False,
        dtype: Annotated[Literal['float32', 'float16', 'bfloat16'], typer.Option(help='Of the features.')] = 'float32',
        size: Size = None,
        whole: Annotated[bool, typer.Option(
            '--whole', help='Neither scale nor crop pictures.')] = False,
        boxes: Annotated[pathlib.Path | None, typer.Option(
            metavar='FILE', exists=True, dir_okay=False,
            help="A row for each box: COCO's JSON, or CSV or Parquet with file, x1, y1, x2, y2. SOURCE is the folder "
                 'that their paths start from.')] = None,
        column: Annotated[str | None, typer.Option(
            metavar='NAME', help='Column of pictures in Parquet files and datasets. [default: a usual name]')] = None,
        every: Annotated[int, typer.Option(min=1, metavar='N', help='Every n-th frame of a video.')] = 1,
        draft: Annotated[bool, typer.Option(help='Decode large JPEGs at a reduced scale, which is quicker.')] = True,
        precision: Annotated[Literal['fp32', 'bf16', 'fp16', 'int8'], typer.Option(
            help='Of the network; int8 is for a SAN on a processor with AVX-512 VNNI.')] = 'fp32',
        batch_size: BatchSize = 16,
        partition: Annotated[int | None, typer.Option(
            min=1, metavar='N', help='Most pictures per file. [default: 2048; for maps 128]')] = None,
        workers: Annotated[int | None, typer.Option(
            min=0, metavar='N', help='Processes that decode. [default: on CUDA one per core, 16 at most, else half]',
        )] = None,
        share: Annotated[Any | None, typer.Option(
            metavar='I/N', parser=parse_share,
            help='Do part I, from 0, of N parts of the work. [default: as torchrun or Slurm says, or all]')] = None,
        ray: Annotated[str | None, typer.Option(
            metavar='ADDRESS', help="Spread over a Ray cluster: its address, 'auto' or 'local'.")] = None,
        device: Device = None,
        as_json: Json = False,
) -> None:
    """Features of pictures, from one to a hundred million: Parquet files in --out.

    A picture that cannot be read becomes a row of errors.parquet, the others go on, and the exit code is 1. The same
    command continues a stopped job after the last complete file.
    """
    _refuse_both(weights, random)
    from san_backbones import extract
    if random:
        to_stderr(RANDOM)
    try:
        settings = extract.Settings(
            pool=pool, stages=tuple(stage or ()), logits=logits, dtype=dtype, size=size, whole=whole, draft=draft,
            precision=precision, partition=partition, batch_size=batch_size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        done = extract.extract(
            sources, out, model, settings, weights=weights, random=random, boxes=boxes, column=column, every=every,
            workers=workers, device=device, share=share, ray=ray)
    except IndexError as error:  # a stage
        raise typer.BadParameter(str(error)) from error
    except KeyboardInterrupt:
        to_stderr('stopped; the same command goes on after the last complete file')
        raise typer.Exit(1) from None
    if as_json:
        show_json(done._asdict())
    else:
        typer.echo(f'{done.rows} rows of {done.pictures} pictures: {out / "features"}'
                   + ('' if done.complete else ', not complete yet'))
    if done.errors:
        what = 'boxes or pictures' if boxes else 'pictures'
        raise ValueError(f'{done.errors} of the {what} could not be read'
                         + (f': {out / "errors.parquet"} says why' if done.complete else ''))


@app.command('app')
def page(
        model: Model = 'san10_patchwise.distilled',
        weights: Weights = None,
        random: Random = False,
        config: Annotated[pathlib.Path | None, typer.Option(
            metavar='FILE', exists=True, dir_okay=False,
            help='Config of a detector (MMDetection) or segmenter (MMSegmentation), for a view of its own.')] = None,
        checkpoint: Annotated[pathlib.Path | None, typer.Option(
            metavar='FILE', exists=True, dir_okay=False, help='Its weights.')] = None,
        size: Annotated[int, typer.Option(
            min=32, metavar='N', help='Pixels of the shorter side of pictures, at the beginning.')] = 224,
        host: Annotated[str, typer.Option(
            metavar='ADDRESS', help='Where to listen; 0.0.0.0 lets the local network in.')] = '127.0.0.1',
        port: Annotated[int | None, typer.Option(
            min=1, max=65535, metavar='N', help='[default: the first free one from 7860]')] = None,
        share: Annotated[bool, typer.Option(
            '--share', help='Let Gradio relay the page to a public address, for as long as it runs.')] = False,
) -> None:
    """A page in the browser that shows attention, features and detections. Needs the extra 'app' (Gradio).

    Pictures stay on this machine, and so does the page, unless --host or --share say otherwise.
    """
    _refuse_both(weights, random)
    if (config is None) != (checkpoint is None):
        raise typer.BadParameter('--config and --checkpoint belong together')
    from san_backbones.app import create, launch
    if random:
        to_stderr(RANDOM)
    launch(create(model, weights, random=random, config=config, checkpoint=checkpoint, size=size),
           host=host, port=port, share=share)


@app.command()
def predict(
        checkpoint: Annotated[pathlib.Path, typer.Argument(
            metavar='CHECKPOINT', exists=True, dir_okay=False,
            help='Of MMDetection or MMSegmentation, as `make demo` and trainings write it.')],
        sources: Annotated[list[pathlib.Path], typer.Argument(
            metavar='SOURCE', exists=True, help='Pictures, videos, or folders of them.')],
        out: Annotated[pathlib.Path, typer.Option(
            metavar='FOLDER', callback=check_folder, help='For pictures and predictions.json.')],
        config: Annotated[pathlib.Path | None, typer.Option(
            metavar='FILE', exists=True, dir_okay=False,
            help='The config; it is run as Python. [default: the one in the checkpoint, read as data]')] = None,
        threshold: Annotated[float, typer.Option(
            min=0, max=1, metavar='X', help='Smallest score of an object.')] = .3,
        device: Device = None,
        as_json: Json = False,
) -> None:
    """What a trained detector or segmentor finds on pictures and videos. Needs the extra 'mm'.

    Of a detector --out gets predictions.json in COCO's format, with scores; of a segmentor, PNG files of class numbers
    in masks/. Both get pictures/ and videos/ with what was found drawn on them.
    """
    if importlib.util.find_spec('mmengine') is None:
        raise ImportError("predict needs OpenMMLab's libraries: pip install 'san-backbones[mm]'")
    from san_backbones.cli.predict import predict as write_predictions
    from san_backbones.mm.predict import Predictor
    where = None if device is None else str(parse_device(device))
    predictor = Predictor(checkpoint, config, threshold, where)
    try:
        done = write_predictions(predictor, sources, out, to_stderr)
    except KeyboardInterrupt:
        to_stderr(f'stopped; {out / "predictions.json"} has what was found until now')
        raise typer.Exit(1) from None
    if as_json:
        show_json(done._asdict())
    else:
        typer.echo(f'{done.pictures} pictures, {done.objects} objects: {out / "predictions.json"}')
    _fail_if_any(len(done.failed), done.pictures + len(done.failed))


def _check_block(network: Any, block: str | None, channel: int | None, whole: bool) -> None:
    """Of all blocks (`whole`), or of the one that is drawn, if none is named."""
    from san_backbones.attention_maps import find_block, find_network, fine_block
    net = find_network(network)
    try:
        found = fine_block(net) if block is None else find_block(net, block)
    except ValueError as error:
        raise typer.BadParameter(f'--block: {error}') from error
    layers = [one.attn for one in (net.blocks.values() if whole and block is None else [found])]
    groups = max(layer.out_planes // layer.share_planes for layer in layers)
    if channel is not None and channel >= groups:
        raise typer.BadParameter(f'--channel {channel}: expected a weight channel, 0 to {groups - 1}')


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
            metavar='X,Y', parser=parse_pixel, help='A pixel of the picture; repeat for more.')] = None,
        grid: Annotated[int | None, typer.Option(min=1, metavar='N', help='N x N pixels instead.')] = None,
        channel: Annotated[int | None, typer.Option(
            min=0, metavar='K', help='For footprint: one weight channel. [default: those that differ '
            'most; with --grid, their mean]')] = None,
        html: Annotated[pathlib.Path | None, typer.Option(
            metavar='FILE', callback=output_check(('.html',)), dir_okay=False,
            help='Instead of a figure, a page on which one points at pixels: one file, no server.')] = None,
        size: Annotated[int | None, typer.Option(
            min=32, metavar='N', help='Scale the picture so that its shorter side has N pixels. [default: what the '
            'weights take]')] = None,
        out: Annotated[pathlib.Path | None, typer.Option(
            metavar='FILE', callback=output_check(FIGURES), dir_okay=False,
            help='Where the figure goes. [default: PICTURE-KIND.png, in the current folder]')] = None,
        dpi: Annotated[int | None, typer.Option(
            min=20, max=1200, metavar='N', help='Pixels of the figure per inch. [default: 150]')] = None,
        device: Device = None,
        as_json: Json = False,
) -> None:
    """Draws what a model attends to in a picture. Needs the extra 'visualize' (matplotlib).

    --pixel and --grid are for footprint and rollout; coordinates are those of the original picture, before scaling.
    """
    _refuse_both(weights, random)
    if pixel and grid:
        raise typer.BadParameter('--pixel and --grid exclude each other')
    if html and (kind != 'footprint' or grid or out or dpi or len(pixel or ()) > 1):
        raise typer.BadParameter('--html is for --kind footprint; it takes one --pixel, and neither --grid, --out nor '
                                 '--dpi')
    only_some: dict[str, dict[str, Any]] = dict(
        features=dict(block=block, pixel=pixel, grid=grid, channel=channel), rollout=dict(block=block, channel=channel))
    given = [f'--{option}' for option, value in only_some.get(kind, {}).items() if value is not None]
    if given:
        raise typer.BadParameter(f'--kind {kind} does not take {", ".join(given)}')
    from san_backbones import visualize
    from san_backbones.cli import pictures
    from san_backbones.cli.weights import load
    failed: list[tuple[pathlib.Path, str]] = []
    with _report_failures(picture, failed):
        image = pictures.read(picture)
    _fail_if_any(len(failed), 1)
    width, height = image.size
    for x, y in pixel or ():
        if not (-.5 <= x < width - .5 and -.5 <= y < height - .5):  # edges of the first and the last
            raise typer.BadParameter(f'--pixel {x:g},{y:g} is outside of the picture, which is {width} pixels wide and '
                                     f'{height} high')
    network = load(model, weights, random).to(parse_device(device))
    if random:
        to_stderr(RANDOM)
    if kind == 'footprint':
        _check_block(network, block, channel, whole=html is not None)
    if html:
        from san_backbones._files import atomic_write
        from san_backbones.viewer import attention_page
        text = attention_page(
            {model: network}, image, block, pixel[0] if pixel else None, 'strongest' if channel is None else channel,
            size=size, untrained=[model] if random else [], title=picture.name)
        with atomic_write(html) as part:
            part.write_text(text, encoding='utf-8')
        if as_json:
            show_json(dict(file=str(picture), model=model, page=str(html), pixels=pixel or None, block=block,
                           size=size))
        else:
            typer.echo(html)
        return
    if kind == 'footprint':
        figure = visualize.footprint_figure(
            network, image, block=block, pixels=pixel or None, grid=grid, channel=channel, size=size)
    elif kind == 'rollout':
        figure = visualize.rollout_figure(network, image, pixels=pixel or None, grid=grid, size=size)
    else:
        figure = visualize.feature_figure(network, image, size=size)
    out = out or pathlib.Path(f'{picture.stem}-{kind}.png')
    figure.savefig(out, dpi=dpi or 150)
    if as_json:
        show_json(dict(file=str(picture), model=model, kind=kind, figure=str(out), pixels=pixel or None,
                       block=block, size=size))
    else:
        typer.echo(out)


# programs for runtimes

@app.command()
def export(
        model: Annotated[str, typer.Argument(
            metavar='MODEL', callback=check_model, autocompletion=model_names,
            help='A name of `san-backbones list`; hf-hub:ORG/NAME; local-dir:FOLDER.')],
        to: Annotated[Runtime, typer.Option(help='Whose program to make.')],
        out: Annotated[pathlib.Path | None, typer.Option(
            metavar='FILE',
            help="With the runtime's suffix. [default: MODEL with that suffix, in this folder]")] = None,
        size: SizeOf = '224',
        open_sizes: Annotated[bool, typer.Option(
            '--open-sizes', help='Leave batch and sizes open: onnx, openvino; torchscript always does.')] = False,
        weights: Annotated[pathlib.Path | None, typer.Option(
            '--weights', '--checkpoint', '-w', metavar='FILE', exists=True, dir_okay=False,
            help='A checkpoint, .safetensors or .pth, instead of the pretrained weights.')] = None,
        random: Random = False,
        features: Annotated[bool, typer.Option(
            '--features', help='The feature maps of all stages, as of features_only=True, instead of the classes.',
        )] = False,
        tolerance: Annotated[float, typer.Option(
            min=0, metavar='X', help='Largest difference to torch, relative to the largest value.')] = 1e-4,
        as_json: Json = False,
) -> None:
    """Convert a model for a runtime, and compare the result with torch.

    Conversion is the runtime's own, in float32; an error names the package that is missing. The result is compared on
    photographs that come with scikit-image, or on noise where it is not installed; one that differs from torch by more
    than --tolerance is not kept, and the exit code is 1.
    """
    _refuse_both(weights, random)
    from san_backbones.cli.weights import load
    from san_backbones.runtimes import TARGETS, export_to, require
    target = TARGETS[to]
    out = output_check([target.suffix])(out or pathlib.Path(f'{model.rpartition("/")[2]}{target.suffix}'))
    require(to)
    network = load(model, weights, random, **(dict(features_only=True) if features else {}))
    if random:
        to_stderr(RANDOM)
    report = export_to(network, to, out, size, open_sizes, tolerance)
    if as_json:
        facts = dict(report._asdict(), files=list(map(str, report.files)))
        show_json(dict(model=model, to=to, size=list(size), open_sizes=open_sizes, features=features, **facts))
        return
    said = report.note or f'differs from torch by {report.difference:.1e} of the largest value, on {report.pictures}'
    typer.echo(f'{", ".join(map(str, report.files))}: {report.bytes / 1e6:.1f} MB, {said}')


# data

@app.command('convert-data')
def convert_data(
        folder: Annotated[pathlib.Path, typer.Argument(
            metavar='FOLDER', exists=True, file_okay=False, help='Pictures and labels, in any usual layout.')],
        out: Annotated[pathlib.Path, typer.Option(
            metavar='FOLDER', help='A new folder, or that of an earlier conversion, which is replaced.')],
        val: Annotated[float, typer.Option(
            min=0, max=1, metavar='PART', help='Part of the pictures to draw for validation, where the data have no '
                                               'such split.')] = .2,
        seed: Annotated[int, typer.Option(metavar='N', help='Of that draw.')] = 0,
        as_json: Json = False,
) -> None:
    """Boxes and outlines of objects to COCO's format: VOC's XML, YOLO's text, COCO's JSON with gaps.

    Writes annotations/instances_train.json, instances_val.json and folders with the pictures (hard links where the disk
    allows it). What was left out is listed.
    """
    from san_backbones.data import convert
    from san_backbones.data.convert import describe
    report = convert(folder, out, val, seed)
    if as_json:
        show_json(report._asdict())
    else:
        describe(report, typer.echo)
        typer.echo(out)


# this machine

@app.command()
def benchmark(
        models: Annotated[list[str] | None, typer.Argument(
            metavar='MODEL', callback=check_model, autocompletion=model_names, show_default=False,
            help='Compared with resnet50. [default: san15_patchwise]')] = None,
        size: SizeOf = '224',
        batch_size: BatchSize = 8,
        rounds: Annotated[int, typer.Option(min=1, metavar='N', help='Times that every model runs.')] = 5,
        threads: Annotated[int | None, typer.Option(
            min=1, metavar='N', help="Threads of the CPU. [default: torch's choice]")] = None,
        device: Device = None,
        train: Annotated[bool, typer.Option(
            '--train', help='Run training steps (forward and backward) instead of inference.')] = False,
        fused: Annotated[bool, typer.Option('--fused', help='Also run SANs folded for inference.')] = False,
        memory: Annotated[bool, typer.Option(help='Measure peak memory, in a process for each model.')] = True,
        as_json: Json = False,
) -> None:
    """Speed and memory on this machine, compared with timm's resnet50.

    Models have random weights, float32 and channels_last, and run in turns: one warm-up call each, then rounds in which
    each runs once (a model that has used 20 seconds skips the rest). Seconds are the median of a call. Peak memory is
    measured in a separate process: on a GPU the memory that torch allocated, on the CPU (Linux only) the growth of the
    process after its imports. Close other programs first.
    """
    if fused and train:
        raise typer.BadParameter('--fused is for inference: leave out --train')
    import torch

    from san_backbones import measure
    where = parse_device(device)
    if threads:
        torch.set_num_threads(threads)
    peer = 'resnet50'
    names = dict.fromkeys([peer, *(models or ['san15_patchwise'])])
    cases: dict[str, Any] = {name: dict(name=name, fused=False) for name in names}
    if fused:
        ours = [name for name in cases if name.partition('.')[0] in MODELS or ':' in name]
        cases.update({f'{name}, fused': dict(name=name, fused=True) for name in ours})
        for name in names:
            if name not in ours and name != peer:
                to_stderr(f'{name} is no SAN: it is not folded')
    settings: dict[str, Any] = dict(batch_size=batch_size, image_size=size, training=train)
    to_stderr(f'{measure.machine(where)}; {"training step" if train else "inference"}, {_by(size)}, '
              f'batch {batch_size}, {rounds} rounds')
    peaks: dict[str, int | None] = dict.fromkeys(cases)
    if memory:
        for title, case in cases.items():
            arguments = json.dumps(dict(case, **settings, device=str(where), threads=threads))
            peaks[title] = measure.peak_memory(
                [sys.executable, '-m', 'san_backbones.measure', arguments], title, to_stderr)
    medians = measure.alternate(
        {title: measure.make(device=where, **case, **settings) for title, case in cases.items()}, rounds, where,
        report=to_stderr)
    results: list[dict[str, Any]] = [dict(
        model=title, seconds=_or_none(medians[title]), images_per_second=_or_none(batch_size / medians[title]),
        throughput_to_resnet50=_or_none(medians[peer] / medians[title]), peak_bytes=peaks[title]) for title in cases]
    if as_json:
        show_json(dict(machine=measure.machine(where), device=str(where), size=list(size), batch_size=batch_size,
                       rounds=rounds, training=train, models=results))
    else:
        rows = [(r['model'], _format(r['seconds'], '.4g'), _format(r['images_per_second'], '.4g'),
                 _format(r['throughput_to_resnet50'], '.2f'), _format(r['peak_bytes'] and r['peak_bytes'] / 1e6, '.0f'))
                for r in results]
        typer.echo(table([('model', 'seconds', 'images/s', 'to resnet50', 'peak MB'), *rows], 'lrrrr'))
    if any(r['seconds'] is None for r in results):
        raise RuntimeError('not every model could run')


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _format(value: float | None, digits: str) -> str:
    return '-' if value is None else format(value, digits)


def _parse_sizes(texts: Iterable[str]) -> 'tuple[distillation.Size, ...]':
    from san_backbones import distill as distillation
    try:
        return tuple(distillation.Size.parse(text) for text in texts)
    except ValueError as error:
        raise typer.BadParameter(f'--size: {error}') from error


@app.command()
def distill(
        sources: Annotated[list[str], typer.Argument(
            metavar='SOURCE', help='Pictures: folders, also with zips and tars in them, zips, tars (the shards of a '
                                   'WebDataset); SOURCE//PART for paths in it that begin with PART.')],
        teacher: Annotated[str, typer.Option(
            metavar='NAME', help='A timm model with pretrained weights, or MODULE:FUNCTION, which returns one or any '
                                 'callable.')],
        out: Annotated[pathlib.Path, typer.Option(
            metavar='FOLDER', help='For weights, checkpoints and the log. A run that was stopped is continued.')],
        model: Model = 'san10_patchwise',
        teacher_weights: Annotated[pathlib.Path | None, typer.Option(
            metavar='FILE', exists=True, dir_okay=False, help="The teacher's weights, instead of its own.")] = None,
        count: Annotated[int | None, typer.Option(
            '--pictures', min=1, metavar='N', help='End after N pictures; repeated ones count again.')] = None,
        minutes: Annotated[float | None, typer.Option(
            min=0, metavar='N', help='End after N minutes of training, including those before an interruption. With '
                                     'neither option it runs until it is stopped.')] = None,
        start: Annotated[pathlib.Path | None, typer.Option(
            metavar='FILE', exists=True, dir_okay=False,
            help='Start from last.pt of another run, or from the .safetensors of the model.')] = None,
        size: Annotated[list[str], typer.Option(
            metavar='PIXELS[xBATCH][:PICTURES]',
            help="Side of the student's pictures; repeat for several sizes in turn.")] = ['64'],  # noqa: B006
        teacher_scale: Annotated[float, typer.Option(
            metavar='X', help="The teacher's side as a multiple of the student's.")] = 2.,
        teacher_size: Annotated[int | None, typer.Option(
            min=1, metavar='PIXELS', help="Side of the teacher's pictures, for teachers with a fixed size.")] = None,
        level: Annotated[list[int], typer.Option(
            metavar='STRIDE', help='Strides of the feature maps to compare; 0 for none.')] = [8, 16, 32],  # noqa: B006
        crop: Annotated[float, typer.Option(
            metavar='X', help='Smallest part of a picture that a view shows.')] = .4,
        reuse: Annotated[bool, typer.Option(help="Reuse the teacher's classifier.")] = True,
        temperature: Annotated[float, typer.Option(metavar='T', help='Of the logits.')] = 1.,
        loss: Annotated[tuple[float, float, float], typer.Option(
            metavar='LOGITS POOLED MAPS', help='Weights of the parts of the loss.')] = (1., 4., 1.),
        lr: Annotated[float, typer.Option(metavar='X', help='Highest learning rate.')] = 1e-3,
        projection_lr: Annotated[float, typer.Option(
            metavar='X', help='Learning rate of the projections, as a part of --lr.')] = .1,
        weight_decay: Annotated[float, typer.Option(metavar='X', help="AdamW's.")] = .05,
        warmup: Annotated[int, typer.Option(
            metavar='PICTURES', help='Pictures over which the learning rate grows.')] = 5000,
        decay: Annotated[float, typer.Option(
            metavar='X', help='Last part of the training, over which the rate falls to 0 as a cosine; 1: all of it.',
        )] = .25,
        clip: Annotated[float, typer.Option(metavar='X', help='Largest norm of the gradient; 0: any.')] = 1.,
        ema: Annotated[float, typer.Option(
            metavar='X', help='Decay of the averaged weights per step.')] = .999,
        seed: Annotated[int, typer.Option(min=0, metavar='N')] = 0,
        precision: Annotated[str | None, typer.Option(
            metavar='fp32|bf16', help='Of the student. [default: bf16 on CUDA, else fp32]')] = None,
        teacher_precision: Annotated[str | None, typer.Option(
            metavar='fp32|bf16', help='Of the teacher. [default: as --precision]')] = None,
        save_minutes: Annotated[float, typer.Option(min=0, metavar='N', help='Between checkpoints.')] = 5.,
        keep: Annotated[int | None, typer.Option(
            min=1, metavar='PICTURES', help='Keep a copy of the averaged weights every so many pictures.')] = None,
        store: Annotated[pathlib.Path | None, typer.Option(
            metavar='FILE', help='Decoded pictures, for several runs. [default: pictures.bin in --out]')] = None,
        workers: Annotated[int | None, typer.Option(
            min=0, metavar='N', help='Threads that crop views. [default: 0 on the CPU, else one per core, up to 16]',
        )] = None,
        device: Device = None,
        as_json: Json = False,
) -> None:
    """Train a SAN on pictures without labels to give the outputs of a trained network.

    Averaged weights are written to model.safetensors in --out at intervals. Ctrl-C saves and ends; the same command
    continues, bit for bit if --pictures sets the end. Processes of `torchrun -m san_backbones distill ...` share the
    batches.
    """
    import torch.distributed

    from san_backbones import distill as distillation
    processes = int(os.environ.get('WORLD_SIZE', 1))
    where = parse_device(device or (f'cuda:{os.environ["LOCAL_RANK"]}' if processes > 1 and torch.cuda.is_available()
                                else None))
    precision = precision or ('bf16' if where.type == 'cuda' else 'fp32')
    try:
        settings = distillation.Settings(
            sizes=_parse_sizes(size), teacher_scale=teacher_scale, teacher_size=teacher_size, crop=crop,
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
            save_minutes=save_minutes, keep_pictures=keep, store=store, workers=workers, device=where, tell=to_stderr)
        first = processes == 1 or torch.distributed.get_rank() == 0
    finally:
        if processes > 1:
            torch.distributed.destroy_process_group()
    if first and as_json:
        show_json(done)
    elif first:
        typer.echo(f'{done["pictures"]} pictures in {done["seconds"] / 60:.1f} minutes: {done["weights"]}')
    if done['signal']:
        to_stderr(f'stopped by {done["signal"]}; the same command goes on')
        raise typer.Exit(1)


@app.command()
def env(as_json: Json = False) -> None:
    """Print what a bug report needs.

    Versions, the machine, which backends can run here and why others cannot, and environment variables.

    Tokens and passwords are left out, and the home folder is written as ~.
    """
    from san_backbones.cli import environment
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
    for device, reasons in facts['paths'].items():
        rows += [(f'backend {name}, {device}', 'can run' if reason is None else f'cannot run: {reason}')
                 for name, reason in reasons.items()]
    rows += list(facts['variables'].items())
    typer.echo(table(rows, 'll'))
