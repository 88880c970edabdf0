"""Any sizes, dtypes, strides and values, tried by machine: every path equals the paper's definition in float64 within
a stated bound, or refuses in words.

Errors are measured pixel by pixel and channel by channel, as a part of sum_o |w_o| |v_o|, what the rounding of a
weighted sum is proportional to; with patchwise weights, sums that may cancel, |w_o| is the largest of the channel's.
"""
import math
import os
import pathlib
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from san_backbones import fuse_for_inference, ops
from san_backbones.ops import native, statistics, triton

pytest.importorskip('hypothesis', reason='needs the test extra')
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests import oracle

BOUNDS = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 0.1, torch.float16: 0.01}
"""Of the error, in eval mode."""
ROUNDING = {torch.bfloat16: 2 ** -8, torch.float16: 2 ** -11}
"""The compiled loops compute in float32 whatever the maps; what comes on top is the rounding of the output."""
BATCH_STATISTICS = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Of the error with batch statistics: a variance near 0 magnifies rounding up to eps^-1/2 = 300 times."""
PATHS = ops.available_backends()
FORMS = [*((True, relation) for relation in oracle.PAIRWISE_RELATIONS),
         *((False, relation) for relation in oracle.PATCHWISE_RELATIONS)]
NON_FINITE = (float('nan'), float('inf'), float('-inf'))


INTERPRETING = os.environ.get('TRITON_INTERPRET') == '1'


def machine(examples: int):
    """The same examples in every run; few in Triton's interpreter, which takes seconds for some."""
    return settings(derandomize=True, deadline=None, max_examples=examples // (8 if INTERPRETING else 1), database=None,
                    phases=(Phase.generate,), suppress_health_check=list(HealthCheck))


# --- Maps in every layout --------------------------------------------------------------------------------------------

def _windows(x: Tensor, row: int) -> Tensor:
    """Pixels whose channels overlap in memory: the next pixel begins `row` numbers later."""
    batch, channels, height, width = x.shape
    numbers = torch.cat([x.flatten(), x.new_ones(1)])
    memory = numbers[torch.arange(max(batch * height * width - 1, 0) * row + channels) % len(numbers)]
    return memory.as_strided(x.shape, (height * width * row, 1, width * row, row))


def _inside(x: Tensor, before: tuple[int, int, int], after: tuple[int, int, int], step: int = 1) -> Tensor:
    """x as a part of a larger map of NaNs, which nobody may look at; after 0 it ends where its memory ends."""
    sizes = [b + step * (n - 1) + 1 + a if n else 0 for b, n, a in zip(before, x.shape[1:], after)]
    big = torch.full((x.shape[0], *sizes), float('nan'), dtype=x.dtype)
    part = big[(slice(None), *(slice(b, b + step * (n - 1) + 1, step) for b, n in zip(before, x.shape[1:])))]
    return part.copy_(x)


LAYOUTS = {
    'contiguous': lambda x: x.contiguous(),
    'channels last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'unaligned': lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    'channels of a wider map': lambda x: torch.cat([x, x, x], 1).contiguous(
        memory_format=torch.channels_last)[:, x.shape[1]:2 * x.shape[1]],
    'last channels of a wider map': lambda x: torch.cat([x, x], 1).contiguous(
        memory_format=torch.channels_last)[:, x.shape[1]:],
    'crop': lambda x: _inside(x, (1, 2, 3), (1, 1, 2)),
    'corner': lambda x: _inside(x, (1, 2, 3), (0, 0, 0)),
    'every third': lambda x: _inside(x, (0, 0, 0), (0, 1, 0), 3),
    'every second image': lambda x: torch.stack([x, torch.full_like(x, float('nan'))], 1).flatten(0, 1).contiguous(
        memory_format=torch.channels_last)[::2],
    'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    'batch last': lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    'flipped': lambda x: x.flip(2, 3),
    'one image for all': lambda x: x[:1].expand(x.shape),
    'one row for all': lambda x: x[:, :, :1].expand(x.shape),
    'one pixel for all': lambda x: x[:, :, :1, :1].expand(x.shape),
    'one channel for all': lambda x: x[:, :1].expand(x.shape),
    'overlapping': lambda x: _windows(x, 1),
    'overlapping in place': lambda x: _windows(x, 0),
}


