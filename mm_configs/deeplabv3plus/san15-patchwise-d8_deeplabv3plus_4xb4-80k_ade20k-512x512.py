_base_ = [
    'mmseg::_base_/models/deeplabv3plus_r50-d8.py',
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/segmentation_80k.py',
    '../_base_/san_segmentor.py',
]
data_preprocessor = dict(test_cfg=dict(size_divisor=32))  # pictures of any size, small ones too, and with --tta
model = dict(
    _base_.pop('segmentor'),
    data_preprocessor=dict(data_preprocessor, size=(512, 512)),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150))
model['backbone']['output_stride'] = 8  # strides 4, 8, 8, 8
train_dataloader = dict(batch_size=4)  # 4 GPUs x 4
