"""SyncBatchNorm: processes with parts of a batch equal one with the whole, whoever has little of it or nothing."""
import os
import socket

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import san_backbones  # noqa: F401, registers the models
from san_backbones import PairwiseAttention, PatchwiseAttention, ops
from san_backbones.norms import SyncBatchNorm

# pictures of the processes: unequal shares; one value for each at some norms; nothing at all for one of them
SHARES = [(1, 3), (1, 1), (0, 2), (2, 0), (0, 0)]
PATHS = [('reference', torch.float64), ('tiled', torch.float64), ('auto', torch.float32)]


def _smooth(model, dtype):
    """With norms after which every ReLU lets everything pass: rounding does not decide about gradients."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(norm.weight, 0.1, 0.3)
            nn.init.uniform_(norm.bias, 3., 4.)
    return model.to(dtype).train()


def _layer(cls, norm_layer, dtype):
    torch.manual_seed(0)
    return _smooth(cls(32, kernel_size=3, norm_layer=norm_layer), dtype)


def _network(name, norm_layer, dtype):
    torch.manual_seed(0)
    return _smooth(timm.create_model(name, num_classes=8, norm_layer=norm_layer, zero_init_last=False), dtype)


def _data(images, size, channels, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, channels, *size, dtype=torch.float64, generator=generator)
    return x.to(dtype), torch.randn(images, 8, dtype=torch.float64, generator=generator).to(dtype)


def _case(kind, size, dtype, norm_layer, images):
    """A model, its input and the gradient of its output."""
    if isinstance(kind, str):
        return _network(kind, norm_layer, dtype), *_data(images, size, 3, dtype)
    x, seed = _data(images, size, 32, dtype)
    return _layer(kind, norm_layer, dtype), x, seed[:, :, None, None].expand(-1, -1, *size)


def _run(model, x, seed):
    x = x.clone().requires_grad_()
    output = model(x)
    output.backward(seed)
    return dict(output=output.detach(), input=x.grad, parameters=[p.grad for p in model.parameters()],
                buffers=[b.clone() for b in model.buffers()])


def _process(rank, port, cases, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    results = []
    for backend, kind, size, dtype, shares in cases:
        norm_layer = SyncBatchNorm if isinstance(kind, str) else nn.SyncBatchNorm  # torch's own takes no CPU tensors
        model, x, seed = _case(kind, size, dtype, norm_layer, sum(shares))
        part = slice(0, shares[0]) if rank == 0 else slice(shares[0], None)
        try:
            with ops.use_backend(backend):
                result = _run(model, x[part], seed[part])
        except ValueError as error:
            results.append(str(error))
            continue
        for gradient in result['parameters']:
            dist.all_reduce(gradient)
        results.append(result)
    torch.save(results, os.path.join(folder, f'{rank}.pt'))
    dist.barrier()
    dist.destroy_process_group()


def _check(case, parts, bound):
    backend, kind, size, dtype, shares = case
    with ops.use_backend('reference'):
        whole = _run(*_case(kind, size, torch.float64, nn.BatchNorm2d, sum(shares)))
    for name in ('output', 'input'):
        _close(torch.cat([p[name] for p in parts]), whole[name], bound)
    for name in ('parameters', 'buffers'):
        for expected, *actual in zip(whole[name], *(p[name] for p in parts), strict=True):
            for tensor in actual:
                _close(tensor, expected, bound)


def _name(case):
    backend, kind, size, _, shares = case
    kind = kind if isinstance(kind, str) else kind.__name__
    return f'{backend}, {kind}, {size[0]} x {size[1]}, {shares[0]} and {shares[1]}'


def _close(actual, expected, bound):
    assert actual.shape == expected.shape and torch.isfinite(actual).all()
    assert (actual.double() - expected).norm() <= bound * (1 + expected.double().norm())


LAYERS = [(backend, kind, size, dtype, shares) for kind in (PairwiseAttention, PatchwiseAttention)
          for backend, dtype in PATHS for size in ((6, 7), (1, 1)) for shares in SHARES]
# one picture of 32 x 32 has a single pixel in the last stage; float32 has too few digits for norms of two values
NETWORKS = [(backend, name, (32, 32) if dtype == torch.float64 else (64, 64), dtype, shares)
            for name in ('test_san_pairwise', 'test_san_patchwise') for backend, dtype in PATHS
            for shares in ((1, 1), (0, 2))]
TOO_LITTLE = [(backend, PatchwiseAttention, (1, 1), dtype, shares) for backend, dtype in PATHS
              for shares in ((1, 0), (0, 1))]


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """What each process found, case by case."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    folder, cases = tmp_path_factory.mktemp('processes'), [*LAYERS, *NETWORKS, *TOO_LITTLE]
    mp.spawn(_process, (port, cases, str(folder)), nprocs=2)
    return dict(zip(cases, zip(*(torch.load(folder / f'{rank}.pt') for rank in range(2)))))


@pytest.mark.parametrize('case', LAYERS, ids=_name)
def test_two_processes_equal_one(case, found):
    """A map of one pixel has one value for each channel of the patchwise form."""
    _check(case, found[case], 1e-9 if case[3] == torch.float64 else 2e-4)


@pytest.mark.parametrize('case', NETWORKS, ids=_name)
def test_networks_in_two_processes_equal_one(case, found):
    _check(case, found[case], 1e-9 if case[3] == torch.float64 else 0.01)


@pytest.mark.parametrize('case', TOO_LITTLE, ids=_name)
def test_one_value_in_all_processes_is_too_little(case, found):
    """And each of them says so, with nobody left waiting."""
    assert all('more than 1 value per channel, got 1' in message for message in found[case])
