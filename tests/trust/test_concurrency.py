"""Threads and processes that use one model at once, and threads that change its weights meanwhile.

What is guaranteed: calls that overlap no change of the weights have the same bits whoever else computes; a call that
begins after a change is of the new weights alone, in whichever thread, fused or not. A call that overlaps
`load_state_dict` may meet some tensors of either kind, as in any model of torch, and leaves nothing of that behind; who
wants none of it loads another model and replaces the reference.
"""
import collections
import faulthandler
import http.server
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save
from torch import nn

import san_backbones
from san_backbones import fuse, fuse_for_inference, hub, ops
from tests.hub_server import HubServer

NAMES = ('test_san_pairwise', 'test_san_patchwise')
PATIENCE = 240  # seconds, of a machine with much else to do


@pytest.fixture(autouse=True)
def switching_often():
    """Threads take turns a thousand times more often than Python lets them; whoever hangs shows where."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    sys.setswitchinterval(before)


def in_threads(*works):
    """Runs functions at once, each in a thread of its own; their results, or the first error."""
    barrier, results, errors = threading.Barrier(len(works)), [None] * len(works), []

    def run(i):
        barrier.wait()
        try:
            results[i] = works[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), 'deadlock'
    if errors:
        raise errors[0]
    return results


def make(name='test_san_pairwise', seed=0):
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=3).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 1:
            nn.init.uniform_(tensor, 0.3, 1.3)
    return model


def images(count):
    """Of different sizes, one after the other."""
    return [torch.rand(1, 3, 32 + 8 * (i % 3), 48) for i in range(count)]


def logits(model, image):
    with torch.inference_mode():
        return model(image)


def two_states(name, image, fused=True):
    """Two sets of weights, and the logits of models that never had others."""
    states = [{key: tensor * factor if tensor.is_floating_point() else tensor.clone()
               for key, tensor in make(name).state_dict().items()} for factor in (1., 1.2)]
    models = [make(name), make(name)]
    for model, state in zip(models, states):
        model.load_state_dict(state)
    expected = [logits(fuse_for_inference(model) if fused else model, image) for model in models]
    assert not torch.equal(*expected)
    return states, expected


# --- The same results ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_threads_with_one_model(name, fused):
    model, pictures = make(name), images(3)
    if fused:
        fuse_for_inference(model)
    expected = [logits(model, picture) for picture in pictures]

    def infer(first):
        for i in range(6):
            k = (first + i) % len(pictures)
            assert torch.equal(logits(model, pictures[k]), expected[k])
    in_threads(*(lambda first=first: infer(first) for first in range(4)))


def test_training_in_threads():
    x = torch.rand(2, 3, 32, 32)

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
        return model.state_dict()
    expected = [train(make(name).train()) for name in NAMES]
    models = [make(name).train() for name in NAMES]
    for found, state in zip(in_threads(*(lambda model=model: train(model) for model in models)), expected):
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_server_that_changes_models():
    """Requests in threads, while the model is replaced by another: each answer is of one of them."""
    models = [fuse_for_inference(make(seed=seed)) for seed in range(2)]
    picture = images(1)[0]
    expected = [logits(model, picture).numpy().tobytes() for model in models]
    serving = [models[0]]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            image = torch.frombuffer(bytearray(self.rfile.read(picture.nbytes)), dtype=torch.float32)
            answer = logits(serving[0], image.view_as(picture)).numpy().tobytes()
            self.send_response(200)
            self.send_header('Content-Length', str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    serve = threading.Thread(target=server.serve_forever, args=(0.02,))
    serve.start()
    opener, answers = urllib.request.build_opener(urllib.request.ProxyHandler({})), []

    def ask():
        for _ in range(6):
            url = f'http://127.0.0.1:{server.server_address[1]}'
            with opener.open(url, picture.numpy().tobytes(), timeout=PATIENCE) as answer:
                answers.append(answer.read())
            serving[0] = models[len(answers) // 8 % 2]
    try:
        in_threads(ask, ask, ask)
    finally:
        server.shutdown()
        serve.join()
        server.server_close()
    counts = collections.Counter(answers)
    assert set(counts) == set(expected) and counts.total() == 18


def test_processes(tmp_path):
    """Workers of fork and spawn, DataLoader's, and forks of a process that used OpenMP threads."""
    faulthandler.cancel_dump_traceback_later()  # the script ends by itself, and shows where it hangs
    environment = {key: value for key, value in os.environ.items() if key != 'OMP_NUM_THREADS'}
    stdout, stderr = tmp_path / 'stdout', tmp_path / 'stderr'  # not pipes, which workers that are left would keep open
    with open(stdout, 'w') as out, open(stderr, 'w') as errors:
        status = subprocess.run([sys.executable, str(pathlib.Path(__file__).with_name('processes.py'))],
                                env=environment, stdout=out, stderr=errors).returncode
    assert status == 0, f'{stdout.read_text()}{stderr.read_text()[-5000:]}'
    said = stdout.read_text().splitlines()
    assert said[:6] == ['threads', 'fork', 'loader', 'spawn', 'threads of OpenMP', 'fork from threads of OpenMP']
    assert len(said) == 7 or sys.platform != 'linux' or ops.native.unavailable()


