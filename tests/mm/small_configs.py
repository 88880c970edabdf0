"""Small versions of the configs in mm_configs, on a handful of made-up pictures: a step takes some milliseconds."""
import copy
import functools

from mmengine.config import Config
from mmengine.registry import init_default_scope

import san_backbones.mm  # noqa: F401
from tests import ROOT
from tests.mm.tiny_data import ARCH, CLASSES, WIDTHS, coco, masks, picture  # noqa: F401

CONFIGS = ROOT / 'mm_configs'


@functools.lru_cache
def _read(name):
    return Config.fromfile(CONFIGS / name)


def backbone(attention='patchwise'):
    """The change to a config's backbone."""
    return dict(_delete_=True, type='SANBackbone', arch=dict(ARCH, attention=attention), position_ref_size=224,
                init_cfg=None)


def detection(folder, attention='patchwise', classes=CLASSES):
    """Mask R-CNN on what `coco` wrote into `folder`, one epoch of training."""
    train = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
             dict(type='Resize', scale=(64, 64), keep_ratio=True), dict(type='PackDetInputs')]
    test = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64), keep_ratio=True), dict(
        type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]

    def loader(pipeline):
        return dict(num_workers=0, persistent_workers=False, dataset=dict(
            data_root=str(folder), ann_file='coco.json', data_prefix=dict(img=''), metainfo=dict(classes=classes),
            pipeline=pipeline))

    cfg = copy.deepcopy(_read('mask_rcnn/mask-rcnn_san15-patchwise_fpn_1x_coco.py'))
    extractor = dict(out_channels=32)
    proposals = dict(nms_pre=50, max_per_img=50)
    cfg.merge_from_dict(dict(
        model=dict(
            backbone=backbone(attention), neck=dict(in_channels=WIDTHS, out_channels=32),
            rpn_head=dict(in_channels=32, feat_channels=32),
            roi_head=dict(bbox_roi_extractor=extractor, mask_roi_extractor=extractor, bbox_head=dict(
                num_classes=len(classes), in_channels=32, fc_out_channels=32), mask_head=dict(
                    num_classes=len(classes), num_convs=1, in_channels=32, conv_out_channels=16)),
            train_cfg=dict(rpn_proposal=proposals, rcnn=dict(sampler=dict(num=32))),
            test_cfg=dict(rpn=proposals, rcnn=dict(max_per_img=5))),
        train_dataloader=loader(train), val_dataloader=loader(test), test_dataloader=loader(test),
        val_evaluator=dict(ann_file=str(folder / 'coco.json')),
        test_evaluator=dict(ann_file=str(folder / 'coco.json')),
        train_cfg=dict(max_epochs=1), work_dir=str(folder / 'work')))
    cfg.test_pipeline = test  # what the functions of mmdet.apis and mmseg.apis read
    init_default_scope('mmdet')
    return cfg


def segmentation(folder, attention='patchwise', classes=CLASSES):
    """UPerNet on what `masks` wrote into `folder`, two iterations of training."""
    train = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    test = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]

    def loader(pipeline):
        return dict(num_workers=0, persistent_workers=False, dataset=dict(
            _delete_=True, type='BaseSegDataset', data_root=str(folder), metainfo=dict(
                classes=classes, palette=[[20 * i, 200, 255 - 20 * i] for i in range(len(classes))]),
            data_prefix=dict(img_path='images', seg_map_path='masks'), pipeline=pipeline))

    head = dict(num_classes=len(classes), channels=16, norm_cfg=dict(type='BN'))
    cfg = copy.deepcopy(_read('upernet/san15-patchwise_upernet_8xb2-160k_ade20k-512x512.py'))
    cfg.merge_from_dict(dict(
        model=dict(data_preprocessor=dict(size=(64, 64), test_cfg=dict(size_divisor=32)), backbone=backbone(attention),
                   decode_head=dict(head, in_channels=WIDTHS), auxiliary_head=dict(head, in_channels=64)),
        train_dataloader=loader(train), val_dataloader=loader(test), test_dataloader=loader(test),
        train_cfg=dict(max_iters=2, val_interval=2), work_dir=str(folder / 'work')))
    cfg.test_pipeline = test
    init_default_scope('mmseg')
    return cfg
