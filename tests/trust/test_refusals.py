"""Input that no backend can take raises an error before an address is used."""
import re

import numpy as np
import pytest
import timm
import torch

from san_backbones import PairwiseAttention, PatchwiseAttention, fuse_for_inference, ops

PATHS = ops.available_backends()


def _call(form=PairwiseAttention, **changes):
    """A call of footprint_attention with one thing changed: a map, a field of gamma or of spec."""
    torch.manual_seed(0)
    layer = form(32, kernel_size=3).eval().requires_grad_(False)
    x = torch.randn(2, 32, 4, 5)
    maps = dict(query=layer.query(x), key=layer.key(x), value=layer.value(x), place=layer.place(x))
    gamma, spec = layer.gamma(), layer.spec()
    for name, change in changes.items():
        if name in maps:
            maps[name] = change(maps[name]) if callable(change) else change
        elif name in spec._fields:
            spec = spec._replace(**{name: change})
        elif '_' in name:
            norm, field = name.split('_', 1)
            changed = getattr(gamma, norm)._replace(**{field: change(getattr(getattr(gamma, norm), field))})
            gamma = gamma._replace(**{norm: changed})
        elif name != 'shift':
            gamma = gamma._replace(**{name: change(getattr(gamma, name))})
    return ops.footprint_attention(*maps.values(), gamma, spec, changes.get('shift'))


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('changes, message', [
    (dict(key=lambda x: x[:, :, :2]), r'same N, H and W.*query \[2, 2, 4, 5\].*key \[2, 2, 2, 5\]'),
    (dict(key=lambda x: x[:, :1]), 'same N, H and W'),
    (dict(query=lambda x: x[:1]), 'same N, H and W'),
    (dict(value=lambda x: x[:, :, :, :3]), r'same N, H and W.*value \[2, 8, 4, 3\]'),
    (dict(value=lambda x: x[0]), r'value must be a map.*\[8, 4, 5\]'),
    (dict(query=lambda x: x[:, :, :0]), 'at least 1'),
    (dict(value=lambda x: x[:, :0]), 'at least 1'),
    (dict(query=lambda x: x.long()), r'floating dtype, got torch.int64.*query.float\(\)'),
    (dict(value=lambda x: x.cfloat()), 'floating dtype, got torch.complex64'),
    (dict(value=lambda x: x > 0), 'floating dtype, got torch.bool'),
    (dict(query=lambda x: x.bfloat16()), 'one dtype.*bfloat16.*float32'),
    (dict(key=lambda x: x.to('meta')), 'one device.*meta'),
    (dict(place=lambda x: x.to('meta')), 'one device.*meta'),
    (dict(place=lambda x: x[..., :2]), r'place must be .*\[1, 2, 4, 5\], got \[1, 2, 4, 2\]'),
    (dict(place=lambda x: x.expand(2, -1, -1, -1)), r'got \[2, 2, 4, 5\]'),
    (dict(place=None), "place must be given for position 'relative'"),
    (dict(position='none'), "place must be None for position 'none'"),
    (dict(position='nowhere'), "'relative', 'absolute', 'none', got 'nowhere'"),
    (dict(relation='star'), "pairwise form must be one of 'subtraction'.*got 'star'"),
    (dict(relation='concatenation'), r'weight1 of gamma must be \[2, 6, 1, 1\].*got \[2, 4, 1, 1\]'),
    (dict(kernel_size=2), 'odd and positive.*kernel_size=2'),
    (dict(kernel_size=-1), 'odd and positive.*kernel_size=-1'),
    (dict(dilation=0), 'dilation=0'),
    (dict(weight1=lambda x: x[:, :3]), r'weight1 of gamma must be \[2, 4, 1, 1\]'),
    (dict(weight1=lambda x: x[:, :, 0, 0]), 'weight1 of gamma'),
    (dict(weight2=lambda x: x[:, :1]), 'weight2 of gamma'),
    (dict(weight2=lambda x: x.repeat(3, 1, 1, 1), bias2=lambda x: x.repeat(3)),
     'multiple of the weight channels, got 8 channels and weight2 of gamma with 3 rows'),
    (dict(bias2=lambda x: x[:0]), 'bias2 of gamma'),
    (dict(bias2=lambda x: x.to('meta')), 'bias2 of gamma is on meta'),
    (dict(norm1_weight=lambda x: x[:1]), r'norm1.weight of gamma must be \[4\].*got \[1\]'),
    (dict(norm2_running_var=lambda x: x[None]), 'norm2.running_var of gamma'),
    (dict(weight2=lambda x: x[:0], bias2=lambda x: x[:0]), '8 channels and weight2 of gamma with 0 rows'),
    (dict(norm1_running_mean=lambda x: None), 'norm1 of gamma has no running_mean or.*batch_statistics=True'),
    (dict(norm2_running_var=lambda x: None), 'norm2 of gamma has no'),
    (dict(norm1_momentum=lambda x: None), 'momentum of norm1 of gamma must be a number, got None'),
    (dict(weight1=lambda x: x.cfloat()), 'weight1 of gamma must be of a floating dtype, got torch.complex64'),
    (dict(norm2_weight=lambda x: x.long()), 'norm2.weight of gamma must be of a floating dtype, got torch.int64'),
    (dict(shift=torch.zeros(7)), r'shift must be a floating tensor \[8\] on cpu, got shift \[7\]'),
], ids=lambda changes: '-'.join(changes) if isinstance(changes, dict) else '')
def test_attention(path, changes, message):
    with ops.use_backend(path), pytest.raises(ValueError, match=message):
        _call(**changes)


