"""The compiled loops, against the float64 definition, on every instruction set that this processor has."""
import copy
import ctypes
import importlib.metadata
import itertools
import os
import pathlib
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from san_backbones import PairwiseAttention, PatchwiseAttention, ops
from san_backbones.ops import fused, native, statistics

pytestmark = pytest.mark.skipif(
    native.unavailable() is not None, reason=f"no compiled loops: {native.unavailable()}")

FORMS = [(cls, relation) for cls in (PairwiseAttention, PatchwiseAttention) for relation in cls.relations
         if (cls.pairwise, relation) in native.RELATIONS]
SIZES = [(1, 1), (1, 5), (9, 20)]


def _layer(cls, dim=64, **kwargs):
    torch.manual_seed(0)
    layer = cls(dim, **kwargs).eval()
    for norm in (layer.weight_mlp.norm1, layer.weight_mlp.norm2):
        for tensor in (norm.weight, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
        for tensor in (norm.bias, norm.running_mean):
            nn.init.uniform_(tensor, -0.5, 0.5)
    return layer


@torch.no_grad()
def _error(layer, x, backend='native'):
    """Relative error of the path in the layer's dtype to the definition in float64."""
    with ops.use_backend(backend):
        actual = layer(x)
    dtype = layer.query.weight.dtype
    with ops.use_backend('reference'):
        expected = layer.double()(x.double())
    layer.to(dtype)
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize('cls, relation', FORMS)
@pytest.mark.parametrize('kernel_size, dilation', [(1, 1), (3, 1), (5, 2), (7, 1), (7, 2), (11, 1)])
def test_definition(cls, relation, kernel_size, dilation):
    for dim, size in itertools.product((32, 64, 96, 256), SIZES):  # 96: weight channels that fill no vector
        layer = _layer(cls, dim, relation=relation, kernel_size=kernel_size, dilation=dilation)
        assert _error(layer, torch.randn(2, dim, *size)) < 2e-5, (dim, size)


@pytest.mark.parametrize('relation', PairwiseAttention.relations)
@pytest.mark.parametrize('position, ref', [('none', None), ('absolute', None), ('absolute', 8), ('relative', 8)])
def test_positions(relation, position, ref):
    layer = _layer(PairwiseAttention, relation=relation, position=position, position_ref_size=ref)
    assert _error(layer, torch.randn(1, 64, 6, 11)) < 1e-5


@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
@pytest.mark.parametrize('options', [dict(rel_planes=5), dict(out_planes=24, share_planes=3), dict(share_planes=1),
                                     dict(out_planes=20, share_planes=4), dict(out_planes=14, share_planes=7)])
def test_odd_widths(cls, options):
    assert _error(_layer(cls, **options), torch.randn(2, 64, 7, 8)) < 1e-5


@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision(cls, dtype, bound):
    layer = _layer(cls).to(dtype)
    x = torch.randn(2, 64, 9, 9).to(dtype)
    assert _error(layer, x) < bound
    with torch.no_grad():
        assert layer(x).dtype == dtype


@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_layouts(cls):
    """Channels last in, channels last out; strided and expanded maps; the numbers stay."""
    layer = _layer(cls)
    x = torch.randn(2, 64, 8, 10)
    with torch.no_grad(), ops.use_backend('native'):
        query, key, value, place = layer.query(x), layer.key(x), layer.value(x), layer.place(x)
        plain = layer._forward_operators(query, key, value, place)
        last = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        strided = [torch.stack([t, t], -1)[..., 0] for t in (query, key, value)]
        assert not strided[0].is_contiguous()
        assert torch.equal(layer._forward_operators(*strided, place), plain)
        cut_out = [nn.functional.pad(t, (2, 1, 1, 3)).to(memory_format=torch.channels_last)[:, :, 1:-3, 2:-1]
                   for t in (query, key, value)]
        assert torch.equal(layer._forward_operators(*cut_out, place), plain)
        expanded = [t[:1].expand(3, -1, -1, -1) for t in (query, key, value)]
        torch.testing.assert_close(layer._forward_operators(*expanded, place)[2], plain[0])
    assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_threads_and_repeats_do_not_change_a_bit(cls):
    layer = _layer(cls)
    x = torch.randn(2, 64, 13, 17)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 1, 2):
            torch.set_num_threads(threads)
            with torch.no_grad(), ops.use_backend('native'):
                results.append(layer._forward_operators(*projected(layer, x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)


def projected(layer, x):
    generator = torch.Generator().manual_seed(0)
    sizes = (layer.rel_planes, layer.rel_planes, layer.out_planes)
    return [torch.randn(x.shape[0], size, *x.shape[2:], generator=generator) for size in sizes] + [layer.place(x)]


@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_wide_layers(cls):
    """More channels than registers take at a time, with the finish fused."""
    layer = _layer(cls, 1024, kernel_size=3)
    x, shift = torch.randn(2, 1024, 5, 6), torch.randn(256)
    assert _error(layer, x) < 1e-5
    maps = [layer.query(x), layer.key(x), layer.value(x), layer.place(x)]
    with torch.no_grad(), ops.use_backend('native'):
        finished = ops.footprint_attention(*maps, layer.gamma(), layer.spec(), shift)
        plain = ops.footprint_attention(*maps, layer.gamma(), layer.spec())
    torch.testing.assert_close(finished, torch.relu(plain + shift[:, None, None]))


def test_the_finish_has_no_gradients():
    layer, x = _layer(PairwiseAttention, kernel_size=3), torch.randn(1, 64, 4, 5)
    maps = [layer.query(x), layer.key(x), layer.value(x), layer.place(x)]
    shift = torch.randn(16)
    y = ops.fused.attend_native(*maps, layer.gamma(), layer.spec(), shift)
    with pytest.raises(RuntimeError, match='call it without `shift`'):
        y.sum().backward()
    with ops.use_backend('native'):  # which the operator's users get by themselves
        y = ops.footprint_attention(*maps, layer.gamma(), layer.spec(), shift)
        found = torch.autograd.grad(y.sum(), layer.query.weight, retain_graph=True)
        plain = ops.footprint_attention(*maps, layer.gamma(), layer.spec())
        expected = torch.autograd.grad(torch.relu(plain + shift[:, None, None]).sum(), layer.query.weight)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_a_gradient_that_is_a_part_of_a_wider_map(cls):
    layer, x = _layer(cls, kernel_size=3), torch.randn(2, 64, 5, 6)
    wide = torch.randn(2, 48, 5, 6).contiguous(memory_format=torch.channels_last)
    found = []
    for gradient in (wide[:, 16:32], wide[:, 16:32].contiguous()):
        with ops.use_backend('native'):
            found.append(torch.autograd.grad(layer(x), [*layer.parameters()], gradient))
    for a, b in zip(*found):
        assert torch.equal(a, b)


def test_the_output_has_the_memory_format_of_the_value():
    layer, x = _layer(PairwiseAttention, kernel_size=3), torch.randn(2, 64, 5, 6)
    query, key, value, place = layer.query(x), layer.key(x), layer.value(x), layer.place(x)
    wide = torch.cat([value, value], 1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), ops.use_backend('native'):
        y = ops.footprint_attention(query, key, wide[:, 16:], place, layer.gamma(), layer.spec())
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert ops.footprint_attention(query, key, value, place, layer.gamma(), layer.spec()).is_contiguous()


@pytest.mark.parametrize('tap', range(9))
def test_softmax_with_its_maximum_at_any_neighbour(tap):
    """Logits of 1e3 and one of 1e4."""
    layer = _layer(PairwiseAttention, kernel_size=3)
    query, key, value, place = projected(layer, torch.zeros(1, 64, 8, 8))
    key[0, :, 3 + tap // 3, 3 + tap % 3] += torch.randn(4)
    gamma = layer.gamma()
    gamma = gamma._replace(weight2=1e4 * gamma.weight2)
    with torch.no_grad():
        found = []
        for path, maps in (('native', (query, key, value, place)), ('reference', (query, key, value, place))):
            with ops.use_backend(path):
                found.append(ops.footprint_attention(*maps, gamma, layer.spec()))
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[0][0, :, 4, 4], found[1][0, :, 4, 4], rtol=1e-3, atol=1e-3)


def test_libraries_of_other_sources_and_processors(monkeypatch):
    class Longer(ctypes.Structure):
        _fields_ = [('task', native.library.Task), ('more', ctypes.c_int64)]
    load = native.library._load.__wrapped__
    monkeypatch.setitem(native.library._STRUCTURES, 'san', Longer)
    loaded, reason = load()
    assert loaded is None and 'was built from another version of its source; reinstall' in reason
    monkeypatch.undo()
    if platform.machine() in ('x86_64', 'AMD64'):
        for capability, build in (('AVX2', 'avx2'), ('DEFAULT', 'baseline'), ('AVX512', 'avx512')):
            monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda capability=capability: capability)
            assert build in load()[1]


MAPS = b"""\
7f1000000000-7f1000001000 r-xp 00000000 08:01 1001                       /opt/arm/libarm_compute.so
7f1000001000-7f1000002000 r-xp 00000000 08:01 1002                       /usr/lib/libgomp.so.1.0.0
7f1000002000-7f1000003000 r-xp 00000000 08:01 1003                       /usr/lib/libompitrace.so.40
7f1000003000-7f1000004000 r--s 00000000 08:01 1004                       /data/my libgomp-notes/photo \xfc.bin
7f1000004000-7f1000005000 r-xp 00000000 08:01 1005                       TORCH/lib/libgomp-a34b3233.so.1
7f1000005000-7f1000006000 r--p 00001000 08:01 1005                       TORCH/lib/libgomp-a34b3233.so.1
7f1000006000-7f1000007000 r-xp 00000000 08:01 1006                       /opt/intel \xff/libiomp5.so
7f1000007000-7f1000008000 r-xp 00000000 08:01 1007                       TORCH/lib/libcompute_omp.so
7f1000008000-7f1000009000 r-xp 00000000 08:01 1008                       /usr/lib/llvm/libomp.so.5
7f1000009000-7f100000a000 rw-p 00000000 00:00 0
7ffe00000000-7ffe00001000 rw-p 00000000 00:00 0                          [stack]
"""


def _runtimes(maps):
    return native.threads._sorted(native.threads._mapped(maps))


def _found():
    """Looks again, without what was found before."""
    return native.threads.runtime.__wrapped__(native.library._loaded())


def test_the_runtime_of_threads_is_found_by_its_name():
    """Torch's own first; no library that has `omp` somewhere in its name, no file that is no library."""
    home = os.path.realpath(os.path.dirname(torch.__file__))
    found = _runtimes(MAPS.replace(b'TORCH', os.fsencode(home)))
    assert found == [f'{home}/lib/libgomp-a34b3233.so.1', os.fsdecode(b'/opt/intel \xff/libiomp5.so'),
                     '/usr/lib/libgomp.so.1.0.0', '/usr/lib/llvm/libomp.so.5']
    beside = _runtimes(MAPS.replace(b'TORCH/lib', os.fsencode(home) + b'.libs'))
    assert beside[0] == f'{home}.libs/libgomp-a34b3233.so.1'


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('kind', ['none', 'no permission', 'no runtime', 'a file of that name', 'gone', 'nonsense'])
def test_without_a_runtime_the_loops_run_on_one_thread(kind, tmp_path, monkeypatch):
    layer, x = _layer(PairwiseAttention), torch.randn(1, 64, 9, 9)
    with torch.no_grad():
        expected = layer(x)
    maps = tmp_path / 'maps'
    runtime = tmp_path / 'libgomp.so.1'
    line = b'7f00-7f10 r-xp 00000000 08:01 1 ' + os.fsencode(runtime)
    if kind == 'no permission':
        maps.mkdir()  # the superuser may read everything else
    elif kind == 'a file of that name':
        runtime.write_bytes(b'\x7fELF')
        maps.write_bytes(line)
    elif kind == 'gone':
        maps.write_bytes(line + b' (deleted)\n')
    elif kind == 'nonsense':
        maps.write_bytes(b'\x00/libgomp.so\xff\n\n/libomp.so\r/libgomp-')
    elif kind == 'no runtime':
        maps.write_bytes(b'')
    monkeypatch.setattr(native.threads, '_MAPS', str(maps))
    found = _found()
    assert found == (None, kind in ('none', 'no permission'), 'none')
    monkeypatch.setattr(native.threads, 'runtime', lambda library: found)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_mapped_library_is_not_loaded(tmp_path, monkeypatch):
    """A runtime that only lies in memory as data would bring threads of its own."""
    if _found().parallel is None:
        pytest.skip('no runtime here')
    with open('/proc/self/maps', 'rb') as maps:
        runtime = _runtimes(maps.read())[0]
    copy_of_it = tmp_path / 'libgomp.so.1'
    copy_of_it.write_bytes(pathlib.Path(runtime).read_bytes())
    (tmp_path / 'maps').write_bytes(b'7f00-7f10 r-xp 00000000 08:01 1 ' + os.fsencode(copy_of_it))
    monkeypatch.setattr(native.threads, '_MAPS', str(tmp_path / 'maps'))
    assert _found() == (None, False, 'none')


@pytest.mark.skipif(sys.platform != 'linux', reason='maps files')
@pytest.mark.parametrize('name, environment', [
    (b'photo \xff\xfe.bin', {}), ('gemälde.bin'.encode(), dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0'))])
def test_a_mapped_file_of_any_name(name, environment, tmp_path):
    path = os.path.join(os.fsencode(tmp_path), name)
    program = f"""
import mmap, torch, san_backbones
from san_backbones.ops.native import library, threads
with open({path!r}, 'wb') as file:
    file.write(bytes(4096))
with open({path!r}, 'rb') as file:
    kept = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
assert {name!r} in open('/proc/self/maps', 'rb').read()
san_backbones.PairwiseAttention(32).eval()(torch.zeros(1, 32, 4, 4))
print(threads.runtime(library._loaded()).parallel is None)
"""
    done = subprocess.run([sys.executable, '-c', program], env={**os.environ, **environment}, capture_output=True)
    expected = _found().parallel is None
    assert done.stdout.decode().split() == [str(expected)], done.stderr.decode(errors='replace')


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_fork_that_cannot_count_threads(monkeypatch):
    def listdir(path):
        raise FileNotFoundError(path)
    monkeypatch.setattr(native.threads, '_threads_at_fork', 1)
    monkeypatch.setattr(native.threads.os, 'listdir', listdir)
    native.threads._before_fork()
    assert native.threads._threads_at_fork > 1


@pytest.mark.skipif(sys.platform != 'linux', reason='asks another linker')
def test_the_runtime_on_macos(monkeypatch):
    """Among what its linker has loaded, in the place of /proc."""
    expected = _found()
    if expected.parallel is None:
        pytest.skip('no runtime here')
    with open('/proc/self/maps', 'rb') as maps:
        mapped = sorted(native.threads._mapped(maps.read()))
    asked = []

    class Linker:
        def __init__(self, name):
            assert name is None

        def _dyld_image_count(self):
            return len(mapped) + 1

        class _dyld_get_image_name:
            def __new__(cls, index):
                asked.append(index.value)
                return mapped[index.value] if index.value < len(mapped) else None  # unloaded meanwhile

    plain = ctypes.CDLL
    monkeypatch.setattr(native.threads.ctypes, 'CDLL', lambda name, **how: plain(name, **how) if name else Linker(name))
    monkeypatch.setattr(native.threads.sys, 'platform', 'darwin')
    monkeypatch.setattr(native.threads, '_MAPS', '/nowhere')
    assert _found() == expected
    assert asked == [*range(len(mapped) + 1)]


KMP = dict(fork_call=ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p,
                                      ctypes.c_void_p),
           push_num_threads=ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32),
           global_thread_num=ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p))
MICROTASK = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_int32), ctypes.c_void_p,
                             ctypes.c_void_p)


@pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64') or os.name == 'nt',
                    reason='here a function takes varying arguments as it takes others')
def test_the_runtime_on_windows(monkeypatch):
    """One with LLVM's interface alone: the loops ask it for torch's number of threads, and each does a part."""
    said = []

    def fork_call(location, count, microtask, work, argument):
        said.append(('fork', count))
        for thread in range(said[-2][2]):  # one behind the other
            MICROTASK(microtask)(ctypes.c_int32(5 + thread), ctypes.c_int32(thread), work, argument)

    def push_num_threads(location, thread, threads):
        said.append(('push', thread, threads))

    loaded = type('Loaded', (), {f'__kmpc_{name}': KMP[name](function) for name, function in dict(
        fork_call=fork_call, push_num_threads=push_num_threads, global_thread_num=lambda location: 5).items()})
    names = []

    class Kernel:
        def __init__(self, name):
            assert name == 'kernel32'

        class GetModuleHandleW:
            def __new__(cls, name):
                names.append(name.value)
                return 4711 if len(names) == 2 else None

    def load(name, handle):
        assert (name, handle) == (names[1], 4711)
        return loaded

    layer, x = _layer(PairwiseAttention), torch.randn(1, 64, 9, 9)
    with torch.no_grad():
        expected = layer(x)
    with monkeypatch.context() as windows:
        windows.setattr(native.threads.sys, 'platform', 'win32')
        windows.setattr(native.threads.ctypes, 'WinDLL', Kernel, raising=False)
        windows.setattr(native.threads.ctypes, 'CDLL', load)
        found = _found()
    assert names[0] == 'libiomp5md.dll' and found.name == names[1] and not found.lost_in_fork
    monkeypatch.setattr(native.threads, 'runtime', lambda library: found)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 3)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert said and said == [('push', 5, 3), ('fork', 2)] * (len(said) // 2)


def _intels():
    """Intel's runtime for Linux, which has the interface of Windows' too, if `intel-openmp` is installed."""
    try:
        files = importlib.metadata.files('intel-openmp') or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (file.locate().resolve() for file in files if file.name == 'libiomp5.so')
    return next((str(path) for path in found if path.exists()), None)


@pytest.mark.skipif(_intels() is None, reason='needs the package intel-openmp')
def test_a_real_runtime_as_on_windows(monkeypatch):
    found = native.threads._kmp(native.library._loaded(), ctypes.CDLL(_intels()), 'libiomp5.so')
    layer, x = _layer(PatchwiseAttention), torch.randn(2, 64, 40, 40)
    with torch.no_grad():
        expected = layer(x)
    before = len(os.listdir('/proc/self/task'))
    monkeypatch.setattr(native.threads, 'runtime', lambda library: found)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 3)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert len(os.listdir('/proc/self/task')) >= before + 2  # its threads wait for more


