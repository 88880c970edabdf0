"""Trains a small SAN Mask R-CNN, or Faster R-CNN, in a few minutes, on a generated data set or on yours.

    python demo/train.py                                    # textured shapes on photographs
    python demo/train.py --data /folder/of/data             # COCO's, VOC's or YOLO's labels
    python demo/train.py --data /folder --train-images 8 --evaluate-on-train    # can it memorise these?
    python demo/train.py --weights random                   # what are the weights worth that it starts from?

Everything uses MMDetection's own config, Runner and COCO metric: this file completes the config
mask-rcnn_san-demo_fpn_shapes.py in the same folder, and prints progress. Data with boxes and no masks train a
Faster R-CNN, the same network without its mask head.
"""

import argparse
import contextlib
import os
import shlex
import sys
import warnings
from pathlib import Path
from pickle import UnpicklingError

import sheet

# Waiting threads sleep instead of spinning: while another program ran, spinning made a step of the demo twenty times
# slower on two cores. Must be set before torch is imported.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

CONFIG = Path(__file__).resolve().parent / 'mask-rcnn_san-demo_fpn_shapes.py'
FROM_SCRATCH = CONFIG.parents[1] / 'mm_configs' / 'from_scratch'
PICTURES_ON_SHEET = 12


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog='A second run in the same work folder starts again and overwrites the files of the first, except its '
               'log.')
    parser.add_argument('--data', type=Path, metavar='FOLDER',
                        help="your pictures with boxes or masks: COCO's format, or VOC's XML or YOLO's text, which "
                             'are converted (default: the demo makes a data set of textured shapes)')
    parser.add_argument('--weights', metavar='CHECKPOINT',
                        help="weights of the backbone to start from, as MMEngine's init_cfg names them; `random` for "
                             'none (default: what the config says, weights that ship with the package)')
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
                        help='evaluate on the training pictures: a working network can memorise a handful of them')
    parser.add_argument('--seed', type=int, default=0, metavar='N',
                        help='seed of the data, the weights and the order of the pictures (default: %(default)s)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'), metavar='FOLDER',
                        help='write everything here (default: %(default)s)')
    parser.add_argument('--verbose', action='store_true', help="also print MMDetection's output")
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
    from san_backbones import data  # imports torch: wrong options have failed before
    try:
        train, val = get_data(options, say)
    except (data.DataError, FileNotFoundError, FileExistsError) as error:
        sys.exit(f'error: {error}')
    kind = 'training' if val is train else 'held-out'
    masks = has_masks(train, val, say)

    # mmengine locates MMDetection through setuptools; a user of the demo can do nothing about the warning.
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated as an API', category=UserWarning)
    say('\nloading MMDetection')
    with console.others_quiet():
        from mmengine.runner import Runner  # only here: it takes seconds, and wrong arguments should fail at once

        from pace import Pace
        cfg = make_config(options, train, val, masks)
        pace = Pace(60 * options.minutes, say,
                    midway=lambda: say(f'  midway    {score(runner.test_loop.run(), masks)}'))
        runner = Runner.from_cfg(cfg)
        runner.register_hook(pace)
    parameters = list(runner.model.parameters())
    start = cfg.model.backbone.init_cfg
    say(f'{cfg.model.type} on {cfg.model.backbone.type}: {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters, '
        f'on {parameters[0].device}, from {start.checkpoint if start else "random weights"}')

    with console.others_quiet():
        try:
            runner.model.init_weights()  # before the first evaluation, and before minutes of it if there are no weights
        except (OSError, RuntimeError, TypeError, ValueError, UnpicklingError) as error:
            sys.exit(f'error: {error}')

    say(f'\nevaluating before training, on {len(val.coco["images"])} {kind} pictures')
    with console.others_quiet():
        before = runner.test()
    say(f'  {score(before, masks)}')

    say(f'\ntraining for {cfg.max_iters} iterations, or {options.minutes:g} minutes if they end first')
    with console.others_quiet():
        runner.train()

    say(f'\nevaluating after training, on the same {kind} pictures')
    with console.others_quiet():
        after = runner.test()
        runner.save_checkpoint(str(work_dir), 'checkpoint.pth', save_optimizer=False, save_param_scheduler=False)
        sheet.draw(work_dir / 'sheet.png', list(examples(runner)), train.classes,
                   f'{kind.capitalize()} pictures after {pace.done} iterations: {score(after, masks)}')
    say(f'  {score(after, masks)}')

    log = work_dir / runner.timestamp / f'{runner.timestamp}.log'
    say(SUMMARY.format(kind=kind, before=score(before, masks), after=score(after, masks), iterations=pace.done,
                       seconds=pace.elapsed, sheet=work_dir / 'sheet.png', checkpoint=work_dir / 'checkpoint.pth',
                       config=work_dir / CONFIG.name, log=log))
    say(hints(options, train, val, masks, start))
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
What next? The commands work as they stand.
  find shapes on pictures
    {python} -m san_backbones predict {checkpoint} {pictures} --out {predicted}
  your data: boxes or masks, COCO's, VOC's or YOLO's
    make demo DATA=/folder/of/data
  a longer training
    {python} {script}{weights} --iterations 2000 --minutes 30
