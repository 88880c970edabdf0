"""Every config of mm_configs builds its model, takes a training step and predicts, at reduced size; and its name and
its folder's table say what it holds. The metafiles are in test_mim.py, the classifiers in test_classification.py."""
import copy
import pathlib
import re

import pytest

pytest.importorskip('mmdet', reason='needs the mm extra')
pytest.importorskip('mmseg', reason='needs the mm extra')

import san_backbones.mm  # noqa: F401  before mmdet.structures.mask
import torch
from mmengine.config import Config, utils
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from san_backbones.mm.onedl import find_configs

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / 'mm_configs').glob('*/metafile.yml')
                 if path.parent.name != 'classification')
CONFIGS = [path for folder in FOLDERS for path in sorted(folder.glob('*.py'))]
SIZE = 64
# the conventions of MMDetection and of MMSegmentation
NAMES = {
    'mmdet': r'(?P<method>mask-rcnn|faster-rcnn|cascade-mask-rcnn|retinanet|dino-4scale)_'
             r'(?P<arch>san\d\d-[a-z]+)(_fpn)?_(8xb2-)?(?P<schedule>1x|ms-3x|12e)_(?P<data>coco)',
    'mmseg': r'(?P<arch>san\d\d-[a-z]+)(?P<dilated>-d8)?_(?P<method>upernet|fpn|deeplabv3plus)_(?P<gpus>\d)xb'
             r'(?P<images>\d)-(?P<schedule>\d+)k_(?P<data>ade20k|cityscapes)-(?P<height>\d+)x(?P<width>\d+)',
}
METHODS = {
    'mask-rcnn': 'MaskRCNN', 'faster-rcnn': 'FasterRCNN', 'cascade-mask-rcnn': 'CascadeRCNN', 'retinanet': 'RetinaNet',
    'dino-4scale': 'DINO', 'upernet': 'UPerHead', 'fpn': 'FPNHead', 'deeplabv3plus': 'DepthwiseSeparableASPPHead'}
EPOCHS = {'1x': 12, 'ms-3x': 36, '12e': 12}
ARCHITECTURES = [f'san{depth}-{attention}' for depth in (10, 15, 19) for attention in ('pairwise', 'patchwise')]


@pytest.fixture(scope='module', params=CONFIGS, ids=lambda path: path.stem)
def config(request):
    config = Config.fromfile(request.param)
    init_default_scope(config.default_scope)
    return config


@pytest.fixture(scope='module')
def model(config):
    model_config = copy.deepcopy(config.model)
    model_config.backbone.init_cfg = None  # weights are another matter
    if config.default_scope == 'mmseg':
        model_config.data_preprocessor.size = (SIZE, SIZE)
        for head in ('decode_head', 'auxiliary_head'):
            if head in model_config:
                model_config[head].channels = 32
    if 'roi_head' in model_config:
        boxes = model_config.roi_head.bbox_head
        for head in boxes if isinstance(boxes, list) else [boxes]:
            head.fc_out_channels = 32
    if model_config.type == 'DINO':  # a small picture has fewer places than DINO has queries
        model_config.update(num_queries=20, test_cfg=dict(max_per_img=10))
    model = MODELS.build(model_config)
    model.init_weights()
    return model


def batch(config, images):
    """What the data loader gives: pictures with one box, mask and class, or with a class for each pixel."""
    inputs = [torch.randint(0, 255, (3, SIZE, SIZE), dtype=torch.uint8) for _ in range(images)]
    samples = []
    for _ in inputs:
        meta = dict(img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE), scale_factor=(1., 1.),
                    batch_input_shape=(SIZE, SIZE))
        if config.default_scope == 'mmdet':
            from mmdet.structures import DetDataSample
            from mmdet.structures.mask import BitmapMasks
            from mmengine.structures import InstanceData
            mask = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)
            mask[0, 10:50, 10:50] = 1
            sample = DetDataSample(metainfo=meta)
            sample.gt_instances = InstanceData(
                bboxes=torch.tensor([[10., 10., 50., 50.]]), labels=torch.tensor([3]),
                masks=BitmapMasks(mask.numpy(), SIZE, SIZE))
        else:
            from mmengine.structures import PixelData
            from mmseg.structures import SegDataSample
            sample = SegDataSample(metainfo=meta)
            classes = config.model.decode_head.num_classes
            sample.gt_sem_seg = PixelData(data=torch.randint(0, classes, (1, SIZE, SIZE)))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def test_training_step(config, model):
    torch.manual_seed(0)
    optimizer = build_optim_wrapper(model, config.optim_wrapper)
    for group in optimizer.optimizer.param_groups:
        group['weight_decay'] = 0.  # which would move weights without a gradient
    before = {name: parameter.clone() for name, parameter in model.backbone.named_parameters()}
    model.train()
    # two images: UPerNet's and DeepLab's global pooling has one value a channel of each to normalise
    losses = model.train_step(batch(config, 2), optimizer)
    assert losses and all(torch.isfinite(loss) for loss in losses.values())
    for name, parameter in model.backbone.named_parameters():
        moved = not torch.equal(parameter, before[name])
        # some biases have no effect: those of relative positions, and what softmax takes away
        assert moved == parameter.requires_grad or (name.endswith('.bias') and not moved), name
    frozen = {name.split('.')[1] for name, p in model.backbone.named_parameters() if not p.requires_grad}
    assert frozen == ({'conv', 'norm', '0'} if config.default_scope == 'mmdet' else set())


