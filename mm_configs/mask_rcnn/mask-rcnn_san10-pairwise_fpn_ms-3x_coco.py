_base_ = [
    '../_base_/models/mask-rcnn_san_fpn.py',
    '../_base_/datasets/coco_instance_ms.py',
    '../_base_/schedules/detection_3x.py',
    '../_base_/detection_runtime.py',
]
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

# Expected memory: - (not measured yet)
model = dict(
    backbone=dict(
        arch='san10_pairwise',
        init_cfg=dict(type='Pretrained', checkpoint='hf-hub:san-backbones/san10_pairwise.in1k')))
