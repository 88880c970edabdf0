"""Small segmentors and detectors of MMSegmentation and MMDetection on generated pictures, as configs for a Runner."""
import itertools

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

import san_backbones.mm  # noqa: F401, before mmdet.models and mmseg.models
from tests.mm.tiny_data import ARCH, CLASSES, WIDTHS, coco, masks

_numbers = itertools.count()


def make_pictures(folder):
    """What `segmentation` and `detection` read."""
    coco(folder)
    masks(folder)
    return folder


def _loader(dataset, batch_size=1, shuffle=False, infinite=False):
    return dict(batch_size=batch_size, num_workers=0, persistent_workers=False, dataset=dataset,
                sampler=dict(type='InfiniteSampler' if infinite else 'DefaultSampler', shuffle=shuffle))


def _config(folder, work, scope, iters=None, epochs=2, **parts):
    if iters is None:
        train, by_epoch = dict(by_epoch=True, max_epochs=epochs, val_interval=1), True
    else:
        train, by_epoch = dict(by_epoch=False, max_iters=iters, val_interval=2), False
    return Config(dict(
        default_scope=scope, work_dir=str(work), experiment_name=f'tiny_{next(_numbers)}', log_level='WARNING',
        custom_imports=dict(imports=['san_backbones.mm'], allow_failed_imports=False),
        randomness=dict(seed=0), env_cfg=dict(mp_cfg=dict(opencv_num_threads=0), dist_cfg=dict(backend='gloo')),
        train_cfg=train, val_cfg=dict(), test_cfg=dict(),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.01)),
        param_scheduler=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=6)],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=by_epoch, interval=1 if by_epoch else 2),
                           logger=dict(type='LoggerHook', interval=1)),
        **parts))


def segmentation(folder, work, augment=False, batch_size=2, dropout=0., norm='BN', backbone=None, **kwargs):
    """UPerNet on the masks; without a `norm` its head has none, and the backbone BN."""
    def dataset(pipeline):
        return dict(type='BaseSegDataset', data_root=str(folder), serialize_data=False, pipeline=pipeline,
                    data_prefix=dict(img_path='images', seg_map_path='masks'),
                    metainfo=dict(classes=('square', 'ground'), palette=[[0, 0, 0], [255, 255, 255]]))
    load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
    random = [dict(type='RandomFlip', prob=0.5), dict(type='PhotoMetricDistortion')] if augment else []
    evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
    test = _loader(dataset([*load, dict(type='PackSegInputs')]))
    norm_cfg = norm and dict(type=norm, requires_grad=True)
    return _config(
        folder, work, 'mmseg', **kwargs,
        train_dataloader=_loader(dataset([*load, *random, dict(type='PackSegInputs')]), batch_size, shuffle=augment,
                                 infinite='iters' in kwargs),
        val_dataloader=test, test_dataloader=test, val_evaluator=evaluator, test_evaluator=evaluator,
        model=dict(
            type='EncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64), mean=[60.] * 3, std=[50.] * 3),
            backbone={'type': 'SANBackbone', 'arch': ARCH, 'norm_cfg': norm_cfg, 'zero_init_last': False,
                      **(backbone or {})},
            decode_head=dict(type='UPerHead', in_channels=WIDTHS, in_index=[0, 1, 2, 3], pool_scales=(2,),
                             channels=16, num_classes=2, dropout_ratio=dropout, norm_cfg=norm_cfg),
            train_cfg=dict(), test_cfg=dict(mode='whole')))


