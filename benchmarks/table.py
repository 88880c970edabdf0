"""Trains SANs and timm's ResNets from random weights on Imagewoof, side by side: the paper's comparisons in small.

    python benchmarks/table.py --data imagewoof_144.zip                      # four models, three seeds
    python benchmarks/table.py --data imagewoof_144.zip --models san10_pairwise san10_patchwise --seeds 0 \\
        --every 10 4 --relations --footprints --positions                    # the ablations, on a tenth
    python benchmarks/table.py --page                                        # writes the page's tables from the CSV

The data holds `train/CLASS/*` and `val/CLASS/*`. Augmentation, optimizer, schedule and loss are timm's: a random crop
of at least 0.35 of the picture, scaled to --size and mirrored or not; SGD with momentum 0.9, a weight decay of 1e-4 on
every parameter, the cosine from the first step, label smoothing of 0.1. The norm of the gradient is bounded, by 1, in
the patchwise form only, unless --clip says otherwise. Every 20th picture of train is held out: on those the learning
rate of each model is chosen, by short trainings with each of --rates, and the accuracy after each epoch is taken. `val`
is scored once, after the last step. Ablations change one thing at a time, and keep the learning rate of their model.

What is drawn in a step depends on seed, epoch and picture alone, so that a training goes on from its checkpoint as if
it had not been stopped, on a processor bit for bit. Runs that the CSV has are skipped. Seconds are processor time of
training steps, on a GPU the time that passed.
"""
import argparse
import ast
import csv
import functools
import io
import os
import pathlib
import random
import re
import statistics
import time

import harness
import small_data
import torch
from PIL import Image
from timm.data import create_transform
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler

from san_backbones.ops import POSITIONS
from san_backbones.san import DEPTHS, RELATIONS

MODELS = ('san10_pairwise', 'san10_patchwise', 'resnet26', 'resnet50')
EVERY_RELATION = list(dict.fromkeys(RELATIONS['pairwise'] + RELATIONS['patchwise']))
FOOTPRINTS = (3, 5, 7, 9, 11)
HELD_OUT = 20
PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'explanation' / 'accuracy.md'


def form(model):
    """Returns 'pairwise' or 'patchwise', or None for other networks."""
    if model in DEPTHS:
        return 'patchwise'
    return next((name for name in RELATIONS if model.endswith(name)), None)


def base(model):
    """Returns what can be changed in a network, as the package has it; blank where there is nothing to change."""
    kind = form(model)
    changes = dict(variant='package', undecayed='', rate_of='', momentum='')
    if kind is None:
        return dict(relation='', footprint='', position='', option='') | changes
    return dict(relation={'pairwise': 'subtraction', 'patchwise': 'concatenation'}[kind], footprint=7,
                position='relative' if kind == 'pairwise' else '', option='') | changes


def largest_norm(model):
    """Returns the bound on the gradient's norm, where no other is asked for; 0 is none."""
    return 1. if form(model) == 'patchwise' else 0.


def variations(model, options):
    """Returns the network as the package has it, and with each change that is asked for."""
    kind, first = form(model), base(model)
    if kind is None:
        return [first]
    asked = dict(relation=[name for name in options.relations if name in RELATIONS[kind]],
                 footprint=options.footprints, option=options.options,
                 position=options.positions if kind == 'pairwise' else [],
                 variant=[name for name in options.variants if kind == 'patchwise' or name not in small_data.KERNELS],
                 undecayed=options.undecayed, rate_of=options.rate_of, momentum=options.momentum)
    found = [first] + [first | {what: value} for what, values in asked.items() for value in values]
    return [change for i, change in enumerate(found) if change not in found[:i]]


def make(key, classes):
    """Creates a network; the footprint of the first stage stays 3."""
    options = {name: key[name] for name in ('relation', 'position') if key[name]}
    if key['option']:
        name, _, value = key['option'].partition('=')
        try:
            options[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):  # a word
            options[name] = value
    if key['footprint']:
        options['kernel_sizes'] = (3, *4 * (key['footprint'],))
    return small_data.make(key['model'], key['variant'], classes, **options)


class Views(torch.utils.data.Dataset):
    """Training pictures, encoded in memory. An item is (index, seed), and is drawn by that seed alone."""

    def __init__(self, files, size):
        self.files = [(read(), label) for read, label in files]
        self.transform = create_transform(
            size, is_training=True, scale=(.35, 1.), color_jitter=None, interpolation='bicubic', normalize=False)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, item):
        index, seed = item
        random.seed(seed)
        torch.random.default_generator.manual_seed(seed)
        content, label = self.files[index]
        return self.transform(Image.open(io.BytesIO(content)).convert('RGB')), label


