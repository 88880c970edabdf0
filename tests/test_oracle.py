"""The oracle itself, against numbers worked out by hand and a scalar-by-scalar NumPy version of one layer."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests import oracle

EXACT_PARAMETERS = {
    'san10_pairwise': 10_531_848, 'san10_patchwise': 11_841_124, 'san15_pairwise': 14_065_436,
    'san15_patchwise': 16_181_310, 'san19_pairwise': 17_596_156, 'san19_patchwise': 20_518_470,
}
GIGA_MULTIPLY_ADDS = {
    'san10_pairwise': 2.044, 'san10_patchwise': 1.791, 'san15_pairwise': 2.859,
    'san15_patchwise': 2.478, 'san19_pairwise': 3.636, 'san19_patchwise': 3.130,
}
FORMS = ([('pairwise', relation, position) for relation in oracle.PAIRWISE_RELATIONS
          for position in ('relative', 'absolute', 'none')]
         + [('patchwise', relation, 'none') for relation in oracle.PATCHWISE_RELATIONS])


@pytest.mark.parametrize('name', EXACT_PARAMETERS)
def test_costs_are_the_published_ones(name):
    assert oracle.parameter_count(name) == EXACT_PARAMETERS[name]
    assert round(oracle.multiply_adds(name) / 1e9, 3) == GIGA_MULTIPLY_ADDS[name]


@pytest.mark.parametrize('size', [1, 2, 3, 5, 8])
def test_reflect_is_numpys_repeated_reflection(size):
    pad = 17
    expected = np.pad(np.arange(size), pad, mode='reflect')
    assert [oracle.reflect(i, size) for i in range(-pad, size + pad)] == expected.tolist()


def test_footprint_by_hand():
    image = torch.arange(9.0).reshape(1, 1, 3, 3)
    corner = oracle.footprint(image, 3)[0, 0, :, 0, 0]
    assert corner.tolist() == [4, 3, 4, 1, 0, 1, 4, 3, 4]
    edge = oracle.footprint(image, 3, dilation=2)[0, 0, :, 1, 2]
    # Row 1 dilated by 2 reaches rows -1, 1, 3, which reflect to 1, 1, 1; column 2 reaches 0, 2, 4 -> 0.
    assert edge.tolist() == [3, 5, 3, 3, 5, 3, 3, 5, 3]


@pytest.mark.parametrize('kernel_size, dilation', [(3, 1), (5, 1), (3, 2)])
def test_footprint_is_unfold_of_reflection_padding(kernel_size, dilation):
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    pad = dilation * (kernel_size - 1) // 2
    unfolded = F.unfold(F.pad(x, [pad] * 4, mode='reflect'), kernel_size, dilation=dilation)
    expected = unfolded.reshape(2, 3, kernel_size ** 2, 6, 7)
    torch.testing.assert_close(oracle.footprint(x, kernel_size, dilation), expected, rtol=0, atol=0)


def test_uniform_pairwise_weights_average_the_footprint():
    """With a zero last linear the softmax is uniform: the top-left mean of 0..8 is (4*4 + 2*3 + 2*1 + 0) / 9."""
    channels = 32
    params = zero_params('pairwise', 'subtraction', channels, 3)
    params['conv3.weight'][:, 0] = 1
    x = torch.zeros(1, channels, 3, 3, dtype=torch.float64)
    x[0, 0] = torch.arange(9.0).reshape(3, 3)
    y, running = oracle.attention(x, params, 'pairwise', kernel_size=3)
    assert running == {}
    assert y[0, :, 0, 0].tolist() == pytest.approx([24 / 9] * 8)
    assert y[0, :, 1, 1].tolist() == pytest.approx([4] * 8)


def test_patchwise_weights_are_channel_major_and_interleaved():
    """A constant weight tensor read off the last bias: entry ``c * 9 + o`` weighs channels c and c + cw at offset o."""
    channels, weight_channels, offset = 64, 2, 5
    params = zero_params('patchwise', 'concatenation', channels, 3)
    for channel in range(16):
        params['conv3.weight'][channel, channel] = 1
    params['conv_w.5.bias'][1 * 9 + offset] = 2.0
    x = torch.randn(1, channels, 3, 3, dtype=torch.float64)
    y, _ = oracle.attention(x, params, 'patchwise', kernel_size=3)
    for channel in range(16):
        right = x[0, channel, 1, 2].item()  # offset 5 is one column to the right of the centre
        assert y[0, channel, 1, 1].item() == pytest.approx(2 * right if channel % weight_channels == 1 else 0)


def zero_params(attention, relation, channels, kernel_size):
    spec = oracle.Spec(attention=attention, relation=relation)
    shapes = oracle.attention_shapes(spec, channels, kernel_size)
    ones = ('running_var', 'conv_w.0.weight', 'conv_w.3.weight')
    return {name: torch.full(shape, float(name.endswith(ones)), dtype=torch.float64) for name, shape in shapes.items()}


# --- One layer, scalar by scalar -------------------------------------------------------------------------------------

def linear(params, name, vector):
    matrix = params[f'{name}.weight']
    return matrix.reshape(matrix.shape[:2]) @ vector + params.get(f'{name}.bias', 0)


def norm(params, name, vector):
    mean, variance = params[f'{name}.running_mean'], params[f'{name}.running_var']
    return (vector - mean) / np.sqrt(variance + 1e-5) * params[f'{name}.weight'] + params[f'{name}.bias']


def weight_mlp(params, vector):
    hidden = linear(params, 'conv_w.2', np.maximum(norm(params, 'conv_w.0', vector), 0))
    return linear(params, 'conv_w.5', np.maximum(norm(params, 'conv_w.3', hidden), 0))


def mirrored(i, n):
    period = max(2 * (n - 1), 1)
    i = i % period
    return min(i, period - i) if n > 1 else 0


def pair_features(params, relation, position, centre, neighbour, height, width, image):
    phi, psi = linear(params, 'conv1', image[:, centre[0], centre[1]]), linear(
        params, 'conv2', image[:, neighbour[0], neighbour[1]])
    delta = np.array(oracle.PAIRS[relation](phi, psi))

    def place(pixel):
        xy = [2 * pixel[1] / (width - 1) - 1, 2 * pixel[0] / (height - 1) - 1]
        return linear(params, 'conv_p', np.array(xy))

    places = {'none': list, 'absolute': lambda: place(neighbour),
              'relative': lambda: place(centre) - place(neighbour)}[position]()
    return np.concatenate([delta, places])


def patch_features(params, relation, centre, neighbours, image):
    phis = [linear(params, 'conv1', image[:, y, x]) for y, x in neighbours]
    psis = [linear(params, 'conv2', image[:, y, x]) for y, x in neighbours]
    phi = linear(params, 'conv1', image[:, centre[0], centre[1]])
    return np.array(oracle.PATCHES[relation](phi, phis, psis))


def attend_by_hand(image, params, attention, relation, position, kernel_size, dilation, share):
    _, height, width = image.shape
    half = kernel_size // 2
    out = len(params['conv3.bias'])
    shared = out // share
    result = np.zeros((out, height, width))
    for y in range(height):
        for x in range(width):
            neighbours = [(mirrored(y + dilation * dy, height), mirrored(x + dilation * dx, width))
                          for dy in range(-half, half + 1) for dx in range(-half, half + 1)]
            if attention == 'pairwise':
                logits = np.array([weight_mlp(params, pair_features(
                    params, relation, position, (y, x), place, height, width, image)) for place in neighbours])
                weights = (np.exp(logits) / np.exp(logits).sum(axis=0)).T
            else:
                features = patch_features(params, relation, (y, x), neighbours, image)
                weights = weight_mlp(params, features).reshape(shared, len(neighbours))
            for channel in range(out):
                result[channel, y, x] = sum(
                    weights[channel % shared, o] * linear(params, 'conv3', image[:, j, i])[channel]
                    for o, (j, i) in enumerate(neighbours))
    return result


@pytest.mark.parametrize('dilation', [1, 2])
@pytest.mark.parametrize('attention, relation, position', FORMS)
def test_attention_scalar_by_scalar(attention, relation, position, dilation):
    channels, kernel_size = 64, 3
    spec = oracle.Spec(attention=attention, relation=relation, position=position)
    params = oracle.random_tensors(oracle.attention_shapes(spec, channels, kernel_size), seed=1)
    x = torch.randn(1, channels, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y, _ = oracle.attention(x, params, attention, relation, position, kernel_size=kernel_size, dilation=dilation)
    arrays = {name: tensor.numpy() for name, tensor in params.items()}
    expected = attend_by_hand(x[0].numpy(), arrays, attention, relation, position, kernel_size, dilation, share=8)
    np.testing.assert_allclose(y[0].numpy(), expected, rtol=1e-10, atol=1e-10)


# --- The other layers ------------------------------------------------------------------------------------------------

def test_batch_norm_and_its_running_statistics():
    x = torch.randn(3, 4, 5, 2, 3, dtype=torch.float64)
    params = oracle.random_tensors(oracle.norm_shapes('bn', 4), seed=0)
    for training in (False, True):
        mean, variance = params['bn.running_mean'].clone(), params['bn.running_var'].clone()
        expected = F.batch_norm(x, mean, variance, params['bn.weight'], params['bn.bias'], training, momentum=0.1)
        running = {}
        torch.testing.assert_close(oracle.batch_norm(x, params, 'bn', training, running), expected)
        if training:
            torch.testing.assert_close(running, {'bn.running_mean': mean, 'bn.running_var': variance})


def test_training_reports_both_norms_of_gamma_over_the_whole_footprint():
    spec = oracle.Spec()
    params = oracle.random_tensors(oracle.attention_shapes(spec, 32, 3), seed=0)
    x = torch.randn(2, 32, 3, 4, dtype=torch.float64)
    _, running = oracle.attention(x, params, kernel_size=3, training=True)
    assert set(running) == {f'conv_w.{i}.running_{what}' for i in (0, 3) for what in ('mean', 'var')}
    phi = oracle.linear_map(x, params, 'conv1')
    delta = phi.unsqueeze(2) - oracle.footprint(oracle.linear_map(x, params, 'conv2'), 3)
    expected = 0.9 * params['conv_w.0.running_var'][:2] + 0.1 * delta.transpose(0, 1).flatten(1).var(dim=1)
    torch.testing.assert_close(running['conv_w.0.running_var'][:2], expected)


@pytest.mark.parametrize('size', [(4, 6), (5, 7), (2, 3)])
def test_max_pool(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(oracle.max_pool(x), F.max_pool2d(x, 2), rtol=0, atol=0)


@pytest.mark.parametrize('output_stride, sizes', [(32, [32, 16, 8, 4, 2]), (16, [32, 16, 8, 4, 4]),
                                                  (8, [32, 16, 8, 8, 8])])
def test_network_strides_and_running_names(output_stride, sizes):
    spec = oracle.small_spec()
    state = oracle.random_state(spec, seed=0, num_classes=7)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    result = oracle.network(image, state, training=True, output_stride=output_stride, **spec.structure())
    assert [tuple(f.shape) for f in result['features']] == [(2, c, s, s) for c, s in zip(spec.widths, sizes)]
    assert result['logits'].shape == (2, 7)
    assert set(result['running']) == {name for name in state if 'running' in name}


def test_reference_positions_equal_the_released_ones_at_the_reference_size():
    for position in ('relative', 'absolute'):
        step = oracle.coordinates(7, position, 7).diff()
        torch.testing.assert_close(step, torch.linspace(-1, 1, 7, dtype=torch.float64).diff())
    torch.testing.assert_close(oracle.coordinates(7, 'absolute', 7), torch.linspace(-1, 1, 7, dtype=torch.float64))
    assert oracle.coordinates(1, 'relative', None).tolist() == [-1]


def test_released_checkpoint_format():
    state = {'fc.bias': torch.zeros(2)}
    assert set(oracle.released_checkpoint(state)) == {'state_dict', 'epoch'}
    assert list(oracle.released_checkpoint(state)['state_dict']) == ['module.fc.bias']
    assert list(oracle.released_checkpoint(state, module_prefix=False, wrap=False)) == ['fc.bias']
