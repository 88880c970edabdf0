"""Seeing attention: the weights are those of the definition, the roll-out is a product of matrices, figures are true.

Weights are recovered from what the operators do: values that are random in more channels than a footprint has
neighbours determine every weight. The roll-out's oracle builds each block and pool as a dense matrix, pixel by pixel.
"""
import concurrent.futures
import math
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import san_backbones  # noqa: F401, registers the models
from san_backbones import PairwiseAttention, PatchwiseAttention, fuse_for_inference, ops, visualize
from san_backbones.san import SAN
from tests import oracle

LAYERS = {'pairwise': PairwiseAttention, 'patchwise': PatchwiseAttention}
FORMS = ([('pairwise', relation, position) for relation in oracle.PAIRWISE_RELATIONS
          for position in ('relative', 'absolute', 'none')]
         + [('patchwise', relation, None) for relation in oracle.PATCHWISE_RELATIONS])


def shake(module, seed=0):
    """Random parameters and statistics of ordinary size, so that nothing is symmetric or zero by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if 'running_var' in name:
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype), alpha=0.3)
    return module


def make_layer(attention, relation, position, **options):
    if position is not None:
        options['position'] = position
    torch.manual_seed(0)
    return shake(LAYERS[attention](64, relation=relation, **options).double()).eval()


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def small(attention, **options):
    torch.manual_seed(0)
    defaults = dict(depths=(1, 2, 1), widths=(32, 64, 96), stem_width=16, kernel_sizes=(3, 5, 3), num_classes=2)
    return shake(SAN(attention, **{**defaults, **options})).eval()


# --- Weights ---------------------------------------------------------------------------------------------------------

def check_weights(layer, x):
    """The weights do to any values what the layer's operators do to them."""
    weights = visualize.footprint_weights(layer, x)
    k, groups = layer.kernel_size, layer.out_planes // layer.share_planes
    assert weights.shape == (len(x), x.shape[2] * x.shape[3], groups, k, k) and weights.dtype == x.dtype
    flat = weights.flatten(3).permute(0, 2, 3, 1).unflatten(3, x.shape[2:])
    with torch.no_grad():
        y = oracle.aggregate(flat, layer.value(x), k, layer.dilation)
        torch.testing.assert_close(y, layer(x), rtol=1e-9, atol=1e-9)
        value = draw(len(x), groups * (k * k + 3), *x.shape[2:])
        y = ops.footprint_attention(layer.query(x), layer.key(x), value, layer.place(x), layer.gamma(), layer.spec())
        torch.testing.assert_close(oracle.aggregate(flat, value, k, layer.dilation), y, rtol=1e-9, atol=1e-9)
    return weights


@pytest.mark.parametrize(('attention', 'relation', 'position', 'kernel_size', 'dilation', 'size'), [
    (*form, *shape) for form in FORMS for shape in ((3, 1, (6, 5)), (5, 2, (7, 9)), (7, 1, (2, 3)))
    if form[1] != 'clique' or shape[0] < 7])  # which has k^4 channels
def test_weights_are_those_of_the_layer(attention, relation, position, kernel_size, dilation, size):
    layer = make_layer(attention, relation, position, kernel_size=kernel_size, dilation=dilation)
    x = draw(2, 64, *size)
    weights = check_weights(layer, x)
    if attention == 'pairwise':
        torch.testing.assert_close(weights.sum((3, 4)), torch.ones_like(weights.sum((3, 4))))
    else:
        assert weights.min() < 0 < weights.max()
    pixels = [(0, 0), (size[0] - 1, 1), (1, size[1] - 1)]
    some = visualize.footprint_weights(layer, x, pixels)
    torch.testing.assert_close(some, weights[:, [row * size[1] + column for row, column in pixels]])


def test_fixed_position_steps():
    check_weights(make_layer('pairwise', 'subtraction', 'relative', position_ref_size=14), draw(1, 64, 5, 6))


