"""Trains a small SAN Mask R-CNN in a few minutes, on a data set made on the spot or on yours.

    python demo/train.py                                    # textured shapes on photographs
    python demo/train.py --data /folder/of/coco-format/data
    python demo/train.py --data /folder --train-images 8 --evaluate-on-train    # can it learn these by heart?

Everything goes through MMDetection's own config, Runner and COCO metric: this file fills in the config beside it,
mask-rcnn_san-demo_fpn_shapes.py, and says what is going on.
"""

import argparse
import contextlib
import os
import sys
import warnings
from pathlib import Path

import sheet
from coco_folder import NotCoco, find

# Threads that wait for one another sleep rather than spin: beside another program's work, spinning made a step of the
# demo twenty times slower on two cores. Read when torch is loaded, which is later.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

CONFIG = Path(__file__).resolve().parent / 'mask-rcnn_san-demo_fpn_shapes.py'
PICTURES_ON_SHEET = 12


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog='A second run in the same work folder starts afresh and overwrites what the first one left, except for '
               'its log.')
    parser.add_argument('--data', type=Path, metavar='FOLDER',
                        help='your data in COCO\'s format: annotations with masks, for training and for validation, '
                             'and the pictures they name (default: the demo makes a data set of textured shapes)')
    parser.add_argument('--iterations', type=int, metavar='N',
                        help='train for N steps of 4 pictures each (default: what the config says)')
    parser.add_argument('--minutes', type=float, default=5.7, metavar='M',
                        help='train for at most M minutes. A machine too slow for all iterations takes fewer, and its '
                             'learning rate decays faster, so that the training still ends well (default: %(default)s)')
    parser.add_argument('--size', type=int, metavar='PIXELS',
                        help='scale pictures to this longer side (default: 192, or 256 with --data)')
    parser.add_argument('--train-images', type=int, default=0, metavar='N',
                        help='train on the first N pictures; 0 for all (default: %(default)s)')
    parser.add_argument('--val-images', type=int, default=40, metavar='N',
                        help='evaluate on the first N pictures; 0 for all (default: %(default)s)')
    parser.add_argument('--evaluate-on-train', action='store_true',
                        help='evaluate on the very pictures of the training: a network that cannot learn a handful of '
                             'them by heart has something wrong with it')
    parser.add_argument('--seed', type=int, default=0, metavar='N',
                        help='of the data, the weights and the order of the pictures (default: %(default)s)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'), metavar='FOLDER',
                        help='write everything here (default: %(default)s)')
    parser.add_argument('--verbose', action='store_true', help='print all that MMDetection says, too')
    options = parser.parse_args(arguments)
    for name, least in dict(iterations=1, size=32, train_images=0, val_images=0).items():
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f'--{name.replace("_", "-")} must be at least {least}, not {value}')
    if options.minutes <= 0:
        parser.error(f'--minutes must be more than 0, not {options.minutes:g}')
    return options


def main(arguments=None):
    """Runs the demo.

    Returns:
        MMDetection's metrics before and after the training: two dicts with keys such as `coco/segm_mAP`.
    """
    options = parse(arguments)
    console, work_dir = Console(options.verbose), options.work_dir
    say = console.say
    work_dir.mkdir(parents=True, exist_ok=True)
    try:
        train, val = get_data(options, say)
    except (NotCoco, FileNotFoundError, FileExistsError) as error:
        sys.exit(f'error: {error}')
    kind = 'training' if val is train else 'held-out'

    # mmengine asks setuptools where MMDetection lies; nothing that a user of the demo could act on.
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated as an API', category=UserWarning)
    say('\nloading MMDetection')
    with console.others_quiet():
        from mmengine.runner import Runner  # here and not above: it takes seconds, and mistakes should show at once

        from pace import Pace
        cfg = make_config(options, train, val)
        pace = Pace(60 * options.minutes, say)
        runner = Runner.from_cfg(cfg)
        runner.register_hook(pace)
    parameters = list(runner.model.parameters())
    say(f'{cfg.model.type} on {cfg.model.backbone.type}: {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters, '
        f'on {parameters[0].device}')

    say(f'\nevaluating before training, on {len(val.coco["images"])} {kind} pictures')
    with console.others_quiet():
        before = runner.test()
    say(f'  {score(before)}')

    say(f'\ntraining for {cfg.max_iters} iterations, or for {options.minutes:g} minutes if those are over sooner')
    with console.others_quiet():
        runner.train()

    say(f'\nevaluating after training, on the same {kind} pictures')
    with console.others_quiet():
        after = runner.test()
        runner.save_checkpoint(str(work_dir), 'checkpoint.pth', save_optimizer=False, save_param_scheduler=False)
        sheet.draw(work_dir / 'sheet.png', list(examples(runner)), train.classes,
                   f'{kind.capitalize()} pictures after {pace.done} iterations: {score(after)}')
    say(f'  {score(after)}')

    log = work_dir / runner.timestamp / f'{runner.timestamp}.log'
    say(SUMMARY.format(kind=kind, before=score(before), after=score(after), iterations=pace.done,
                       seconds=pace.elapsed, sheet=work_dir / 'sheet.png', checkpoint=work_dir / 'checkpoint.pth',
                       config=work_dir / CONFIG.name, log=log))
    say(HINTS_OWN_DATA if options.data else HINTS)
    return before, after


