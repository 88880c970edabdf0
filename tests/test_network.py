"""The package against the oracle: every relation, layer and model means what the paper says (CVPR 2020).

Layers are compared in float64 on every operator path of this machine, the six models with checkpoints in the authors'
format.  A relative error is the norm of the difference over the norm of the expected tensor.
"""
import warnings
from functools import cache

import pytest
import timm
import torch
from torch import nn

import san_backbones
from san_backbones.attention import PairwiseAttention, PatchwiseAttention
from san_backbones.ops import use_backend
from san_backbones.san import SAN, checkpoint_filter_fn
from tests import oracle

BACKENDS = ('reference', 'tiled')  # those that compute in float64 and train; others have tests of their own
LAYERS = {'pairwise': PairwiseAttention, 'patchwise': PatchwiseAttention}
RELATIONS = ([('pairwise', name) for name in oracle.PAIRWISE_RELATIONS]
             + [('patchwise', name) for name in oracle.PATCHWISE_RELATIONS])
FORMS = ([('pairwise', relation, position) for relation in oracle.PAIRWISE_RELATIONS
          for position in ('relative', 'absolute', 'none')]
         + [('patchwise', relation, 'none') for relation in oracle.PATCHWISE_RELATIONS])
RELEASED_LAYER_NAMES = {
    'query': 'conv1', 'key': 'conv2', 'value': 'conv3', 'position': 'conv_p', 'weight_mlp.norm1': 'conv_w.0',
    'weight_mlp.fc1': 'conv_w.2', 'weight_mlp.norm2': 'conv_w.3', 'weight_mlp.fc2': 'conv_w.5',
}
DIM = 64
NUM_CLASSES = 10


# --- Comparing -------------------------------------------------------------------------------------------------------

