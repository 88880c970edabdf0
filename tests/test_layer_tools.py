"""What tools do to layers: parametrise, prune, hook, quantise. Nothing of that may be passed by or done twice."""
import copy
import sys
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from san_backbones import SAN, PairwiseAttention, PatchwiseAttention, ops
from san_backbones.count import count_multiply_adds
from san_backbones.pruning import prunable, prune_inputs, prune_outputs

SMALL = dict(depths=(1, 1), widths=(32, 64), kernel_sizes=(3, 5), stem_width=16, num_classes=5)
ATTENTIONS = ['pairwise', 'patchwise']


def _model(attention, **kwargs):
    torch.manual_seed(0)
    return SAN(attention, **{**SMALL, **kwargs})


# --- Parametrisations

class Counted(nn.Module):
    """Counts how often a parameter is computed."""

    def __init__(self, name, counts):
        super().__init__()
        self.name, self.counts = name, counts

    def forward(self, x):
        self.counts[self.name] += 1
        return x.clone()


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('backend', [*ops.available_backends(), 'by modules'])
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_parametrised_tensors_are_computed_once(attention, backend, training):
    model, counts = _model(attention).train(training), Counter()
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        owner, _, tensor = name.rpartition('.')
        parametrize.register_parametrization(model.get_submodule(owner), tensor, Counted(name, counts))
    if backend == 'by modules':
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
    counts.clear()
    with ops.use_backend('auto' if backend == 'by modules' else backend):
        model(torch.randn(2, 3, 16, 12)).sum().backward()
    assert counts == dict.fromkeys(names, 1)


def test_spectral_norm_takes_one_step():
    """As many power iterations as where every layer is called."""
    models = [_model('pairwise').train() for _ in range(2)]
    for model in models:
        torch.manual_seed(1)
        for module in list(model.modules()):
            if type(module) is nn.Conv2d:
                parametrizations.spectral_norm(module)
    for module in models[1].modules():
        module.register_forward_hook(lambda *_: None)
    image = torch.randn(2, 3, 16, 12)
    for model in models:
        model(image)
    vectors = [{name: x for name, x in model.named_buffers() if name.endswith(('_u', '_v'))} for model in models]
    assert len(vectors[0]) == 2 * 17
    for name, x in vectors[0].items():
        torch.testing.assert_close(x, vectors[1][name], msg=name)


# --- Quantisation of exported programs

def _trained_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
                                      (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2.)):
                nn.init.uniform_(tensor, low, high)
    return model.eval()


def _relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize('depths', [(1,), (2, 1)])
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_no_exported_norm_shares_its_convolution(attention, depths):
    """Tools fold a norm into the convolution that it reads, and some do not ask who else reads it."""
    model = _model(attention, depths=depths, widths=(32, 64)[:len(depths)], kernel_sizes=3).eval()
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),))
    for graph in (program.module().graph, program.run_decompositions().graph):
        norms = [node for node in graph.nodes if 'batch_norm' in str(node.target)]
        assert len(norms) >= 1 + 5 * len(depths)
        for norm in norms:
            read = norm.args[0]
            assert 'conv' not in str(read.target) or len(read.users) == 1, f'{norm} and others read {read}'


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_pt2e_quantisation(attention):
    quantize = pytest.importorskip('torchao.quantization.pt2e.quantize_pt2e')
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    model = _trained_norms(_model(attention, depths=(1,), widths=(32,), kernel_sizes=3))
    images = [torch.randn(1, 3, 16, 16) for _ in range(2)]
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = quantize.prepare_pt2e(torch.export.export(model, (images[0],)).module(), quantizer)
        assert _relative(prepared(images[0]), model(images[0])) < 1e-4
        for image in images:
            prepared(image)
        assert _relative(quantize.convert_pt2e(prepared)(images[0]), model(images[0])) < 0.03


# --- Process-wide hooks

@contextmanager
def _everywhere():
    """Modules whose calls a process-wide hook sees."""
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_process_wide_hooks_see_every_module(attention, training, fused):
    model = _model(attention).train(training)
    if fused:
        model.fuse_for_inference()
    image = torch.randn(2, 3, 16, 12)
    with torch.no_grad():
        before = model(image)  # which leaves a fold
        with _everywhere() as seen:
            by_modules = model(image)
        after = model(image)
        assert {name for name, module in model.named_modules() if module not in seen} <= {'head.drop'}
        assert not any(len(list(module.children())) == 0 and seen.count(module) != 1 for module in seen)
        torch.testing.assert_close(by_modules, before, rtol=1e-3, atol=1e-4)
        assert training or torch.equal(after, before)


@pytest.mark.parametrize('register', [
    nn.modules.module.register_module_forward_pre_hook, nn.modules.module.register_module_full_backward_hook,
    nn.modules.module.register_module_full_backward_pre_hook])
