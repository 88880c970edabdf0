"""Evaluates weights without further training: zero-shot, nearest neighbours, a linear probe.

    python benchmarks/transfer.py --data FOLDER --weights san10_patchwise:work_dirs/distilled/model.safetensors
    python benchmarks/transfer.py --data FOLDER --random san10_patchwise --seeds 0 1 2
    PYTHONPATH=benchmarks python benchmarks/transfer.py --data FOLDER --teacher teachers:lite0 --sizes 160 224

FOLDER holds `pretrain/imagenet_samples_224.zip` (one photograph of each of 990 ImageNet classes, `WNID_*.webp`, never
used in training), `pretrain/mini_imagenet_84.zip`, whose classes are those that the distillation saw, and
`imagenette_small/{train,val}/WNID/*`. Pictures are cropped to a square and scaled to --sizes.

Zero-shot applies the network's own classifier to the samples, separately for classes seen in training (without labels)
and others; chance is 1 in 1,000 for top-1 and 5 in 1,000 for top-5. kNN: 20 neighbours by cosine among the 1,000
training pictures of Imagenette, weighted with exp(similarity / 0.07), on its 400 validation pictures. Linear: logistic
regression on standardised pooled features, with a penalty of 1e-3. A network with random weights takes its norms'
statistics from the training pictures. Files of weights, those in `kept/` too, know the number of pictures seen, for the
curve of scores (`plot.py`); --label tells the curves of several trainings apart.
"""
import argparse
import functools
import io
import pathlib
import zipfile

import harness
import small_data
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data import ImageNetInfo

import san_backbones  # noqa: F401
from san_backbones.distill import load_teacher


def square(picture, size):
    """Crops the centre square of a picture to (3, size, size) uint8."""
    picture = picture.convert('RGB')
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    small = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


@functools.cache
def samples(data, size):
    """Returns pictures, their ImageNet classes, and whether each class was seen in training."""
    wnids = ImageNetInfo().label_names()
    with zipfile.ZipFile(data / 'pretrain' / 'mini_imagenet_84.zip') as archive:
        seen = {name.split('/')[0] for name in archive.namelist()}
    with zipfile.ZipFile(data / 'pretrain' / 'imagenet_samples_224.zip') as archive:
        names = sorted(name for name in archive.namelist() if name.endswith('.webp'))
        images = torch.stack([square(Image.open(io.BytesIO(archive.read(name))), size) for name in names])
    kinds = [name.rpartition('/')[2].partition('_')[0] for name in names]
    return images, torch.tensor([wnids.index(kind) for kind in kinds]), torch.tensor([kind in seen for kind in kinds])


@functools.cache
def imagenette(data, split, size):
    """Returns pictures and classes."""
    files = sorted((data / 'imagenette_small' / split).glob('*/*.jpg'))
    if not files:
        raise SystemExit(f'--data {data}: there are no pictures imagenette_small/{split}/*/*.jpg')
    classes = sorted({file.parent.name for file in files})
    return (torch.stack([square(Image.open(file), size) for file in files]),
            torch.tensor([classes.index(file.parent.name) for file in files]))


@torch.inference_mode()
def run(model, images):
    """Returns logits and pooled features."""
    mean, std = (255 * torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    found, dtype = [], next(model.parameters()).dtype
    for part in images.split(50):
        last = model.forward_features(((part - mean) / std).to(dtype))
        found.append((model.forward_head(last).float(), model.forward_head(last, pre_logits=True).float()))
    return [torch.cat(each) for each in zip(*found)]


def neighbours(train, y, val, y_val):
    """Returns the accuracy of a vote of 20 neighbours."""
    mean = train.mean(0)
    similarity, near = (F.normalize(val - mean) @ F.normalize(train - mean).T).topk(20)
    votes = torch.zeros(len(val), int(y.max()) + 1).scatter_add_(1, y[near], (similarity / .07).exp())
    return votes.argmax(1).eq(y_val).float().mean()


def probe(train, y, val, y_val, penalty=1e-3):
    """Returns the accuracy of a linear classifier. The problem is convex, so the result does not depend on a seed."""
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, val = (train - mean) / std, (val - mean) / std
    layer = torch.nn.Linear(train.shape[1], int(y.max()) + 1)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn='strong_wolfe')

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(layer(train), y) + penalty * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return layer(val).argmax(1).eq(y_val).float().mean()


