# Faster R-CNN on the blood cells of BCCD at 320x240, from random weights, small enough for minutes on a CPU.
# benchmarks/learning.py fills in the backbone, the data's folder and the budget.
_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', 'mmdet::_base_/default_runtime.py']
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

classes = ('RBC', 'WBC', 'Platelets')
size = (320, 240)
channels = 96
norm_cfg = dict(type='BN', requires_grad=True)  # from random weights the pyramid learns slowly without
model = dict(
    backbone=dict(_delete_=True, type='SANBackbone', arch='san15_patchwise'),
    neck=dict(out_channels=channels, norm_cfg=norm_cfg),
    rpn_head=dict(in_channels=channels, feat_channels=channels, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=len(classes))),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=300),
        rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'instances')),
]
dataset = dict(
    type='XMLDataset', metainfo=dict(classes=classes), data_root='bccd', data_prefix=dict(sub_data_root='BCCD/'),
    ann_subdir='Annotations', img_subdir='JPEGImages')
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(**dataset, ann_file='BCCD/ImageSets/Main/train.txt', pipeline=train_pipeline,
                 filter_cfg=dict(filter_empty_gt=True, min_size=32)))
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, ann_file='BCCD/ImageSets/Main/val.txt', pipeline=test_pipeline, test_mode=True))
val_evaluator = dict(type='CocoMetric', metric='bbox')
# what is reported is of pictures that nothing was chosen on
test_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, ann_file='BCCD/ImageSets/Main/test.txt', pipeline=test_pipeline, test_mode=True))
test_evaluator = val_evaluator
