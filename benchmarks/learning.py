"""Trains SAN and timm's resnet50 for a few minutes on real data with the same head, data and steps, from random or
other weights.

    python benchmarks/learning.py camvid --data FOLDER    # UPerNet; FOLDER holds camvid_small/{img_dir,ann_dir}
    python benchmarks/learning.py bccd --data FOLDER      # Faster R-CNN; FOLDER holds bccd/BCCD
    python benchmarks/learning.py bccd --data FOLDER --backbones san10_patchwise --weights distilled --seed 1
    python benchmarks/learning.py bccd --data FOLDER --backbones tf_efficientnet_lite0 --weights lite0.pth

A sanity check that the backbone learns, in minutes on a CPU; it says nothing about COCO or ADE20K. The curve is over
validation pictures, the last row over test pictures. Seconds are processor time of all threads in training steps.
"""
import argparse
import contextlib
import csv
import os
import pathlib
import sys
import time
import warnings

import harness

warnings.filterwarnings('ignore')
import san_backbones.mm  # noqa: E402, F401
from mmengine.config import Config  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

TASKS = {
    'camvid': dict(config='upernet_camvid.py', data='camvid_small', metrics=['mIoU', 'mAcc', 'aAcc'], iterations=200),
    'bccd': dict(config='faster-rcnn_bccd.py', data='bccd', metrics=['coco/bbox_mAP', 'coco/bbox_mAP_50'],
                 iterations=200),
}
BACKBONES = {
    'resnet50': dict(type='mmseg.TIMMBackbone', model_name='resnet50', pretrained=False, out_indices=(1, 2, 3, 4)),
    # the teacher of the distilled weights, as a ceiling; benchmarks/teachers.py writes its weights
    'tf_efficientnet_lite0': dict(type='mmseg.TIMMBackbone', model_name='tf_efficientnet_lite0', pretrained=False,
                                  out_indices=(1, 2, 3, 4)),
    **{arch: dict(type='SANBackbone', arch=arch)
       for arch in ('san15_patchwise', 'san15_pairwise', 'san10_patchwise', 'san10_pairwise')},
}
CHANNELS = {'tf_efficientnet_lite0': [24, 40, 112, 320]}  # the others have those of a ResNet-50


def started(backbone, weights):
    """Returns the backbone's config with weights: a file, 'distilled' for the shipped ones, or none."""
    cfg = dict(BACKBONES[backbone])
    if weights and cfg['type'] == 'SANBackbone':
        checkpoint = f'hf-hub:san-backbones/{backbone}.distilled' if weights == 'distilled' else weights
        cfg['init_cfg'] = dict(type='Pretrained', checkpoint=checkpoint)
        if weights == 'distilled':
            cfg['position_ref_size'] = 64  # they learnt at 64 pixels; the patchwise form has no positions
    elif weights:
        cfg.update(pretrained=True, pretrained_cfg_overlay=dict(file=weights, hf_hub_id=None, url=None))
    return cfg


