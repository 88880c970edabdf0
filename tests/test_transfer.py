"""benchmarks/transfer.py in small: its scores against others' arithmetic, and what its options do."""
import csv
import sys
import zipfile

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import timm
import torch
import transfer
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo

import san_backbones  # noqa: F401

SIZE, KINDS = 32, 3


def picture(draw, kind):
    """Noise in which one channel is a little brighter."""
    pixels = draw.integers(0, 200, (SIZE, SIZE, 3), dtype=np.uint8)
    pixels[..., kind] += 12
    return pixels


def normalised(pictures):
    """(N, H, W, 3) bytes to (N, 3, H, W) in float64, by ImageNet's mean and standard deviation."""
    x = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 255.
    mean, std = torch.tensor([.485, .456, .406]), torch.tensor([.229, .224, .225])
    return ((x - mean[:, None, None]) / std[:, None, None]).double()


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Data, a file of weights, the model, the place of each sample's class among its guesses, and which were seen."""
    folder, draw = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    torch.manual_seed(0)
    model = timm.create_model('test_san_patchwise', num_classes=1000, zero_init_last=False).eval()
    torch.nn.init.normal_(model.head.fc.weight)
    save_file(model.state_dict(), folder / 'model.safetensors', {'pictures': '640'})
    exact = model.double()
    wnids = ImageNetInfo().label_names()
    samples = [picture(draw, i % KINDS) for i in range(20)]
    with torch.no_grad():
        guesses = exact(normalised(samples)).argsort(1, descending=True)
    ranks = [0, 0, 0, 4, 5, 900, 901, 1, 2, 3] * 2
    classes = [int(guesses[i, rank]) for i, rank in enumerate(ranks)]
    marked = {classes[i] for i in (0, 3, 4, 7)}
    (folder / 'pretrain').mkdir()
    with zipfile.ZipFile(folder / 'pretrain' / 'mini_imagenet_84.zip', 'w') as archive:
        for kind in marked:
            archive.writestr(f'{wnids[kind]}/a.jpg', b'')
    with zipfile.ZipFile(folder / 'pretrain' / 'imagenet_samples_224.zip', 'w') as archive:
        for i, (pixels, kind) in enumerate(zip(samples, classes)):
            Image.fromarray(pixels).save(folder / 'sample.webp', lossless=True)
            archive.write(folder / 'sample.webp', f'{wnids[kind]}_{i}.webp')
    for split, count in (('train', 10), ('val', 8)):
        for kind in range(KINDS):
            place = folder / 'imagenette_small' / split / wnids[kind]
            place.mkdir(parents=True)
            for i in range(count):  # PNG in all but name: nothing is lost
                Image.fromarray(picture(draw, kind)).save(place / f'{i:02}.jpg', 'PNG')
    return folder, exact, np.array(ranks), np.array([kind in marked for kind in classes])


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """Runs the script and returns the rows of its CSV."""
    threads = torch.get_num_threads()

    def run(*words):
        monkeypatch.setattr(sys, 'argv', ['transfer.py', '--data', str(made[0]), '--sizes', str(SIZE), '--results',
                                          str(tmp_path), *words])
        transfer.main()
        with open(tmp_path / 'transfer.csv', newline='') as file:
            return list(csv.DictReader(file))
    yield run
    torch.set_num_threads(threads)


def features(made, split):
    """Pooled features in float64, and classes."""
    folder, exact = made[:2]
    files = sorted((folder / 'imagenette_small' / split).glob('*/*.jpg'))
    names = sorted({file.parent.name for file in files})
    with torch.no_grad():
        x = exact.forward_head(exact.forward_features(normalised([np.asarray(Image.open(file)) for file in files])),
                               pre_logits=True)
    return x.numpy(), np.array([names.index(file.parent.name) for file in files])


def test_scores(made, run):
    weights = f'test_san_patchwise:{made[0] / "model.safetensors"}'
    row, = run('--weights', weights)
    assert (row['network'], row['pictures'], row['size']) == ('test_san_patchwise, distilled', '640', str(SIZE))
    ranks, seen = made[2:]
    for name, part in (('', ranks), ('_seen', ranks[seen]), ('_others', ranks[~seen])):
        assert row[f'top1{name}'] == f'{100 * (part == 0).mean():.1f}'
        assert row[f'top5{name}'] == f'{100 * (part < 5).mean():.1f}'
    assert all(len({row[f'{top}{name}'] for name in ('', '_seen', '_others')}) == 3 for top in ('top1', 'top5'))

    (x, y), (x_val, y_val) = (features(made, split) for split in ('train', 'val'))
    centred, told = x - x.mean(0), 0
    for one, kind in zip(x_val - x.mean(0), y_val):
        cosines = [one @ other / np.linalg.norm(one) / np.linalg.norm(other) for other in centred]
        votes = [0.] * KINDS
        for i in sorted(range(len(x)), key=cosines.__getitem__)[-20:]:
            votes[y[i]] += np.exp(cosines[i] / .07)
        told += int(np.argmax(votes)) == kind
    assert row['knn'] == f'{100 * told / len(y_val):.1f}' and told > len(y_val) / KINDS

    mean, std = x.mean(0), np.maximum(x.std(0, ddof=1), 1e-6)  # some features are 0 everywhere
    x, x_val = (x - mean) / std, (x_val - mean) / std

    def loss(flat):
        weight, bias = flat[:-KINDS].reshape(KINDS, -1), flat[-KINDS:]
        log = scipy.special.log_softmax(x @ weight.T + bias, 1)
        shares = (np.exp(log) - np.eye(KINDS)[y]) / len(x)
        return (-log[range(len(x)), y].mean() + 1e-3 * (weight ** 2).sum(),
                np.concatenate([(shares.T @ x + 2e-3 * weight).ravel(), shares.sum(0)]))
    best = scipy.optimize.minimize(loss, np.zeros(KINDS * (x.shape[1] + 1)), jac=True, options=dict(maxiter=2000)).x
    right = (x_val @ best[:-KINDS].reshape(KINDS, -1).T + best[-KINDS:]).argmax(1) == y_val
    assert abs(float(row['linear']) - 100 * right.mean()) <= 100 / len(y_val) + .1  # one picture may be on the fence


def test_labels_seeds_and_what_is_there_already(made, run, capsys):
    weights = f'test_san_patchwise:{made[0] / "model.safetensors"}'
    rows = run('--weights', weights, '--label', 'an hour', '--before', '60')
    assert [(row['network'], row['pictures']) for row in rows] == [('test_san_patchwise, an hour', '700')]
    rows = run('--random', 'test_san_patchwise', '--seeds', '1', '2')
    assert [(row['network'], row['seed'], row['top1']) for row in rows[1:]] == [
        ('test_san_patchwise, random', '1', ''), ('test_san_patchwise, random', '2', '')]
    assert rows[1]['knn'] != rows[2]['knn'] or rows[1]['linear'] != rows[2]['linear']
    capsys.readouterr()
    assert run('--random', 'test_san_patchwise', '--seeds', '1', '2') == rows and not capsys.readouterr().out


def test_missing_pictures(made, run, tmp_path):
    with pytest.raises(SystemExit, match='there are no pictures imagenette_small/train'):
        run('--random', 'test_san_patchwise', '--data', str(tmp_path))
