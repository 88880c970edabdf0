"""The Triton kernels, against the float64 definition: in Triton's interpreter, and on a GPU where there is one.

Triton decides when it is imported whether it interprets, and timm imports it: hence `test_in_the_interpreter`, which
runs this file again with TRITON_INTERPRET=1. Compilation needs no GPU: `test_compilation`.
"""
import copy
import importlib.util
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from san_backbones import PairwiseAttention, PatchwiseAttention, ops
from san_backbones.ops import backends, native, statistics, triton

if triton.installed():
    from san_backbones.ops.triton import kernels, launch

INTERPRETING = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = torch.device('cuda' if torch.cuda.is_available() and not INTERPRETING else 'cpu')
UNAVAILABLE = triton.unavailable(DEVICE)
# the kernels can be imported with any Triton, and are refused where it is older
HAS_TRITON = triton.installed() and tuple(map(int, triton._version().split('.')[:2])) >= triton.OLDEST
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason='needs Triton {}.{} or newer'.format(*triton.OLDEST))
runs = pytest.mark.skipif(UNAVAILABLE is not None, reason=f'no Triton kernels here: {UNAVAILABLE}')
on_a_gpu = pytest.mark.skipif(DEVICE.type != 'cuda' or UNAVAILABLE is not None, reason='needs an NVIDIA GPU')

FORMS = [(cls, relation) for cls in (PairwiseAttention, PatchwiseAttention) for relation in cls.relations
         if (cls.pairwise, relation) in native.RELATIONS]
BOTH = [PairwiseAttention, PatchwiseAttention]


