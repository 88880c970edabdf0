_base_ = './san15-patchwise_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(backbone=dict(
    arch='san19_patchwise', init_cfg=dict(checkpoint='hf-hub:san-backbones/san19_patchwise.in1k')))