FORK = """
import os, signal, timm, torch, san_backbones
model, image = timm.create_model('test_san_patchwise').eval(), torch.rand(1, 3, 96, 96)
torch.set_num_threads(2)
torch.rand(1 << 20).double().mul_(2)  # by several threads, and not of this package
child = os.fork()
if child == 0:
    signal.alarm(60)
    with torch.no_grad():
        model(image)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform != 'linux' or ops.native.unavailable() is not None, reason='no compiled loops')
def test_a_fork_after_threads_of_torch():
    done = subprocess.run([sys.executable, '-c', FORK], capture_output=True, text=True)
    assert done.stdout == '0\n', done.stderr
    native = ops.native
    assert 'it goes on with one thread' in done.stderr \
        or not native.threads.runtime(native.library._loaded()).lost_in_fork


# --- Weights that change ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', ['modules', 'fused', 'fused, assigned'])
def test_weights_loaded_meanwhile(how):
    """Calls that overlap no load are of the weights loaded last, to the bit."""
    model, picture = make(), images(1)[0]
    if how != 'modules':
        fuse_for_inference(model)
    states, expected = two_states(NAMES[0], picture, how != 'modules')
    model.load_state_dict(states[1])
    loads, calls = [0], collections.Counter()  # loads: odd while one goes on
    wrong, loading = [], True

    def infer():
        while loading and not wrong:
            before = loads[0]
            found = logits(model, picture)
            alone = before == loads[0] and before % 2 == 0
            calls[alone] += 1
            if alone and not torch.equal(found, expected[(before // 2 + 1) % 2]):
                wrong.append(before // 2)

    def load():
        nonlocal loading
        try:
            for i in range(12):
                enough = calls[True] + 3
                while calls[True] < enough and not wrong:
                    time.sleep(0.001)
                loads[0] += 1
                model.load_state_dict(states[i % 2], assign='assigned' in how)
                loads[0] += 1
        finally:
            loading = False
    in_threads(load, infer, infer)
    assert not wrong, f'stale or torn after loads {wrong}'
    assert calls[True] > 30 and calls[False] > 3, 'one way of meeting was hardly tried'


def _trace_lines(run, act, at=None):
    """Runs `run`, calling `act` at line number `at` of those that it executes in this package; how many there were."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if 'san_backbones' not in frame.f_code.co_filename:
            return None
        if event == 'line':
            count += 1
            if count == at:
                sys.settrace(None)
                act()
                return None
        return trace
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize('name', NAMES)
def test_weights_loaded_at_any_line_of_a_folding_call(name):
    """Whatever a call had read already, and wherever it keeps it: the next call is of the new weights."""
    model, picture = fuse_for_inference(make(name)), images(1)[0]
    states, expected = two_states(name, picture)
    model.load_state_dict(states[0])
    with torch.inference_mode():
        lines = _trace_lines(lambda: model(picture), None)
        assert lines > 500
        for i, at in enumerate(range(1, lines, lines // 40)):
            # state i % 2 is loaded and not yet folded; the other comes in the middle of the call that folds it
            _trace_lines(lambda: model(picture), lambda: model.load_state_dict(states[(i + 1) % 2]), at)
            assert torch.equal(model(picture), expected[(i + 1) % 2]), f'line {at} of {lines}'
            model.load_state_dict(states[(i + 1) % 2])


@pytest.mark.parametrize('change', ['data', 'moved'])
def test_a_fold_in_the_making_is_not_kept_when_folds_become_invalid(change, monkeypatch):
    """fuse_for_inference after a write through `data`, and moving a model, while another thread folds."""
    model, picture = fuse_for_inference(make()), images(1)[0]
    logits(model, picture)
    real, waiting = fuse.FoldableStage._fold_anew, [model.stages[2]]

    def fold_anew(stage, present):
        found = real(stage, present)
        if stage in waiting:
            waiting.clear()
            with torch.inference_mode(False), torch.no_grad():
                if change == 'data':
                    for parameter in stage.parameters():
                        parameter.data.mul_(1.5)
                    fuse_for_inference(model)
                else:
                    model.double()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(fuse.FoldableStage, '_fold_anew', fold_anew)
        if change == 'data':
            logits(model, picture)
        else:
            with pytest.raises(RuntimeError):  # half of it is in float64
                logits(model, picture)
            model.float()
    found = logits(model, picture)
    assert torch.equal(found, logits(fuse_for_inference(model), picture))


def test_coordinates_of_another_size_come_in_between():
    """A thread with maps of another size replaces what is kept, between any two instructions."""
    model, (picture, _) = fuse_for_inference(make()), images(2)
    with ops.use_backend('tiled'):  # the compiled loops keep them with their calls
        expected = logits(model, picture)
    block = model.stages[2]._folded[0].blocks[0]
    other = {(1, 1): torch.zeros(1, 2, 1, 1)}

    def call(at):
        """Runs the model, with the exchange before instruction `at` of the block's; how many instructions there are."""
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            place = fuse.FoldedBlock._place.__code__
            if frame.f_code is not place or frame.f_locals['self'].places is not block.places:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            count += event == 'opcode'
            if count == at and event == 'opcode':
                block.places.clear()
                block.places.update(other)
            return trace
        sys.settrace(trace)
        try:
            with ops.use_backend('tiled'):
                assert torch.equal(logits(model, picture), expected), f'before instruction {at}'
        finally:
            sys.settrace(None)
        assert len(block.places) <= 2
        return count

    assert all(call(at) >= 10 for at in range(call(0) + 1))


def test_tensors_that_count_no_writes():
    with torch.inference_mode():
        model, picture = fuse_for_inference(make()), images(1)[0]
        assert model.stages[0].norm.running_var.is_inference()
        model(picture)
        for stage in model.stages:
            for block in stage.blocks:
                block.norm2.running_var.mul_(3)
        found = model(picture)
        assert torch.equal(found, fuse_for_inference(model)(picture))


def test_a_replica_makes_a_fold_of_its_own():
    """nn.DataParallel's replicas are copies of the attributes of a module, with parameters of another device."""
    model, picture = fuse_for_inference(make()), images(1)[0]
    stage = model.stages[1]

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = replicate(child)
        for name, tensor in module._parameters.items():
            setattr(replica, name, None if tensor is None else tensor.detach() * 1.1)
        return replica

    with torch.inference_mode():
        x = model.stages[0](model.stem(picture))
        here = stage(x)
        replica = replicate(stage)
        there = replica(x)
        assert torch.equal(stage(x), here) and not torch.equal(there, here)
        replica.set_folding(False)
        torch.testing.assert_close(there, replica(x), rtol=1e-4, atol=1e-4)


def test_the_path_asked_for_by_several_threads():
    """A thread that leaves its block does not end those of others."""
    one, two = ops.use_backend('reference'), ops.use_backend('tiled')
    with one:
        two.__enter__()
    assert ops.backends._wanted()[0] == 'tiled'
    two.__exit__(None, None, None)
    assert ops.backends._wanted()[0] != 'tiled'

    def enter(name):
        for _ in range(300):
            with ops.use_backend(name):
                assert ops.backends._wanted()[0] in ('reference', 'tiled')
    in_threads(*(lambda name=name: enter(name) for name in ('reference', 'tiled') * 2))
    assert not ops.backends._overrides


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
def test_a_fork_takes_no_other_threads_path_along():
    """Nor the lock that another thread holds while it enters or leaves a block."""
    entered, leave = threading.Event(), threading.Event()

    def other():
        with ops.use_backend('reference'):
            entered.set()
            leave.wait(PATIENCE)
    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(PATIENCE)
    with ops.use_backend('tiled'), ops.backends._entering:
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            with ops.use_backend('tiled'):
                pass
            os._exit([name for name, _ in ops.backends._overrides] != ['tiled'])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    leave.set()
    thread.join()


@pytest.mark.parametrize('tool', ['torch.export', 'torch.compile'])
def test_threads_are_not_traced_by_another(tool):
    """The path of a call, and so its bits, are what they are while another thread compiles or exports."""
    model, other, picture = fuse_for_inference(make()), make(NAMES[1]), images(1)[0]
    expected, counts, working = logits(model, picture), [0, 0], True

    def infer():
        while working:
            counts[0] += 1
            counts[1] += not torch.equal(logits(model, picture), expected)

    def trace():
        nonlocal working
        try:
            if tool == 'torch.export':
                torch.export.export(other, (picture,))
            else:
                torch.compile(other, backend='aot_eager')(picture)
        finally:
            working = False
    in_threads(trace, infer)
    assert counts[0] > 10 and counts[1] == 0


# --- Weights from the Hub --------------------------------------------------------------------------------------------

def test_threads_download_the_same_file(tmp_path, monkeypatch):
    content = save({'weight': torch.rand(1 << 18)})
    hub.manifest.cache_clear()
    with HubServer() as server:
        server.put('org/name', hub.FILENAME, content)
        for name, value in dict(ENDPOINT=server.endpoint, HF_HUB_DISABLE_XET=True, HF_HUB_OFFLINE=False).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE',
                            server.endpoint + '/{repo_id}/resolve/{revision}/{filename}')
        paths = in_threads(*[lambda: hub.weights('org/name', cache_dir=tmp_path)] * 4, *[hub.manifest] * 4)
    assert {pathlib.Path(path).read_bytes() for path in paths[:4]} == {content}
    assert all(manifest == paths[4] for manifest in paths[4:])
    assert san_backbones.hub.manifest() is san_backbones.hub.manifest()
