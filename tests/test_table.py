"""benchmarks/table.py in small: what it trains, what its options change, and that it goes on where it was stopped."""
import csv
import math
import sys

import numpy as np
import pytest
import table
import timm
import torch
from PIL import Image

from san_backbones import ops


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Two classes, reddish and bluish noise: 24 pictures each to train on, of which one is held out, and 4 of val."""
    folder, draw = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    for split, count in (('train', 24), ('val', 4)):
        for kind, channel in (('blue', 2), ('red', 0)):
            (folder / split / kind).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 160, (40, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 40
                Image.fromarray(pixels).save(folder / split / kind / f'{i:02}.png')
    return folder


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """Runs the script and returns the rows of its CSV; a later option overrides an earlier one."""
    monkeypatch.setattr(table.harness, 'DEVICE', torch.device('cpu'))
    threads = torch.get_num_threads()

    def run(*words, folder=tmp_path):
        small = ('--models', 'test_san_patchwise', '--seeds', 0, '--size', 32, '--batch', 10, '--epochs', 1,
                 '--lr', .05, '--data', data, '--results', folder, '--checkpoints', folder / 'kept')
        monkeypatch.setattr(sys, 'argv', ['table.py', *map(str, small + words)])
        table.main()
        with open(folder / 'table.csv', newline='') as file:
            return list(csv.DictReader(file))
    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def trained(monkeypatch):
    """The trainings that were run."""
    found = []

    class Kept(table.Training):
        def __init__(self, *args):
            super().__init__(*args)
            found.append(self)
    monkeypatch.setattr(table, 'Training', Kept)
    return found


def figures(row):
    return {name: row[name] for name in ('top1', 'train_loss', 'steepest', 'held_out')}


def test_split(data):
    train, held_out, val = ([(read(), label) for read, label in part] for part in table.split(data, (1, 1)))
    assert (len(train), len(held_out), len(val)) == (46, 2, 8)
    everything = {path.read_bytes() for path in data.glob('train/*/*')}
    assert {content for content, _ in train} | {content for content, _ in held_out} == everything
    assert {content for content, _ in val} == {path.read_bytes() for path in data.glob('val/*/*')}
    assert [label for _, label in held_out] == [0, 1]
    few, same, fewer = table.split(data, (10, 2))
    assert (len(few), len(same), len(fewer)) == (6, 2, 4)


def test_rates_are_chosen_for_each_model_on_held_out_pictures(run, monkeypatch):
    """The best rate is 0.1 for the ResNet, 0.03 for the other. val is scored once for each seed, never for a rate."""
    scored = []

    def validate(model, images, labels):
        scored.append(len(images))
        return 1 - abs(rate[0] - best[0]), 0., 0

    class Training(table.Training):
        def __init__(self, key, *args):
            super().__init__(key, *args)
            rate[:], best[:] = [key['lr']], [.1 if key['model'] == 'resnet10t' else .03]
    rate, best = [], []
    monkeypatch.setattr(table, 'Training', Training)
    monkeypatch.setattr(table.small_data, 'validate', validate)
    words = '--models test_san_patchwise resnet10t --seeds 0 1 --lr 0 --rates .1 .03 .01 --rate-epochs 2 --rate-every 2'
    rows = run(*words.split())
    trials = [row for row in rows if row['run'] == 'rate']
    assert [(row['model'], row['lr'], row['pictures'], row['epochs'], row['top1']) for row in trials] == [
        (model, lr, '24', '2', '') for model in ('test_san_patchwise', 'resnet10t') for lr in ('0.01', '0.03', '0.1')]
    finals = [row for row in rows if row['run'] == 'final']
    assert [(row['model'], row['seed'], row['lr'], row['clip']) for row in finals] == [
        ('test_san_patchwise', '0', '0.03', '1.0'), ('resnet10t', '0', '0.1', '0.0'),
        ('test_san_patchwise', '1', '0.03', '1.0'), ('resnet10t', '1', '0.1', '0.0')]
    assert scored.count(8) == 4 and scored.count(2) == 6 + 4
    assert run(*words.split()) == rows and len(scored) == 14, 'rows of the CSV are not trained again'
    more = run(*words.replace('--rate-epochs 2', '--rate-epochs 1').replace('0 1 ', '0 ').split())
    assert [row['epochs'] for row in more[len(rows):] if row['run'] == 'rate'] == ['1'] * 6


@pytest.fixture(scope='module')
def plain():
    """The row and the weights of each model as the package has it."""
    return {}


@pytest.mark.parametrize('words, column, value', [
    ('--size 48', 'size', '48'), ('--batch 8', 'batch', '8'), ('--epochs 2', 'epochs', '2'),
    ('--warm-up .5', 'warm_up', '0.5'), ('--clip .01', 'clip', '0.01'), ('--lr .01', 'lr', '0.01'),
    ('--seeds 1', 'seed', '1'), ('--every 2 1', 'pictures', '24'), ('--precision bf16', 'precision', 'bf16'),
    ('--relations star', 'relation', 'star'), ('--footprints 5', 'footprint', '5'),
    ('--options stem=patch', 'option', 'stem=patch'), ('--options drop_path_rate=.5', 'option', 'drop_path_rate=.5'),
    ('--variants random-last', 'variant', 'random-last'),
    ('--models test_san_pairwise --positions none', 'position', 'none'),
    ('--models test_san_pairwise --relations summation', 'relation', 'summation')])
def test_an_option_changes_the_network(words, column, value, run, plain, trained, zero_init_last):
    words = words.split()
    model = words[1] if words[0] == '--models' else 'test_san_patchwise'
    if model not in plain:
        plain[model] = run('--models', model)[0], trained[-1].model.state_dict()
    row, weights = plain[model]
    assert row[column] != value and run(*words)[-1][column] == value
    found = trained[-1].model.state_dict()
    assert {name: tensor.tolist() for name, tensor in found.items()} != {
        name: tensor.tolist() for name, tensor in weights.items()}


def test_every_counts_pictures_of_val(run):
    assert run('--every', '1', '2')[0]['val'] == '4'


def test_undecayed(run, trained):
    run('--undecayed', 'weight_mlp')
    plain, without = ({id(p): group['weight_decay'] for group in training.optimizer.param_groups
                       for p in group['params']} for training in trained)
    names = [{id(p): name for name, p in training.model.named_parameters()} for training in trained]
    assert {plain[p] for p in names[0]} == {1e-4}
    assert {name for p, name in names[1].items() if without[p] == 0} == {
        name for name in names[1].values() if 'weight_mlp' in name}


def test_a_rate_of_their_own(run, trained, monkeypatch):
    rates, step = [], table.Training.step

    def recorded(self, *batch):
        step(self, *batch)
        rates.append({id(p): group['lr'] for group in self.optimizer.param_groups for p in group['params']})
    monkeypatch.setattr(table.Training, 'step', recorded)
    run('--rate-of', 'weight_mlp=.1')
    with pytest.raises(SystemExit, match="gamma=.1: no parameter of test_san_patchwise has.*'gamma'; they are stem"):
        run('--rate-of', 'gamma=.1')
    names = {name: id(p) for name, p in trained[-1].model.named_parameters()}
    assert all(set(found) == set(names.values()) for found in rates[-4:])
    for name, p in names.items():
        factor = .1 if 'weight_mlp' in name else 1.
        assert [found[p] for found in rates[-4:]] == pytest.approx(
            [factor * .025 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]), name


def test_momentum_of_norms(run, trained):
    row = run('--momentum', '.5')[-1]
    assert row['momentum'] == '0.5' and table.changed(row) == 'momentum 0.5'
    for training, momentum in zip(trained, (.1, .5)):
        found = {norm.momentum for norm in training.model.modules() if isinstance(norm, torch.nn.BatchNorm2d)}
        assert found == {momentum}


def test_short_names_are_of_the_patchwise_form():
    assert [table.form(name) for name in ('san15', 'san15_pairwise', 'san15_patchwise', 'resnet26')] == [
        'patchwise', 'pairwise', 'patchwise', None]


def test_all_of_an_ablation(run, monkeypatch):
    asked = []

    def train(key, data, options):
        asked.append(key)
        return key | dict(top1='0', train_loss='0', steepest='0', held_out='0', seconds='0', machine='')
    monkeypatch.setattr(table, 'train', train)
    run('--models', 'test_san_pairwise', 'test_san_patchwise', 'resnet10t', '--relations', '--footprints',
        '--positions', '--variants', 'kernel', 'torch')
    changes = {model: [table.changed({name: str(value) for name, value in key.items()}) for key in asked
                       if key['model'] == model] for model in dict.fromkeys(key['model'] for key in asked)}
    footprints = [f'footprint {k}' for k in (3, 5, 9, 11)]
    assert changes == {
        'test_san_pairwise': ['', *(f'relation {name}' for name in ops.PAIRWISE_RELATIONS if name != 'subtraction'),
                              *footprints, 'position absolute', 'position none', 'variant torch'],
        'test_san_patchwise': [
            '', *(f'relation {name}' for name in ops.PATCHWISE_RELATIONS if name != 'concatenation'), *footprints,
            'variant kernel', 'variant torch'],
        'resnet10t': ['']}


def test_a_kernel_for_the_pairwise_form():
    with pytest.raises(SystemExit, match='--variants impulse is of the patchwise form.*got test_san_pairwise'):
        table.small_data.make('test_san_pairwise', 'impulse', 2)


@pytest.mark.parametrize('stop', [3, 4, 6])  # in the first epoch, at its end, in the second
def test_goes_on_bit_for_bit(stop, run, trained, monkeypatch, tmp_path):
    monkeypatch.setattr(table, 'make', lambda key, classes: timm.create_model(
        key['model'], num_classes=classes, drop_path_rate=.5))
    [whole] = run('--epochs', '2')
    expected = trained[-1]
    step, steps = table.Training.step, []

    def stopped(self, *batch):
        if len(steps) == stop:
            raise KeyboardInterrupt
        steps.append(step(self, *batch))
    monkeypatch.setattr(table.Training, 'step', stopped)
    other = tmp_path / 'other'
    with pytest.raises(KeyboardInterrupt):
        run('--epochs', '2', '--save-every', '0', folder=other)
    assert len(list((other / 'kept').iterdir())) == 1
    monkeypatch.setattr(table.Training, 'step', step)
    [row] = run('--epochs', '2', folder=other)
    assert figures(row) == figures(whole)
    assert not list((other / 'kept').iterdir())
    assert trained[-1].done['step'] == 8
    for name, value in expected.model.state_dict().items():
        assert torch.equal(trained[-1].model.state_dict()[name], value), name


def test_workers_change_nothing(run, monkeypatch, tmp_path):
    monkeypatch.setattr(table, 'make', lambda key, classes: timm.create_model(
        key['model'], num_classes=classes, drop_path_rate=.5))
    assert figures(run('--workers', '1')[0]) == figures(run(folder=tmp_path / 'other')[0])


@pytest.mark.parametrize('warm_up', [0, 2])
def test_schedule(warm_up, run, monkeypatch):
    """Eight steps: a straight line from zero, then half a cosine from the whole rate to zero."""
    rates, step = [], table.Training.step

    def recorded(self, *batch):
        step(self, *batch)
        rates.extend(group['lr'] for group in self.optimizer.param_groups)
    monkeypatch.setattr(table.Training, 'step', recorded)
    run('--epochs', '2', '--warm-up', warm_up / 4)
    rest = 8 - warm_up
    assert rates == pytest.approx([.05 * i / warm_up for i in range(warm_up)] + [
        .025 * (1 + math.cos(math.pi * i / rest)) for i in range(rest)])


def test_device_and_threads(run):
    run('--threads', '2')
    assert torch.get_num_threads() == 2
    with pytest.raises(RuntimeError, match='no-such-device'):
        run('--device', 'no-such-device')


def test_wrong_options(run, monkeypatch, capsys):
    with pytest.raises(SystemExit, match='46 pictures to train on do not fill a batch of 100'):
        run('--batch', '100')
    monkeypatch.setattr(sys, 'argv', ['table.py'])
    with pytest.raises(SystemExit):
        table.main()
    assert '--data is needed' in capsys.readouterr().err
    for words in (('--rate-of', 'weight_mlp'), ('--rate-of', '=.1'), ('--rate-of', 'a=b'), ('--rate-of', '(=.1')):
        with pytest.raises(SystemExit):
            run(*words)
        assert f'expected PATTERN=FACTOR, as weight_mlp=.1, got {words[1]!r}' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run('--relations', 'dot')
    assert '--relations dot: expected relations of test_san_patchwise' in capsys.readouterr().err


def final(model, seed, top1, **changes):
    plain = dict(run='final', data='woof', relation='', footprint='', position='', option='', variant='package',
                 undecayed='', rate_of='', momentum='', pictures='90', val='30', size='64', epochs='2', batch='32',
                 warm_up='0.0', precision='fp32', lr='0.1', steepest='2.5', seconds='10 20', held_out='11.0 12.0',
                 machine='CPU')
    clip = '1.0' if model.endswith('patchwise') else '0.0'
    return plain | dict(model=model, seed=str(seed), top1=top1, clip=clip) | changes


def test_other_rates_stand_apart():
    rows = [final('resnet26', seed, top1, lr=lr, momentum=momentum) for seed, top1, lr, momentum in (
        (0, '30.0', '0.01', ''), (0, '15.0', '0.03', ''), (0, '20.0', '0.03', '.5'), (1, '31.0', '0.01', ''))]
    assert table.labels(rows) == ['', 'learning rate 0.03', 'learning rate 0.03, momentum .5', '']
    text = '\n'.join(table.table_of_changes(rows))
    assert '| as the package has it | 30.0, 31.0 (mean 30.5) |' in text and '| learning rate 0.03 | 15.0 |' in text


def test_tables_of_the_page():
    san = dict(relation='concatenation', footprint='7', option='')
    rows = [final('resnet26', 1, '30.0'), final('resnet26', 0, '20.0'), final('san10_patchwise', 0, '25.0', **san),
            final('san10_patchwise', 0, '26.5', **(san | dict(relation='star'))),
            final('resnet26', 0, '99.9', run='rate'), final('resnet26', 0, '40.0', lr='0.01')]
    text = table.fill(
        'A\n% models of table.csv\nold\n% end of models\nB\n% changes of table.csv\n% end of changes\nC\n', rows)
    assert '| `resnet26` | 0.1 | 2.5 | 20.0, 30.0 (mean 25.0) | 20 s |' in text
    assert '| `resnet26` | 0.01 | 2.5 | 40.0 | 20 s |' in text  # another rate is no other seed
    assert '| `resnet50` | - | - | - | - |' in text
    assert '| as the package has it | 25.0 |\n| relation star | 26.5 |' in text
    assert 'old' not in text and '99.9' not in text and text.startswith('A\n') and text.endswith('C\n')
    assert table.fill(text, rows) == text


def test_the_page_is_that_of_the_csv():
    with open(table.harness.RESULTS / 'table.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert table.fill(table.PAGE.read_text(), rows) == table.PAGE.read_text(), 'run benchmarks/table.py --page'


def test_page_is_written(run, monkeypatch, tmp_path):
    page = tmp_path / 'page.md'
    page.write_text('% models of table.csv\n% end of models\n% changes of table.csv\n% end of changes\n')
    run()
    monkeypatch.setattr(table, 'PAGE', page)
    monkeypatch.setattr(sys, 'argv', ['table.py', '--page', '--results', str(tmp_path)])
    table.main()
    assert '`test_san_patchwise` | 0.05' in page.read_text()


def test_plot(monkeypatch, tmp_path):
    """Each seed is a line through its own figures, and each run a point of its change, as another learning rate is."""
    plot = pytest.importorskip('plot', reason='needs the visualize extra')
    drawn = []
    monkeypatch.setattr(plot, 'finish', lambda figure, path, machine: drawn.append((figure, path, machine)))
    san = dict(relation='concatenation', footprint='7', option='')
    rows = [final('resnet26', 0, '20.0'), final('resnet26', 1, '30.0', held_out='11.0 13.0'),
            final('san10_patchwise', 0, '26.5', **(san | dict(relation='star'))),
            final('resnet26', 0, '40.0', lr='0.01')]
    table.harness.write(tmp_path / 'table.csv', rows)
    plot.PLOTS['table'](tmp_path / 'table.csv')
    [(figure, path, machine)] = drawn
    left, middle, right = figure.axes
    assert [list(line.get_xydata().ravel()) for line in left.lines] == [[1, 11, 2, 12], [1, 11, 2, 13]]
    assert [list(line.get_xdata()) for line in middle.lines] == [[10, 20]] * 2
    assert [tuple(line.get_xydata()[0]) for line in right.lines] == [(20, 2), (30, 2), (26.5, 0), (40, 1)]
    assert path == tmp_path / 'table.png' and machine == 'CPU'
