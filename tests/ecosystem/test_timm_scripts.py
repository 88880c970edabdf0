"""Scripts in the manner of timm's own, which know nothing of SAN, train, validate, predict and export one by its name.

timm's train.py, validate.py, inference.py and onnx_export.py are in its repository, not in its package; these use the
same parts of timm.
"""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import san_backbones

data = pytest.importorskip('skimage.data', reason='the photographs come with scikit-image')
MODEL = 'test_san_pairwise'
LABELS = ('animal', 'cup', 'person')  # in the order of the folders' names
COMMON = '''
import argparse, json, logging
import torch, timm
from timm import utils
from timm.data import create_dataset, create_loader, resolve_data_config
parser = argparse.ArgumentParser()
parser.add_argument('data')
parser.add_argument('--model')
parser.add_argument('--num-classes', type=int)
parser.add_argument('--img-size', type=int)
parser.add_argument('--checkpoint', default='')
parser.add_argument('--output', default='')
parser.add_argument('--device', default='cpu')
for name, default in dict(opt='adamw', sched='cosine').items():
    parser.add_argument('--' + name, default=default)
for name, default in dict(lr=1e-3, weight_decay=0.05, momentum=0.9, min_lr=0., warmup_lr=1e-5).items():
    parser.add_argument('--' + name, type=float, default=default)
for name, default in dict(epochs=1, warmup_epochs=0, cooldown_epochs=0, patience_epochs=0, batch_size=4).items():
    parser.add_argument('--' + name, type=int, default=default)
utils.setup_default_logging()

def loader_of(model, split, args, **kwargs):
    config = resolve_data_config(vars(args), model=model)
    return create_loader(create_dataset('', root=args.data, split=split), config['input_size'], args.batch_size,
                         mean=config['mean'], std=config['std'], interpolation=config['interpolation'],
                         crop_pct=config['crop_pct'], num_workers=1, device=torch.device(args.device), **kwargs)
'''
SCRIPTS = {'train.py': '''
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

def main():
    args = parser.parse_args()
    device = utils.init_distributed_device(args)
    utils.random_seed(0, args.rank)
    model = timm.create_model(args.model, num_classes=args.num_classes, drop_path_rate=0.1).to(device)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    average = utils.ModelEmaV3(model, decay=0.5)
    train = loader_of(model, 'train', args, is_training=True, distributed=args.distributed)
    scheduler, epochs = create_scheduler_v2(optimizer, updates_per_epoch=len(train), **scheduler_kwargs(args))
    if args.distributed:
        model = torch.nn.parallel.DistributedDataParallel(model)
    saver = utils.CheckpointSaver(model, optimizer, args, average, checkpoint_dir=args.output) \\
        if utils.is_primary(args) else None
    for epoch in range(epochs):
        if args.distributed:
            train.sampler.set_epoch(epoch)
        model.train()
        for images, labels in train:
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            utils.dispatch_clip_grad(model.parameters(), value=1.)
            optimizer.step()
            average.update(model)
        if args.distributed:
            loss = utils.reduce_tensor(loss.detach(), args.world_size)
            utils.distribute_bn(model, args.world_size, reduce=True)
        scheduler.step(epoch + 1)
        if saver is not None:
            utils.update_summary(epoch, dict(loss=loss.item()), {}, args.output + '/summary.csv', write_header=True)
            saver.save_checkpoint(epoch, metric=-loss.item())

if __name__ == '__main__':
    main()
''', 'validate.py': '''
args = parser.parse_args()
inputs = dict(model_name=args.model, num_classes=args.num_classes, pretrained=False)
if hasattr(timm.models, 'resolve_model_input_args'):
    name = inputs.pop('model_name')
    inputs = timm.models.resolve_model_input_args(name, vars(args), **inputs)
model = timm.create_model(**inputs)
timm.models.load_checkpoint(model, args.checkpoint)
model = torch.jit.script(model.eval())
top1 = utils.AverageMeter()
with torch.inference_mode():
    for images, labels in loader_of(model, 'validation', args):
        right, _ = utils.accuracy(model(images), labels, topk=(1, 5))
        top1.update(right.item(), len(labels))
print('--result ' + json.dumps(dict(top1=top1.avg)))
''', 'inference.py': '''
args = parser.parse_args()
model = timm.create_model(args.model, num_classes=args.num_classes, checkpoint_path=args.checkpoint).eval()
loader = loader_of(model, 'validation', args)
with torch.inference_mode():
    outputs = torch.cat([model(images) for images, _ in loader])
print('--result ' + json.dumps([loader.dataset.filenames(basename=True), outputs.tolist()]))
''', 'onnx_export.py': '''
from timm.utils.onnx import onnx_export
args = parser.parse_args()
model = timm.create_model(args.model, num_classes=args.num_classes, checkpoint_path=args.checkpoint, exportable=True)
onnx_export(model, args.data, batch_size=1, input_size=(3, args.img_size, args.img_size), check_forward=True,
            use_dynamo=True)
'''}


