"""The timm models: registration, names, features, counts, tracing, import."""
import copy
import functools
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import san_backbones
from san_backbones import SAN, ops
from san_backbones.activations import ReLU
from san_backbones.attention import PairwiseAttention, PatchwiseAttention
from san_backbones.count import count_multiply_adds, count_parameters
from san_backbones.san import Block, checkpoint_filter_fn
from tests import oracle

# Zhao, Jia, Koltun, CVPR 2020: exact parameters of the released models; multiply-adds of linear maps and aggregation
# in G; the paper's own count in G
TABLE = {
    'san10_pairwise': (10_531_848, 2.044, 2.2),
    'san10_patchwise': (11_841_124, 1.791, 1.9),
    'san15_pairwise': (14_065_436, 2.859, 3.0),
    'san15_patchwise': (16_181_310, 2.478, 2.6),
    'san19_pairwise': (17_596_156, 3.636, 3.8),
    'san19_patchwise': (20_518_470, 3.130, 3.3),
}


@pytest.mark.parametrize('name', TABLE)
def test_size_is_the_papers(name):
    model = timm.create_model(name, device='meta')
    parameters, multiply_adds, paper = TABLE[name]
    assert count_parameters(model) == parameters
    assert round(count_multiply_adds(model) / 1e9, 3) == multiply_adds
    assert round(count_multiply_adds(model, paper=True) / 1e9, 1) == paper


def test_multiply_adds_of_what_is_no_san():
    for model in (timm.create_model('resnet10t'), timm.create_model('test_san_pairwise', features_only=True), None):
        with pytest.raises(TypeError, match=f'expected a SAN, got a {type(model).__name__}: a model .* features_only'):
            count_multiply_adds(model)


@pytest.mark.parametrize('size', [0, -1, (64, 0), '64', 64.])
def test_multiply_adds_of_no_size(size):
    with pytest.raises(ValueError, match='image_size must be'):
        count_multiply_adds(timm.create_model('test_san_pairwise'), size)


def test_multiply_adds_agree_with_a_count_of_the_executed_operators():
    from torch.utils.flop_counter import FlopCounterMode
    model = timm.create_model('test_san_patchwise').eval()
    with FlopCounterMode(display=False) as counter, ops.use_backend('reference'), torch.no_grad():
        model(torch.randn(1, 3, 96, 64))
    aggregation = 0
    for stage, (height, width) in zip(model.stages, [(48, 32), (24, 16), (12, 8), (6, 4), (3, 2)]):
        attention = stage.blocks[0].attn
        aggregation += attention.out_planes * attention.kernel_size ** 2 * height * width
    assert count_multiply_adds(model, (96, 64)) == counter.get_total_flops() // 2 + aggregation


@pytest.mark.parametrize('size', ['10', '15', '19'])
def test_short_names_are_the_patchwise_models(size):
    short, long = (timm.create_model(name, device='meta') for name in (f'san{size}', f'san{size}_patchwise'))
    assert short.state_dict().keys() == long.state_dict().keys()
    assert all(isinstance(b.attn, PatchwiseAttention) for stage in short.stages for b in stage.blocks)


def test_registered_names_and_cfgs():
    names = timm.list_models(module='san')
    assert set(names) == {*TABLE, 'san10', 'san15', 'san19', 'test_san_pairwise', 'test_san_patchwise'}
    cfg = timm.create_model('san15_patchwise.in1k', device='meta').default_cfg
    assert cfg['paper_ids'] == 'arXiv:2004.13621' and cfg['tag'] == 'in1k'
    # the released models' evaluation: resize 256 bilinear, centre crop 224
    assert cfg['interpolation'] == 'bilinear' and cfg['crop_pct'] == 224 / 256
    for name in names:
        if name.startswith('test_'):
            assert count_parameters(timm.create_model(name, device='meta')) < 500_000


