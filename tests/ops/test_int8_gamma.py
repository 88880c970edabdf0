"""gamma's products in 8 bits, against their definition in float64."""
import pytest
import torch

from san_backbones import ops
from san_backbones.ops import geometry, native, reference

pytestmark = pytest.mark.skipif(not native.has_int8(), reason='needs AVX-512 VNNI')


def _norm(channels, shift):
    one, zero = torch.ones(channels), torch.zeros(channels)
    return ops.Norm(one, shift, zero, one, False, 0.1, 0.)


def _gamma(inputs, hidden, columns):
    return ops.Gamma(
        _norm(inputs, torch.zeros(inputs)), torch.randn(hidden, inputs, 1, 1),
        _norm(hidden, torch.randn(hidden)), torch.randn(columns, hidden, 1, 1), torch.randn(columns), {})


def _run(maps, gamma, spec, shift, rounded):
    """maps: query, key, value and, if there are positions, place."""
    maps = [x.permute(0, 2, 3, 1).contiguous() for x in maps]
    output = torch.empty_like(maps[2])
    call = ops.prepare_attention(*maps, *[None] * (4 - len(maps)), gamma, spec, shift, output, rounded)
    native.library.run(call.name, call.task)
    return output.permute(0, 3, 1, 2)


def _round_columns(weight):
    """(inner, columns) in multiples from -127 to 127 of a step of each column."""
    step = weight.abs().amax(0) / 127
    return (weight / step).round() * step


def _round_rows(x):
    """(..., inner), no element negative, in multiples from 0 to 255 of a step of each row."""
    step = (x.amax(-1, keepdim=True) / 255).clamp(min=1e-30)
    return (x / step).round() * step


def _expected(maps, gamma, spec, shift, group):
    """The attention in float64, its relations, in groups of taps, and its middles rounded for each pixel or pair."""
    query, key, value, *place = (x.double() for x in maps)
    rel, area = query.shape[1], spec.kernel_size ** 2
    pad = geometry.padding(spec.kernel_size, spec.dilation)
    key, value = geometry.reflect_pad(key, pad), geometry.reflect_pad(value, pad)
    places = (place[0], geometry.reflect_pad(place[0], pad)) if place else (None, None)
    delta = reference.relate(query, key, *places, *spec).relu().movedim(1, -1)  # (N, taps or 1, H, W, inputs)
    weight1, weight2 = (x.double().flatten(1).t() for x in (gamma.weight1, gamma.weight2))
    if spec.pairwise:
        parts = [torch.arange(delta.shape[-1])]
    else:  # phi first, then channel c of tap o at c * area + o
        taps = [torch.arange(begin, min(begin + group, area)) for begin in range(0, area, group)]
        parts = [rel + (torch.arange(rel) * area + some[:, None]).flatten() for some in taps]
        parts[0] = torch.cat([torch.arange(rel), parts[0]])
    hidden = sum(_round_rows(delta[..., part]) @ _round_columns(weight1[part]) for part in parts)
    hidden = _round_rows((hidden + gamma.norm2.bias).relu())
    logits = (hidden @ _round_columns(weight2) + gamma.bias2).movedim(-1, 1)
    return (reference.aggregate(logits, value, spec.pairwise, spec.kernel_size, spec.dilation)
            + shift[:, None, None]).relu()


@pytest.mark.parametrize('pairwise, position, rel, out, share, kernel_size, dilation', [
    (False, 'none', 20, 40, 4, 7, 1), (False, 'none', 33, 48, 3, 5, 2), (False, 'none', 128, 64, 8, 7, 1),
    (False, 'none', 600, 20, 4, 3, 1), (True, 'none', 33, 40, 4, 7, 1), (True, 'relative', 64, 256, 8, 7, 1),
    (True, 'absolute', 130, 48, 3, 3, 2)])
def test_against_float64(pairwise, position, rel, out, share, kernel_size, dilation):
    torch.manual_seed(rel)
    spec = ops.Spec(pairwise, 'subtraction' if pairwise else 'concatenation', position, kernel_size, dilation)
    area, hidden = kernel_size ** 2, out // share
    # the largest of each group is 255 steps: so relations are rounded to themselves, without doubt where the half is
    key, query = (torch.randint(0, 256, (2, rel, 9, 10)).float() for _ in range(2))
    query[:, 0], key[:, 0] = 255, 0 if pairwise else 255
    place = [] if position == 'none' else [torch.randint(-99, 100, (1, 2, 9, 10)).float()]
    gamma = _gamma(rel + 2 * len(place) if pairwise else rel * (area + 1), hidden, hidden * (1 if pairwise else area))
    gamma.weight1.mul_(0.003), gamma.norm2.bias.mul_(5)
    gamma.weight2.mul_(0.3 if pairwise else 0.05)
    value, shift = torch.randn(2, out, 9, 10), torch.randn(out)
    maps, rounded = (query, key, value, *place), ops.round_gamma(gamma, spec, rel)
    found = _run(maps, gamma, spec, shift, rounded)
    expected = _expected(maps, gamma, spec, shift, max(1, min(area, native.attention.GROUP_INT8 // rel)))
    scale = expected.std()
    error, whole = ((x - expected).abs() / scale for x in (found, _run(maps, gamma, spec, shift, None)))
    # a middle that lies between two steps may be rounded to one of them there and to the other here
    assert error.mean() < 1e-5 and error.max() < 0.01
    assert whole.mean() > 5e-4


def test_not_finite():
    """A pixel whose footprint holds a number that is not finite gives NaN, and no other does."""
    spec = ops.Spec(False, 'concatenation', 'none', 3, 1)
    query, key, value = (torch.randn(1, 24, 8, 9) for _ in range(3))
    gamma, shift = _gamma(24 * 10, 6, 6 * 9), torch.zeros(24)
    rounded = ops.round_gamma(gamma, spec, 24)
    expected = _run((query, key, value), gamma, spec, shift, rounded)
    for number in (torch.nan, torch.inf):
        key[0, 3, 4, 5] = number
        found = _run((query, key, value), gamma, spec, shift, rounded)
        near = torch.zeros(8, 9, dtype=torch.bool)
        near[3:6, 4:7] = True
        assert found[..., near].isnan().all()
        assert torch.equal(found[..., ~near], expected[..., ~near])


def test_not_everywhere(monkeypatch):
    """None where vectors lie across pixels, for relations of few channels, and without the instructions."""
    for pairwise, relation, rel, inputs in (
            (False, 'concatenation', 16, 160), (False, 'star', 64, 9), (True, 'subtraction', 32, 32),
            (True, 'dot', 64, 1)):
        gamma = _gamma(inputs, 8, 8 if pairwise else 72)
        assert ops.round_gamma(gamma, ops.Spec(pairwise, relation, 'none', 3, 1), rel) is None
    clique = ops.Spec(False, 'clique', 'none', 5, 1)
    assert ops.round_gamma(_gamma(625, 8, 200), clique, 20) is None
    gamma, spec = _gamma(170, 8, 72), ops.Spec(False, 'concatenation', 'none', 3, 1)
    assert ops.round_gamma(gamma, spec, 17) is not None
    monkeypatch.setattr(native.library, 'has_int8', lambda: False)
    assert ops.round_gamma(gamma, spec, 17) is None
