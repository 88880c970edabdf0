"""Compares exported models with torch: speed, and the accuracy of int8.

    python benchmarks/export.py speed                                     # time per picture at 224 x 224
    python benchmarks/export.py accuracy --data FOLDER                    # trains a classifier for some minutes first
    python benchmarks/export.py accuracy --data FOLDER --pretrained       # if ImageNet weights are available
    python benchmarks/export.py accuracy --data FOLDER --checkpoint FILE  # any weights for the classes of FOLDER

FOLDER holds train/CLASS/*.jpg and val/CLASS/*.jpg. Calibration uses training pictures only. Pretrained weights have no
classifier for these classes: a linear one is fitted by ridge regression to the pooled features of the training
pictures. Feature errors are medians over the pictures. The patchwise form has no softmax: after a short training, an
unusual picture can grow from block to block until float32 overflows, in torch and in ONNX alike; such pictures are
counted.
"""
import pathlib
import sys
import tempfile
import time

import harness
import numpy as np
import onnxruntime
import timm
import torch
from PIL import Image

import san_backbones
from san_backbones.export import export_onnx, quantize_onnx


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])


def runner(path, images):
    run, feed = session(path), {'images': images.numpy()}
    return lambda: run.run(None, feed)


def under_inference_mode(function, images):
    def call():
        with torch.inference_mode():
            return function(images)
    return call


def speed(options):
    rows, machine = [], f'{harness.machine()}, onnxruntime {onnxruntime.__version__}'
    for name in options.models:
        torch.manual_seed(0)
        model = timm.create_model(name, zero_init_last=False).eval()  # a runtime might leave out what is times zero
        images = torch.randn(options.batch, 3, options.size, options.size)
        with tempfile.TemporaryDirectory() as folder:
            paths = {kind: pathlib.Path(folder) / f'{kind}.onnx' for kind in ('fixed', 'open', 'int8', 'int8 all')}
            for kind, dynamic in (('fixed', False), ('open', True)):
                start = time.perf_counter()
                export_onnx(model, paths[kind], options.size, options.batch, dynamic=dynamic, verify=False)
                print(f'{name}: the {kind} file took {time.perf_counter() - start:.0f} s to make', flush=True)
            for kind, keep in (('int8', san_backbones.export.KEEP_FLOAT), ('int8 all', ())):
                quantize_onnx(paths['fixed'], paths[kind], [images], keep_float=keep)
            fused = san_backbones.fuse_for_inference(timm.create_model(name, zero_init_last=False).eval())
            cases = {'torch': under_inference_mode(model, images), 'torch fused': under_inference_mode(fused, images)}
            if not options.no_compile:
                cases['torch.compile'] = under_inference_mode(torch.compile(model, dynamic=False), images)
            cases |= {f'onnxruntime {kind}': runner(path, images) for kind, path in paths.items()}
            medians = harness.alternate(cases, options.rounds)
            sizes = {f'onnxruntime {kind}': path.stat().st_size / 1e6 for kind, path in paths.items()}
        for case, seconds in medians.items():
            rows.append(dict(
                model=name, size=options.size, batch=options.batch, case=case,
                milliseconds=harness.figure(seconds * 1e3, 1),
                time_to_torch=harness.ratio(seconds, medians['torch']),
                file_megabytes=harness.figure(sizes.get(case), 1), machine=machine))
            harness.show(rows[-1])
    harness.write(options.results / 'export-speed.csv', rows)


def pictures(folder, size, cfg):
    """Images (N, 3, size, size) normalised as the model expects, and their classes."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    mean, std = (torch.tensor(cfg[name])[:, None, None] for name in ('mean', 'std'))
    images, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).glob('*.jp*g')):
            image = Image.open(path).convert('RGB').resize((size, size), Image.Resampling.BILINEAR)
            images.append((torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std)
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def train(model, images, labels, minutes, seed=0):
    """Trains with AdamW and one cycle over `minutes` of processor time, enough for meaningful features."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0., weight_decay=0.05)
    start, step = time.process_time(), 0
    model.train()
    while (done := (time.process_time() - start) / 60 / minutes) < 1:
        for group in optimiser.param_groups:
            group['lr'] = 2e-3 * min(1., done / 0.1, (1 - done) / 0.5)
        chosen = torch.randint(len(images), (32,), generator=generator)
        batch = images[chosen]
        batch = batch.flip(3) if torch.rand((), generator=generator) < 0.5 else batch
        loss = torch.nn.functional.cross_entropy(model(batch), labels[chosen], label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.)
        optimiser.step()
        step += 1
    print(f'trained for {step} steps of 32 pictures, last loss {loss.item():.3f}', flush=True)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:  # statistics of the final weights, not averages over the training
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for batch in images[torch.randperm(len(images), generator=generator)].split(50):
            model(batch)


def features_of(model, images):
    with torch.inference_mode():
        return torch.cat([model.forward_head(model.forward_features(batch), pre_logits=True)
                          for batch in images.split(32)])