@pytest.mark.skipif(INTERPRETING, reason='this is the interpreter')
@needs_triton
@pytest.mark.parametrize('part', ['definition', 'gradients', 'not definition and not gradients'])
def test_in_the_interpreter(part):
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', __file__, '-k',
         f'({part}) and not compilation'],
        env={**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


def _layer(cls, dim=64, **kwargs):
    torch.manual_seed(0)
    layer = cls(dim, **kwargs).eval()
    for norm in (layer.weight_mlp.norm1, layer.weight_mlp.norm2):
        for tensor in (norm.weight, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
        for tensor in (norm.bias, norm.running_mean):
            nn.init.uniform_(tensor, -0.5, 0.5)
    return layer.to(DEVICE)


def _random(*size):
    return torch.randn(size).to(DEVICE)


@torch.no_grad()
def _error(layer, x):
    """Relative error of the kernels in the layer's dtype to the definition in float64."""
    with ops.use_backend('triton'):
        actual = layer(x)
    dtype = layer.query.weight.dtype
    with ops.use_backend('reference'):
        expected = layer.double()(x.double())
    layer.to(dtype)
    return ((actual.double() - expected).norm() / expected.norm()).item()


@runs
@pytest.mark.parametrize('cls, relation', FORMS)
def test_definition(cls, relation):
    layer = _layer(cls, 256, relation=relation, kernel_size=3, dilation=2)
    assert _error(layer, _random(2, 256, 5, 7)) < 2e-6  # more pixels than a program of the interpreter has


@runs
@pytest.mark.parametrize('cls', BOTH)
@pytest.mark.parametrize('kernel_size, dilation, size', [(1, 1, (3, 2)), (5, 2, (4, 7)), (7, 1, (1, 5))])
def test_definition_of_footprints(cls, kernel_size, dilation, size):
    assert _error(_layer(cls, 32, kernel_size=kernel_size, dilation=dilation), _random(1, 32, *size)) < 2e-6


@runs
@pytest.mark.parametrize('position, ref', [('none', None), ('absolute', None), ('relative', 8)])
@pytest.mark.parametrize('relation', ['subtraction', 'dot'])
def test_definition_with_positions(relation, position, ref):
    layer = _layer(PairwiseAttention, kernel_size=3, relation=relation, position=position, position_ref_size=ref)
    assert _error(layer, _random(1, 64, 4, 3)) < 2e-6


@runs
@pytest.mark.parametrize('cls', BOTH)
@pytest.mark.parametrize('options', [dict(dim=96), dict(rel_planes=5), dict(out_planes=24, share_planes=3)])
def test_definition_with_odd_widths(cls, options):
    layer = _layer(cls, **options, kernel_size=3)
    assert _error(layer, _random(2, layer.dim, 2, 1)) < 2e-6  # a map narrower than the footprint reaches


@runs
def test_gradients_of_wide_layers():
    """Weights that are not kept while the taps go by."""
    _check_training(_layer(PairwiseAttention, kernel_size=3, rel_planes=100), _random(1, 64, 2, 2), False)


@runs
@pytest.mark.parametrize('cls', BOTH)
@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_definition_in_half_precision(cls, dtype, bound):
    layer = _layer(cls, 256, kernel_size=3).to(dtype)
    x = _random(1, 256, 4, 4).to(dtype)
    assert _error(layer, x) < bound
    with torch.no_grad(), ops.use_backend('triton'):
        assert layer(x).dtype == dtype


@runs
def test_definition_of_large_logits():
    layer = _layer(PairwiseAttention, kernel_size=3)
    with torch.no_grad():
        layer.weight_mlp.fc2.weight.mul_(1e4)
    assert _error(layer, 100 * _random(1, 64, 4, 4)) < 0.05  # float32 holds logits of 1e5 to about 1e-2


def _results(layer, x, seed, training):
    x = x.clone().requires_grad_()
    layer = copy.deepcopy(layer).train(training)
    output = layer(x)
    output.backward(seed)
    return {'output': output.detach(), 'input': x.grad, **{n: p.grad for n, p in layer.named_parameters()},
            **{n: b for n, b in layer.named_buffers() if 'running' in n}}


def _check_training(layer, x, training, tolerance=5e-5):
    """Output, every gradient and the running buffers, against the definition in float64; gradients of parameters that
    are small among the others are compared on the scale of those.
    """
    seed = _random(x.shape[0], layer.out_planes, *x.shape[2:])
    with ops.use_backend('triton'):
        actual = _results(layer, x, seed, training)
    with ops.use_backend('reference'):
        expected = _results(layer.double(), x.double(), seed.double(), training)
    parameters = {name for name, _ in layer.named_parameters()}
    largest = max(expected[name].norm() for name in parameters)
    for name, tensor in expected.items():
        scale = max(tensor.norm(), 0.01 * largest) if name in parameters else tensor.norm()
        assert (actual[name] - tensor).norm() < tolerance * scale, name


@runs
@pytest.mark.parametrize('training', [False, True], ids=['frozen norms', 'batch statistics'])
@pytest.mark.parametrize('cls, relation', FORMS)
def test_gradients(cls, relation, training):
    if training and (cls.pairwise, relation) not in statistics.SUPPORTED:
        pytest.skip('takes the tiled path')
    if training and INTERPRETING and relation in ('summation', 'hadamard'):
        pytest.skip('slow here, and nothing that other tests do not run')
    layer = _layer(cls, 256, relation=relation, kernel_size=3, dilation=2)
    _check_training(layer, _random(2, 256, 5, 7), training)


@runs
@pytest.mark.parametrize('training', [False, True], ids=['frozen norms', 'batch statistics'])
@pytest.mark.parametrize('cls', BOTH)
def test_gradients_of_odd_widths(cls, training):
    layer = _layer(cls, kernel_size=3, rel_planes=5, out_planes=36, share_planes=12)
    _check_training(layer, _random(3, 64, 2, 1), training)


@runs
@pytest.mark.parametrize('position, training', [('none', False), ('absolute', True)])
def test_gradients_of_positions(position, training):
    _check_training(_layer(PairwiseAttention, kernel_size=3, position=position), _random(1, 64, 4, 5), training)


@runs
@pytest.mark.parametrize('cls', BOTH)
def test_gradients_of_many_shares(cls):
    """So many that the backward pass takes them in several turns, the last of them short."""
    layer = _layer(cls, 32, kernel_size=3, out_planes=112, share_planes=7)
    _check_training(layer, _random(1, 32, 3, 3), False)


@runs
@pytest.mark.parametrize('cls, dtype', list(zip(BOTH, [torch.bfloat16, torch.float16])))
def test_gradients_under_autocast(cls, dtype):
    """No further from float32 than the definition under autocast."""
    layer = _layer(cls, 256, kernel_size=3).train()
    x = _random(1, 256, 4, 4).requires_grad_()

    def gradients(backend, enabled):
        with torch.autocast(DEVICE.type, dtype, enabled=enabled), ops.use_backend(backend):
            output = layer(x)
            assert output.dtype == (dtype if enabled else torch.float32)
            return torch.autograd.grad(output.float().square().sum(), [x, layer.weight_mlp.fc1.weight])

    exact = gradients('reference', False)
    for e, defined, actual in zip(exact, gradients('reference', True), gradients('triton', True)):
        assert (actual - e).norm() < 1.2 * (defined - e).norm() + 0.005 * e.norm()


@runs
@pytest.mark.parametrize('cls', BOTH)
def test_layouts(cls):
    """Channels last in, channels last out, without copies; slices of maps; `shift`."""
    layer = _layer(cls, 32, kernel_size=3)
    joined = _random(2, 2 + 2 + 8, 4, 5).to(memory_format=torch.channels_last)
    place = layer.place(joined)
    slices = joined.split((2, 2, 8), 1)
    shift = torch.linspace(-1, 1, 8, device=DEVICE)
    with torch.no_grad(), ops.use_backend('triton'):
        last = layer._forward_operators(*slices, place)
        plain = layer._forward_operators(*(x.contiguous() for x in slices), place)
        shifted = ops.footprint_attention(*slices, place, layer.gamma(), layer.spec(), shift)
    assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shifted, torch.relu(plain + shift[:, None, None]), rtol=1e-5, atol=1e-6)
    for x in slices:
        assert ops.folding.channels_last(x).data_ptr() == x.data_ptr()


@runs
@pytest.mark.parametrize('cls', BOTH)
def test_nan_is_not_hidden(cls):
    layer = _layer(cls, 32, kernel_size=3)
    x = _random(1, 32, 6, 6)
    with torch.no_grad():
        key = layer.key(x)
        key[0, :, 2, 3] = float('nan')  # not in value too, through which it would come in any case
        with ops.use_backend('triton'):
            y = layer._forward_operators(layer.query(x), key, layer.value(x), layer.place(x))[0].isnan().all(0)
    assert y[1:4, 2:5].all() and y.sum() == 9


@runs
def test_empty_batch():
    layer = _layer(PairwiseAttention)
    with ops.use_backend('triton'):
        output = layer(torch.empty(0, 64, 5, 5, device=DEVICE))
        output.sum().backward()
    assert output.shape == (0, 16, 5, 5) and layer.position.weight.grad.abs().sum() == 0


@runs
def test_single_value_has_no_batch_statistics():
    with pytest.raises(ValueError, match='more than 1 value per channel'), ops.use_backend('triton'):
        _layer(PatchwiseAttention).train()(_random(1, 64, 1, 1))


@runs
def test_second_derivatives_are_refused():
    layer = _layer(PatchwiseAttention, 32, kernel_size=1)
    x = _random(1, 32, 2, 2).requires_grad_()
    with ops.use_backend('triton'), pytest.raises(RuntimeError, match='second derivatives'):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


@runs
@pytest.mark.parametrize('cls', BOTH)
def test_training_keeps_no_footprint(cls):
    layer = _layer(cls, 32, kernel_size=3).train()
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with ops.use_backend('triton'), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(_random(1, 32, 8, 8))
    maps = 4 * 8 * 8 * (32 + 2 + 2 + 8)
    assert sum(saved.values()) < 3 * maps


@runs
def test_compiled_graphs_call_the_operators():
    layer = _layer(PairwiseAttention, 32, kernel_size=1).train()
    x, seed = _random(2, 32, 4, 3), _random(2, 8, 4, 3)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.registry.lookup_backend('aot_eager')(graph, inputs)

    compiled = copy.deepcopy(layer)
    compiled.compile(fullgraph=True, backend=backend)
    with ops.use_backend('triton'):
        expected = _results(layer, x, seed, True)
        leaf = x.clone().requires_grad_()
        compiled(leaf).backward(seed)
    assert any('san_backbones' in str(node.target) for node in graphs[0].graph.nodes)
    torch.testing.assert_close(leaf.grad, expected['input'], rtol=1e-4, atol=1e-5)
    for name, parameter in compiled.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)