def test_no_memory_for_a_thread(monkeypatch):
    class Library:
        def san_run(self, address, parallel, threads):
            native.library.Task.from_address(address).failed = 1
    monkeypatch.setattr(native.library, '_loaded', Library)
    monkeypatch.setattr(native.threads, 'runtime', lambda library: native.threads.Runtime())
    with pytest.raises(MemoryError, match=r'working space of a thread of the native loops \(san\)'):
        native.library.run('san', native.library.Task())


def test_softmax_does_not_overflow():
    layer = _layer(PairwiseAttention)
    with torch.no_grad():
        layer.weight_mlp.fc2.weight.mul_(1e4)
    x = 100 * torch.randn(1, 64, 6, 6)
    with torch.no_grad():
        assert torch.isfinite(layer(x)).all()
    assert _error(layer, x) < 0.05  # logits of 1e4 and more carry an absolute error of float32's 1e-7 times that


def test_softmax_keeps_small_weights():
    layer = _layer(PairwiseAttention)
    with torch.no_grad():
        layer.weight_mlp.fc2.weight.mul_(30)
    x = 3 * torch.randn(2, 64, 9, 9)
    assert _error(layer, x) < 2e-5


@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_nan_of_the_relation_alone_is_not_hidden(cls):
    layer = _layer(cls, kernel_size=3)
    query, key, value, place = projected(layer, torch.empty(1, 64, 8, 8))
    key[0, :, 4, 4] = float('nan')
    with torch.no_grad(), ops.use_backend('native'):
        y = layer._forward_operators(query, key, value, place)[0].isnan().all(0)
    assert y[3:6, 3:6].all() and y.sum() == 9


