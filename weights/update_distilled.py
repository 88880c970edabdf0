"""Puts what `san-backbones distill` made into this folder, with its card and its digest.

    python weights/update_distilled.py work_dirs/distilled
    python weights/update_distilled.py work_dirs/distilled --weights work_dirs/distilled/kept/000100000.safetensors

The folder is the command's --out. The card says what the run's checkpoint and log tell, and the scores of these weights
that `benchmarks/transfer.py` has written, if any.
"""
import argparse
import csv
import json
import pathlib
import tempfile

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from san_backbones.weights.convert import convert

ROOT = pathlib.Path(__file__).resolve().parent.parent

TEXT = """\
A SAN10 that learnt from a trained network what 35,705 small photographs show, without labels, on one thread of a busy
processor: {pictures} views of {pixels} pixels, in {hours:.1f} hours. It is meant as a beginning for trainings of your
own, where random weights are all there is else; the table below says how far that is true. It is **no replacement for
weights that were trained on ImageNet** (`{architecture}.in1k`: {paper} % top-1 in the paper), and no classifier to rely
on.

## Training

`san-backbones distill` with EfficientNet-Lite0 as the teacher (Apache-2.0, trained on ImageNet-1k by its authors): KL
divergence of the logits, and the teacher's features at strides 8, 16, 32 and in front of its classifier, which the
student took over. The photographs are 23,987 of 100 ImageNet classes at 84 pixels, 9,025 of ten breeds of dogs and
2,693 of COCO; nobody's labels were used. ImageNet's pictures are for research; whether that binds weights is for you to
judge. The weights are averages over steps; matrices are rounded to bfloat16 and kept in float16, so that they pack
smaller.

| setting | |
| --- | --- |
{settings}

## What they are worth

{scores}

Zero-shot is the classifier's top-1 and top-5 on one photograph each of 990 classes, which training did not see; `seen`
are those of the classes that its photographs show, `others` the rest, which it knows by the teacher's answers alone.
kNN and linear are of Imagenette's 400 validation pictures with 1,000 to learn from. By `benchmarks/transfer.py`.

`timm.create_model('{name}', pretrained=True)` takes these weights out of the installed package.{positions}
"""

POSITIONS = """

In MMEngine configs, as below, `position_ref_size={pixels}` beside these weights makes the steps of the coordinates
those of training, at every size. `SANBackbone`'s own value, 224, is for weights of ImageNet."""


def scores(model, pictures):
    """The rows of transfer.csv for these weights, random ones and the teacher."""
    path = ROOT / 'benchmarks' / 'results' / 'transfer.csv'
    rows = list(csv.DictReader(path.open(newline=''))) if path.exists() else []
    rows = [row for row in rows if row['pictures'] == '' or row['network'].startswith(f'{model}, ')
            and row['pictures'] in ('0', str(pictures))]
    if not any(row['pictures'] == str(pictures) for row in rows):
        return 'Nobody has measured these weights.'
    lines = ['| network | pixels | top-1 | top-5 | top-1, seen / others | kNN | linear |', '| --- ' * 7 + '|']
    for row in rows:
        apart = f'{row["top1_seen"]} / {row["top1_others"]}' if row['top1'] else '-'
        lines.append(f'| {row["network"]} | {row["size"]} | {row["top1"] or "-"} | {row["top5"] or "-"} | {apart} | '
                     f'{row["knn"]} | {row["linear"]} |')
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=pathlib.Path, help="a distillation's --out")
    parser.add_argument('--weights', type=pathlib.Path, metavar='FILE', help='instead of its model.safetensors')
    parser.add_argument('--before', type=int, default=0, metavar='PICTURES',
                        help='that the weights had seen where the run started from')
    parser.add_argument('--hours', type=float, default=0, help='of those before, and of runs between')
    parser.add_argument('--model', default='san10_patchwise')
    options = parser.parse_args()
    weights = options.weights or options.run / 'model.safetensors'
    with safe_open(weights, 'pt') as file:
        pictures = int(file.metadata()['pictures'])
    about = torch.load(options.run / 'last.pt', map_location='cpu', weights_only=True)['about']
    log = [json.loads(line) for line in (options.run / 'log.jsonl').read_text().splitlines()]
    log = [line for line in log if line['pictures'] <= pictures] or log
    pictures += options.before
    settings = about['settings']
    path = ROOT / 'weights' / 'manifest.json'
    manifest = json.loads(path.read_text())
    name = f'{options.model}.distilled'
    text = TEXT.format(
        name=name, architecture=options.model, paper=manifest['models'][f'{options.model}.in1k']['paper_top1'],
        pictures=f'{pictures:,}',
        hours=log[-1]['seconds'] / 3600 + options.hours, scores=scores(options.model, pictures),
        pixels=' and '.join(dict.fromkeys(str(size['pixels']) for size in settings['sizes'])),
        positions=POSITIONS.format(pixels=settings['sizes'][-1]['pixels']) if 'pairwise' in options.model else '',
        settings='\n'.join(f'| `{key}` | {json.dumps(value)} |' for key, value in settings.items()))
    with tempfile.TemporaryDirectory() as folder:
        rounded = pathlib.Path(folder) / weights.name
        save_file({key: tensor.bfloat16().to(tensor.dtype) if tensor.dim() > 1 else tensor
                   for key, tensor in load_file(weights).items()}, rounded)
        done = convert(rounded, options.model, ROOT / 'weights' / name, tag='distilled', license='apache-2.0',
                       text=text, half=True, force=True)
    parameters = sum(tensor.numel() for key, tensor in torch.load(
        options.run / 'last.pt', map_location='cpu', weights_only=True)['student'].items()
        if key.startswith('model.') and not key.endswith(('running_mean', 'running_var', 'tracked', 'bound')))
    manifest['models'][name] = dict(architecture=options.model, tag='distilled', sha256=done.sha256,
                                    parameters=parameters, license='apache-2.0')
    path.write_text(json.dumps(manifest, indent=2) + '\n')
    print(f'{done.folder}: {pictures} pictures, SHA-256 {done.sha256}')


if __name__ == '__main__':
    main()