The config {config} is a good start for one of your own.'''

HINTS_OWN_DATA = '''
A few minutes are a trial, not a training: more pictures and iterations, larger pictures and weights from ImageNet
are what brings results.

What next? The commands work as they stand.
  find such objects on other pictures (here: those of the validation)
    {python} -m san_backbones predict {checkpoint} {pictures} --out {predicted}
  can it learn? Eight pictures, evaluated on themselves: the AP should climb far above zero
    {python} {script}{weights} --data {data} --train-images 8 --evaluate-on-train --work-dir {memory}
  longer and larger
    {python} {script}{weights} --data {data} --iterations 5000 --minutes 120 --size 512
  a training in earnest, with the config {own}, which has your folders and classes (best on a GPU)
    {python} -m san_backbones.mm.run {tool} {own} --work-dir {training}'''

OWN_CONFIG = '''# Made by the demo, to be changed: {title} from {start} on your data.
_base_ = {base!r}

metainfo = dict(classes={classes!r})
train_dataloader = dict(dataset=dict(
    data_root='', metainfo=metainfo,
    ann_file={train_json!r},
    data_prefix=dict(img={train_images!r})))
val_dataloader = dict(dataset=dict(
    data_root='', metainfo=metainfo,
    ann_file={val_json!r},
    data_prefix=dict(img={val_images!r})))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={val_json!r})
