"""accelerate: two processes train as one with the joined batch, and go on from what they saved."""
import socket
import subprocess
import sys

import pytest

pytest.importorskip('accelerate', reason='needs the accelerate extra')

import torch

from tests import environment
from tests.ecosystem import accelerate_steps


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    """What the two processes of torchrun have learnt."""
    folder = tmp_path_factory.mktemp('accelerate')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    result = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=2', '--master-addr=127.0.0.1',
         f'--master-port={port}', accelerate_steps.__file__, str(folder)], capture_output=True, text=True,
        env=environment())
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return [torch.load(folder / f'rank{rank}.pt') for rank in range(2)]


def test_both_processes_end_with_the_same_weights(ranks):
    first, second = ranks
    assert first['processes'] == second['processes'] == 2
    for name, tensor in first['straight'].items():
        assert torch.equal(tensor, second['straight'][name]), name


def test_steps_are_those_of_one_process(ranks):
    """Of torch alone, on batches twice as large."""
    model = accelerate_steps.model().train()
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for images, labels in accelerate_steps.data(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(ranks[0]['straight'][name], tensor, rtol=1e-7, atol=1e-9, msg=name)
    moved = [not torch.equal(initial[name], tensor) for name, tensor in ranks[0]['straight'].items()]
    assert sum(moved) > 0.8 * len(moved)


def test_goes_on_from_a_saved_state(ranks):
    for rank in ranks:
        for name, tensor in rank['straight'].items():
            assert torch.equal(tensor, rank['resumed'][name]), name
