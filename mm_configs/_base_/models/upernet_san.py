_base_ = 'mmseg::_base_/models/upernet_r50.py'
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

norm_cfg = dict(type='SyncBN', requires_grad=True)
data_preprocessor = dict(test_cfg=dict(size_divisor=32))  # pictures of any size, small ones too, and with --tta
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='SANBackbone',
        arch='san15_patchwise',
        out_indices=(1, 2, 3, 4),  # strides 4, 8, 16, 32
        output_stride=32,
        norm_cfg=norm_cfg,
        with_cp=False,  # True recomputes blocks in the backward pass, for less memory
        position_ref_size=224),
    decode_head=dict(norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg))
