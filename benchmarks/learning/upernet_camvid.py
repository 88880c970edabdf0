# UPerNet on CamVid at 480x360, from random weights, small enough for minutes on a CPU. benchmarks/learning.py fills in
# the backbone, the data's folder and the budget.
_base_ = ['mmseg::_base_/models/upernet_r50.py', 'mmseg::_base_/default_runtime.py']
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

classes = ('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car', 'pedestrian', 'bicyclist')
void = 11  # neither learned nor judged
crop_size = (192, 192)
channels = 96
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=crop_size, seg_pad_val=void, test_cfg=dict(size_divisor=32)),
    pretrained=None,
    backbone=dict(_delete_=True, type='SANBackbone', arch='san15_patchwise'),
    decode_head=dict(channels=channels, num_classes=len(classes), ignore_index=void, norm_cfg=norm_cfg),
    auxiliary_head=dict(channels=channels, num_classes=len(classes), ignore_index=void, norm_cfg=norm_cfg))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(480, 360), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75, ignore_index=void),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
dataset = dict(type='BaseSegDataset', metainfo=dict(classes=classes), img_suffix='.jpg', seg_map_suffix='.png')
train_dataloader = dict(
    batch_size=8, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(**dataset, data_root='camvid_small', pipeline=train_pipeline,
                 data_prefix=dict(img_path='img_dir/train', seg_map_path='ann_dir/train')))
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, data_root='camvid_small', pipeline=test_pipeline,
                 data_prefix=dict(img_path='img_dir/val', seg_map_path='ann_dir/val')))
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'], ignore_index=void)
# what is reported is of pictures that nothing was chosen on
test_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, data_root='camvid_small', pipeline=test_pipeline,
                 data_prefix=dict(img_path='img_dir/test', seg_map_path='ann_dir/test')))
test_evaluator = val_evaluator
