_base_ = [
    'mmseg::_base_/models/upernet_r50.py',
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/segmentation_160k.py',
]
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

crop_size = (512, 512)
norm_cfg = dict(type='SyncBN', requires_grad=True)  # 'BN' to train on one device without torch.distributed
# Expected memory: -
model = dict(
    data_preprocessor=dict(size=crop_size),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='SANBackbone',
        arch='san15_patchwise',
        out_indices=(1, 2, 3, 4),  # strides 4, 8, 16, 32
        position_ref_size=224,
        norm_cfg=norm_cfg,
        with_cp=False,
        # No weights are published yet, so this trains from random weights. With a converted checkpoint:
        # init_cfg=dict(type='Pretrained', checkpoint='san15_patchwise.pth')
        init_cfg=None),
    decode_head=dict(in_channels=[256, 512, 1024, 2048], num_classes=150, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=1024, num_classes=150, norm_cfg=norm_cfg))

train_dataloader = dict(batch_size=2)  # 8 GPUs x 2