def seen(files, size):
    """Returns pictures as they are evaluated, (N, 3, size, size) uint8, and their labels."""
    transform = create_transform(size, interpolation='bicubic', normalize=False)
    images = [transform(Image.open(io.BytesIO(read())).convert('RGB')) for read, _ in files]
    return torch.stack(images), torch.tensor([label for _, label in files])


def split(data, every):
    """Returns pictures to train on, held-out ones, and those of val, as lists of (read, label)."""
    train, held_out = [], []
    for label, files in enumerate(small_data.listing(data, 'train')):
        middle = HELD_OUT // 2
        held_out += [(read, label) for read in files[middle::HELD_OUT]]
        train += [(read, label) for i, read in enumerate(files) if i % HELD_OUT != middle][::every[0]]
    val = [(read, label) for label, files in enumerate(small_data.listing(data, 'val')) for read in files[::every[1]]]
    return train, held_out, val


def batches(count, batch, seed, epoch):
    """Returns the items of each batch of an epoch."""
    start = (1000 * seed + epoch) * 10 ** 6
    order = torch.randperm(count, generator=torch.Generator().manual_seed(start)).tolist()
    return [[(index, start + index) for index in order[i:i + batch]] for i in range(0, count - batch + 1, batch)]


def clock():
    return time.process_time() if harness.DEVICE.type == 'cpu' else time.perf_counter()