@pytest.mark.parametrize('name', ['san15_pairwise', 'san15_patchwise'])
@pytest.mark.parametrize('size', [(511, 383), (33, 33)])
def test_features_of_odd_sizes(name, size):
    model = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4), device='meta').eval()
    assert model.feature_info.channels() == [256, 512, 1024, 2048]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    features = model(torch.empty(1, 3, *size, device='meta'))
    assert [tuple(f.shape) for f in features] == [
        (1, c, size[0] // s, size[1] // s) for c, s in zip([256, 512, 1024, 2048], [4, 8, 16, 32])]


def test_unknown_model_and_keyword():
    with pytest.raises(RuntimeError, match='san99'):
        timm.create_model('san99_pairwise')
    with pytest.raises(TypeError, match='kernels'):
        timm.create_model('san10', kernels=3)


@pytest.mark.parametrize('kwargs, message', [
    (dict(attention='global'), "one of 'pairwise', 'patchwise', got 'global'"),
    (dict(attention='pairwise', relation='star'), "'subtraction'.*got 'star'"),
    (dict(attention='patchwise', relation='subtraction'), "'clique'.*got 'subtraction'"),
    (dict(attention='pairwise', position='learned'), "'relative'.*got 'learned'"),
    (dict(kernel_sizes=4), 'odd.*got 4'),
    (dict(kernel_sizes=(3, 7)), 'each of the 5 stages'),
    (dict(widths=(64, 64.0, 64, 64, 64)), 'widths.*one integer for each of the 5 stages'),
    (dict(kernel_sizes=7.0), 'each of the 5 stages.*got 7.0'),
    (dict(depths=()), 'depths'),
    (dict(in_chans=0), 'in_chans.*got 0'),
    (dict(drop_path_rate=1.5), 'drop_path_rate.*got 1.5'),
    (dict(drop_path_rate=1), 'drop_path_rate.*got 1'),
    (dict(attention='patchwise', position='garbage'), "'relative'.*got 'garbage'"),
    (dict(position_ref_size='224'), "at least 64.*got '224'"),
    (dict(widths=(48, 64, 64, 64, 64)), 'multiple of 32'),
    (dict(output_stride=64), '8, 16 or 32, got 64'),
    (dict(position_ref_size=32), 'at least 64'),
])
def test_bad_options_say_what_is_allowed(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SAN(**kwargs)


def test_bad_images():
    model = timm.create_model('test_san_patchwise')
    with pytest.raises(ValueError, match=r'\(N, 3, H, W\).*\[1, 1, 64, 64\]'):
        model(torch.randn(1, 1, 64, 64))
    with pytest.raises(ValueError, match='at least one pixel, got 0 x 5'):
        model(torch.empty(1, 3, 0, 5))
    with pytest.raises(ValueError, match=r'got \[3, 64, 64\]'):
        model(torch.randn(3, 64, 64))


def test_a_reference_map_of_one_pixel():
    with pytest.raises(ValueError, match='at least 2 pixels, got 1'):
        PairwiseAttention(32, position_ref_size=1)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('pool, width', [('avg', 128), ('catavgmax', 256), ('', 128)])
def test_another_head(pool, width, dtype):
    """In the model's dtype, on its device and in its mode; as wide as what it pools."""
    for options in ({}, dict(num_classes=0)):
        model = timm.create_model('test_san_patchwise', global_pool=pool, **options).eval().to(dtype)
        assert model.head_hidden_size == width
        model.reset_classifier(5, 'max')
        assert model.head_hidden_size == 128 and model.num_classes == 5
        model.reset_classifier(7, pool)
        assert model.head_hidden_size == width and model.get_classifier().weight.dtype == dtype
        assert not any(module.training for module in model.modules())
        if pool:
            assert model(torch.randn(2, 3, 32, 32).to(dtype)).shape == (2, 7)
            pooled = model.forward_head(model.forward_features(torch.randn(2, 3, 32, 32).to(dtype)), pre_logits=True)
            assert pooled.shape == (2, width)
        model.train().reset_classifier(0)
        assert all(module.training for module in model.modules()) and model.head.global_pool.pool_type == pool
    assert timm.create_model('test_san_patchwise', device='meta').reset_classifier(3) is None


def test_what_pruning_leaves():
    model, image = timm.create_model('test_san_pairwise', num_classes=5).eval(), torch.randn(1, 3, 64, 64)
    whole, features = model.forward_intermediates(image)
    last, one = model.forward_intermediates(image, indices=[1], stop_early=True)
    assert torch.equal(last, features[1]) and len(one) == 1 and torch.equal(one[0], features[1])
    assert torch.equal(model.forward_intermediates(image, indices=[1])[0], whole)
    assert model.prune_intermediate_layers([1, 2], prune_head=False) == [1, 2]
    assert len(model.stages) == 3 and model.num_features == model.head_hidden_size == 64
    assert model.num_classes == 0 and isinstance(model.get_classifier(), nn.Identity)  # it was made for what is gone
    assert torch.equal(model.forward_features(image), features[2])
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 64, 1, 1)  # 8 pixels are enough now
    model.reset_classifier(3, 'avg')
    assert model(image).shape == (1, 3)


def _frozen_norms(layer):
    from torchvision.ops import FrozenBatchNorm2d
    mlp = layer.weight_mlp
    mlp.norm1, mlp.norm2 = (FrozenBatchNorm2d(norm.num_features, eps=0.7) for norm in (mlp.norm1, mlp.norm2))


CHANGES_OF_GAMMA = {
    'activation': lambda layer: setattr(layer.weight_mlp, 'act1', nn.GELU()),
    'a layer more': lambda layer: layer.weight_mlp.append(nn.Tanh()),
    'no bias': lambda layer: setattr(layer.weight_mlp.fc2, 'bias', None),
    'frozen norms with their eps': _frozen_norms,
    'statistics not tracked': lambda layer: setattr(layer.train().weight_mlp.norm1, 'track_running_stats', False),
}


@pytest.mark.parametrize('change', CHANGES_OF_GAMMA)
def test_what_gamma_is_made_of_counts(change):
    """On every path."""
    torch.manual_seed(0)
    layer, x = PatchwiseAttention(64, kernel_size=3).eval(), torch.randn(2, 64, 5, 6)
    mlp = layer.weight_mlp
    nn.init.uniform_(mlp.fc2.bias)
    CHANGES_OF_GAMMA[change](layer)
    with torch.no_grad():
        pad = ops.padding(3, 1)
        query, key, value = layer.query(x), layer.key(x), ops.reflect_pad(layer.value(x), pad)
        relation = ops.reference.relate(query, ops.reflect_pad(key, pad), None, None, *layer.spec())
        h = copy.deepcopy(mlp)(relation.flatten(3)).unflatten(3, (5, 6))
        expected = ops.reference.aggregate(h, value, False, 3, 1)
        for path in ops.available_backends():
            other = copy.deepcopy(layer)
            with ops.use_backend(path):
                torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
            if change == 'statistics not tracked':
                assert torch.equal(other.weight_mlp.norm1.running_mean, mlp.norm1.running_mean)


@pytest.mark.parametrize('name', ['weight_mlp.fc1', 'weight_mlp.fc2', 'query'])
@pytest.mark.parametrize('kind', ['forward', 'forward_pre', 'full_backward', 'full_backward_pre'])
def test_hooks_are_called(name, kind):
    layer, calls = PairwiseAttention(64, kernel_size=3), []
    getattr(layer.get_submodule(name), f'register_{kind}_hook')(lambda *arguments: calls.append(1))
    layer(torch.randn(2, 64, 4, 5, requires_grad=True)).sum().backward()
    assert calls == [1]


def test_a_compiled_step_recomputes_blocks():
    torch.manual_seed(0)
    model, image = timm.create_model('test_san_pairwise', num_classes=3), torch.randn(2, 3, 64, 64)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    model(image).square().sum().backward()
    torch.compile(other, backend='aot_eager')(image).square().sum().backward()
    for p, q in zip(model.parameters(), other.parameters()):
        assert (p.grad - q.grad).norm() < 1e-2 * p.grad.norm() + 1e-4


def test_options_reach_the_layers():
    model = SAN('pairwise', relation='hadamard', depths=(1, 1, 1, 2, 1), widths=(32, 32, 64, 64, 96), stem_width=24,
                kernel_sizes=(3, 5, 7, 9, 11), position='absolute', position_ref_size=128, output_stride=8,
                share_planes=4, in_chans=1, num_classes=3, drop_rate=0.25, drop_path_rate=0.5, global_pool='max')
    layers = [block.attn for stage in model.stages for block in stage.blocks]
    assert all(isinstance(layer, PairwiseAttention) and layer.relation == 'hadamard' for layer in layers)
    assert [layer.kernel_size for layer in layers] == [3, 5, 7, 9, 9, 11]
    assert [layer.dilation for layer in layers] == [1, 1, 1, 2, 2, 4]
    assert [layer.position_ref_size for layer in layers] == [64, 32, 16, 8, 8, 4]
    assert {layer.position_mode for layer in layers} == {'absolute'} and {layer.share_planes for layer in layers} == {4}
    assert model.stem.conv.weight.shape == (24, 1, 1, 1)
    assert model.head.fc.out_features == 3 and model.head.drop.p == 0.25
    assert model.head.global_pool.pool_type == 'max'
    rates = [getattr(block.drop_path, 'drop_prob', 0.) for stage in model.stages for block in stage.blocks]
    assert rates == sorted(rates) and rates[0] == 0 and rates[-1] == 0.5 and len({*rates}) == len(rates)
    assert [info['reduction'] for info in model.feature_info] == [2, 4, 8, 8, 8]
    assert model(torch.randn(2, 1, 32, 40)).shape == (2, 3)


def test_fusing_norms_by_registration_order_keeps_the_features():
    """mmcv's fuse_conv_bn folds a norm into the convolution registered before it."""
    fuse_conv_bn = pytest.importorskip('mmcv.cnn').fuse_conv_bn
    torch.manual_seed(0)
    model = timm.create_model('test_san_pairwise')
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 64, 64))
        image = torch.randn(1, 3, 64, 64)
        expected = model.eval().forward_features(image)
        torch.testing.assert_close(fuse_conv_bn(model).forward_features(image), expected, rtol=1e-3, atol=1e-4)


