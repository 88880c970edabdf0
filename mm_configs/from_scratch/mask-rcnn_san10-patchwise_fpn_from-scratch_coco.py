# A Mask R-CNN from random weights on masks of yours, in COCO's format: copy this file and change the data.
_base_ = '../mask_rcnn/mask-rcnn_san15-patchwise_fpn_1x_coco.py'

# --- data: folder and class names, spelled and ordered as in the files' `categories`; one class is ('disc',)
data_root = 'my_data/'
metainfo = dict(classes=('disc', 'box'))
size = (640, 640)  # longer and shorter side at most

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(batch_size=4, dataset=dict(
    data_root=data_root, metainfo=metainfo, pipeline=train_pipeline,
    ann_file='annotations/instances_train.json', data_prefix=dict(img='train/')))
val_dataloader = dict(dataset=dict(
    data_root=data_root, metainfo=metainfo, pipeline=test_pipeline,
    ann_file='annotations/instances_val.json', data_prefix=dict(img='val/')))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

# --- model: nothing is frozen, and norms also in the pyramid and the mask head, without which it learns slowly
model = dict(
    backbone=dict(arch='san10_patchwise', init_cfg=None, frozen_stages=-1, norm_eval=False),
    neck=dict(norm_cfg=dict(type='BN')),
    roi_head=dict(
        bbox_head=dict(num_classes=len(metainfo['classes'])),
        mask_head=dict(num_classes=len(metainfo['classes']), norm_cfg=dict(type='BN'))))

# --- schedule: few pictures are shown often; the norm of the gradient is bounded
max_epochs = 100
train_cfg = dict(max_epochs=max_epochs, val_interval=10)
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=1.))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True, begin=0, end=max_epochs,
         T_max=max_epochs, eta_min=1e-6),
]
auto_scale_lr = dict(enable=False, base_batch_size=4)