@runs
def test_operators_are_registered_as_torch_expects():
    layer = _layer(PairwiseAttention, 32, kernel_size=1)
    maps = [_random(1, c, 3, 2) for c in (2, 2, 8)]
    maps = [x.requires_grad_() for x in (*maps, layer.place(maps[0]).detach())]
    gamma = layer.gamma()
    affine = [ops.fold(norm, norm.running_mean, norm.running_var) for norm in (gamma.norm1, gamma.norm2)]
    shape, folded = ops.folding.fold_gamma(*affine, gamma, layer.spec(), 1, 1)
    folded = [x.detach().requires_grad_() for x in folded]
    torch.library.opcheck(torch.ops.san_backbones.attend.default, (*maps, *folded, None, shape),
                          test_utils=('test_schema', 'test_faketensor', 'test_autograd_registration'))
    sums = (maps[0], maps[1], maps[3], *folded[:3], shape)
    torch.library.opcheck(torch.ops.san_backbones.hidden_sums.default, sums,
                          test_utils=('test_schema', 'test_faketensor', 'test_autograd_registration'))


@runs
@pytest.mark.parametrize('cls', BOTH)
def test_synchronised_statistics(cls, tmp_path):
    """Norms that share their statistics; that several processes share them rightly is tested in test_distributed.py."""
    layer = _layer(cls, 32, kernel_size=3).train()
    maps = [_random(2, c, 3, 2) for c in (2, 2, 8)]
    results = []
    dist.init_process_group('gloo' if DEVICE.type == 'cpu' else 'nccl', init_method=f'file://{tmp_path}/store', rank=0,
                            world_size=1)
    try:
        for backend, group in (('reference', None), ('triton', dist.group.WORLD)):
            gamma = layer.gamma()
            gamma = gamma._replace(norm1=gamma.norm1._replace(group=group), norm2=gamma.norm2._replace(group=group))
            leaves = [x.clone().requires_grad_() for x in maps]
            with ops.use_backend(backend):
                output = ops.footprint_attention(*leaves, layer.place(maps[0]), gamma, layer.spec())
            results.append(torch.autograd.grad(output.sin().sum(), [*leaves, layer.weight_mlp.fc1.weight]))
    finally:
        dist.destroy_process_group()
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@runs
@pytest.mark.parametrize('cls', BOTH)
def test_more_than_2_to_the_31_numbers(cls):
    """A few channels of a map so wide that the last pixels lie beyond; the rest of its memory is never touched."""
    layer = _layer(cls, 32, kernel_size=3)
    wide = torch.empty(1, 4, 5, 2 ** 27, dtype=torch.float16, device=DEVICE).permute(0, 3, 1, 2)
    assert wide.numel() > 2 ** 31
    slices = [x.copy_(torch.randn_like(x)) for x in wide[:, :12].split((2, 2, 8), 1)]
    place = layer.place(slices[2])

    def run(backend, maps):
        leaves = [x.detach().requires_grad_() for x in maps]
        with ops.use_backend(backend):
            output = layer._forward_operators(*leaves, place)
        return output, *torch.autograd.grad(output.square().sum(), leaves)
    for expected, actual in zip(run('reference', [x.float() for x in slices]), run('triton', slices)):
        torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=1e-2)