@dataclass
class Case:
    spec: ops.Spec
    batch: int
    size: tuple[int, int]
    rel: int
    hidden: int
    weights: int
    share: int
    dtype: torch.dtype
    training: bool
    layouts: tuple[str, str, str]
    seed: int
    magnitude: float = 1.

    def draw(self, *shape: int, low: float | None = None, high: float = 0.) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x if low is None else low + (high - low) * torch.special.ndtr(x)

    def build(self, smooth: bool = False) -> None:
        """Maps, gamma and the same for the oracle. `smooth`: gamma's ReLUs let everything pass."""
        self.generator = torch.Generator().manual_seed(self.seed)
        spec, area = self.spec, self.spec.kernel_size ** 2
        sizes = [(self.batch, c, *self.size) for c in (self.rel, self.rel, self.weights * self.share)]
        self.maps = [LAYOUTS[layout]((self.magnitude * self.draw(*size)).to(self.dtype))
                     for size, layout in zip(sizes, self.layouts)]
        self.place = None
        wide = torch.promote_types(self.dtype, torch.float32)
        if spec.pairwise and spec.position != 'none':
            self.place = self.draw(1, 2, *self.size).to(wide)
        inputs = oracle.relation_width('pairwise' if spec.pairwise else 'patchwise', spec.relation, self.rel,
                                       spec.kernel_size) + (0 if self.place is None else 2)
        outputs = self.weights * (1 if spec.pairwise else area)
        shapes = {'conv_w.2.weight': (self.hidden, inputs, 1, 1), 'conv_w.5.weight': (outputs, self.hidden, 1, 1),
                  'conv_w.5.bias': (outputs,)}
        self.params = {name: self.draw(*shape) / max(1, shape[1] if len(shape) > 1 else 1) ** 0.5
                       for name, shape in shapes.items()}
        for name, channels in (('conv_w.0', inputs), ('conv_w.3', self.hidden)):
            self.params[f'{name}.weight'] = self.draw(channels, low=0.1, high=0.3) if smooth else \
                self.draw(channels, low=-1.5, high=1.5)
            self.params[f'{name}.bias'] = self.draw(channels, low=3, high=4) if smooth else \
                self.draw(channels, low=-0.5, high=0.5)
            self.params[f'{name}.running_mean'] = self.draw(channels, low=-0.5, high=0.5)
            self.params[f'{name}.running_var'] = self.draw(channels, low=0.5, high=1.5)
        self.params = {name: x.to(self.dtype) for name, x in self.params.items()}

    def gamma(self) -> ops.Gamma:
        p = {name: x.clone() for name, x in self.params.items()}

        def norm(name: str) -> ops.Norm:
            return ops.Norm(p[f'{name}.weight'], p[f'{name}.bias'], p[f'{name}.running_mean'],
                            p[f'{name}.running_var'], self.training, 0.1, 1e-5)

        return ops.Gamma(norm('conv_w.0'), p['conv_w.2.weight'], norm('conv_w.3'), p['conv_w.5.weight'],
                         p['conv_w.5.bias'])

    def to(self, dtype: torch.dtype) -> None:
        self.dtype, self.maps = dtype, [x.to(dtype) for x in self.maps]
        self.params = {name: x.to(dtype) for name, x in self.params.items()}
        self.place = None if self.place is None else self.place.to(torch.promote_types(dtype, torch.float32))

    def run(self, path: str) -> Tensor:
        with ops.use_backend(path), torch.no_grad():
            return ops.footprint_attention(*self.maps, self.place, self.gamma(), self.spec)

    def expected(self, maps: Any = None) -> tuple[Tensor, Tensor]:
        """The output in float64, and the sum of magnitudes that goes into it."""
        spec, size, step = self.spec, self.spec.kernel_size, self.spec.dilation
        query, key, value = maps or [x.double() for x in self.maps]
        params = {name: x.double() for name, x in self.params.items()}
        if spec.pairwise:
            delta = oracle.pairwise_delta(query, key, spec.relation, size, step)
            if self.place is not None:
                place = self.place.double()
                there = oracle.footprint(place, size, step)
                if spec.position == 'relative':
                    there = oracle.everywhere(place, size) - there
                delta = torch.cat([delta, there.expand(self.batch, -1, -1, -1, -1)], 1)
            weights = oracle.softmax_over_footprint(oracle.gamma(delta, params, self.training, {}))
        else:
            delta = oracle.patchwise_delta(query, key, spec.relation, size, step)
            weights = oracle.gamma(delta, params, self.training, {})
            weights = weights.reshape(self.batch, self.weights, size ** 2, *self.size)
        largest = weights.abs()
        if not spec.pairwise and self.batch:
            largest = largest.amax((0, 2, 3, 4), True).expand_as(weights)
        return oracle.aggregate(weights, value, size, step), oracle.aggregate(largest, value.abs(), size, step)

    def refusal(self, path: str) -> str | None:
        """What a path says to this case, by the documentation."""
        pairs = self.batch * self.size[0] * self.size[1] * (self.spec.kernel_size ** 2 if self.spec.pairwise else 1)
        kind = (self.spec.pairwise, self.spec.relation)
        if path in ('native', 'triton'):
            if self.dtype == torch.float64:
                return 'computes in float32'
            if path not in ops.relations.find(*kind).backends:
                return 'has no clique relation'
            if self.training and kind not in statistics.SUPPORTED:
                return 'no batch statistics'
        return 'more than 1 value per channel' if self.training and pairs == 1 else None


