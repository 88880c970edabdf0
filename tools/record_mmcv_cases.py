"""Records results of compiled mmcv on small inputs, for `test_mmcv_cases.py` to compare with.

    python -m tools.record_mmcv_cases                            # with compiled mmcv 2.1.0
    python -m tools.record_mmcv_cases --extension build/_ext.so  # with mmcv-lite: see build_mmcv_operators.py

Either writes `tests/mm/mmcv_cases.npz`: inputs, and mmcv's outputs and gradients (float32, on the CPU), with the
versions of mmcv and torch. It covers each operator of the stand-in that mmcv has for the CPU. Running it again on the
same machine with the same versions gives the same numbers.
"""
import argparse
import importlib.util
import json
import sys
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

RECORD = Path(__file__).parents[1] / 'tests' / 'mm' / 'mmcv_cases.npz'


class Case(NamedTuple):
    """Arguments for `outcome`, and a note on what is special about them."""
    function: str
    tensors: list[torch.Tensor]
    options: list
    note: str = ''
    seed: torch.Tensor | None = None


def outcome(function, tensors, options, seed=None):
    """Calls a function of `mmcv.ops`, and its backward pass if there is a `seed`.

    Args:
        function: its name, with dots for one in a submodule.
        tensors: its first arguments.
        options: its other arguments.
        seed: gradient of its output, which then must be a single tensor; or None.

    Returns:
        Its outputs, and the gradients of `tensors` (None for those without).
    """
    import mmcv.ops
    tensors = [tensor.clone().requires_grad_(seed is not None and tensor.is_floating_point()) for tensor in tensors]
    outputs = attrgetter(function)(mmcv.ops)(*tensors, *options)
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    if seed is None:
        return outputs, []
    return outputs, list(torch.autograd.grad(outputs, tensors, [seed], allow_unused=True))


def load_extension(path):
    """Loads `path` as the module `mmcv._ext`. Operators that it lacks are None: `mmcv.ops` needs their names."""
    spec = importlib.util.spec_from_file_location('mmcv._ext', path)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    extension.__getattr__ = lambda name: None
    sys.modules['mmcv._ext'] = extension


# All inputs are small multiples of a power of 2, and so are the positions computed from them, except in bins of
# regions: so rounding decides neither which pixels are read nor which boxes overlap enough.


def values(*shape, reach=1.0, steps=64):
    """Returns random multiples of `1 / steps` between -reach and reach."""
    reach = round(reach * steps)
    return torch.randint(-reach, reach + 1, shape) / steps


def boxes_and_scores(count=40, size=24, steps=8):
    """Returns boxes that overlap a lot, with distinct scores."""
    corner = values(count, 2, reach=size / 2, steps=steps) + size / 2
    side = values(count, 2, reach=size / 2 - 2, steps=steps) + size / 2
    return torch.cat([corner, corner + side], 1), (torch.randperm(count) + 1) / 64


def box_cases():
    boxes, scores = boxes_and_scores()
    # Corners on few integers: many pairs overlap by exactly 0.2, 0.3, 0.5 ..., where only rounding decides.
    # No equal scores for nms: torch's sort is unstable, so their order depends on the machine.
    crowded = boxes_and_scores(60, 6, steps=1)[0]
    ranked, level = (torch.randperm(60) + 1) / 64, torch.randint(1, 5, (60,)) / 8
    empty = torch.cat([boxes[:6], boxes[:3], boxes[3:6, [0, 1, 0, 3]], boxes[3:6, [0, 1, 0, 3]]])
    for offset in (0, 1):
        for threshold in (0.3, 0.5, 0.7):
            yield Case('nms', [boxes, scores], [threshold, offset])
        for threshold in (0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8):
            yield Case('nms', [crowded, ranked], [threshold, offset], 'overlaps at the threshold')
        yield Case('nms', [boxes, scores], [0.6, offset, 0.25, 8], 'score threshold and limit')
        yield Case('nms', [empty, scores[:15]], [0.4, offset], 'boxes without area')
        for method in ('naive', 'linear', 'gaussian'):
            for threshold, sigma, least in ((0.3, 0.5, 1e-3), (0.6, 0.25, 0.1)):
                yield Case('soft_nms', [boxes, scores], [threshold, sigma, least, method, offset])
            yield Case('soft_nms', [crowded, ranked], [0.4, 0.5, 0.02, method, offset], 'overlaps at the threshold')
            yield Case('soft_nms', [crowded, level], [0.3, 0.5, 0.05, method, offset], 'equal scores')
            yield Case('soft_nms', [boxes, scores], [0.3, 0.5, 0.0, method, offset], 'nothing dropped')
    for threshold in (0.3, 0.5, 0.8):
        yield Case('nms_match', [torch.cat([crowded, ranked[:, None]], 1)], [threshold])
    classes = torch.randint(3, (40,))
    for kind in ('nms', 'soft_nms'):
        yield Case('batched_nms', [boxes, scores, classes], [dict(type=kind, iou_threshold=0.4)])
    yield Case('batched_nms', [boxes, scores, classes], [dict(type='nms', iou_threshold=0.4, split_thr=1, max_num=9)])
    for mode in ('iou', 'iof'):
        for offset in (0, 1):
            yield Case('bbox_overlaps', [boxes[:7], boxes[7:13]], [mode, False, offset])
            yield Case('bbox_overlaps', [boxes[:7], boxes[7:14]], [mode, True, offset])


