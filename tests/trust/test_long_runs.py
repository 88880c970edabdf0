"""Short runs of tools/run_long.py, and a check that every cache of the package is bounded."""
import ast
import pathlib

import pytest
import torch

import san_backbones
from san_backbones import ops
from tools import run_long
from tools.run_long import NAMES, WARM_UP, WINDOWS, calls, images, lives, loads, make, training, watch


# --- The measure -----------------------------------------------------------------------------------------------------

def _list():
    kept = []
    return lambda i: kept.append(torch.empty(4))


def _by_size():
    kept = {}
    return lambda i: kept.__setitem__(i % 1000, torch.empty(4))


def _loss_history():
    """What is summed without `.item()` keeps the graph of every step; Python sees one tensor of it."""
    weight, total = torch.zeros(4, requires_grad=True), [torch.zeros(())]

    def step(i):
        total[0] = total[0] + (weight * 2).sum()
    return step


def _cycle():
    """Collected, and so no leak."""
    def step(i):
        x = torch.empty(4)
        x.itself = x
    return step


@pytest.mark.parametrize('leak, seen', [
    (_list, {'tensors', 'objects', 'heap'}), (_by_size, {'tensors', 'objects', 'heap'}), (_loss_history, {'heap'}),
    (_cycle, set()), (lambda: lambda i: None, set())])
def test_the_measure_sees_leaks(leak, seen):
    figures = watch('leak', leak(), 200)
    assert figures.repetitions == 200
    if run_long.LIBC is None:
        seen = seen - {'heap'}
    assert {text.split()[0] for text in figures.excess()} - {'blocks', 'rss'} == seen, str(figures)
    if 'tensors' in seen:
        assert figures.growth['tensors'] == 1000 and figures.last.tensors - figures.first.tensors == \
            200 // WINDOWS * (WINDOWS - WARM_UP - 1)


def test_what_fills_up_once_is_no_growth():
    kept = []
    figures = watch('cache', lambda i: kept.append(torch.empty(4)) if i < 70 else None, 200)
    assert figures.last.tensors > figures.first.tensors and not figures.excess()


# --- Runs ------------------------------------------------------------------------------------------------------------

def holds(figures):
    assert not figures.excess(), str(figures)


@pytest.mark.parametrize('backend', ['native', 'tiled'])
@pytest.mark.parametrize('name', NAMES)
def test_training(name, backend):
    if backend not in ops.available_backends():
        pytest.skip(f'{backend} does not run here')
    holds(watch('training', training(make(name), backend, images(2, batch=2, largest=34)), 32, 2, windows=8))


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_calls(name, fused):
    model = make(name)
    if fused:
        san_backbones.fuse_for_inference(model)
    holds(watch('calls', calls(model, images(10, largest=40)), 200, 10))


@pytest.mark.parametrize('name', NAMES)
def test_models_are_gone_at_once(name):
    holds(watch('lives', lives(name), 6, windows=6))


@pytest.mark.parametrize('name', NAMES)
def test_loading_into_a_fused_model(name):
    holds(watch('loads', loads(name), 24, 4, windows=6))


def test_no_backend_stays_asked_for():
    with pytest.raises(ZeroDivisionError), ops.use_backend('tiled'):
        1 / 0  # noqa: B018
    assert ops.backends._overrides == ()


# --- Caches ----------------------------------------------------------------------------------------------------------

PACKAGE = pathlib.Path(san_backbones.__file__).parent
CACHES = {  # what is kept for the life of the process, by file and name, and its bound
    '_pictures.py _zip': 8,
    'fuse.py _watch_optimizers': 'one',
    'hub.py _unpack_shipped': 'one',
    'hub.py manifest': 'one',
    'ops/native/attention.py _reflection_index': 64,
    'ops/native/differences.py _axes': 64,
    'ops/native/library.py _int8': 'one',
    'ops/native/library.py _load': 'one',
    'ops/native/library.py codes': 'none',  # one for each relation
    'ops/native/library.py warn_if_unavailable': 'one',
    'ops/native/threads.py runtime': 'none',  # of libraries: a process loads one
    'ops/triton/__init__.py _fault': 'one',
    'ops/triton/__init__.py _version': 'one',
    'ops/triton/__init__.py installed': 'one',
    'ops/triton/launch.py _quickest': 'test_tuning_is_kept_for_kinds_of_sizes',
}
GROWS = {'dict', 'list', 'set', 'OrderedDict', 'defaultdict', 'deque', 'Counter', 'WeakKeyDictionary',
         'WeakValueDictionary', 'WeakSet'}


def _name(node):
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ''


