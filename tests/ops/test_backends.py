"""The choice of a path, and that paths agree in what is particular to them: tiles, statistics, precision."""
import copy
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from san_backbones import PairwiseAttention, PatchwiseAttention, ops
from san_backbones.ops import backends, tiled
from san_backbones.ops.gamma import normalise


def _layers(**kwargs):
    torch.manual_seed(0)
    layers = PairwiseAttention(64, kernel_size=5, **kwargs), PatchwiseAttention(64, kernel_size=5, **kwargs)
    for layer in layers:  # with zero biases an offset of 0 sits on the kink of the ReLU: rounding picks its gradient
        for norm in (layer.weight_mlp.norm1, layer.weight_mlp.norm2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    return layers


def _request(**kwargs):
    request = backends.Request(ops.Spec(True, 'subtraction', 'relative', 7, 1), torch.device('cpu'), torch.float32,
                               (1, 64, 8, 8), False, False, None)
    return request._replace(**kwargs)


class _Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that an operator makes."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize('cls, relation', [
    (cls, relation) for cls in (PairwiseAttention, PatchwiseAttention) for relation in cls.relations])
def test_no_tensor_is_larger_than_a_tile(cls, relation, monkeypatch):
    monkeypatch.setattr(tiled, 'TILE_ELEMENTS', 1 << 16)
    layer = cls(64, rel_planes=12, out_planes=8, kernel_size=5, relation=relation).eval()
    for size in ((1, 16, 16), (40, 3, 3)):
        with torch.no_grad(), ops.use_backend('tiled'), _Largest() as largest:
            layer(torch.zeros(size[0], 64, *size[1:]))
        assert 1 << 14 < largest.numbers <= 1 << 16


@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_tiles_of_a_part_of_a_batch(cls, monkeypatch):
    torch.manual_seed(0)
    layer, x = cls(64, kernel_size=3).eval(), torch.randn(2, 64, 4, 5)
    with torch.no_grad(), ops.use_backend('reference'):
        expected = layer(x)
    monkeypatch.setattr(tiled, 'TILE_ELEMENTS', 9 * 16 * 4 * 5)
    assert len([*tiled.tiles(2, 4, 5, 9 * 16, 2)]) == 2
    with torch.no_grad(), ops.use_backend('tiled'):
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize('cls, relation, bound', [
    (PairwiseAttention, 'dot', 0.015), (PairwiseAttention, 'subtraction', 0.02), (PatchwiseAttention, 'star', 0.01)])
def test_tiles_of_half_precision_sum_in_float32(cls, relation, bound, monkeypatch):
    """Statistics, and gradients of parameters over thousands of tiles."""
    monkeypatch.setattr(tiled, 'TILE_ELEMENTS', 1 << 11)
    torch.manual_seed(5)  # a draw whose gradients are not mostly rounding
    layer = cls(32, kernel_size=3, relation=relation).train()
    nn.init.constant_(layer.weight_mlp.norm2.bias, 3.)  # no ReLU's input rounds to the other side of 0
    if layer.is_pairwise:  # flat weights: sharp ones magnify the rounding of the maps, which is not looked at here
        layer.weight_mlp.fc2.weight.data.div_(4)
    x, exact = torch.randn(2, 32, 24, 30), copy.deepcopy(layer).double()
    exact(x.double()).square().sum().backward()
    layer.to(torch.bfloat16)
    for norm in (layer.weight_mlp.norm1, layer.weight_mlp.norm2):
        norm.float()
    with ops.use_backend('tiled'):
        layer(x.bfloat16()).square().sum().backward()
    for name in ('fc1', 'fc2'):
        found, expected = (m.get_submodule(f'weight_mlp.{name}').weight.grad.double() for m in (layer, exact))
        assert (found - expected).norm() < bound * expected.norm(), name
    mean, expected = layer.weight_mlp.norm1.running_mean.double(), exact.weight_mlp.norm1.running_mean
    assert (mean - expected).norm() < 0.01 * expected.norm()


