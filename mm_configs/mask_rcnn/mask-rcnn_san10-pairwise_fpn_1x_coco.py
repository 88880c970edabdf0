_base_ = './mask-rcnn_san15-patchwise_fpn_1x_coco.py'
model = dict(backbone=dict(
    arch='san10_pairwise', init_cfg=dict(checkpoint='hf-hub:san-backbones/san10_pairwise.in1k')))
