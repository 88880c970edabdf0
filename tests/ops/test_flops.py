"""What `torch.utils.flop_counter` counts: the formula from the layers, and the definition's matrix products."""
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from san_backbones import SAN, PairwiseAttention, PatchwiseAttention, ops
from san_backbones.count import count_multiply_adds
from san_backbones.ops import native, relations

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f'no compiled loops: {native.unavailable()}')
FORMS = [(cls, relation) for cls in (PairwiseAttention, PatchwiseAttention) for relation in cls.relations
         if 'native' in relations.find(cls.pairwise, relation).backends]


def _count(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops(), {str(op): n for op, n in counter.get_flop_counts()['Global'].items()}


def _mapped_coordinates(model, size):
    """Multiply-adds of the position layers, which are additions and products of single numbers."""
    pixels = [(size[0] >> i + 1) * (size[1] >> i + 1) for i in range(len(model.stages))]
    return sum(4 * pixels[i] for i, stage in enumerate(model.stages) for block in stage.blocks
               if block.attn.position is not None)


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('name, size', [
    ('san10_pairwise', (224, 224)), ('san15_patchwise', (224, 224)), ('test_san_pairwise', (99, 70))])
def test_inference_is_what_is_counted_by_formula(name, size, fused):
    model = timm.create_model(name).eval()
    if fused:
        model.fuse_for_inference()
    with torch.no_grad():
        total, _ = _count(lambda: model(torch.randn(1, 3, *size)))
    assert total == 2 * (count_multiply_adds(model, size) - _mapped_coordinates(model, size))


@pytest.mark.parametrize('cls, relation', FORMS)
def test_every_relation(cls, relation):
    model = SAN('pairwise' if cls.pairwise else 'patchwise', relation, depths=(1, 1), widths=(32, 96),
                kernel_sizes=(3, 5), stem_width=16, num_classes=7).eval()
    with torch.no_grad():
        total, _ = _count(lambda: model(torch.randn(3, 3, 20, 16)))
    assert total == 3 * 2 * (count_multiply_adds(model, (20, 16)) - _mapped_coordinates(model, (20, 16)))


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('cls, relation', FORMS)
def test_training_steps(cls, relation, training):
    """Those of the definition, plus what it does as products of single numbers and what is computed again."""
    if training and (cls.pairwise, relation) not in ops.statistics.SUPPORTED:
        pytest.skip('by tiles')
    layer = cls(96, kernel_size=3, relation=relation).train(training)
    x, pixels, area = torch.randn(2, 96, 5, 4, requires_grad=True), 2 * 5 * 4, 9

    def step():
        layer(x).sum().backward()

    def by_definition():
        with ops.use_backend('reference'):
            step()

    vectors = pixels * (area if layer.pairwise else 1)
    multiplied = relations.find(layer.pairwise, relation).operation == 'multiply'
    products = 2 * pixels * area * layer.rel_planes if multiplied else 0
    hidden = 2 * vectors * layer.weight_mlp.fc1.weight.numel() + products
    weights = 2 * vectors * layer.weight_mlp.fc2.weight.numel()
    weighted_sum = 2 * pixels * area * layer.out_planes
    _, operators = _count(step)
    if not layer.pairwise:
        assert {name: n for name, n in operators.items() if 'hidden' in name} == {
            'san_backbones.hidden': hidden, 'san_backbones.hidden_backward': 2 * hidden + products,
            'san_backbones.attend_hidden': weights + weighted_sum,
            'san_backbones.attend_hidden_backward': 3 * weights + 2 * weighted_sum}
        more = weights + 3 * weighted_sum + 4 * products
        assert training or sum(operators.values()) == _count(by_definition)[0] + more
        return
    assert operators['san_backbones.attend'] == hidden + weights + weighted_sum
    assert operators['san_backbones.attend_backward'] == 3 * (hidden + weights) + 2 * weighted_sum
    if training:
        assert operators['san_backbones.hidden_sums'] == hidden
        assert operators['san_backbones.hidden_sums_backward'] == 3 * hidden
    else:
        again = hidden + weights
        assert sum(operators.values()) == _count(by_definition)[0] + again + 3 * weighted_sum + 3 * products


@pytest.mark.parametrize('of_image', [False, True])
def test_stem(of_image):
    model = timm.create_model('test_san_pairwise')
    image = torch.randn(2, 3, 9, 6, requires_grad=of_image)
    _, operators = _count(lambda: model.stem(image).sum().backward())
    once = 2 * 2 * 9 * 6 * 3 * 16
    assert operators['san_backbones.stem'] == once
    assert operators['san_backbones.stem_backward'] == (3 if of_image else 2) * once
