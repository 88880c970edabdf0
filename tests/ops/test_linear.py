"""Linear maps of a folded network: the compiled loops and torch's operators against float64."""
import weakref

import pytest
import torch
import torch.nn.functional as F

from san_backbones import ops
from san_backbones.ops import native

BACKENDS = ['auto', 'reference'] if native.unavailable() is None else ['reference']
VNNI = pytest.mark.skipif(not native.has_int8(), reason='needs AVX-512 VNNI')
AMX = pytest.mark.skipif(not native.library.has_amx(), reason='needs AMX')
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


def _pooled(linear, x, before=None):
    """Of max_pool2d(x, 2)."""
    output = torch.empty(len(x), x.shape[1] // 2, x.shape[2] // 2, linear.columns)
    call = linear.prepare(x, before, output, halve=True)
    native.library.run(call.name, call.task)
    return output


@pytest.mark.skipif(native.unavailable() is not None, reason=f'no compiled loops: {native.unavailable()}')
@pytest.mark.parametrize('kind', ['float32', pytest.param('int8', marks=VNNI), pytest.param('bfloat16', marks=AMX)])
@pytest.mark.parametrize('height, width, inner', [(2, 2, 64), (7, 10, 70), (6, 33, 530), (3, 5, 1030)])
def test_pooling_before(kind, height, width, inner):
    """The same bits as of a map that torch pools; NaN wins, as there."""
    weight, x = torch.randn(80, inner), torch.randn(2, height, width, inner + 6)[..., :inner]
    linear = ops.Linear(weight.bfloat16() if kind == 'bfloat16' else weight, int8=kind == 'int8')
    pooled = F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).contiguous()
    expected = torch.empty(*pooled.shape[:3], 80)
    before = _functions(inner, 80)[0]
    with torch.no_grad():
        for f in (None, before):
            call = linear.prepare(pooled, f, expected)
            native.library.run(call.name, call.task)
            assert torch.equal(_pooled(linear, x, f), expected)
        for i in range(4):
            x[0, i // 2, i % 2, i] = torch.nan
            assert _pooled(linear, x)[0, 0, 0].isnan().all()
            x[0, i // 2, i % 2, i] = 0


@pytest.mark.skipif(native.unavailable() is not None, reason=f'no compiled loops: {native.unavailable()}')
@pytest.mark.parametrize('int8', [False, pytest.param(True, marks=VNNI)])
def test_a_pixel_has_the_same_bits_wherever_it_is(int8):
    """Whatever the number of threads, of pixels, and their place among them."""
    project, x = ops.Linear(torch.randn(150, 600), torch.randn(150), int8), torch.randn(1, 1, 500, 600)
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


@VNNI
class TestInt8:
    @pytest.fixture(autouse=True, params=['VNNI', pytest.param('AMX', marks=AMX)])
    def _unit(self, request, monkeypatch):
        monkeypatch.setattr(native.library, 'has_amx', lambda: request.param == 'AMX')

    @staticmethod
    def _pixels(*size, below=0.):
        """(..., C): multiples from 0 to 255 of a step of each pixel, of every other from `below`: rounding is exact."""
        steps = torch.randint(0, 256, size).float()
        steps[..., 0], steps[..., 1] = 0, 255
        return (steps - below * torch.randint(0, 2, (*size[:-1], 1))) * 2. ** torch.randint(-3, 4, (*size[:-1], 1))

    @staticmethod
    def _weight(columns, inner):
        """Multiples from -127 to 127 of a step of each column."""
        steps = torch.randint(-127, 128, (columns, inner)).float()
        steps[:, -1] = -127
        return steps * 2. ** torch.randint(-9, -4, (columns, 1))

    @pytest.mark.parametrize('height, width, inner, columns', [
        (1, 1, 64, 64), (1, 7, 65, 97), (7, 7, 66, 130), (5, 10, 513, 80), (1, 61, 1030, 150), (3, 43, 127, 200),
        (3, 16, 192, 112)])
    def test_against_float64(self, height, width, inner, columns):
        torch.manual_seed(inner)
        weight, bias = self._weight(columns, inner), torch.randn(columns)
        x, there = self._pixels(2, height, width, inner, below=100.), torch.randn(2, height, width, columns)
        after, before = _functions(inner, columns)[1], ops.ScaleShiftReLU(torch.ones(inner), torch.zeros(inner))
        product = x.double() @ weight.double().t()
        with torch.no_grad():
            project, expand = ops.Linear(weight, bias, int8=True), ops.Linear(weight, int8=True)
            assert torch.equal(project.weight, weight)
            _close(project(x), product + bias)
            _close(expand.add_to(there.clone(), x), there + product)
            _close(expand.add_to(there.clone(), x, after), _apply(after, there + product))
            x = self._pixels(2, height, width, inner)
            _close(project(x, before), x.double() @ weight.double().t() + bias)
            assert not torch.equal(project(x + .3), ops.Linear(weight, bias)(x + .3))

    def test_error_of_rounding(self):
        """At most half a step for each element of a pixel, and for each weight."""
        torch.manual_seed(0)
        weight, x = torch.randn(96, 200), torch.randn(2, 5, 5, 200)
        before = _functions(200, 96)[0]
        y = _apply(before, x.double())
        step = y.amax(-1, keepdim=True) / 255
        bound = 0.51 * step * 1.01 * weight.abs().sum(1) \
            + 0.51 * y.abs() @ (weight.abs().amax(1) / 127).double().expand(200, -1)
        with torch.no_grad():
            error = (ops.Linear(weight, int8=True)(x, before) - y @ weight.double().t()).abs()
        assert (error <= bound).all() and error.max() > 1e-4

    def test_no_value_and_no_number(self):
        """A pixel of zeros gives the bias; one that is not finite NaN, and changes no other."""
        weight, bias, x = torch.randn(64, 70), torch.randn(64), torch.randn(1, 1, 9, 70)
        x[0, 0, 2] = 0
        project = ops.Linear(weight, bias, int8=True)
        with torch.no_grad():
            expected = project(x)
            assert torch.equal(expected[0, 0, 2], bias)
            x[0, 0, 3, 7], x[0, 0, 5, 69], x[0, 0, 6, 0] = torch.nan, torch.inf, -torch.inf
            y = project(x)
        assert y[0, 0, [3, 5, 6]].isnan().all()
        assert torch.equal(y[0, 0, [0, 1, 2, 4, 7, 8]], expected[0, 0, [0, 1, 2, 4, 7, 8]])

    @pytest.mark.parametrize('channel', [3, 66])
    @pytest.mark.parametrize('value, number', [(torch.nan, torch.nan), (torch.inf, torch.nan), (-torch.inf, 0)])
    def test_a_norm_that_is_not_finite(self, channel, value, number):
        """In vectors that fill a line and in those behind them; ReLU makes zero of a number below."""
        x = torch.zeros(1, 1, 1, 70)
        x[..., channel] = value
        with torch.no_grad():
            y = ops.Linear(torch.ones(64, 70), int8=True)(x, ops.ScaleShiftReLU(torch.ones(70), torch.zeros(70)))
        torch.testing.assert_close(y, torch.full_like(y, number), equal_nan=True)

    def test_a_column_of_zeros(self):
        weight = torch.randn(64, 64)
        weight[5] = 0
        with torch.no_grad():
            y = ops.Linear(weight, int8=True)(torch.randn(1, 2, 3, 64))
        assert (y[..., 5] == 0).all() and y.isfinite().all()

    @pytest.mark.parametrize('inner, columns', [(63, 64), (64, 63)])
    def test_narrow_maps_stay_in_float32(self, inner, columns):
        weight = torch.randn(columns, inner)
        assert torch.equal(ops.Linear(weight, int8=True).weight, weight)

    def test_elsewhere_with_the_rounded_weights(self):
        """Where another backend is asked for."""
        weight, x = torch.randn(64, 64), torch.randn(1, 2, 3, 64)
        with torch.no_grad(), ops.use_backend('reference'):
            linear = ops.Linear(weight, int8=True)
            assert torch.equal(linear.weight, ops.Linear(linear.weight, int8=True).weight) and (
                (linear.weight - weight).abs() <= 0.51 * weight.abs().amax(1, keepdim=True) / 127).all()
            _close(linear(x), x.double() @ linear.weight.double().t())


@AMX
@pytest.mark.parametrize('pixels, inner, columns', [(1, 64, 64), (17, 100, 300), (64, 256, 96), (130, 70, 65)])
def test_amx_has_the_bits_of_vnni(pixels, inner, columns, monkeypatch):
    project, x = ops.Linear(torch.randn(columns, inner), torch.randn(columns), True), torch.randn(1, 1, pixels, inner)
    before = _functions(inner, columns)[0]
    with torch.no_grad():
        found = project(x, before)
        monkeypatch.setattr(native.library, 'has_amx', lambda: False)
        assert torch.equal(found, project(x, before))


@pytest.mark.skipif(native.unavailable() is not None, reason=f'no compiled loops: {native.unavailable()}')
@pytest.mark.parametrize('unit', ['float32', pytest.param('AMX', marks=AMX)])
@pytest.mark.parametrize('height, width, inner, columns', [*SHAPES, (3, 16, 192, 112)])
def test_bfloat16_against_float64(height, width, inner, columns, unit, monkeypatch):
    """Weights in bfloat16, and pixels too where AMX multiplies them; neither in 8 bits, which are asked for."""
    monkeypatch.setattr(native, 'has_amx', lambda: unit == 'AMX')
    torch.manual_seed(inner)
    weight, bias = torch.randn(columns, inner).bfloat16(), torch.randn(columns).bfloat16()
    x, there = torch.randn(2, height, width, inner), torch.randn(2, height, width, columns)
    rounded = x.bfloat16().double() if unit == 'AMX' else x.double()
    before = ops.ScaleShiftReLU(torch.full((inner,), 2.), torch.zeros(inner), 1.5)  # exact, rounded or not
    after = _functions(inner, columns)[1]

    def run(x, before, add=False, after=None):
        output = there.clone()
        call = linear.prepare(x, before, output, add, after)
        native.library.run(call.name, call.task)
        return output
    with torch.no_grad():
        linear = ops.Linear(weight, bias, int8=True)
        assert torch.equal(linear.weight, weight) and linear.weight.dtype == torch.bfloat16
        product = rounded @ weight.double().t() + bias.double()
        _close(run(x, None), product)
        _close(run(x, before), _apply(before, rounded) @ weight.double().t() + bias.double())
        _close(run(x, None, True, after), _apply(after, there + product))
        rough = x.bfloat16()
        error = (linear(rough).double() - rough.double() @ weight.double().t() - bias.double()).abs().max()
        assert linear(rough).dtype == torch.bfloat16 and error <= 2 ** -7 * (1 + product.abs().max())


@AMX
def test_bfloat16_of_no_number():
    """Changes no other pixel."""
    linear, x = ops.Linear(torch.randn(20, 70).bfloat16()), torch.randn(1, 1, 9, 70)
    outputs = [torch.empty(1, 1, 9, 20) for _ in range(2)]
    with torch.no_grad():
        for output in outputs:
            native.library.run(*linear.prepare(x, None, output)[:2])
            x[0, 0, 3, 7], x[0, 0, 5, 69] = torch.nan, torch.inf
    y = outputs[1][0, 0]
    assert y[3].isnan().all() and not y[5].isfinite().any()
    assert torch.equal(y[[0, 1, 2, 4, 6, 7, 8]], outputs[0][0, 0, [0, 1, 2, 4, 6, 7, 8]])


@pytest.mark.skipif(native.unavailable() is not None, reason=f'no compiled loops: {native.unavailable()}')
def test_a_program_runs_on_other_maps():
    """Its maps are replaced, slices of them too, and what is no map stays."""
    first, second = ops.Linear(torch.randn(24, 40)), ops.Linear(torch.randn(20, 16), torch.randn(20))
    there = torch.randn(2, 3, 5, 20)

    def maps():
        return torch.randn(2, 3, 5, 40), torch.empty(2, 3, 5, 24), torch.empty(2, 3, 5, 20)

    def calls(x, between, output):
        return [first.prepare(x, None, between), second.prepare(between[..., 8:], None, output),
                ops.Linear(torch.eye(20)).prepare(there, None, output, True)]
    with torch.no_grad():
        prepared = maps()
        program = native.Program(calls(*prepared), prepared)
        for x, between, output in (maps(), maps(), prepared):
            program.run((x, between, output))
            middle = x.double() @ first.weight.double().t()
            _close(between, middle)
            _close(output, middle[..., 8:] @ second.weight.double().t() + second.bias + there)
        kept = [weakref.ref(x) for x in prepared]
        del prepared, x, between, output
        assert not any(ref() for ref in kept)


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
    views = [base.diagonal(), torch.randn(5), torch.randn(4, 3)[:, 1], torch.randn(1, 3)[:, 1], torch.randn(3, 1)[0]]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, None):
        kept = [view.to(dtype or (torch.float16 if i else torch.float32)) for i, view in enumerate(views)]
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
