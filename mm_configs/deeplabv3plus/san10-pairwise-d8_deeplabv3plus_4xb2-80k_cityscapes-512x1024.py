_base_ = [
    '../_base_/models/deeplabv3plus_san-d8.py',
    'mmseg::_base_/datasets/cityscapes.py',
    '../_base_/schedules/segmentation_80k.py',
    '../_base_/segmentation_runtime.py',
]
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

# Expected memory: - (not measured yet)
model = dict(
    backbone=dict(
        arch='san10_pairwise',
        init_cfg=dict(type='Pretrained', checkpoint='hf-hub:san-backbones/san10_pairwise.in1k')),
    data_preprocessor=dict(size=(512, 1024)))

train_dataloader = dict(batch_size=2)  # 4 GPUs x 2
