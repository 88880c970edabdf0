_base_ = './retinanet_san15-patchwise_fpn_1x_coco.py'
model = dict(backbone=dict(
    arch='san19_patchwise', init_cfg=dict(checkpoint='hf-hub:san-backbones/san19_patchwise.in1k')))
