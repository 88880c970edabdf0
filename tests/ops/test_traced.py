"""The traced form against the definition, in float64."""
import copy

import pytest
import torch

from san_backbones import PairwiseAttention, PatchwiseAttention, ops
from san_backbones.ops import reference, traced

SIZES = ((1, 32, 6, 9), (3, 32, 1, 4), (2, 32, 11, 2), (1, 32, 1, 1), (1, 32, 2, 20))
LAYERS = [
    *(PairwiseAttention(32, relation=relation, position=position, kernel_size=kernel_size, dilation=dilation,
                        position_ref_size=ref)
      for relation, position, kernel_size, dilation, ref in (
          ('subtraction', 'relative', 7, 1, None), ('subtraction', 'absolute', 3, 2, None),
          ('summation', 'none', 5, 1, None), ('summation', 'relative', 3, 3, 8), ('hadamard', 'absolute', 5, 1, 8),
          ('concatenation', 'relative', 5, 2, 8), ('dot', 'relative', 5, 1, None), ('dot', 'none', 1, 1, None))),
    *(PatchwiseAttention(32, relation=relation, kernel_size=kernel_size, dilation=dilation)
      for relation, kernel_size, dilation in (('concatenation', 7, 1), ('concatenation', 3, 2), ('star', 5, 1),
                                              ('clique', 3, 2)))]
every_layer = pytest.mark.parametrize(
    'layer', LAYERS, ids=lambda x: f'{x.relation}-{x.position_mode}-{x.kernel_size}-{x.dilation}')


def maps(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def settled(layer):
    """In float64 and eval mode, with norms away from where they begin."""
    layer = copy.deepcopy(layer).double().eval()
    for seed, module in enumerate(layer.modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)).double() + 0.5
    return layer


def projected(layer, x):
    return layer.query(x), layer.key(x), layer.value(x), layer.place(x)


@every_layer
@pytest.mark.parametrize('known', [True, False], ids=['sizes known', 'sizes open'])
def test_the_definitions_result(layer, known, monkeypatch):
    if not known:
        monkeypatch.setattr(traced, 'is_known', lambda size: False)
    layer = settled(layer)
    with torch.no_grad():
        for size in SIZES:
            inputs = (*projected(layer, maps(*size)), layer.gamma(), layer.spec())
            torch.testing.assert_close(traced.attend(*inputs), reference.attend(*inputs))


@every_layer
def test_torch_jit(layer):
    """Traced at one size and scripted: right at all, maps of one pixel among them."""
    layer = settled(layer)
    with torch.no_grad():
        programs = torch.jit.trace(layer, maps(2, 32, 6, 9), check_trace=False), torch.jit.script(layer)
        for size in SIZES:
            with ops.use_backend('reference'):
                expected = layer(maps(*size))
            for program in programs:
                torch.testing.assert_close(program(maps(*size)), expected)


@pytest.mark.parametrize('form', [PairwiseAttention, PatchwiseAttention])
def test_what_is_traced(form):
    """Five axes at most; nothing as large as the footprints of the value; no index where sizes are known."""
    layer = form(32, kernel_size=7).eval()
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(1, 32, 12, 12),), strict=False)
    shapes = [node.meta['val'].shape for node in program.graph.nodes if hasattr(node.meta.get('val'), 'shape')]
    assert max(map(len, shapes)) == 5
    channels = layer.weight_mlp.norm1.num_features * (49 if form is PairwiseAttention else 1)
    channels = max(channels, layer.weight_mlp.fc2.out_channels, layer.out_planes * 7 * 18 // 12)
    assert max(shape.numel() for shape in shapes) <= channels * 144 < layer.out_planes * 49 * 144
    called = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert not {name for name in called for word in ('index', 'unfold', 'remainder', 'div.Tensor_m') if word in name}


def test_gradients():
    layer = settled(LAYERS[0])
    x = maps(1, 32, 5, 4).requires_grad_()
    inputs = (*projected(layer, x), layer.gamma(), layer.spec())
    expected, = torch.autograd.grad(reference.attend(*inputs).square().sum(), x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(traced.attend(*inputs).square().sum(), x)[0], expected)


@pytest.mark.parametrize('pad', [0, 1, 2, 4, 9, 15])
@pytest.mark.parametrize('size', [(1, 1), (1, 3), (2, 5), (8, 1), (9, 6)])
def test_both_ways_to_pad(size, pad):
    x = maps(2, 3, *size)
    expected = ops.reflect_pad(x, pad)
    assert torch.equal(traced.reflect_pad(x, pad), expected)
    assert torch.equal(x.index_select(2, traced.reflected(x, 2, pad)).index_select(3, traced.reflected(x, 3, pad)),
                       expected)
