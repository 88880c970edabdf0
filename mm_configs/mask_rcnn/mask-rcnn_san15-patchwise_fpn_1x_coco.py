_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/schedules/detection_1x.py',
]
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

# Expected memory: -
model = dict(
    backbone=dict(
        _delete_=True,
        type='SANBackbone',
        arch='san15_patchwise',
        out_indices=(1, 2, 3, 4),  # strides 4, 8, 16, 32
        position_ref_size=224,
        frozen_stages=-1,
        norm_eval=False,
        norm_cfg=dict(type='BN', requires_grad=True),  # 'SyncBN' on several GPUs
        with_cp=False,
        # No weights are published yet, so this trains from random weights. With a converted checkpoint:
        # init_cfg=dict(type='Pretrained', checkpoint='san15_patchwise.pth'), frozen_stages=1, norm_eval=True
        init_cfg=None),
    neck=dict(in_channels=[256, 512, 1024, 2048]))
