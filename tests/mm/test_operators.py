"""The operators behind `mmcv.ops`: where they come from, and that each is what its definition says."""
import importlib
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('mmcv')

from san_backbones.mm import mmcv_ops

if mmcv_ops.operators_in_use() != 'torchvision':
    pytest.skip('mmcv brings its compiled operators', allow_module_level=True)

import mmcv.ops as ops

from mmcv.ops.multi_scale_deform_attn import (
    MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch)
from mmcv.ops.sync_bn import SyncBatchNormFunction

from tests import ROOT, environment
from tests.mm import operator_oracles as oracles

OPERATORS = ROOT / 'san_backbones/mm/mmcv_ops'


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand(*shape, grad=False, low=-1.0, high=1.0):
    """Uniform float64 values."""
    return (torch.rand(*shape, dtype=torch.double) * (high - low) + low).requires_grad_(grad)


def boxes_and_scores(count=40, size=30):
    """Boxes that overlap a lot, no two scores alike."""
    corner = rand(count, 2, low=0, high=size)
    boxes = torch.cat([corner, corner + rand(count, 2, low=4, high=size)], 1)
    return boxes, torch.randperm(count).double() / count + 0.01


def regions(features, scale, count=5):
    """Regions (K, 5) that also reach over the border, one of them upside down."""
    images, _, height, width = features.shape
    size = torch.tensor([width, height, width, height]) / scale
    corner = rand(count, 2, low=-0.2, high=0.7)
    box = torch.cat([corner, corner + rand(count, 2, low=0.1, high=0.8)], 1) * size
    box[-1, [1, 3]] = box[-1, [3, 1]]
    return torch.cat([torch.randint(images, (count, 1)).double(), box], 1)


def assert_close(actual, expected, tolerance=1e-9):
    expected = expected if isinstance(expected, torch.Tensor) else torch.tensor(np.array(expected))
    torch.testing.assert_close(actual.detach().to(expected.dtype), expected, atol=tolerance, rtol=tolerance)


def run(code, *path):
    """Runs code in a fresh interpreter, which finds modules in these folders, and returns what it printed."""
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True,
                          env=environment(PYTHONPATH=os.pathsep.join(map(str, path))))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Where the operators come from


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """A folder with a copy of `mmcv_ops`, which needs nothing else of this package."""
    folder = tmp_path_factory.mktemp('alone')
    shutil.copytree(OPERATORS, folder / 'mmcv_ops', ignore=shutil.ignore_patterns('__pycache__'))
    return folder


def test_importing_everything_in_a_fresh_process(alone):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    assert run('''
        import sys, mmcv_ops
        assert mmcv_ops.operators_in_use() == 'none'
        mmcv_ops.install()
        from mmengine.utils.dl_utils import mmcv_full_available
        assert mmcv_full_available()
        assert 'mmcv._ext' not in sys.modules
        import mmcv.ops, mmdet.apis, mmdet.models, mmseg.apis, mmseg.models
        import mmcv._ext
        assert mmcv._ext.__spec__.name == 'mmcv._ext' and mmcv._ext.__name__ == 'mmcv._ext'
        assert not any(name.startswith('san_backbones') for name in sys.modules)
        print(mmcv_ops.operators_in_use())
    ''', alone).endswith('torchvision')  # OneDL has words of its own before that


def test_installing_imports_neither_mmcv_nor_the_operators(alone):
    assert run('''
        import sys, mmcv_ops
        mmcv_ops.install()
        print([name for name in ('torch', 'torchvision', 'mmcv') if name in sys.modules])
    ''', alone) == '[]'


def test_a_compiled_extension_wins(alone, tmp_path):
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').touch()
    (package / '_ext.py').write_text('name = "compiled"')
    assert run('''
        import mmcv_ops
        mmcv_ops.install()
        import mmcv._ext
        print(mmcv._ext.name, mmcv_ops.operators_in_use())
        mmcv_ops.uninstall()
        import mmcv._ext
        print(mmcv._ext.name)
    ''', alone, tmp_path) == 'compiled compiled\ncompiled'