@on_a_gpu
@pytest.mark.parametrize('cls', BOTH)
def test_maps_of_more_than_2_to_the_31_numbers(cls):
    layer = _layer(cls, 2048, kernel_size=3).half()
    x = torch.empty(1, 512, 2100, 2050, dtype=torch.float16, device=DEVICE, memory_format=torch.channels_last)
    x.normal_()
    assert x.numel() > 2 ** 31
    query, key = (x[:, :layer.rel_planes] for _ in range(2))
    with torch.no_grad():
        place = layer.place(x)
        with ops.use_backend('triton'):
            actual = layer._forward_operators(query, key, x, place)[..., -9:, -9:]
        corner = [m[..., -10:, -10:].double() for m in (query, key, x, place)]
        with ops.use_backend('reference'):
            expected = layer.double()._forward_operators(*corner)[..., 1:, 1:]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2)


@on_a_gpu
def test_streams():
    """Work goes to the current stream, behind what is there."""
    layer, x = _layer(PairwiseAttention, kernel_size=3), _random(1, 64, 64, 64)
    with torch.no_grad(), ops.use_backend('triton'):
        expected = layer(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            late = torch.zeros_like(x)
            torch.cuda._sleep(10_000_000)
            late += x
            actual = layer(late)
        stream.synchronize()
    torch.testing.assert_close(actual, expected)


@on_a_gpu
@pytest.mark.parametrize('cls', BOTH)
def test_cuda_graphs(cls):
    """A training step, captured and replayed on other numbers."""
    layer = _layer(cls, kernel_size=3)
    x = _random(2, 64, 12, 12).requires_grad_()
    with ops.use_backend('triton'):
        captured = torch.cuda.make_graphed_callables(copy.deepcopy(layer), (x,))
        other = _random(2, 64, 12, 12).requires_grad_()
        expected, = torch.autograd.grad(layer(other).square().sum(), other)
        actual, = torch.autograd.grad(captured(other).square().sum(), other)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_the_other_gpu():
    """While the first is the current one."""
    layer, x = _layer(PairwiseAttention, kernel_size=3), _random(1, 64, 9, 9)
    with torch.no_grad(), ops.use_backend('triton'):
        expected = layer(x)
        actual = layer.to('cuda:1')(x.to('cuda:1'))
    torch.testing.assert_close(actual.to(DEVICE), expected)


@on_a_gpu
@pytest.mark.parametrize('cls', BOTH)
def test_inductor(cls):
    """torch.compile as people call it, with gradients."""
    layer = _layer(cls, 256, kernel_size=3)
    x = _random(2, 256, 10, 9).to(memory_format=torch.channels_last).requires_grad_()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True)
    expected, = torch.autograd.grad(layer(x).square().sum(), x)
    actual, = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@on_a_gpu
