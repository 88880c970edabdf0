"""diagnose: the first layer out of range, by the statistics that the norms themselves keep."""
import pytest
import timm
import torch

import san_backbones
from san_backbones import diagnose


def model(seed=0, **kwargs):
    torch.manual_seed(seed)
    network = timm.create_model('test_san_patchwise', num_classes=4, **kwargs)
    for _ in range(2):
        torch.optim.swa_utils.update_bn([images(seed=i) for i in range(3)], network)
    return network.eval()


def images(seed=5):
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def test_a_network_in_order():
    network = model()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = diagnose(network, images())
    assert found.layer is None and found.finite and str(found).startswith('All values are finite and within')
    names = [layer.name for layer in found.layers]
    assert names[0] == 'stem.norm' and names[1:3] == ['stages.0.blocks.0.norm1',
                                                      'stages.0.blocks.0.attn.weight_mlp.norm1']
    assert names[-1] == 'stages.4.norm' and len(names) == 1 + 5 * 5
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_distances_are_those_of_the_running_statistics():
    network = model()
    x = network.stem.conv(images())
    norm = network.stem.norm
    expected = ((x - norm.running_mean[:, None, None]) / (norm.running_var + 1e-5).sqrt()[:, None, None]).abs()
    layer = diagnose(network, images()).layers[0]
    assert layer.deviations == pytest.approx(expected.max().item(), rel=1e-5)
    assert expected[layer.image, layer.channel].max() == expected.max()


@pytest.mark.parametrize('wrap', ['classifier', 'features'])
def test_the_first_layer_out_of_range_is_named(wrap):
    """One block's output is magnified: what reads it first is named, not what follows."""
    network = model(relu_bound=float('inf'))
    with torch.no_grad():
        network.stages[2].blocks[0].conv.weight.mul_(1e6)
    x = images()
    if wrap == 'features':
        from timm.models import FeatureListNet
        network = FeatureListNet(network, out_indices=(1, 4), flatten_sequential=True).eval()
    found = diagnose(network, x)
    name = 'stages.2.norm' if wrap == 'classifier' else 'stages_2.norm'
    assert found.layer == name and f'{name} is the first layer out of range' in str(found)
    assert 'relu_bound=6.' in str(found)


def test_advice_fits_the_network():
    bounded = model()
    with torch.no_grad():
        bounded.stages[2].blocks[0].conv.weight.mul_(1e6)
    assert 'relu_bound' not in str(diagnose(bounded, images())) and 'lower the learning rate' in str(
        diagnose(bounded, images()))
    assert 'normalised in the same way' in str(diagnose(model(), images() * 1e4))


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_not_finite(value):
    network = model()
    x = images()
    x[1, 0, 3, 3] = value
    found = diagnose(network, x)
    assert not found.finite and found.layer == 'stem.norm' and found.layers[0].image == 1
    assert 'The output is not finite' in str(found)


@pytest.mark.parametrize('name', ['stages.3.blocks.0.attn.query.weight', 'stages.1.norm.running_mean'])
def test_a_broken_tensor_comes_first(name):
    network = model()
    network.state_dict()[name].view(-1)[0] = float('nan')
    found = diagnose(network, images())
    assert found.layer == name and not found.finite and f'{name} holds values that are not finite' in str(found)


def test_threshold():
    found = diagnose(model(), images(), threshold=1.)
    assert found.layer == 'stem.norm' and found.finite and 'The output is not finite' not in str(found)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r'eval mode.*model.eval\(\)'):
        diagnose(model().train(), images())
    with pytest.raises(ValueError, match='at least one image'):
        diagnose(model(), images()[:0])


def test_is_public():
    assert san_backbones.diagnose is diagnose and 'diagnose' in san_backbones.__all__


def test_recalibrated_networks():
    """Where an unbounded network overflows, the bound keeps the same weights in range, and the first layer is early."""
    torch.manual_seed(0)
    x = [torch.randn(12, 3, 64, 64) for _ in range(3)]
    odd = torch.randn(4, 3, 64, 64) * torch.tensor([1., 3., 10., 30.]).view(4, 1, 1, 1)
    results = {}
    for bound in (float('inf'), 6.):
        torch.manual_seed(1)
        network = timm.create_model('san10_patchwise', num_classes=4, relu_bound=bound)
        for _ in range(2):
            torch.optim.swa_utils.update_bn(x, network)
        results[bound] = diagnose(network.eval(), odd)
    free, bounded = results.values()
    assert not free.finite or max(layer.deviations for layer in free.layers) > 1e6
    assert bounded.finite and max(layer.deviations for layer in bounded.layers) < 1e4
    assert free.layer.startswith('stages.0') and 'relu_bound=6.' in str(free)


def test_vectors():
    """What heads of other networks have: (N, C)."""
    norm = torch.nn.BatchNorm1d(5).eval()
    found = diagnose(torch.nn.Sequential(norm).eval(), torch.tensor([[0., 1., -7., 2., 3.]]))
    assert found.layers[0].deviations == pytest.approx(7, rel=1e-4) and found.layers[0].channel == 2


def test_networks_without_statistics():
    network = timm.create_model('test_san_patchwise', norm_layer='groupnorm1').eval()
    found = diagnose(network, images())
    assert found.finite and 'No batch norm with running statistics ran in this SAN' in str(found)


def test_compiled_networks():
    network = model()
    found = diagnose(torch.compile(network, backend='eager'), images())
    assert found.layers == diagnose(network, images()).layers and len(found.layers) == 26