def test_without_mmcv(alone):
    assert run('''
        import sys
        sys.path[:] = [path for path in sys.path if not path.endswith('site-packages')]
        import mmcv_ops
        mmcv_ops.install()
        try:
            import mmcv._ext
        except ModuleNotFoundError as error:
            print(error.name, mmcv_ops.operators_in_use())
    ''', alone) == 'mmcv none'


def test_installing_twice_changes_nothing():
    before = list(sys.meta_path)
    mmcv_ops.install()
    assert sys.meta_path == before
    assert sum(isinstance(finder, mmcv_ops.StandInFinder) for finder in sys.meta_path) == 1


def test_an_operator_that_is_not_provided_says_so_when_called():
    with pytest.raises(NotImplementedError, match="'active_rotated_filter_forward'.*mim install"):
        ops.active_rotated_filter(rand(1, 1, 1, 3, 3).float(), torch.ones(1, 3, 3, 1).int())
    extension = importlib.import_module('mmcv._ext')
    assert not hasattr(extension, '__path__')
    assert 'not compiled' in ops.get_compiler_version()
    assert 'not compiled' in ops.get_compiling_cuda_version()


# Boxes


@pytest.mark.parametrize('offset', [0, 1])
def test_nms(offset):
    boxes, scores = boxes_and_scores()
    expected = oracles.nms(boxes.tolist(), scores.tolist(), 0.4, offset)
    assert 5 < len(expected) < 35
    detections, kept = ops.nms(boxes.float(), scores.float(), 0.4, offset)
    assert kept.tolist() == expected
    assert_close(detections, torch.cat([boxes, scores[:, None]], 1)[expected], 1e-6)


def test_nms_offset_decides():
    boxes = torch.tensor([[0., 0, 1, 1], [1., 0, 2, 1]])  # side by side, or sharing a column of pixels
    scores = torch.tensor([.9, .8])
    assert len(ops.nms(boxes, scores, 0.3, offset=0)[1]) == 2
    assert len(ops.nms(boxes, scores, 0.3, offset=1)[1]) == 1


def test_nms_takes_arrays_and_thresholds():
    boxes, scores = boxes_and_scores()
    detections, kept = ops.nms(boxes.float().numpy(), scores.float().numpy(), 0.4, score_threshold=0.5, max_num=3)
    confident = [i for i in range(len(scores)) if scores[i] > 0.5]
    expected = oracles.nms(boxes[confident].tolist(), scores[confident].tolist(), 0.4)[:3]
    assert kept.tolist() == [confident[i] for i in expected]
    assert detections.shape == (3, 5)


@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16])
@pytest.mark.parametrize('kind', ['nms', 'soft_nms'])
def test_nms_in_reduced_precision(kind, dtype):
    boxes, scores = boxes_and_scores()
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    detections, kept = getattr(ops, kind)(boxes, scores, 0.4)
    assert detections.dtype == dtype
    assert kept.tolist() == getattr(ops, kind)(boxes.float(), scores.float(), 0.4)[1].tolist()


def test_nms_of_classes():
    boxes, scores = boxes_and_scores()
    classes = torch.randint(3, scores.shape)
    expected = {c: oracles.nms(boxes[classes == c].tolist(), scores[classes == c].tolist(), 0.4) for c in range(3)}
    expected = [(classes == c).nonzero()[i].item() for c in range(3) for i in expected[c]]
    for extra in ({}, {'split_thr': 1}):
        detections, kept = ops.batched_nms(boxes, scores, classes, dict(type='nms', iou_threshold=0.4, **extra))
        assert sorted(kept.tolist()) == sorted(expected)
        assert (detections[:-1, 4] >= detections[1:, 4]).all()


@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('offset', [0, 1])
def test_soft_nms(method, offset):
    boxes, scores = boxes_and_scores()
    order, final = oracles.soft_nms(boxes.tolist(), scores.tolist(), 0.3, 0.5, 0.1, method, offset)
    assert 5 < len(order) < 38
    detections, kept = ops.soft_nms(boxes, scores, 0.3, 0.5, 0.1, method, offset)
    assert kept.tolist() == order
    assert_close(detections[:, :4], boxes[order])
    assert_close(detections[:, 4], final)