def test_nan_is_not_hidden():
    layer = _layer(PatchwiseAttention, kernel_size=3)
    x = torch.randn(1, 64, 8, 8)
    x[0, :, 4, 4] = float('nan')
    with torch.no_grad(), ops.use_backend('native'):
        y = layer(x)[0].isnan().all(0)
    assert y[3:6, 3:6].all() and y.sum() == 9


def test_empty_batch():
    layer = _layer(PairwiseAttention)
    with ops.use_backend('native'):
        output = layer(torch.empty(0, 64, 5, 5))
        output.sum().backward()
    assert output.shape == (0, 16, 5, 5) and layer.position.weight.grad.abs().sum() == 0


def _results(layer, x, seed, training):
    x = x.clone().requires_grad_()
    layer = copy.deepcopy(layer).train(training)
    output = layer(x)
    output.backward(seed)
    return {'output': output.detach(), 'input': x.grad, **{n: p.grad for n, p in layer.named_parameters()},
            **{n: b for n, b in layer.named_buffers() if 'running' in n}}


def _check_training(layer, x, training, tolerance=2e-4):
    """Output, every gradient and the running buffers, against the definition in float64.

    A pair whose normalised relation rounds to the other side of a ReLU changes gradients by a whole term, so the
    tolerance is above float32's own; gradients that are small among the others are compared on the scale of those.
    """
    seed = torch.randn(x.shape[0], layer.out_planes, *x.shape[2:])
    with ops.use_backend('native'):
        actual = _results(layer, x, seed, training)
    with ops.use_backend('reference'):
        expected = _results(layer.double(), x.double(), seed.double(), training)
    layer.float()
    largest = max(expected[name].norm() for name, _ in layer.named_parameters())
    parameters = {name for name, _ in layer.named_parameters()}
    for name, tensor in expected.items():
        scale = max(tensor.norm(), 0.01 * largest) if name in parameters else tensor.norm()
        assert (actual[name] - tensor).norm() < tolerance * scale, name


