_base_ = './cascade-mask-rcnn_san15-patchwise_fpn_ms-3x_coco.py'
model = dict(backbone=dict(
    arch='san15_pairwise', init_cfg=dict(checkpoint='hf-hub:san-backbones/san15_pairwise.in1k')))
