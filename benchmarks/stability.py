"""Tests whether networks from random weights stay finite, however they are trained.

    python benchmarks/stability.py                   # hours; continues where it was stopped
    python benchmarks/stability.py --summary         # a table of the results so far
    python benchmarks/stability.py --precision       # minutes: the effect of bfloat16 on untrained networks

The data are crops of scikit-image's photographs; the photograph is the class. A row holds, for one network and seed,
the largest logit (NaN if one is not finite) over all crops in eval mode after

- `update_bn`: two rounds of `torch.optim.swa_utils.update_bn` on 36 crops twice as large, untrained;
- `lr_...`: three epochs of AdamW, one cycle, the norm of the gradient at most 1;
- `ema`, `swa`, `precise_bn`: of the training at 2e-3, the exponential average of the weights, the average of the
  epochs' weights with recomputed statistics, and the last weights with recomputed statistics;
- `batch_...`: the same at 2e-3 with small batches; `frozen_norms`: with every norm in eval mode from the first step;
- `bf16`: trained and evaluated under bfloat16 autocast.

`bf16_error` is the relative error of the untrained network's logits in training mode under bfloat16 autocast.
`--precision` prints it for three seeds, with the change of the float32 logits if only the images are rounded to
bfloat16, which shows how much the network amplifies any disturbance. One thread; seconds are processor time.
"""
import argparse
import copy
import csv
import functools
import math
import pathlib
import statistics
import time

import harness
import small_data
import torch
import torch.nn.functional as F
from skimage import data
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

PHOTOGRAPHS = ('astronaut', 'chelsea', 'coffee', 'rocket')
MODELS = ('resnet26', *(f'{name}_{form}' for name in ('san10', 'san15', 'san19') for form in ('patchwise', 'pairwise')))
RATES = (5e-4, 2e-3, 1e-2)


def crops(number, size):
    """Returns normalised crops (number, 3, size, size), and the index of each one's photograph."""
    generator = torch.Generator().manual_seed(0)
    photographs = [torch.tensor(getattr(data, name)()).permute(2, 0, 1) for name in PHOTOGRAPHS]
    images, labels = [], torch.arange(number) % len(photographs)
    for label in labels:
        photograph = photographs[label]
        top, left = (int(torch.randint(side - 2 * size, (), generator=generator)) for side in photograph.shape[1:])
        crop = photograph[None, :, top:top + 2 * size, left:left + 2 * size].float()
        images.append(F.avg_pool2d(crop, 2))
    order = torch.randperm(number, generator=generator)
    return small_data.normalised(torch.cat(images))[order], labels[order]


def largest(model, images, bf16=False):
    """Returns the largest logit in eval mode; NaN if one is not finite."""
    model.eval()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        logits = torch.cat([model(part) for part in images.split(32)]).float()
    return float(logits.abs().max()) if logits.isfinite().all() else float('nan')


def train(model, images, labels, lr=2e-3, batch=32, epochs=3, frozen=False, bf16=False, averages=()):
    steps = epochs * math.ceil(len(images) / batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps + 1)
    for _ in range(epochs):
        model.train()
        for module in model.modules():
            if frozen and isinstance(module, _BatchNorm):
                module.eval()
        for rows in torch.randperm(len(images)).split(batch):
            with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(images[rows]).float(), labels[rows], label_smoothing=.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            schedule.step()
            for average in averages[:1]:
                average.update_parameters(model)
        for average in averages[1:]:
            average.update_parameters(model)
    return model


def recalibrated(model, images):
    for _ in range(2):
        update_bn(images[:36].split(12), model)
    return model


def precision(name, variant, seed, images):
    """Returns relative changes of untrained logits in training mode: by bfloat16 autocast, by rounding only images."""
    torch.manual_seed(seed)
    # zeros in the last layer of each block would hide rounding errors
    model = small_data.make(name, variant, len(PHOTOGRAPHS), zero_init_last=False).train()
    with torch.no_grad():
        exact, disturbed = model(images), model(images.bfloat16().float())
        with torch.autocast('cpu', torch.bfloat16):
            rounded = model(images).float()
    return [float((logits - exact).norm() / exact.norm()) for logits in (rounded, disturbed)]


