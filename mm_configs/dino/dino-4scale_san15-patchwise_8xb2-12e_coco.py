_base_ = [
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    '../_base_/san_detector.py',
]
# data, schedule and learning rates are DINO's own
model = dict(
    _base_.pop('detector'),
    data_preprocessor=dict(pad_size_divisor=32))  # SAN's pooling rounds down
model['backbone']['out_indices'] = (2, 3, 4)  # strides 8, 16, 32

# DINO's tenth of the learning rate for the backbone; norm parameters and biases are exempt from weight decay
optim_wrapper = dict(
    constructor='SANLayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        _delete_=True, decay_rate=1.0, backbone_lr_mult=0.1, norm_decay_mult=0., bias_decay_mult=0.,
        flat_decay_mult=0.))  # the last one for biases of other names, in DINO's attention