test_evaluator = val_evaluator
model = dict(backbone=dict(init_cfg={init_cfg}), roi_head=dict({heads}))
'''


def has_masks(train, val, say):
    """Whether a Mask R-CNN can be trained; says so if not."""
    bare, count = (sum(numbers) for numbers in zip(*(
        (part.without_masks, len(part.coco['annotations'])) for part in (train, val))))
    if bare:
        which = 'the objects have boxes and no masks' if bare == count else f'{bare} of {count} objects have no mask'
        say(f'{which}: a Faster R-CNN is trained, which finds boxes')
    return not bare


def hints(options, train, val, masks, init_cfg):
    """Returns what to do next, as commands to paste; writes the config that one of them names."""
    from importlib.util import find_spec
    work_dir = options.work_dir
    words = dict(python=nearest(sys.executable), script=nearest(__file__), checkpoint=work_dir / 'checkpoint.pth',
                 pictures=nearest(val.images), predicted=work_dir / 'predicted', data=options.data,
                 config=nearest(CONFIG), memory=work_dir / 'memory', training=work_dir / 'training',
                 own=work_dir / 'my_config.py',
                 tool=nearest(Path(find_spec('mmdet').origin).parent / '.mim/tools/train.py'))
    if options.data:
        write_config(words['own'], train, val, masks, init_cfg)
    text = HINTS_OWN_DATA if options.data else HINTS
    weights = f' --weights {shlex.quote(options.weights)}' if options.weights else ''
    return text.format(weights=weights, **{name: shlex.quote(str(word)) for name, word in words.items()})


def nearest(path):
    """Returns a path as it is written from this folder, if that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def write_config(path, train, val, masks, init_cfg):
    """Writes the config of a whole training on these data."""
    name = 'mask-rcnn' if masks else 'faster-rcnn'
    heads = ['bbox_head', 'mask_head'][:1 + masks]
    path.write_text(OWN_CONFIG.format(
        title='a Mask R-CNN' if masks else 'a Faster R-CNN', classes=train.classes,
        start=init_cfg['checkpoint'] if init_cfg else 'random weights',
        init_cfg=init_cfg and dict(init_cfg, _delete_=True),  # a dict cannot inherit from None, which the base has
        base=(FROM_SCRATCH / f'{name}_san10-patchwise_fpn_from-scratch_coco.py').as_posix(),
        heads=', '.join(f'{head}=dict(num_classes={len(train.classes)})' for head in heads),
        **{f'{split}_{what}': getattr(part.whole or part, what).resolve().as_posix()
           for split, part in dict(train=train, val=val).items() for what in ('json', 'images')}), encoding='utf-8')


def get_data(options, say):
    """Returns the training and the validation part of the data: yours, or the demo's own."""
    from san_backbones.data.convert import find_or_convert
    from san_backbones.data.coco import find
    if options.data:
        folder = find_or_convert(options.data, options.work_dir / 'data', say)
    else:
        from shapes import make
        folder = make(options.work_dir / 'shapes', size=options.size or 192, seed=options.seed, report=say)
    train, val = find(folder)
    train = train.first(options.train_images, options.work_dir)
    val = train if options.evaluate_on_train else val.first(options.val_images, options.work_dir)
    for name, part in dict(train=train, val=val).items():
        say(f'{name:5} {len(part.coco["images"])} pictures with {len(part.coco["annotations"])} objects: {part.json}')
    return train, val


def make_config(options, train, val, masks):
    """Returns the demo's config with the data and the options filled in, and without masks if there are none."""
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
    if options.weights == 'random':
        cfg.model.backbone.update(init_cfg=None, frozen_stages=-1, norm_eval=False)
    elif options.weights:
        cfg.model.backbone.init_cfg.checkpoint = options.weights
    cfg.model.roi_head.bbox_head.num_classes = cfg.model.roi_head.mask_head.num_classes = len(train.classes)
    if not masks:
        remove_masks(cfg)
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

    # The demo itself evaluates and saves the checkpoint, also after a training that ends early.
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint = None
    return cfg


def remove_masks(cfg):
    """Makes the Mask R-CNN of a config a Faster R-CNN."""
    cfg.model.type = 'FasterRCNN'
    del cfg.model.roi_head['mask_head'], cfg.model.roi_head['mask_roi_extractor']
    for step in cfg.train_pipeline + cfg.test_pipeline:
        if step.type == 'LoadAnnotations':
            step.with_mask = False
    cfg.train_dataloader.dataset.pipeline = cfg.train_pipeline
    cfg.test_dataloader.dataset.pipeline = cfg.test_pipeline
    cfg.test_evaluator.metric = ['bbox']


def examples(runner):
    """Yields the first pictures of the evaluation, with truth and prediction, as `sheet.draw` takes them."""
    import mmcv
    import torch
    runner.model.eval()
    for batch, _ in zip(runner.test_dataloader, range(PICTURES_ON_SHEET)):
        with torch.no_grad():
            sample, = runner.model.test_step(batch)
        truth, predicted = sample.gt_instances, sample.pred_instances.cpu()
        example = dict(
            picture=mmcv.imread(sample.img_path, channel_order='rgb'),
            truth=dict(boxes=truth.bboxes.cpu().numpy(), labels=truth.labels.cpu().numpy()),
            predicted=dict(boxes=predicted.bboxes.numpy(), labels=predicted.labels.numpy(),
                           scores=predicted.scores.numpy()))
        if 'masks' in truth:
            example['truth']['masks'] = truth.masks.masks.astype(bool)
            example['predicted']['masks'] = predicted.masks.numpy()
        yield example


def score(metrics, masks=True):
    """Formats mask AP, if there are masks, and box AP."""
    # MMDetection's metric is empty if a network, such as an untrained one with many classes, finds nothing.
    kinds = dict(mask='segm', box='bbox') if masks else dict(box='bbox')
    return ', '.join(f'{name} AP {metrics.get(f"coco/{kind}_mAP", 0.):.3f}' for name, kind in kinds.items())


class Console:
    """Separates the demo's own output from that of the libraries, which can be silenced.

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
