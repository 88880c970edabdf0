_base_ = './san15-patchwise_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(backbone=dict(
    arch='san15_pairwise', init_cfg=dict(checkpoint='hf-hub:san-backbones/san15_pairwise.in1k')))
