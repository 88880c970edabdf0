"""Every config of mm_configs builds its model, takes a training step and predicts, at reduced size; and its name and
its folder's table say what it holds. The metafiles are in test_mim.py, the classifiers in test_classification.py."""
import collections
import copy
import pathlib
import re

import pytest

pytest.importorskip('mmdet', reason='needs the mm extra')
pytest.importorskip('mmseg', reason='needs the mm extra')

import san_backbones.mm  # noqa: F401  before mmdet.structures.mask
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from tests import ROOT

FOLDERS = sorted(path.parent for path in (ROOT / 'mm_configs').glob('*/metafile.yml')
                 if path.parent.name != 'classification')
CONFIGS = [path for folder in FOLDERS for path in sorted(folder.glob('*.py'))]
SIZE = 64
# the conventions of MMDetection and of MMSegmentation
NAMES = {
    'mmdet': r'(?P<method>[a-z\d-]+)_(?P<arch>san\d\d-[a-z]+)(_fpn)?_(8xb2-)?(?P<schedule>1x|ms-3x|12e|from-scratch)_'
             r'(?P<data>coco)',
    'mmseg': r'(?P<arch>san\d\d-[a-z]+)(?P<dilated>-d8)?_(?P<method>upernet|fpn|deeplabv3plus)_(?P<gpus>\d)xb'
             r'(?P<images>\d)-(?P<schedule>\d+)k_(?P<data>ade20k|cityscapes|from-scratch)-(?P<height>\d+)x'
             r'(?P<width>\d+)',
}
# classes of detectors and heads that are not called as the method, but for case and dashes
METHODS = {'cascade-mask-rcnn': 'CascadeRCNN', 'dino-4scale': 'DINO', 'upernet': 'UPerHead', 'fpn': 'FPNHead',
           'deeplabv3plus': 'DepthwiseSeparableASPPHead'}
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


def is_from_scratch(config):
    return 'from-scratch' in config.filename


def batch(config, images):
    """Makes a batch as from the data loader: pictures with one box, mask and class, or with a class for each pixel."""
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
                bboxes=torch.tensor([[10., 10., 50., 50.]]), labels=torch.tensor([1]),
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
    freezes = config.default_scope == 'mmdet' and not is_from_scratch(config)
    assert frozen == ({'conv', 'norm', '0'} if freezes else set())


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
    backbone = config.model.backbone
    assert config.custom_imports == dict(imports=['san_backbones.mm'], allow_failed_imports=False)
    assert backbone.type == 'SANBackbone' and backbone.position_ref_size == 224 and backbone.with_cp is False
    if is_from_scratch(config):  # what random weights need, and all classes of the user's in the heads
        assert backbone.init_cfg is None and not backbone.get('norm_eval') and backbone.norm_cfg.type == 'BN'
        assert config.optim_wrapper.clip_grad.max_norm == 1
        assert config.model.get('neck', {}).get('norm_cfg', dict(type='BN')) == dict(type='BN')
        heads = [*config.model.get('roi_head', {}).values(), config.model.get('decode_head'),
                 config.model.get('auxiliary_head')]
        assert {head.num_classes for head in heads if isinstance(head, dict) and 'num_classes' in head} == {2}
        assert len(config.train_dataloader.dataset.metainfo.classes) == 2
    else:
        assert backbone.init_cfg == dict(type='Pretrained', checkpoint=f'hf-hub:san-backbones/{backbone.arch}.in1k')
    assert config.optim_wrapper.optimizer.type == 'AdamW'
    preprocessor = config.model.data_preprocessor  # pads what is tested to what the network divides
    assert preprocessor.get('pad_size_divisor', preprocessor.get('test_cfg', {}).get('size_divisor')) == 32
    assert config.custom_hooks == [dict(type='CheckSetupHook'), dict(type='CheckInvalidFeaturesHook')]


def test_is_what_its_name_says(config):
    path = pathlib.Path(config.filename)
    name = re.fullmatch(NAMES[config.default_scope], path.stem)
    assert name, f'{path.stem} does not follow the convention of {config.default_scope}'
    assert config.model.backbone.arch == name['arch'].replace('-', '_')
    if is_from_scratch(config):
        method = name['method']
        assert METHODS.get(method, method.replace('-', '')).lower() in (
            config.model.type.lower(), config.model.get('decode_head', {}).get('type', '').lower())
        return
    data = config.train_dataloader.dataset
    assert name['data'] in data.data_root.replace('ade/', 'ade20k/')
    if config.default_scope == 'mmdet':
        method = name['method']
        assert config.model.type.lower() == METHODS.get(method, method.replace('-', '')).lower()
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

    assert max(depth(path) for path in CONFIGS) <= 4  # an architecture, a method, a schedule, the one it changes


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda path: path.name)
class TestFolder:
    def test_every_model_is_there(self, folder):
        """All six; or one for a method that is new here, or that is there to be copied."""
        kinds = collections.defaultdict(set)
        for path in folder.glob('*.py'):
            arch = re.search(r'san\d\d-(pairwise|patchwise)', path.stem)[0]
            kinds[path.stem.replace(arch, 'SAN')].add(arch)
        new = {'san10-patchwise' if folder.name == 'from_scratch' else 'san15-patchwise'}
        assert all(archs in ({*ARCHITECTURES}, new) for archs in kinds.values()), kinds

    def test_table(self, folder):
        """Every config is in the table of its folder, with the memory it takes, `-` where nobody has measured it."""
        assert f']({folder.name})' in (folder.parent / 'README.md').read_text()
        if folder.name == 'from_scratch' or not (folder / 'README.md').exists():
            return  # there to be copied, or one that nobody has trained, with nothing to say of it
        text = (folder / 'README.md').read_text()
        titles = re.search(r'^\| backbone .*config \|$', text, re.M)[0].split(' | ')
        rows = {re.search(r'\[config\]\(([\w.-]+\.py)\) \|$', row)[1]: row.split(' | ')
                for row in re.findall(r'^\| san.*', text, re.M)}
        assert sorted(rows) == [path.name for path in sorted(folder.glob('*.py'))]
        for name, row in rows.items():
            assert re.fullmatch(r'-|\d+(\.\d+)?', row[titles.index('memory (GB)')]), name
