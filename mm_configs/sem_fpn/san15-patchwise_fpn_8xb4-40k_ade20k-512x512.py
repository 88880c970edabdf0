_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/segmentation_40k.py',
    '../_base_/san_segmentor.py',
]
data_preprocessor = dict(test_cfg=dict(size_divisor=32))  # pictures of any size, small ones too, and with --tta
model = dict(
    _base_.pop('segmentor'),
    data_preprocessor=dict(data_preprocessor, size=(512, 512)),
    decode_head=dict(num_classes=150))
train_dataloader = dict(batch_size=4)  # 8 GPUs x 4
# as Semantic FPN is trained on backbones of this kind: twice the batch, twice the rate, little decay
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