@st.composite
def cases(draw, dtypes=tuple(BOUNDS), training=(False,), least: int = 0, layouts=tuple(LAYOUTS)) -> Case:
    pairwise, relation = draw(st.sampled_from(FORMS))
    kernel_size = draw(st.sampled_from((1, 3) if relation == 'clique' else (1, 3, 5, 7)))
    spec = ops.Spec(pairwise, relation, draw(st.sampled_from(ops.POSITIONS)) if pairwise else 'none', kernel_size,
                    draw(st.integers(1, 3)))
    return Case(
        spec, draw(st.integers(least, 3)), (draw(st.integers(1, 12)), draw(st.integers(1, 12))),
        draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.integers(1, 12)), draw(st.integers(1, 4)),
        draw(st.sampled_from(dtypes)), draw(st.sampled_from(training)),
        tuple(draw(st.sampled_from(layouts)) for _ in range(3)), draw(st.integers(0, 2 ** 16)))


def _bound(case: Case, path: str) -> float:
    if path == 'native' and case.dtype in ROUNDING:
        return BOUNDS[torch.float32] + ROUNDING[case.dtype]
    return (BATCH_STATISTICS if case.training else BOUNDS)[case.dtype]


def _check(case: Case, path: str) -> None:
    refusal = case.refusal(path)
    if refusal is not None:
        with pytest.raises((RuntimeError, ValueError), match=refusal):
            case.run(path)
        return
    actual = case.run(path)
    expected, magnitude = case.expected()
    assert actual.dtype == case.dtype and actual.shape == expected.shape
    smallest = torch.finfo(case.dtype).smallest_normal
    error = (actual.double() - expected).abs() / (magnitude + smallest)
    assert (error <= _bound(case, path)).all(), f'{error.max():.1e}'  # false where it is NaN


# --- Operators -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('path', PATHS)
@machine(120)
@given(case=cases())
def test_attention_is_the_definition(path, case):
    case.build()
    _check(case, path)


@pytest.mark.parametrize('path', PATHS)
@machine(50)
@given(case=cases(dtypes=(torch.float64, torch.float32), training=(True,)))
def test_batch_statistics_are_the_definition(path, case):
    case.build()
    _check(case, path)


@pytest.mark.parametrize('path', PATHS)
@machine(50)
@given(case=cases(dtypes=(torch.float64, torch.float32), training=(False, True), least=1,
                  layouts=[name for name in LAYOUTS if 'overlapping' not in name]))
