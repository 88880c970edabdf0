_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/detection_1x.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/san_detector.py',
]
model = _base_.pop('detector')
