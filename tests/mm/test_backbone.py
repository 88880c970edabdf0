"""SANBackbone: shapes, freezing, norms, checkpoints and arguments."""
import shutil

import pytest

pytest.importorskip('mmengine', reason='needs the mm extra')

import timm
import torch
from mmengine.config import ConfigDict
from mmengine.model import PretrainedInit
from mmengine.registry import MODELS
from safetensors.torch import save_file
from torch import nn

import san_backbones.mm  # noqa: F401
from san_backbones.mm import SANBackbone
from san_backbones.norms import SyncBatchNorm

SMALL = dict(attention='patchwise', depths=(1, 2, 1, 1, 1), widths=(32, 32, 64, 64, 96), stem_width=16)


def small(**kwargs):
    torch.manual_seed(0)
    return SANBackbone(**{'arch': SMALL, **kwargs})


def test_registered_in_the_root_registry():
    backbone = MODELS.build(dict(type='SANBackbone', arch=SMALL))
    assert isinstance(backbone, SANBackbone)
    mmdet = pytest.importorskip('mmdet.registry')
    assert mmdet.MODELS.get('SANBackbone') is SANBackbone


@pytest.mark.parametrize('arch', ['san10_pairwise', 'san15_patchwise', 'san19_pairwise'])
def test_shares_parameters_with_timm(arch):
    model = timm.create_model(arch, num_classes=0)
    backbone = SANBackbone(arch, position_ref_size=None)
    assert backbone.state_dict().keys() == model.state_dict().keys()
    backbone.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 65, 97)
    features = model.eval().forward_intermediates(image, indices=[1, 2, 3, 4], intermediates_only=True)
    for ours, theirs in zip(backbone.eval()(image), features):
        torch.testing.assert_close(ours, theirs)


def test_pretrained_of_a_segmentor(tmp_path):
    """EncoderDecoder gives its own `pretrained` to the backbone, which is the init_cfg of older configs."""
    mmseg = pytest.importorskip('mmseg.registry')
    weights = {name: x + 1 if x.is_floating_point() else x for name, x in small().state_dict().items()}
    torch.save(weights, tmp_path / 'weights.pth')
    head = dict(type='FCNHead', in_channels=SMALL['widths'][4], channels=4, in_index=3, num_classes=2,
                num_convs=1, loss_decode=dict(type='CrossEntropyLoss'))
    segmentor = ConfigDict(type='EncoderDecoder', pretrained=str(tmp_path / 'weights.pth'), decode_head=head,
                           backbone=dict(type='SANBackbone', arch=SMALL))
    model = mmseg.MODELS.build(segmentor)
    model.init_weights()
    for name, weight in model.backbone.state_dict().items():
        torch.testing.assert_close(weight, weights[name])
    segmentor.backbone = dict(type='SANBackbone', arch=SMALL, init_cfg=dict(type='Pretrained', checkpoint='other.pth'))
    with pytest.raises(ValueError, match='two ways to name weights.*model.pretrained=None'):
        mmseg.MODELS.build(segmentor)