def test_norms_of_half_precision_fold_in_float32():
    for dtype in (torch.float16, torch.bfloat16):
        tensors = [torch.rand(64).add(0.5).to(dtype) for _ in range(4)]
        weight, bias, mean, var = (x.double() for x in tensors)
        scale, shift = ops.fold(ops.Norm(*tensors, False, 0.1, 1e-5), *tensors[2:])
        expected = weight / (var + 1e-5).sqrt()
        torch.testing.assert_close(scale.double(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(shift.double(), bias - mean * expected, rtol=1e-5, atol=1e-6)


def test_a_norm_keeps_the_dtype_of_its_maps():
    norm = ops.Norm(torch.ones(4), torch.zeros(4), None, None, True, 0.1, 1e-5)
    assert normalise(torch.randn(2, 4, 3, 3).bfloat16(), norm).dtype == torch.bfloat16


@pytest.mark.parametrize('transform', ['vmap', 'jvp', 'dual numbers'])
@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_transforms_see_the_definition(cls, transform):
    torch.manual_seed(0)
    layer = cls(32, kernel_size=3).eval().requires_grad_(False).double()
    x, t = torch.randn(2, 3, 32, 4, 5).double()
    if transform == 'vmap':
        torch.testing.assert_close(torch.func.vmap(lambda one: layer(one[None])[0])(x), layer(x))
        return
    if transform == 'jvp':
        slope = torch.func.jvp(layer, (x,), (t,))[1]
    else:
        with torch.autograd.forward_ad.dual_level():
            slope = torch.autograd.forward_ad.unpack_dual(layer(torch.autograd.forward_ad.make_dual(x, t))).tangent
    torch.testing.assert_close(slope, (layer(x + 1e-6 * t) - layer(x - 1e-6 * t)) / 2e-6, rtol=1e-4, atol=1e-6)


def test_a_compiled_step_of_a_relation_without_statistics():
    torch.manual_seed(0)
    layer, x = PairwiseAttention(32, kernel_size=3, relation='dot').train(), torch.randn(2, 32, 5, 6)
    expected = copy.deepcopy(layer)(x)
    torch.testing.assert_close(torch.compile(layer, backend='aot_eager')(x), expected, rtol=1e-4, atol=1e-5)


def test_default_choice(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    assert ops.choose_backend(_request()).name == ops.available_backends()[0]
    assert ops.choose_backend(_request(symbolic='torch.export')).name == 'reference'
    assert set(ops.available_backends()) >= {'tiled', 'reference'}


def test_blocks_of_one_path_in_one_another(monkeypatch):
    with ops.use_backend('tiled'):
        with ops.use_backend('tiled'):
            pass
        assert ops.choose_backend(_request()).name == 'tiled'
        assert not ops.serves(torch.zeros(1))
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, '')
    assert ops.choose_backend(_request()).name == ops.available_backends()[0]


def test_a_path_asked_for_yields_where_a_tool_looks():
    with ops.use_backend('tiled'):
        assert ops.choose_backend(_request(symbolic='torch.export')).name == 'reference'


def test_environment_variable_and_context_manager(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, 'reference')
    assert ops.choose_backend(_request()).name == 'reference'
    with ops.use_backend('tiled'):
        assert ops.choose_backend(_request()).name == 'tiled'
        with ops.use_backend('reference'):
            assert ops.choose_backend(_request()).name == 'reference'
        assert ops.choose_backend(_request()).name == 'tiled'
    assert ops.choose_backend(_request()).name == 'reference'
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, 'cuda')
    with pytest.raises(ValueError, match="'cuda'.*SAN_BACKBONES_BACKEND.*'auto', .*'tiled', 'reference'"):
        ops.choose_backend(_request())
    with pytest.raises(ValueError, match="'fast'.*use_backend.*'tiled'"), ops.use_backend('fast'):
        pass


def test_a_path_that_cannot_run_says_why(monkeypatch, caplog):
    stubborn = backends.Backend('stubborn', lambda request: f'no {request.dtype} today', None)
    monkeypatch.setattr(backends, 'BACKENDS', (stubborn, *backends.BACKENDS))
    with pytest.raises(RuntimeError, match="'stubborn', asked for by .*use_backend.*no torch.float32 today"):
        with ops.use_backend('stubborn'):
            ops.choose_backend(_request())
    with caplog.at_level(logging.DEBUG, 'san_backbones.ops'):
        assert ops.choose_backend(_request(dtype=torch.float64)).name == 'tiled'
    assert 'stubborn refused: no torch.float64 today' in caplog.text and 'tiled chosen' in caplog.text


def test_the_choice_is_used(monkeypatch):
    used = []
    spies = tuple(b._replace(attend=lambda *a, b=b: (used.append(b.name), b.attend(*a))[1]) for b in backends.BACKENDS)
    monkeypatch.setattr(backends, 'BACKENDS', spies)
    layer, _ = _layers()
    for name in ('tiled', 'reference'):
        with ops.use_backend(name):
            layer(torch.randn(1, 64, 5, 6))
    assert used == ['tiled', 'reference']


@pytest.mark.parametrize('index', [0, 1], ids=['pairwise', 'patchwise'])
@pytest.mark.parametrize('elements', [1, 3_000, 50_000, 1 << 30])
def test_any_tile_size_gives_the_same(index, elements, monkeypatch):
    monkeypatch.setattr(tiled, 'TILE_ELEMENTS', elements)
    layer = _layers()[index].double().train()
    x = torch.randn(3, 64, 7, 9, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(3, 16, 7, 9, dtype=torch.float64)
    results = []
    for backend in ('reference', 'tiled'):
        layer.weight_mlp.norm1.reset_running_stats()
        layer.weight_mlp.norm2.reset_running_stats()
        with ops.use_backend(backend):
            output = layer(x)
            gradients = torch.autograd.grad(output, [x, *layer.parameters()], seed)
        results.append([output.detach(), *gradients, *(b.clone() for b in layer.buffers())])
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('index', [0, 1], ids=['pairwise', 'patchwise'])
def test_tiled_training_does_not_keep_the_footprint(index):
    """What autograd saves for a tiled layer is a small multiple of its maps, far below the k x k tensors."""
    def saved_bytes(backend):
        layer = _layers()[index].train()
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with ops.use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = layer(torch.randn(1, 64, 40, 40))
        assert output.requires_grad
        return sum(storages.values())

    maps = 4 * 40 * 40 * (64 + 4 + 4 + 16)
    footprint = 4 * 40 * 40 * 25 * 4  # one k x k tensor of the r relation channels
    assert saved_bytes('tiled') < 4 * maps
    assert saved_bytes('reference') > saved_bytes('tiled') + footprint


@pytest.mark.parametrize('index', [0, 1], ids=['pairwise', 'patchwise'])
def test_autocast_holds_in_the_backward_pass(index):
    layer = _layers()[index].eval()
    x = torch.randn(2, 64, 9, 9, requires_grad=True)
    gradients = {}
    for backend in ('reference', 'tiled'):
        with ops.use_backend(backend):
            with torch.autocast('cpu', torch.bfloat16):
                output = layer(x)
            assert output.dtype == torch.bfloat16
            gradients[backend], = torch.autograd.grad(output.float().square().sum(), x)
    exact, = torch.autograd.grad(layer(x).square().sum(), x)
    for gradient in gradients.values():
        assert (gradient - exact).norm() < 0.05 * exact.norm()


def _foreign(name):
    """A layer whose gamma is not what ops.Gamma describes."""
    norm_layer = nn.GroupNorm if name == 'group norm' else nn.BatchNorm2d
    layer = PairwiseAttention(32, kernel_size=3, norm_layer=lambda c, **dd: (
        nn.GroupNorm(1, c, **dd) if norm_layer is nn.GroupNorm else nn.BatchNorm2d(c, **dd)))
    mlp = layer.weight_mlp
    if name == 'bias':
        mlp.fc1 = nn.Conv2d(4, 2, 1, bias=True)
    elif name == 'replaced':
        mlp.fc2 = nn.Sequential(mlp.fc2, nn.Identity())
    elif name == 'own forward':
        mlp.fc2.forward = lambda x: 0 * nn.Conv2d.forward(mlp.fc2, x)
    elif name == 'hook on gamma':
        mlp.register_forward_hook(lambda module, inputs, output: 0 * output)
    elif name == 'backward hook':
        mlp.fc1.register_full_backward_pre_hook(lambda module, gradient: None)
    return layer


@pytest.mark.parametrize('name', ['group norm', 'bias', 'replaced', 'own forward', 'hook on gamma', 'backward hook'])
def test_what_gamma_cannot_describe_runs_as_modules(name):
    torch.manual_seed(0)
    layer = _foreign(name)
    if name == 'bias':
        layer.weight_mlp.norm2 = nn.BatchNorm2d(2)
        layer.weight_mlp.fc2 = nn.Conv2d(2, 1, 1)
    layer.double()  # phi, psi and beta as one convolution round otherwise than one by one
    assert not layer.gamma_is_plain()
    x = torch.randn(2, 32, 5, 5, dtype=torch.float64)
    expected = layer._forward_modules(layer.query(x), layer.key(x), layer.value(x), layer.place(x))
    output = layer(x)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-12)
    output.sum().backward()
    assert layer.query.weight.grad is not None


class CopiedFrozenBatchNorm2d(nn.Module):
    """As transformers' DETRs have it: buffers, and an epsilon that is no attribute."""

    def __init__(self, like):
        super().__init__()
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            self.register_buffer(name, getattr(like, name).detach().clone())

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


@pytest.mark.parametrize('index', [0, 1], ids=['pairwise', 'patchwise'])
def test_copies_of_the_frozen_batch_norm_run_on_every_path(index, monkeypatch):
    layer = _layers()[index].double()
    mlp = layer.weight_mlp
    for name in ('norm1', 'norm2'):
        norm = getattr(mlp, name)
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 1.5)
        setattr(mlp, name, CopiedFrozenBatchNorm2d(norm))
    x = torch.randn(2, 64, 6, 7, dtype=torch.float64)
    expected = layer._forward_modules(layer.query(x), layer.key(x), layer.value(x), layer.place(x))
    assert not layer.gamma_is_plain()  # a class of that name may compute anything
    monkeypatch.setattr(CopiedFrozenBatchNorm2d, '__module__', 'transformers.models.detr.modeling_detr')
    assert layer.gamma_is_plain()
    for backend in ('reference', 'tiled'):
        with ops.use_backend(backend):
            torch.testing.assert_close(layer(x), expected)
    mlp.norm1.register_parameter('gain', nn.Parameter(torch.ones(())))  # not what the name says
    assert not layer.gamma_is_plain()