def test_averaged_weights_are_preferred():
    model = timm.create_model('test_san_pairwise')
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    wrapped = {'state_dict': state, 'state_dict_ema': model.state_dict()}
    assert torch.equal(checkpoint_filter_fn(wrapped)['stem.conv.weight'], model.stem.conv.weight)


def test_checkpoint_filter_keeps_our_own_names():
    state = timm.create_model('test_san_pairwise').state_dict()
    assert checkpoint_filter_fn(state).keys() == state.keys()
    assert checkpoint_filter_fn({'model': {'module.' + k: v for k, v in state.items()}}).keys() == state.keys()


@pytest.mark.parametrize('module_prefix', [True, False])
def test_released_checkpoint_by_path(module_prefix, tmp_path):
    """`checkpoint_path` hands timm's loader the authors' names; features_only and load_state_dict take them too."""
    state = oracle.random_state('san10_patchwise', seed=0, dtype=torch.float32)
    torch.save(oracle.released_checkpoint(state, module_prefix=module_prefix), tmp_path / 'model_best.pth')
    model = timm.create_model('san10_patchwise', checkpoint_path=str(tmp_path / 'model_best.pth'))
    assert torch.equal(model.stages[3].blocks[2].attn.weight_mlp.fc2.weight, state['layer3.2.sam.conv_w.5.weight'])
    overlay = dict(file=str(tmp_path / 'model_best.pth'))
    features = timm.create_model('san10_patchwise', pretrained=True, pretrained_cfg_overlay=overlay,
                                 features_only=True, in_chans=1)
    torch.testing.assert_close(features.stem.conv.weight, state['conv_in.weight'].sum(1, keepdim=True))