def _run(folder, *command, with_runner=True):
    runner = ('-m', 'san_backbones.run') if with_runner else ()
    launcher = ('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2') if command[0] == 'train.py' else ()
    return subprocess.run(
        [sys.executable, *launcher, *runner, *map(str, command), '--model', MODEL, '--num-classes', str(len(LABELS)),
         '--img-size', '64'], cwd=folder, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)


def _ok(folder, *command):
    result = _run(folder, *command)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Photographs in the folders that timm reads, and what two processes trained on them in train.py."""
    folder = tmp_path_factory.mktemp('timm')
    for label, picture in zip(LABELS, (data.chelsea(), data.coffee(), data.astronaut()), strict=True):
        for split, corners in (('train', (0, 40, 80, 120)), ('validation', (20, 100))):
            (folder / 'pictures' / split / label).mkdir(parents=True)
            for at in corners:
                Image.fromarray(picture[at:at + 150, at:at + 150]).save(
                    folder / 'pictures' / split / label / f'{label}{at:03}.png')
    for name, text in SCRIPTS.items():
        (folder / name).write_text(COMMON + text)
    _ok(folder, 'train.py', 'pictures', '--epochs', 20, '--lr', 5e-3, '--output', folder)
    return folder


@pytest.fixture(scope='module')
def expected(folder):
    """Names of the validation pictures in order, their labels, and logits of the trained network, in plain torch."""
    content = torch.load(folder / 'model_best.pth.tar', weights_only=False)
    model = san_backbones.san.test_san_pairwise(num_classes=len(LABELS))
    model.load_state_dict(content['state_dict_ema'])
    paths = sorted((folder / 'pictures/validation').rglob('*.png'))
    pixels = []
    for path in paths:
        side = int(64 / model.default_cfg['crop_pct'])
        image = Image.open(path).resize((side, side), Image.Resampling.BILINEAR)
        at = round((side - 64) / 2)
        array = np.asarray(image.crop((at, at, at + 64, at + 64)), np.float32) / 255
        pixels.append((array - model.default_cfg['mean']) / model.default_cfg['std'])
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        logits = model.eval()(images)
    return [path.name for path in paths], torch.tensor([LABELS.index(path.parent.name) for path in paths]), logits


def test_two_processes_trained(folder):
    assert len((folder / 'summary.csv').read_text().splitlines()) >= 3
    kept = sorted(folder.glob('checkpoint-*.pth.tar'), key=os.path.getmtime)
    first, last = (torch.load(path, weights_only=False) for path in (kept[0], folder / 'last.pth.tar'))
    assert last['arch'] == MODEL and last['epoch'] == 19 > first['epoch']
    assert sum(not torch.equal(first['state_dict'][name], tensor) for name, tensor in last['state_dict'].items()
               ) > 0.8 * len(last['state_dict'])


def test_validate(folder, expected):
    _, labels, logits = expected
    result = json.loads(_ok(folder, 'validate.py', 'pictures', '--checkpoint', 'model_best.pth.tar')
                        .split('--result ')[1])
    assert result['top1'] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())


def test_inference(folder, expected):
    names, _, logits = expected
    found, outputs = json.loads(_ok(folder, 'inference.py', 'pictures', '--checkpoint', 'model_best.pth.tar')
                                .split('--result ')[1])
    assert found == names
    assert (logits.std(0) > 0.01).all()  # pictures differ by more than the tolerance
    torch.testing.assert_close(torch.tensor(outputs), logits, rtol=0, atol=1e-3)


def test_export(folder):
    onnxruntime = pytest.importorskip('onnxruntime', reason='needs the onnx extra')
    pytest.importorskip('onnxscript', reason='needs the onnx extra')
    _ok(folder, 'onnx_export.py', 'san.onnx', '--checkpoint', 'model_best.pth.tar')
    model = timm.create_model(MODEL, num_classes=len(LABELS), checkpoint_path=folder / 'model_best.pth.tar').eval()
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found, = onnxruntime.InferenceSession(folder / 'san.onnx').run(None, {'input0': image.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(found), model(image), rtol=1e-4, atol=1e-4)


def test_without_the_runner_they_know_no_san(folder):
    result = _run(folder, 'inference.py', 'pictures', with_runner=False)
    assert result.returncode != 0 and f'Unknown model ({MODEL})' in result.stderr
