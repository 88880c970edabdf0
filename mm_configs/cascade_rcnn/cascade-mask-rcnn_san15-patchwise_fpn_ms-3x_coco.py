_base_ = [
    'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco_instance_ms.py',
    '../_base_/schedules/detection_3x.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/san_detector.py',
]
model = _base_.pop('detector')
