"""Inference as people do it: pictures, lists, folders, videos, visualisations and test-time augmentation."""
import copy
import subprocess
import sys

import pytest

pytest.importorskip('mmdet', reason='needs the mm extra')
pytest.importorskip('mmseg', reason='needs the mm extra')

import cv2
import mmcv
import numpy as np
import torch
from mmengine.registry import MODELS
from mmengine.runner import Runner

import san_backbones.mm
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmseg.apis import MMSegInferencer, inference_model, init_model
from mmseg.structures import SegDataSample

from tests.mm import operator_oracles as oracles
from tests.mm.small_configs import CLASSES, coco, detection, masks, picture, segmentation


def save(cfg, path):
    """Random weights, spread so that predictions vary, as a checkpoint."""
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith(('fc_cls.weight', 'conv_seg.weight')):
            parameter.data.normal_(0, 0.5)
    if cfg.default_scope == 'mmseg':  # no class wins everywhere
        batch = model.data_preprocessor(dict(  # without a sample, mmseg's fails where test_cfg pads
            inputs=[torch.from_numpy(picture(1)).permute(2, 0, 1)], data_samples=[SegDataSample()]))
        with torch.no_grad():
            logits = model.eval()(**batch, mode='tensor')
        model.decode_head.conv_seg.bias.data -= logits.flatten(2).median(2).values[0]
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(
        classes=CLASSES, palette=[[220, 20, 60], [0, 90, 230]]))), path)
    return str(path)


ATTENTION = pytest.mark.parametrize('attention', ['patchwise', 'pairwise'])


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """Gives folder, config and checkpoint of a detector with this attention."""
    return _maker(tmp_path_factory.mktemp('detector'), coco, detection)


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    """Gives folder, config and checkpoint of a segmentor with this attention."""
    return _maker(tmp_path_factory.mktemp('segmentor'), masks, segmentation)


def _maker(folder, write, configure):
    write(folder, 3)
    checkpoints = {}

    def make(attention):
        cfg = configure(folder, attention)
        if attention not in checkpoints:
            checkpoints[attention] = save(cfg, folder / f'{attention}.pth')
        return folder, cfg, checkpoints[attention]

    return make


def video(folder):
    path = folder / 'video.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 5, (64, 64))
    for i in range(1, 4):
        writer.write(picture(i))
    writer.release()
    return str(path)


def close(one, other):
    """Predictions of DetInferencer, whose boxes come best first."""
    assert one['labels'] == other['labels']
    for key in ('scores', 'bboxes'):
        np.testing.assert_allclose(one[key], other[key], atol=1e-3)
    assert one['masks'] == other['masks']


@ATTENTION
def test_detection(detector, attention, tmp_path):
    folder, cfg, weights = detector(attention)
    inferencer = DetInferencer(cfg, weights, device='cpu', show_progress=False)
    paths = [str(folder / f'{i}.png') for i in (1, 2, 3)]
    singly = [inferencer(path)['predictions'][0] for path in paths]
    assert all(len(prediction['bboxes']) == 5 for prediction in singly)
    assert singly[0]['bboxes'] != singly[1]['bboxes']
    array = inferencer(cv2.imread(paths[0]))['predictions'][0]
    close(array, singly[0])
    for batch in (inferencer(paths, batch_size=2), inferencer([cv2.imread(path) for path in paths], batch_size=2),
                  inferencer(str(folder), batch_size=2)):
        by_score = sorted(batch['predictions'], key=lambda prediction: prediction['scores'])  # a folder has any order
        for one, other in zip(by_score, sorted(singly, key=lambda prediction: prediction['scores'])):
            close(one, other)

    result = inferencer(paths[:2], pred_score_thr=0., out_dir=str(tmp_path), no_save_pred=False, return_vis=True)
    assert sorted(path.name for path in tmp_path.glob('*/*')) == ['1.json', '1.png', '2.json', '2.png']
    drawn, plain = cv2.imread(str(tmp_path / 'vis/2.png')), cv2.imread(paths[1])
    assert drawn.shape == plain.shape and (drawn != plain).any()
    other, returned = (np.abs(drawn[..., ::-1].astype(float) - image).mean() for image in result['visualization'])
    assert returned < 0.5 * other  # rendered once more, which changes nothing with matplotlib 3.11, and borders before