def fit_classifier(model, images, labels, ridge=1.):
    """Fits the model's linear layer by ridge regression from standardised pooled features to one-hot classes."""
    x = features_of(model, images).double()
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, y = (x - mean) / std, torch.nn.functional.one_hot(labels).double()
    weight = torch.linalg.solve(x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - y.mean(0)))
    model.reset_classifier(y.shape[1])
    model.eval()
    with torch.no_grad():
        model.head.fc.weight.copy_((weight / std[:, None]).T)
        model.head.fc.bias.copy_(y.mean(0) - (mean / std) @ weight)


class Scores(torch.nn.Module):
    """Logits, and the pooled features before them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        x = self.model.forward_features(images)
        return self.model.forward_head(x), self.model.forward_head(x, pre_logits=True)


def accuracy(options):
    name = options.models[0]
    weights = 'pretrained' if options.pretrained else options.checkpoint or f'{options.minutes:g} minutes of training'
    torch.manual_seed(0)
    classes = len([path for path in (options.data / 'train').iterdir() if path.is_dir()])
    kwargs = dict(pretrained=True) if options.pretrained else dict(num_classes=classes)
    model = timm.create_model(name, checkpoint_path=str(options.checkpoint or ''), **kwargs)
    train_images, train_labels = pictures(options.data / 'train', options.size, model.pretrained_cfg)
    images, labels = pictures(options.data / 'val', options.size, model.pretrained_cfg)
    if not options.pretrained and not options.checkpoint:
        train(model, train_images, train_labels, options.minutes)
        if options.keep:
            torch.save(model.state_dict(), options.keep)
    model.eval()
    if options.pretrained:
        fit_classifier(model, train_images, train_labels)
    calibration = train_images[torch.randperm(len(train_images), generator=torch.Generator().manual_seed(0))[:128]]
    with torch.inference_mode():
        scores = [Scores(model)(batch) for batch in images.split(32)]
    expected = [torch.cat(parts) for parts in zip(*scores, strict=True)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        export_onnx(Scores(model).eval(), folder / 'float32.onnx', options.size, 32, dynamic='batch')
        kept = san_backbones.export.KEEP_FLOAT
        kinds = {'float32': None, 'int8': dict(), 'int8, 8-bit weights': dict(reduce_range=False),
                 'int8, gamma too': dict(keep_float=()), 'int8, classifier float': dict(keep_float=(*kept, 'head')),
                 'int8, stem float': dict(keep_float=(*kept, 'stem'))}
        for kind, arguments in kinds.items():
            path = folder / 'float32.onnx'
            if arguments is not None:
                path = quantize_onnx(path, folder / 'int8.onnx', calibration.split(32), **arguments)
            run = session(path)
            parts = [run.run(None, {'images': batch.numpy()}) for batch in images.split(32)]
            logits, features = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
            correct, wanted = logits.argmax(1) == labels, expected[1]
            error = (features - wanted).norm(dim=1) / wanted.norm(dim=1)
            rows.append(dict(
                model=name, weights=weights, size=options.size, pictures=len(images), kind=kind,
                top1=f'{correct.float().mean() * 100:.2f}',
                same_class_as_torch=f'{(logits.argmax(1) == expected[0].argmax(1)).float().mean() * 100:.2f}',
                feature_cosine=f'{torch.cosine_similarity(features, wanted).nanmedian():.5f}',
                feature_error=f'{error.nanmedian():.2e}',
                overflows=int((~wanted.isfinite().all(1)).sum()),
                file_megabytes=f'{path.stat().st_size / 1e6:.1f}',
                machine=f'{harness.machine()}, onnxruntime {onnxruntime.__version__}'))
            harness.show(rows[-1])
    harness.write(options.results / 'export-accuracy.csv', rows)


def main():
    options = harness.parser(__doc__.splitlines()[0], precisions=False)
    options.add_argument('question', choices=['speed', 'accuracy'])
    options.add_argument('--models', nargs='+', help='timm names (default: both SAN15 for speed, san10_patchwise else)')
    options.add_argument('--size', type=int, help='side of the pictures (default: 224 for speed, 96 for accuracy)')
    options.add_argument('--batch', type=int, default=1, help='pictures at a time, for speed')
    options.add_argument('--data', type=pathlib.Path, metavar='FOLDER', help='pictures, for accuracy')
    options.add_argument('--minutes', type=float, default=6., help='processor time of the training')
    options.add_argument('--pretrained', action='store_true', help='take published weights')
    options.add_argument('--checkpoint', type=pathlib.Path, metavar='FILE', help='take these weights')
    options.add_argument('--keep', type=pathlib.Path, metavar='FILE', help='save the trained weights')
    options = options.parse_args()
    is_speed = options.question == 'speed'
    options.models = options.models or (['san15_pairwise', 'san15_patchwise'] if is_speed else ['san10_patchwise'])
    options.size = options.size or (224 if is_speed else 96)
    if is_speed:
        return speed(options)
    if options.data is None or not (options.data / 'train').is_dir():
        sys.exit(f'accuracy needs --data FOLDER with train/CLASS/*.jpg and val/CLASS/*.jpg, got {options.data}')
    return accuracy(options)


if __name__ == '__main__':
    main()