def test_gradients_are_the_definition(path, case):
    case.build(smooth=True)  # where a ReLU's input rounds to the other side of 0, gradients differ by a whole term
    if case.refusal(path) is not None:
        return
    leaves = [x.detach().requires_grad_() for x in case.maps]
    with ops.use_backend(path):
        output = ops.footprint_attention(*leaves, case.place, case.gamma(), case.spec)
    seed = case.draw(*output.shape).to(case.dtype)
    actual = torch.autograd.grad(output, leaves, seed)
    exact = [x.detach().double().requires_grad_() for x in case.maps]
    expected = torch.autograd.grad(case.expected(exact)[0], exact, seed.double())
    bound = {torch.float64: 1e-9, torch.float32: 1e-3}[case.dtype]
    largest = max(e.norm() for e in expected)  # of query and key, the gradients may cancel
    for a, e in zip(actual, expected):
        assert (a.double() - e).norm() <= bound * max(e.norm(), 0.1 * largest)


@pytest.mark.parametrize('path', PATHS)
@machine(60)
@given(case=cases(dtypes=(torch.float32,), least=1), data=st.data())
def test_not_a_number_reaches_what_it_should_and_no_more(path, case, data):
    case.build()
    for x in case.maps:
        for _ in range(data.draw(st.integers(0, 2))):
            place = tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)
            x[place] = data.draw(st.sampled_from(NON_FINITE))
    if case.refusal(path) is not None:
        return
    actual = case.run(path).double()
    case.to(torch.float64)
    expected = case.run('reference')  # the oracle's ReLU makes 0 of NaN
    magnitude = case.expected()[1]
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    finite = expected.isfinite() & magnitude.isfinite()
    assert ((actual - expected).abs()[finite] <= BOUNDS[torch.float32] * magnitude[finite] + 1e-30).all()


@pytest.mark.parametrize('path', PATHS)
@machine(40)
@given(case=cases(dtypes=(torch.float32,), least=1, layouts=('contiguous',)), data=st.data())
def test_not_a_number_reaches_every_gradient_that_it_should(path, case, data):
    """A ReLU whose output is NaN passes gradients on, as torch's does."""
    case.build(smooth=True)
    x = case.maps[data.draw(st.integers(0, 2))]
    x[tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)] = float('nan')
    if case.refusal(path) is not None:
        return
    found = []
    for way in (path, 'reference'):
        maps, gamma = [x.detach().requires_grad_() for x in case.maps], case.gamma()
        leaves = [*maps, *(x.requires_grad_() for x in (gamma.weight1, gamma.weight2))]
        if not case.spec.pairwise:  # what all neighbours share does not change a softmax
            leaves.append(gamma.bias2.requires_grad_())
        with ops.use_backend(way):
            output = ops.footprint_attention(*maps, case.place, gamma, case.spec)
        found.append(torch.autograd.grad(output.sum(), leaves))
    for actual, expected in zip(*found):
        assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize('path', PATHS)
@machine(60)
@given(case=cases(dtypes=(torch.float32, torch.bfloat16), training=(False, True)),
       magnitude=st.sampled_from([1e-30, 1e-5, 1e2, 1e4, 1e6]))
def test_finite_input_gives_no_nan(path, case, magnitude):
    """Maps up to 1e6 (logits up to 1e13 and more, for the products): softmax and norms stay finite."""
    case.magnitude = magnitude
    case.build()
    if case.refusal(path) is None:
        assert case.run(path).isfinite().all()


@pytest.mark.parametrize('path', PATHS)
@machine(40)
@given(case=cases(dtypes=(torch.float32,)), data=st.data())
def test_maps_that_do_not_fit_are_refused(path, case, data):
    case.build()
    which = data.draw(st.integers(0, 2))
    shape = list(case.maps[which].shape)
    axis = data.draw(st.integers(0, 3))
    shape[axis] = data.draw(st.integers(0, 40).filter(lambda n: n != shape[axis]))
    if axis == 1 and which == 2 and shape[1] and shape[1] % case.weights == 0:
        return  # more channels share a weight
    case.maps[which] = torch.zeros(shape)
    with pytest.raises(ValueError, match='must'):
        case.run(path)


@machine(100)
@given(rows=st.integers(0, 70), channels=st.integers(1, 40), seed=st.integers(0, 99), backend=st.sampled_from(PATHS),
       dtype=st.sampled_from(tuple(BOUNDS)), strided=st.booleans(), value=st.sampled_from((None, *NON_FINITE)),
       limit=st.sampled_from((None, 0.5, 6.)))