def test_other_process_wide_hooks(register):
    layer, seen = PairwiseAttention(32, kernel_size=3).eval(), []
    for module in layer.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # torch's backward hooks take no other
    handle = register(lambda module, *_: seen.append(module))
    try:
        layer(torch.randn(2, 32, 6, 5, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert not {name for name, module in layer.named_modules() if module not in seen}


@pytest.mark.parametrize('change, convolutions', [('none', 1), ('hook', 3), ('no bias', 3), ('compiled', 3)])
def test_projections_are_one_convolution(change, convolutions, monkeypatch):
    layer, x = PatchwiseAttention(32, kernel_size=3).eval(), torch.randn(2, 32, 6, 5)
    expected = layer(x)
    if change == 'hook':
        layer.key.register_forward_hook(lambda *_: None)
    elif change == 'no bias':
        layer.query.bias.data.zero_()
        expected, layer.query.bias = layer(x), None
    elif change == 'compiled':
        monkeypatch.setattr(ops, 'symbolic_caller', lambda x: 'torch.compile')
    calls, plain = [], nn.functional.conv2d
    monkeypatch.setattr(nn.functional, 'conv2d', lambda *given: calls.append(given) or plain(*given))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == convolutions


def test_what_counts_operations_leaves_the_fast_paths():
    from torch.utils.module_tracker import ModuleTracker
    layer = _model('patchwise').stages[0].blocks[0].attn
    with ModuleTracker():
        assert layer.gamma_is_plain()
    with _everywhere():
        assert not layer.gamma_is_plain()


# --- Structured pruning

def _cut(tensor, axis, kept):
    return nn.Parameter(tensor.detach().index_select(axis, torch.tensor(kept)))


def _prune_stream(stage, kept):
    """Removes channels of a stage's maps, as tools for structured pruning do: tensors and the convolutions' widths."""
    norms = [stage.norm, *(block.norm1 for block in stage.blocks)]
    writers = [stage.conv, *(block.conv for block in stage.blocks)]
    readers = [conv for block in stage.blocks for conv in (block.attn.query, block.attn.key, block.attn.value)]
    for norm in norms:
        norm.weight, norm.bias, norm.num_features = _cut(norm.weight, 0, kept), _cut(norm.bias, 0, kept), len(kept)
        norm.running_mean, norm.running_var = norm.running_mean[kept], norm.running_var[kept]
    for conv in writers:
        conv.weight, conv.out_channels = _cut(conv.weight, 0, kept), len(kept)
        if conv.bias is not None:
            conv.bias = _cut(conv.bias, 0, kept)
    for conv in readers:
        conv.weight, conv.in_channels = _cut(conv.weight, 1, kept), len(kept)


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_pruned_networks_run_train_and_fold(attention):
    """As one in which what is pruned is zero, and as what a user would build of that width."""
    image, kept = torch.randn(2, 3, 16, 12), [c for c in range(64) if c % 3]
    full = _trained_norms(_model(attention, depths=(2,), widths=(64,), kernel_sizes=3, num_classes=0, global_pool=''))
    pruned = copy.deepcopy(full)
    _prune_stream(pruned.stages[0], kept)
    gone = [c for c in range(64) if c not in kept]
    with torch.no_grad():
        for block in full.stages[0].blocks:
            for conv in (block.attn.query, block.attn.key, block.attn.value):
                conv.weight[:, gone] = 0
        expected = full(image)[:, kept]
        for model in (pruned, copy.deepcopy(pruned).fuse_for_inference(), torch.jit.script(pruned),
                      torch.jit.trace(pruned, image)):
            torch.testing.assert_close(model(image), expected, rtol=1e-3, atol=1e-4)
    attn = pruned.stages[0].blocks[0].attn
    assert (attn.dim, attn.rel_planes, attn.out_planes) == (len(kept), 4, 16)
    assert count_multiply_adds(pruned, (16, 12)) < count_multiply_adds(full, (16, 12))
    pruned.train()(image).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in pruned.parameters())
    with pytest.raises(ValueError, match=f'expected a map of shape .N, {len(kept)}, H, W.'):
        attn(torch.randn(1, 64, 4, 4))


def _attention(attention, relation):
    torch.manual_seed(0)
    layer = {'pairwise': PairwiseAttention, 'patchwise': PatchwiseAttention}[attention](
        64, relation=relation, kernel_size=3, share_planes=4).eval()
    for name, buffer in layer.named_buffers():
        if 'running' in name:
            buffer.uniform_(0.5, 1.5)
    return layer


@pytest.mark.parametrize('attention, relation', [
    *[('pairwise', relation) for relation in ops.PAIRWISE_RELATIONS],
    *[('patchwise', relation) for relation in ops.PATCHWISE_RELATIONS]])
def test_pruned_attention(attention, relation):
    """Outputs are those that were kept; an input that is gone is one that is zero."""
    layer, x = _attention(attention, relation), torch.randn(2, 64, 6, 5)
    kept_out = [c for c in range(16) if c % 4 not in (0, 3)]  # 4 weights, shared by channels 4 apart
    kept_in = [c for c in range(64) if c % 5]
    with torch.no_grad():
        expected = layer(x)[:, kept_out]
        pruned = prune_outputs(copy.deepcopy(layer), [c for c in range(16) if c % 4 in (0, 3)])
        torch.testing.assert_close(pruned(x), expected)
        assert pruned.out_planes == 8 and pruned.weight_mlp.fc2.out_channels == layer.weight_mlp.fc2.out_channels // 2
        without = x.clone()
        without[:, ::5] = 0
        expected = layer(without)
        torch.testing.assert_close(prune_inputs(layer, range(0, 64, 5))(x[:, kept_in]), expected)
        assert layer.dim == len(kept_in)


def test_channels_that_share_a_weight_go_together():
    with pytest.raises(ValueError, match='share a weight are 4 apart, 4 of them, and go together; got .1, 2, 5. of 16'):
        prune_outputs(_attention('pairwise', 'subtraction'), [5, 1, 2])


@pytest.mark.parametrize('attention, relation', [('pairwise', 'subtraction'), ('patchwise', 'concatenation')])
@pytest.mark.parametrize('prune, channels, what', [(prune_inputs, 64, 'input'), (prune_outputs, 16, 'output')])
def test_channels_that_are_not_there(attention, relation, prune, channels, what):
    layer = _attention(attention, relation)
    for indices in ([-1], [channels], [channels + i for i in range(0, 16, 4)]):
        with pytest.raises(ValueError, match=f'expected {what} channels from 0 to {channels - 1}, got {indices[0]}'):
            prune(layer, indices)
    with pytest.raises(ValueError, match=f'got all {channels} {what} channels'):
        prune(layer, range(channels))
    for indices in ([0.5], ['1']):
        with pytest.raises(TypeError, match='integer'):
            prune(layer, indices)
    assert layer.dim == 64 and layer.out_planes == 16
    prune_inputs(layer, torch.tensor([1, 2]))
    assert layer.dim == 62


def test_pruning_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_pruning', None)
    with pytest.raises(ImportError, match='pip install torch-pruning'), prunable(_model('pairwise')):
        pass


@pytest.mark.parametrize('inside', [True, False])
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_torch_pruning_of_a_whole_network(attention, inside):
    pruning = pytest.importorskip('torch_pruning')
    options = dict(widths=(64, 128), kernel_sizes=7)
    model, image = _model(attention, **options).eval(), torch.randn(2, 3, 32, 32)
    with prunable(model) as options_of_pruner:
        pruner = pruning.pruner.MagnitudePruner(
            model, image, importance=pruning.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
            ignored_layers=[model.head.fc], **options_of_pruner)
        if inside:
            pruner.step()
    if inside:
        assert model.num_features == 64 and [info['num_chs'] for info in model.feature_info] == [32, 64]
    else:
        with torch.no_grad():
            torch.testing.assert_close(model(image), _model(attention, **options).eval()(image))  # not yet
        pruner.step()
    layers = [stage.blocks[0].attn for stage in model.stages]
    assert [(layer.dim, layer.out_planes) for layer in layers] == [(32, 8), (64, 16)]
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(model).fuse_for_inference()(image), model(image), rtol=1e-3, atol=1e-4)
    model.train()(image).sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_what_says_widths_after_pruning(attention):
    model = _model(attention, widths=(64, 128), kernel_sizes=3).eval()
    _prune_stream(model.stages[1], list(range(0, 128, 2)))
    model.reset_classifier(7)
    assert model.num_features == model.head_hidden_size == 64
    assert [info['num_chs'] for info in model.feature_info] == [64, 64]
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_torch_pruning(attention):
    pruning = pytest.importorskip('torch_pruning')
    model, image = _model(attention, widths=(64, 128), kernel_sizes=3).eval(), torch.randn(2, 3, 32, 32)
    inner = [conv for layer in model.modules() if isinstance(layer, (PairwiseAttention, PatchwiseAttention))
             for conv in layer.modules() if isinstance(conv, nn.Conv2d)]
    pruner = pruning.pruner.MagnitudePruner(
        model, image, importance=pruning.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=[model.head.fc, *inner])
    pruner.step()
    assert model.stages[1].conv.weight.shape == (64, 32, 1, 1) and model.stem.conv.weight.shape[0] == 8
    with torch.no_grad():
        expected = model(image)
        torch.testing.assert_close(copy.deepcopy(model).fuse_for_inference()(image), expected, rtol=1e-3, atol=1e-4)
    model.train()(image).sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