@pytest.mark.parametrize('out_indices', [(0,), (1, 2, 3, 4), (0, 2)])
def test_out_indices(out_indices):
    backbone = small(out_indices=out_indices)
    outputs = backbone(torch.randn(2, 3, 64, 96))
    assert [tuple(o.shape) for o in outputs] == [
        (2, SMALL['widths'][i], 64 // 2 ** (i + 1), 96 // 2 ** (i + 1)) for i in out_indices]
    assert backbone.out_channels == tuple(SMALL['widths'][i] for i in out_indices)
    sum(o.sum() for o in outputs).backward()
    assert all(p.grad is not None for p in backbone.parameters()), 'unused parameters break DDP'


@pytest.mark.parametrize('frozen_stages', [-1, 0, 2, 5])
def test_frozen_stages_survive_train(frozen_stages):
    backbone = small(frozen_stages=frozen_stages)
    backbone.train()
    frozen = [] if frozen_stages < 0 else [backbone.stem, *backbone.stages[:frozen_stages]]
    learning = [m for m in (backbone.stem, *backbone.stages) if not any(m is f for f in frozen)]
    assert not any(p.requires_grad for m in frozen for p in m.parameters())
    assert all(p.requires_grad for m in learning for p in m.parameters())
    statistics = {name: buffer for name, buffer in backbone.named_buffers() if not name.endswith('.bound')}
    before = {name: buffer.clone() for name, buffer in statistics.items()}
    outputs = backbone(torch.randn(2, 3, 64, 64))
    if learning:
        sum(o.sum() for o in outputs).backward()
    kept = {f'stages.{i}' for i in range(max(frozen_stages, 0))} | ({'stem'} if frozen_stages >= 0 else set())
    for name, buffer in statistics.items():
        part = '.'.join(name.split('.')[:2]) if name.startswith('stages') else 'stem'
        assert torch.equal(buffer, before[name]) == (part in kept), name
    assert all(p.grad is None for m in frozen for p in m.parameters())


@pytest.mark.parametrize('frozen', [dict(frozen_stages=0), dict(norm_eval=True), {}])
def test_freezing_random_weights_is_said(frozen, monkeypatch):
    from mmengine.logging import MMLogger
    said = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'warning', said.append)
    SANBackbone(SMALL, **frozen).init_weights()
    assert len(said) == bool(frozen) and all('frozen_stages=-1 and norm_eval=False' in line for line in said)


@pytest.mark.parametrize('given', [{}, dict(zero_init_last=True), dict(zero_init_last=False)])
def test_zero_init_last(given, zero_init_last):
    backbone = small(**given)
    assert backbone.stages[0].blocks[0].conv.weight.any() != given.get('zero_init_last', True)
    assert backbone.stages[0].conv.weight.any()


def test_norm_eval_keeps_statistics_and_learns():
    backbone = small(norm_eval=True).train()
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    sum(o.sum() for o in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in backbone.named_buffers())
    assert backbone.stem.norm.weight.grad is not None
    assert small(norm_eval=False).train().stem.norm.training is not False


def test_norm_cfg():
    pytest.importorskip('mmcv')
    backbone = small(norm_cfg=dict(type='SyncBN', requires_grad=False))
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, (nn.SyncBatchNorm, SyncBatchNorm)) for m in norms)
    assert backbone.stages[0].blocks[0].attn.gamma_is_plain(), 'SyncBN must not fall back to the k x k path'
    assert not any(p.requires_grad for m in norms for p in m.parameters())
    for groups in (0, -4, 2.5, None):
        with pytest.raises(ValueError, match=f"GN.*num_groups.*{groups}.*use dict\\(type='BN'\\)"):
            small(norm_cfg=dict(type='GN', num_groups=groups))
    for name in ('LN', 'BN1d', 'Foo'):
        with pytest.raises(ValueError, match=f"{name}.*use dict\\(type='BN'\\)"):
            small(norm_cfg=dict(type=name))
    with pytest.raises(TypeError, match='norm_cfg'):
        small(norm_cfg='BN')


