"""Layer-wise learning rates in a detector of MMDetection and a segmentor of MMSegmentation."""
import pytest

pytest.importorskip('mmdet', reason='needs the mm extra')
pytest.importorskip('mmseg', reason='needs the mm extra')

import torch
from mmengine.optim import LinearLR, build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn

import san_backbones.mm  # noqa: F401

ARCH = dict(attention='patchwise', depths=(1, 2, 1, 2, 1), widths=(32, 32, 64, 64, 96), stem_width=16, kernel_sizes=3)
WIDTHS = [32, 64, 64, 96]
RATE = 0.5
# how often the rate applies, by hand from the depths: 8 layers, stem, then 1 + 2 + 1 + 2 + 1 blocks
POWERS = {
    'stem.conv.weight': 8, 'stem.norm.bias': 8,
    'stages.0.conv.weight': 7, 'stages.0.blocks.0.attn.value.weight': 7, 'stages.0.norm.weight': 7,
    'stages.1.conv.weight': 6, 'stages.1.blocks.0.conv.bias': 6,
    'stages.1.blocks.1.norm1.weight': 5, 'stages.1.blocks.1.attn.weight_mlp.fc2.weight': 5, 'stages.1.norm.bias': 5,
    'stages.2.conv.weight': 4, 'stages.2.blocks.0.attn.query.bias': 4, 'stages.2.norm.weight': 4,
    'stages.3.conv.weight': 3, 'stages.3.blocks.0.norm2.weight': 3,
    'stages.3.blocks.1.attn.key.weight': 2, 'stages.3.norm.weight': 2,
    'stages.4.conv.weight': 1, 'stages.4.blocks.0.conv.weight': 1, 'stages.4.norm.bias': 1,
}
STAGE_POWERS = {'stem.conv.weight': 6, 'stages.0.conv.weight': 5, 'stages.1.blocks.0.conv.bias': 4,
                'stages.1.blocks.1.norm1.weight': 4, 'stages.1.norm.bias': 4, 'stages.2.conv.weight': 3,
                'stages.3.blocks.0.norm2.weight': 2, 'stages.4.norm.bias': 1}


def _segmentor(**backbone):
    import mmseg.models  # noqa: F401, after san_backbones.mm
    return MODELS.build(dict(
        _scope_='mmseg', type='EncoderDecoder', data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
        backbone=dict(type='SANBackbone', arch=ARCH, **backbone),
        decode_head=dict(type='UPerHead', in_channels=WIDTHS, in_index=[0, 1, 2, 3], pool_scales=(1, 2), channels=16,
                         num_classes=3, norm_cfg=dict(type='BN')),
        train_cfg=dict(), test_cfg=dict(mode='whole')))


def _detector(**backbone):
    import mmdet.models  # noqa: F401, after san_backbones.mm
    return MODELS.build(dict(
        _scope_='mmdet', type='RetinaNet', data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
        backbone=dict(type='SANBackbone', arch=ARCH, **backbone),
        neck=dict(type='FPN', in_channels=WIDTHS, out_channels=16, num_outs=4),
        bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=16, feat_channels=16, stacked_convs=1,
                       anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[4, 8, 16, 32])),
        train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4),
                       sampler=dict(type='PseudoSampler')), test_cfg=dict()))


def _wrapper(model, optimizer=None, **paramwise):
    return build_optim_wrapper(model, dict(
        constructor='SANLayerDecayOptimWrapperConstructor',
        optimizer=optimizer or dict(type='SGD', lr=0.1, weight_decay=0.2),
        paramwise_cfg={'decay_rate': RATE, **paramwise}))


def _groups(model, wrapper):
    """The optimiser's group of each parameter, by name; each parameter at most once."""
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {}
    for group in wrapper.optimizer.param_groups:
        for parameter in group['params']:
            assert names[id(parameter)] not in groups
            groups[names[id(parameter)]] = group
    return groups


@pytest.mark.parametrize('build, head', [(_segmentor, 'decode_head'), (_detector, 'neck')])
@pytest.mark.parametrize('decay_type, powers', [('block', POWERS), ('stage', STAGE_POWERS)])
def test_learning_rates(build, head, decay_type, powers):
    model = build()
    groups = _groups(model, _wrapper(model, decay_type=decay_type))
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    for name, power in powers.items():
        assert groups['backbone.' + name]['lr'] == pytest.approx(0.1 * RATE ** power), name
    outside = {name: group['lr'] for name, group in groups.items() if not name.startswith('backbone.')}
    assert any(name.startswith(head) for name in outside) and set(outside.values()) == {0.1}


