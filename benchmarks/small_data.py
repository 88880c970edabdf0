"""Trains classifiers from random weights on few pictures, to compare initialisations and recipes.

    python benchmarks/small_data.py --data FOLDER_OR_ZIP --models san10_patchwise resnet26 --seeds 0 1 2

The data holds `train/CLASS/*` and `val/CLASS/*`. Pictures are resized to 1.25 times --size without keeping the aspect
ratio; training takes a random crop of --size, mirrored or not, validation the centre crop. AdamW, one cycle.
`--variants` initialises SANs in other ways than the package: `random-last` makes the last convolution of each block as
torch does; all others do so too, and change gamma and the bound (what the package has of those is `kernel` in the
patchwise form; in the pairwise form four times torch's weights in gamma's last layer, of which `gain-...` are other
factors). One thread; seconds are processor time of training. The accuracy is that of the last epoch. `not_finite`
counts validation pictures whose logits are NaN or infinite, in the first, second, middle and last epoch. `recalibrated`
is the largest logit of the untrained network after `torch.optim.swa_utils.update_bn`, twice, on 36 training pictures in
batches of 12. Runs that the CSV already has are skipped.
"""
import argparse
import csv
import functools
import io
import itertools
import pathlib
import random
import time
import zipfile

import harness
import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

import san_backbones
from san_backbones.san import Block

MEAN, STD = (torch.tensor(x)[:, None, None] for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))


def bound(model, layers, limit):
    """Bounds the given ReLUs of every block, and no others."""
    for block in model.modules():
        if isinstance(block, Block):
            block.act1 = nn.ReLU(inplace=True)
            for name in layers:
                owner, _, last = name.rpartition('.')
                setattr(block.get_submodule(owner), last, nn.Hardtanh(0., limit))


def attentions(model):
    return [layer for layer in model.modules()
            if isinstance(layer, (san_backbones.PairwiseAttention, san_backbones.PatchwiseAttention))]


def last_linear(model, scale, kernel):
    """Initialises gamma's last layer: weights `scale` times torch's, and in patchwise form a kernel as each bias."""
    for attention in attentions(model):
        size, fc2 = attention.kernel_size, attention.weight_mlp.fc2
        fc2.reset_parameters()
        with torch.no_grad():
            fc2.weight.mul_(scale)
            if kernel:
                kernel(fc2.bias.view(-1, size * size), size)


def noise(bias, size):
    bias.normal_(0, 1 / size)