@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
def test_group_norm(attention):
    """The requested number of groups if it divides the channels, else the largest smaller one that does."""
    pytest.importorskip('mmcv')
    widths = (96, 32, 64, 64, 160)
    backbone = small(arch=dict(SMALL, attention=attention, widths=widths), norm_cfg=dict(type='GN', num_groups=32))
    norms = [m for m in backbone.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == sum('norm' in name.rpartition('.')[2] for name, _ in backbone.named_modules())
    largest = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 8: 8, 10: 10, 12: 12, 16: 16, 20: 20, 24: 24, 40: 20, 60: 30, 32: 32,
               64: 32, 96: 32, 100: 25, 160: 32, 300: 30, 200: 25, 500: 25}
    assert all(norm.num_groups == largest[norm.num_channels] for norm in norms), \
        {norm.num_channels: norm.num_groups for norm in norms}
    outputs = backbone.train()(torch.randn(2, 3, 64, 64))
    sum(o.square().mean() for o in outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


@pytest.mark.parametrize('norm_eval', [False, True])
@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
def test_with_cp_has_equal_outputs_gradients_and_buffers(attention, norm_eval):
    image = torch.randn(2, 3, 64, 64)
    results = []
    for with_cp in (False, True):
        backbone = small(arch=dict(SMALL, attention=attention), with_cp=with_cp, norm_eval=norm_eval).train()
        assert [stage.grad_checkpointing for stage in backbone.stages] == [with_cp] * 5
        own = [id(buffer) for buffer in backbone.buffers()]
        outputs = backbone(image)
        outputs[-1].mean().backward(retain_graph=True)
        sum(o.square().mean() for o in outputs).backward()
        assert [id(buffer) for buffer in backbone.buffers()] == own
        results.append((outputs, [p.grad for p in backbone.parameters()], list(backbone.buffers())))
    for plain, checkpointed in zip(*results):
        for a, b in zip(plain, checkpointed, strict=True):
            torch.testing.assert_close(a, b)
    assert all(int(b) == int(not norm_eval) for name, b in backbone.named_buffers() if name.endswith('_tracked'))


def test_output_stride_and_position_ref_size():
    backbone = small(output_stride=8)
    assert [o.shape[-1] for o in backbone(torch.randn(2, 3, 64, 64))] == [16, 8, 8, 8]
    pairwise = dict(SMALL, attention='pairwise')
    image = torch.randn(1, 3, 96, 128)
    fixed = SANBackbone(pairwise, position_ref_size=224).eval()
    released = SANBackbone(pairwise, position_ref_size=None).eval()
    released.load_state_dict(fixed.state_dict())
    assert not torch.allclose(fixed(image)[0], released(image)[0])


@pytest.mark.parametrize('wrong, message', [
    (dict(arch='san50'), 'san15_patchwise'),
    (dict(arch=dict(depth=3)), 'depths'),
    (dict(arch=dict(SMALL, attention='global')), 'pairwise'),
    (dict(out_indices=(1, 5)), '0 to 4'),
    (dict(out_indices=()), '0 to 4'),
    (dict(out_indices=(3, 1)), 'increasing'),
    (dict(frozen_stages=6), '-1'),
    (dict(output_stride=4), '8, 16 or 32'),
    (dict(position_ref_size=32), '64'),
])
def test_bad_arguments_say_what_is_allowed(wrong, message):
    with pytest.raises(ValueError, match=message):
        small(**wrong)


def test_bad_images():
    with pytest.raises(ValueError, match=r'\(N, 3, H, W\).*\[1, 4, 64, 64\]'):
        small()(torch.randn(1, 4, 64, 64))
    with pytest.raises(ValueError, match='at least one pixel, got 0 x 64'):
        small()(torch.randn(1, 3, 0, 64))


class TestPretrained:
    """`init_cfg=dict(type='Pretrained', checkpoint=...)` loads everything or says what does not fit."""

    def _load(self, checkpoint, **kwargs):
        prefix = kwargs.pop('prefix', None)
        init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint), **({'prefix': prefix} if prefix else {}))
        backbone = SANBackbone(**{'arch': SMALL, 'init_cfg': init_cfg, **kwargs})
        backbone.init_weights()
        return backbone

    @pytest.fixture
    def model(self):
        return timm.create_model('test_san_patchwise', num_classes=7, **{k: v for k, v in SMALL.items()
                                                                          if k != 'attention'})

    @pytest.mark.parametrize('form', ['plain', 'wrapped', 'module', 'safetensors', 'detector', 'prefix'])
    def test_loads(self, model, form, tmp_path):
        state = model.state_dict()
        path, prefix = tmp_path / 'weights.pth', None
        if form == 'safetensors':
            path = tmp_path / 'weights.safetensors'
            save_file(state, path)
        else:
            content = {
                'plain': state,
                'wrapped': {'state_dict': state, 'epoch': 3},
                'module': {'module.' + k: v for k, v in state.items()},
                'detector': {'state_dict': {**{'backbone.' + k: v for k, v in state.items()}, 'neck.w': torch.ones(1)}},
                'prefix': {'teacher.' + k: v for k, v in state.items()},
            }[form]
            prefix = 'teacher.' if form == 'prefix' else None
            torch.save(content, path)
        backbone = self._load(path, prefix=prefix)
        for name, tensor in backbone.state_dict().items():
            assert torch.equal(tensor, state[name]), name

    def test_loads_into_a_backbone_with_fewer_stages(self, model, tmp_path):
        torch.save(model.state_dict(), tmp_path / 'weights.pth')
        assert len(self._load(tmp_path / 'weights.pth', out_indices=(0, 2)).stages) == 3

    def test_another_architecture_is_an_error(self, tmp_path):
        torch.save(timm.create_model('test_san_pairwise').state_dict(), tmp_path / 'other.pth')
        with pytest.raises(RuntimeError, match='other.pth.*missing.*wrong shape.*unexpected.*attn.position'):
            self._load(tmp_path / 'other.pth')

    def test_a_wrong_prefix_is_an_error(self, model, tmp_path):
        torch.save({'encoder.' + k: v for k, v in model.state_dict().items()}, tmp_path / 'weights.pth')
        with pytest.raises(RuntimeError, match='missing.*stem.conv.weight'):
            self._load(tmp_path / 'weights.pth')

    @pytest.mark.parametrize('kind', [PretrainedInit, 'mmengine.Pretrained',
                                      'mmengine.model.weight_init.PretrainedInit'])
    def test_other_names_of_the_initialiser(self, kind, model, tmp_path, monkeypatch):
        """Configs in pure Python name the class: a detector's file loads, its stem is adapted, nothing is warned of."""
        from mmengine.logging import MMLogger
        said = []
        monkeypatch.setattr(MMLogger.get_current_instance(), 'warning', said.append)
        torch.save({'backbone.' + k: v for k, v in model.state_dict().items()}, tmp_path / 'detector.pth')
        backbone = SANBackbone(SMALL, in_channels=1, frozen_stages=1, init_cfg=dict(
            type=kind, checkpoint=str(tmp_path / 'detector.pth')))
        backbone.init_weights()
        torch.testing.assert_close(backbone.stem.conv.weight, model.stem.conv.weight.sum(1, keepdim=True))
        assert torch.equal(backbone.stages[-1].conv.weight, model.stages[4].conv.weight) and not said

    @pytest.mark.parametrize('init_cfg', ['weights.pth', [None], ['weights.pth']])
    def test_what_is_no_init_cfg(self, init_cfg):
        with pytest.raises(TypeError, match="init_cfg must be a dict with a 'type'.*got .*(None|weights)"):
            SANBackbone(SMALL, init_cfg=init_cfg).init_weights()

    def test_a_bound_for_another_activation(self, model, tmp_path):
        torch.save(model.state_dict(), tmp_path / 'weights.pth')
        backbone = self._load(tmp_path / 'weights.pth', arch=dict(SMALL, act_layer='gelu'))
        assert torch.equal(backbone.stages[4].conv.weight, model.stages[4].conv.weight)

    def test_pretrained_in_a_list_of_inits(self, model, tmp_path):
        state = {'backbone.' + k: v for k, v in model.state_dict().items()}
        torch.save(state, tmp_path / 'detector.pth')
        backbone = SANBackbone(SMALL, init_cfg=[
            dict(type='Constant', layer='Conv2d', val=0.5),
            dict(type='Pretrained', checkpoint=str(tmp_path / 'detector.pth'))])
        backbone.init_weights()
        assert torch.equal(backbone.stem.conv.weight, model.stem.conv.weight)
        backbone = SANBackbone(SMALL, init_cfg=[
            dict(type='Pretrained', checkpoint=str(tmp_path / 'detector.pth'), prefix='student')])
        with pytest.raises(RuntimeError, match='detector.pth.*missing'):
            backbone.init_weights()

    @pytest.mark.parametrize('content, error, message', [
        (None, FileNotFoundError, 'weights.pth.*does not exist'),
        (b'not a checkpoint', RuntimeError, 'weights.pth.*cannot be read'),
        ([torch.ones(1)], TypeError, 'weights.pth.*holds a list'),
    ])
    def test_an_unreadable_file_is_an_error_that_names_it(self, content, error, message, tmp_path):
        if isinstance(content, bytes):
            (tmp_path / 'weights.pth').write_bytes(content)
        elif content is not None:
            torch.save(content, tmp_path / 'weights.pth')
        with pytest.raises(error, match=message):
            self._load(tmp_path / 'weights.pth')

    def test_no_file_named_is_an_error(self):
        with pytest.raises(ValueError, match="needs a 'checkpoint'"):
            SANBackbone(SMALL, init_cfg=dict(type='Pretrained', checkpoint=None)).init_weights()


