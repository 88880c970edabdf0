"""What is particular to the Triton kernels: large maps, streams, graphs, tuning, compilation, refusals.

What they compute is in test_conformance.py. Triton decides when it is imported whether it interprets, and timm imports
it: hence `test_in_the_interpreter`, which runs that file and this one with TRITON_INTERPRET=1. Compilation needs no
GPU: `test_compilation`.
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
from tests.ops.conformance import INTERPRETING, Subject

from san_backbones import PairwiseAttention, PatchwiseAttention, ops
from san_backbones.ops import backends, triton

if triton.installed():
    from san_backbones.ops.triton import kernels, launch

DEVICE = torch.device('cuda' if torch.cuda.is_available() and not INTERPRETING else 'cpu')
UNAVAILABLE = triton.unavailable(DEVICE)
# the kernels can be imported with any Triton, and are refused where it is older
HAS_TRITON = triton.installed() and tuple(map(int, triton._version().split('.')[:2])) >= triton.OLDEST
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason='needs Triton {}.{} or newer'.format(*triton.OLDEST))
runs = pytest.mark.skipif(UNAVAILABLE is not None, reason=f'no Triton kernels here: {UNAVAILABLE}')
on_a_gpu = pytest.mark.skipif(DEVICE.type != 'cuda' or UNAVAILABLE is not None, reason='needs an NVIDIA GPU')

SUBJECT = Subject('triton', DEVICE)
BOTH = [PairwiseAttention, PatchwiseAttention]


@pytest.mark.skipif(INTERPRETING, reason='this is the interpreter')
@needs_triton
@pytest.mark.parametrize('part', ['definition', 'gradients', 'not definition and not gradients'])
def test_in_the_interpreter(part):
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', __file__,
         pathlib.Path(__file__).with_name('test_conformance.py'), '-k', f'({part}) and not compilation'],
        env={**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


@runs
@pytest.mark.parametrize('cls', BOTH)
def test_more_than_2_to_the_31_numbers(cls):
    """A few channels of a map so wide that the last pixels lie beyond; the rest of its memory is never touched."""
    layer = SUBJECT.layer(cls, 32, kernel_size=3)
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
    layer = SUBJECT.layer(cls, 2048, kernel_size=3).half()
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
    layer, x = SUBJECT.layer(PairwiseAttention, kernel_size=3), SUBJECT.random(1, 64, 64, 64)
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
    layer = SUBJECT.layer(cls, kernel_size=3)
    x = SUBJECT.random(2, 64, 12, 12).requires_grad_()
    with ops.use_backend('triton'):
        captured = torch.cuda.make_graphed_callables(copy.deepcopy(layer), (x,))
        other = SUBJECT.random(2, 64, 12, 12).requires_grad_()
        expected, = torch.autograd.grad(layer(other).square().sum(), other)
        actual, = torch.autograd.grad(captured(other).square().sum(), other)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_the_other_gpu():
    """While the first is the current one."""
    layer, x = SUBJECT.layer(PairwiseAttention, kernel_size=3), SUBJECT.random(1, 64, 9, 9)
    with torch.no_grad(), ops.use_backend('triton'):
        expected = layer(x)
        actual = layer.to('cuda:1')(x.to('cuda:1'))
    torch.testing.assert_close(actual.to(DEVICE), expected)


@on_a_gpu
@pytest.mark.parametrize('cls', BOTH)
def test_inductor(cls):
    """torch.compile as people call it, with gradients."""
    layer = SUBJECT.layer(cls, 256, kernel_size=3)
    x = SUBJECT.random(2, 256, 10, 9).to(memory_format=torch.channels_last).requires_grad_()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True)
    expected, = torch.autograd.grad(layer(x).square().sum(), x)
    actual, = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@on_a_gpu
def test_no_size_makes_a_new_kernel():
    layer = SUBJECT.layer(PairwiseAttention, kernel_size=3)
    with torch.no_grad(), ops.use_backend('triton'):
        def compiled():
            return sum(len(cache[0]) for cache in kernels.attend_pairwise.device_caches.values())
        layer(SUBJECT.random(1, 64, 16, 16))
        before = compiled()
        for size in ((1, 17, 33), (3, 16, 1), (1, 1, 1), (2, 64, 48)):
            layer(SUBJECT.random(size[0], 64, *size[1:]))
        assert compiled() == before


@pytest.mark.skipif(INTERPRETING, reason='asks the compiler of Triton')
@needs_triton
def test_sizes_of_images_are_no_constants():
    names = [name for name in kernels.__dict__ if name.startswith(('attend', 'pairwise', 'patchwise'))]
    assert len(names) == 7
    for name in names:
        free = {p.name for p in getattr(kernels, name).params if p.do_not_specialize}
        assert free == {'pixels', 'height', 'width'}, name
    shape = ops.folding.Shape(relation=0, absolute=0, kernel_size=7, dilation=1, hidden=16, channels=8, lanes=8,
                              backend=1)
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
    layer, x = SUBJECT.layer(cls, 32, kernel_size=1), SUBJECT.random(1, 32, 4, 5)
    SUBJECT.check_training(layer, x, False)
    assert {chosen.pixels for chosen in tuning.chosen.values()} == {64}
    count = len(tuning.timed)
    SUBJECT.check_training(layer.float(), SUBJECT.random(1, 32, 5, 4), False)
    assert len(tuning.timed) == count  # each kernel once
    SUBJECT.check_training(layer.float(), SUBJECT.random(1, 32, 1, 3), False)
    assert len(tuning.timed) > count  # for far smaller maps, anew


@runs
def test_a_configuration_without_room_is_left_out(tuning):
    layer, x = SUBJECT.layer(PairwiseAttention, 32, kernel_size=1), SUBJECT.random(1, 32, 2, 2)
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
    layer, x = SUBJECT.layer(PairwiseAttention, 32, kernel_size=1), SUBJECT.random(1, 32, 2, 2)
    used, configuration = [], launch._Launcher._configuration
    monkeypatch.setattr(launch._Launcher, '_configuration',
                        lambda *arguments: used.append(configuration(*arguments)) or used[-1])
    with torch.no_grad(), ops.use_backend('triton'):
        for capturing in (True, False, True):  # nothing known yet: the first; tuned; known
            monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: capturing)
            layer(x)
    assert [chosen.pixels for chosen in used] == [32, 64, 64]


def test_devices_and_versions_are_refused_in_words(monkeypatch):
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