@pytest.mark.parametrize('attention', LAYERS)
def test_batch_statistics(attention):
    layer = make_layer(attention, 'concatenation', None, kernel_size=3).train()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = draw(2, 64, 4, 5)
    weights = visualize.footprint_weights(layer, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    torch.testing.assert_close(weights, check_weights(layer, x))
    torch.testing.assert_close(visualize.footprint_weights(layer, x, [(3, 2)]), weights[:, [3 * 5 + 2]])
    assert not torch.allclose(weights, visualize.footprint_weights(layer.eval(), x))


def test_norms_over_whole_maps():
    layer = make_layer('patchwise', 'star', None, kernel_size=3,
                       norm_layer=lambda channels, **dd: nn.GroupNorm(1, channels, **dd))
    x = draw(1, 64, 4, 5)
    flat = visualize.footprint_weights(layer, x).flatten(3).permute(0, 2, 3, 1).unflatten(3, (4, 5))
    with torch.no_grad():
        torch.testing.assert_close(oracle.aggregate(flat, layer.value(x), 3, 1), layer(x))


def test_parts_of_many_pixels(monkeypatch):
    layer, x = make_layer('patchwise', 'concatenation', None), draw(1, 64, 6, 6)
    whole = visualize.footprint_weights(layer, x)
    monkeypatch.setattr('san_backbones.attention_maps.PIXELS_AT_ONCE', 7)
    torch.testing.assert_close(visualize.footprint_weights(layer, x), whole)
    model, images = small('patchwise'), torch.rand(1, 3, 24, 16)
    in_parts = visualize.attention_rollout(model, images, measure='contributions')
    monkeypatch.undo()
    torch.testing.assert_close(visualize.attention_rollout(model, images, measure='contributions'), in_parts)


def test_effective_size():
    even, one, two = torch.full((7, 7), -0.3), torch.zeros(7, 7), torch.zeros(7, 7)
    one[2, 3], two[0, 0], two[6, 6] = 5, 1, -1
    sizes = visualize.effective_size(torch.stack([even, one, two]))
    torch.testing.assert_close(sizes, torch.tensor([49., 1., 2.]))


# --- Finding the SAN -------------------------------------------------------------------------------------------------

class Wrapped(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Conv2d(96, 3, 1)

    def forward(self, x):
        raise AssertionError('only the SAN is to run')


def test_every_wrapper_has_the_same_weights():
    model, images = timm.create_model('test_san_patchwise', pretrained=True).eval(), torch.rand(2, 3, 48, 70)
    expected = visualize.attention_weights(model, images, 'stages.2.blocks.0', [(1, 3)])
    assert expected.shape == (2, 1, 2, 7, 7) and expected.dtype == torch.float32
    layer, caught = model.stages[2].blocks[0].attn, []
    handle = layer.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    model(images)
    handle.remove()
    torch.testing.assert_close(expected, visualize.footprint_weights(layer, caught[0], [(1, 3)]))
    rolled = visualize.attention_rollout(model, images, [(1, 3)], 'stages.2.blocks.0')

    options = dict(pretrained=True, features_only=True, out_indices=(1, 2))
    others = [timm.create_model('test_san_patchwise', feature_cls=kind, **options).eval()
              for kind in ('list', 'fx', 'hook', 'getter')]
    for other in (*others, Wrapped(model), fuse_for_inference(model)):
        assert list(visualize.attention_blocks(other))[:3] == [f'stages.{stage}.blocks.0' for stage in range(3)]
        torch.testing.assert_close(
            visualize.attention_weights(other, images, 'stages.2.blocks.0', [(1, 3)]), expected)
        torch.testing.assert_close(
            visualize.attention_rollout(other, images, [(1, 3)], 'stages.2.blocks.0'), rolled)
    with torch.no_grad():
        model(images)
    assert model.stages[2]._folded[0] is not None, 'no longer fused'
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_openmmlab_backbone():
    pytest.importorskip('mmengine', reason='needs the mm extra')
    from san_backbones.mm import SANBackbone
    backbone = SANBackbone(dict(attention='pairwise', depths=(1, 1), widths=(32, 64), stem_width=16,
                                kernel_sizes=7), out_indices=(1,))
    weights = visualize.attention_weights(Wrapped(backbone).eval(), torch.rand(1, 3, 32, 32), (1, 0), [(0, 7)])
    torch.testing.assert_close(weights.sum((3, 4)), torch.ones(1, 1, 2))


@pytest.mark.parametrize('block', ['stages.1.blocks.1', 'stages.1.blocks.1.attn', 'backbone.stages_1.blocks.1', '1.1',
                                   (1, 1), 2, -2, '-2'])
def test_names_of_a_block(block):
    model, images = small('patchwise'), torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(visualize.attention_weights(model, images, block),
                               visualize.attention_weights(model, images, 'stages.1.blocks.1'))


def test_training_mode_is_left_alone():
    model, images = small('pairwise').train(), torch.rand(2, 3, 16, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = visualize.attention_weights(model, images, -1)
    visualize.attention_rollout(model, images)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not torch.allclose(weights, visualize.attention_weights(model.eval(), images, -1))


@pytest.mark.parametrize(('call', 'message'), [
    (lambda model, x: visualize.attention_weights(model, x, 'stages.9.blocks.0'),
     r"no block 'stages.9.blocks.0'; the 4 blocks are stages.0.blocks.0, stages.1.blocks.0"),
    (lambda model, x: visualize.attention_weights(model, x, 4), 'no block 4'),
    (lambda model, x: visualize.attention_weights(model, x, 0, [(8, 0)]), r'8 rows and 8 columns.*got \(8, 0\)'),
    (lambda model, x: visualize.attention_weights(model, x, 0, [(0, -1)]), r'got \(0, -1\)'),
    (lambda model, x: visualize.attention_weights(model, x, 0, [(0.5, 0)]), r'got \(0.5, 0\)'),
    (lambda model, x: visualize.attention_weights(model, x, 0, []), 'got none'),
    (lambda model, x: visualize.footprint_weights(model, x), 'attention_weights'),
    (lambda model, x: visualize.attention_blocks(nn.Linear(1, 1)), 'no SAN in this Linear'),
    (lambda model, x: visualize.attention_blocks(nn.ModuleDict({'a': model, 'b': small('pairwise')})), "'a.', 'b.'"),
    (lambda model, x: visualize.attention_rollout(model, x, residual=2), 'from 0 to 1, got 2'),
    (lambda model, x: visualize.attention_rollout(model, x, measure='values'), "'contributions', got 'values'"),
    (lambda model, x: visualize.attention_rollout(model, x, to='stem'), "'finest', got 'stem'"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(small('patchwise'), torch.rand(1, 3, 16, 16))


# --- Roll-out --------------------------------------------------------------------------------------------------------

def matrix_of_block(block, x, residual, measure):
    """Row i: where what the block gives pixel i comes from, (HW, HW); pixel by pixel."""
    layer, (height, width) = block.attn, x.shape[2:]
    inner = block.act1(block.norm1(x))
    weights, value = visualize.footprint_weights(layer, inner)[0], layer.value(inner)[0]
    branch = block.conv(block.act2(block.norm2(layer(inner))))[0]
    rows = torch.zeros(height * width, height * width, dtype=torch.float64)
    half, groups = layer.kernel_size // 2, weights.shape[1]
    for y in range(height):
        for z in range(width):
            i = y * width + z
            for a in range(layer.kernel_size):
                for b in range(layer.kernel_size):
                    at = (oracle.reflect(y + (a - half) * layer.dilation, height),
                          oracle.reflect(z + (b - half) * layer.dilation, width))
                    for channel in range(groups if measure == 'weights' else layer.out_planes):
                        much = 1 if measure == 'weights' else value[:, at[0], at[1]][channel].abs()
                        rows[i, at[0] * width + at[1]] += much * weights[i, channel % groups, a, b].abs()
            rows[i] /= rows[i].sum()
            kept = residual
            if kept is None:
                kept = x[0, :, y, z].norm() / (x[0, :, y, z].norm() + branch[:, y, z].norm())
            rows[i] = (1 - kept) * rows[i] + kept * torch.eye(height * width, dtype=torch.float64)[i]
    return rows


def matrix_of_pool(x):
    height, width = x.shape[2:]
    rows = torch.zeros(height // 2, width // 2, height, width, dtype=torch.float64)
    for y in range(height // 2):
        for z in range(width // 2):
            for channel in x[0]:
                window = channel[2 * y:2 * y + 2, 2 * z:2 * z + 2]
                best = (window == window.max()).double()
                rows[y, z, 2 * y:2 * y + 2, 2 * z:2 * z + 2] += window.max() * best / best.sum()
            rows[y, z] /= rows[y, z].sum()
    return rows.flatten(2).flatten(0, 1)


@pytest.mark.parametrize(('attention', 'residual', 'measure', 'stride'), [
    ('pairwise', None, 'weights', 32), ('patchwise', None, 'contributions', 32), ('patchwise', 0.5, 'weights', 8)])
def test_rollout_is_the_product_of_matrices(attention, residual, measure, stride):
    model = small(attention, output_stride=stride, depths=(1, 1, 1), kernel_sizes=(3, 3, 5)).double()
    if stride == 8:
        model.stages[2].pool = nn.Identity()
        model.stages[2].blocks[0].attn.dilation = 2
    x = images = draw(1, 3, 18, 15)
    product = torch.eye(18 * 15, dtype=torch.float64)
    with torch.no_grad():
        x = model.stem.act(model.stem.norm(model.stem.conv(x)))
        for number, stage in enumerate(model.stages):
            pool = model.stem.pool if number == 0 else stage.pool
            if isinstance(pool, nn.MaxPool2d):
                product = matrix_of_pool(x) @ product
            x = stage.conv(pool(x))
            for block in stage.blocks:
                product = matrix_of_block(block, x, residual, measure) @ product
                x = block(x)
            x = stage.act(stage.norm(x))
    height, width = x.shape[2:]
    pixels = [(row, column) for row in range(height) for column in range(width)]
    rolled = visualize.attention_rollout(model, images, pixels, residual=residual, measure=measure)
    assert rolled.shape == (1, height * width, 18, 15) and rolled.dtype == torch.float32
    torch.testing.assert_close(rolled[0].flatten(1).double(), product, rtol=1e-4, atol=1e-6)
    mean = visualize.attention_rollout(model, images, residual=residual, measure=measure)
    torch.testing.assert_close(mean[0, 0].flatten().double(), product.mean(0), rtol=1e-4, atol=1e-6)
    finest = visualize.attention_rollout(model, images, residual=residual, measure=measure, to='finest')
    assert finest.shape == (1, 1, 9, 7)
    torch.testing.assert_close(finest.sum(), torch.tensor(1.))


# --- Figures ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def picture():
    """Left half dark, right half light, 60 wide and 48 high."""
    array = np.full((48, 60, 3), 40, np.uint8)
    array[:, 30:] = (220, 200, 180)
    return array


def figures(model, picture):
    return [visualize.footprint_figure(model, picture, pixels=[(3, 4), (59, 47)]),
            visualize.footprint_figure(model, picture, '1.0', grid=(2, 3), departures=True),
            visualize.rollout_figure(model, picture, [(30, 20)]),
            visualize.rollout_figure(model, picture, grid=2, block=0),
            visualize.feature_figure(model, picture, channels=2)]


@pytest.mark.parametrize('attention', LAYERS)
def test_figures_are_drawn_without_pyplot(attention, picture, tmp_path, monkeypatch):
    pytest.importorskip('matplotlib', reason='needs the visualize extra')
    monkeypatch.setitem(sys.modules, 'matplotlib.pyplot', None)  # importing it is an error now
    model = small(attention)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        drawn = pool.submit(figures, model, picture).result()
    for number, figure in enumerate(drawn):
        path = tmp_path / f'{number}.png'
        figure.savefig(path, dpi=30)
        assert np.asarray(Image.open(path)).std() > 5


@pytest.mark.parametrize('draw_figure', [
    lambda model, p: visualize.footprint_figure(model, p, channel=0), visualize.rollout_figure,
    lambda model, p: visualize.feature_figure(model, p, channels=0)])
def test_figures_are_of_eval_mode(draw_figure, picture):
    """Whatever mode a model is in, and it is left in that mode: timm makes models in training mode."""
    pytest.importorskip('matplotlib', reason='needs the visualize extra')
    model = small('patchwise').train()
    model.stages[0].eval()  # frozen
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    drawn = draw_figure(model, picture)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for axes, expected in zip(drawn.axes, draw_figure(model.eval(), picture).axes, strict=True):
        for image, other in zip(axes.images, expected.images, strict=True):
            np.testing.assert_array_equal(np.asarray(image.get_array()), np.asarray(other.get_array()))


def patches_of(axes):
    return [patch.get_bbox().extents.tolist() for patch in axes.patches if hasattr(patch, 'get_bbox')]


def axes_of(figure, title):
    found = [axes for axes in figure.axes if axes.get_title() == title]
    assert found, [axes.get_title() for axes in figure.axes]
    return found[0]


def test_footprints_lie_where_they_are(picture):
    """60 x 48 shown at twice the size: stride 4 is 2 picture pixels; (x, y) = (31, 20) is in column 15, row 10."""
    pytest.importorskip('matplotlib', reason='needs the visualize extra')
    model = small('patchwise')
    figure = visualize.footprint_figure(model, picture, '1.1', pixels=[(31, 20)], size=96)
    axes = axes_of(figure, 'weights on the pixels that they weigh,\nmean over the channels')
    cell = np.array([15, 10, 16, 11]) * 2 - 0.5  # left, top, right, bottom, edges of pixels being at halves
    assert patches_of(axes) == [(cell + [-4, -4, 4, 4]).tolist()]  # 5 x 5: two neighbours more on each side
    shown = visualize.prepare_picture(model, visualize.find_network(model), picture, 96)
    weights = visualize.attention_weights(model, shown.images, '1.1', [(10, 15)])[0, 0]
    for index in range(2):
        shown, = axes_of(figure, f'channel {index}').images
        np.testing.assert_allclose(shown.get_array(), weights[index], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(axes_of(figure, 'mean').images[0].get_array(), weights.mean(0), rtol=1e-4,
                               atol=1e-6)
    assert axes_of(figure, 'channel 0').images[0].get_clim()[0] == -axes_of(figure, 'channel 0').images[0].get_clim()[1]
    overlay = axes.images[1]
    assert overlay.get_extent() == [-0.5, 59.5, 47.5, -0.5] and overlay.get_array().shape == (24, 30, 4)
    covered = np.argwhere(overlay.get_array()[..., 3] > 0)
    assert covered.min(0).tolist() == [8, 13] and covered.max(0).tolist() == [12, 17]
    covers, = axes_of(figure, 'what it covers').images  # 5 x 5 cells of 4 x 4: the edge at x = 30 is after two of them
    dark = np.asarray(covers.get_array())[..., 0].mean(0) < 130
    assert covers.get_array().shape == (20, 20, 3) and dark.tolist() == [True] * 8 + [False] * 12


def title_of(figure):
    return figure.get_suptitle()


DRAWINGS = [lambda model, p: visualize.footprint_figure(model, p), visualize.rollout_figure, visualize.feature_figure,
            lambda model, p: visualize.footprint_figure(model, p, grid=2),
            lambda model, p: visualize.rollout_figure(model, p, grid=2)]


@pytest.mark.parametrize('draw_figure', DRAWINGS)
def test_an_untrained_network_is_marked_in_the_picture(draw_figure, picture):
    """In the title and over every panel; a network whose norms have seen pictures is not."""
    pytest.importorskip('matplotlib', reason='needs the visualize extra')
    model = timm.create_model('test_san_patchwise')
    figure = draw_figure(model, picture)
    assert 'UNTRAINED' in title_of(figure)
    panels = [axes for axes in figure.axes if axes.images]
    assert panels and all('untrained' in [text.get_text() for text in axes.texts] for axes in panels)
    model.train()(torch.rand(2, 3, 96, 96))
    figure = draw_figure(model.eval(), picture)
    assert 'UNTRAINED' not in title_of(figure)
    assert not [text for axes in figure.axes for text in axes.texts if text.get_text() == 'untrained']


def test_labels_say_what_they_count(picture):
    """Neighbours of how many, and what weights sum to; a colour bar for each scale says where the scale is used."""
    pytest.importorskip('matplotlib', reason='needs the visualize extra')
    model = small('patchwise')
    figure = visualize.footprint_figure(model, picture, '1.0', pixels=[(31, 20)], channel=1)
    image = visualize.prepare_picture(model, visualize.find_network(model), picture, None).images
    weights = visualize.attention_weights(model, image, '1.0', [(5, 7)])[0, 0, 1]
    assert axes_of(figure, 'channel 1').get_xlabel() == (
        f'{visualize.effective_size(weights):.0f} of 25 pixels count\nweights sum to {weights.sum():+.2f}')
    labels = [axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes]
    assert sum('on the picture and in' in label for label in labels) == 1
    assert sum('in single channels' in label for label in labels) == 1


def test_footprints_of_a_grid_are_square(picture):
    pytest.importorskip('matplotlib', reason='needs the visualize extra')
    figure = visualize.footprint_figure(small('patchwise'), picture, grid=(2, 5))
    axes = axes_of(figure, "the same, each pixel's footprint for itself")
    assert axes.get_aspect() == 1 and axes.images[0].get_array().shape == (2 * 6 - 1, 5 * 6 - 1)


def test_features_show_the_picture_once(picture):
    pytest.importorskip('matplotlib', reason='needs the visualize extra')
    figure = visualize.feature_figure(small('patchwise'), picture, channels=1)
    same = [axes for axes in figure.axes for image in axes.images
            if image.get_array().shape == picture.shape and (image.get_array() == picture).all()]
    assert len(same) == 1


def test_how_local_it_is(picture):
    """The part of a roll-out within a distance, counted pixel by pixel; and a curve for each stage."""
    pytest.importorskip('matplotlib', reason='needs the visualize extra')
    model = small('patchwise')
    net = visualize.find_network(model)
    shown, block = visualize.prepare_picture(model, net, picture, 96), net.blocks['stages.1.blocks.0']
    mass = visualize.attention_rollout(model.eval(), shown.images, [(3, 7)], 'stages.1.blocks.0')[0, 0]
    radii = np.array([1.3, 4.2, 9.8, 100.])
    found = visualize._within(mass, shown, block, (3, 7), radii)
    expected = np.zeros(4)
    for y in range(96):
        for x in range(120):  # the picture has 48 x 60 pixels, half as many
            distance = math.hypot((y + .5 - 3.5 * 4) / 2, (x + .5 - 7.5 * 4) / 2)
            expected += mass[y, x].item() * (distance <= radii)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    figure = visualize.rollout_figure(model, picture)
    curves = axes_of(figure, 'how local is it? The mean of pixels all over the picture').lines
    curves = [line.get_ydata() for line in curves if len(line.get_ydata()) > 2]
    assert len(curves) == len(net.stages)
    assert all((np.diff(curve) >= -1e-3).all() and curve[-1] == pytest.approx(100, abs=0.1) for curve in curves)


def test_what_a_footprint_covers():
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    model = small('patchwise')
    net = visualize.find_network(model)
    given, block = visualize.prepare_picture(model, net, noise, None), net.blocks['stages.1.blocks.0']
    np.testing.assert_array_equal(visualize.make_mosaic(given, block, (4, 5)), noise[8:28, 12:32])
    corner = visualize.make_mosaic(given, block, (0, 0))  # two rows and columns of cells are mirrored
    np.testing.assert_array_equal(corner[8:, 8:], noise[:12, :12])
    np.testing.assert_array_equal(corner[:4, 8:], noise[8:12, :12])


def test_a_pairwise_footprint_is_shown_beside_average_pooling(picture):
    pytest.importorskip('matplotlib', reason='needs the visualize extra')
    figure = visualize.footprint_figure(small('pairwise'), picture, -1, channel=1)
    tile = np.asarray(axes_of(figure, 'channel 1').images[0].get_array())
    np.testing.assert_allclose(tile.mean(), 1, rtol=1e-5)
    assert not [axes for axes in figure.axes if axes.get_title() == 'channel 0']


def test_mirrored_neighbours_count_where_they_come_from():
    block = visualize.find_network(small('patchwise')).blocks['stages.1.blocks.0']
    spread = visualize._spread(torch.arange(25.).view(5, 5), block, (0, 3), 4, 4)
    expected = np.full((4, 4), np.nan)
    for a in range(5):
        for b in range(5):
            at = oracle.reflect(a - 2, 4), oracle.reflect(3 + b - 2, 4)
            expected[at] = np.nan_to_num(expected[at]) + 5 * a + b
    np.testing.assert_array_equal(spread, expected)


def test_rollout_frames_hold_all_mass(picture):
    """No mass lies beyond the dashed frame, and some on its edge: it is the reach of the footprints, exactly."""
    model = small('pairwise', kernel_sizes=3, depths=(1, 1, 0))
    net = visualize.find_network(model)
    shown = visualize.prepare_picture(model, net, picture, None)
    last = net.blocks['stages.1.blocks.0']
    mass = visualize.attention_rollout(model, shown.images, [(5, 6)], residual=0.5)[0, 0]
    reach = visualize._reach(net, last)
    rows, columns = (mass > 0).nonzero().T
    for places, first in ((rows, 5 * 4), (columns, 6 * 4)):
        assert first - reach <= places.min() <= first - reach + 1
        assert first + 3 + reach - 1 <= places.max() <= first + 3 + reach
    away = (((torch.arange(48) + 0.5 - 22)[:, None].square() + (torch.arange(60) + 0.5 - 26).square()).sqrt())
    radius = visualize.half_mass_radius(mass, shown, last, (5, 6))
    assert mass[away < radius - 1e-4].sum() <= 0.5 + 1e-5 <= mass[away <= radius + 1e-4].sum() + 2e-5


def test_channels_that_differ_most():
    weights = torch.zeros(1, 4, 3, 3)
    weights[:, 0] = weights[:, 1] = 1.
    weights[:, 2, 0, 0], weights[:, 3, 2, 2] = 1, 1
    assert visualize._most_different(weights, 3)[-2:] == [2, 3]
    assert visualize._most_different(weights, 9) == [0, 1, 2, 3]


def test_main_components():
    features = torch.zeros(6, 8, 8)
    features[1, :4], features[2, :, :4], features[5] = 3, 1, 7
    colours, held = visualize.principal_components(features)
    assert held == pytest.approx(1) and colours.shape == (8, 8, 3)
    assert len(colours.flatten(0, 1)[:, :2].round(decimals=3).unique(dim=0)) == 4
    assert visualize.principal_components(torch.rand(4, 1, 1))[0].shape == (1, 1, 3)


@pytest.mark.parametrize(('call', 'message'), [
    (lambda model, p: visualize.footprint_figure(model, p, pixels=[(60, 0)]), r'\(60, 0\) is not.*0 to 59.*0 to 47'),
    (lambda model, p: visualize.footprint_figure(model, p, pixels=[(0, 0)], grid=2), 'not both'),
    (lambda model, p: visualize.footprint_figure(model, p, pixels=[]), 'at least one'),
    (lambda model, p: visualize.rollout_figure(model, p, grid=(0, 2)), r'got \(0, 2\)'),
    (lambda model, p: visualize.footprint_figure(model, p, channel=3, block=-1), r'0 to 2, or several of them, got 3'),
    (lambda model, p: visualize.footprint_figure(model, p, block='x'), "no block 'x'"),
    (lambda model, p: visualize.footprint_figure(nn.ReLU(), p), 'no SAN in this ReLU'),
    (lambda model, p: visualize.feature_figure(model, p.astype(np.float32)), r'float32 \[48, 60, 3\]'),
    (lambda model, p: visualize.feature_figure(model, p[..., 0]), r'uint8 \[48, 60\]'),
    (lambda model, p: visualize.feature_figure(model, p, size=0), 'got 0'),
    (lambda model, p: visualize.feature_figure(small('patchwise', in_chans=4), p), '4 channels'),
])
def test_errors_of_figures(call, message, picture):
    pytest.importorskip('matplotlib', reason='needs the visualize extra')
    model = small('patchwise', widths=(32, 64, 96))
    with pytest.raises(ValueError, match=message):
        call(model, picture)


def test_without_matplotlib(picture, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    for figure in (visualize.footprint_figure, visualize.rollout_figure, visualize.feature_figure):
        with pytest.raises(ImportError, match=r"pip install 'san-backbones\[visualize\]'"):
            figure(small('patchwise'), picture)


# --- Pictures as the model takes them --------------------------------------------------------------------------------

def shown(model, image, size=None):
    return visualize.prepare_picture(model, visualize.find_network(model), image, size)


def test_preprocessing(picture, tmp_path):
    model = timm.create_model('test_san_patchwise', pretrained=True)
    given = shown(model, picture)
    assert given.images.shape == (1, 3, 96, 120) and given.original.shape == (48, 60, 3)  # crop_pct is 1
    config = timm.data.resolve_model_data_config(model)
    expected = (torch.tensor([220, 200, 180]) / 255 - torch.tensor(config['mean'])) / torch.tensor(config['std'])
    torch.testing.assert_close(given.images[0, :, 50, 119], expected)
    pyramid = timm.create_model('test_san_pairwise', features_only=True)
    assert shown(pyramid, picture).images.shape[2] == 183  # 160 / 0.875
    Image.fromarray(picture).save(tmp_path / 'a.png')
    for image in (tmp_path / 'a.png', str(tmp_path / 'a.png'), Image.fromarray(picture)):
        assert torch.equal(shown(model, image).images, given.images)
    grey = shown(timm.create_model('test_san_patchwise', in_chans=1), picture, 48).images
    torch.testing.assert_close(grey[0, 0, 0, 59], expected.mean())
    assert shown(model.bfloat16(), picture, 64).images.dtype == torch.bfloat16


def test_pictures_of_16_bits_are_refused(tmp_path):
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(tmp_path / 'deep.png')
    for picture in (tmp_path / 'deep.png', Image.open(tmp_path / 'deep.png')):
        with pytest.raises(ValueError, match='more than 8 bits'):
            visualize.footprint_figure(small('patchwise'), picture)


def test_turned_photographs_stand_upright(picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: what is stored as left is up
    Image.fromarray(picture).save(tmp_path / 'a.jpg', exif=exif)
    upright = shown(small('patchwise'), tmp_path / 'a.jpg')
    assert upright.original.shape == (60, 48, 3)
    assert upright.original[:28].mean() < 60 and upright.original[32:].mean() > 180


@pytest.mark.parametrize('name', ['_channel_conversion', 'channel_conversion'])
@pytest.mark.parametrize('turned', [True, False])
def test_openmmlab_preprocessing(picture, name, turned):
    class Preprocessor(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('mean', torch.tensor([10., 20., 30.]).view(3, 1, 1))
            self.register_buffer('std', torch.tensor([1., 2., 4.]).view(3, 1, 1))
            setattr(self, name, turned)

    model = Wrapped(small('patchwise'))
    model.data_preprocessor = Preprocessor()
    light = (220, 200, 180) if turned else (180, 200, 220)  # read as BGR; bgr_to_rgb turns it into RGB
    expected = (torch.tensor(light) - torch.tensor([10., 20., 30.])) / torch.tensor([1., 2., 4.])
    torch.testing.assert_close(shown(model, picture).images[0, :, 0, 59], expected, rtol=1e-4, atol=1e-4)


def test_mmengine_preprocessor(picture):
    pytest.importorskip('mmengine', reason='needs the mm extra')
    from mmengine.model import ImgDataPreprocessor
    model = Wrapped(small('patchwise'))
    for turned in (True, False):
        model.data_preprocessor = ImgDataPreprocessor(mean=[9, 99, 50], std=[50, 60, 70], bgr_to_rgb=turned)
        read = torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1)  # as mmcv reads: BGR
        expected = model.data_preprocessor(dict(inputs=[read]))['inputs'][0]
        torch.testing.assert_close(shown(model, picture).images[0], expected, rtol=1e-4, atol=1e-4)


def test_last_pixels_that_pooling_drops(picture):
    """48 x 60 at stride 8 is a map of 6 x 7: the four last columns belong to the last pixel."""
    assert shown(small('patchwise'), picture).on_map((59, 47), 8) == (5, 6)