class Record(Hook):
    """Records processor time and losses of the training steps, and the scores of every evaluation."""
    priority = 'VERY_LOW'

    def __init__(self, metrics):
        self.metrics, self.seconds, self.losses, self.rows = metrics, 0., [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.start = time.process_time()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seconds += time.process_time() - self.start
        self.losses.append(float(outputs['loss']))

    def add(self, runner, pictures, scores):
        last = self.losses[-20:]
        self.rows.append(dict(
            iteration=runner.iter, cpu_seconds=f'{self.seconds:.0f}', pictures=pictures,
            loss=f'{sum(last) / max(1, len(last)):.3f}',
            **{name.removeprefix('coco/'): harness.figure(scores.get(name, 0.), 3) for name in self.metrics}))

    def after_val_epoch(self, runner, metrics=None):
        self.add(runner, 'validation', metrics)


def config(options, backbone):
    task = TASKS[options.task]
    cfg = Config.fromfile(pathlib.Path(__file__).parent / 'learning' / task['config'])
    cfg.model.backbone = started(backbone, options.weights)
    if backbone in CHANNELS:
        channels = CHANNELS[backbone]
        if options.task == 'bccd':
            cfg.model.neck.in_channels = channels
        else:
            cfg.model.decode_head.in_channels, cfg.model.auxiliary_head.in_channels = channels, channels[2]
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(options.data / task['data'])
    total, warm_up = options.iterations, max(1, options.iterations // 12)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=total, val_interval=max(1, total // options.evaluations))
    cfg.val_cfg, cfg.test_cfg = dict(type='ValLoop'), dict(type='TestLoop')
    cfg.optim_wrapper = dict(
        type='OptimWrapper', optimizer=dict(type='AdamW', lr=options.lr, weight_decay=0.05),
        paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.), clip_grad=dict(max_norm=5.))
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=warm_up),
        dict(type='CosineAnnealingLR', by_epoch=False, begin=warm_up, end=total, T_max=max(1, total - warm_up))]
    cfg.default_hooks = dict(checkpoint=None, logger=dict(type='LoggerHook', interval=10, log_metric_by_epoch=False))
    cfg.log_processor = dict(by_epoch=False)
    cfg.randomness = dict(seed=options.seed)
    cfg.work_dir = str(options.work_dir / f'{options.task}-{backbone}')
    cfg.experiment_name = f'{options.task}-{backbone}-{options.lr}-{time.time_ns()}'
    return cfg


def weights_name(weights):
    """Returns the file name only, which is the same on every machine."""
    return pathlib.Path(weights).name if weights else 'random'


def learn(options, backbone):
    """Trains one network and returns its rows."""
    record = Record(TASKS[options.task]['metrics'])
    with open(os.devnull, 'w') as silence, contextlib.redirect_stdout(silence):
        runner = Runner.from_cfg(config(options, backbone))
        runner.register_hook(record)
        runner.train()
        record.add(runner, 'test', runner.test())
    parameters = sum(p.numel() for p in runner.model.backbone.parameters())
    return [dict(task=options.task, backbone=backbone, weights=weights_name(options.weights),
                 backbone_parameters=f'{parameters / 1e6:.1f}M', lr=options.lr, seed=options.seed, **row,
                 machine=harness.machine()) for row in record.rows]


def kept(path, rows):
    """Returns the rows of a CSV that `rows` do not replace."""
    def what(row):
        return tuple(str(row.get(name, 'random')) for name in ('backbone', 'weights', 'lr', 'seed'))

    if not path.exists():
        return []
    with open(path, newline='') as file:
        old = [{name: row.get(name, 'random') for name in rows[0]} for row in csv.DictReader(file)]
    return [row for row in old if what(row) not in set(map(what, rows))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=list(TASKS))
    parser.add_argument('--data', type=pathlib.Path, required=True, metavar='FOLDER', help='where the data sets lie')
    parser.add_argument('--backbones', nargs='+', choices=list(BACKBONES), default=['resnet50', 'san15_patchwise'])
    parser.add_argument('--weights', metavar='FILE', help="checkpoint to start from, or 'distilled' for the shipped "
                                                           'weights of that name (default: random weights)')
    parser.add_argument('--iterations', type=int, help='training steps of each network (default: ' + ', '.join(
        f'{task["iterations"]} for {name}' for name, task in TASKS.items()) + ')')
    parser.add_argument('--lr', type=float, default=1e-3, help='peak learning rate of AdamW (default: %(default)s)')
    parser.add_argument('--evaluations', type=int, default=4, help='evaluations on validation pictures in training')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--work-dir', type=pathlib.Path, default=pathlib.Path('work_dirs/learning'))
    parser.add_argument('--results', type=pathlib.Path, default=harness.RESULTS, help='folder for the CSV')
    options = parser.parse_args()
    options.iterations = options.iterations or TASKS[options.task]['iterations']
    folder = options.data / TASKS[options.task]['data']
    if not folder.is_dir():
        sys.exit(f'--data {options.data}: there is no folder {folder}')
    rows = []
    for backbone in options.backbones:
        learned = learn(options, backbone)
        for row in learned:
            harness.show(row)
        rows += learned
    path = options.results / f'learning-{options.task}.csv'
    harness.write(path, kept(path, rows) + rows)


if __name__ == '__main__':
    main()
