"""The stem in one piece and relu(s x + t), against float64 modules."""
import collections
import copy
import math

import pytest
import torch
from torch import nn

from san_backbones import SAN, activations, norms, ops
from san_backbones.ops import native, pointwise
from san_backbones.san import Pool, Stem

needs_loops = pytest.mark.skipif(native.unavailable() is not None, reason=f'no compiled loops: {native.unavailable()}')


def _stem(in_chans=3, width=20, **kwargs):
    torch.manual_seed(0)
    stem = Stem(in_chans, width, **kwargs)
    if isinstance(stem.norm, nn.BatchNorm2d):
        for tensor, low, high in ((stem.norm.weight, -1.5, 1.5), (stem.norm.bias, -0.5, 0.5),
                                  (stem.norm.running_mean, -0.5, 0.5), (stem.norm.running_var, 0.5, 1.5)):
            nn.init.uniform_(tensor, low, high)
    return stem


def _definition(stem, image):
    """Output, gradients and buffers of the modules in float64."""
    stem = copy.deepcopy(stem).double()
    image = image.detach().double().requires_grad_(image.requires_grad)
    y = stem.pool(stem.act(stem.norm(stem.conv(image))))
    return stem, image, y


def _close(actual, expected, bound=1e-5):
    assert actual.shape == expected.shape
    scale = max(expected.double().norm().item(), 1e-6)
    assert (actual.double() - expected.double()).norm().item() / scale < bound


def test_gradients_of_scale_shift_relu():
    x = torch.randn(6, 4, requires_grad=True)
    ops.scale_shift_relu(x, torch.full((4,), 2.), torch.ones(4)).sum().backward()
    torch.testing.assert_close(x.grad, 2. * (2 * x.detach() + 1 > 0))


@pytest.mark.parametrize('conv', [
    nn.Conv2d(3, 20, 1, stride=2, bias=False), nn.Conv2d(3, 20, 1, padding=1, bias=False), nn.Conv2d(3, 20, 1),
    nn.Conv2d(3, 21, 1, groups=3, bias=False), nn.Conv2d(3, 20, 3, bias=False)], ids=str)
def test_any_convolution(conv):
    stem = _stem(width=conv.out_channels).eval()
    stem.conv = conv
    image = torch.randn(2, 3, 12, 14)
    with torch.no_grad():
        torch.testing.assert_close(stem(image), stem.pool(stem.act(stem.norm(conv(image)))), rtol=1e-4, atol=1e-5)


def _changed(**settings):
    """The stem's own pool, as somebody has changed it."""
    pool = Pool()
    for name, value in settings.items():
        setattr(pool, name, value)
    return pool


@pytest.mark.parametrize('pool', [
    *(_changed(**{name: value}) for name, value in dict(
        ceil_mode=True, kernel_size=3, stride=1, padding=1, dilation=2).items()),
    nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 2, ceil_mode=True), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, 2, dilation=2),
    nn.MaxPool2d((2, 3), 2), nn.MaxPool2d(2, (1, 2)), nn.MaxPool2d(2, 2, (0, 1)), nn.MaxPool2d((2, 2), (2, 2), (0, 0)),
    nn.AvgPool2d(2)], ids=str)