@pytest.mark.parametrize('changes, message', [
    (dict(relation='subtraction'), "patchwise form must be one of 'concatenation', 'star', 'clique'"),
    (dict(kernel_size=5), 'weight1 of gamma'),
    (dict(weight2=lambda x: x[:-1], bias2=lambda x: x[:-1]), '8 rows, 9 for each weight channel'),
])
def test_patchwise(changes, message):
    with pytest.raises(ValueError, match=message):
        _call(PatchwiseAttention, **changes)


@pytest.mark.parametrize('path', PATHS)
def test_what_the_calls_begin_with_is_good(path):
    with ops.use_backend(path):
        for form in (PairwiseAttention, PatchwiseAttention):
            assert _call(form).isfinite().all()


def test_norms_in_double_precision():
    """Frozen in float64 beside maps in float32: the same numbers, or torch's refusal to mix them."""
    for form in (PairwiseAttention, PatchwiseAttention):
        torch.manual_seed(0)
        layer = form(32, kernel_size=3).requires_grad_(False)
        x = torch.randn(2, 32, 6, 7)
        for training in (False, True):
            layer.train(training).float()
            expected = layer(x)
            layer.weight_mlp.norm1.double()
            layer.weight_mlp.norm2.double()
            for path in PATHS:
                with ops.use_backend(path):
                    try:
                        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
                    except RuntimeError as error:
                        assert path != 'native' and 'mixed dtype' in str(error)


def test_scale_shift_relu():
    x, scale, shift = torch.randn(6, 4).t(), torch.randn(6), torch.randn(6)
    expected = torch.relu(x * scale + shift)
    with torch.no_grad():
        for y in (x, x.contiguous()):
            strided = torch.stack([scale, scale], 1)[:, 0]
            for s, t in ((scale, shift), (scale.double(), shift.double()), (strided, shift)):
                torch.testing.assert_close(ops.scale_shift_relu(y, s, t), expected)  # strided, and in other dtypes
        assert ops.scale_shift_relu(torch.empty(0, 6), scale, shift).shape == (0, 6)
        for bad, message in (((x, scale[:1], shift), r'scale must be .*\[6\].*got scale \[1\]'),
                             ((x, scale, shift.long()), 'shift must be a floating.*int64'),
                             ((x, scale.to('meta'), shift), 'on cpu.*meta'),
                             ((x.long(), scale, shift), 'floating dtype'),
                             ((torch.empty(3, 0), scale[:0], shift[:0]), 'C at least 1')):
            with pytest.raises(ValueError, match=message):
                ops.scale_shift_relu(*bad)


@pytest.mark.skipif(ops.native.unavailable() is not None, reason='no compiled loops')
def test_stem():
    norm = ops.Norm(torch.ones(8), torch.zeros(8), torch.zeros(8), torch.ones(8), False, 0.1, 1e-5)
    image, weight = torch.randn(1, 3, 6, 6), torch.randn(8, 3)
    assert ops.stem(image, weight, norm).shape == (1, 8, 3, 3)
    for bad, message in (((image, weight[:, :2], norm), r'\[1, 3, 6, 6\] on cpu and \[8, 2\]'),
                         ((image[0], weight, norm), 'expected an image'),
                         ((image, weight.to('meta'), norm), 'on meta'),
                         ((image.double(), weight, norm), 'no compiled loop.*float64'),
                         ((image, weight, norm._replace(bias=torch.zeros(1))), 'bias of the norm'),
                         ((image, weight, norm._replace(running_var=torch.ones(9))), 'running_var of the norm')):
        with pytest.raises(ValueError, match=message):
            ops.stem(*bad)