def impulse(bias, size):
    bias.normal_(0, .1 / size)[:, size * size // 2].add_(1)


def blur(bias, size):
    """Averages the footprint, as a pairwise layer with torch's weights does, plus noise."""
    bias.normal_(0, 1 / size).add_(1 / size ** 2)


def variant(change, bounded=('act1',), limit=6.):
    def apply(model):
        bound(model, bounded, limit)
        change(model)
    return apply


def scaled(*names):
    """Four times the package's projections of these names to begin with."""
    def change(model):
        with torch.no_grad():
            for layer in attentions(model):
                for parameter in (x for name in names for x in getattr(layer, name).parameters()):
                    parameter.mul_(4)
    return change


SCALED = {'phi-psi-4': scaled('query', 'key'), 'phi-4': scaled('query'), 'beta-4': scaled('value')}
VARIANTS = {
    'package': lambda model: None,
    **SCALED,
    'random-last': lambda model: None,
    'torch': variant(lambda model: last_linear(model, 1., None), ()),
    'bound': variant(lambda model: last_linear(model, 1., None)),
    'kernel': variant(lambda model: last_linear(model, .1, noise)),
    'impulse': variant(lambda model: last_linear(model, .1, impulse)),
    'flat-noise': variant(lambda model: last_linear(model, .1, blur)),
    **{f'gain-{gain}': variant(lambda model, gain=gain: last_linear(model, gain, None), ()) for gain in (2, 8, 16)},
}


KERNELS = ('kernel', 'impulse', 'flat-noise')  # a bias of gamma that is a kernel, which the pairwise form has not


def make(name, variant, classes, **options):
    if variant in KERNELS and 'patchwise' not in name:
        raise SystemExit(f'--variants {variant} is of the patchwise form, whose gamma makes kernels; got {name}')
    if variant != 'package' and variant not in SCALED:
        options['zero_init_last'] = False
    model = timm.create_model(name, num_classes=classes, **options)
    VARIANTS[variant](model)
    return model


def listing(data, split):
    """The pictures of a split: for each class a list of functions that read a file, in the order of the names."""
    if data.is_dir():
        files = {str(path.relative_to(data)): path.read_bytes for path in data.glob(f'{split}/*/*') if path.is_file()}
    else:
        archive = zipfile.ZipFile(data)
        files = {name: lambda name=name: archive.read(name) for name in archive.namelist()
                 if name.startswith(f'{split}/') and not name.endswith('/')}
    if not files:
        raise SystemExit(f'{data}: expected pictures in {split}/CLASS/, found none')
    classes = {}
    for name in sorted(files, key=lambda name: name.split('/')):
        classes.setdefault(name.split('/')[1], []).append(files[name])
    return list(classes.values())


def pictures(data, split, size, every):
    """Every n-th picture of each class, squashed to size x size: (N, 3, size, size) uint8, and the labels."""
    images, labels = [], []
    for label, files in enumerate(listing(data, split)):
        for read in files[::every]:
            picture = Image.open(io.BytesIO(read())).convert('RGB')
            images.append(np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)))
            labels.append(label)
    return torch.tensor(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def normalised(images):
    return (images.float() / 255 - MEAN.to(images.device)) / STD.to(images.device)


def recalibrated(model, images):
    """Returns the largest logit after batch norms took their statistics from `images`, twice."""
    batches = images.split(12)
    for _ in range(2):
        torch.optim.swa_utils.update_bn(batches, model)
    model.eval()
    with torch.no_grad():
        logits = model(images)
    return float(logits.abs().max()) if logits.isfinite().all() else float('nan')


def validate(model, images, labels):
    """Returns accuracy, cross-entropy, and how many pictures have logits that are not finite."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = torch.cat([model(normalised(part.to(device))).float().cpu() for part in images.split(50)])
    return (float((logits.argmax(1) == labels).float().mean()), float(F.cross_entropy(logits, labels)),
            int((~logits.isfinite().all(1)).sum()))


def train(key, data):
    """Runs one training and returns its row."""
    (x, y), (x_val, y_val) = data
    name, variant, seed, size, batch, epochs = (
        key[k] for k in ('model', 'variant', 'seed', 'size', 'batch', 'epochs'))
    torch.manual_seed(seed)
    random.seed(seed)
    margin, classes = x.shape[-1] - size, int(y.max()) + 1
    x_val = x_val[:, :, margin // 2:margin // 2 + size, margin // 2:margin // 2 + size]
    some = x[::max(1, len(x) // 36), :, :size, :size][:36]
    largest = recalibrated(make(name, variant, classes), normalised(some))
    torch.manual_seed(seed)
    model = make(name, variant, classes)
    batches = len(x) // batch
    optimizer = torch.optim.AdamW(model.parameters(), key['lr'], weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, key['lr'], epochs * batches + 1)
    seconds, not_finite, norms = 0., 0, []
    for epoch in range(epochs):
        model.train()
        order, total, started = torch.randperm(len(x)), 0., time.process_time()
        for rows in order[:batches * batch].split(batch):
            top, left = random.randint(0, margin), random.randint(0, margin)
            images = normalised(x[rows][:, :, top:top + size, left:left + size])
            loss = F.cross_entropy(model(images.flip(3) if random.random() < .5 else images), y[rows],
                                   label_smoothing=.1)
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), key['clip'] or float('inf'))))
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds += time.process_time() - started
        if epoch + 1 in (1, 2, epochs // 2, epochs):
            accuracy, loss, bad = validate(model, x_val, y_val)
            not_finite += bad
    return key | dict(
        accuracy=f'{100 * accuracy:.1f}', loss=f'{loss:.3f}', train_loss=f'{total / batches:.3f}',
        not_finite=not_finite, steepest=f'{max(norms):.3g}', recalibrated=f'{largest:.3g}',
        cpu_seconds=f'{seconds:.0f}', machine=harness.machine())


def once(path, key, run):
    """Returns the CSV's row with the values in `key`; if there is none, adds the one that run() returns."""
    rows = []
    if path.exists():
        with open(path, newline='') as file:
            rows = list(csv.DictReader(file))
    for row in rows:
        if all(row[name] == str(value) for name, value in key.items()):
            return row
    row = run()
    harness.show(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator='\n')
        if not rows:
            writer.writeheader()
        writer.writerow(row)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=pathlib.Path, required=True, metavar='FOLDER|ZIP')
    parser.add_argument('--models', nargs='+', default=['san10_patchwise'])
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=['package'])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--every', nargs=2, type=int, default=(1, 1), metavar='N',
                        help='take every n-th picture of train, of val (default: all)')
    parser.add_argument('--size', type=int, default=64, help='pixels (default: %(default)s)')
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--lr', nargs='+', type=float, default=[2e-3], help='peak learning rates')
    parser.add_argument('--clip', nargs='+', type=float, default=[1.], help='largest norm of the gradient; 0: any')
    parser.add_argument('--results', type=pathlib.Path, default=harness.RESULTS, help='folder for the CSV')
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.results / 'small-data.csv'
    data = [pictures(options.data, split, options.size * 5 // 4, every)
            for split, every in zip(('train', 'val'), options.every)]
    for seed, lr, clip, model, variant in itertools.product(
            options.seeds, options.lr, options.clip, options.models, options.variants):
        key = dict(data=options.data.stem, model=model, variant=variant, seed=seed, pictures=len(data[0][0]),
                   size=options.size, batch=options.batch, epochs=options.epochs, lr=lr, clip=clip)
        once(path, key, functools.partial(train, key, data))


if __name__ == '__main__':
    main()