def test_mismatched_checkpoint_is_an_error(tmp_path):
    torch.save(timm.create_model('test_san_pairwise').state_dict(), tmp_path / 'other.pth')
    with pytest.raises(RuntimeError, match='attn.position'):
        timm.create_model('test_san_patchwise', checkpoint_path=str(tmp_path / 'other.pth'))


CONVOLUTIONS = ('query', 'key', 'value', 'position', 'weight_mlp.fc1', 'weight_mlp.fc2')


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_pruned_layers_learn(name):
    torch.manual_seed(0)
    layer = PairwiseAttention(64, kernel_size=3)
    pruned = layer.get_submodule(name)
    prune.l1_unstructured(pruned, 'weight', 0.5)
    optimizer, before = torch.optim.SGD(layer.parameters(), 0.1), pruned.weight_orig.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(2, 64, 6, 6)).square().sum().backward()
        optimizer.step()
    moved = pruned.weight_orig != before
    assert moved.any() and not (moved & (pruned.weight_mask == 0)).any()


class Adapter(nn.Module):
    """A layer with another beside it, as adapters of low rank are put in; it shows what the layer itself has."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.beside = layer, nn.Conv2d(layer.in_channels, layer.out_channels, 1, bias=False)

    def forward(self, x):
        return self.layer(x) + self.beside(x)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('layer'), name)


class Doubled(nn.Conv2d):
    """Weights that are made of others in the function that `forward` calls."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('kind', ['adapter', 'subclass'])
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_layers_that_are_more_than_a_convolution(name, kind, autocast):
    torch.manual_seed(0)
    layer = PairwiseAttention(64, kernel_size=3).eval()
    merged = copy.deepcopy(layer)
    conv, parent = layer.get_submodule(name), layer.get_submodule(name.rpartition('.')[0])
    if kind == 'adapter':
        other = Adapter(conv)
        merged.get_submodule(name).weight.data += other.beside.weight.data
    else:
        other = Doubled(conv.in_channels, conv.out_channels, 1, bias=conv.bias is not None)
        other.load_state_dict(conv.state_dict())
        merged.get_submodule(name).weight.data *= 2
    setattr(parent, name.rpartition('.')[2], other)
    x = torch.randn(2, 64, 6, 6)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        bound = 0.03 if autocast and name != 'position' else 1e-5  # coordinates are not rounded
        expected = merged(x)
        assert (layer(x) - expected).norm() < bound * expected.norm()
        parent._modules[name.rpartition('.')[2]] = conv
        assert (layer(x) - expected).norm() > 0.003 * expected.norm()