@ATTENTION
def test_segmentation(segmentor, attention, tmp_path):
    folder, cfg, weights = segmentor(attention)
    inferencer = MMSegInferencer(cfg, weights, device='cpu')
    paths = [str(folder / f'images/{i}.jpg') for i in (1, 2, 3)]
    singly = [inferencer(path)['predictions'] for path in paths]
    assert all(labels.shape == (64, 64) and len(np.unique(labels)) == 2 for labels in singly)
    np.testing.assert_array_equal(inferencer(cv2.imread(paths[0]))['predictions'], singly[0])
    for batch in (inferencer(paths, batch_size=2), inferencer([cv2.imread(path) for path in paths], batch_size=2)):
        for one, other in zip(batch['predictions'], singly):
            assert (one != other).mean() < 0.001  # pixels on the border of two classes may be rounded
    in_folder = inferencer(str(folder / 'images'), batch_size=2)['predictions']
    sums, expected = (sorted(int(labels.sum()) for labels in found) for found in (in_folder, singly))
    assert sums == pytest.approx(expected, abs=4)  # a folder has any order

    inferencer(paths[:2], out_dir=str(tmp_path))
    assert sorted(path.name for path in (tmp_path / 'vis').iterdir()) == ['1.jpg', '2.jpg']
    saved = sorted((tmp_path / 'pred').iterdir())
    np.testing.assert_array_equal(cv2.imread(str(saved[-2]), cv2.IMREAD_UNCHANGED), singly[0])
    drawn, plain = cv2.imread(str(tmp_path / 'vis/1.jpg')), cv2.imread(paths[0])
    assert drawn.shape == plain.shape and np.abs(drawn.astype(float) - plain).mean() > 20


def test_videos(detector, segmentor, tmp_path):
    """Frame by frame, as the demos of mmdet and mmseg do: their inferencers take no video."""
    clip = video(tmp_path)
    frames = list(mmcv.VideoReader(clip))
    assert len(frames) == 3 and frames[0].shape == (64, 64, 3)
    assert np.abs(frames[1].astype(int) - picture(2)).mean() < 20  # MJPG loses something

    _, cfg, weights = detector('patchwise')
    model = init_detector(cfg, weights, device='cpu')
    of_frames = DetInferencer(cfg, weights, device='cpu', show_progress=False)(frames, batch_size=2)['predictions']
    for frame, prediction in zip(frames, of_frames):
        boxes = inference_detector(model, frame).pred_instances.bboxes
        np.testing.assert_allclose(boxes, prediction['bboxes'], atol=1e-3)

    _, cfg, weights = segmentor('patchwise')
    model = init_model(cfg, weights, device='cpu')
    of_frames = MMSegInferencer(cfg, weights, device='cpu')(frames)['predictions']
    for frame, labels in zip(frames, of_frames):
        assert (inference_model(model, frame).pred_sem_seg.data[0].numpy() == labels).all()


FLIPS = [[dict(type='RandomFlip', prob=1.), dict(type='RandomFlip', prob=0.)]]


