_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    'mmseg::_base_/datasets/cityscapes.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/segmentation_80k.py',
    '../_base_/san_segmentor.py',
]
data_preprocessor = dict(test_cfg=dict(size_divisor=32))  # pictures of any size, small ones too, and with --tta
model = dict(
    _base_.pop('segmentor'),
    data_preprocessor=dict(data_preprocessor, size=(512, 1024)))
train_dataloader = dict(batch_size=2)  # 4 GPUs x 2
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