def rotated_cases():
    boxes = torch.cat([values(30, 2, reach=8), values(30, 2, reach=4) + 6, values(30, 1, reach=4)], 1)
    upright = torch.cat([boxes[:6, :4], torch.tensor([0, 0, 1, 2, 3, 4])[:, None] * torch.pi / 2], 1)
    for mode in ('iou', 'iof'):
        for clockwise in (True, False):
            yield Case('box_iou_rotated', [boxes[:9], boxes[9:16]], [mode, False, clockwise])
            yield Case('box_iou_rotated', [boxes[:15], boxes[15:]], [mode, True, clockwise])
        yield Case('box_iou_rotated', [upright, upright], [mode, False], 'quarter turns, shared borders')
    for threshold in (0.1, 0.4):
        for clockwise in (True, False):
            yield Case('nms_rotated', [boxes, torch.randperm(30) / 32], [threshold, None, clockwise])


def region_cases():
    features = values(2, 2, 5, 7)
    boxes = values(6, 4, reach=4, steps=8)
    boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:].abs() + 1
    boxes[0] = torch.tensor([-3, -2, 9, 3])  # over the border
    boxes[1] = torch.tensor([2.25, 1.5, 2.5, 4])  # narrower than a pixel
    boxes[2] = torch.tensor([20, 20, 24, 28])  # outside
    rois = torch.cat([torch.tensor([[0], [1], [0], [1], [1], [0]]), boxes], 1)
    for mode in ('avg', 'max'):
        for aligned in (True, False):
            for ratio in (0, 1, 2):
                seed = values(6, 2, 2, 3)
                for scale in (1.0, 0.25):
                    scaled = rois * torch.tensor([1] + [1 / scale] * 4)
                    options = [[2, 3], scale, ratio, mode, aligned]
                    yield Case('roi_align', [features, scaled], options, seed=seed)
    lines = torch.tensor([[0., 2, 1, 2, 4], [1, 3, 2, 5, 2]])
    # Bins without samples have no maximum: mmcv writes -10000 on the CPU and another number on CUDA; the stand-in, 0.
    for mode, aligned in (('avg', True), ('avg', False), ('max', False)):
        yield Case('roi_align', [features, lines], [2, 1.0, 0, mode, aligned], 'no area', values(2, 2, 2, 2))
    backwards = torch.tensor([[0., 4, 3, 2, 1], [1, 1, 3, 5, 2]])  # made one pixel wide, where not aligned
    for mode in ('avg', 'max'):
        yield Case('roi_align', [features, backwards], [2, 1.0, 0, mode, False], 'backwards', values(2, 2, 2, 2))


# stride, padding, dilation, groups, deform_groups, kernel
GEOMETRIES = [
    ([1, 1], [1, 1], [1, 1], 1, 1, (3, 3)),
    ([2, 1], [1, 0], [1, 1], 1, 1, (3, 2)),
    ([1, 2], [0, 2], [1, 2], 1, 1, (2, 3)),
    ([1, 1], [2, 1], [2, 1], 2, 1, (3, 2)),
    ([1, 1], [0, 1], [1, 1], 1, 2, (1, 2)),
    ([2, 2], [1, 2], [1, 2], 2, 4, (2, 2)),
    ([1, 1], [1, 0], [1, 1], 4, 2, (3, 1)),
]