def detection(folder, work, augment=False, batch_size=2, backbone=None, **kwargs):
    """Faster R-CNN on the boxes: with RoIAlign and nms of whichever operators serve mmcv."""
    import mmdet.models  # noqa: F401
    packed = dict(type='PackDetInputs',
                  meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip'))

    def dataset(pipeline, **more):
        return dict(type='CocoDataset', data_root=str(folder), ann_file='coco.json', data_prefix=dict(img=''),
                    metainfo=dict(classes=CLASSES), serialize_data=False, pipeline=pipeline, **more)
    load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
            dict(type='Resize', scale=(64, 64), keep_ratio=True)]
    random = [dict(type='RandomFlip', prob=0.5)] if augment else []
    evaluator = dict(type='CocoMetric', ann_file=str(folder / 'coco.json'), metric='bbox')
    test = _loader(dataset([*load, packed], test_mode=True))
    sampler = dict(type='RandomSampler', num=16, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False)
    assigner = dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.3, min_pos_iou=0.3)
    nms = dict(type='nms', iou_threshold=0.7)
    return _config(
        folder, work, 'mmdet', **kwargs,
        train_dataloader=_loader(dataset([*load, *random, packed]), batch_size, shuffle=augment,
                                 infinite='iters' in kwargs),
        val_dataloader=test, test_dataloader=test, val_evaluator=evaluator, test_evaluator=evaluator,
        model=dict(
            type='FasterRCNN',
            data_preprocessor=dict(type='DetDataPreprocessor', mean=[60.] * 3, std=[50.] * 3, pad_size_divisor=32),
            backbone={'type': 'SANBackbone', 'arch': ARCH, 'zero_init_last': False, **(backbone or {})},
            neck=dict(type='FPN', in_channels=WIDTHS, out_channels=16, num_outs=4),
            rpn_head=dict(
                type='RPNHead', in_channels=16, feat_channels=16,
                anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[4, 8, 16, 32]),
                bbox_coder=dict(type='DeltaXYWHBBoxCoder'), loss_bbox=dict(type='L1Loss')),
            roi_head=dict(
                type='StandardRoIHead',
                bbox_roi_extractor=dict(type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=3),
                                        out_channels=16, featmap_strides=[4, 8, 16]),
                bbox_head=dict(type='Shared2FCBBoxHead', in_channels=16, fc_out_channels=32, roi_feat_size=3,
                               num_classes=len(CLASSES), bbox_coder=dict(type='DeltaXYWHBBoxCoder'))),
            train_cfg=dict(rpn=dict(assigner=assigner, sampler=sampler, allowed_border=-1, pos_weight=-1),
                           rpn_proposal=dict(nms_pre=20, max_per_img=10, nms=nms, min_bbox_size=0),
                           rcnn=dict(assigner=dict(assigner, neg_iou_thr=0.5, min_pos_iou=0.5),
                                     sampler=dict(sampler, add_gt_as_proposals=True), pos_weight=-1)),
            test_cfg=dict(rpn=dict(nms_pre=20, max_per_img=10, nms=nms, min_bbox_size=0),
                          rcnn=dict(score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5))))


@pytest.fixture(scope='module', autouse=True)
def plain_configs():
    """MMEngine formats the whole config for every log and checkpoint, which takes longer than training does here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ('mmengine.config.config.FormatCode', 'yapf.yapflib.yapf_api.FormatCode'):  # OneDL's
            patch.setattr(name, lambda text, **kwargs: (text, True), raising=False)
        yield


class Stop(Exception):
    """Raised by `Recorder` to simulate a power cut."""


class Recorder(Hook):
    """Keeps the losses of every iteration, the metrics of every evaluation and the last gradients.

    Stops after iteration `stop`.
    """
    priority = 'LOWEST'

    def __init__(self, stop=None):
        self.losses, self.metrics, self.gradients, self.stop = {}, [], {}, stop

    def before_train(self, runner):
        for name, parameter in runner.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda parameter, name=name: self.gradients.update({name: parameter.grad.clone()}))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses[runner.iter + 1] = {name: float(value.detach()) for name, value in outputs.items()}
        if runner.iter + 1 == self.stop:
            raise Stop

    def after_val_epoch(self, runner, metrics=None):
        self.metrics.append(metrics)

    after_test_epoch = after_val_epoch


def train(config, stop=None):
    """Trains, until the end or an interruption after iteration `stop`: the runner and what was recorded."""
    runner, recorder = Runner.from_cfg(config), Recorder(stop)
    runner.register_hook(recorder)
    try:
        runner.train()
        assert stop is None
    except Stop:
        pass
    return runner, recorder