@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms_of_empty_boxes(method):
    """Boxes without area have no IoU with each other, and keep their scores."""
    boxes = torch.tensor([[2., 2, 2, 2], [2, 2, 2, 2], [0, 1, 6, 1], [0, 1, 6, 3]])
    scores = torch.tensor([0.8, 0.6, 0.7, 0.0005])
    detections, kept = ops.soft_nms(boxes, scores, 0.3, method=method)
    assert kept.tolist() == [0, 2, 1]
    assert_close(detections[:, 4], scores[kept])


def test_nms_match():
    boxes, scores = boxes_and_scores()
    expected = oracles.nms_match(boxes.tolist(), scores.tolist(), 0.4)
    assert [group.tolist() for group in ops.nms_match(torch.cat([boxes, scores[:, None]], 1), 0.4)] == expected


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('mode', ['iou', 'iof'])
def test_bbox_overlaps(mode, offset):
    boxes, others = boxes_and_scores(6)[0], boxes_and_scores(5)[0]
    expected = [[oracles.iou(a, b, offset, mode) for b in others.tolist()] for a in boxes.tolist()]
    assert_close(ops.bbox_overlaps(boxes, others, mode, offset=offset), expected)
    assert_close(ops.bbox_overlaps(boxes[:5], others, mode, aligned=True, offset=offset), np.diag(expected))


def rotated_boxes(count):
    centre, size, angle = rand(count, 2, low=0, high=20), rand(count, 2, low=3, high=15), rand(count, 1, low=-4, high=4)
    return torch.cat([centre, size, angle], 1)


def test_rotated_overlaps():
    boxes, others = rotated_boxes(12), rotated_boxes(9)
    expected = np.array([[oracles.rotated_iou(a, b) for b in others.numpy()] for a in boxes.numpy()])
    assert (expected > 0.1).sum() > 20 and (expected == 0).any()
    assert_close(ops.box_iou_rotated(boxes, others), expected)
    assert_close(ops.box_iou_rotated(boxes[:9], others, aligned=True), np.diag(expected))
    mirrored = [tensor * torch.tensor([1, 1, 1, 1, -1]) for tensor in (boxes, others)]
    assert_close(ops.box_iou_rotated(*mirrored, clockwise=False), expected)
    assert ops.box_iou_rotated(boxes[:0], others).shape == (0, 9)


def test_rotated_overlaps_where_borders_coincide():
    boxes = rotated_boxes(50).float()
    turned = boxes[:, [0, 1, 3, 2, 4]] + torch.tensor([0, 0, 0, 0, np.pi / 2])
    halved = boxes * torch.tensor([1, 1, 0.5, 1, 1])
    for others, expected in ((boxes, 1.0), (turned, 1.0), (halved, 0.5)):
        assert_close(ops.box_iou_rotated(boxes, others.float(), aligned=True), torch.full((50,), expected), 1e-5)


def test_rotated_nms():
    boxes, scores, labels = rotated_boxes(30), torch.randperm(30).double(), torch.randint(2, (30,))
    kept_of = {}
    for given in (None, labels):
        kept = []
        for i in scores.argsort(descending=True).tolist():
            rivals = [j for j in kept if given is None or labels[i] == labels[j]]
            if all(oracles.rotated_iou(boxes[i].numpy(), boxes[j].numpy()) <= 0.2 for j in rivals):
                kept.append(i)
        kept_of[given is None] = kept
        assert ops.nms_rotated(boxes, scores, 0.2, given)[1].tolist() == kept
    assert len(kept_of[True]) < len(kept_of[False]) < 30


def test_no_boxes():
    none, scores = torch.empty(0, 4), torch.empty(0)
    for function in (ops.nms, ops.soft_nms):
        detections, kept = function(none, scores, 0.5)
        assert detections.shape == (0, 5) and kept.shape == (0,) and kept.dtype == torch.long
    assert ops.nms_match(torch.empty(0, 5), 0.5) == []
    assert ops.bbox_overlaps(none, torch.ones(3, 4)).shape == (0, 3)


# Regions

ROI_ALIGN = [(mode, aligned, ratio) for mode in ('avg', 'max') for aligned in (True, False) for ratio in (0, 2)]