@pytest.mark.parametrize('index', [0, 1], ids=['pairwise', 'patchwise'])
def test_norm_fused_into_the_linear_map_before_it(index):
    """mmcv's and torch's fusion leave an Identity behind and give fc1 a bias: still a plain gamma, equal output."""
    layer = _layers()[index].eval()
    x = torch.randn(2, 64, 6, 7)
    with torch.no_grad():
        expected = layer(x)
        mlp = layer.weight_mlp
        mlp.fc1 = torch.nn.utils.fusion.fuse_conv_bn_eval(mlp.fc1, mlp.norm2)
        mlp.norm2 = nn.Identity()
        assert layer.gamma_is_plain() and mlp.fc1.bias is not None
        for backend in ('reference', 'tiled'):
            with ops.use_backend(backend):
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_second_derivatives():
    layer = _layers()[0].double().eval()
    x = torch.randn(1, 64, 4, 4, dtype=torch.float64, requires_grad=True)
    with ops.use_backend('tiled'):
        with pytest.raises(RuntimeError, match="second derivatives.*use_backend\\('reference'\\)"):
            torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with ops.use_backend('reference'):
        gradient, = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    _, tangent = torch.func.jvp(layer, (x.detach(),), (torch.ones_like(x),))
    assert tangent.shape == (1, 16, 4, 4)