def test_weight_decay_exemptions_and_factors():
    model = _segmentor()
    groups = _groups(model, _wrapper(
        model, norm_decay_mult=0., bias_decay_mult=0.5, bias_lr_mult=3.,
        custom_keys={'stages.2.conv': dict(lr_mult=10., decay_mult=0.25)}))
    modules = dict(model.named_modules())
    for name, group in groups.items():
        if name == 'backbone.stages.2.conv.weight':
            assert group['weight_decay'] == pytest.approx(0.2 * 0.25)
            assert group['lr'] == pytest.approx(0.1 * 10 * RATE ** POWERS['stages.2.conv.weight'])
            continue
        owner, _, kind = name.rpartition('.')
        norm = isinstance(modules[owner], nn.BatchNorm2d)
        assert group['weight_decay'] == pytest.approx(0. if norm else 0.1 if kind == 'bias' else 0.2), name
        power = POWERS.get(name[len('backbone.'):]) if name.startswith('backbone.') else 0
        if power is not None:
            assert group['lr'] == pytest.approx((3 if kind == 'bias' and not norm else 1) * 0.1 * RATE ** power), name


def test_a_factor_for_the_backbone_leaves_norms_without_decay():
    model = _segmentor()
    groups = _groups(model, _wrapper(model, decay_rate=1., backbone_lr_mult=0.1, norm_decay_mult=0.))
    for name, group in groups.items():
        assert group['lr'] == pytest.approx(0.01 if name.startswith('backbone.') else 0.1), name
    assert groups['backbone.stem.norm.weight']['weight_decay'] == 0.
    assert groups['backbone.stem.conv.weight']['weight_decay'] == 0.2


def test_frozen_parameters_are_skipped():
    model = _segmentor(frozen_stages=2)
    groups = _groups(model, _wrapper(model))
    assert groups.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(('backbone.stem', 'backbone.stages.1')) for name in groups)
    assert groups['backbone.stages.2.conv.weight']['lr'] == pytest.approx(0.1 * RATE ** 4), 'counted as if not frozen'


def test_wrapped_and_nested_models():
    student, teacher = _segmentor(), _segmentor(out_indices=(0, 1, 2, 3))
    model = nn.Module()
    model.module = nn.Module()  # as a model wrapper holds it
    model.module.student, model.module.teacher = student, nn.ModuleDict(dict(ema=teacher))
    inner = nn.Module()  # and as FSDP holds a part
    inner._fsdp_wrapped_module = student.backbone.stages[1]
    student.backbone.stages[1] = inner
    groups = _groups(model.module, _wrapper(model))
    assert groups['student.backbone.stages.1._fsdp_wrapped_module.norm.weight']['lr'] == pytest.approx(0.1 * RATE ** 5)
    assert groups['student.backbone.stem.conv.weight']['lr'] == pytest.approx(0.1 * RATE ** 8)
    assert groups['teacher.ema.backbone.stem.conv.weight']['lr'] == pytest.approx(0.1 * RATE ** 7), 'no last stage'
    assert groups['teacher.ema.decode_head.conv_seg.weight']['lr'] == 0.1


def test_a_step_moves_parameters_in_proportion():
    model = _segmentor()
    wrapper = _wrapper(model, optimizer=dict(type='SGD', lr=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapper.update_params(sum(p.sum() for p in model.parameters()))  # a gradient of one everywhere
    for name, power in {**{'backbone.' + n: p for n, p in POWERS.items()}, 'decode_head.conv_seg.weight': 0}.items():
        moved = before[name] - dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.1 * RATE ** power), rtol=1e-3, atol=2e-7)


def test_schedulers_keep_the_ratios():
    model = _segmentor()
    wrapper = _wrapper(model)
    groups = _groups(model, wrapper)
    scheduler = LinearLR(wrapper, start_factor=0.1, by_epoch=False, end=10)
    seen = []
    for _ in range(12):
        lr = groups['decode_head.conv_seg.weight']['lr']
        seen.append(lr)
        for name, power in POWERS.items():
            assert groups['backbone.' + name]['lr'] == pytest.approx(lr * RATE ** power)
        scheduler.step()
    assert seen[0] == pytest.approx(0.01) and seen[-1] == pytest.approx(0.1)


@pytest.mark.parametrize('paramwise, message', [
    (dict(decay_rate=0), r"'decay_rate' in \(0, 1\].*got 0"),
    (dict(decay_rate=1.5), r"'decay_rate' in \(0, 1\].*got 1.5"),
    (dict(decay_rate=None), r"'decay_rate' in \(0, 1\].*got None"),
    (dict(decay_type='layer'), "'block', 'stage', got 'layer'"),
    (dict(backbone_lr_mult=-1), 'backbone_lr_mult must be a number that is not negative, got -1'),
    (dict(optimizer=dict(type='SGD')), "'lr' of the optimizer.*SGD"),
])
def test_errors_say_what_is_allowed(paramwise, message):
    with pytest.raises(ValueError, match=message):
        _wrapper(nn.Linear(1, 1), **paramwise)


def test_a_model_without_a_san_is_an_error():
    with pytest.raises(ValueError, match='expects a model with a SANBackbone, got a Sequential.*DefaultOptim'):
        _wrapper(nn.Sequential(nn.Linear(1, 1)))