def test_set_grad_checkpointing_recomputes_blocks():
    torch.manual_seed(0)
    model = timm.create_model('test_san_patchwise').train()
    image = torch.randn(2, 3, 64, 64)
    calls = []
    model.stages[1].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(calls) == 1 + 2
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('features', [False, True])
@pytest.mark.parametrize('name', ['test_san_pairwise', 'test_san_patchwise'])
def test_several_backward_passes_under_recomputation(name, features):
    """Each computes the blocks again, with equal gradients; norms count each batch once."""
    torch.manual_seed(0)
    model = timm.create_model(name, **(dict(features_only=True) if features else dict(num_classes=2))).train()
    image, found = torch.rand(2, 3, 64, 64), []
    for enable, computed in ((False, 5), (True, 17 if features else 20)):
        again, calls = copy.deepcopy(model), []
        again.set_grad_checkpointing(enable)
        for block in again.modules():
            if isinstance(block, Block):
                block.register_forward_pre_hook(lambda *_: calls.append(1))
        for _ in range(2):
            output = again(image)
            a, b = (output[-1].square().mean(), output[1].mean()) if features else output.sum(0)
            a.backward(retain_graph=True)
            b.backward(retain_graph=True)
            (a + b).backward()
        assert len(calls) == 2 * computed
        found.append(again)
    for p, q in zip(*(model.parameters() for model in found)):
        assert (p.grad - q.grad).norm() <= 1e-4 * (1 + p.grad.norm())
    for (key, p), q in zip(found[0].named_buffers(), found[1].buffers()):
        torch.testing.assert_close(p, q, msg=key)
        assert not key.endswith('tracked') or int(p) == 2


def test_features_stop_recomputing():
    model, calls = timm.create_model('test_san_pairwise', features_only=True).train(), []
    model.stages_3.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable, count in ((True, 2), (False, 1)):
        model.set_grad_checkpointing(enable)
        calls.clear()
        model(torch.rand(2, 3, 64, 64))[-1].sum().backward()
        assert len(calls) == count