def relative_error(actual: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of what is expected, or over ``floor`` if that is larger."""
    assert actual.shape == expected.shape, f'{tuple(actual.shape)} instead of {tuple(expected.shape)}'
    error = (actual.detach().double() - expected.double()).norm()
    return (error / max(expected.norm().item(), floor, 1e-300)).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    error = relative_error(actual, expected)
    assert error < tolerance, f'{what}: relative error {error:.2e}, allowed {tolerance:.0e}'


def assert_all_close(actual: dict, expected: dict, tolerance: float, small: float = 1e-4) -> None:
    """Compare tensors by name, one that is small among the others on the scale of ``small`` times the largest.

    Some gradients are zero in exact arithmetic, those of a bias before a norm or of the last bias before the softmax:
    the oracle's are then mere rounding, and the package's are compared on the scale of the largest.
    """
    assert set(actual) == set(expected)
    largest = max(tensor.norm().item() for tensor in expected.values())

    def error(name: str) -> float:
        zero = expected[name].norm().item() < 1e-11 * largest
        return relative_error(actual[name], expected[name], floor=largest if zero else small * largest)

    errors = {name: error(name) for name in expected}
    wrong = {name: f'{error:.2e}' for name, error in errors.items() if not error < tolerance}
    assert not wrong, f'relative errors above {tolerance:.0e}: {wrong}'


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def trainable(state: oracle.State) -> oracle.State:
    """A copy of a state whose parameters ask for gradients."""
    return {name: tensor.clone().requires_grad_(oracle.is_parameter(name)) for name, tensor in state.items()}


def gradients(state: oracle.State) -> dict[str, torch.Tensor]:
    return {name: tensor.grad for name, tensor in state.items() if oracle.is_parameter(name)}


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in module.named_buffers() if 'running' in name}


# --- One attention layer ---------------------------------------------------------------------------------------------

def released_name(name: str) -> str:
    module, entry = name.rsplit('.', 1)
    return f'{RELEASED_LAYER_NAMES[module]}.{entry}'


@cache
def layer_case(attention: str, relation: str, position: str, kernel_size: int, dilation: int, size: tuple[int, int],
               training: bool, reference=None, dim: int = DIM):
    """The oracle's answer: the parameters, the input, the output, running statistics and all gradients."""
    spec = oracle.Spec(attention=attention, relation=relation, position=position)
    params = oracle.random_tensors(oracle.attention_shapes(spec, dim, kernel_size), seed=kernel_size)
    leaves = trainable(params)
    x = draw(2, dim, *size, seed=1).requires_grad_()
    y, running = oracle.attention(x, leaves, attention, relation, position, reference, kernel_size, dilation,
                                  training=training)
    y.backward(draw(*y.shape, seed=2))
    return dict(params=params, x=x.detach(), y=y.detach(), running=running,
                grads={**gradients(leaves), 'input': x.grad})


def make_layer(case: dict, attention: str, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    layer = LAYERS[attention](case['x'].shape[1], **options).to(dtype)
    layer.load_state_dict({name: case['params'][released_name(name)] for name in layer.state_dict()}, strict=True)
    assert {released_name(name) for name in layer.state_dict()} == set(case['params'])
    return layer


def run_layer(layer: nn.Module, case: dict, training: bool):
    """Output and gradients of the package's layer, by released names."""
    dtype = layer.query.weight.dtype
    x = case['x'].to(dtype, copy=True).requires_grad_()
    y = layer.train(training)(x)
    y.backward(draw(*y.shape, seed=2, dtype=dtype))
    grads = {released_name(name): parameter.grad for name, parameter in layer.named_parameters()}
    return y, {**grads, 'input': x.grad}


def check_layer(backend: str, attention: str, relation: str, position: str, kernel_size: int, dilation: int,
                size: tuple[int, int], training: bool, reference=None, dim=DIM, dtype=torch.float64, tolerance=1e-9):
    case = layer_case(attention, relation, position, kernel_size, dilation, size, training, reference, dim)
    options = dict(relation=relation, kernel_size=kernel_size, dilation=dilation)
    if attention == 'pairwise':
        options.update(position=position, position_ref_size=reference)
    layer = make_layer(case, attention, dtype, **options)
    before = {name: tensor.clone() for name, tensor in buffers(layer).items()}
    with use_backend(backend):
        y, grads = run_layer(layer, case, training)
    assert_close(y, case['y'], tolerance, 'output')
    assert_all_close(grads, case['grads'], tolerance)
    running = {released_name(name): tensor for name, tensor in buffers(layer).items()}
    expected = case['running'] or {released_name(name): tensor for name, tensor in before.items()}
    assert_all_close(running, expected, tolerance)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('size', [(1, 1), (1, 5), (2, 3), (6, 7)], ids=lambda size: f'{size[0]}x{size[1]}')
@pytest.mark.parametrize('dilation', [1, 2])
@pytest.mark.parametrize('kernel_size', [3, 5, 7])
@pytest.mark.parametrize('attention, relation, position', FORMS)
@pytest.mark.parametrize('backend', BACKENDS)
def test_layer(backend, attention, relation, position, kernel_size, dilation, size, training):
    """Output, running statistics and all gradients, for maps down to one pixel (eqs. 2-4)."""
    check_layer(backend, attention, relation, position, kernel_size, dilation, size, training)


@pytest.mark.parametrize('attention, relation', RELATIONS)
@pytest.mark.parametrize('backend', BACKENDS)
def test_layer_of_one_pixel_footprint(backend, attention, relation):
    position = 'relative' if attention == 'pairwise' else 'none'
    check_layer(backend, attention, relation, position, 1, 1, (3, 4), training=True)


@pytest.mark.parametrize('kernel_size', [9, 11])
@pytest.mark.parametrize('attention, relation', [('pairwise', 'subtraction'), ('patchwise', 'concatenation')])
@pytest.mark.parametrize('backend', BACKENDS)
def test_layer_with_the_papers_large_footprints(backend, attention, relation, kernel_size):
    position = 'relative' if attention == 'pairwise' else 'none'
    check_layer(backend, attention, relation, position, kernel_size, 1, (5, 9), training=True)


@pytest.mark.parametrize('dilation', [1, 2])
@pytest.mark.parametrize('position', ['relative', 'absolute'])
@pytest.mark.parametrize('size', [(1, 1), (2, 3), (6, 7)], ids=lambda size: f'{size[0]}x{size[1]}')
@pytest.mark.parametrize('backend', BACKENDS)
def test_layer_with_positions_of_a_reference_map(backend, size, position, dilation):
    check_layer(backend, 'pairwise', 'subtraction', position, 5, dilation, size, training=True, reference=14)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('attention, relation', [('pairwise', 'subtraction'), ('patchwise', 'concatenation')])
@pytest.mark.parametrize('backend', BACKENDS)
def test_layer_in_single_precision(backend, attention, relation, training):
    """The released layer of the 256-channel stage; all gradients too."""
    position = 'relative' if attention == 'pairwise' else 'none'
    check_layer(backend, attention, relation, position, 7, 1, (14, 13), training, dim=256, dtype=torch.float32,
                tolerance=1e-4)


@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
@pytest.mark.parametrize('backend', BACKENDS)
def test_layer_gradient_is_its_own_derivative(backend, attention):
    """Finite differences, through the batch statistics as well."""
    layer = LAYERS[attention](32, kernel_size=3).double().train()
    x = draw(2, 32, 2, 3, seed=3).requires_grad_()
    with use_backend(backend):
        assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
@pytest.mark.parametrize('backend', BACKENDS)
def test_layer_memory_format_does_not_matter(backend, attention):
    layer = LAYERS[attention](DIM, kernel_size=5).double().eval()
    x = draw(2, DIM, 6, 5, seed=4)
    with use_backend(backend):
        assert_close(layer(x.contiguous(memory_format=torch.channels_last)), layer(x), 1e-12, 'output')


def test_parameters_bear_the_documented_names():
    gamma = ['weight_mlp.norm1', 'weight_mlp.fc1', 'weight_mlp.norm2', 'weight_mlp.fc2']

    def owners(layer):
        return {name.rsplit('.', 1)[0] for name, _ in layer.named_parameters()}

    assert owners(PairwiseAttention(DIM)) == {'query', 'key', 'value', 'position', *gamma}
    assert owners(PairwiseAttention(DIM, position='none')) == {'query', 'key', 'value', *gamma}
    assert owners(PatchwiseAttention(DIM)) == {'query', 'key', 'value', *gamma}
    children = [name for name, _ in PairwiseAttention(DIM).weight_mlp.named_children()]
    assert children == ['norm1', 'act1', 'fc1', 'norm2', 'act2', 'fc2']


# --- The six released models -----------------------------------------------------------------------------------------

@pytest.fixture(scope='module', params=list(oracle.MODELS))
def released(request):
    """A checkpoint of one model with the oracle's eval and train results and the train-mode gradients."""
    return released_case(request.param)


def released_case(name: str) -> dict:
    structure = oracle.MODELS[name].structure()
    state = oracle.random_state(name, seed=5)
    image = draw(2, 3, 96, 64, seed=6)
    evaluated = oracle.network(image, state, **structure)
    leaves = trainable(state)
    trained = oracle.network(image, leaves, training=True, **structure)
    trained['logits'].backward(draw(2, 1000, seed=7))
    return dict(name=name, state=state, image=image, eval=evaluated, train=trained, grads=gradients(leaves))


def released_model(case: dict, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = timm.create_model(case['name']).to(dtype)
    checkpoint = checkpoint_filter_fn(oracle.released_checkpoint(case['state']), model)
    model.load_state_dict(checkpoint, strict=True)
    return model


def own_names(tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors by the package's names, given by the released ones."""
    return checkpoint_filter_fn(dict(tensors), model)


def test_released_logits_and_features(released):
    model = released_model(released).eval()
    image = released['image'].float()
    with torch.no_grad():
        assert_close(model(image), released['eval']['logits'], 1e-4, 'logits')
        features = model.forward_intermediates(image, intermediates_only=True)
        last = model.forward_features(image)
    assert len(features) == 5
    for stage, (feature, expected) in enumerate(zip(features, released['eval']['features'])):
        assert_close(feature, expected, 1e-4, f'stage {stage}')
    assert_close(last, released['eval']['features'][-1], 1e-4, 'forward_features')


def test_released_training_in_single_precision(released):
    """Train-mode logits and every running buffer.

    A ReLU or a maximum that rounding tips over moves gradients by more than rounding does, those of a few parameters by
    a lot: the bound here is on all gradients together, and a loose one on each; :func:`test_released_gradients` has
    the strict one.
    """
    model = released_model(released).train()
    logits = model(released['image'].float())
    logits.backward(draw(2, 1000, seed=7, dtype=torch.float32))
    assert_close(logits, released['train']['logits'], 1e-4, 'logits')
    for name, expected in own_names(released['train']['running'], model).items():
        assert_close(buffers(model)[name], expected, 1e-4, name)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = own_names(released['grads'], model)
    together = [torch.cat([tensors[name].double().flatten() for name in expected]) for tensors in (grads, expected)]
    assert_close(*together, 0.05, 'all gradients')
    assert_all_close(grads, expected, tolerance=0.4)


def test_released_gradients(released):
    """Every parameter's gradient in training, and the buffers, in float64."""
    model = released_model(released, torch.float64).train()
    model(released['image']).backward(draw(2, 1000, seed=7))
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_all_close(grads, own_names(released['grads'], model), tolerance=1e-8, small=1e-6)
    assert_all_close(buffers(model), own_names(released['train']['running'], model), tolerance=1e-10, small=0)
    counts = [tensor for name, tensor in model.named_buffers() if name.endswith('num_batches_tracked')]
    assert {int(count) for count in counts} == {1}


@pytest.mark.parametrize('wrap', [False, True])
@pytest.mark.parametrize('module_prefix', [False, True])
@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
def test_checkpoint_formats(attention, module_prefix, wrap):
    model = timm.create_model(f'san10_{attention}')
    state = oracle.random_tensors(oracle.state_shapes(f'san10_{attention}'), seed=8)
    checkpoint = oracle.released_checkpoint(state, module_prefix, wrap)
    model.load_state_dict(checkpoint_filter_fn(checkpoint, model), strict=True)
    total = sum(tensor.double().abs().sum() for tensor in state.values())
    loaded = sum(tensor.double().abs().sum() for tensor in model.state_dict().values())
    assert loaded.item() == pytest.approx(total.item(), rel=1e-6)


def test_own_checkpoints_pass_the_filter():
    model = timm.create_model('test_san_pairwise')
    own = model.state_dict()
    assert set(checkpoint_filter_fn(dict(own), model)) == set(own)


@pytest.mark.parametrize('name, expected', [
    ('san10_pairwise', 10_531_848), ('san10_patchwise', 11_841_124), ('san15_pairwise', 14_065_436),
    ('san15_patchwise', 16_181_310), ('san19_pairwise', 17_596_156), ('san19_patchwise', 20_518_470),
    ('san10', 11_841_124), ('san15', 16_181_310), ('san19', 20_518_470),
])
def test_parameter_counts(name, expected):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


# --- The network beyond the released models --------------------------------------------------------------------------

def build(spec: oracle.Spec, state: oracle.State, **options) -> SAN:
    """The package's float64 network in evaluation mode, with the oracle's state."""
    model = SAN(attention=spec.attention, relation=spec.relation, depths=spec.depths, kernel_sizes=spec.kernels,
                widths=spec.widths, stem_width=spec.stem, share_planes=spec.share, position=spec.position,
                in_chans=spec.in_chans, num_classes=NUM_CLASSES, **options).double().eval()
    model.load_state_dict(checkpoint_filter_fn(oracle.released_checkpoint(state), model), strict=True)
    return model


@cache
def small_case(**changes):
    spec = oracle.small_spec(**changes)
    return spec, oracle.random_state(spec, seed=9, num_classes=NUM_CLASSES)


def check_network(spec: oracle.Spec, state: oracle.State, image: torch.Tensor, **options) -> None:
    """Logits and stage outputs in float64; ``options`` are both the oracle's and the package's."""
    model = build(spec, state, **options)
    expected = oracle.network(image, state, **spec.structure(), **options)
    with torch.no_grad():
        assert_close(model(image), expected['logits'], 1e-9, 'logits')
        features = model.forward_intermediates(image, intermediates_only=True)
    for stage, (feature, wanted) in enumerate(zip(features, expected['features'])):
        assert_close(feature, wanted, 1e-9, f'stage {stage}')


@pytest.mark.parametrize('attention, relation, position', FORMS)
def test_every_relation_in_the_network(attention, relation, position):
    spec, state = small_case(attention=attention, relation=relation, position=position, kernels=(3, 3, 3, 3, 3))
    check_network(spec, state, draw(1, 3, 64, 64, seed=10))


@pytest.mark.parametrize('size', [(32, 32), (33, 33), (47, 65), (129, 40)], ids=lambda size: f'{size[0]}x{size[1]}')
@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
def test_any_size(attention, size):
    """Repeated reflection serves maps narrower than the footprint."""
    spec, state = small_case(attention=attention)
    check_network(spec, state, draw(1, 3, *size, seed=11))


@pytest.mark.parametrize('output_stride', [8, 16, 32])
@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
def test_output_stride(attention, output_stride):
    """A stage that does not pool doubles the dilation, and all its blocks have it."""
    spec, state = small_case(attention=attention, depths=(1, 1, 1, 2, 2))
    check_network(spec, state, draw(1, 3, 96, 64, seed=12), output_stride=output_stride)


@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
def test_output_stride_in_training(attention):
    spec, state = small_case(attention=attention, depths=(1, 1, 1, 2, 2))
    image = draw(2, 3, 64, 64, seed=13)
    leaves = trainable(state)
    expected = oracle.network(image, leaves, training=True, output_stride=8, **spec.structure())
    expected['logits'].backward(draw(2, NUM_CLASSES, seed=14))
    model = build(spec, state, output_stride=8).train()
    model(image).backward(draw(2, NUM_CLASSES, seed=14))
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_all_close(grads, own_names(gradients(leaves), model), 1e-8, small=1e-6)
    assert_all_close(buffers(model), own_names(expected['running'], model), 1e-9, small=0)


@pytest.mark.parametrize('size', [(64, 64), (96, 160)], ids=lambda size: f'{size[0]}x{size[1]}')
@pytest.mark.parametrize('output_stride', [8, 32])
@pytest.mark.parametrize('position', ['relative', 'absolute'])
def test_position_ref_size(position, output_stride, size):
    spec, state = small_case(position=position)
    check_network(spec, state, draw(1, 3, *size, seed=15), position_ref_size=224, output_stride=output_stride)


@pytest.mark.parametrize('position', ['relative', 'absolute'])
def test_position_ref_size_changes_nothing_at_that_size(position):
    spec, state = small_case(position=position)
    image = draw(1, 3, 64, 64, seed=16)
    with torch.no_grad():
        expected = build(spec, state)(image)
        assert_close(build(spec, state, position_ref_size=64)(image), expected, 1e-9, 'logits')


def crop_errors(model: SAN) -> list:
    """For each stage, the error of a crop's features against the crop of the features, away from borders.

    The footprints are 3 x 3, one block per stage: a stage sees one pixel of its own stride further than its input, so
    that two pixels of any stage's map are more than a border reaches.
    """
    image, start, size = draw(1, 3, 256, 288, seed=17), 32, 192
    crop = image[:, :, start:start + size, start:start + size]
    with torch.no_grad():
        whole = model.forward_intermediates(image, intermediates_only=True)
        part = model.forward_intermediates(crop, intermediates_only=True)
    errors = []
    for stage, (wide, narrow) in enumerate(zip(whole, part)):
        stride = 2 ** (stage + 1)
        first, last = start // stride + 2, (start + size) // stride - 2
        errors.append(relative_error(narrow[..., 2:-2, 2:-2], wide[..., first:last, first:last]))
    return errors


def test_features_of_a_crop_are_the_crop_of_the_features():
    """With a fixed position step a pairwise SAN is translation-equivariant; with linspace(-1, 1, W) it is not."""
    spec, state = small_case(kernels=(3, 3, 3, 3, 3))
    assert max(crop_errors(build(spec, state, position_ref_size=224))) < 1e-9
    assert min(crop_errors(build(spec, state))) > 1e-4


def test_patchwise_features_of_a_crop_need_no_option():
    spec, state = small_case(attention='patchwise', kernels=(3, 3, 3, 3, 3))
    assert max(crop_errors(build(spec, state))) < 1e-9


@pytest.mark.parametrize('in_chans', [1, 4])
def test_in_chans(in_chans):
    spec, state = small_case(in_chans=in_chans)
    check_network(spec, state, draw(1, in_chans, 32, 32, seed=18))


# --- Registered names, sizes, dtypes and layouts ---------------------------------------------------------------------

@pytest.mark.parametrize('name', ['test_san_pairwise', 'test_san_patchwise'])
def test_registered_test_models_are_sans(name):
    model = timm.create_model(name, num_classes=NUM_CLASSES)
    spec = oracle.Spec(
        attention=name.split('_')[-1], depths=tuple(len(stage.blocks) for stage in model.stages),
        widths=tuple(info['num_chs'] for info in model.feature_info), stem=model.stem.conv.out_channels)
    state = oracle.random_state(spec, seed=19, num_classes=NUM_CLASSES)
    model.double().eval().load_state_dict(checkpoint_filter_fn(oracle.released_checkpoint(state), model))
    image = draw(1, 3, 64, 64, seed=20)
    with torch.no_grad():
        assert_close(model(image), oracle.network(image, state, **spec.structure())['logits'], 1e-9, 'logits')


@pytest.mark.parametrize('size', ['san10', 'san15', 'san19'])
def test_the_plain_names_are_the_patchwise_models(size):
    with torch.device('meta'):
        plain, patchwise = timm.create_model(size), timm.create_model(f'{size}_patchwise')
    assert list(plain.state_dict()) == list(patchwise.state_dict())
    assert [type(m) for m in plain.modules()] == [type(m) for m in patchwise.modules()]


@pytest.mark.parametrize('size', [(33, 33), (511, 383)], ids=lambda size: f'{size[0]}x{size[1]}')
@pytest.mark.parametrize('name', ['test_san_pairwise', 'test_san_patchwise'])
def test_feature_shapes_at_odd_sizes(name, size):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        features = model.forward_intermediates(draw(1, 3, *size, seed=21, dtype=torch.float32),
                                               intermediates_only=True)
    for stage, feature in enumerate(features):
        assert feature.shape[-2:] == tuple(side // 2 ** (stage + 1) for side in size)
        assert feature.isfinite().all()


@pytest.mark.parametrize('name', ['test_san_pairwise', 'test_san_patchwise'])
def test_channels_last_network(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    image = draw(2, 3, 64, 96, seed=22, dtype=torch.float32)
    with torch.no_grad():
        expected = model(image)
        actual = model.to(memory_format=torch.channels_last)(image.contiguous(memory_format=torch.channels_last))
    assert_close(actual, expected, 1e-5, 'logits')


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=['bf16', 'fp16'])
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
def test_half_precision_network(attention, backend, dtype, tolerance):
    spec, state = small_case(attention=attention)
    model = build(spec, state)
    image = draw(2, 3, 64, 64, seed=23)
    with torch.no_grad(), use_backend(backend):
        expected = model(image)
        actual = model.to(dtype)(image.to(dtype))
    assert actual.dtype == dtype
    assert_close(actual, expected, tolerance, 'logits')


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
def test_autocast(attention, backend, dtype):
    """A training step under autocast: logits near those of float32, finite float32 gradients for every parameter."""
    spec, state = small_case(attention=attention)
    model = build(spec, state).float()
    image = draw(2, 3, 64, 64, seed=24, dtype=torch.float32)
    with torch.no_grad():
        expected = model(image)
    with use_backend(backend), torch.autocast('cpu', dtype=dtype):
        assert_close(model(image), expected, 0.1, 'logits')
        logits = model.train()(image)
    assert logits.dtype == dtype
    logits.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


# --- Bad input -------------------------------------------------------------------------------------------------------

def assert_refused(call, *words: str) -> None:
    """The call fails, and the message says each of ``words``: what was given and what is allowed."""
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        call()
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f'{missing} not in {message!r}'


@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
def test_unknown_relation(attention):
    allowed = oracle.PAIRWISE_RELATIONS if attention == 'pairwise' else oracle.PATCHWISE_RELATIONS
    assert_refused(lambda: LAYERS[attention](DIM, relation='cosine'), 'cosine', *allowed)
    assert_refused(lambda: SAN(attention=attention, relation='cosine'), 'cosine', *allowed)


def test_relation_of_the_other_form():
    assert_refused(lambda: PairwiseAttention(DIM, relation='clique'), 'clique', 'subtraction')
    assert_refused(lambda: PatchwiseAttention(DIM, relation='subtraction'), 'subtraction', 'concatenation')


def test_unknown_attention_and_position():
    assert_refused(lambda: SAN(attention='global'), 'global', 'pairwise', 'patchwise')
    assert_refused(lambda: SAN(attention='pairwise', position='sine'), 'sine', 'relative', 'absolute', 'none')
    assert_refused(lambda: PairwiseAttention(DIM, position='sine'), 'sine', 'relative', 'absolute', 'none')


@pytest.mark.parametrize('kernel_size', [0, 4, -3, 2.5])
@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
def test_footprint_without_a_centre(attention, kernel_size):
    assert_refused(lambda: LAYERS[attention](DIM, kernel_size=kernel_size), str(kernel_size), 'odd')
    if isinstance(kernel_size, int):
        kernels = (3, 3, kernel_size, 3, 3)
        assert_refused(lambda: SAN(attention=attention, kernel_sizes=kernels), str(kernel_size), 'odd')


def test_channels_that_cannot_be_shared():
    assert_refused(lambda: PairwiseAttention(48), '48', '32')
    assert_refused(lambda: SAN(widths=(48, 64, 64, 64, 64)), '48', '32')


def test_bad_structure():
    assert_refused(lambda: SAN(output_stride=4), '4', '8', '16', '32')
    assert_refused(lambda: SAN(widths=(64, 256)), '(64, 256)', '5')
    assert_refused(lambda: SAN(kernel_sizes=(3, 7)), '(3, 7)', '5')
    assert_refused(lambda: SAN(attention='pairwise', position_ref_size=0), 'position_ref_size', '0')
    assert_refused(lambda: PairwiseAttention(DIM, dilation=0), 'dilation', '0')


def test_images_of_the_wrong_shape():
    model = timm.create_model('test_san_pairwise').eval()
    assert_refused(lambda: model(torch.zeros(1, 4, 64, 64)), '3', '[1, 4, 64, 64]')
    assert_refused(lambda: model(torch.zeros(3, 64, 64)), '3', '[3, 64, 64]')
    assert_refused(lambda: PairwiseAttention(DIM)(torch.zeros(1, 32, 4, 4)), '64', '32')


@pytest.mark.parametrize('size', [(1, 1), (1, 50), (31, 2), (7, 33)])
@pytest.mark.parametrize('output_stride', [8, 32])
def test_images_of_any_size(size, output_stride):
    spec, state = small_case()
    check_network(spec, state, draw(2, 3, *size, seed=25), output_stride=output_stride)


@pytest.mark.parametrize('method', ['forward', 'forward_features', 'forward_intermediates'])
@pytest.mark.parametrize('size', [(0, 32), (32, 0)])
def test_images_of_no_pixels(method, size):
    model = timm.create_model('test_san_patchwise').eval()
    assert_refused(lambda: getattr(model, method)(torch.zeros(1, 3, *size)), 'at least one', f'{size[0]} x {size[1]}')


@pytest.mark.parametrize('way', ['as it is', 'fused', 'other norm', 'other act', 'hooked', 'scripted', 'traced'])
@pytest.mark.parametrize('form', ['pairwise', 'patchwise'])
def test_a_batch_of_no_images(form, way):
    """By every road: the loops, the folded form, the form of `ops.traced`."""
    options = {'other norm': dict(norm_layer='groupnorm1'), 'other act': dict(act_layer='gelu')}.get(way, {})
    model = timm.create_model(f'test_san_{form}', num_classes=3, **options).eval()
    if way == 'fused':
        model = san_backbones.fuse_for_inference(model)
    elif way == 'hooked':
        model.stages[0].blocks[0].attn.weight_mlp.norm1.register_forward_hook(lambda *given: None)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        if way == 'scripted':
            model = torch.jit.script(model)
        elif way == 'traced':
            model = torch.jit.trace(model, torch.zeros(2, 3, 32, 32))
        assert model(torch.zeros(0, 3, 32, 32)).shape == (0, 3)


def test_one_value_has_no_batch_statistics():
    model = timm.create_model('test_san_patchwise').train()
    assert_refused(lambda: model(torch.zeros(1, 3, 32, 32)), 'more than 1 value')


def test_mismatched_checkpoints():
    state = oracle.random_tensors(oracle.state_shapes('san10_pairwise'), seed=26)
    checkpoint = oracle.released_checkpoint(state)

    def load(name, **options):
        model = timm.create_model(name, **options)
        model.load_state_dict(checkpoint_filter_fn(checkpoint, model), strict=True)

    assert_refused(lambda: load('san10_patchwise'), 'Unexpected key', 'position', 'size mismatch')
    assert_refused(lambda: load('san15_pairwise'), 'Missing key')
    assert_refused(lambda: load('san10_pairwise', num_classes=5), 'size mismatch', 'head.fc', '1000', '5')


def test_unknown_backend():
    def enter():
        with use_backend('fast'):
            pass

    assert_refused(enter, 'fast', 'reference', 'tiled')


def test_the_package_offers_its_parts():
    assert san_backbones.SAN is SAN
    assert san_backbones.PairwiseAttention is PairwiseAttention
    assert san_backbones.PatchwiseAttention is PatchwiseAttention
