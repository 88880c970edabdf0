# SAN as in the paper: global average pooling and one linear layer, labels smoothed by 0.1
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SANBackbone',
        arch='san15_patchwise',
        out_indices=(4,),  # the last stage only, stride 32
        position_ref_size=224,
        norm_cfg=dict(type='BN', requires_grad=True),  # 'SyncBN' on several GPUs with few images each
        with_cp=False,
        init_cfg=None),  # these train from scratch
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=2048,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1),
        topk=(1, 5)))