def test_any_pooling(pool):
    stem = _stem().eval()
    stem.pool = pool
    image = torch.randn(2, 3, 13, 17)
    with torch.no_grad():
        torch.testing.assert_close(stem(image), pool(stem.act(stem.norm(stem.conv(image)))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('ceil_mode', [False, True])
def test_a_changed_pool_is_scripted_and_traced_as_it_is(ceil_mode):
    stem = _stem().eval()
    stem.pool.ceil_mode = ceil_mode
    images = torch.randn(1, 3, 5, 1), torch.randn(2, 3, 13, 17)
    with torch.no_grad():
        for program in torch.jit.script(stem), torch.jit.trace(stem, images[1], check_trace=False):
            for image in images:
                torch.testing.assert_close(program(image), stem(image), rtol=1e-4, atol=1e-5)
        assert stem(images[1]).shape[2:] == ((7, 9) if ceil_mode else (6, 8))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_statistics_are_of_the_rounded_image(dtype):
    """A black picture has no variance, whatever autocast rounds it to."""
    stem = _stem().train()
    nn.init.zeros_(stem.norm.bias)
    black = torch.tensor([-2.1179, -2.0357, -1.8044])[None, :, None, None].expand(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast('cpu', dtype):
        assert stem(black).abs().max() < 1e-3


@needs_loops
def test_not_a_number_goes_back_as_through_modules():
    stem = _stem().eval()
    image = torch.randn(2, 3, 8, 10)
    image[0, 1, 2, 3] = image[0, 0, 3, 3] = image[1, 2, 6, 0] = float('nan')
    image.requires_grad_()
    found = []
    for y in (stem(image), stem.pool(stem.act(stem.norm(stem.conv(image))))):
        found.append(torch.autograd.grad(y.sum(), [image, *stem.parameters()]))
    for actual, expected in zip(*found):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_relu_of_fake_tensors():
    from torch._subclasses import FakeTensorMode
    with FakeTensorMode() as mode, torch.no_grad():
        x, scale = mode.from_tensor(torch.zeros(6, 4)), mode.from_tensor(torch.zeros(4))
        assert ops.scale_shift_relu(x, scale, scale).shape == (6, 4)


@needs_loops
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('size', [(2, 3), (8, 8), (9, 14), (33, 2)])
@pytest.mark.parametrize('in_chans, width', [(1, 16), (3, 20), (3, 64), (5, 24)])
def test_output_gradients_and_buffers(training, size, in_chans, width):
    stem = _stem(in_chans, width).train(training)
    image = (3 + torch.randn(2, in_chans, *size)).requires_grad_()
    expected_stem, expected_image, expected = _definition(stem, image)
    assert ops.serves(image)
    y = stem(image)
    assert y.is_contiguous(memory_format=torch.channels_last)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    _close(y, expected)
    _close(image.grad, expected_image.grad, 1e-3 if training else 1e-5)
    for (name, p), q in zip(stem.named_parameters(), expected_stem.parameters()):
        _close(p.grad, q.grad, 1e-3 if training and name == 'conv.weight' else 1e-4)
    for b, c in zip(stem.buffers(), expected_stem.buffers()):
        _close(b, c)


@needs_loops
@pytest.mark.parametrize('momentum, track', [(0.3, True), (None, True), (0.1, False)])
def test_norm_options(momentum, track):
    stem = _stem(norm_layer=lambda channels, **kwargs: nn.BatchNorm2d(
        channels, eps=0.1, momentum=momentum, track_running_stats=track, **kwargs)) if track else \
        Stem(3, 20, norm_layer=lambda channels, **kwargs: nn.BatchNorm2d(channels, track_running_stats=False, **kwargs))
    for training in (True, True, False):  # the second call tells a cumulative mean from a moving one
        image = torch.randn(2, 3, 6, 7)
        expected_stem, _, expected = _definition(stem.train(training), image)
        _close(stem(image), expected)
        for b, c in zip(stem.buffers(), expected_stem.buffers()):
            _close(b, c)


@needs_loops
def test_layouts_and_types():
    stem = _stem().eval()
    image = torch.randn(2, 3, 11, 12)
    expected = _definition(stem, image)[2]
    wide = torch.randn(2, 3, 22, 24)
    wide[:, :, ::2, ::2] = image
    for same in (image.to(memory_format=torch.channels_last), wide[:, :, ::2, ::2], image.flip(0).flip(0)):
        _close(stem(same), expected)
    _close(stem(image[:1].expand(2, -1, -1, -1)), expected[:1].expand(2, -1, -1, -1))
    for dtype, bound in ((torch.bfloat16, 0.02), (torch.float16, 0.003)):
        low = copy.deepcopy(stem).to(dtype)(image.to(dtype))
        assert low.dtype == dtype
        _close(low, expected, bound)
    with torch.autocast('cpu', torch.bfloat16):
        low = stem(image)
    assert low.dtype == torch.bfloat16
    _close(low, expected, 0.02)


@needs_loops
def test_of_equal_pixels_the_first_gets_the_gradient():
    stem = _stem().eval()
    image = torch.randn(1, 3, 4, 5).repeat_interleave(2, 2).repeat_interleave(2, 3).requires_grad_()
    _, expected_image, expected = _definition(stem, image)
    stem(image).sum().backward()
    expected.sum().backward()
    _close(image.grad, expected_image.grad)
    assert image.grad[..., ::2, ::2].any() and not image.grad[..., 1::2, :].any()


@needs_loops
def test_a_norm_fused_into_the_convolution():
    stem = _stem().eval()
    image = torch.randn(2, 3, 8, 9)
    expected = stem(image)
    fused = copy.deepcopy(stem)
    fused.conv = torch.nn.utils.fusion.fuse_conv_bn_eval(stem.conv, stem.norm)
    fused.norm = nn.Identity()
    torch.testing.assert_close(fused(image), expected)


@needs_loops
def test_threads_and_repeats_do_not_change_a_bit():
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            stem = _stem().train()
            torch.manual_seed(1)
            y = stem(torch.randn(3, 3, 21, 18))
            y.square().mean().backward()
            results.append([y, *(p.grad for p in stem.parameters())])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@needs_loops
def test_nan_and_infinity_reach_the_output():
    stem = _stem().eval()
    for value in (float('nan'), float('inf')):
        for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
            image = torch.zeros(1, 3, 4, 4)
            image[0, 0, place[0], place[1]] = value
            expected = _definition(stem, image)[2]
            torch.testing.assert_close(stem(image).double(), expected, equal_nan=True)


@needs_loops
def test_operator_contract():
    arguments = (torch.randn(2, 3, 6, 7, requires_grad=True), torch.randn(20, 3, requires_grad=True),
                 torch.randn(20, requires_grad=True))
    torch.library.opcheck(torch.ops.san_backbones.stem, arguments)


@needs_loops
def test_no_map_at_full_resolution_is_kept():
    stem = _stem(width=64).train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        stem(torch.randn(1, 3, 64, 64))
    assert max(kept) <= 3 * 64 * 64


@needs_loops
def test_one_value_has_no_statistics():
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        pointwise.stem(torch.randn(1, 3, 1, 1), torch.randn(4, 3), ops.Norm(None, None, None, None, True, 0., 1e-5))


@needs_loops
@pytest.mark.parametrize('change', ['hook', 'group norm', 'reference', 'double', 'other act'])
def test_anything_else_runs_as_modules(change):
    stem = _stem(norm_layer=(lambda c, **k: nn.GroupNorm(4, c, **k)) if change == 'group norm' else nn.BatchNorm2d)
    seen = []
    image = torch.randn(2, 3, 6, 6)
    if change == 'hook':
        stem.norm.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    elif change == 'double':
        stem, image = stem.double(), image.double()
    elif change == 'other act':
        stem.act = nn.Tanh()
    with ops.use_backend('reference' if change == 'reference' else 'auto'):
        y = stem.eval()(image)
    _close(y, _definition(stem, image)[2])
    assert y.is_contiguous()  # the compiled stem would answer in channels_last
    assert seen[:1] == ([(2, 20, 6, 6)] if change == 'hook' else [])


@pytest.mark.parametrize('limit', [None, 0.3])
def test_scale_shift_relu(limit):
    for shape in ((3, 5, 20), (7, 16), (9, 3)):
        x, scale, shift = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])
        expected = torch.relu(x.double() * scale.double() + shift.double()).clamp(max=limit or math.inf)
        for backend in ('auto', 'reference'):
            with ops.use_backend(backend), torch.no_grad():
                _close(ops.scale_shift_relu(x, scale, shift, limit), expected, 1e-6)
                assert ops.scale_shift_relu(x.bfloat16(), scale, shift, limit).dtype == torch.bfloat16


def _norm_and_map(training, channels=48, mean=3.):
    torch.manual_seed(5)
    norm = nn.BatchNorm2d(channels).train(training)
    for x in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(x, .5, 1.5)
    x = mean + torch.randn(3, channels, 9, 7)
    return norm, x.to(memory_format=torch.channels_last).requires_grad_()


@needs_loops
@pytest.mark.parametrize('training, limit, mean', [
    (True, None, 3.), (True, .8, 3.), (True, None, 1e4), (False, None, 3.), (False, .8, 0.)])
def test_norm_and_relu_in_one_operator(training, limit, mean, monkeypatch):
    """Output, gradients and buffers against modules in float64."""
    norm, x = _norm_and_map(training, mean=mean)
    act, gradient = activations.BoundedReLU(limit), torch.randn(x.shape)
    exact, wide = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
    monkeypatch.setattr(norm, 'eps', 1e-3)
    exact.eps = 1e-3
    expected = act(exact(wide))
    y = norms.norm_relu(norm, act, x)
    assert type(y.grad_fn).__name__ == 'PermuteBackward0' and y.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if mean < 10 else 2e-3
    _close(y, expected, tolerance)
    for found, right in zip(torch.autograd.grad(y, (x, norm.weight, norm.bias), gradient),
                            torch.autograd.grad(expected, (wide, exact.weight, exact.bias), gradient.double())):
        assert (found - right).abs().max() <= tolerance * right.abs().max()
    for found, right in zip(norm.buffers(), exact.buffers()):
        torch.testing.assert_close(found.double(), right.double(), rtol=1e-5, atol=1e-6)


@needs_loops
def test_norm_and_relu_on_any_number_of_threads():
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            norm, x = _norm_and_map(True)
            y = norms.norm_relu(norm, activations.ReLU(), x)
            results.append([y, *torch.autograd.grad(y.square().sum(), (x, norm.weight, norm.bias))])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@needs_loops
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('used', ['both', 'the map', 'its norm'])
def test_gradient_beside_a_norm(training, used, monkeypatch):
    """Of x in x + f(relu(norm(x))), against modules in float64, and in no pass of its own."""
    norm, x = _norm_and_map(training)
    exact, wide = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
    first, second = torch.randn(2, *x.shape).double()
    factors = [first * (used != 'the map'), second * (used != 'its norm')]
    expected, = torch.autograd.grad((torch.relu(exact(wide)) * factors[0] + wide * factors[1]).sum(), wide)
    y, same = norms.norm_relu_beside(norm, activations.ReLU(), x)
    assert torch.equal(same, x)
    terms = dict(zip(('its norm', 'the map'), (y * first.float(), same * second.float())))
    loss = sum(terms.values()) if used == 'both' else terms[used]
    counts = collections.Counter()
    plain = torch.ops.san_backbones.scale_shift_relu_gradient
    monkeypatch.setattr(ops.native, 'scale_shift_relu_gradient',
                        lambda *given: counts.update([given[-1] is not None]) or plain(*given))
    found, = torch.autograd.grad(loss.sum(), x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert counts == {'both': {True: 1}, 'the map': {}, 'its norm': {False: 1}}[used]


@needs_loops
def test_a_block_adds_the_gradient_of_its_residual_in_the_norm():
    model = SAN('patchwise', depths=(1,), widths=(64,), kernel_sizes=(3,), stem_width=16).train()
    model(torch.randn(2, 3, 32, 32)).sum().backward()  # allocations once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    maps = [event.input_shapes for event in profile.events()
            if event.name in ('aten::add', 'aten::add_') and [2, 64, 16, 16] in event.input_shapes[:2]]
    assert len(maps) == 1  # x + f(x), forwards


@needs_loops
@pytest.mark.parametrize('change', ['none', 'hook', 'no gradients', 'layout', 'channels', 'double', 'autocast',
                                    'reference', 'one value', 'no affine', 'not a ReLU', 'no norm'])
def test_other_norms_and_maps_run_as_modules(change, monkeypatch):
    taken = []
    plain = ops.norm_relu
    monkeypatch.setattr(ops, 'norm_relu', lambda *arguments: taken.append(1) or plain(*arguments))
    norm, x = _norm_and_map(False, 47 if change == 'channels' else 48)
    act = nn.Tanh() if change == 'not a ReLU' else activations.make_act('relu')
    if change == 'hook':
        norm.register_forward_hook(lambda module, inputs, output: output + 1)
    elif change == 'layout':
        x = x.detach().contiguous().requires_grad_()
    elif change == 'double':
        norm, x = norm.double(), x.detach().double().requires_grad_()
    elif change == 'one value':
        x = x[:1, :, :1, :1]
    elif change == 'no affine':
        norm.register_parameter('weight', None)
        norm.register_parameter('bias', None)
    elif change == 'no norm':
        norm = nn.Identity()
    backend = 'reference' if change == 'reference' else 'auto'
    before = x.detach().clone()
    with torch.set_grad_enabled(change != 'no gradients'), ops.use_backend(backend), \
            torch.autocast('cpu', enabled=change == 'autocast'):
        y, expected = norms.norm_relu(norm, act, x), act(norm(x.clone()))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, before) and len(taken) == (change in ('none', 'no affine'))


@needs_loops
def test_bad_input_of_norm_and_relu():
    norm, x = _norm_and_map(False)
    described = norms.as_norm(norm, x[0, :, 0, 0])
    for bad in (x.detach().contiguous(), x[:, :47], x.double()):
        with pytest.raises(ValueError, match='expected a map .* in channels_last format'):
            ops.norm_relu(bad, described)
    with pytest.raises(ValueError, match='running_mean of the norm'):
        ops.norm_relu(x, described._replace(running_mean=torch.zeros(47)))


@needs_loops
def test_norm_and_relu_have_no_second_derivative():
    norm, x = _norm_and_map(True)
    with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
        torch.autograd.grad(norms.norm_relu(norm, activations.ReLU(), x).sum(), x, create_graph=True)


def test_stem_of_a_network_pools_once():
    model = SAN('patchwise', depths=(1, 1), widths=(32, 32), kernel_sizes=(3, 7), stem_width=16)
    assert isinstance(model.stages[0].pool, nn.Identity) and isinstance(model.stages[1].pool, nn.MaxPool2d)
    assert model.stem(torch.randn(1, 3, 16, 18)).shape == (1, 16, 8, 9)
