_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    '../_base_/classification_runtime.py',
    '../_base_/models/san_classifier.py',
    '../_base_/schedules/imagenet_bs256_100e_cosine.py',
]
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

# From random weights. Expected memory: - (not measured yet)
model = dict(backbone=dict(arch='san15_patchwise'))