def test_use_backend_holds_in_other_threads():
    seen = []
    with ops.use_backend('reference'):
        thread = threading.Thread(target=lambda: seen.append(ops.choose_backend(_request()).name))
        thread.start()
        thread.join()
    assert seen == ['reference']


@pytest.mark.parametrize('shape', [(64, 5, 5), (1, 32, 5, 5), (1, 64, 0, 5)])
def test_bad_maps(shape):
    with pytest.raises(ValueError, match=r'\(N, 64, H, W\).*' + re.escape(str(list(shape)))):
        _layers()[0](torch.empty(shape))


def test_hooks_on_gamma_are_called():
    layer, _ = _layers()
    seen = []
    layer.weight_mlp.fc2.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    layer(torch.randn(1, 64, 4, 4))
    assert seen == [(1, 2, 25, 16)]


@pytest.mark.parametrize('momentum', [0.1, 0.3, None])
@pytest.mark.parametrize('track', [True, False])
def test_norm_options_are_batch_norms(momentum, track):
    """Momentum (None: cumulative average), eps and track_running_stats act as in nn.BatchNorm2d on the definition."""
    def norm_layer(channels, **dd):
        return nn.BatchNorm2d(channels, eps=0.01, momentum=momentum, track_running_stats=track, **dd)

    torch.manual_seed(0)
    layer = PairwiseAttention(32, kernel_size=3, norm_layer=norm_layer).double()
    results = []
    for forward in ('tiled', 'modules'):
        layer.train()
        for module in layer.weight_mlp:
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        torch.manual_seed(1)
        outputs = []
        for training in (True, True, False):
            x = torch.randn(2, 32, 6, 6, dtype=torch.float64)
            layer.train(training)
            if forward == 'modules':
                outputs.append(layer._forward_modules(layer.query(x), layer.key(x), layer.value(x), layer.place(x)))
            else:
                with ops.use_backend('tiled'):
                    outputs.append(layer(x))
        results.append([*outputs, *(b.double().clone() for b in layer.buffers())])
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_compiled_loops_are_there_where_a_compiler_is():
    if shutil.which('cc') is None and shutil.which('gcc') is None:
        pytest.skip('no compiler')
    assert ops.native.build() in ('avx512', 'avx2', 'baseline')