@pytest.fixture(scope='module', params=['plain', 'fused'])
def model(request):
    torch.manual_seed(0)
    model = timm.create_model('test_san_pairwise', num_classes=3).eval().requires_grad_(False)
    return fuse_for_inference(model) if request.param == 'fused' else model


IMAGE = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize('image, error, message', [
    (IMAGE.to(torch.uint8), ValueError, r'floating dtype, normalised, got torch.uint8.*images.float\(\) / 255'),
    (IMAGE.long(), ValueError, 'int64'),
    (IMAGE.cfloat(), ValueError, 'complex64'),
    (np.zeros((1, 3, 32, 32)), TypeError, 'got a ndarray.*from_numpy'),
    (None, TypeError, 'got a NoneType'),
    (IMAGE[0], ValueError, re.escape('(N, 3, H, W), got [3, 32, 32]')),
    (IMAGE.expand(2, 1, 3, 32, 32), ValueError, r'\(N, 3, H, W\)'),
    (IMAGE.permute(0, 2, 3, 1), ValueError, re.escape('got [1, 32, 32, 3]')),
    (IMAGE[..., :0], ValueError, 'at least one pixel, got 32 x 0'),
    (IMAGE.double(), ValueError, r'expected torch.float32.*got torch.float64.*x.to\(torch.float32\)'),
    (IMAGE.bfloat16(), ValueError, r'expected torch.float32.*got torch.bfloat16'),
    (IMAGE.to('meta'), RuntimeError, 'meta'),
])
def test_images(model, image, error, message):
    with torch.no_grad(), pytest.raises(error, match=message):
        model(image)


def test_empty_batch(model):
    with torch.no_grad():
        assert model(IMAGE[:0]).shape == (0, 3)


@pytest.mark.parametrize('path', ['auto', *ops.available_backends()])
@pytest.mark.parametrize('name', ['resnet18', 'test_san_pairwise', 'test_san_patchwise'])
def test_an_empty_batch_in_training(name, path):
    """All gradients are there, and zero; running statistics stay, finite as they are."""
    model = timm.create_model(name, num_classes=3).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ops.use_backend(path):
        output = model(IMAGE[:0])
        assert output.shape == (0, 3)
        output.sum().backward()
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
        optimizer.step()
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()
                   if not key.endswith('num_batches_tracked'))
        optimizer.zero_grad()
        model(torch.cat([IMAGE, IMAGE.flip(3)])).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize('path', ['auto', *ops.available_backends()])
def test_a_single_value_in_training(path):
    model = timm.create_model('test_san_patchwise').train()
    before = {name: buffer.clone() for name, buffer in model.stages[-1].blocks[0].attn.named_buffers()}
    with pytest.raises(ValueError, match='more than 1 value per channel'), ops.use_backend(path):
        model(IMAGE[:1, :, :32, :32])
    assert all(torch.equal(buffer, before[name])
               for name, buffer in model.stages[-1].blocks[0].attn.named_buffers() if 'tracked' not in name)


