"""Measures feature extraction: speed compared with the network alone and a plain loop, memory, and feature quality.

    python benchmarks/extract.py speed --data FOLDER_OR_ZIP     # pictures near the network's size, and large ones
    python benchmarks/extract.py memory                         # against the number of pictures, up to 100,000
    python benchmarks/extract.py knn --data imagenette_small    # accuracy of nearest neighbours

`speed`: `network` is the fused network on batches in memory, the upper limit; `loop` is the dozen lines that a user
would write: timm's transform, a DataLoader with as many workers, the fused network, batches of 16; `ours` is `extract`
to Parquet with the same settings. With `--timm-inference FILE`, timm's inference.py (only in its repository) runs
too, as a process, including its start. They take turns. Large pictures are enlarged to 12 megapixels.

`memory` extracts from a folder of links to one picture, with the smallest network, and records the highest resident
size at several numbers of pictures. `knn` classifies pictures in val/ of a folder of classes by those in train/.
"""
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

import harness
import numpy as np
import timm
import torch
from PIL import Image

import san_backbones
from san_backbones.extract import Settings, extract
from san_backbones.extract.decode import Preparation
from san_backbones.extract.sources import File, Picture


class Folder(torch.utils.data.Dataset):
    """A plain data set of picture files."""

    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index]).convert('RGB'))


def model_of(name):
    return san_backbones.fuse_for_inference(timm.create_model(name, pretrained=True).eval()).to(
        harness.DEVICE, memory_format=torch.channels_last)


def loop(name, folder, options):
    model = model_of(name)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(
        dict(input_size=(3, options.size, options.size)), model=model))
    loader = torch.utils.data.DataLoader(
        Folder(sorted(folder.iterdir()), transform), options.batch_size, num_workers=options.workers)
    features = []
    with torch.inference_mode():
        for images in loader:
            images = images.to(harness.DEVICE, memory_format=torch.channels_last)
            features.append(model.forward_head(model.forward_features(images), pre_logits=True).cpu())
    np.save(options.scratch / 'loop.npy', torch.cat(features).numpy())


def network(name, folder, options):
    """Times the network alone, in seconds."""
    model = model_of(name)
    prepare = Preparation(model.pretrained_cfg, (options.size, options.size))
    paths = sorted(folder.iterdir())
    pixels = [prepare(Picture('', File(str(path), -1))).pixels for path in paths]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div_(255)
    batches = [part.to(harness.DEVICE, memory_format=torch.channels_last) for part in images.split(options.batch_size)]
    with torch.inference_mode():
        model.forward_features(batches[0])

        def run():
            for part in batches:
                model.forward_head(model.forward_features(part), pre_logits=True).cpu()
        return harness.seconds(run)


def ours(name, folder, options):
    out = options.scratch / 'ours'
    shutil.rmtree(out, ignore_errors=True)
    settings = Settings(size=(options.size, options.size), batch_size=options.batch_size)
    report = extract(folder, out, name, settings, workers=options.workers, device=harness.DEVICE, progress=False)
    assert report.rows == len(list(folder.iterdir()))


def timms(name, folder, options):
    subprocess.run(
        [sys.executable, '-m', 'san_backbones.run', options.timm_inference, str(folder), '--model', name, '--img-size',
         str(options.size), '--include-index', '--results-format', 'parquet', '--results-dir', str(options.scratch),
         '--batch-size', str(options.batch_size), '--workers', str(options.workers), '--device', str(harness.DEVICE),
         '--channels-last', '--no-console-results'], check=True, capture_output=True)


def speed(options):
    small, large = options.scratch / 'small', options.scratch / 'large'
    for folder in (small, large):
        folder.mkdir()
    for number, picture in enumerate(pictures(options.data, max(options.pictures, options.large))):
        if number < options.pictures:
            picture.save(small / f'{number:05d}.jpg', quality=90)
        if number < options.large:
            picture.resize((4000, 3000), Image.Resampling.BICUBIC).save(large / f'{number:05d}.jpg', quality=90)
    rows, machine = [], harness.machine()
    cases = dict(network=network, loop=loop, ours=ours)
    if options.timm_inference:
        cases['timm inference.py'] = timms
    for what, folder in (('about 224 pixels', small), ('12 megapixels', large)):
        count = len(list(folder.iterdir()))
        taken = {case: [] for case in cases}
        for _ in range(options.rounds):
            for case, run in cases.items():
                start = time.perf_counter()
                seconds = run(options.model, folder, options)
                taken[case].append(seconds if case == 'network' else time.perf_counter() - start)
        medians = {case: float(np.median(seconds)) for case, seconds in taken.items()}
        for case in cases:
            rows.append(dict(
                pictures=what, count=count, model=options.model, case=case, workers=options.workers,
                seconds=harness.figure(medians[case], 2), pictures_per_second=harness.figure(count / medians[case], 2),
                to_network=harness.ratio(medians['network'], medians[case]),
                to_loop=harness.ratio(medians['loop'], medians[case]), machine=machine))
            harness.show(rows[-1])
    harness.write(options.results / f'extract-speed-{harness.DEVICE.type}.csv', rows)