def _bound(node, arguments=True):
    """That of `functools.cache`, `lru_cache` or `lru_cache(maxsize=...)`; None for any other expression."""
    name = _name(node.func if isinstance(node, ast.Call) else node)
    if name not in ('cache', 'lru_cache'):
        return None
    given = [*node.args, *(word.value for word in node.keywords)] if isinstance(node, ast.Call) else []
    size = given[0].value if given else 128 if name == 'lru_cache' else None
    return 'one' if not arguments else 'none' if size is None else size


def caches_of(source):
    """Name and bound of everything in a file that lives on and can grow."""
    tree = ast.parse(source)
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            bounds = [_bound(x, any(ast.iter_child_nodes(node.args))) for x in node.decorator_list]
            found[node.name] = next((bound for bound in bounds if bound is not None), None)
            if any(isinstance(x, (ast.Dict, ast.List, ast.Set)) for x in [*node.args.defaults, *node.args.kw_defaults]):
                found[node.name] = 'a default that is kept'
        elif isinstance(node, (ast.Module, ast.ClassDef)):
            for line in node.body:
                if isinstance(line, (ast.Assign, ast.AnnAssign)) and line.value is not None:
                    name = _name(line.targets[0] if isinstance(line, ast.Assign) else line.target)
                    value = line.value
                    call = isinstance(value, ast.Call)
                    if call and _bound(value.func) is not None:
                        found[name] = _bound(value.func)
                    elif ast.unparse(value) in ('{}', '[]') or (
                            call and _name(value.func) in GROWS and not value.args and not value.keywords):
                        found[name] = 'unknown'
    return {name: bound for name, bound in found.items() if bound is not None}


def test_every_cache_is_listed():
    found = {f'{path.relative_to(PACKAGE).as_posix()} {name}': bound for path in PACKAGE.rglob('*.py')
             for name, bound in caches_of(path.read_text()).items()}
    assert found.keys() == CACHES.keys(), 'say here how a new cache is bounded'
    for name, bound in found.items():
        if bound != 'unknown':
            assert bound == CACHES[name], name


def test_caches_are_found():
    source = '''
import functools, weakref
a = functools.lru_cache(maxsize=64)(len)
b = functools.cache(len)
c: dict = {}
d = weakref.WeakKeyDictionary()
e = dict(x=1)
@functools.lru_cache
def f(x): ...
@functools.cache
def g(x): ...
@functools.lru_cache(None)
def h(*x): ...
@functools.cache
def i(): ...
class J:
    k = []
    @functools.lru_cache(maxsize=2)
    def n(self): ...
def m(x, seen={}): ...
'''
    assert caches_of(source) == {
        'a': 64, 'b': 'none', 'c': 'unknown', 'd': 'unknown', 'f': 128, 'g': 'none', 'h': 'none', 'i': 'one',
        'k': 'unknown', 'n': 2, 'm': 'a default that is kept'}


def test_caches_after_many_sizes():
    """Images of 100 sizes."""
    model = san_backbones.fuse_for_inference(make(NAMES[0])).eval()
    with torch.inference_mode():
        for i in range(100):
            model(torch.rand(1, 3, 32, 32 + 2 * i))
    if ops.native.unavailable() is None:
        info = ops.native.attention._reflection_index.cache_info()
        assert info.currsize == info.maxsize == 64
    for stage in model.stages:
        folded, = stage._folded
        for block in folded.blocks:
            assert len(block.places) == 1 and len(block.gamma.cache) <= len(ops.fused.FUSED)


def test_tuning_is_kept_for_kinds_of_sizes(monkeypatch):
    """What was tuned on a GPU: for sizes within a factor of 16 once, whatever the batch and the memory format."""
    launch = pytest.importorskip('san_backbones.ops.triton.launch', reason='needs Triton')
    tuned = []
    monkeypatch.setattr(launch, '_tunes', lambda device: True)
    monkeypatch.setattr(launch, '_tune', lambda candidates, call: tuned.append(1) or candidates[0])
    monkeypatch.setattr(launch, '_quickest', {})
    monkeypatch.setattr(launch, 'configurations', lambda kernel, constants: (launch.Configuration(16, 4, 1),) * 2)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a GPU')
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)

    class Kernel:
        __name__, arg_names = 'attend_pairwise', ()

        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    shape = launch.Shape(0, 0, 3, 1, 8, 8, 8, 1)
    for i in range(300):
        height, width = 1 + i % 60, 1 + 7 * i % 90
        maps = [torch.rand(1 + i % 3, height, width, channels) for channels in (4, 4, 16)] + [None]
        launch._Launcher(shape, maps).run(Kernel(), (), *maps)
    assert len(launch._quickest) == len(tuned) <= 5
