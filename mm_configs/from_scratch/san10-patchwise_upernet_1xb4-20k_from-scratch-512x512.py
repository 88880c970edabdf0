# An UPerNet from random weights on masks of yours, one PNG of class numbers a picture: copy this and change the data.
_base_ = '../upernet/san15-patchwise_upernet_8xb2-160k_ade20k-512x512.py'

# --- data: folder, suffixes, class names in the order of their numbers in the masks, and a colour for each
classes = ('ground', 'water')
data = dict(
    _delete_=True, type='BaseSegDataset', data_root='my_masks/', img_suffix='.jpg', seg_map_suffix='.png',
    metainfo=dict(classes=classes, palette=[[120, 160, 80], [40, 90, 200]]))
crop = (512, 512)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(batch_size=4, dataset=dict(
    **data, pipeline=train_pipeline, data_prefix=dict(img_path='images/train', seg_map_path='masks/train')))
val_dataloader = dict(dataset=dict(
    **data, pipeline=test_pipeline, data_prefix=dict(img_path='images/val', seg_map_path='masks/val')))
test_dataloader = val_dataloader

# --- model
norm = dict(type='BN', requires_grad=True)  # on several GPUs 'SyncBN'
model = dict(
    backbone=dict(arch='san10_patchwise', init_cfg=None, norm_cfg=norm),
    decode_head=dict(num_classes=len(classes), norm_cfg=norm),
    auxiliary_head=dict(num_classes=len(classes), norm_cfg=norm))

# --- schedule: the norm of the gradient is bounded
max_iters = 20000
train_cfg = dict(max_iters=max_iters, val_interval=1000)
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=1.))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=500),
    dict(type='PolyLR', power=1.0, eta_min=0., by_epoch=False, begin=500, end=max_iters),
]
default_hooks = dict(checkpoint=dict(interval=1000, max_keep_ckpts=2))
