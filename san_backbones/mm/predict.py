"""Applies trained detectors and segmentors of MMDetection and MMSegmentation to pictures."""
import ast
import contextlib
import io
import os
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

import san_backbones.mm  # noqa: F401  before mmdet.apis and mmseg.apis
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import CheckpointLoader

__all__ = ['Found', 'Predictor', 'read_config']

# names of registries, or of classes in OpenMMLab's packages: MMEngine would import anything else that has a dot
TYPES = re.compile(r'\w+|(mmdet|mmseg|mmpretrain|mmengine|mmcv|torch\.nn|torch\.optim)\.[A-Z]\w*')


class Found(NamedTuple):
    """What a network found on a picture of H x W pixels.

    Args:
        drawn: The picture with what was found (H, W, 3), uint8, RGB.
        objects: Of a detector, dicts with `label`, `score`, `bbox` (x, y, width, height) and, if it has masks,
            `segmentation` (an RLE as in COCO's format); those above the threshold, the surest first.
        classes: Of a segmentor, the number of the class of each pixel (H, W).
    """
    drawn: np.ndarray
    objects: list[dict[str, Any]] | None
    classes: np.ndarray | None


def read_config(text: str) -> Config:
    """Reads a config as MMEngine writes it into checkpoints: as data; nothing in it is run.

    Raises:
        ValueError: It holds more than assignments of plain values, or types that are not OpenMMLab's.
    """
    values = {}
    try:
        for statement in ast.parse(text).body:
            if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
                raise ValueError(f'expected NAME = VALUE in line {statement.lineno}')
            values[statement.targets[0].id] = _value(statement.value)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f'it is not read, because it is no plain data: {error}') from error
    _check_types(values)
    values.pop('custom_imports', None)
    return Config(values)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
        return {str(word.arg): _value(word.value) for word in node.keywords if word.arg}
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values) if key is not None}
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_value(each) for each in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    if isinstance(node, ast.Name) and node.id in ('inf', 'nan'):
        return float(node.id)
    return ast.literal_eval(node)


def _check_types(value: Any) -> None:
    if isinstance(value, Mapping):
        kind = value.get('type')
        if isinstance(kind, str) and not TYPES.fullmatch(kind):
            raise ValueError(f'it names the type {kind!r}, which is none of OpenMMLab\'s')
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            _check_types(each)


class Predictor:
    """A detector or segmentor that is applied to one picture at a time.

    Args:
        checkpoint: A file of MMEngine.
        config: A config file, which is run as Python; None for the config in the checkpoint, which is not.
        threshold: Smallest score of a detector's objects.
        device: Where it runs; None for CUDA if there is one.

    Raises:
        ValueError: The checkpoint has no usable config, or no weights.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], config: str | os.PathLike[str] | None = None,
                 threshold: float = .3, device: str | None = None):
        self.threshold = threshold
        with _quiet():
            loaded = CheckpointLoader.load_checkpoint(os.fspath(checkpoint), map_location='cpu')
        if not isinstance(loaded, dict) or 'state_dict' not in loaded:
            raise ValueError(f'{checkpoint} is no checkpoint of MMEngine: it has no state_dict')
        cfg = self._config(checkpoint, config, loaded.get('meta') or {})
        if cfg.get('visualizer'):
            cfg.visualizer.vis_backends = []
        device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
        self.is_detector = cfg.get('default_scope', 'mmdet') != 'mmseg'
        with _quiet():
            if self.is_detector:
                from mmdet.apis import DetInferencer
                self.inferencer = DetInferencer(cfg, os.fspath(checkpoint), device=device, show_progress=False)
            else:
                from mmseg.apis import MMSegInferencer
                meta = (loaded.get('meta') or {}).get('dataset_meta') or {}
                self.inferencer = MMSegInferencer(
                    cfg, os.fspath(checkpoint), classes=meta.get('classes'), palette=meta.get('palette'), device=device)
                self.inferencer.show_progress = False
        self.classes: tuple[str, ...] = tuple(self.inferencer.model.dataset_meta.get('classes') or ())

    @staticmethod
    def _config(checkpoint: Any, config: Any, meta: Mapping[str, Any]) -> Config:
        if config is not None:
            return Config.fromfile(os.fspath(config))
        if not isinstance(meta.get('cfg'), str):
            raise ValueError(f'{checkpoint} holds no config: name a config file')
        try:
            return read_config(meta['cfg'])
        except ValueError as error:
            raise ValueError(f'the config in {checkpoint}: {error}. Name a config file that you trust') from None

    def __call__(self, picture: np.ndarray, name: str = 'picture') -> Found:
        """Applies the network to a picture (H, W, 3), uint8, RGB."""
        bgr = np.ascontiguousarray(picture[..., ::-1])
        with _quiet():
            if self.is_detector:
                sample = self.inferencer(bgr, return_datasamples=True, no_save_vis=True)['predictions'][0]
                options = dict(pred_score_thr=self.threshold)
            else:
                sample, options = self.inferencer(bgr, return_datasamples=True), {}
            visualizer = self.inferencer.visualizer
            visualizer.add_datasample(name, picture, sample.cpu(), draw_gt=False, **options)
            drawn = visualizer.get_image()
        if self.is_detector:
            return Found(drawn, list(self._objects(sample.pred_instances.cpu())), None)
        return Found(drawn, None, sample.pred_sem_seg.data[0].cpu().numpy())

    def _objects(self, found: Any) -> Iterator[dict[str, Any]]:
        found = found[found.scores >= self.threshold]
        for i in found.scores.argsort(descending=True).tolist():
            left, top, right, bottom = found.bboxes[i].tolist()
            thing = dict(label=int(found.labels[i]), score=round(float(found.scores[i]), 4),
                         bbox=[round(x, 2) for x in (left, top, right - left, bottom - top)])
            if 'masks' in found:
                from pycocotools import mask
                code = mask.encode(np.asfortranarray(found.masks[i].numpy().astype(np.uint8)))
                thing['segmentation'] = dict(size=code['size'], counts=code['counts'].decode('ascii'))
            yield thing


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what the libraries print and log short of errors, such as warnings about palettes and backends."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('ERROR')
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)
            yield
    finally:
        logger.setLevel(level)


def frames(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """Yields the frames of a video (H, W, 3), uint8, RGB.

    Raises:
        ValueError: It cannot be read.
    """
    import cv2
    video = cv2.VideoCapture(os.fspath(path))
    try:
        read, frame = video.read()
        if not read:
            raise ValueError(f'{path} cannot be read as a video')
        while read:
            yield frame[..., ::-1]
            read, frame = video.read()
    finally:
        video.release()


class VideoWriter:
    """Writes pictures (H, W, 3), uint8, RGB, as an .mp4 with the rate of another video.

    Raises:
        ValueError: OpenCV cannot write it.
    """

    def __init__(self, path: pathlib.Path, like: str | os.PathLike[str]):
        import cv2
        source = cv2.VideoCapture(os.fspath(like))
        self.path, self.rate = path, source.get(cv2.CAP_PROP_FPS) or 25.
        self.writer: Any = None
        source.release()

    def write(self, picture: np.ndarray) -> None:
        import cv2
        if self.writer is None:
            code = cv2.VideoWriter.fourcc(*'mp4v')
            self.writer = cv2.VideoWriter(str(self.path), code, self.rate, picture.shape[1::-1])
            if not self.writer.isOpened():
                raise ValueError(f'{self.path} cannot be written: this OpenCV has no encoder for it')
        self.writer.write(np.ascontiguousarray(picture[..., ::-1]))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.release()
