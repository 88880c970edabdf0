"""What random weights are, and that networks made of them are finite however their statistics were taken."""
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from san_backbones import SAN, PairwiseAttention, PatchwiseAttention
from san_backbones.san import Block
from san_backbones.visualize import effective_size, footprint_weights


@pytest.mark.parametrize('relation', ['concatenation', 'star', 'clique'])
@pytest.mark.parametrize('kernel_size', [3, 7])
def test_patchwise_layers_begin_near_fixed_kernels(relation, kernel_size):
    """The layer of constant kernels that gamma's last bias says, and not far from it (float64 convolution)."""
    if relation == 'clique' and kernel_size == 7:
        pytest.skip('7^4 channels')
    torch.manual_seed(0)
    layer = PatchwiseAttention(256, kernel_size=kernel_size, relation=relation).double()
    x = torch.randn(2, 256, 9, 8, dtype=torch.float64)
    channels = 256 // 4 // 8
    kernels = layer.weight_mlp.fc2.bias.detach().view(channels, 1, kernel_size, kernel_size).repeat(8, 1, 1, 1)
    pad = [kernel_size // 2] * 4
    expected = F.conv2d(F.pad(layer.value(x), pad, mode='reflect'), kernels, groups=64)
    assert ((layer(x) - expected).norm() / expected.norm()) < 0.5  # ten times that with weights as torch makes them
    assert kernels.square().sum((1, 2, 3)).mean().item() == pytest.approx(1, abs=0.5)
    size = layer.weight_mlp.fc2.weight.abs().max().item() * math.sqrt(layer.weight_mlp.fc2.in_channels)
    assert 0.05 < size <= 0.1 + 1e-6


def test_only_that_map_differs_from_torch():
    """All have the spread that torch gives them, but for gamma's last: a tenth patchwise, four times pairwise."""
    torch.manual_seed(0)
    for layer, last in ((PatchwiseAttention(256), 0.1), (PairwiseAttention(256), 4)):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Conv2d):
                limit = module.in_channels ** -0.5 * (last if name.endswith('fc2') else 1)
                assert 0.8 * limit < module.weight.abs().max() <= limit * (1 + 1e-6), name


@pytest.mark.parametrize('form', ['pairwise', 'patchwise'])
def test_blocks_begin_as_the_identity(form, zero_init_last):
    """So that stages are what their first convolution and last norm make, unless they are told otherwise."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    x = images
    for option in ({}, dict(zero_init_last=True), dict(zero_init_last=False)):
        model = timm.create_model(f'test_san_{form}', num_classes=0, global_pool='', **option).train()
        with torch.no_grad():
            x = model.stem(images)
            for stage in model.stages:
                x = F.relu(F.batch_norm(stage.conv(stage.pool(x)), None, None, training=True))
            same = torch.allclose(model(images), x, atol=1e-5)
        assert same == option.get('zero_init_last', True)


@pytest.mark.parametrize('form', ['pairwise', 'patchwise'])
def test_zeros_in_the_last_convolution_move_with_the_first_step_the_rest_with_the_second(form, zero_init_last):
    """Nothing stays where it is: gradients reach everything behind the zeros as soon as those have moved."""
    torch.manual_seed(0)
    model = timm.create_model(f'test_san_{form}', num_classes=4)
    inside = [(f'{name}.{part}', parameter) for name, block in model.named_modules() if isinstance(block, Block)
              for part, parameter in block.named_parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    moved = []
    for _ in range(2):
        before = [parameter.clone() for _, parameter in inside]
        F.cross_entropy(model(torch.randn(8, 3, 64, 64)), torch.arange(8) % 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append({name for (name, parameter), old in zip(inside, before, strict=True)
                      if not torch.equal(parameter, old)})
    last = {name for name, _ in inside if '.conv.' in name and '.attn.' not in name}
    assert {name for name in last if name.endswith('weight')} <= moved[0] <= last
    assert moved[1] >= {name for name, _ in inside if name.endswith('weight')}


def test_what_was_loaded_is_not_zeroed(zero_init_last):
    source = timm.create_model('test_san_patchwise', zero_init_last=False)
    model = timm.create_model('test_san_patchwise')
    assert not model.stages[0].blocks[0].conv.weight.any()
    model.load_state_dict(source.state_dict())
    assert torch.equal(model.stages[0].blocks[0].conv.weight, source.stages[0].blocks[0].conv.weight)
    shipped = timm.create_model('test_san_patchwise', pretrained=True)
    assert shipped.stages[0].blocks[0].conv.weight.any()


def test_pairwise_layers_begin_with_weights_that_differ():
    """On noise, the footprint of a new layer is not evenly weighed; with torch's weights it nearly is."""
    torch.manual_seed(0)
    layer, x = PairwiseAttention(256), torch.randn(2, 256, 12, 12)
    sharp = effective_size(footprint_weights(layer, x)).mean()
    with torch.no_grad():
        layer.weight_mlp.fc2.weight.div_(4)
    flat = effective_size(footprint_weights(layer, x)).mean()
    assert flat > 45 and sharp < 0.85 * flat  # of 49


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_made_in_half_precision_and_on_meta(dtype):
    bias = PatchwiseAttention(256, dtype=dtype).weight_mlp.fc2.bias
    assert bias.dtype == dtype and bias.float().std().item() == pytest.approx(1 / 7, rel=0.2)
    assert PatchwiseAttention(64, device='meta').weight_mlp.fc2.bias.is_meta