def test(cfg, model, pipeline, weights):
    """Runs a Runner's test with test-time augmentation, returns its metrics and the merged predictions."""
    cfg = copy.deepcopy(cfg)
    cfg.model = dict(model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = pipeline
    cfg.load_from, cfg.experiment_name = weights, f'{model["type"]}_{weights}'
    runner, found = Runner.from_cfg(cfg), []
    merge = runner.model.merge_preds
    runner.model.merge_preds = lambda samples: found.extend(merge(samples)) or found[-len(samples):]
    return runner.test(), found


test.__test__ = False


@ATTENTION
def test_segmentation_with_flips(segmentor, attention):
    """Against the mean of the chances of the picture and of the mirrored picture, mirrored back."""
    folder, cfg, weights = segmentor(attention)
    metrics, found = test(cfg, dict(type='SegTTAModel'), [dict(type='LoadImageFromFile'), dict(
        type='TestTimeAug', transforms=[*FLIPS, [dict(type='LoadAnnotations')], [dict(type='PackSegInputs')]])],
        weights)
    assert 0 <= metrics['mIoU'] <= 100 and len(found) == 3

    model, changed = init_model(cfg, weights, device='cpu'), 0
    for sample in found:
        image, chances = cv2.imread(sample.img_path), []
        for side in (1, -1):
            logits = inference_model(model, np.ascontiguousarray(image[:, ::side])).seg_logits.data.double().numpy()
            chances.append((np.exp(logits) / np.exp(logits).sum(0))[..., ::side])
        mean = sum(chances) / 2
        clear = np.abs(mean[0] - mean[1]) > 1e-4
        assert clear.mean() > 0.95
        labels = sample.pred_sem_seg.data.numpy().reshape(64, 64)
        np.testing.assert_array_equal(labels[clear], mean.argmax(0)[clear])
        changed += (labels != chances[0].argmax(0)).sum()
    assert changed > 0


def test_detection_with_flips(detector):
    """mmdet merges boxes only: the mask head is taken off."""
    folder, cfg, weights = detector('patchwise')
    cfg.model.update(type='FasterRCNN')
    cfg.model.roi_head.update(type='StandardRoIHead', mask_head=None, mask_roi_extractor=None)
    cfg.test_evaluator.metric = 'bbox'
    nms = dict(type='nms', iou_threshold=0.5)
    keys = ('img_path', 'ori_shape', 'img_shape', 'scale_factor')
    load, resize = dict(type='LoadImageFromFile'), dict(type='Resize', scale=(128, 128), keep_ratio=True)
    metrics, found = test(cfg, dict(type='DetTTAModel', tta_cfg=dict(nms=nms, max_per_img=100)), [
        load, dict(type='TestTimeAug', transforms=[[resize], *FLIPS, [
            dict(type='PackDetInputs', meta_keys=(*keys, 'img_id', 'flip', 'flip_direction'))]])], weights)
    assert 'coco/bbox_mAP' in metrics and len(found) == 3

    cfg.test_dataloader.dataset.pipeline = [load, resize, dict(type='PackDetInputs', meta_keys=keys)]
    model = init_detector(cfg, weights, device='cpu', palette='random')
    for sample in found:
        image, boxes, scores, labels = cv2.imread(sample.img_path), [], [], []
        for side in (1, -1):
            found_here = inference_detector(model, np.ascontiguousarray(image[:, ::side])).pred_instances
            corners = found_here.bboxes.clone()
            if side < 0:
                corners[:, [0, 2]] = 64 - corners[:, [2, 0]]
            boxes, scores = [*boxes, *corners.tolist()], [*scores, *found_here.scores.tolist()]
            labels += found_here.labels.tolist()
        kept = []
        for label in set(labels):
            mine = [i for i, own in enumerate(labels) if own == label]
            kept += [mine[k] for k in oracles.nms([boxes[i] for i in mine], [scores[i] for i in mine], 0.5)]
        kept.sort(key=lambda i: -scores[i])
        assert max(kept) >= 5 > min(kept), 'both views count'
        merged = sample.pred_instances
        np.testing.assert_allclose(merged.scores, [scores[i] for i in kept], atol=1e-4)
        np.testing.assert_allclose(merged.bboxes, [boxes[i] for i in kept], atol=0.05)
        assert merged.bboxes.min() >= 0 and merged.bboxes.max() <= 64


@pytest.mark.skipif(san_backbones.mm.operators_in_use() == 'compiled', reason='mmcv brings its operators')
def test_without_ours_first_mmdet_cannot_be_imported():
    result = subprocess.run([sys.executable, '-c', 'import mmdet.apis'], capture_output=True, text=True)
    if result.returncode == 0:
        pytest.skip('OneDL imports without operators')
    assert "No module named 'mmcv._ext'" in result.stderr
