"""What is particular to the compiled loops: threads, builds, codes. What they compute: test_conformance.py."""
import copy
import ctypes
import importlib.metadata
import math
import os
import pathlib
import platform
import subprocess
import sys

import pytest
import torch
from tests.ops.conformance import Subject

from san_backbones import PairwiseAttention, PatchwiseAttention, ops
from san_backbones.ops import fused, native, relations, statistics

pytestmark = pytest.mark.skipif(
    native.unavailable() is not None, reason=f"no compiled loops: {native.unavailable()}")

SUBJECT = Subject('native', torch.device('cpu'))


@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_threads_and_repeats_do_not_change_a_bit(cls):
    layer = SUBJECT.layer(cls)
    x = torch.randn(2, 64, 13, 17)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 1, 2):
            torch.set_num_threads(threads)
            with torch.no_grad(), ops.use_backend('native'):
                results.append(layer._forward_operators(*SUBJECT.projected(layer, x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)


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
    layer, x = SUBJECT.layer(PairwiseAttention), torch.randn(1, 64, 9, 9)
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

    layer, x = SUBJECT.layer(PairwiseAttention), torch.randn(1, 64, 9, 9)
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
    layer, x = SUBJECT.layer(PatchwiseAttention), torch.randn(2, 64, 40, 40)
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


@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_gradients_do_not_depend_on_threads(cls):
    layer = SUBJECT.layer(cls, kernel_size=5).train()
    inputs = SUBJECT.projected(layer, torch.empty(2, 64, 31, 17))
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


@pytest.mark.parametrize('capability', ['default', 'avx2'])
def test_other_instruction_sets(capability):
    """The conformance suite on the builds for lesser processors."""
    code = 'import sys; from san_backbones.ops import native; sys.exit(native.build() == "avx512")'
    environment = {**os.environ, 'ATEN_CPU_CAPABILITY': capability, 'OMP_NUM_THREADS': '1'}
    if subprocess.run([sys.executable, '-c', code], env=environment).returncode:
        pytest.skip(f'torch does not step down to {capability} here')
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider',
         pathlib.Path(__file__).with_name('test_conformance.py'), '-k',
         'native and (positions or odd_widths or layouts or wide or (definition and 7-2) or (gradients and 3-2))'],
        env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize('relation', [-1, 7, 8, 1 << 40])
def test_unknown_codes_are_refused_by_the_loops(relation, monkeypatch):
    layer = SUBJECT.layer(PairwiseAttention, kernel_size=3)
    x = torch.randn(1, 64, 4, 5)
    maps = [fused.channels_last(y) for y in (layer.query(x), layer.key(x), layer.value(x), layer.place(x))]
    numbers, folded = fused.fold_gamma(*(ops.fold(norm, norm.running_mean, norm.running_var) for norm in (
        layer.gamma().norm1, layer.gamma().norm2)), layer.gamma(), layer.spec(), native.library.width(), 0)
    shape, gradient = fused.Shape(*numbers), torch.zeros(1, 4, 5, 16)
    calls = (lambda: native.attention.output(shape, maps, folded, None),
             lambda: native.attention.gradients(shape, maps, folded, gradient))
    with torch.no_grad():
        for form, code in ((0, relation), (1, relation), (2, 0), (-1, 0)):
            monkeypatch.setattr(native.library, 'codes', lambda *_, form=form, code=code: (form, code))
            for call in calls:
                with pytest.raises(ValueError, match='have no such form, relation or mode: '
                                                     f'form {form}, relation {code}, mode 0'):
                    call()
        monkeypatch.undo()
        with pytest.raises(ValueError, match='have no such form, relation or mode: form 0, relation 0, mode 3'):
            native.attention._run_backward(shape, maps, folded, 3, gradient)
        with pytest.raises(ValueError, match='no clique relation' if relation == 7 else
                           rf'relation must be in \[0, 8\), got {relation}'):
            torch.ops.san_backbones.attend(layer.query(x), layer.key(x), layer.value(x), layer.place(x), *folded, None,
                                           [relation, *shape[1:]])


def test_the_table_and_the_loops_have_the_same_relations():
    assert {(form, name) for number, form in enumerate(native.library.FORMS)
            for name in native.library._loaded().san_relations(number).decode().split()} \
        == {(relation.form, relation.name) for relation in relations.RELATIONS if 'native' in relation.backends}
    assert native.library.codes('patchwise', 'clique') == (1, native.library.UNKNOWN_RELATION)


@pytest.mark.parametrize('cls, relation', SUBJECT.relations())
@pytest.mark.parametrize('size, kernel_size, dilation', [
    ((5, 37), 3, 1), ((9, 16), 5, 1), ((6, 70), 3, 2), ((2, 21), 7, 1), ((11, 5), 3, 1)])
def test_both_layouts_of_vectors(cls, relation, size, kernel_size, dilation, monkeypatch):
    """Across the channels of a pixel, and across the pixels of a row, whichever is the quicker: against float64."""
    torch.manual_seed(3)
    layer = cls(48, rel_planes=6, out_planes=30, share_planes=6, kernel_size=kernel_size, dilation=dilation,
                relation=relation).eval()
    for norm in (module for module in layer.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_mean, -.5, .5)
    x, shift = torch.randn(2, 48, *size), torch.randn(30)
    query, key, value = SUBJECT.projected(layer, x)[:3]

    def attend(dtype, backend):
        exact = copy.deepcopy(layer).to(dtype)
        maps = (x.to(dtype) for x in (query, key, value))
        with torch.no_grad(), ops.use_backend(backend):
            return ops.footprint_attention(*maps, exact.place(value.to(dtype)), exact.gamma(), exact.spec(),
                                           shift.to(dtype))
    expected = attend(torch.float64, 'reference')
    taken = []
    run = native.library.run
    monkeypatch.setattr(native.library, 'run', lambda name, task: taken.append(task.planes) or run(name, task))
    for narrow in (0, 64):
        monkeypatch.setattr(native.attention, 'NARROW', dict.fromkeys(native.attention.NARROW, narrow))
        found = attend(torch.float32, 'native')
        assert (found.double() - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert taken == [0, int(size[1] >= native.library.width())]


@pytest.mark.parametrize('cls, relation', SUBJECT.relations())
@pytest.mark.parametrize('size, kernel_size, dilation, position', [
    ((5, 37), 3, 1, 'relative'), ((19, 16), 5, 1, 'absolute'), ((6, 70), 3, 2, 'none'), ((2, 21), 7, 1, 'relative'),
    ((11, 5), 3, 1, 'relative')])
@pytest.mark.parametrize('training', [False, True])
def test_gradients_in_both_layouts(cls, relation, size, kernel_size, dilation, position, training, monkeypatch):
    """As above, of maps and parameters, with either kind of statistics."""
    if training and (cls.pairwise, relation) not in statistics.SUPPORTED:
        pytest.skip('no batch statistics of this relation')
    torch.manual_seed(4)
    options = dict(position=position) if cls.pairwise else {}
    layer = cls(48, rel_planes=6, out_planes=30, share_planes=6, kernel_size=kernel_size, dilation=dilation,
                relation=relation, **options).train(training)
    for norm in (module for module in layer.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_mean, -.5, .5)
        torch.nn.init.uniform_(norm.weight, .5, 1.5)
        torch.nn.init.uniform_(norm.bias, -.2, .2)
    maps, gradient = SUBJECT.projected(layer, torch.randn(2, 48, *size))[:3], torch.randn(2, 30, *size)

    def gradients(dtype, backend):
        exact = copy.deepcopy(layer).to(dtype)
        leaves = [x.detach().to(dtype).requires_grad_() for x in maps]
        leaves += [x for name, x in exact.named_parameters() if name.startswith(('weight_mlp', 'position'))]
        with ops.use_backend(backend):
            output = ops.footprint_attention(*leaves[:3], exact.place(leaves[2]), exact.gamma(), exact.spec())
            return output.detach(), torch.autograd.grad(output, leaves, gradient.to(dtype))
    output, expected = gradients(torch.float64, 'reference')
    largest = max(exact.abs().max() for exact in expected)  # some gradients are zero, as sums of others
    taken = []
    run = native.library.run
    monkeypatch.setattr(native.library, 'run', lambda name, task: taken.append(
        task.task.planes if name == 'san_backward' else None) or run(name, task))
    for narrow in (0, 64):
        monkeypatch.setattr(native.attention, 'NARROW', dict.fromkeys(native.attention.NARROW, narrow))
        monkeypatch.setattr(native.attention, 'NARROW_BACKWARD', dict.fromkeys(native.attention.NARROW, narrow))
        actual, computed = gradients(torch.float32, 'native')
        assert (actual.double() - output).abs().max() <= 1e-5 * output.abs().max()
        for found, exact in zip(computed, expected):
            assert (found.double() - exact).abs().max() <= 1e-5 * largest
        backward = {planes for planes in taken if planes is not None}
        assert backward == {int(narrow > 0 and size[1] >= native.library.width())}
        taken.clear()


@pytest.mark.parametrize('narrow', [0, 64])
def test_large_logits_in_both_layouts(narrow, monkeypatch):
    """The softmax is the same whatever is added to all of its logits, up to their rounding."""
    monkeypatch.setattr(native.attention, 'NARROW', dict.fromkeys(native.attention.NARROW, narrow))
    layer, x = PairwiseAttention(48, rel_planes=6, out_planes=30, share_planes=6).eval(), torch.randn(2, 48, 5, 37)
    with torch.no_grad(), ops.use_backend('native'):
        expected = layer(x)
        layer.weight_mlp.fc2.bias -= 200
        torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('narrow', [0, 64])
def test_small_weights_are_exact(narrow, monkeypatch):
    """A neighbour's weight e^-t / (8 + e^-t) in float32, down to the smallest normal number; none below it; NaN stays.

    Each image has one such neighbour, whose value is one, in a corner of the footprint of the pixel in its middle.
    """
    monkeypatch.setattr(native.attention, 'NARROW', dict.fromkeys(native.attention.NARROW, narrow))
    layer = PairwiseAttention(8, rel_planes=4, out_planes=8, share_planes=4, kernel_size=3).eval()
    mlp = layer.weight_mlp
    for parameter in mlp.parameters():
        torch.nn.init.zeros_(parameter)
    for norm in (mlp.norm1, mlp.norm2):
        torch.nn.init.ones_(norm.weight)
        norm.eps = 0
    with torch.no_grad():
        mlp.fc1.weight[0, 0] = 1
        mlp.fc2.weight[:, 0] = -1
    t = torch.cat([torch.linspace(0, 84, 1000), torch.tensor([90., 104., 1e4, 1e9, 3e38, math.nan])])
    query, key, value = torch.zeros(len(t), 4, 3, 3), torch.zeros(len(t), 4, 3, 3), torch.zeros(len(t), 8, 3, 3)
    key[:, 0, 0, 0] = -t
    value[:, :, 0, 0] = 1
    with torch.no_grad(), ops.use_backend('native'):
        y = ops.footprint_attention(query, key, value, layer.place(value), layer.gamma(), layer.spec())[:, :, 1, 1]
    weight = (-t.double()).exp()
    expected = weight / (8 + weight)
    torch.testing.assert_close(y[:1000].double(), expected[:1000, None].expand(-1, 8), rtol=4e-7, atol=0)
    assert (y[1000:-1] == 0).all()
    assert y[-1].isnan().all()
