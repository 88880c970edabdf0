"""Input that no path can take is refused in words, before an address is followed."""
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
    (IMAGE[..., :31], ValueError, '32 x 32 .*32 x 31'),
    (IMAGE.double(), RuntimeError, '[Dd]ouble.*[Ff]loat'),  # torch's own, as from any model
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