SUMMARY = '''
{iterations} iterations in {seconds:.0f} seconds
  before    {before}
  after     {after}

pictures    {sheet}  (truth beside prediction, {kind} pictures)
checkpoint  {checkpoint}
config      {config}
log         {log}'''

HINTS = '''
What next?
  your data         make demo DATA=/folder/of/coco-format/data
  longer            .venv/bin/python demo/train.py --iterations 2000 --minutes 30
  other settings    .venv/bin/python demo/train.py --help
  the config        demo/mask-rcnn_san-demo_fpn_shapes.py is a good start for one of your own'''

HINTS_OWN_DATA = '''
What next?
  A few minutes from random weights are a trial, not a training: more iterations, larger pictures and weights from
  ImageNet are what brings results.
  can it learn?     add --train-images 8 --evaluate-on-train: the AP should climb far above zero
  longer, larger    add --iterations 5000 --minutes 120 --size 512
  the config        demo/mask-rcnn_san-demo_fpn_shapes.py is a good start for one of your own'''


def get_data(options, say):
    """The training and the validation part of the data: yours, or the demo's own."""
    if options.data:
        folder = options.data
    else:
        from shapes import make
        folder = make(options.work_dir / 'shapes', size=options.size or 192, seed=options.seed, report=say)
    train, val = find(folder)
    train = train.first(options.train_images, options.work_dir)
    val = train if options.evaluate_on_train else val.first(options.val_images, options.work_dir)
    for name, part in dict(train=train, val=val).items():
        say(f'{name:5} {len(part.coco["images"])} pictures with {len(part.coco["annotations"])} objects: {part.json}')
    return train, val


def make_config(options, train, val):
    """The demo's config, with the data and the options filled in."""
    from mmengine.config import Config
    cfg = Config.fromfile(CONFIG)  # its custom_imports bring SANBackbone
    cfg.work_dir = str(options.work_dir)
    cfg.randomness = dict(seed=options.seed)

    for loader, part in (cfg.train_dataloader, train), (cfg.test_dataloader, val):
        loader.dataset.update(
            metainfo=dict(classes=train.classes),
            data_root='',
            ann_file=str(part.json.resolve()),
            data_prefix=dict(img=str(part.images.resolve())))
    cfg.test_evaluator.ann_file = str(val.json.resolve())
    cfg.model.roi_head.bbox_head.num_classes = cfg.model.roi_head.mask_head.num_classes = len(train.classes)
    size = options.size or (256 if options.data else None)
    if size:
        for step in cfg.train_pipeline + cfg.test_pipeline:
            if step.type == 'Resize':
                step.scale = (size, size)
        cfg.train_dataloader.dataset.pipeline = cfg.train_pipeline
        cfg.test_dataloader.dataset.pipeline = cfg.test_pipeline

    iterations = options.iterations or cfg.max_iters
    warmup = max(1, min(cfg.warmup, iterations // 4))
    cfg.max_iters = cfg.train_cfg.max_iters = iterations
    cfg.param_scheduler[0].end = cfg.param_scheduler[1].begin = warmup
    cfg.param_scheduler[1].T_max = max(1, iterations - warmup)
    cfg.param_scheduler[1].end = warmup + cfg.param_scheduler[1].T_max

    # Evaluation and the checkpoint come when the demo asks for them, which is also when a training ends early.
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint = None
    return cfg


def examples(runner):
    """The first pictures of the evaluation, with truth and prediction, as `sheet.draw` takes them."""
    import mmcv
    import torch
    runner.model.eval()
    for batch, _ in zip(runner.test_dataloader, range(PICTURES_ON_SHEET)):
        with torch.no_grad():
            sample, = runner.model.test_step(batch)
        truth, predicted = sample.gt_instances, sample.pred_instances.cpu()
        yield dict(
            picture=mmcv.imread(sample.img_path, channel_order='rgb'),
            truth=dict(masks=truth.masks.masks.astype(bool), boxes=truth.bboxes.cpu().numpy(),
                       labels=truth.labels.cpu().numpy()),
            predicted=dict(masks=predicted.masks.numpy(), boxes=predicted.bboxes.numpy(),
                           labels=predicted.labels.numpy(), scores=predicted.scores.numpy()))


def score(metrics):
    """The two numbers that matter most, as text."""
    # MMDetection's metric is empty where a network, say an untrained one with many classes, finds nothing at all.
    return 'mask AP {:.3f}, box AP {:.3f}'.format(*(metrics.get(f'coco/{kind}_mAP', 0.) for kind in ('segm', 'bbox')))


class Console:
    """Two voices share the console: the demo's own, and that of the libraries, which can be made to whisper.

    MMDetection's log file holds everything either way.
    """

    def __init__(self, verbose):
        self.stdout = sys.stdout
        self.sink = sys.stdout if verbose else open(os.devnull, 'w')  # noqa: SIM115, open to the end

    def say(self, line):
        print(line, file=self.stdout, flush=True)

    def others_quiet(self):
        return contextlib.redirect_stdout(self.sink)


if __name__ == '__main__':
    main()
