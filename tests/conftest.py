"""Fixtures for all tests."""
import contextlib
import os
import sys

import pytest
import torch

from san_backbones.san import Block

# Blocks of new networks begin as the identity, and would hide from most tests whatever the attention does: in the
# processes that run tests they begin as torch makes them. The fixture `zero_init_last` brings the default back.
INIT_LAST_AS_ZEROS, Block.init_last_as_zeros = Block.init_last_as_zeros, lambda self: None

# Some tests fork, and their children differentiate. torch refuses that ("autograd's threading in combination with
# fork") where the first backward pass of a process was one of torch.compile's; so a plain one comes first.
torch.ones(1, requires_grad=True).sum().backward()

# yapf, which mmengine imports, keeps its grammar in the user's cache, and writes it anew in the first import after an
# installation; of several processes that begin together, one may then read it half written. So it is there before any.
if 'PYTEST_XDIST_WORKER' not in os.environ:
    with contextlib.suppress(ImportError):
        import yapf  # noqa: F401

os.environ['SAN_BACKBONES_AUTHORS'] = '0'  # no test asks Google Drive by accident; those of that road say so


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """Maps this small are computed fastest by one thread, and to the same bits each time; on a busy machine several
    mostly wait for each other. Whatever number a module leaves, the next does not see it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module', autouse=True)
def numbers_of_module():
    torch.manual_seed(1)


@pytest.fixture(autouse=True)
def numbers_of_test(numbers_of_module):
    """A test draws the same numbers alone, behind others and in any process."""
    torch.manual_seed(0)


@contextlib.contextmanager
def default_scope_kept():
    """The default scope of MMEngine belongs to the process: a model of MMDetection that one test builds would have the
    next look for MMSegmentation's in the wrong registry.
    """
    def scopes():
        registry = sys.modules.get('mmengine.registry')
        return registry.DefaultScope._instance_dict if registry else {}

    before = dict(scopes())
    yield
    known = scopes()
    known.clear()
    known.update(before)


@pytest.fixture(scope='module', autouse=True)
def scope_of_module():
    with default_scope_kept():
        yield


@pytest.fixture(autouse=True)
def scope_of_test(scope_of_module):
    with default_scope_kept():
        yield


@pytest.fixture(scope='session')
def export_keeps_parity():
    """Whether torch.export writes into a program's guards, where MaxPool2d is, that sizes are odd or even in each stage
    as those of the example were. torch 2.10 does.
    """
    sizes = dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC)
    pool = torch.export.export(torch.nn.MaxPool2d(2), (torch.zeros(1, 1, 8, 8),), dynamic_shapes=(sizes,)).module()
    try:
        pool(torch.zeros(1, 1, 9, 9))
    except AssertionError:
        return True
    return False


@pytest.fixture
def zero_init_last(monkeypatch):
    """New networks begin as they do for users."""
    monkeypatch.setattr(Block, 'init_last_as_zeros', INIT_LAST_AS_ZEROS)
