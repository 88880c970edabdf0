"""What tools do to layers: parametrise, prune, hook, quantise. Nothing of that may be passed by or done twice."""
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from san_backbones import SAN, ops

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