@pytest.mark.parametrize('in_channels', [1, 4, 6])
def test_weights_of_three_channels_serve_others(in_channels, tmp_path, monkeypatch):
    """As in timm, and with a line in the log."""
    from mmengine.logging import MMLogger
    said = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'info', said.append)
    torch.manual_seed(0)
    path = tmp_path / 'three.pth'
    torch.save(timm.create_model('test_san_patchwise', num_classes=2).state_dict(), path)
    model = timm.create_model('test_san_patchwise', num_classes=2, in_chans=in_channels, pretrained=True,
                              pretrained_cfg_overlay=dict(file=str(path), num_classes=2, hf_hub_id=None)).eval()
    arch = dict(attention='patchwise', depths=(1,) * 5, widths=(32, 64, 64, 96, 128), stem_width=16)
    backbone = SANBackbone(arch, in_channels=in_channels, init_cfg=dict(type='Pretrained', checkpoint=str(path))).eval()
    backbone.init_weights()
    assert torch.equal(backbone.stem.conv.weight, model.stem.conv.weight)
    image = torch.randn(1, in_channels, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(image)[-1], model.forward_features(image))
    assert sum(f'adapted to {in_channels}' in line for line in said) == 1


def test_weights_of_three_channels_as_they_are(tmp_path, monkeypatch):
    from mmengine.logging import MMLogger
    said = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'info', said.append)
    path = tmp_path / 'backbone.pth'
    torch.save(small(in_channels=3).state_dict(), path)
    small(init_cfg=dict(type='Pretrained', checkpoint=str(path))).init_weights()
    assert not any('adapted' in line for line in said)
    torch.save(small(in_channels=4).state_dict(), path)
    with pytest.raises(RuntimeError, match=r'stem.conv.weight \[16, 4, 1, 1\] instead of \[16, 3, 1, 1\]'):
        small(init_cfg=dict(type='Pretrained', checkpoint=str(path))).init_weights()