def test_prediction(config, model):
    model.eval()
    with torch.no_grad():
        result, = model.test_step(batch(config, 1))
    if config.default_scope == 'mmseg':
        assert result.pred_sem_seg.data.shape == (1, SIZE, SIZE)
        assert result.seg_logits.data.shape == (config.model.decode_head.num_classes, SIZE, SIZE)
    else:
        found = result.pred_instances
        assert found.bboxes.shape == (len(found.labels), 4) and torch.isfinite(found.scores).all()
        if 'mask' in config.filename:
            assert found.masks.shape[1:] == (SIZE, SIZE)


def test_norms_and_biases_do_not_decay(config, model):
    optimizer = build_optim_wrapper(model, config.optim_wrapper)
    norms = {id(p) for module in model.modules()
             if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm))
             for p in module.parameters()}
    biases = {id(p) for name, p in model.named_parameters() if name.endswith('bias')}
    decays = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    assert all(decays[p] == 0 for p in norms | biases if p in decays)
    assert all(decays[id(p)] > 0 for p in model.backbone.parameters() if p.dim() > 1 and id(p) in decays)


def test_states_what_it_needs(config):
    text = pathlib.Path(config.filename).read_text()
    backbone = config.model.backbone
    assert "custom_imports = dict(imports=['san_backbones.mm'], allow_failed_imports=False)" in text
    assert config.custom_imports['imports'] == ['san_backbones.mm']
    assert re.search(r'# Expected memory: (-|\d)', text)
    assert backbone.type == 'SANBackbone' and backbone.position_ref_size == 224 and backbone.with_cp is False
    assert backbone.init_cfg == dict(type='Pretrained', checkpoint=f'hf-hub:san-backbones/{backbone.arch}.in1k')
    assert f"checkpoint='{backbone.init_cfg.checkpoint}'" in text
    assert config.optim_wrapper.optimizer.type == 'AdamW'
    preprocessor = config.model.data_preprocessor  # pads what is tested to what the network divides
    assert preprocessor.get('pad_size_divisor', preprocessor.get('test_cfg', {}).get('size_divisor')) == 32
    assert config.custom_hooks == [dict(type='CheckSetupHook'), dict(type='CheckInvalidFeaturesHook')]


def test_is_what_its_name_says(config):
    path = pathlib.Path(config.filename)
    name = re.fullmatch(NAMES[config.default_scope], path.stem)
    assert name, f'{path.stem} does not follow the convention of {config.default_scope}'
    assert config.model.backbone.arch == name['arch'].replace('-', '_')
    data = config.train_dataloader.dataset
    assert name['data'] in data.data_root.replace('ade/', 'ade20k/')
    if config.default_scope == 'mmdet':
        assert config.model.type == METHODS[name['method']]
        epochs = EPOCHS[name['schedule']]
        assert config.train_cfg.max_epochs == config.param_scheduler[-1].end == epochs
        resizes = [step.type for step in data.pipeline if 'Resize' in step.type]
        assert resizes == {'1x': ['Resize'], 'ms-3x': ['RandomChoiceResize'], '12e': []}[name['schedule']]
        assert config.train_dataloader.batch_size == 2 and config.auto_scale_lr.base_batch_size == 16
        return
    assert config.model.decode_head.type == METHODS[name['method']]
    assert config.train_dataloader.batch_size == int(name['images'])
    iterations = 1000 * int(name['schedule'])
    assert config.train_cfg.max_iters == config.param_scheduler[-1].end == iterations
    crop = int(name['height']), int(name['width'])
    assert config.model.data_preprocessor.size == crop == data.pipeline[3].crop_size
    classes = dict(ade20k=150, cityscapes=19)[name['data']]
    heads = [config.model.decode_head, config.model.get('auxiliary_head')]
    assert {head.num_classes for head in heads if head} == {classes}
    assert config.model.backbone.output_stride == (8 if name['dilated'] else 32)


def test_bases_are_shallow():
    def depth(path):
        bases = Config._parse_base(str(path)) if hasattr(Config, '_parse_base') else Config._get_base_files(str(path))
        own = [path.parent / base for base in bases if '::' not in base]
        return 1 + max([depth(base) for base in own], default=1 if bases else 0)

    assert max(depth(path) for path in CONFIGS) <= 3


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda path: path.name)
class TestFolder:
    def test_every_model_is_there(self, folder):
        kinds = {re.sub(r'san\d\d-(pairwise|patchwise)', 'SAN', path.stem) for path in sorted(folder.glob('*.py'))}
        assert [path.stem for path in sorted(folder.glob('*.py'))] == sorted(
            kind.replace('SAN', arch) for kind in kinds for arch in ARCHITECTURES)

    def test_table(self, folder):
        text = (folder / 'README.md').read_text()
        linked = re.findall(r'\| \[config\]\(([\w.-]+\.py)\) \|', text)
        assert sorted(linked) == [path.name for path in sorted(folder.glob('*.py'))]


def test_bases_of_mmseg_are_found_under_another_distribution(monkeypatch):
    """OneDL's is called onedl-mmsegmentation, which mmengine does not know of."""
    monkeypatch.setitem(utils.MODULE2PACKAGE, 'mmseg', 'no-such-distribution')
    name = ROOT / 'mm_configs/upernet/san15-patchwise_upernet_8xb2-160k_ade20k-512x512.py'
    with pytest.raises(ModuleNotFoundError, match='no-such-distribution is not installed'):
        Config.fromfile(name)
    find_configs()
    assert utils.MODULE2PACKAGE['mmseg'] == 'mmseg' and utils.MODULE2PACKAGE['mmtrack'] == 'mmtrack'
    assert Config.fromfile(name).model.decode_head.type == 'UPerHead'