@pytest.mark.parametrize('mode, aligned, ratio', ROI_ALIGN)
def test_roi_align(mode, aligned, ratio):
    features = rand(2, 2, 7, 9, grad=True)
    rois = regions(features, 0.5)
    output = ops.roi_align(features, rois, (2, 3), 0.5, ratio, mode, aligned)
    expected = oracles.roi_align(features.detach().numpy(), rois.numpy(), (2, 3), 0.5, ratio, mode, aligned)
    assert_close(output, expected)
    assert torch.autograd.gradcheck(lambda x: ops.roi_align(x, rois, (2, 3), 0.5, ratio, mode, aligned), features)


def test_roi_pool():
    features = rand(2, 2, 7, 9, grad=True)
    rois = regions(features, 0.5, 8)
    rois[0, 1:] += 100
    output = ops.roi_pool(features, rois, (2, 3), 0.5)
    expected, wins = oracles.roi_pool(features.detach().numpy(), rois.numpy(), (2, 3), 0.5)
    assert (expected == 0).any() and (expected != 0).any()
    assert_close(output, expected)
    output.sum().backward()
    assert_close(features.grad, wins)


@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('shifted', [True, False])
def test_deform_roi_pool(shifted, ratio):
    features = rand(2, 2, 7, 9, grad=True)
    rois = regions(features, 0.5, 4)
    shifts = rand(4, 2, 2, 3, grad=True) if shifted else None
    pool = ops.DeformRoIPool((2, 3), 0.5, ratio, gamma=0.5)
    expected = oracles.roi_align(features.detach().numpy(), rois.numpy(), (2, 3), 0.5, ratio, 'avg', True,
                                 shifts.detach().numpy() if shifted else None, gamma=0.5)
    assert_close(pool(features, rois, shifts), expected)
    inputs = (features, shifts) if shifted else (features, )
    assert torch.autograd.gradcheck(lambda features, shifts=None: pool(features, rois, shifts), inputs)


def test_regions_come_in_portions(monkeypatch):
    features = rand(2, 2, 7, 9, grad=True)
    rois = regions(features, 0.5, 9)

    def outcome():
        output = ops.roi_align(features, rois, 2, 0.5, 2, 'max', True)
        return output, torch.autograd.grad(output.sum(), features)[0]

    expected = outcome()
    monkeypatch.setattr(mmcv_ops.regions, 'SAMPLES_AT_ONCE', 64)
    for actual, wanted in zip(outcome(), expected):
        assert_close(actual, wanted.detach())


@pytest.mark.parametrize('pool', [
    ops.RoIAlign(2, 0.5, 0, 'avg'), ops.RoIAlign(2, 0.5, 0, 'max'), ops.RoIPool(2, 0.5), ops.DeformRoIPool(2, 0.5)])
def test_no_regions(pool):
    features = torch.rand(1, 3, 5, 5, requires_grad=True)
    output = pool(features, torch.empty(0, 5))
    assert output.shape == (0, 3, 2, 2)
    output.sum().backward()
    assert not features.grad.any()


@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16])
@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_in_reduced_precision(mode, dtype):
    features = rand(1, 3, 40, 40).to(dtype).requires_grad_()
    rois = torch.tensor([[0, 3.5, 2.25, 35.5, 38], [0, 0, 0, 10, 12]], dtype=dtype)
    wide = features.detach().float().requires_grad_()
    results = []
    for x, boxes in ((features, rois), (wide, rois.float())):
        output = ops.roi_align(x, boxes, 4, 1.0, 0, mode, True)
        output.float().square().sum().backward()
        results.append(output)
    assert results[0].dtype == dtype
    assert_close(results[0], results[1].detach(), 1e-2)
    assert_close(features.grad, wide.grad, 3e-2)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('pool', [ops.RoIAlign(2), ops.RoIAlign(2, sampling_ratio=2, aligned=False),
                                  ops.RoIAlign(2, pool_mode='max'), ops.RoIPool(2), ops.DeformRoIPool(2)])
