_base_ = './mask-rcnn_san15-patchwise_fpn_ms-3x_coco.py'
model = dict(backbone=dict(
    arch='san19_pairwise', init_cfg=dict(checkpoint='hf-hub:san-backbones/san19_pairwise.in1k')))