def run(name, variant, seed, options):
    """Runs all trainings of one row."""
    started, row = time.process_time(), dict(model=name, variant=variant, seed=seed)
    images, labels = crops(options.pictures, options.size)

    def make():
        torch.manual_seed(seed)
        return small_data.make(name, variant, len(PHOTOGRAPHS))

    row['update_bn'] = largest(recalibrated(make(), crops(36, 2 * options.size)[0]), images)
    for lr in RATES:
        model = make()
        averages = (AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(.9), use_buffers=True),
                    AveragedModel(model)) if lr == 2e-3 else ()
        row[f'lr_{lr:g}'] = largest(train(model, images, labels, lr, averages=averages), images)
        if averages:
            ema, swa = averages
            row['ema'], row['swa'] = largest(ema, images), largest(recalibrated(swa, images), images)
            row['precise_bn'] = largest(recalibrated(copy.deepcopy(model), images), images)
    for batch in (2, 8):
        row[f'batch_{batch}'] = largest(train(make(), images, labels, batch=batch), images)
    row['frozen_norms'] = largest(train(make(), images, labels, frozen=True), images)
    row['bf16'] = largest(train(make(), images, labels, bf16=True), images, bf16=True)
    row['bf16_error'] = precision(name, variant, seed, images)[0]
    return {key: f'{value:.3g}' if isinstance(value, float) else value for key, value in row.items()} | dict(
        pictures=options.pictures, size=options.size, cpu_seconds=f'{time.process_time() - started:.0f}',
        machine=harness.machine())


def summary(rows):
    """Prints for each network and condition how many runs were not finite, and the median of the largest logits."""
    for key in dict.fromkeys((row['model'], row['variant']) for row in rows):
        same = [row for row in rows if (row['model'], row['variant']) == key]
        table = {}
        for condition in list(rows[0])[3:-4]:
            values = [float(row[condition]) for row in same]
            finite = [value for value in values if value == value]
            middle = f'{statistics.median(finite):.2g}' if finite else '-'
            table[condition] = middle if condition == 'bf16_error' else \
                f'{len(values) - len(finite)}/{len(values)} ({middle}, at most {max(finite, default=0):.2g})'
        print(*key, *(f'\n    {condition}: {text}' for condition, text in table.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=MODELS)
    parser.add_argument('--variants', nargs='+', choices=small_data.VARIANTS, default=['package'])
    parser.add_argument('--seeds', type=int, default=20, help='end of the range of seeds (default: %(default)s)')
    parser.add_argument('--first-seed', type=int, default=0, help='start of the range, for several processes')
    parser.add_argument('--pictures', type=int, default=48, help='crops to train on (default: %(default)s)')
    parser.add_argument('--size', type=int, default=32, help='pixels of a crop (default: %(default)s)')
    parser.add_argument('--summary', action='store_true', help='only print the table')
    parser.add_argument('--precision', action='store_true', help='only measure the effect of bfloat16')
    parser.add_argument('--results', type=pathlib.Path, default=harness.RESULTS, help='folder for the CSV')
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.precision:
        for name in (*options.models, 'resnet50'):
            errors = [precision(name, 'package', seed, crops(options.pictures, options.size)[0]) for seed in range(3)]
            print(name, *(f'{what} {min(values):.3f} to {max(values):.3f}' for what, values in zip(
                ('autocast', 'images rounded'), zip(*errors))), flush=True)
        return
    path = options.results / 'stability.csv'
    for seed in () if options.summary else range(options.first_seed, options.seeds):
        for name in options.models:
            for variant in options.variants:
                key = dict(model=name, variant=variant, seed=seed, pictures=options.pictures, size=options.size)
                small_data.once(path, key, functools.partial(run, name, variant, seed, options))
    with open(path, newline='') as file:
        summary(list(csv.DictReader(file)))


if __name__ == '__main__':
    main()
