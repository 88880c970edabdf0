_base_ = './dino-4scale_san15-patchwise_8xb2-12e_coco.py'
model = dict(backbone=dict(
    arch='san19_patchwise', init_cfg=dict(checkpoint='hf-hub:san-backbones/san19_patchwise.in1k')))
