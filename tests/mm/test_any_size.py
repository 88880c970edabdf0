"""Whole and sliding inference on pictures of any size: smaller than the network's stride, odd, and long panoramas."""
import os
import subprocess
import sys

import pytest

pytest.importorskip('mmdet', reason='needs the mm extra')
pytest.importorskip('mmseg', reason='needs the mm extra')

import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS, MODELS
from mmengine.runner import Runner

import san_backbones.mm
from mmdet.structures import DetDataSample
from mmseg.structures import SegDataSample

from tests.mm.small_configs import ARCH, WIDTHS, detection, masks, segmentation

SIZES = [(1, 1), (13, 20), (33, 31), (64, 64), (70, 201), (40, 600)]  # (height, width)
ATTENTION = pytest.mark.parametrize('attention', ['patchwise', 'pairwise'])


def noise(height, width):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def segmentor(folder, attention, **test_cfg):
    cfg = segmentation(folder, attention)
    cfg.model.test_cfg.update(test_cfg)
    torch.manual_seed(0)
    return MODELS.build(cfg.model).eval()


def segment(model, image):
    size = tuple(image.shape[1:])
    sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
    with torch.no_grad():
        return model.test_step(dict(inputs=[image], data_samples=[sample]))[0]


@ATTENTION
@pytest.mark.parametrize('test_cfg', [dict(mode='whole'), dict(mode='slide', crop_size=(64, 64), stride=(48, 48))],
                         ids=['whole', 'slide'])
def test_segmentation(tmp_path, attention, test_cfg):
    model = segmentor(tmp_path, attention, **test_cfg)
    for size in SIZES:
        result = segment(model, noise(*size))
        assert result.pred_sem_seg.data.shape == (1, *size)
        assert result.seg_logits.data.shape == (2, *size) and result.seg_logits.data.isfinite().all()


def test_without_padding(tmp_path):
    model = segmentor(tmp_path, 'patchwise')
    model.data_preprocessor.test_cfg = None
    for size in SIZES:
        assert segment(model, noise(*size)).pred_sem_seg.data.shape == (1, *size)


@ATTENTION
def test_detection(tmp_path, attention):
    cfg = detection(tmp_path, attention)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    for height, width in SIZES:
        size = height, width
        sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1., 1.)))
        with torch.no_grad():
            found = model.test_step(dict(inputs=[noise(*size)], data_samples=[sample]))[0].pred_instances
        assert found.masks.shape[1:] == size and found.bboxes.isfinite().all()
        assert (found.bboxes >= 0).all() and (found.bboxes <= torch.tensor([width, height, width, height])).all()


@ATTENTION
def test_sliding_is_the_mean_over_windows(tmp_path, attention):
    height, width, crop, stride = 75, 201, 64, 40
    model = segmentor(tmp_path, attention, mode='slide', crop_size=(crop, crop), stride=(stride, stride))
    image = noise(height, width)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (
        [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    padded = torch.zeros(3, 96, 224)
    padded[:, :height, :width] = (image.flip(0).float() - mean) / std

    def starts(size):  # steps of `stride`; the last window ends with the picture
        return sorted({min(start, size - crop) for start in range(0, size, stride)})

    total, count = torch.zeros(2, 96, 224), torch.zeros(96, 224)
    for top in starts(96):
        for left in starts(224):
            window = padded[None, :, top:top + crop, left:left + crop]
            with torch.no_grad():
                logits = model.decode_head(model.backbone(window))
            logits = torch.nn.functional.interpolate(logits, size=(crop, crop), mode='bilinear')[0]
            total[:, top:top + crop, left:left + crop] += logits
            count[top:top + crop, left:left + crop] += 1
    assert count.min() == 1 and count.max() > 2
    torch.testing.assert_close(segment(model, image).seg_logits.data, (total / count)[:, :height, :width],
                               atol=1e-4, rtol=1e-4)


@ATTENTION
def test_positions_do_not_depend_on_the_picture(tmp_path, attention):
    """With position_ref_size, the middle of a long picture has the features of its own crop."""
    model = segmentor(tmp_path, attention).backbone
    for name, parameter in model.named_parameters():
        if '.position.weight' in name or 'weight_mlp' in name and name.endswith('weight'):
            parameter.data.mul_(10)  # random weights hardly look at positions
    image = noise(64, 384)[None].float() / 255
    with torch.no_grad():
        whole, part = model(image)[0], model(image[..., 64:320])[0]  # stride 4
    torch.testing.assert_close(whole[..., 16 + 16:80 - 16], part[..., 16:-16], atol=1e-5, rtol=1e-4)


@METRICS.register_module()
class CountSizes(BaseMetric):
    """Counts predictions of 33 x 20 pixels."""

    def process(self, data_batch, data_samples):
        self.results += [1 for sample in data_samples if sample['pred_sem_seg']['data'].shape == (1, 20, 33)]

    def compute_metrics(self, results):
        return dict(seen=len(results))


@ATTENTION
def test_test_time_augmentation_pads_small_pictures(tmp_path, attention):
    """As MMSegmentation's tools/test.py does with --tta: the wrapped model has the config's own preprocessor then."""
    masks(tmp_path, height=20, width=33)
    cfg = segmentation(tmp_path, attention)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model
    for part in 'train', 'val':
        cfg.update({f'{part}_cfg': None, f'{part}_dataloader': None})
    cfg.update(optim_wrapper=None, param_scheduler=None, val_evaluator=None)
    cfg.test_evaluator = dict(type='CountSizes')
    runner = Runner.from_cfg(cfg)
    assert runner.test() == dict(seen=4)


class _PaddedPool(torch.nn.Module):
    """Max pooling by two of a map that is padded to even sides with what is never the maximum."""

    def forward(self, x):
        return F.max_pool2d(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), value=-torch.inf), 2)


