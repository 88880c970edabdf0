_base_ = './mask-rcnn_san15-patchwise_fpn_1x_coco.py'
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

# Expected memory: -
model = dict(backbone=dict(arch='san15_pairwise'))
