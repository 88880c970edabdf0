"""Every config of mm_configs builds its model, takes a training step and predicts, at reduced size."""
import pathlib

import pytest

pytest.importorskip('mmdet', reason='needs the mm extra')
pytest.importorskip('mmseg', reason='needs the mm extra')

import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2] / 'mm_configs'
CONFIGS = sorted(path for path in ROOT.glob('*/*.py') if path.parent.name != '_base_')


def test_configs_exist():
    assert len(CONFIGS) >= 4


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request):
    config = Config.fromfile(request.param)
    init_default_scope(config.default_scope)
    return config


def _sample(config, size):
    image = torch.randint(0, 255, (3, size, size), dtype=torch.uint8)
    if config.default_scope == 'mmdet':
        from mmdet.structures import DetDataSample
        from mmdet.structures.mask import BitmapMasks
        from mmengine.structures import InstanceData
        sample = DetDataSample(metainfo=dict(
            img_shape=(size, size), ori_shape=(size, size), scale_factor=(1., 1.), batch_input_shape=(size, size)))
        masks = torch.zeros(1, size, size)
        masks[0, 10:50, 10:50] = 1
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[10., 10., 50., 50.]]), labels=torch.tensor([3]),
            masks=BitmapMasks(masks.numpy().astype('uint8'), size, size))
        return dict(inputs=[image], data_samples=[sample])
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    sample = SegDataSample(metainfo=dict(img_shape=(size, size), ori_shape=(size, size)))
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, size, size)))
    return dict(inputs=[image], data_samples=[sample])


def test_builds_trains_and_predicts(config):
    from mmengine.registry import MODELS
    size = 64
    if config.default_scope == 'mmseg':
        config.model.data_preprocessor.size = (size, size)
        config.model.decode_head.channels = 32
    model = MODELS.build(config.model)
    model.init_weights()
    model.train()
    batch = _sample(config, size)
    if config.default_scope == 'mmseg':  # UPerNet pools to 1x1: batch statistics need two images
        batch = {key: value * 2 for key, value in batch.items()}
    losses, _ = model.parse_losses(model(**model.data_preprocessor(batch, True), mode='loss'))
    losses.backward()
    assert torch.isfinite(losses)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.backbone.parameters())

    model.eval()
    with torch.no_grad():
        result = model(**model.data_preprocessor(_sample(config, size), False), mode='predict')[0]
    if config.default_scope == 'mmdet':
        assert result.pred_instances.masks.shape[1:] == (size, size)
    else:
        assert result.pred_sem_seg.data.shape == (1, size, size)


def test_names_what_it_needs(config):
    assert config.custom_imports['imports'] == ['san_backbones.mm']
    assert config.model.backbone.type == 'SANBackbone'
    assert config.model.backbone.position_ref_size == 224


def test_name_says_the_architecture(config):
    name = pathlib.Path(config.filename).stem
    attention = 'pairwise' if 'pairwise' in name else 'patchwise'
    assert config.model.backbone.arch == name[name.index('san'):][:5] + f'_{attention}'
