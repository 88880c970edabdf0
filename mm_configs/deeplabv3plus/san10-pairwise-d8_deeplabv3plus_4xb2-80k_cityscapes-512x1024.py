_base_ = './san15-patchwise-d8_deeplabv3plus_4xb2-80k_cityscapes-512x1024.py'
model = dict(backbone=dict(
    arch='san10_pairwise', init_cfg=dict(checkpoint='hf-hub:san-backbones/san10_pairwise.in1k')))
