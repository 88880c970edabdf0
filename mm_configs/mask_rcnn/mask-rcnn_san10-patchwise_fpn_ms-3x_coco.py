_base_ = './mask-rcnn_san15-patchwise_fpn_ms-3x_coco.py'
model = dict(backbone=dict(
    arch='san10_patchwise', init_cfg=dict(checkpoint='hf-hub:san-backbones/san10_patchwise.in1k')))