@pytest.mark.parametrize('training', [False, True], ids=['frozen norms', 'batch statistics'])
@pytest.mark.parametrize('cls, relation', FORMS)
@pytest.mark.parametrize('kernel_size, dilation', [(1, 1), (3, 2), (7, 1)])
def test_gradients(cls, relation, kernel_size, dilation, training):
    if training and (cls.pairwise, relation) not in statistics.SUPPORTED:
        pytest.skip('takes the tiled path')
    for dim, size in ((32, (6, 25)), (96, (13, 4)), (64, (2, 1))):
        layer = _layer(cls, dim, relation=relation, kernel_size=kernel_size, dilation=dilation)
        _check_training(layer, torch.randn(3, dim, *size), training)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('position, ref', [('none', None), ('absolute', None), ('relative', 8)])
def test_gradients_of_positions(position, ref, training):
    layer = _layer(PairwiseAttention, position=position, position_ref_size=ref, kernel_size=5)
    _check_training(layer, torch.randn(2, 64, 9, 8), training)


def test_gradients_of_a_wide_layer():
    layer = _layer(PatchwiseAttention, 512)
    layer.weight_mlp.fc2.reset_parameters()  # with this draw no pair lies so near a ReLU's edge
    _check_training(layer, torch.randn(1, 512, 7, 7), True)
    _check_training(_layer(PairwiseAttention, 512), torch.randn(1, 512, 7, 7), False)