def test_no_size_makes_a_new_kernel():
    layer = _layer(PairwiseAttention, kernel_size=3)
    with torch.no_grad(), ops.use_backend('triton'):
        def compiled():
            return sum(len(cache[0]) for cache in kernels.attend_pairwise.device_caches.values())
        layer(_random(1, 64, 16, 16))
        before = compiled()
        for size in ((1, 17, 33), (3, 16, 1), (1, 1, 1), (2, 64, 48)):
            layer(_random(size[0], 64, *size[1:]))
        assert compiled() == before


@pytest.mark.skipif(INTERPRETING, reason='asks the compiler of Triton')
@needs_triton
def test_sizes_of_images_are_no_constants():
    names = [name for name in kernels.__dict__ if name.startswith(('attend', 'pairwise', 'patchwise'))]
    assert len(names) == 7
    for name in names:
        free = {p.name for p in getattr(kernels, name).params if p.do_not_specialize}
        assert free == {'pixels', 'height', 'width'}, name
    shape = ops.folding.Shape(0, 0, 7, 1, 16, 8, 8, 1)
    maps = [[torch.empty(n, h, w, c) for c in (16, 16, 64)] + [torch.empty(1, h, w, 2)]
            for n, h, w in ((1, 1, 1), (2, 200, 336))]
    assert launch.constants(shape, maps[0]) == launch.constants(shape, maps[1])


@pytest.fixture
def tuning(monkeypatch):
    """Two configurations, timed as a test likes: seconds by pixels of a program."""
    seconds, timed = {32: 2., 64: 1.}, []

    def milliseconds(call):
        call()
        call()  # results that are added to are wrong now
        timed.append(True)
        found = seconds[chosen[-1].pixels]
        if isinstance(found, Exception):
            raise found
        return found

    chosen = []
    tune = launch._tune
    monkeypatch.setattr(launch, '_tune', lambda candidates, call: tune(
        candidates, lambda candidate: chosen.append(candidate) or call(candidate)))
    monkeypatch.setattr(launch, '_milliseconds', milliseconds)
    monkeypatch.setattr(launch, '_tunes', lambda device: True)
    monkeypatch.setattr(launch, '_quickest', {})
    monkeypatch.setattr(launch, 'configurations', lambda *_: tuple(
        launch.Configuration(pixels, 4, 1) for pixels in (32, 64)))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a GPU')
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    return SimpleNamespace(seconds=seconds, timed=timed, chosen=launch._quickest)