@pytest.mark.skipif(ops.native.unavailable() is not None, reason='no compiled loops')
@pytest.mark.parametrize('operator, changes, message', [
    ('scale_shift_relu', {1: lambda x: x[:3]}, r'scale must be a float32 tensor \[64\] on cpu, got scale \[3\]'),
    ('scale_shift_relu', {2: lambda x: x.double()}, r'shift must be a float32 tensor .*float64'),
    ('scale_shift_relu', {0: lambda x: x.bfloat16()}, 'x must be a float32 tensor.*bfloat16'),
    ('scale_shift_relu', {0: lambda x: x[:, :0]}, r'C at least 1, got \[2, 0\]'),
    ('scale_shift_relu', {0: lambda x: x[0, 0]}, r'C at least 1, got \[\]'),
    ('scale_shift_relu', {0: lambda x: None}, 'x must be a tensor, got None'),
    ('stem', {0: lambda x: x.long()}, 'image must be .*int64'),
    ('stem', {0: lambda x: x[0]}, r'image must be \(N, C, H, W\).*\[3, 6, 7\]'),
    ('stem', {1: lambda x: x[:, :2]}, r'weight must be a float32 tensor \[8, 3\] on cpu, got weight \[8, 2\]'),
    ('stem', {1: lambda x: x[0]}, r'weight must be \(D, C\)'),
    ('stem', {2: lambda x: x[:1]}, r'bias must be a float32 tensor \[8\]'),
    ('stem_backward', {0: lambda x: x[:, :, :1]}, r'gradient must be a floating tensor \[2, 8, 3, 3\] on cpu, got'),
    ('stem_backward', {0: lambda x: x.long()}, 'gradient must be a floating tensor.*int64'),
    ('moments', {0: lambda x: x[0]}, r'x must be \(N, H, W, C\) with C a multiple of \d+, got \[3, 4, 16\]'),
    ('moments', {0: lambda x: x[..., :9]}, r'C a multiple of \d+, got \[2, 3, 4, 9\]'),
    ('moments', {0: lambda x: x.double()}, 'x must be a float32 tensor.*float64'),
    ('scale_shift_relu_gradient', {0: lambda x: x[:1]}, r'gradient must be a float32 tensor \[2, 3, 4, 16\] on cpu'),
    ('scale_shift_relu_gradient', {8: lambda x: x[:1]}, r'beside must be a float32 tensor \[2, 3, 4, 16\] on cpu'),
    ('scale_shift_relu_gradient', {5: lambda x: x[:8]}, r'by_x must be a float32 tensor \[16\] on cpu'),
])
def test_operators_around_the_attention(operator, changes, message):
    arguments = {'scale_shift_relu': [torch.randn(2, 64), torch.randn(64), torch.randn(64)],
                 'stem': [torch.randn(2, 3, 6, 7), torch.randn(8, 3), torch.randn(8)],
                 'stem_backward': [torch.randn(2, 8, 3, 3), torch.randn(2, 3, 6, 7), torch.randn(8, 3), torch.randn(8),
                                   True],
                 'moments': [torch.randn(2, 3, 4, 16)],
                 'scale_shift_relu_gradient': [*torch.randn(2, 2, 3, 4, 16), *torch.randn(5, 16), None,
                                               torch.randn(2, 3, 4, 16)]}[operator]
    for i, change in changes.items():
        arguments[i] = change(arguments[i])
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.san_backbones, operator)(*arguments)


@pytest.mark.skipif(ops.native.unavailable() is not None, reason='no compiled loops')
@pytest.mark.parametrize('name, change, message', [
    ('shape', lambda x: x[:-1], r'shape must be 8 integers \(relation, .*, backend\)'),
    ('shape', lambda x: [*x[:-1], 2], r'backend must be one of 0 \(native\), 1 \(triton\), got 2'),
    pytest.param('shape', lambda x: [*x[:-1], 1], 'triton backend does not serve these maps', marks=pytest.mark.skipif(
        'triton' in ops.available_backends('cpu'), reason='in the interpreter they do')),
    ('shape', lambda x: [x[0], 2, *x[2:]], 'absolute must be 0 or 1, got 2'),
    ('shape', lambda x: [*x[:2], 4, *x[3:]], 'kernel_size=4'),
    ('shape', lambda x: [*x[:3], 0, *x[4:]], 'dilation=0'),
    ('shape', lambda x: [*x[:4], 0, *x[5:]], 'hidden=0'),
    ('shape', lambda x: [*x[:6], x[6] + 1, x[7]], 'lanes a multiple of'),
    ('shape', lambda x: [*x[:5], 3 * x[6], 3 * x[6], x[7]], 'channels of value must be a multiple of the .*, got 8'),
    ('shape', lambda x: [5, *x[1:]], 'place must be None for the patchwise form'),
    ('query', lambda x: x.double(), 'one dtype'),
    ('value', lambda x: None, 'value must be a tensor, got None'),
    ('scale1', lambda x: x[:-1], r'scale1 must be a float32 tensor \[4\] on cpu, got scale1 \[3\]'),
    ('weight1', lambda x: x.half(), 'weight1 must be a float32 tensor.*float16'),
    ('weight2', lambda x: x[:, :1], 'weight2 must be'),
    ('bias2', lambda x: None, 'bias2 must be a tensor, got None'),
    ('shift', lambda x: x[:-1], r'shift must be a float32 tensor \[8\]'),
])
def test_the_operator_of_the_attention(name, change, message):
    layer, x = PairwiseAttention(32, kernel_size=3).eval().requires_grad_(False), torch.randn(2, 32, 4, 5)
    gamma = layer.gamma()
    norms = (ops.fold(norm, norm.running_mean, norm.running_var) for norm in (gamma.norm1, gamma.norm2))
    shape, folded = ops.folding.fold_gamma(*norms, gamma, layer.spec(), ops.native.library.width(), 0)
    arguments = dict(query=layer.query(x), key=layer.key(x), value=layer.value(x), place=layer.place(x),
                     **dict(zip(('scale1', 'shift1', 'weight1', 'shift2', 'weight2', 'bias2'), folded)),
                     shift=torch.zeros(8), shape=shape)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        torch.ops.san_backbones.attend(**arguments)