def convolution_operands(stride, padding, dilation, groups, deform_groups, kernel, images=2):
    """Returns input, offset, mask, weight, bias and the gradient of the output."""
    size = [(side + 2 * pad - gap * (taps - 1) - 1) // step + 1
            for side, pad, gap, taps, step in zip((4, 5), padding, dilation, kernel, stride)]
    taps = deform_groups * kernel[0] * kernel[1]
    return (values(images, 4, 4, 5), values(images, 2 * taps, *size, reach=2.5, steps=16),
            (values(images, taps, *size) + 1) / 2, values(4, 4 // groups, *kernel), values(4), values(images, 4, *size))


def convolution_cases():
    for stride, padding, dilation, groups, deform_groups, kernel in GEOMETRIES:
        features, offset, mask, weight, bias, seed = convolution_operands(
            stride, padding, dilation, groups, deform_groups, kernel)
        options = [stride, padding, dilation, groups, deform_groups]
        yield Case('deform_conv2d', [features, offset, weight], options, seed=seed)
        yield Case('modulated_deform_conv2d', [features, offset, mask, weight, bias], options, seed=seed)

    plain = ([1, 1], [1, 1], [1, 1], 1, 1)
    features, offset, mask, weight, bias, seed = convolution_operands(*plain, (3, 3))
    yield Case('modulated_deform_conv2d', [features, offset, mask, weight], [None, *plain], 'no bias', seed)
    for still in (torch.zeros_like(offset), offset.round()):  # as in a new network; where bilinear sampling has kinks
        note = 'whole shifts' if still.any() else 'no shifts'
        yield Case('deform_conv2d', [features, still, weight], [*plain], note, seed)
        yield Case('modulated_deform_conv2d', [features, still, mask, weight, bias], [*plain], note, seed)

    portions = ([1, 1], [0, 0], [1, 1], 2, 2)
    features, offset, _, weight, _, seed = convolution_operands(*portions, (2, 2), images=4)
    yield Case('deform_conv2d', [features, offset, weight], [*portions, False, 2], 'two images at a time', seed)

    # DyHead passes shifts and factors of a larger map than the output.
    downwards = ([2, 2], [1, 1], [1, 1], 1, 1)
    features, _, _, weight, bias, seed = convolution_operands(*downwards, (2, 2))
    offset, mask = values(2, 8, 4, 7, reach=2), (values(2, 4, 4, 7) + 1) / 2
    yield Case('modulated_deform_conv2d', [features, offset, mask, weight, bias], [*downwards], 'larger shifts', seed)


def attention_cases():
    for kind, name in enumerate(('collect', 'distribute')):
        for window in ([3, 5], [4, 2]):
            masks, seed = values(2, window[0] * window[1], 3, 4), values(2, 12, 3, 4)
            yield Case('psa_mask.PSAMaskFunction.apply', [masks], [kind, window], name, seed)


def record(extension):
    """Writes `RECORD`. `extension` describes where the operators come from."""
    arrays = []

    def keep(tensor):
        """Stores the array and returns its number; equal arrays are stored once."""
        array = tensor.detach().numpy()
        for number, known in enumerate(arrays):
            if known.dtype == array.dtype and np.array_equal(known, array, equal_nan=array.dtype.kind == 'f'):
                return number
        arrays.append(array)
        return len(arrays) - 1

    torch.manual_seed(0)
    cases = []
    for cases_of in (box_cases, rotated_cases, region_cases, convolution_cases, attention_cases):
        for function, tensors, options, note, seed in cases_of():
            outputs, gradients = outcome(function, tensors, options, seed)
            name = ' '.join([function, *map(str, options), note]).strip()
            cases.append(dict(
                name=name, function=function, options=options, tensors=[keep(tensor) for tensor in tensors],
                seed=None if seed is None else keep(seed), outputs=[keep(tensor) for tensor in outputs],
                gradients=[None if tensor is None else keep(tensor) for tensor in gradients]))
    import mmcv
    about = dict(mmcv=mmcv.__version__, torch=torch.__version__, extension=extension, cases=cases)
    np.savez_compressed(RECORD, *arrays, about=json.dumps(about))
    print(f'{RECORD}: {len(cases)} cases, {len(arrays)} arrays, {RECORD.stat().st_size} bytes')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--extension', metavar='PATH', help="compiled operators; mmcv's own if not given")
    path = parser.parse_args().extension
    if path:
        load_extension(path)
    elif importlib.util.find_spec('mmcv._ext') is None:
        parser.error('mmcv is installed without compiled operators: give --extension')
    record('CPU operators only' if path else 'mmcv as installed')