@runs
@pytest.mark.parametrize('cls', BOTH)
def test_gradients_after_tuning(cls, tuning):
    layer, x = _layer(cls, 32, kernel_size=1), _random(1, 32, 4, 5)
    _check_training(layer, x, False)
    assert {chosen.pixels for chosen in tuning.chosen.values()} == {64}
    count = len(tuning.timed)
    _check_training(layer.float(), _random(1, 32, 5, 4), False)
    assert len(tuning.timed) == count  # each kernel once
    _check_training(layer.float(), _random(1, 32, 1, 3), False)
    assert len(tuning.timed) > count  # for far smaller maps, anew


@runs
def test_a_configuration_without_room_is_left_out(tuning):
    layer, x = _layer(PairwiseAttention, 32, kernel_size=1), _random(1, 32, 2, 2)
    tuning.seconds[64] = launch.OutOfResources(200, 100, 'shared memory')
    with torch.no_grad(), ops.use_backend('triton'):
        layer(x)
        assert [chosen.pixels for chosen in tuning.chosen.values()] == [32]
        tuning.chosen.clear()
        tuning.seconds[32] = tuning.seconds[64]
        with pytest.raises(RuntimeError, match=r"no room.*use_backend\('tiled'\)"):
            layer(x)


@pytest.mark.skipif(not triton.installed(), reason='Triton is not installed')
def test_when_kernels_are_tuned(monkeypatch):
    gpu = torch.device('cuda')
    assert launch._tunes(gpu) and not launch._tunes(torch.device('cpu'))
    monkeypatch.setenv(triton.TUNE_VARIABLE, '0')
    assert not launch._tunes(gpu)
    monkeypatch.delenv(triton.TUNE_VARIABLE)
    monkeypatch.setattr(torch, 'are_deterministic_algorithms_enabled', lambda: True)
    assert not launch._tunes(gpu)


@runs
def test_graphs_that_are_captured_keep_what_was_tuned(tuning, monkeypatch):
    layer, x = _layer(PairwiseAttention, 32, kernel_size=1), _random(1, 32, 2, 2)
    used, configuration = [], launch._Launcher._configuration
    monkeypatch.setattr(launch._Launcher, '_configuration',
                        lambda *arguments: used.append(configuration(*arguments)) or used[-1])
    with torch.no_grad(), ops.use_backend('triton'):
        for capturing in (True, False, True):  # nothing known yet: the first; tuned; known
            monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: capturing)
            layer(x)
    assert [chosen.pixels for chosen in used] == [32, 64, 64]


