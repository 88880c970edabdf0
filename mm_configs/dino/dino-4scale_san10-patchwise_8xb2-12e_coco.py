_base_ = '../_base_/dino-4scale_san_8xb2-12e_coco.py'
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

# Expected memory: - (not measured yet)
model = dict(
    backbone=dict(
        arch='san10_patchwise',
        init_cfg=dict(type='Pretrained', checkpoint='hf-hub:san-backbones/san10_patchwise.in1k')))
