_base_ = './san15-patchwise_upernet_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

# Expected memory: -
model = dict(backbone=dict(arch='san15_pairwise'))