def test_regions_that_are_not_numbers_pool_nothing(pool, value):
    features = torch.rand(2, 2, 5, 5, requires_grad=True)
    sound = [1, 0, 0, 4, 4.]
    rois = torch.tensor([[1, value, 0, 4, 4], sound, [1, 0, 0, 4, value]])
    output = pool(features, rois)
    output.sum().backward()
    assert not output[[0, 2]].any()
    gradient, features.grad = features.grad, None
    pool(features, torch.tensor([sound])).sum().backward()
    assert_close(gradient, features.grad, 1e-6)


def test_shifts_that_are_not_numbers_read_nothing():
    features, offset, _, weight, _ = deform_conv_operands(**GEOMETRIES[0])
    results = []
    for value in (float('nan'), float('inf'), 1e30, 100.0):
        shifted = offset.detach().clone()
        shifted[:, 4:8, 2:4] = value
        shifted.requires_grad_()
        output = ops.deform_conv2d(features, shifted, weight, 1, 1)
        results.append((output, *torch.autograd.grad(output.sum(), (features, weight, shifted))))
    for result in results:
        for actual, expected in zip(result, results[-1]):
            assert_close(actual, expected.detach())
    features, rois = torch.rand(1, 2, 5, 5), torch.tensor([[0, 0, 0, 4, 4.]])
    assert not ops.DeformRoIPool(2)(features, rois, torch.full((1, 2, 2, 2), float('nan'))).any()


# Convolutions

GEOMETRIES = [
    dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, deform_groups=1),
    dict(stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=2, deform_groups=1),
    dict(stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=1, deform_groups=2),
    dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=2, deform_groups=4),
]