@pytest.mark.parametrize('how, times', [('auto', 1), ('quiet', 0), ('named', 0), ('float64', 0), ('clique', 0),
                                        ('there', 0)])
def test_missing_loops_are_said_once(how, times, monkeypatch):
    """Where they would have computed, and nobody asked for another path."""
    if how != 'there':
        monkeypatch.setattr(ops.native.library, '_load', lambda: (None, 'the dog ate them'))
    elif ops.native.unavailable():
        pytest.skip(ops.native.unavailable())
    monkeypatch.setenv('SAN_BACKBONES_QUIET', '1' if how == 'quiet' else '0')
    ops.native.warn_if_unavailable.cache_clear()
    layer = PairwiseAttention(32).eval().to(torch.float64 if how == 'float64' else torch.float32)
    x = torch.randn(1, 32, 5, 5).to(layer.query.weight.dtype)
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter('always')
        with ops.use_backend('tiled' if how == 'named' else 'auto'):
            if how == 'clique':
                PatchwiseAttention(32, relation='clique').eval()(x)
            else:
                layer(x), layer(x)
    ops.native.warn_if_unavailable.cache_clear()
    assert len(said) == times
    for warning in said:
        assert all(word in str(warning.message) for word in (
            'the dog ate them', 'about three times', 'C compiler', 'SAN_BACKBONES_REQUIRE_LOOPS=1',
            'SAN_BACKBONES_QUIET=1'))


@pytest.mark.parametrize('required', ['1', '0'])
def test_an_installation_without_a_compiler(required, tmp_path):
    """Goes on, unless it is told that the loops are required."""
    root = pathlib.Path(__file__).parents[2]
    environment = {**os.environ, 'CC': str(tmp_path / 'no-compiler'), 'SAN_BACKBONES_REQUIRE_LOOPS': required}
    build = [sys.executable, 'setup.py', '-q', 'build_ext', '--build-lib', tmp_path / 'lib', '--build-temp', tmp_path]
    done = subprocess.run(build, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == (1 if required == '1' else 0), done.stderr
    assert 'no-compiler' in done.stderr
    assert not [*tmp_path.rglob('*.so')]