@ATTENTION
def test_sides_are_rounded_up(attention):
    def backbone(**kwargs):
        torch.manual_seed(0)
        return san_backbones.mm.SANBackbone(dict(ARCH, attention=attention), **kwargs).eval()

    image = torch.randn(1, 3, 101, 75, generator=torch.Generator().manual_seed(0))
    expected = backbone()
    for part in (expected.stem, *expected.stages[1:]):
        part.pool = _PaddedPool()
    with torch.no_grad():
        found = backbone(ceil_mode=True)(image)
        assert [tuple(x.shape[2:]) for x in found] == [
            (-(-101 // stride), -(-75 // stride)) for stride in (4, 8, 16, 32)]
        torch.testing.assert_close(found, expected(image))
        even = image[..., :96, :64]
        torch.testing.assert_close(backbone(ceil_mode=True)(even), backbone()(even), rtol=0, atol=1e-5)
        assert [tuple(x.shape[2:]) for x in backbone()(image)] == [(25, 18), (12, 9), (6, 4), (3, 2)]
    with pytest.raises(TypeError, match='ceil_mode must be True or False, got 1'):
        backbone(ceil_mode=1)


@pytest.mark.parametrize('neck', [
    dict(type='PAFPN', in_channels=WIDTHS, out_channels=16, num_outs=4),
    dict(type='FPN_CARAFE', in_channels=WIDTHS, out_channels=16, num_outs=4),
    [dict(type='FPN', in_channels=WIDTHS, out_channels=16, num_outs=4),
     dict(type='DyHead', in_channels=16, out_channels=16, num_blocks=1)]], ids=['PAFPN', 'FPN_CARAFE', 'DyHead'])
def test_necks_that_expect_sides_rounded_up(neck, tmp_path):
    cfg = detection(tmp_path)
    cfg.model.neck = neck
    cfg.model.rpn_head.in_channels = cfg.model.rpn_head.feat_channels = 16
    torch.manual_seed(0)

    def extract(ceil_mode):
        backbone = MODELS.build(dict(cfg.model.backbone, ceil_mode=ceil_mode))
        necks = [MODELS.build(dict(part, _scope_='mmdet')) for part in (neck if isinstance(neck, list) else [neck])]
        return torch.nn.Sequential(backbone, *necks)(torch.randn(1, 3, 100, 100))

    assert [tuple(x.shape[2:]) for x in extract(True)] == [(25, 25), (13, 13), (7, 7), (4, 4)]
    with pytest.raises((RuntimeError, AssertionError)):
        extract(False)


PANORAMA = '''
import torch
from san_backbones.mm import SANBackbone
from san_backbones.ops import use_backend

def megabytes(line):
    with open('/proc/self/status') as status:
        return int(next(row.split()[1] for row in status if row.startswith(line + ':'))) / 1024

image = torch.rand(1, 3, 256, 2048)
models = {attention: SANBackbone(dict(attention=attention, depths=(1, 1, 1, 1, 1), widths=(32, 64, 64, 96, 128),
                                      stem_width=16)).eval() for attention in ('patchwise', 'pairwise')}
for backend in ('auto', 'tiled', 'reference'):
    for attention, model in models.items():
        with torch.inference_mode(), use_backend(backend):
            model(image[..., :64])
            with open('/proc/self/clear_refs', 'w') as file:
                file.write('5')  # forgets the peak so far
            before = megabytes('VmRSS')
            model(image)
        print('peak', backend, attention, megabytes('VmHWM') - before)
'''


@pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK), reason='needs Linux to measure peak memory')
def test_a_panorama_does_not_hold_the_footprint():
    """Input and largest map take 6 and 34 MB; the plain definition, with its 49 neighbours, breaks the bound."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'MALLOC_MMAP_THRESHOLD_': '65536'}  # gives back what it frees
    result = subprocess.run([sys.executable, '-c', PANORAMA], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peaks = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith('peak')]
    assert len(peaks) == 6
    for backend, _, megabytes in peaks:
        assert (float(megabytes) > 100) == (backend == 'reference'), result.stdout
