# What segmentors share: `_base_.pop('segmentor')` puts SAN in the place of the ResNet-50 of one of MMSegmentation,
# whose maps have the same channels.
_base_ = './san.py'

segmentor = dict(
    pretrained=None,
    backbone=dict(
        _base_.pop('backbone'),
        _delete_=True,
        output_stride=32,
        norm_cfg=dict(type='SyncBN', requires_grad=True)))