def _keeping(kept):
    """Contexts of a selective activation checkpoint that keeps the outputs of some operators; all, where None."""
    def policy(context, operator, *arguments, **named):
        return CheckpointPolicy.MUST_SAVE if kept is None or operator in kept else CheckpointPolicy.PREFER_RECOMPUTE
    return functools.partial(create_selective_checkpoint_contexts, policy)


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.seen.add(function)
        return function(*arguments, **(named or {}))


# what writes, is there to be written to, or, in resnet18 as well, is written over by timm's head; tiles also write into
# slices of a map, and of a kept slice torch writes into the map of before, in any program
NOT_KEPT = ('add_', 'copy_', 'mul_', 'new_empty', 'as_strided_', 'mean')


@pytest.mark.parametrize('path', ['auto', 'tiled', 'reference'])
@pytest.mark.parametrize('name', ['test_san_pairwise', 'test_san_patchwise'])
def test_selective_checkpoints_may_keep_any_operator(name, path):
    torch.manual_seed(0)
    model, image = timm.create_model(name, num_classes=3).train(), torch.rand(2, 3, 64, 64)
    with ops.use_backend(path):
        with _Operators() as operators:
            model(image)
        plain = copy.deepcopy(model)
        plain(image).square().sum().backward()
        kept = [{operator} for operator in sorted(operators.seen, key=str)
                if operator.__name__.partition('.')[0] not in (*NOT_KEPT, *(['slice'] if path == 'tiled' else []))]
        assert {torch.ops.aten.convolution.default} in kept
        for operators in (*kept, set.union(*kept)):
            again = copy.deepcopy(model)
            output = checkpoint(again, image, use_reentrant=False, context_fn=_keeping(operators))
            output.square().sum().backward()
            for p, q in zip(plain.parameters(), again.parameters()):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=str(operators))


@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
def test_relus_in_place(attention):
    """Where gradients are off, they all write over what comes in; elsewhere none does."""
    model = SAN(attention, depths=(1,), widths=(32,), kernel_sizes=3, stem_width=16, num_classes=0)
    relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    assert len(relus) == 6
    for relu in relus:
        x = torch.randn(20)
        assert torch.equal(relu(x), x.clamp(min=0)) and x.min() < 0
        with torch.no_grad():
            assert relu(x) is x and x.min() == 0


def test_group_matcher_orders_the_layers():
    from timm.models._manipulate import group_parameters
    model = timm.create_model('san10', device='meta')
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    order = [groups[name] for name in (
        'stem.conv.weight', 'stages.0.blocks.0.norm1.weight', 'stages.0.blocks.1.conv.weight', 'stages.1.conv.weight',
        'stages.3.blocks.3.attn.key.weight', 'stages.4.blocks.0.norm1.weight')]
    assert order == sorted(order) and len(set(order)) == len(order)
    assert groups['stages.3.norm.weight'] == groups['stages.3.blocks.3.conv.weight']
    assert set(groups) == {name for name, _ in model.named_parameters()}