@pytest.mark.parametrize('depth', ['san10', 'san15', 'san19'])
def test_recalibrated_random_networks_are_finite(depth):
    """`update_bn`, as for SWA, on pictures of which one is far from the others in contrast."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(18, 3, 64, 64, generator=generator)
    images = F.avg_pool2d(F.pad(images, [2] * 4, mode='reflect'), 5, 1) * 4
    images[7] *= 4
    for seed in range(3):
        torch.manual_seed(seed)
        model = timm.create_model(f'{depth}_patchwise', num_classes=5)
        for _ in range(2):
            torch.optim.swa_utils.update_bn(images.split(6), model)
        with torch.no_grad():
            logits = model.eval()(images)
        assert logits.isfinite().all() and logits.abs().max() < 1e3


def test_the_same_networks_without_the_bound_and_the_kernels_are_not():
    """What the test above would pass by if it asked too little."""
    generator = torch.Generator().manual_seed(0)
    images = F.avg_pool2d(F.pad(torch.randn(18, 3, 64, 64, generator=generator), [2] * 4, mode='reflect'), 5, 1) * 4
    images[7] *= 4
    largest = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = timm.create_model('san15_patchwise', num_classes=5, relu_bound=float('inf'))
        for layer in model.modules():
            if isinstance(layer, PatchwiseAttention):
                layer.weight_mlp.fc2.reset_parameters()
        for _ in range(2):
            torch.optim.swa_utils.update_bn(images.split(6), model)
        with torch.no_grad():
            logits = model.eval()(images)
        largest.append(logits.abs().max().item() if logits.isfinite().all() else math.inf)
    assert max(largest) > 1e6


@pytest.mark.parametrize('form', ['patchwise', 'pairwise'])
def test_a_short_training_is_finite_in_evaluation(form):
    """AdamW with a high rate and small batches, some pictures of another contrast: it learns, finite at every epoch."""
    torch.manual_seed(0)
    model = SAN(form, depths=(1, 1, 1), widths=(32, 64, 96), kernel_sizes=(3, 5, 5), stem_width=16, num_classes=2)
    images = torch.randn(32, 3, 32, 32)
    labels = torch.arange(32) % 2
    images[labels == 1, 0] += 0.7
    images[::8] *= 5
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.05)
    for _ in range(5):
        model.train()
        for rows in torch.randperm(32).split(8):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
        with torch.no_grad():
            logits = model.eval()(images)
        assert logits.isfinite().all() and logits.abs().max() < 1e3
    assert (logits.argmax(1) == labels).float().mean() > 0.8
