"""Linear maps of a folded network: the compiled loops and torch's operators against float64."""
import pytest
import torch

from san_backbones import ops
from san_backbones.ops import native

BACKENDS = ['auto', 'reference'] if native.unavailable() is None else ['reference']
SHAPES = [  # height, width, channels in and out: no whole vectors, parts of panels, several parts of the sum
    (1, 1, 1, 1), (1, 7, 3, 5), (7, 7, 64, 24), (5, 10, 513, 33), (1, 61, 1030, 130), (3, 43, 40, 96), (2, 65, 16, 64)]


def _functions(inner, columns):
    before = ops.ScaleShiftReLU(torch.randn(inner), torch.randn(inner), 0.7)
    return before, ops.ScaleShiftReLU(torch.randn(columns), torch.randn(columns))


def _apply(f, x):
    y = (x * f.scale.double() + f.shift.double()).relu()
    return y if f.limit is None else y.clamp(max=f.limit)


def _close(found, expected):
    assert found.shape == expected.shape and found.is_contiguous()
    assert (found.double() - expected).abs().max() <= 2e-6 * (1 + expected.abs().max())


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('height, width, inner, columns', SHAPES)
def test_against_float64(backend, height, width, inner, columns):
    torch.manual_seed(inner)
    weight, bias = torch.randn(columns, inner), torch.randn(columns)
    x, there = torch.randn(2, height, width, inner), torch.randn(2, height, width, columns)
    before, after = _functions(inner, columns)
    exact, normalised = x.double() @ weight.double().t(), _apply(before, x.double()) @ weight.double().t()
    with torch.no_grad(), ops.use_backend(backend):
        project = ops.Linear(weight, bias)
        assert torch.equal(project.weight, weight)
        _close(project(x), exact + bias)
        _close(project(x, before), normalised + bias)
        _close(project(x, before._replace(limit=None)),
               _apply(before._replace(limit=None), x.double()) @ weight.double().t() + bias)
        output = torch.full_like(there, 9)
        assert project(x, before, output) is output
        _close(output, normalised + bias)
        expand = ops.Linear(weight)
        _close(expand.add_to(there.clone(), x), there + exact)
        _close(expand.add_to(there.clone(), x, after), _apply(after, there + exact))
        _close(project.add_to(there.clone(), x), there + exact + bias)


@pytest.mark.parametrize('backend', BACKENDS)
def test_inputs_with_strides(backend):
    """A slice of the channels, of the images, and a map with its channels first."""
    weight, x = torch.randn(20, 6), torch.randn(3, 5, 4, 18)
    with torch.no_grad(), ops.use_backend(backend):
        project = ops.Linear(weight)
        for part in (x[..., 7:13], x[1:2, ..., :6], x[..., :6].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
            _close(project(part), part.double() @ weight.double().t())


@pytest.mark.parametrize('backend', BACKENDS)
def test_nan_and_infinity(backend):
    """As ReLU and the bound of torch have them: NaN stays, infinity is bounded."""
    x = torch.ones(1, 1, 70, 20)
    x[0, 0, 3, 7], x[0, 0, 5, 2] = torch.nan, torch.inf
    before = ops.ScaleShiftReLU(torch.ones(20), torch.zeros(20), 6.)
    with torch.no_grad(), ops.use_backend(backend):
        y = ops.Linear(torch.ones(5, 20))(x, before)
    assert y[0, 0, 3].isnan().all() and (y[0, 0, 5] == 25).all() and (y[0, 0, 6] == 20).all()


@pytest.mark.skipif(native.unavailable() is not None, reason=f'no compiled loops: {native.unavailable()}')
def test_a_pixel_has_the_same_bits_wherever_it_is():
    """Whatever the number of threads, of pixels, and their place among them."""
    project, x = ops.Linear(torch.randn(150, 600), torch.randn(150)), torch.randn(1, 1, 500, 600)
    before, threads = _functions(600, 150)[0], torch.get_num_threads()
    try:
        with torch.no_grad():
            expected = project(x, before)
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                assert torch.equal(project(x, before), expected)
                for begin, end in ((0, 1), (3, 64), (100, 161), (499, 500)):
                    assert torch.equal(project(x[:, :, begin:end], before), expected[:, :, begin:end])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_weights_are_copies(dtype):
    weight, bias, x = (torch.randn(*shape, dtype=dtype) for shape in ((20, 6), (20,), (1, 2, 2, 6)))
    with torch.no_grad():
        project = ops.Linear(weight, bias)
        before = project(x)
        weight.add_(1)
        assert torch.equal(project(x), before)
        bias.add_(1)
        assert torch.equal(project(x), before)


@pytest.mark.parametrize('backend', BACKENDS)
def test_what_does_not_fit_is_an_error(backend):
    linear, x = ops.Linear(torch.randn(20, 6)), torch.randn(2, 3, 4, 6)
    with torch.no_grad(), ops.use_backend(backend):
        for wrong in (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 7), torch.randn(3, 6)):
            with pytest.raises(ValueError, match='expected a map with 6 channels'):
                linear(wrong)
            with pytest.raises(ValueError, match='expected a map with 6 channels'):
                linear.add_to(torch.randn(2, 3, 4, 20), wrong)
        for output in (torch.randn(2, 3, 4, 19), torch.randn(1, 3, 4, 20), torch.randn(2, 4, 3, 20).transpose(1, 2),
                       torch.randn(2, 3, 4, 20).double()):
            with pytest.raises(ValueError, match='expected an output'):
                linear(x, output=output)
            with pytest.raises(ValueError, match='expected an output'):
                linear.add_to(output, x)


def test_samples_see_every_element():
    base = torch.randn(12, 12)
    views = [base.diagonal(), torch.randn(5), torch.randn(4, 3)[:, 1]]
    for dtype in (torch.float32, torch.float64):
        kept = [view.to(dtype) for view in views]
        samples = ops.Samples(kept)
        assert samples.unchanged()
        for view in kept:
            for i in range(len(view)):
                before = view[i].item()
                view[i] += 1
                assert not samples.unchanged()
                view[i] = before
                assert samples.unchanged()
    assert ops.Samples([]).unchanged()
    with torch.device('meta'):
        assert ops.Samples(views).unchanged()