def score(key, data, model, trained):
    """Evaluates one network and returns its row."""
    size, percent = key['size'], '{:.1f}'.format
    x, y = imagenette(data, 'train', size)
    x_val, y_val = imagenette(data, 'val', size)
    if not trained:
        batches = small_data.normalised(x[torch.randperm(len(x))]).split(100)
        torch.optim.swa_utils.update_bn(batches, model)
    model.eval()
    train, val = run(model, x)[1].clone(), run(model, x_val)[1].clone()
    row = dict.fromkeys(('top1', 'top5', 'top1_seen', 'top5_seen', 'top1_others', 'top5_others'), '')
    if trained and model.num_classes == 1000:
        images, classes, seen = samples(data, size)
        best = run(model, images)[0].topk(5).indices.eq(classes[:, None])
        for name, part in (('', slice(None)), ('_seen', seen), ('_others', ~seen)):
            row[f'top1{name}'] = percent(100 * best[part, 0].float().mean())
            row[f'top5{name}'] = percent(100 * best[part].any(1).float().mean())
    return key | row | dict(knn=percent(100 * neighbours(train, y, val, y_val)),
                            linear=percent(100 * probe(train, y, val, y_val)), machine=harness.machine())


def weighted(name, file):
    """Returns a model with the weights of a file, and how many pictures they have seen."""
    state = load_file(file)
    with safe_open(file, 'pt') as opened:
        pictures = (opened.metadata() or {}).get('pictures', '')
    classes = next((len(tensor) for key, tensor in state.items()
                    if key.endswith(('fc.weight', 'classifier.weight')) and 'attn' not in key and 'blocks' not in key),
                   1000)
    model = timm.create_model(name, num_classes=classes)
    model.load_state_dict(state)
    return model, pictures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=pathlib.Path, required=True, metavar='FOLDER')
    parser.add_argument('--weights', nargs='+', default=[], metavar='MODEL:FILE', help='.safetensors of distillations')
    parser.add_argument('--label', default='distilled', help='what to call them (default: distilled)')
    parser.add_argument('--before', type=int, default=0, metavar='PICTURES',
                        help='that the weights had seen where the distillation started from')
    parser.add_argument('--random', nargs='+', default=[], metavar='MODEL', help='with random weights')
    parser.add_argument('--teacher', nargs='+', default=[], metavar='NAME', help='as for san-backbones distill')
    parser.add_argument('--precision', choices=['float32', 'int8', 'bfloat16'], default='float32',
                        help='of a SAN after fuse_for_inference, unless it is float32')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help='of the random weights')
    parser.add_argument('--sizes', nargs='+', type=int, default=[64, 96], help='pixels (default: 64 96)')
    parser.add_argument('--results', type=pathlib.Path, default=harness.RESULTS, help='folder for the CSV')
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.results / 'transfer.csv'

    def add(network, pictures, seed, make, trained):
        if options.precision != 'float32':
            network, made = f'{network}, {options.precision}', make

            def make():
                model = made().eval().fuse_for_inference(int8=options.precision == 'int8')
                return model.bfloat16() if options.precision == 'bfloat16' else model
        for size in options.sizes:
            key = dict(network=network, pictures=pictures, seed=seed, size=size)
            small_data.once(path, key, lambda key=key: score(key, options.data, make(), trained))

    for each in options.weights:
        name, _, file = each.partition(':')
        pictures = str(int(weighted(name, file)[1] or 0) + options.before)
        add(f'{name}, {options.label}', pictures, 0, lambda name=name, file=file: weighted(name, file)[0], True)
    for name in options.random:
        for seed in options.seeds:
            def make(name=name, seed=seed):
                torch.manual_seed(seed)
                return timm.create_model(name, zero_init_last=False)  # else its blocks would do nothing
            add(f'{name}, random', 0, seed, make, False)
    for name in options.teacher:
        add(name, '', 0, lambda name=name: load_teacher(name), True)


if __name__ == '__main__':
    main()
