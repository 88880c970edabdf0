_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='SANBackbone',
        arch='san15_patchwise',
        out_indices=(1, 2, 3, 4),  # strides 4, 8, 16, 32
        # as the field fine-tunes batch norms on two images a GPU: their statistics and the lowest layers stay
        frozen_stages=1,  # the stem and the stage of stride 2
        norm_eval=True,
        norm_cfg=dict(type='BN', requires_grad=True),
        with_cp=False,  # True recomputes blocks in the backward pass, for less memory
        position_ref_size=224),
    neck=dict(in_channels=[256, 512, 1024, 2048]))
