_base_ = [
    '../_base_/models/deeplabv3plus_san-d8.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/schedules/segmentation_80k.py',
    '../_base_/segmentation_runtime.py',
]
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

# Expected memory: - (not measured yet)
model = dict(
    backbone=dict(
        arch='san15_pairwise',
        init_cfg=dict(type='Pretrained', checkpoint='hf-hub:san-backbones/san15_pairwise.in1k')),
    data_preprocessor=dict(size=(512, 512)),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150))

train_dataloader = dict(batch_size=4)  # 4 GPUs x 4
