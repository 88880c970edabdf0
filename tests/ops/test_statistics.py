"""Closed forms of batch statistics against the relations themselves, in float64."""
import pytest
import torch

from san_backbones.ops import Spec, geometry, native, reference, statistics


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


def _moments_and_gradients(query, key, footprint, weights):
    used = [x.detach().requires_grad_() for x in (query, key)]
    found = statistics.DIFFERENCE_MOMENTS(*used, *footprint)
    return found.detach(), torch.autograd.grad((weights * found).sum(), used)


@pytest.mark.skipif(native.unavailable() is not None, reason=f'no compiled loops: {native.unavailable()}')
@pytest.mark.parametrize('batch, channels, size, kernel_size, dilation', [
    (2, 5, (9, 8), 3, 1), (2, 3, (1, 5), 3, 2), (1, 4, (6, 3), 5, 2), (3, 16, (20, 30), 7, 1), (1, 2, (1, 1), 7, 1),
    (1, 2, (2, 1700), 3, 2), (0, 3, (4, 4), 3, 1)])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'slices', 'bfloat16'])
def test_differences_in_loops(batch, channels, size, kernel_size, dilation, layout):
    """Those of products in float64, of the same numbers: means to float64's digits, gradients to float32's."""
    torch.manual_seed(0)
    both = 3 + torch.randn(batch, 2 * channels, *size)
    both = both.bfloat16() if layout == 'bfloat16' else both
    both = both if layout == 'contiguous' else both.contiguous(memory_format=torch.channels_last)
    query, key = both.chunk(2, 1) if layout == 'slices' else (part.clone() for part in both.chunk(2, 1))
    weights, footprint = torch.randn(2, channels, dtype=torch.float64), (kernel_size, dilation)
    expected, gradients = _moments_and_gradients(query.double(), key.double(), footprint, weights)
    found, actual = _moments_and_gradients(query, key, footprint, weights)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    tolerance = 1e-2 if layout == 'bfloat16' else 1e-6
    for a, e, x in zip(actual, gradients, (query, key)):
        assert a.dtype == x.dtype
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_differences_are_registered_as_torch_expects(dtype):
    maps = [torch.randn(2, 4, 5, 6, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
            for _ in range(2)]
    torch.library.opcheck(torch.ops.san_backbones.difference_moments.default, (*maps, 3, 2),
                          test_utils=('test_schema', 'test_faketensor', 'test_autograd_registration'))
    torch.library.opcheck(torch.ops.san_backbones.difference_moments_backward.default,
                          (torch.randn(2, 4).double(), torch.randn(2, 4).double(), *(x.detach() for x in maps), 3, 2),
                          test_utils=('test_schema', 'test_faketensor'))


def test_differences_have_no_second_derivatives():
    maps = [torch.randn(1, 2, 3, 3, requires_grad=True) for _ in range(2)]
    with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
        torch.autograd.grad(statistics.DIFFERENCE_MOMENTS(*maps, 3, 1).sum(), maps, create_graph=True)
