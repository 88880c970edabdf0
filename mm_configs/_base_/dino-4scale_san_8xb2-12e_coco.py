# DINO's own data, schedule and learning rates, as MMDetection has them
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(pad_size_divisor=32),  # SAN's pooling rounds down
    backbone=dict(
        _delete_=True,
        type='SANBackbone',
        arch='san15_patchwise',
        out_indices=(2, 3, 4),  # strides 8, 16, 32
        # as the field fine-tunes batch norms on two images a GPU: their statistics and the lowest layers stay
        frozen_stages=1,  # the stem and the stage of stride 2
        norm_eval=True,
        norm_cfg=dict(type='BN', requires_grad=True),
        with_cp=False,  # True recomputes blocks in the backward pass, for less memory
        position_ref_size=224),
    neck=dict(in_channels=[512, 1024, 2048]))

# DINO's tenth of the learning rate for the backbone; norm parameters and biases are exempt from weight decay
optim_wrapper = dict(
    constructor='SANLayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        _delete_=True, decay_rate=1.0, backbone_lr_mult=0.1, norm_decay_mult=0., bias_decay_mult=0.,
        flat_decay_mult=0.))  # the last one for biases of other names, in DINO's attention

# data, classes and heads that do not fit are errors that name the file; the layer that makes an
# evaluation not finite is named in the log
custom_hooks = [dict(type='CheckSetupHook'), dict(type='CheckInvalidFeaturesHook')]