@pytest.mark.parametrize('form', [PairwiseAttention, PatchwiseAttention])
@pytest.mark.parametrize('change, message', [
    (lambda x: x.long(), r'floating dtype, got torch.int64.*x.float\(\)'),
    (lambda x: x.cfloat(), 'floating dtype, got torch.complex64'),
    (lambda x: x.double(), r'expected torch.float32, the dtype .* got torch.float64.*x.to\(torch.float32\)'),
    (lambda x: x.bfloat16(), 'expected torch.float32, .* got torch.bfloat16'),
])
def test_maps_of_a_bare_layer(form, change, message):
    layer, x = form(32, kernel_size=3).eval(), torch.randn(1, 32, 4, 5)
    with pytest.raises(ValueError, match=message):
        layer(change(x))
    layer.value.register_forward_hook(lambda *_: None)
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(x).dtype == layer(x.bfloat16()).dtype == torch.bfloat16


def test_autocast_takes_what_it_converts(model):
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(model(IMAGE.bfloat16()), model(IMAGE), rtol=0.1, atol=0.1)
        with pytest.raises(ValueError, match='got torch.float64'):
            model(IMAGE.double())


@pytest.mark.parametrize('options, message', [
    (dict(kernel_size=True), 'kernel_size must be an odd positive integer .* got True'),
    (dict(dilation=True), 'dilation must be a positive integer, got True'),
    (dict(dim=True), 'dim must be a positive integer, got True'),
    (dict(dim=32.), 'dim must be a positive integer, got 32.0'),
    (dict(rel_planes=2.), 'positive integers.*rel_planes=2.0'),
    (dict(out_planes=True, share_planes=1), 'positive integers.*out_planes=True'),
    (dict(share_planes=True), 'positive integers.*share_planes=True'),
    (dict(norm_layer='BN'), "norm_layer must be a class or timm's name of one, such as 'batchnorm2d'.*got 'BN'"),
    (dict(norm_layer=''), "norm_layer .* got ''"),
    (dict(act_layer='RELU7'), "act_layer must be a class or timm's name of one.*got 'RELU7'"),
])
@pytest.mark.parametrize('form', [PairwiseAttention, PatchwiseAttention])
def test_options_of_a_layer_that_mean_nothing(form, options, message):
    with pytest.raises(ValueError, match=message):
        form(**{'dim': 32, **options})


@pytest.mark.parametrize('options, message', [
    (dict(num_classes=-1), 'num_classes must be a positive integer, or 0 .* got -1'),
    (dict(num_classes=True), 'num_classes .* got True'),
    (dict(num_classes=2.5), 'num_classes .* got 2.5'),
    (dict(stem_width=0), 'stem_width must be a positive integer, got 0'),
    (dict(stem_width=16.), 'stem_width must be a positive integer, got 16.0'),
    (dict(in_chans=True), 'in_chans must be a positive integer, got True'),
    (dict(share_planes=0), 'share_planes must be a positive integer, got 0'),
    (dict(kernel_sizes=True), 'kernel_sizes must have one integer for each .* got True'),
    (dict(widths=(64, 0, 64, 64, 64)), r'widths must have one integer .* got \(64, 0, 64, 64, 64\)'),
    (dict(depths=(True,) * 5), 'depths must hold the number of blocks'),
    (dict(position_ref_size=True), 'position_ref_size must be None or an integer'),
    (dict(drop_rate=-0.1), r'drop_rate must be in \[0, 1\], got -0.1'),
    (dict(drop_rate=2), 'drop_rate .* got 2'),
    (dict(norm_layer='BN'), "norm_layer must be .* got 'BN'"),
    (dict(act_layer='BN'), "act_layer must be .* got 'BN'"),
])
def test_options_of_a_network_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_san_pairwise', **options)


@pytest.mark.parametrize('name', ['norm_layer', 'act_layer'])
def test_neither_a_class_nor_a_name(name):
    with pytest.raises(TypeError, match=f"{name} must be a class or timm's name of one, got 3"):
        PairwiseAttention(32, **{name: 3})


def test_a_classifier_of_less_than_no_classes():
    with pytest.raises(ValueError, match='num_classes .* got -3'):
        timm.create_model('test_san_pairwise').reset_classifier(-3)