def pictures(data, count):
    """Yields the first pictures of a folder or zip."""
    if data.suffix == '.zip':
        with zipfile.ZipFile(data) as archive:
            for name in sorted(archive.namelist())[:count]:
                with archive.open(name) as file:
                    yield Image.open(file).convert('RGB')
        return
    for path in sorted(path for path in data.rglob('*') if path.suffix in ('.jpg', '.png', '.webp'))[:count]:
        yield Image.open(path).convert('RGB')


def memory(options):
    folder = options.scratch / 'pictures'
    picture = options.scratch / 'picture.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(picture)
    for number in range(options.count):
        part = folder / f'{number // 1000:03d}'
        part.mkdir(parents=True, exist_ok=True)
        (part / f'{number % 1000:03d}.png').symlink_to(picture)
    rows, machine, done = [], harness.machine(), 0
    points = sorted({number for power in range(3, 9) for number in (10 ** power, 2 * 10 ** power, 5 * 10 ** power)
                     if number < options.count} | {options.count})
    from san_backbones.extract.extractor import Extractor
    from san_backbones.extract.job import Job
    from san_backbones.extract.sources import Source

    def tell(count):
        nonlocal done
        done += count
        if points and done >= points[0]:
            points.pop(0)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
            rows.append(dict(pictures=done, peak_megabytes=harness.figure(peak / 1e6, 1), machine=machine))
            harness.show(rows[-1])

    job = Job(Source([str(folder)]), options.scratch / 'out', Extractor(
        'test_san_patchwise', Settings(size=(32, 32), batch_size=64)), options.workers)
    job.perform(iter(range(job.survey.units)), tell)
    report = job.finish(time.monotonic())
    assert report.complete and report.rows == options.count
    harness.write(options.results / 'extract-memory.csv', rows)


def knn(options):
    import pyarrow.parquet as parquet
    rows, machine = [], harness.machine()
    for model, random in ((options.model, False), (options.model, True)):
        parts = {}
        for part in ('train', 'val'):
            out = options.scratch / f'{part}-{random}'
            extract(options.data / part, out, model.partition('.')[0] if random else model,
                    Settings(size=(options.size, options.size), batch_size=options.batch_size), random=random,
                    workers=options.workers, device=harness.DEVICE, progress=False)
            table = parquet.read_table(out / 'features')
            vectors = torch.tensor(table['features'].combine_chunks().flatten().to_numpy()).view(len(table), -1)
            parts[part] = torch.nn.functional.normalize(vectors.double()), np.array(
                [pathlib.Path(file).parent.name for file in table['file'].to_pylist()])
        classes, labels = np.unique(parts['train'][1], return_inverse=True)
        similarity, near = (parts['val'][0] @ parts['train'][0].T).topk(10)
        votes = torch.zeros(len(near), len(classes), dtype=torch.float64).scatter_add_(
            1, torch.from_numpy(labels)[near], (similarity / 0.07).exp())
        right = classes[votes.argmax(1).numpy()] == parts['val'][1]
        rows.append(dict(data=options.data.name, model=model.partition('.')[0] + ', random' if random else model,
                         size=options.size, top1=harness.figure(100 * right.mean(), 1), pictures=len(right),
                         machine=machine))
        harness.show(rows[-1])
    harness.write(options.results / 'extract-knn.csv', rows)


def main():
    parser = harness.parser(__doc__.splitlines()[0], precisions=False)
    parser.add_argument('what', choices=('speed', 'memory', 'knn'))
    parser.add_argument('--data', type=pathlib.Path, help='folder or zip of pictures; for knn a folder with train, val')
    parser.add_argument('--model', default='san10_patchwise.distilled')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--pictures', type=int, default=96, help='speed: pictures near the size of the network')
    parser.add_argument('--large', type=int, default=48, help='speed: pictures of 12 megapixels')
    parser.add_argument('--count', type=int, default=100_000, help='memory: pictures')
    parser.add_argument('--timm-inference', help="speed: path of timm's inference.py")
    options = parser.parse_args()
    if options.what != 'memory' and options.data is None:
        parser.error(f'{options.what} needs --data')
    with tempfile.TemporaryDirectory() as folder:
        options.scratch = pathlib.Path(folder)
        dict(speed=speed, memory=memory, knn=knn)[options.what](options)


if __name__ == '__main__':
    main()
