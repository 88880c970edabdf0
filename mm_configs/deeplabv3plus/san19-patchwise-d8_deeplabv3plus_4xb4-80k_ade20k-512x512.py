_base_ = './san15-patchwise-d8_deeplabv3plus_4xb4-80k_ade20k-512x512.py'
model = dict(backbone=dict(
    arch='san19_patchwise', init_cfg=dict(checkpoint='hf-hub:san-backbones/san19_patchwise.in1k')))
