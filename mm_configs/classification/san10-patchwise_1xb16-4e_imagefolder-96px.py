# Your own pictures: a folder for each class under train/ and under val/ of the folder that the variable DATA names.
# Small pictures and four epochs: 1000 pictures take 6 minutes of one CPU core.
_base_ = './san10-patchwise_8xb32_in1k.py'

data_root = '{{$DATA:data/imagenette}}'
num_classes = 10
image_size = 96

model = dict(head=dict(num_classes=num_classes, topk=(1,)))
data_preprocessor = dict(num_classes=num_classes)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=image_size, crop_ratio_range=(0.35, 1.)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=image_size * 256 // 224, edge='short'),
    dict(type='CenterCrop', crop_size=image_size),
    dict(type='PackInputs'),
]
dataset = dict(_delete_=True, type='CustomDataset', data_root=data_root)
train_dataloader = dict(batch_size=16, num_workers=1,
                        dataset=dict(**dataset, data_prefix='train', pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(**dataset, data_prefix='val', pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=4)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.))  # from random weights gradients are steep where the learning rate peaks
param_scheduler = [
    dict(type='LinearLR', start_factor=0.04, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=3, by_epoch=True, begin=1, end=4, convert_to_iter_based=True)]
randomness = dict(seed=0)