def deform_conv_operands(stride, padding, dilation, groups, deform_groups, images=2):
    features = rand(images, 4, 5, 6, grad=True)
    weight = rand(2, 4 // groups, 3, 2, grad=True)
    size = [(side + 2 * pad - step * (kernel - 1) - 1) // jump + 1
            for side, kernel, jump, pad, step in zip((5, 6), (3, 2), stride, padding, dilation)]
    offset = rand(images, deform_groups * 12, *size, grad=True, low=-2, high=2)
    mask = rand(images, deform_groups * 6, *size, grad=True, low=0)
    return features, offset, mask, weight, rand(2, grad=True)


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_deform_conv(geometry):
    features, offset, mask, weight, _ = deform_conv_operands(**geometry)
    arrays = [tensor.detach().numpy() for tensor in (features, weight, offset, torch.ones_like(mask))]
    conv = lambda *operands: ops.deform_conv2d(*operands, *geometry.values(), False, 1)  # noqa: E731
    assert_close(conv(features, offset, weight), oracles.deform_conv(*arrays, np.zeros(2), **geometry))
    assert torch.autograd.gradcheck(conv, (features, offset, weight), fast_mode=True)


@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_modulated_deform_conv(geometry, with_bias):
    features, offset, mask, weight, bias = deform_conv_operands(**geometry)
    operands = (features, offset, mask, weight, bias)
    arrays = [tensor.detach().numpy() for tensor in (features, weight, offset, mask)]
    if not with_bias:
        operands, bias = operands[:4], torch.zeros(2)
    conv = lambda *given: ops.modulated_deform_conv2d(  # noqa: E731
        *given, *([] if with_bias else [None]), *geometry.values())
    assert_close(conv(*operands), oracles.deform_conv(*arrays, bias.detach().numpy(), **geometry))
    assert torch.autograd.gradcheck(conv, operands, fast_mode=True)


def test_modulated_deform_conv_with_offsets_of_a_larger_map():
    """As DyHead calls it: what counts are the first values of each image."""
    features, offset, mask, weight, _ = deform_conv_operands(**GEOMETRIES[0])
    larger = rand(2, 12, 7, 9, grad=True), rand(2, 6, 7, 9, low=0, grad=True)
    shapes = offset.shape, mask.shape
    parts = [t.detach().flatten(1)[:, :s[1:].numel()].reshape(s).requires_grad_() for t, s in zip(larger, shapes)]
    output = ops.modulated_deform_conv2d(features, *larger, weight, None, 1, 1)
    expected = ops.modulated_deform_conv2d(features, *parts, weight, None, 1, 1)
    assert_close(output, expected.detach())
    seed = torch.rand_like(output)
    for grad, part in zip(torch.autograd.grad(output, larger, seed), torch.autograd.grad(expected, parts, seed)):
        assert_close(grad.flatten(1)[:, :part[0].numel()], part.flatten(1))
        assert not grad.flatten(1)[:, part[0].numel():].any()
    with pytest.raises(RuntimeError, match='offset'):
        ops.modulated_deform_conv2d(features, offset[..., 1:], mask[..., 1:], weight, None, 1, 1)


@pytest.mark.parametrize('wanted', ['input', 'weight'])
def test_deform_conv_gradients_asked_for_alone(wanted):
    features, offset, _, weight, _ = deform_conv_operands(**GEOMETRIES[0])
    operands = {'input': features, 'weight': weight}
    together = torch.autograd.grad(
        ops.deform_conv2d(features, offset, weight, 1, 1).sum(), list(operands.values()))
    alone, = torch.autograd.grad(ops.deform_conv2d(features, offset, weight, 1, 1).sum(), operands[wanted])
    assert_close(alone, together[list(operands).index(wanted)])


@pytest.mark.parametrize('kind', ['DCN', 'DCNv2'])
def test_deform_conv_layers(kind):
    from mmcv.cnn import build_conv_layer
    layer = build_conv_layer(dict(type=kind, deform_groups=2), 4, 6, kernel_size=3, padding=1)
    for size in ((1, 1), (5, 7)):  # smaller than the kernel, too
        features = torch.rand(2, 4, *size, requires_grad=True)
        layer(features).sum().backward()
        assert features.grad.abs().sum() > 0
    # The layers start without shifts, and DCNv2 with half of every tap.
    plain = F.conv2d(features, layer.weight, padding=1) * (0.5 if kind == 'DCNv2' else 1)
    assert_close(layer(features), (plain + (0 if layer.__dict__.get('bias') is None else layer.bias)).detach(), 1e-5)


def test_deform_conv_under_autocast():
    features, offset, mask, weight, bias = (t.detach().float() for t in deform_conv_operands(**GEOMETRIES[0]))
    expected = ops.modulated_deform_conv2d(features, offset, mask, weight, bias, 1, 1)
    with torch.autocast('cpu', torch.bfloat16):
        output = ops.modulated_deform_conv2d(features, offset.bfloat16(), mask, weight, bias, 1, 1)
    assert output.dtype == torch.bfloat16
    assert_close(output, expected, 0.1)


def test_masked_conv():
    features, weight, bias = rand(1, 3, 6, 7), rand(4, 3, 3, 3), rand(4)
    mask = torch.rand(1, 6, 7) > 0.6
    output = ops.masked_conv2d(features, mask, weight, bias, 1)
    assert_close(output, F.conv2d(features, weight, bias, padding=1) * mask)
    assert not ops.masked_conv2d(features, mask & False, weight, bias, 1).any()


@pytest.mark.parametrize('kernel, groups, scale', [(3, 1, 2), (5, 2, 2), (1, 4, 3)])
def test_carafe(kernel, groups, scale):
    features = rand(2, 4, 3, 4, grad=True)
    masks = rand(2, groups * kernel**2, 3 * scale, 4 * scale, grad=True)
    expected = oracles.carafe(features.detach().numpy(), masks.detach().numpy(), kernel, groups, scale)
    assert_close(ops.carafe(features, masks, kernel, groups, scale), expected)
    assert_close(ops.carafe_naive(features, masks, kernel, groups, scale), expected)
    carafe = lambda *operands: ops.carafe(*operands, kernel, groups, scale)  # noqa: E731
    assert torch.autograd.gradcheck(carafe, (features, masks), fast_mode=True)


def test_carafe_layer_under_autocast():
    layer = ops.CARAFEPack(8, 2)
    features = torch.rand(1, 8, 4, 4, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        layer(features).float().sum().backward()
    assert features.grad.abs().sum() > 0


# Attention


def attention_operands(queries=5):
    shapes = torch.tensor([[3, 4], [2, 2], [1, 3]])
    pixels = shapes.prod(1)
    value = rand(2, int(pixels.sum()), 2, 3, grad=True)
    locations = rand(2, queries, 2, 3, 4, 2, low=-0.2, high=1.2, grad=True)
    weights = rand(2, queries, 2, 3, 4, grad=True)
    return value, shapes, pixels.cumsum(0) - pixels, locations, weights


def test_multi_scale_deformable_attention():
    value, shapes, starts, locations, weights = operands = attention_operands()
    output = MultiScaleDeformableAttnFunction.apply(*operands, 64)
    arrays = [tensor.detach().numpy() for tensor in (value, shapes, locations, weights)]
    assert_close(output, oracles.attention(*arrays))
    plain = multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    assert_close(output, plain.detach())
    seed = torch.rand_like(output)
    for actual, expected in zip(*(torch.autograd.grad(out, (value, locations, weights), seed)
                                  for out in (output, plain))):
        assert_close(actual, expected)


def test_multi_scale_deformable_attention_of_no_queries():
    operands = attention_operands(queries=0)
    output = MultiScaleDeformableAttnFunction.apply(*operands, 64)
    assert output.shape == (2, 0, 6)
    output.sum().backward()


@pytest.mark.parametrize('kind', ['collect', 'distribute'])
@pytest.mark.parametrize('size', [(3, 5), (7, 9), (4, 2)])
def test_psa_mask(kind, size):
    masks = rand(2, size[0] * size[1], 3, 4, grad=True)
    layer = ops.PSAMask(kind, size)
    assert_close(layer(masks), oracles.psa_mask(masks.detach().numpy(), kind, size))
    assert torch.autograd.gradcheck(layer, masks, fast_mode=True)


# Losses and normalisation


@pytest.mark.parametrize('gamma, weighted', [(2.0, False), (2.0, True), (0.0, False), (0.5, True)])
def test_sigmoid_focal_loss(gamma, weighted):
    logits, target = rand(6, 4, low=-4, high=4, grad=True), torch.tensor([0, 1, 2, 3, 4, 1])
    weight = rand(4, low=0) if weighted else None
    expected = oracles.sigmoid_focal_loss(logits.detach().numpy(), target.numpy(), gamma, 0.3,
                                          weight.numpy() if weighted else None)
    for reduction, reduced in (('none', expected), ('sum', expected.sum()), ('mean', expected.sum() / 6)):
        loss = lambda x: ops.sigmoid_focal_loss(x, target, gamma, 0.3, weight, reduction)  # noqa: E731
        assert_close(loss(logits), reduced)
        assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize('gamma, weighted', [(2.0, False), (2.0, True), (0.0, False), (0.5, True)])
def test_softmax_focal_loss(gamma, weighted):
    logits, target = rand(6, 4, low=-4, high=4, grad=True), torch.tensor([0, 1, 2, 3, -1, 1])
    weight = rand(4, low=0) if weighted else None

    def definition(logits):
        chance = logits.softmax(1)[torch.arange(6), target]
        factor = 0.3 * (weight[target] if weighted else 1) * (target >= 0).double()
        return (-factor * (1 - chance)**gamma * chance.log()).sum()

    ours = ops.softmax_focal_loss(logits, target, gamma, 0.3, weight, 'sum')
    assert_close(ours, definition(logits).detach())
    assert_close(torch.autograd.grad(ours, logits)[0], torch.autograd.grad(definition(logits), logits)[0])


@pytest.mark.parametrize('kind', ['sigmoid', 'softmax'])
def test_focal_loss_of_extreme_logits(kind):
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    for gamma in (0.5, 2.0):
        loss = getattr(ops, f'{kind}_focal_loss')(logits, torch.tensor([0, 0]), gamma, 0.25, None, 'sum')
        gradient, = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('stats_mode', ['default', 'N'])
def test_sync_batch_norm(stats_mode, processes, monkeypatch):
    """Two processes are played by one: with equal data in both, adding up over them doubles."""
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda tensor, group: tensor.mul_(2))
    features, seed = torch.rand(3, 4, 5, 6, requires_grad=True), torch.rand(3, 4, 5, 6)
    weight, bias = torch.rand(4, requires_grad=True), torch.rand(4, requires_grad=True)
    ours, theirs = ((torch.zeros(4), torch.ones(4)) for _ in range(2))

    output = SyncBatchNormFunction.apply(features, *ours, weight, bias, 0.1, 1e-5, None, processes, stats_mode)
    everything = features.repeat(processes, 1, 1, 1)
    expected = F.batch_norm(everything, *theirs, weight, bias, True, 0.1, 1e-5)

    assert_close(output, expected[:3].detach(), 1e-5)
    for actual, wanted in zip(ours, theirs):
        assert_close(actual, wanted, 1e-5)
    inputs = (features, weight, bias)
    gradients = torch.autograd.grad(output, inputs, seed)
    expected = torch.autograd.grad(expected, inputs, seed.repeat(processes, 1, 1, 1) / processes)
    for actual, wanted in zip(gradients, expected):
        assert_close(actual, wanted, 1e-4)


# What holds for all


def layers():
    """Name, function and float32 operands, the first of which wants a gradient."""
    features, shifts = torch.rand(2, 4, 6, 6), torch.rand(2, 2, 2, 2)
    rois = torch.tensor([[0, 0, 0, 4, 5.], [1, 1, 2, 5, 5]])
    value, shapes, starts, *attention = attention_operands()
    attention = [tensor.detach().bfloat16().float() for tensor in attention]  # mmcv rounds positions as the values
    offset, mask, weight, bias = (t.detach().float() for t in deform_conv_operands(**GEOMETRIES[0])[1:])
    target = torch.tensor([0, 2, 1, 1])
    yield 'roi_align', lambda x: ops.roi_align(x, rois.to(x.dtype), 2), features
    yield 'roi_align_max', lambda x: ops.roi_align(x, rois.to(x.dtype), 2, 1.0, 0, 'max'), features
    yield 'roi_pool', lambda x: ops.roi_pool(x, rois.to(x.dtype), 2), features
    yield 'deform_roi_pool', lambda x: ops.deform_roi_pool(x, rois.to(x.dtype), shifts.to(x.dtype), (2, 2)), features
    yield 'deform_conv', lambda x: ops.deform_conv2d(x, offset.to(x.dtype), weight, 1, 1), features[:, :, 1:]
    yield 'modulated_deform_conv', lambda x: ops.modulated_deform_conv2d(
        x, offset.to(x.dtype), mask, weight, bias, 1, 1), features[:, :, 1:]
    yield 'carafe', lambda x: ops.carafe(x, torch.ones(2, 9, 12, 12, dtype=x.dtype) / 9, 3, 1, 2), features
    yield 'psa_mask', lambda x: ops.PSAMask('collect', (2, 2))(x), features
    attend = MultiScaleDeformableAttnFunction.apply
    yield 'attention', lambda x: attend(x, shapes, starts, *attention, 64), value.float()
    yield 'sigmoid_focal_loss', lambda x: ops.sigmoid_focal_loss(x, target, 2.0, 0.25, None, 'sum'), torch.rand(4, 3)
    yield 'softmax_focal_loss', lambda x: ops.softmax_focal_loss(x, target, 2.0, 0.25, None, 'sum'), torch.rand(4, 3)


def value_and_gradient(function, operand):
    operand = operand.detach().requires_grad_()
    output = function(operand)
    return output, *torch.autograd.grad(output.float().square().sum(), operand)


@pytest.mark.parametrize('name', [name for name, *_ in layers()])
@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16])
def test_reduced_precision(name, dtype):
    function, operand = next(rest for found, *rest in layers() if found == name)
    expected = value_and_gradient(function, operand.to(dtype).float())
    for context in (torch.autocast('cpu', dtype), torch.autocast('cpu', enabled=False)):
        with context:
            actual = value_and_gradient(function, operand.to(dtype))
        assert [t.dtype for t in actual] == [dtype, dtype]
        for one, other in zip(actual, expected):
            assert_close(one, other.detach(), 0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize('name', [name for name, *_ in layers()])
def test_operands_that_are_not_contiguous(name):
    function, operand = next(rest for found, *rest in layers() if found == name)
    spread = torch.stack([operand, operand], -1).movedim(0, -1)[..., 0, :].movedim(-1, 0)
    assert torch.equal(spread, operand) and not spread.is_contiguous()
    for one, other in zip(value_and_gradient(function, spread), value_and_gradient(function, operand)):
        assert_close(one, other.detach(), 1e-6)
