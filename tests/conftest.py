"""What all tests share."""
import pytest
import torch


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """Maps this small are computed fastest by one thread, and to the same bits each time; on a busy machine several
    mostly wait for each other. Whatever number a module leaves, the next does not see it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
