"""SyncBatchNorm inside an attention layer: two processes with half a batch each equal one with the whole."""
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from san_backbones import PairwiseAttention, PatchwiseAttention, ops


def _layer(cls, norm_layer):
    torch.manual_seed(0)
    layer = cls(32, kernel_size=3, norm_layer=norm_layer).double()
    for norm in (layer.weight_mlp.norm1, layer.weight_mlp.norm2):
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return layer.train()


def _data():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(4, 32, 6, 7, dtype=torch.float64, generator=generator),
            torch.randn(4, 8, 6, 7, dtype=torch.float64, generator=generator))


def _run(layer, x, seed):
    x = x.clone().requires_grad_()
    output = layer(x)
    output.backward(seed)
    return dict(output=output.detach(), input=x.grad, parameters=[p.grad for p in layer.parameters()],
                buffers=[b.clone() for b in layer.buffers()])


def _process(rank, port, cls, backend, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    # unequal shares: 1 and 3 images
    part = slice(0, 1) if rank == 0 else slice(1, 4)
    x, seed = _data()
    with ops.use_backend(backend):
        result = _run(_layer(cls, nn.SyncBatchNorm), x[part], seed[part])
    for gradient in result['parameters']:
        dist.all_reduce(gradient)
    torch.save(result, os.path.join(folder, f'{rank}.pt'))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize('backend', ['reference', 'tiled'])
@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_two_processes_equal_one(cls, backend, tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.spawn(_process, (port, cls, backend, str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    whole = _run(_layer(cls, nn.BatchNorm2d), *_data())
    for name in ('output', 'input'):
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), whole[name], rtol=1e-8, atol=1e-10)
    for name in ('parameters', 'buffers'):
        for expected, *actual in zip(whole[name], *(p[name] for p in parts)):
            for tensor in actual:
                torch.testing.assert_close(tensor, expected, rtol=1e-8, atol=1e-10)
