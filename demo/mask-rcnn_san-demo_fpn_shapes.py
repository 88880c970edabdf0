# Mask R-CNN on a SAN10, for `make demo`: an ordinary MMDetection config, made to learn within minutes on a CPU.
#
# Two things make it a SAN config: `custom_imports`, which registers SANBackbone, and the `backbone` entry.
# Everything else only makes MMDetection's Mask R-CNN smaller.

_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/default_runtime.py']
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

# ---------------------------------------------------------------------------------------------------------- data
# demo/train.py makes this data set; for your own data it replaces folder, class names and size.
data_root = 'work_dirs/demo/shapes/'
metainfo = dict(classes=('square', 'star', 'ring'))
size = 192

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(size, size), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(size, size), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),  # for the sheet of pictures; not used to predict
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,  # loading takes a fraction of a step, and two cores are busy already
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='CocoDataset',
        metainfo=metainfo,
        data_root=data_root,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        metainfo=metainfo,
        data_root=data_root,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
        pipeline=test_pipeline))
val_evaluator = dict(
    type='CocoMetric', ann_file=data_root + 'annotations/instances_val.json', metric=['bbox', 'segm'])
test_dataloader = val_dataloader
test_evaluator = val_evaluator

# --------------------------------------------------------------------------------------------------------- model
channels = 64           # of the feature pyramid and the heads
norm = dict(type='BN')  # in the pyramid and the mask head too: from random weights they learn slowly without
num_classes = len(metainfo['classes'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='SANBackbone',
        arch='san10_patchwise',
        # the weights that ship; `checkpoint` may also name a file, or weights of the Hub
        init_cfg=dict(type='Pretrained', checkpoint='hf-hub:san-backbones/san10_patchwise.distilled'),
        frozen_stages=2,  # as is usual with weights; random ones must learn: -1, and norm_eval=False
        norm_eval=True,
        out_indices=(1, 2, 3, 4)),
    neck=dict(out_channels=channels, norm_cfg=norm),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4])),  # anchors of 16 to 256 pixels: the pictures are small
    roi_head=dict(
        # Two samples per bin: faster, and as good on shapes of this size.
        bbox_roi_extractor=dict(out_channels=channels, roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=num_classes),
        mask_roi_extractor=dict(out_channels=channels, roi_layer=dict(sampling_ratio=2)),
        mask_head=dict(
            num_convs=2, in_channels=channels, conv_out_channels=channels, norm_cfg=norm,
            num_classes=num_classes)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=300, max_per_img=150),
        # Ignores boxes with overlaps between 0.4 and 0.55, which disturb a short training.
        rcnn=dict(
            assigner=dict(pos_iou_thr=0.55, neg_iou_thr=0.4, min_pos_iou=0.55),
            sampler=dict(num=64))),
    test_cfg=dict(
        rpn=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(max_per_img=30)))

# ------------------------------------------------------------------------------------------------------ schedule
max_iters = 400
warmup = 30
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# In so few steps a SAN learns much faster with AdamW than with SGD.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=warmup),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=warmup, end=max_iters, T_max=max_iters - warmup, eta_min=1e-5),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(by_epoch=False, interval=max_iters))
log_processor = dict(by_epoch=False)
