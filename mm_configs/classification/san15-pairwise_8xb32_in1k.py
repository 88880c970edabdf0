_base_ = './san15-patchwise_8xb32_in1k.py'
model = dict(backbone=dict(arch='san15_pairwise'))