class Training:
    """One training, which can be saved after any step."""

    def __init__(self, key, views, classes, workers=0):
        self.key, self.views, self.workers = key, views, workers
        torch.manual_seed(key['seed'])
        self.model = make(key, classes).to(harness.DEVICE, memory_format=torch.channels_last)
        free = [name for name, _ in self.model.named_parameters()
                if key['undecayed'] and re.search(key['undecayed'], name)]
        self.optimizer = create_optimizer_v2(
            self.model, 'momentum', key['lr'], weight_decay=1e-4, momentum=.9,
            param_group_fn=lambda model: param_groups_weight_decay(model, 1e-4, False, free))
        self.apart()
        self.length = len(batches(len(views), key['batch'], 0, 0))
        if not self.length:
            raise SystemExit(f'{len(views)} pictures to train on do not fill a batch of {key["batch"]}')
        warm_up = round(key['warm_up'] * self.length)
        self.schedule = CosineLRScheduler(self.optimizer, key['epochs'] * self.length - warm_up, warmup_t=warm_up,
                                          warmup_prefix=True, t_in_epochs=False)
        self.loss = LabelSmoothingCrossEntropy(.1)
        self.dtype = harness.set_precision(key['precision'])
        self.done = dict(step=0, seconds=0., total=0., steepest=0., held_out=[], times=[])

    def apart(self):
        """Gives parameters a rate, and norms a momentum, of their own, where the key asks for it."""
        pattern, _, factor = self.key['rate_of'].rpartition('=')
        if pattern:
            names = {id(p): name for name, p in self.model.named_parameters()}
            if not any(re.search(pattern, name) for name in names.values()):
                raise SystemExit(
                    f'--rate-of {self.key["rate_of"]}: no parameter of {self.key["model"]} has a name that matches '
                    f'{pattern!r}; they are {", ".join(names.values())}')
            for group in list(self.optimizer.param_groups):
                own = [p for p in group['params'] if re.search(pattern, names[id(p)])]
                group['params'] = [p for p in group['params'] if not re.search(pattern, names[id(p)])]
                self.optimizer.add_param_group(group | dict(params=own, lr_scale=float(factor)))
        for norm in self.model.modules():
            if self.key['momentum'] and isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = self.key['momentum']

    def save(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix('.part')
        torch.save(dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), done=self.done), part)
        os.replace(part, path)

    def load(self, path):
        kept = torch.load(path, map_location=harness.DEVICE, weights_only=True)
        self.model.load_state_dict(kept['model'])
        self.optimizer.load_state_dict(kept['optimizer'])
        self.done = kept['done']

    def step(self, images, labels):
        done, started = self.done, clock()
        torch.manual_seed(self.key['seed'] * 10 ** 6 + done['step'])
        self.schedule.step_update(done['step'])
        with harness.autocast(self.dtype):
            logits = self.model(small_data.normalised(images.to(harness.DEVICE)))
        loss = self.loss(logits.float(), labels.to(harness.DEVICE))
        self.optimizer.zero_grad()
        loss.backward()
        limit = self.key['clip'] or float('inf')
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        self.optimizer.step()
        done['total'] = loss.item() + (done['total'] if done['step'] % self.length else 0.)
        done['steepest'] = max(done['steepest'], norm)
        done['step'] += 1
        done['seconds'] += clock() - started

    def accuracy(self, images, labels):
        with harness.autocast(self.dtype):
            return 100 * small_data.validate(self.model, images, labels)[0]

    def run(self, held_out, path, save_every):
        """Trains up to the last epoch, and keeps the accuracy on held-out pictures: of each epoch, or of the last for a
        learning rate.
        """
        saved = time.monotonic()
        last = self.key['epochs'] - 1
        looks = (last,) if self.key['run'] == 'rate' else range(last + 1)
        for epoch in range(self.done['step'] // self.length, self.key['epochs']):
            rest = batches(len(self.views), self.key['batch'], self.key['seed'], epoch)
            rest = rest[self.done['step'] % self.length:]
            self.model.train()
            for images, labels in torch.utils.data.DataLoader(
                    self.views, batch_sampler=rest, num_workers=self.workers):
                self.step(images, labels)
                if self.done['step'] % self.length == 0 and epoch in looks:
                    self.done['held_out'].append(self.accuracy(*held_out))
                    self.done['times'].append(self.done['seconds'])
                    self.model.train()
                if time.monotonic() - saved >= save_every:
                    self.save(path)
                    saved = time.monotonic()


def several(values, digits):
    return ' '.join(f'{value:.{digits}f}' for value in values)


def train(key, data, options):
    """Runs one training, or the rest of it, and returns its row."""
    views, held_out, val = data
    path = options.checkpoints / ('-'.join(re.sub(r'\W', '_', str(value)) for value in key.values()) + '.pth')
    training = Training(key, views, 1 + int(held_out[1].max()), options.workers)
    if path.exists():
        training.load(path)
    training.run(held_out, path, options.save_every)
    done = training.done
    top1 = '' if key['run'] == 'rate' else f'{training.accuracy(*val()):.1f}'
    path.unlink(missing_ok=True)
    return key | dict(
        top1=top1, train_loss=f'{done["total"] / training.length:.3f}', steepest=f'{done["steepest"]:.3g}',
        held_out=several(done['held_out'], 1), seconds=several(done['times'], 0), machine=harness.machine())


def choose(key, data, options):
    """Returns the learning rate with the best accuracy on held-out pictures, the smaller of equal ones."""
    found = {}
    for lr in sorted(options.rates):
        trial = key | dict(run='rate', lr=lr)
        row = small_data.once(options.results / 'table.csv', trial, functools.partial(train, trial, data, options))
        found[lr] = float(row['held_out'].split()[-1])
    return max(found, key=found.get)


def compare(options):
    """Trains everything that the options name and the CSV does not have."""
    train_files, held_out_files, val_files = split(options.data, options.every)
    views, held_out = Views(train_files, options.size), seen(held_out_files, options.size)
    val = functools.cache(lambda: seen(val_files, options.size))
    part = Views(split(options.data, (max(options.every[0], options.rate_every), 1))[0], options.size)
    for seed in options.seeds:
        for model in options.models:
            first = dict(run='final', data=options.data.stem, model=model)
            clip = largest_norm(model) if options.clip is None else options.clip
            last = dict(size=options.size, batch=options.batch, clip=clip, warm_up=options.warm_up,
                        precision=options.precision)
            lr = options.lr or choose(first | base(model) | dict(
                seed=0, pictures=len(part), val='', epochs=options.rate_epochs, lr=0.) | last,
                (part, held_out, val), options)
            for change in variations(model, options):
                key = first | change | dict(
                    seed=seed, pictures=len(views), val=len(val_files), epochs=options.epochs, lr=lr) | last
                small_data.once(options.results / 'table.csv', key,
                                functools.partial(train, key, (views, held_out, val), options))


def settings(rows):
    """Yields what runs have in common that can be compared, in words, and those runs."""
    groups = {}
    for row in rows:
        if row['run'] == 'final':
            groups.setdefault(tuple(row[name] for name in (
                'data', 'pictures', 'val', 'size', 'epochs', 'batch', 'precision')), []).append(row)
    for (data, pictures, val, size, epochs, batch, precision), some in groups.items():
        words = f'{data}, {pictures} pictures at {size} pixels, {epochs} epochs, batches of {batch}'
        words += f', {harness.PRECISIONS[precision]}' if precision != 'fp32' else ''
        yield f'{words}; scored on {val} of val', some


def changed(row):
    """Returns what a run changed, as 'relation dot', or '' for the network as the package has it."""
    usual = base(row['model']) | dict(clip=largest_norm(row['model']), warm_up=0.)
    return ', '.join(f'{name} {row[name]}' for name, value in usual.items() if row[name] != str(value))


def labels(rows):
    """Returns for each of the rows of a setting what it changed, and its learning rate if that is not the one of the
    first run of the network as the package has it.
    """
    usual = {}
    for row in rows:
        if not changed(row):
            usual.setdefault(row['model'], row['lr'])
    found = []
    for row in rows:
        same = usual.get(row['model'], row['lr']) == row['lr']
        found.append(', '.join(filter(None, ('' if same else f'learning rate {row["lr"]}', changed(row)))))
    return found


def scores(rows):
    """Returns the top-1 of every seed, in their order, and the mean of several."""
    found = [row['top1'] for row in sorted(rows, key=lambda row: int(row['seed']))]
    mean = statistics.mean(map(float, found)) if found else 0.
    return '-' if not found else ', '.join(found) + (f' (mean {mean:.1f})' if len(found) > 1 else '')


def table_of_models(rows):
    """Returns Markdown: the networks of each setting as the package has them."""
    lines = []
    for words, some in settings(rows):
        plain = [row for row in some if not changed(row)]
        names = dict.fromkeys((*MODELS, *(row['model'] for row in plain)))
        lines += ['', f'{words}:', '',
                  '| | learning rate | steepest gradient | top-1 of each seed, % | time in training |',
                  '| --- | --- | --- | --- | --- |']
        for name in names:
            for rate in dict.fromkeys(row['lr'] for row in plain if row['model'] == name) or ['-']:
                own = [row for row in plain if row['model'] == name and row['lr'] == rate]
                steepest = f'{max(float(row["steepest"]) for row in own):.3g}' if own else '-'
                spent = f'{statistics.median(float(row["seconds"].split()[-1]) for row in own):.0f} s' if own else '-'
                lines.append(f'| `{name}` | {rate} | {steepest} | {scores(own)} | {spent} |')
    return lines[1:]


def table_of_changes(rows):
    """Returns Markdown: each change of a network beside the network as the package has it."""
    lines = []
    for words, some in settings(rows):
        names = [name for name in dict.fromkeys(row['model'] for row in some)
                 if any(changed(row) for row in some if row['model'] == name)]
        if not names:
            continue
        lines += ['', f'{words}:', '', '| | ' + ' | '.join(f'`{name}`' for name in names) + ' |',
                  '| --- |' + ' --- |' * len(names)]
        some = [(label, row) for label, row in zip(labels(some), some) if row['model'] in names]
        for change in sorted({label for label, _ in some}):
            cells = [scores([row for label, row in some if row['model'] == name and label == change])
                     for name in names]
            lines.append(f'| {change or "as the package has it"} | ' + ' | '.join(cells) + ' |')
    return lines[1:]


def fill(text, rows):
    """Returns a page with the tables of the CSV between its marks."""
    for name, lines in (('models', table_of_models(rows)), ('changes', table_of_changes(rows))):
        before, mark, rest = text.partition(f'% {name} of table.csv\n')
        _, end, after = rest.partition(f'% end of {name}\n')
        if not mark or not end:
            raise SystemExit(f'{PAGE}: expected the marks "% {name} of table.csv" and "% end of {name}"')
        text = f'{before}{mark}\n' + '\n'.join(lines) + f'\n\n{end}{after}'
    return text


def rate_of(text):
    """Checks PATTERN=FACTOR."""
    pattern, _, factor = text.rpartition('=')
    try:
        re.compile(pattern)
        float(factor)
    except (re.error, ValueError):
        pattern = ''
    if not pattern:
        raise argparse.ArgumentTypeError(f'expected PATTERN=FACTOR, as weight_mlp=.1, got {text!r}')
    return text


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=pathlib.Path, metavar='FOLDER|ZIP')
    parser.add_argument('--models', nargs='+', default=MODELS, help='names of timm models (default: all four)')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--every', nargs=2, type=int, default=(1, 1), metavar='N',
                        help='take every n-th picture of train, of val (default: all)')
    parser.add_argument('--size', type=int, default=64, help='pixels (default: %(default)s)')
    parser.add_argument('--batch', type=int, default=32, help='default: %(default)s')
    parser.add_argument('--epochs', type=int, default=20, help='default: %(default)s')
    parser.add_argument('--warm-up', type=float, default=0., metavar='EPOCHS', help='default: %(default)s')
    parser.add_argument('--clip', type=float, help='largest norm of the gradient of all models; 0: any (default: 1 in '
                                                   'the patchwise form, any in others)')
    parser.add_argument('--lr', type=float, help='learning rate of all models (default: chosen from --rates)')
    parser.add_argument('--rates', nargs='+', type=float, default=[.01, .03, .1],
                        help='learning rates to choose from, on held-out pictures (default: .01 .03 .1)')
    parser.add_argument('--rate-epochs', type=int, default=5, help='epochs of such a training (default: %(default)s)')
    parser.add_argument('--rate-every', type=int, default=10, metavar='N',
                        help='it takes every n-th picture at most (default: %(default)s)')
    parser.add_argument('--relations', nargs='*', metavar='NAME', choices=EVERY_RELATION,
                        help='ablation: these relations, or without a name all')
    parser.add_argument('--footprints', nargs='*', type=int, metavar='K',
                        help='ablation: sides of the footprints behind the first stage; without a number 3 to 11')
    parser.add_argument('--positions', nargs='*', choices=POSITIONS, metavar='NAME',
                        help='ablation of the pairwise form: these positions, or without a name all')
    parser.add_argument('--options', nargs='+', default=[], metavar='NAME=VALUE',
                        help='other options of SANs, one at a time, as stem=patch drop_path_rate=.1')
    parser.add_argument('--variants', nargs='+', default=[], choices=small_data.VARIANTS,
                        help='other initialisations, those of small_data.py; kernels are of the patchwise form')
    parser.add_argument('--undecayed', nargs='+', default=[], metavar='PATTERN',
                        help='no weight decay on parameters whose name matches, as weight_mlp, which is gamma')
    parser.add_argument('--rate-of', nargs='+', default=[], metavar='PATTERN=FACTOR', type=rate_of,
                        help='of SANs: a learning rate times the factor for parameters whose name matches, as '
                             'weight_mlp=.1')
    parser.add_argument('--momentum', nargs='+', default=[], metavar='M', type=float,
                        help='of the batch norms of SANs, as .01 (usually .1)')
    parser.add_argument('--precision', choices=('fp32', 'tf32', 'bf16'), default='fp32')
    parser.add_argument('--device', default=harness.DEVICE.type, help='default: %(default)s')
    parser.add_argument('--threads', type=int, default=1, help='of the CPU (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=0, help='processes that decode pictures (default: %(default)s)')
    parser.add_argument('--checkpoints', type=pathlib.Path, default=pathlib.Path('work_dirs/table'),
                        help='folder for trainings that were stopped (default: %(default)s)')
    parser.add_argument('--save-every', type=float, default=120., metavar='SECONDS', help='default: %(default)s')
    parser.add_argument('--results', type=pathlib.Path, default=harness.RESULTS, help='folder for the CSV')
    parser.add_argument('--page', action='store_true', help='only write the tables of the page from the CSV')
    options = parser.parse_args()
    if not options.page and options.data is None:
        parser.error('--data is needed: a folder or zip with train/CLASS/* and val/CLASS/*')
    strange = set(options.relations or ()).difference(*(RELATIONS.get(form(model), ()) for model in options.models))
    if strange and not options.page:
        parser.error(f'--relations {" ".join(sorted(strange))}: expected relations of {" or ".join(options.models)}; '
                     f'there are {", ".join(RELATIONS["pairwise"])} (pairwise) and '
                     f'{", ".join(RELATIONS["patchwise"])} (patchwise)')
    for name, everything in (('relations', EVERY_RELATION),
                             ('footprints', list(FOOTPRINTS)), ('positions', list(POSITIONS))):
        given = getattr(options, name)
        setattr(options, name, [] if given is None else given or everything)
    return options


def main():
    options = parse()
    if options.page:
        with open(options.results / 'table.csv', newline='') as file:
            PAGE.write_text(fill(PAGE.read_text(), list(csv.DictReader(file))))
        return
    harness.DEVICE = torch.device(options.device)
    torch.set_num_threads(options.threads)
    compare(options)


if __name__ == '__main__':
    main()
