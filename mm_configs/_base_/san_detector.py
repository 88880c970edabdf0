# What detectors share: `model = _base_.pop('detector')` puts SAN in the place of the ResNet-50 of one of MMDetection,
# whose maps have the same channels.
_base_ = './san.py'

detector = dict(
    backbone=dict(
        _base_.pop('backbone'),
        _delete_=True,
        # as the field fine-tunes batch norms on two images a GPU: their statistics and the lowest layers stay
        frozen_stages=1,  # the stem and the stage of stride 2
        norm_eval=True))
