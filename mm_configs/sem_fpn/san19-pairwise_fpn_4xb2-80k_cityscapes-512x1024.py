_base_ = './san15-patchwise_fpn_4xb2-80k_cityscapes-512x1024.py'
model = dict(backbone=dict(
    arch='san19_pairwise', init_cfg=dict(checkpoint='hf-hub:san-backbones/san19_pairwise.in1k')))