def test_gradients_under_autocast():
    layer = _layer(PairwiseAttention)
    x = torch.randn(1, 64, 9, 9, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16), ops.use_backend('native'):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    actual, = torch.autograd.grad(output.float().square().sum(), x)
    expected, = torch.autograd.grad(layer(x).square().sum(), x)
    assert (actual - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_gradients_do_not_depend_on_threads(cls):
    layer = _layer(cls, kernel_size=5).train()
    inputs = projected(layer, torch.empty(2, 64, 31, 17))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
            with ops.use_backend('native'):
                output = layer._forward_operators(*leaves)
            gradients = torch.autograd.grad(output.sin().sum(), [x for x in leaves if x is not None])
            results.append([output.detach(), *gradients])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_training_does_not_keep_the_footprint(cls):
    layer = _layer(cls).train()
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with ops.use_backend('native'), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(1, 64, 40, 40))
    maps = 4 * 40 * 40 * (64 + 4 + 4 + 16)
    assert sum(saved.values()) < 6 * maps < 4 * 40 * 40 * 49 * 12


def test_second_derivatives_are_refused():
    layer = _layer(PairwiseAttention)
    x = torch.randn(1, 64, 4, 4, requires_grad=True)
    with ops.use_backend('native'), pytest.raises(RuntimeError, match='second derivatives'):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_operators_read_folded_gamma_in_any_layout(cls, monkeypatch):
    """A compiled graph may hand it over with other strides than it was folded with."""
    layer, x, calls, plain = _layer(cls), torch.randn(2, 64, 5, 5), [], fused._attend
    monkeypatch.setattr(fused, '_attend', lambda *arguments: calls.append(arguments) or plain(*arguments))
    with torch.no_grad():
        layer(x)
        (query, key, value, place, *folded, _, shape), = calls
        strided = [torch.stack([t, t.flip(0)], -1)[..., 0] for t in folded]
        assert not any(t.is_contiguous() for t in strided)
        shift = torch.randn(2 * layer.out_planes)[::2]
        results = []
        for tensors, s in ((folded, shift.contiguous()), (strided, shift)):
            maps = query, key, value, place
            sums = query, key, place, *tensors[:3]
            output = plain(*maps, *tensors, s, shape)
            gradients = fused._attend_backward(value, *maps, *tensors, shape)
            moments = fused._hidden_sums(*sums, shape)
            results.append([output, *gradients, moments, *fused._hidden_sums_backward(moments, *sums, shape)])
    for expected, actual in zip(*results):
        assert torch.equal(expected, actual)


