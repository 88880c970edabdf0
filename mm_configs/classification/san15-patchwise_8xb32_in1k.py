_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    'mmpretrain::_base_/default_runtime.py',
    '../_base_/schedules/imagenet_bs256_100e_cosine.py',
    '../_base_/san.py',
]
# SAN as in the paper, from random weights: global average pooling and one linear layer, labels smoothed by 0.1
model = dict(
    type='ImageClassifier',
    backbone=dict(_base_.pop('backbone'), out_indices=(4,), init_cfg=None),  # the last stage only, stride 32
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=2048,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1),
        topk=(1, 5)))
