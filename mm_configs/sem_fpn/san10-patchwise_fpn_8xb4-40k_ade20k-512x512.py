_base_ = './san15-patchwise_fpn_8xb4-40k_ade20k-512x512.py'
model = dict(backbone=dict(
    arch='san10_patchwise', init_cfg=dict(checkpoint='hf-hub:san-backbones/san10_patchwise.in1k')))