@pytest.mark.parametrize('model, ref, told', [
    ('san10_pairwise', 224, True), ('san10_pairwise', 64, False), ('san10_pairwise', None, False),
    ('san10_patchwise', 224, False)])
@pytest.mark.parametrize('by', ['name', 'folder', 'file'])
def test_positions_of_the_size_that_weights_learnt_at(model, ref, told, by, tmp_path, monkeypatch):
    """The pairwise form's coordinates, of a backbone that is built for 224 pixels; the patchwise form has none."""
    from mmengine.logging import MMLogger

    from san_backbones import hub
    said = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'warning', said.append)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    file = hub.weights(f'san-backbones/{model}.distilled')
    if by == 'file':
        file = shutil.copy(file, tmp_path / f'{model}.distilled.safetensors')
    checkpoint = f'hf-hub:san-backbones/{model}.distilled' if by == 'name' else str(file)
    SANBackbone(model, position_ref_size=ref, init_cfg=dict(
        type='Pretrained', checkpoint=checkpoint)).init_weights()
    assert [line for line in said if 'position_ref_size' in line] == [
        f'SANBackbone: {checkpoint} learnt at 64 pixels, and position_ref_size=224 gives its coordinates another step; '
        'set position_ref_size=64'] * told


@pytest.mark.parametrize('model', ['san10_patchwise', 'san10_pairwise'])
def test_distilled_weights_by_name(model, monkeypatch):
    """They ship: `init_cfg` finds them offline, with their bound."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    backbone = SANBackbone(model, relu_bound=None, position_ref_size=None, init_cfg=dict(
        type='Pretrained', checkpoint=f'hf-hub:san-backbones/{model}.distilled')).eval()
    backbone.init_weights()
    expected = timm.create_model(f'{model}.distilled', pretrained=True).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(image)[-1], expected.forward_features(image))