def test_scale_shift_relu(rows, channels, seed, backend, dtype, strided, value, limit):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator).to(dtype)
    if strided:
        x = x.t().contiguous().t()
    if value is not None and rows:
        x[seed % rows, seed % channels] = value
    scale, shift = torch.randn(2, channels, generator=generator)
    expected = torch.relu(x.double() * scale.double() + shift.double()).clamp(max=limit or math.inf)
    with torch.no_grad(), ops.use_backend(backend):
        actual = ops.scale_shift_relu(x, scale, shift, limit)
    assert actual.dtype == dtype
    bound = {torch.bfloat16: 0.02, torch.float16: 0.002}.get(dtype, 1e-6)
    torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.skipif(native.unavailable() is not None, reason='no compiled loops')
@machine(60)
@given(batch=st.integers(0, 3), channels=st.integers(1, 6), width=st.integers(1, 40), size=st.tuples(
    st.integers(1, 15), st.integers(1, 15)), layout=st.sampled_from(tuple(LAYOUTS)), training=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), seed=st.integers(0, 99))
def test_stem(batch, channels, width, size, layout, training, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    image = LAYOUTS[layout](torch.randn(batch, channels, *size, generator=generator).to(dtype))
    weight = torch.randn(width, channels, generator=generator)
    norm = ops.Norm(*torch.randn(3, width, generator=generator), 0.5 + torch.rand(width, generator=generator),
                    training, 0.1, 1e-5)
    if training and image.numel() == channels:
        with pytest.raises(ValueError, match='more than 1 value'):
            ops.stem(image, weight, norm)
        return
    x = torch.einsum('nchw,dc->ndhw', image.double(), weight.double())
    if training:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    else:
        mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = norm.weight.double() / (var + norm.eps).sqrt()
    y = torch.relu((x - mean[:, None, None]) * scale[:, None, None] + norm.bias.double()[:, None, None])
    expected = torch.nn.functional.max_pool2d(y, 2) if min(size) > 1 and batch else \
        y.new_zeros(batch, width, size[0] // 2, size[1] // 2)
    actual = ops.stem(image, weight, norm)
    assert actual.dtype == dtype and actual.shape == expected.shape
    bound = {torch.bfloat16: 0.01, torch.float16: 0.002, torch.float32: 1e-3 if training else 1e-5}[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=bound)


# --- Layers and models -----------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def models():
    result = {}
    for name in ('test_san_pairwise', 'test_san_patchwise'):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5).eval().requires_grad_(False)
        torch.manual_seed(0)
        fused = fuse_for_inference(timm.create_model(name, num_classes=5).eval().requires_grad_(False))
        torch.manual_seed(0)
        exact = timm.create_model(name, num_classes=5).eval().requires_grad_(False).double()
        result[name] = model, fused, exact
    return result


@machine(25)
@given(name=st.sampled_from(('test_san_pairwise', 'test_san_patchwise')), fused=st.booleans(),
       shape=st.tuples(st.integers(0, 2), st.just(3), st.integers(1, 67), st.integers(1, 67)),
       layout=st.sampled_from(tuple(LAYOUTS)), path=st.sampled_from(('auto', *PATHS)), seed=st.integers(0, 99))
def test_models(models, name, fused, shape, layout, path, seed):
    model, exact = models[name][fused], models[name][2]
    image = LAYOUTS[layout](torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    with torch.no_grad(), ops.use_backend(path):
        actual = model(image)
    with torch.no_grad(), ops.use_backend('reference'):
        expected = exact(image.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(INTERPRETING, reason='this is the interpreter')
@pytest.mark.skipif(not triton.installed(), reason='Triton is not installed')
@pytest.mark.parametrize('name', ['bad_input', 'refusals', 'numbers'])
def test_triton_in_the_interpreter(name):
    """What this file and its neighbours try of the other paths, of operators and layers."""
    file = pathlib.Path(__file__).with_name(f'test_{name}.py')
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', file, '-k',
         'triton and not interpreter and not (defaults or deterministic or threads or company)'],
        env={**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
