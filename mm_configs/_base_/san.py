# What all configs share. `_base_.pop('backbone')` puts the backbone into a model; it is no key of the whole config.
custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)

# data, classes and heads that do not fit are errors that name the file; the layer that makes an
# evaluation not finite is named in the log
custom_hooks = [dict(type='CheckSetupHook'), dict(type='CheckInvalidFeaturesHook')]

backbone = dict(
    type='SANBackbone',
    arch='san15_patchwise',
    out_indices=(1, 2, 3, 4),  # strides 4, 8, 16, 32
    norm_cfg=dict(type='BN', requires_grad=True),
    with_cp=False,  # True recomputes blocks in the backward pass, for less memory
    position_ref_size=224,
    init_cfg=dict(type='Pretrained', checkpoint='hf-hub:san-backbones/san15_patchwise.in1k'))