class TestTracing:
    """What looks at the program instead of running it sees the definition, and gets the same numbers."""

    @pytest.fixture(params=['test_san_pairwise', 'test_san_patchwise'])
    def model(self, request):
        torch.manual_seed(0)
        return timm.create_model(request.param).eval()

    image = torch.randn(2, 3, 65, 80, generator=torch.Generator().manual_seed(0))

    def _same(self, model, traced, image=image):
        with torch.no_grad():
            torch.testing.assert_close(traced(image), model(image), rtol=1e-4, atol=1e-5)

    @pytest.mark.filterwarnings('ignore')
    def test_script(self, model):
        scripted = torch.jit.script(model)
        self._same(model, scripted)
        self._same(model, scripted, torch.randn(1, 3, 33, 40))

    def test_symbolic_trace_keeps_any_size_and_the_mode(self, model):
        traced = torch.fx.symbolic_trace(copy.deepcopy(model))
        self._same(model, traced, torch.randn(1, 3, 33, 40))
        running_mean = traced.get_submodule('stages.0.blocks.0.attn.weight_mlp.norm1').running_mean
        before = running_mean.clone()
        traced.train()(self.image)
        assert not torch.equal(before, running_mean)

    def test_export(self, model):
        self._same(model, torch.export.export(model, (self.image,)).module())

    @pytest.mark.parametrize('backend', ['auto', 'reference'])
    def test_compile_needs_no_graph_break(self, model, backend):
        torch.compiler.reset()
        with ops.use_backend(backend):
            self._same(model, torch.compile(model, fullgraph=True, backend='aot_eager'))

    @pytest.mark.parametrize('backend, dtype', [
        ('auto', torch.float32), ('auto', torch.float64), ('reference', torch.float64)])
    @pytest.mark.parametrize('training', [False, True])
    def test_compiled_gradients(self, model, training, backend, dtype):
        torch.compiler.reset()
        model.train(training).to(dtype)
        for block in model.modules():
            # a pair of a pixel with itself has a difference of 0: with a bias of 0 it would lie on the edge of the ReLU
            if hasattr(block, 'weight_mlp'):
                nn.init.uniform_(block.weight_mlp.norm1.bias, 0.1, 0.3)
        rounded = training and dtype == torch.float32
        runs = copy.deepcopy(model), torch.compile(copy.deepcopy(model), fullgraph=True, backend='aot_eager')
        errors = []
        for seed in range(3 if rounded else 1):
            image, results = torch.randn(2, 3, 65, 80, generator=torch.Generator().manual_seed(seed), dtype=dtype), []
            for run in runs:
                run.zero_grad()
                with ops.use_backend(backend):
                    run(image).square().mean().backward()
                results.append([p.grad for p in run.parameters()] + [b.clone() for b in run.buffers() if b.dim()])
            largest = max(expected.norm() for expected in results[0])
            errors.append(max((actual - expected).norm() / max(expected.norm(), 0.01 * largest)
                              for expected, actual in zip(*results)))
            if not training and dtype == torch.float32:
                for expected, actual in zip(*results):
                    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
        # rounding of batch statistics may move a value to the other side of a ReLU with one picture, not with all
        assert min(errors) < (1e-9 if dtype == torch.float64 else 0.01)

    def test_what_a_compiled_graph_calls(self, model):
        """The compiled loops where they are, unless told otherwise; an exported program never does."""
        def called(backend):
            torch.compiler.reset()
            graphs = []

            def keep(graph, inputs):
                graphs.append(graph)
                return graph

            with ops.use_backend(backend), torch.no_grad():
                torch.compile(model, fullgraph=True, backend=keep)(self.image)
            return any('san_backbones' in str(node.target) for graph in graphs for node in graph.graph.nodes)

        assert called('auto') == ('native' in ops.available_backends())
        assert not called('reference')
        exported = torch.export.export(model, (self.image,))
        assert not any('san_backbones' in str(node.target) for node in exported.graph.nodes)

    @pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a C++ compiler on the CPU')
    @pytest.mark.parametrize('backend', ['auto', 'reference'])
    def test_inductor(self, model, backend):
        if backend == 'reference' and torch.__version__.startswith(('2.5.', '2.6.')):
            pytest.skip("the inductor of torch 2.5 and 2.6 fails with: 'int' object has no attribute 'find', 'count'")
        torch.compiler.reset()
        layer = model.stages[1].blocks[0].attn
        x = torch.randn(2, layer.dim, 9, 12)
        with ops.use_backend(backend), torch.no_grad():
            torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.skipif(not hasattr(torch.export.Dim, 'DYNAMIC'), reason='torch 2.4 and 2.5 have no Dim.DYNAMIC')
    def test_export_with_any_size(self, model, export_keeps_parity):
        dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
        exported = torch.export.export(model, (self.image,), dynamic_shapes=(dynamic,)).module()
        # torch's guards want two pixels a side at the end
        sizes = ((1, 3, 129, 112), (3, 3, 65, 208)) if export_keeps_parity else \
            ((1, 3, 64, 64), (3, 3, 101, 78), (2, 3, 65, 200))
        for size in sizes:
            image = torch.randn(size)
            torch.testing.assert_close(exported(image), model(image), rtol=1e-4, atol=1e-5)

    def test_meta(self, model):
        assert model.to('meta')(torch.empty(2, 3, 64, 64, device='meta')).shape == (2, model.num_classes)