@runs
def test_logits_of_minus_infinity_come_first():
    """Nothing was summed before them; as soon as one is more, they weigh nothing."""
    layer = _layer(PairwiseAttention, 32, kernel_size=3, position='none')
    x = _random(1, 32, 4, 4)
    with torch.no_grad():
        layer.weight_mlp.fc2.weight.fill_(-1e10)  # times relu(norm(3e38)): beyond float32
        query, key, value = layer.query(x), layer.key(x), layer.value(x)
        key[0, :, 1, 1] = -3e38
        results = []
        for path in ('triton', 'reference'):
            with ops.use_backend(path):
                results.append(layer._forward_operators(query, key, value, None))
    torch.testing.assert_close(*results, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert results[1].isfinite().all()


def test_refusals_say_why(monkeypatch):
    layer = _layer(PatchwiseAttention, 32, kernel_size=3)
    with pytest.raises(RuntimeError, match="'triton'.*float64"), ops.use_backend('triton'):
        layer.double()(_random(1, 32, 3, 3).double())
    clique = _layer(PatchwiseAttention, 32, kernel_size=3, relation='clique')
    with pytest.raises(RuntimeError, match="'triton'.*clique"), ops.use_backend('triton'):
        clique(_random(1, 32, 3, 3))
    star = _layer(PatchwiseAttention, 32, kernel_size=3, relation='star').train()
    with pytest.raises(RuntimeError, match="'triton'.*statistics of the star"), ops.use_backend('triton'):
        star(_random(2, 32, 3, 3))
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    assert 'the maps are on cpu' in triton.unavailable(torch.device('cpu'))
    if DEVICE.type != 'cuda':  # no driver, as where there is no C compiler to make one
        triton._fault.cache_clear()
        assert 'Triton does not start: RuntimeError: 0 active drivers' in triton.unavailable(torch.device('cuda'))
    monkeypatch.setattr(triton, '_fault', lambda: None)
    monkeypatch.setattr(triton, '_version', lambda: '3.3.1')
    assert 'needs Triton 3.4 or newer, 3.3.1 is installed' in triton.unavailable(torch.device('cuda'))
    monkeypatch.setattr(triton, 'installed', lambda: False)
    assert 'not installed' in triton.unavailable(torch.device('cuda'))


@pytest.mark.parametrize('kibibytes, expected', [(99, ('triton', 'tiled')), (163, ('triton', 'triton'))])
def test_wide_layers_need_shared_memory(kibibytes, expected, monkeypatch):
    """Of SAN's layers, the widest pairwise one does not train on a GPU of 99 KiB; it runs there."""
    monkeypatch.setattr(triton, 'unavailable', lambda device: None)
    monkeypatch.setattr(torch.cuda, 'get_device_properties',
                        lambda device: SimpleNamespace(shared_memory_per_block_optin=kibibytes << 10))
    layer = PairwiseAttention(2048, device='meta')
    query = torch.empty(1, layer.rel_planes, 7, 7, device='meta')
    spec = layer.spec()
    request = ops.Request(spec, torch.device('cuda'), torch.float32, (1, 512, 7, 7), False, False, None,
                          backends.tap_matrices(query, layer.gamma(), spec))
    names = tuple(ops.choose_backend(request._replace(needs_grad=grad)).name for grad in (False, True))
    assert names == expected


def test_deterministic_algorithms_are_respected(monkeypatch):
    request = ops.Request(ops.Spec(True, 'subtraction', 'relative', 7, 1), torch.device('cuda'), torch.float32,
                          (1, 64, 8, 8), True, False, None)
    monkeypatch.setattr(triton, 'unavailable', lambda device: None)
    assert ops.choose_backend(request).name == 'triton'
    try:
        torch.use_deterministic_algorithms(True)
        assert ops.choose_backend(request).name == 'tiled'
        assert ops.choose_backend(request._replace(needs_grad=False)).name == 'triton'
    finally:
        torch.use_deterministic_algorithms(False)


def _offline():
    path = pathlib.Path(__file__).parents[2] / 'benchmarks/triton_offline.py'
    spec = importlib.util.spec_from_file_location('triton_offline', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(INTERPRETING, reason='needs the compiler of Triton')
@needs_triton
@pytest.mark.filterwarnings('ignore:TRITON_DEFAULT_FP_FUSION')
@pytest.mark.parametrize('name', ['attend_pairwise', 'pairwise_sums', 'attend_pairwise_backward', 'attend_patchwise',
                                  'patchwise_sums', 'patchwise_hidden_backward', 'attend_patchwise_backward'])
def test_compilation(name):
    """ptxas takes the kernels, their registers suffice but for a little, and so does the usual shared memory."""
    offline = _offline()
    for arch, dtype, of_sums in ((80, 'fp32', False), (90, 'bf16', True)):
        if of_sums and not name.endswith('backward') and name != 'attend_pairwise':
            continue  # that variant is a kernel of its own
        constants = offline.constants(name, 256, dtype)
        for configuration in launch.configurations(name, constants):
            report = offline.report(name, constants, configuration, dtype, arch, of_sums=of_sums)
            assert report['stack'] <= 512 and report['shared'] <= 48 * 1024, (configuration, report)