def test_refusals_say_why():
    layer = _layer(PatchwiseAttention).double()
    with pytest.raises(RuntimeError, match="'native'.*float64"), ops.use_backend('native'):
        layer(torch.randn(2, 64, 5, 5, dtype=torch.float64))


def test_batch_statistics_that_have_no_closed_form_are_refused():
    layer = _layer(PairwiseAttention, relation='dot').train()
    with pytest.raises(RuntimeError, match="'native'.*batch statistics of the dot relation"), ops.use_backend('native'):
        layer(torch.randn(2, 64, 5, 5))


def test_a_single_value_has_no_batch_statistics():
    with pytest.raises(ValueError, match='more than 1 value per channel'), ops.use_backend('native'):
        _layer(PatchwiseAttention).train()(torch.randn(1, 64, 1, 1))


def test_clique_is_refused_and_runs_elsewhere():
    layer = _layer(PatchwiseAttention, kernel_size=3, relation='clique').requires_grad_(False)
    with pytest.raises(RuntimeError, match='clique'), ops.use_backend('native'):
        layer(torch.randn(1, 64, 5, 5))
    assert _error(layer, torch.randn(1, 64, 5, 5), backend='auto') < 1e-5


@pytest.mark.parametrize('capability', ['default', 'avx2'])
def test_other_instruction_sets(capability):
    """The same tests on the builds for lesser processors."""
    code = 'import sys; from san_backbones.ops import native; sys.exit(native.build() == "avx512")'
    environment = {**os.environ, 'ATEN_CPU_CAPABILITY': capability, 'OMP_NUM_THREADS': '1'}
    if subprocess.run([sys.executable, '-c', code], env=environment).returncode:
        pytest.skip(f'torch does not step down to {capability} here')
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__, '-k',
         'positions or odd_widths or layouts or wide or (definition and 7-2) or (gradients and 3-2)'],
        env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize('relation', [-1, 7, 1 << 40])
def test_unknown_codes_are_refused_by_the_loops(relation):
    layer = _layer(PairwiseAttention, kernel_size=3)
    x = torch.randn(1, 64, 4, 5)
    maps = [fused.channels_last(y) for y in (layer.query(x), layer.key(x), layer.value(x), layer.place(x))]
    numbers, folded = fused.fold_gamma(*(ops.fold(norm, norm.running_mean, norm.running_var) for norm in (
        layer.gamma().norm1, layer.gamma().norm2)), layer.gamma(), layer.spec(), fused.library.width(), 0)
    shape = fused.Shape(*numbers)._replace(relation=relation)
    with torch.no_grad():
        for call in (lambda: fused.native_attention.output(shape, maps, folded, None),
                     lambda: fused.native_attention.gradients(shape, maps, folded, torch.zeros(1, 4, 5, 16))):
            with pytest.raises(ValueError, match=f'no such relation or mode: relation {relation}, mode 0'):
                call()
        with pytest.raises(ValueError, match='no such relation or mode: relation 0, mode 3'):
            fused.native_attention._run_backward(shape._replace(relation=0), maps, folded, 3, torch.zeros(1, 4, 5, 16))
        with pytest.raises(ValueError, match=f'relation must be one of 0, 1, 2, 3, 4, 5, 6, got {relation}'):
            torch.ops.san_backbones.attend(layer.query(x), layer.key(x), layer.value(x), layer.place(x), *folded, None,
                                           list(shape))