def test_import_needs_no_extra_and_adds_little():
    code = (
        'import sys, time, timm\n'
        'start = time.perf_counter(); import san_backbones; seconds = time.perf_counter() - start\n'
        'extra = {"mmengine", "mmcv", "mmdet", "mmseg", "triton"} & {m.split(".")[0] for m in sys.modules}\n'
        'import torch; extra -= {"triton"} if "triton" in torch_modules else set()\n'
        'print(seconds, *sorted(extra))\n')
    # torch's counter of operations, for which the operators bring formulas, loads Triton in some versions
    code = code.replace('import sys, time, timm\n', 'import sys, time, timm\nimport torch.utils.flop_counter\n'
                        'torch_modules = set(sys.modules)\n')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1'})
    seconds, *extra = result.stdout.split()
    assert not extra
    assert float(seconds) < 1, 'gross check only: the measurement is in the README'


def test_version():
    from importlib.metadata import version
    assert san_backbones.__version__ == version('san-backbones')


@pytest.mark.parametrize('norm_layer', [
    lambda channels: nn.GroupNorm(1, channels), functools.partial(nn.GroupNorm, 1), 'frozenbatchnorm2d',
    torchvision.ops.FrozenBatchNorm2d])
@pytest.mark.parametrize('form', ['pairwise', 'patchwise'])
def test_norms_of_nothing_but_channels(form, norm_layer):
    options = dict(depths=(1,), widths=(32,), kernel_sizes=(3,), num_classes=3, norm_layer=norm_layer)
    for dtype in (None, torch.float64):
        model = SAN(form, dtype=dtype, **options)
        assert {x.dtype for x in model.state_dict().values()} == {dtype or torch.float32}
        assert model(torch.rand(2, 3, 8, 8, dtype=dtype)).dtype == (dtype or torch.float32)
    assert {x.device.type for x in SAN(form, device='meta', **options).parameters()} == {'meta'}


@pytest.mark.parametrize('options, kinds', [
    (dict(norm_layer='batchnorm2d'), {nn.BatchNorm2d}),
    (dict(norm_layer='groupnorm1'), {timm.layers.GroupNorm1}),
    (dict(norm_layer='layernorm2d'), {timm.layers.LayerNorm2d}),
    (dict(act_layer='gelu'), {nn.BatchNorm2d, type(timm.layers.create_act_layer('gelu', inplace=True))}),
    (dict(act_layer='relu', norm_layer='batchnorm2d'), {nn.BatchNorm2d, ReLU}),
])
def test_layers_by_timms_names(options, kinds, tmp_path):
    """In the whole network, and through timm's folder of a model and its options."""
    torch.manual_seed(0)
    model = timm.create_model('test_san_pairwise', num_classes=4, **options).eval()
    found = [type(module) for module in model.modules()]
    assert kinds <= set(found)
    norms, acts = (sum(name.split('.')[-1].startswith(kind) for name, _ in model.named_modules())
                   for kind in ('norm', 'act'))
    assert norms == acts == 5 * 5 + 1
    if 'norm_layer' in options and nn.BatchNorm2d not in kinds:
        assert nn.BatchNorm2d not in found and sum(kind in kinds for kind in found) == norms
    if 'gelu' in options.values():
        assert nn.ReLU not in found and sum(kind in kinds - {nn.BatchNorm2d} for kind in found) == acts
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(image)
    timm.models.save_for_hf(model, tmp_path, model_args=options)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(image), expected)


def test_activations_are_those_asked_for():
    """Against the modules that a user would put in their place."""
    torch.manual_seed(0)
    model = timm.create_model('test_san_patchwise', num_classes=4, relu_bound=0).eval()
    other = timm.create_model('test_san_patchwise', num_classes=4, act_layer=nn.Tanh).eval()
    other.load_state_dict(model.state_dict())
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Tanh())
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(other(image), model(image))
    assert not any(isinstance(module, nn.ReLU) for module in other.modules())
