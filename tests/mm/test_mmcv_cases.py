"""The operators of `mmcv.ops` against what compiled mmcv computed: `record_mmcv_cases.py` says how that was recorded.

Without compiled mmcv this examines the stand-in; with it, mmcv against its own record.
"""
import json

import numpy as np
import pytest
import torch

pytest.importorskip('mmcv')

import san_backbones.mm  # noqa: F401, before mmcv.ops
from tools.record_mmcv_cases import RECORD, outcome

with np.load(RECORD) as record:
    ABOUT = json.loads(str(record['about']))
    ARRAYS = [torch.from_numpy(record[f'arr_{number}']) for number in range(len(record.files) - 1)]


FUNCTIONS = {'batched_nms', 'bbox_overlaps', 'box_iou_rotated', 'deform_conv2d', 'modulated_deform_conv2d', 'nms',
             'nms_match', 'nms_rotated', 'psa_mask.PSAMaskFunction.apply', 'roi_align', 'soft_nms'}
WITH_GRADIENTS = {'deform_conv2d', 'modulated_deform_conv2d', 'psa_mask.PSAMaskFunction.apply', 'roi_align'}


def test_what_is_recorded():
    assert ABOUT['mmcv'] == '2.1.0'
    assert {case['function'] for case in ABOUT['cases']} == FUNCTIONS
    assert {case['function'] for case in ABOUT['cases'] if case['gradients']} == WITH_GRADIENTS


@pytest.mark.parametrize('case', ABOUT['cases'], ids=lambda case: case['name'])
def test_as_compiled_mmcv(case):
    tensors = [ARRAYS[number] for number in case['tensors']]
    seed = None if case['seed'] is None else ARRAYS[case['seed']]
    outputs, gradients = outcome(case['function'], tensors, case['options'], seed)
    for actual, recorded in ((outputs, case['outputs']), (gradients, case['gradients'])):
        assert len(actual) == len(recorded)
        for one, number in zip(actual, recorded):
            assert (one is None) == (number is None)
            if one is not None:  # also compares types and shapes, and integers exactly
                torch.testing.assert_close(one.detach(), ARRAYS[number], equal_nan=True, **tolerance(one))


def tolerance(tensor):
    """Sums of a few dozen float32 terms of size 1, in any order; nothing for indices."""
    return dict(atol=5e-6, rtol=5e-6) if tensor.is_floating_point() else dict(atol=0, rtol=0)
