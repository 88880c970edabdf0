"""Closed forms of batch statistics against the relations themselves, in float64."""
import pytest
import torch

from san_backbones.ops import Spec, geometry, reference, statistics


@pytest.mark.parametrize('pairwise, relation', sorted(statistics.SUPPORTED))
@pytest.mark.parametrize('position', ['relative', 'absolute', 'none'])
@pytest.mark.parametrize(
    'kernel_size, dilation, size', [
        (1, 1, (3, 4)), (3, 1, (1, 5)), (5, 2, (6, 3)), (7, 1, (9, 8)), (3, 2, (2, 1700)), (5, 1, (1100, 1))])
def test_mean_variance_and_gradients(pairwise, relation, position, kernel_size, dilation, size):
    if not pairwise and position != 'none':
        pytest.skip('patchwise has no positions')
    torch.manual_seed(0)
    spec = Spec(pairwise, relation, position, kernel_size, dilation)
    maps = [5 + torch.randn(n, c, *size, dtype=torch.float64) for n, c in ((2, 4), (2, 4), (1, 2))]
    maps = [x.requires_grad_() for x in maps]
    query, key, place = maps if position != 'none' else (*maps[:2], None)
    mean, var, count = statistics.relation_statistics(query, key, place, spec)

    pad = geometry.padding(kernel_size, dilation)
    related = reference.relate(query, geometry.reflect_pad(key, pad), place,
                               None if place is None else geometry.reflect_pad(place, pad), *spec)
    expected_var, expected_mean = torch.var_mean(related, (0, 2, 3, 4), correction=0)
    assert count == related.numel() // related.shape[1]
    torch.testing.assert_close(mean, expected_mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(var, expected_var, rtol=1e-9, atol=1e-9)

    weights = torch.randn(2, mean.shape[0], dtype=torch.float64)
    used = [x for x in (query, key, place) if x is not None]
    actual = torch.autograd.grad((weights[0] * mean + weights[1] * var).sum(), used)
    expected = torch.autograd.grad((weights[0] * expected_mean + weights[1] * expected_var).sum(), used)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)


def test_a_large_mean_does_not_drown_the_variance():
    """Float32 maps far from zero: the variance keeps its digits and is never negative."""
    torch.manual_seed(0)
    spec = Spec(True, 'subtraction', 'none', 7, 1)
    query, key = 1e4 + torch.randn(1, 4, 16, 16), -1e4 + torch.randn(1, 4, 16, 16)
    _, var, _ = statistics.relation_statistics(query, key, None, spec)
    _, expected, _ = statistics.relation_statistics(query.double(), key.double(), None, spec)
    torch.testing.assert_close(var.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize('pairwise, relation', sorted(statistics.SUPPORTED))
def test_no_variance_is_negative(pairwise, relation):
    """Constant maps, whose moments differ by rounding only."""
    constants = torch.rand(1, 64, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 9, 7)
    _, var, _ = statistics.relation_statistics(constants, 3 * constants, None, Spec(pairwise, relation, 'none', 7, 1))
    assert (var >= 0).all()
