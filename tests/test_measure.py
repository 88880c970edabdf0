"""What times the benchmarks."""
import pytest
import torch

from san_backbones import measure


@pytest.mark.parametrize('warm, calls', [(False, 'ab ab ab'), (True, 'ab aabb aabb')])
def test_turns(warm, calls):
    """One call of each ahead; then turns, in which a warm case runs once more before it is timed."""
    seen = []
    found = measure.alternate({name: lambda name=name: seen.append(name) for name in 'ab'}, 2, torch.device('cpu'),
                              warm=warm)
    assert ''.join(seen) == calls.replace(' ', '') and list(found) == ['a', 'b']
    assert all(seconds >= 0 for seconds in found.values())
