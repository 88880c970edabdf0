"""Two processes over gloo with half a batch each train as one with the whole: DDP, FSDP, SyncBN, and torchrun."""
import os
import pathlib
import socket
import subprocess
import sys

import pytest

pytest.importorskip('mmseg', reason='needs the mm extra')

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.registry import MODELS
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

import san_backbones.mm  # noqa: F401
from tests.mm.tiny_training import ARCH, make_pictures, plain_configs, segmentation, train  # noqa: F401


def _port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _segmentor(attention, norm):
    import mmseg.models  # noqa: F401
    config = segmentation(pathlib.Path(), '', norm=norm, backbone=dict(arch=dict(ARCH, attention=attention)))
    torch.manual_seed(0)
    model = MODELS.build(dict(config.model, _scope_='mmseg')).double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.train()


def _batch(part=slice(None)):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=generator)
    masks = torch.randint(0, 2, (4, 1, 64, 64), generator=generator)
    return images[part], [SegDataSample(gt_sem_seg=PixelData(data=mask)) for mask in masks[part]]


def _step(model, part=slice(None)):
    """Makes a step of SGD and returns the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.)
    loss = model(*_batch(part), mode='loss')['decode.loss_ce']
    loss.backward()
    optimizer.step()
    return loss.detach()


def _one_epoch(pictures, work, **kwargs):
    config = segmentation(pictures, work, epochs=1, **kwargs)
    config.param_scheduler = []
    return config


FSDP_CRASHES = torch.__version__.startswith('2.6.')
"""In state_dict on the CPU: a segmentation fault in torch's own code."""
CASES = [(wrapper, attention) for wrapper in ('ddp', 'fsdp') for attention in ('pairwise', 'patchwise')]


def _flexible_runner(folder):
    """Trains for an epoch under FSDP, and tries to go on from there."""
    def runner(epochs):
        config = _one_epoch(folder / 'pictures', folder / 'flexible', batch_size=1, norm='SyncBN')
        config.train_cfg.max_epochs = epochs
        config.update(launcher='pytorch', resume=epochs > 1, strategy=dict(
            type='FSDPStrategy', state_dict_cfg='full',
            model_wrapper=dict(type='MMFullyShardedDataParallel', device_id='cpu')))
        return FlexibleRunner.from_cfg(config)
    runner(1).train()
    # MMEngine 0.10.7 passes optim_state_dict_to_load its arguments in the order of torch 2.0
    with pytest.raises(TypeError, match='unhashable type'):
        runner(2).train()


def _process(rank, port, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    from mmengine.model import MMDistributedDataParallel, MMFullyShardedDataParallel
    part = slice(2 * rank, 2 * rank + 2)
    for wrapper, attention in CASES:
        model = _segmentor(attention, 'SyncBN')
        if wrapper == 'ddp':
            wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
            loss, state = _step(wrapped, part), model.state_dict
        else:  # FSDP looks for a GPU unless told not to
            wrapped = MMFullyShardedDataParallel(model, device_id=torch.device('cpu'))
            # what Runner's initialization and save_checkpoint see
            torch.save([tensor.numel() for tensor in wrapped.module.state_dict().values()],
                       os.path.join(folder, f'{attention}-rank{rank}.pt'))
            loss, state = _step(wrapped, part), wrapped.state_dict
        dist.all_reduce(loss)
        state = state()  # FSDP's is a collective
        if rank == 0:
            state = {name.replace('_fsdp_wrapped_module.', ''): tensor for name, tensor in state.items()}
            torch.save((loss / 2, state), os.path.join(folder, f'{wrapper}-{attention}.pt'))
    if not torch.cuda.is_available() and not FSDP_CRASHES:  # mmengine would train on it
        _flexible_runner(pathlib.Path(folder))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    make_pictures(folder / 'pictures')
    mp.spawn(_process, (_port(), str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize('wrapper, attention', CASES)
def test_a_step_is_that_of_the_joined_batch(wrapper, attention, folder):
    loss, state = torch.load(folder / f'{wrapper}-{attention}.pt')
    model = _segmentor(attention, 'BN')
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = _step(model)
    torch.testing.assert_close(loss, expected)
    assert state.keys() == initial.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-7, atol=1e-9, msg=name)
    # a constant before a norm changes nothing, and so does not move
    assert sum(not torch.equal(state[name], initial[name]) for name in initial) > 0.8 * len(initial)


def test_fsdp_leaves_shards_to_runner(folder):
    """Why FSDP is trained by FlexibleRunner: Runner would initialize these, and save those of the first process."""
    whole = [tensor.numel() for tensor in _segmentor('patchwise', 'BN').state_dict().values()]
    for rank in range(2):
        assert 0 in torch.load(folder / f'patchwise-rank{rank}.pt')
        assert torch.load(folder / f'patchwise-rank{rank}.pt') != whole


@pytest.fixture(scope='module')
def same_as_in_one_process(folder):
    """A function that compares a checkpoint's weights with those that one process learns."""
    whole = _one_epoch(folder / 'pictures', folder / 'one', batch_size=2, norm='BN')
    initial = {name: p.detach().clone() for name, p in Runner.from_cfg(whole).model.named_parameters()}
    whole.experiment_name += '_again'
    state = train(whole)[0].model.state_dict()

    def check(path):
        saved = torch.load(path, weights_only=True)['state_dict']
        assert saved.keys() == state.keys()
        for name, tensor in state.items():
            moved = (tensor - initial[name]).norm() if name in initial else tensor.double().norm()
            # float32 gradients of this network are 0.7 % from float64's already; unshared statistics change all of it
            assert (tensor - saved[name]).double().norm() <= 0.05 * moved + 1e-5, name
    return check


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='with a GPU there, mmengine would train on it')


@needs_no_gpu
@pytest.mark.skipif(FSDP_CRASHES, reason='FSDP of torch 2.6 crashes on the CPU')
def test_flexible_runner_saves_whole_weights_under_fsdp(folder, same_as_in_one_process):
    same_as_in_one_process(folder / 'flexible/epoch_1.pth')


@needs_no_gpu
def test_torchrun_trains_as_one_process(folder, same_as_in_one_process):
    """MMSegmentation's own tools/train.py, through the whole Runner."""
    import mmseg
    config = _one_epoch(folder / 'pictures', folder / 'two', batch_size=1, norm='SyncBN')
    config.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    config.dump(folder / 'config.py')
    result = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=2', '--master-addr=127.0.0.1',
         f'--master-port={_port()}', '-m', 'san_backbones.mm.run',
         str(pathlib.Path(mmseg.__file__).parent / '.mim/tools/train.py'), str(folder / 'config.py'),
         '--launcher', 'pytorch'], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'},
        cwd=folder)  # where no other san_backbones lies than the one installed
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    same_as_in_one_process(folder / 'two/epoch_1.pth')
