"""The bound of the first ReLU of a block: the same on every path, in the state dict, and none in released weights."""
import copy
import io
import warnings

import pytest
import timm
import torch
from torch import nn

from san_backbones import SAN, fuse_for_inference, ops
from san_backbones.activations import BoundedReLU
from san_backbones.count import count_multiply_adds
from san_backbones.san import checkpoint_filter_fn
from tests import oracle

FORMS = ('pairwise', 'patchwise')
BOUND = 0.7  # within a standard deviation of what norms put out: it changes a third of all values
UNBOUNDED = 0.
BACKENDS = ('reference', 'tiled', 'auto')


def spec_and_state(form, **changes):
    spec = oracle.small_spec(attention=form, **changes)
    return spec, oracle.random_state(spec, seed=3, num_classes=5)


def build(spec, state, bound, dtype=torch.float64):
    model = SAN(spec.attention, depths=spec.depths, kernel_sizes=spec.kernels, widths=spec.widths, stem_width=spec.stem,
                num_classes=5, relu_bound=bound).to(dtype).eval()
    model.load_state_dict(oracle.released_checkpoint(state))
    return model


def image(dtype=torch.float64, seed=4):
    return torch.randn(2, 3, 64, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(actual, expected):
    return ((actual.detach().double() - expected.detach()).norm() / expected.detach().norm()).item()


def first_relu(model):
    return next(module for module in model.modules() if isinstance(module, BoundedReLU))


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('bound', [None, BOUND])
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('form', FORMS)
def test_every_backend_agrees_with_the_oracle(form, backend, bound, training):
    """Logits, gradients and running statistics; `auto` in float32, where the compiled loops are."""
    spec, state = spec_and_state(form)
    dtype, tolerance = (torch.float32, 1e-4) if backend == 'auto' else (torch.float64, 1e-9)
    leaves = {name: tensor.clone().requires_grad_(oracle.is_parameter(name)) for name, tensor in state.items()}
    expected = oracle.network(image(), leaves, training=training, bound=bound, **spec.structure())
    expected['logits'].square().sum().backward()
    model = build(spec, state, bound or UNBOUNDED, dtype).train(training)
    with ops.use_backend(backend):
        logits = model(image(dtype))
        logits.square().sum().backward()
    assert error(logits, expected['logits']) < tolerance
    grads = checkpoint_filter_fn({name: t.grad for name, t in leaves.items() if t.grad is not None}, model)
    mine = dict(model.named_parameters())
    together = [torch.cat([t.double().flatten() for t in ts]) for ts in (
        (mine[name].grad for name in grads), grads.values())]
    assert error(*together) < 100 * tolerance
    for name, tensor in checkpoint_filter_fn(expected['running'], model).items():
        assert error(model.state_dict()[name], tensor) < tolerance, name


@pytest.mark.parametrize('form', FORMS)
def test_the_bound_changes_results(form):
    """What the tests above could not tell from an option that does nothing."""
    spec, state = spec_and_state(form)
    with torch.no_grad():
        free, bounded = (build(spec, state, bound)(image()) for bound in (UNBOUNDED, BOUND))
    assert error(bounded, free) > 0.01


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('form', FORMS)
def test_folded_inference(form, backend, dtype, tolerance):
    spec, state = spec_and_state(form)
    expected = oracle.network(image(), state, bound=BOUND, **spec.structure())['logits']
    fused = fuse_for_inference(build(spec, state, BOUND, dtype))
    with ops.use_backend(backend), torch.no_grad():
        assert error(fused(image(dtype)), expected) < tolerance


def test_folds_follow_a_changed_bound():
    spec, state = spec_and_state('patchwise')
    model = fuse_for_inference(build(spec, state, BOUND, torch.float32))
    with torch.no_grad():
        model(image(torch.float32))
        for relu in model.modules():
            if isinstance(relu, BoundedReLU):
                relu.limit = None
        expected = oracle.network(image(), state, **spec.structure())['logits']
        assert error(model(image(torch.float32)), expected) < 1e-5


@pytest.mark.parametrize('bound', [None, BOUND])
@pytest.mark.parametrize('program', ['script', 'trace', 'fx', 'export', 'compile', 'checkpointing'])
def test_other_programs(program, bound):
    spec, state = spec_and_state('patchwise')
    model, x = build(spec, state, bound or UNBOUNDED, torch.float32), image(torch.float32)
    expected = oracle.network(image(), state, bound=bound, **spec.structure())['logits']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if program == 'script':
            run = torch.jit.script(model)
        elif program == 'trace':
            run = torch.jit.trace(model, x)
        elif program == 'fx':
            from timm.models import FeatureGraphNet
            run = FeatureGraphNet(model, out_indices=(4,))
            expected = oracle.network(image(), state, bound=bound, **spec.structure())['features'][-1]
        elif program == 'export':
            run = torch.export.export(model, (x,)).module()
        elif program == 'compile':
            run = torch.compile(model, backend='eager')
        else:
            model.set_grad_checkpointing()
            run = model
    output = run(x)
    assert error(output[0] if isinstance(output, (list, tuple)) else output, expected) < 1e-4


@pytest.mark.parametrize('bound', [None, BOUND])
def test_onnx(tmp_path, bound):
    onnx, runtime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    from san_backbones.export import export_onnx
    spec, state = spec_and_state('patchwise', depths=(1,), kernels=(3,), widths=(64,))  # an export takes its time
    model = build(spec, state, bound or UNBOUNDED, torch.float32)
    path = tmp_path / 'model.onnx'
    export_onnx(model, path, image_size=32, dynamic=False)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert ('Clip' in kinds) == (bound is not None)
    square = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    session = runtime.InferenceSession(path)
    actual = session.run(None, {session.get_inputs()[0].name: square.numpy()})[0]
    expected = oracle.network(square.double(), state, bound=bound, **spec.structure())['logits']
    assert error(torch.as_tensor(actual), expected) < 1e-4


# --- which networks have it, and what weights do to it ---

def test_new_networks():
    """Patchwise networks are bounded at 6, pairwise ones are not; the option wins."""
    for form, expected in (('patchwise', 6.), ('pairwise', None)):
        assert first_relu(timm.create_model(f'test_san_{form}')).limit == expected
        assert first_relu(timm.create_model(f'test_san_{form}', relu_bound=UNBOUNDED)).limit is None
        assert first_relu(timm.create_model(f'test_san_{form}', relu_bound=float('inf'))).limit is None
        assert first_relu(timm.create_model(f'test_san_{form}', relu_bound=3)).limit == 3.
    meta = timm.create_model('test_san_patchwise', device='meta').to_empty(device='cpu')
    assert meta.state_dict()['stages.0.blocks.0.act1.bound'] == 6


def test_state_dict_of_an_unbounded_network_is_what_it_was():
    model = timm.create_model('test_san_patchwise', relu_bound=UNBOUNDED)
    assert not [name for name in model.state_dict() if 'bound' in name]


@pytest.mark.parametrize('given', [None, 2.5])
@pytest.mark.parametrize('made', [None, UNBOUNDED, 9.])
@pytest.mark.parametrize('assign', [False, True])
def test_weights_bring_their_bound(made, given, assign):
    """By every road: strict and whole. A bound given to the network stays."""
    source = timm.create_model('test_san_patchwise', relu_bound=given or UNBOUNDED)
    model = timm.create_model('test_san_patchwise', relu_bound=made)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    result = model.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    expected = given if made is None else None if made == UNBOUNDED else made
    assert {relu.limit for relu in model.modules() if isinstance(relu, BoundedReLU)} == {expected}
    saved = model.state_dict().get('stages.2.blocks.0.act1.bound')
    assert saved is None if expected is None else saved == expected
    again = timm.create_model('test_san_patchwise')
    again.load_state_dict(model.state_dict())
    assert first_relu(again).limit == expected


def test_a_part_of_the_weights_leaves_the_bound():
    model = timm.create_model('test_san_patchwise')
    model.load_state_dict({'head.fc.bias': torch.zeros_like(model.head.fc.bias)}, strict=False)
    assert first_relu(model).limit == 6.
    name = 'stages.0.blocks.0.conv.weight'
    model.load_state_dict({name: model.state_dict()[name]}, strict=False)
    assert first_relu(model).limit == 6.
    model.load_state_dict(dict(model.named_parameters()), strict=False)  # all that is learnt
    assert {relu.limit for relu in model.modules() if isinstance(relu, BoundedReLU)} == {6.}
    assert model.state_dict()['stages.0.blocks.0.act1.bound'] == 6


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('program', ['script', 'trace'])
def test_programs_of_torchscript_have_the_same_state_dict(program, form):
    model = timm.create_model(f'test_san_{form}').eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        run = torch.jit.script(model) if program == 'script' else torch.jit.trace(model, torch.zeros(1, 3, 32, 32))
        file = io.BytesIO()
        torch.jit.save(run, file)
        file.seek(0)
        for state in (run.state_dict(), torch.jit.load(file).state_dict()):
            assert state.keys() == model.state_dict().keys()
            again = timm.create_model(f'test_san_{form}')
            again.load_state_dict(state)
            assert first_relu(again).limit == (6. if form == 'patchwise' else None)


def test_released_weights_are_unbounded_and_equal_to_the_oracle():
    """Values beyond the bound of new networks, in a network that was made with it."""
    spec, state = spec_and_state('patchwise')
    state = {name: tensor * 20 if name.endswith('0.bn1.weight') else tensor for name, tensor in state.items()}
    expected = oracle.network(image(), state, **spec.structure())['logits']
    model = build(spec, state, None)
    assert error(model(image()), expected) < 1e-9
    assert error(build(spec, state, 6.)(image()), expected) > 0.01


def test_features_copies_and_precision_keep_it():
    features = timm.create_model('test_san_patchwise', features_only=True, relu_bound=3.)
    assert {relu.limit for relu in features.modules() if isinstance(relu, BoundedReLU)} == {3.}
    copied = copy.deepcopy(features).half()
    assert first_relu(copied).limit == 3. and first_relu(copied).bound.dtype == torch.float16
    other = timm.create_model('test_san_patchwise', features_only=True)
    other.load_state_dict(copied.float().state_dict())
    assert first_relu(other).limit == 3.
    averaged = torch.optim.swa_utils.AveragedModel(features, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(features)
    assert first_relu(averaged).bound == 3


def test_multiply_adds_are_those_of_a_relu():
    counts = {count_multiply_adds(timm.create_model('san10', device='meta', relu_bound=bound), 64, paper)
              for bound in (6., UNBOUNDED) for paper in (False,)}
    assert len(counts) == 1


@pytest.mark.parametrize('bound', [-1., float('nan'), True, False, '6', (6,)])
def test_bad_bounds(bound):
    with pytest.raises(ValueError, match=r"relu_bound must be a positive number.*got"):
        SAN(depths=(1,), widths=(32,), kernel_sizes=(3,), relu_bound=bound)


@pytest.mark.parametrize('limit', [None, 0.5])
def test_layer_by_itself(limit):
    x = torch.tensor([-1., 0., 0.25, 0.5, 7., float('nan'), float('inf')], requires_grad=True)
    y = BoundedReLU(limit)(x)
    top = float('inf') if limit is None else limit
    torch.testing.assert_close(y, torch.tensor([0., 0., 0.25, 0.5, min(7., top), float('nan'), top]), equal_nan=True)
    y.nansum().backward()
    assert x.grad[2] == 1 and x.grad[4] == (1. if limit is None else 0.)
    assert isinstance(BoundedReLU(limit), nn.ReLU)


def test_other_activations_have_no_bound():
    options = dict(depths=(1,), widths=(32,), kernel_sizes=(3,))
    assert not isinstance(SAN(**options, act_layer='gelu').stages[0].blocks[0].act1, nn.ReLU)
    assert SAN(**options, act_layer='relu').stages[0].blocks[0].act1.limit == 6.
    with pytest.raises(ValueError, match=r"bound of a ReLU, got relu_bound=6\.0 with act_layer='gelu'"):
        SAN(**options, act_layer='gelu', relu_bound=6.)


def test_bounded_weights_for_another_activation():
    """As those of any ReLU, they load into a network of GELUs, and all but the bounds is theirs."""
    given = timm.create_model('test_san_patchwise', num_classes=3).state_dict()
    model = timm.create_model('test_san_patchwise', num_classes=3, act_layer='gelu')
    model.load_state_dict(given)
    found = model.state_dict()
    assert [name for name in given if name not in found] == [
        f'stages.{i}.blocks.0.act1.bound' for i in range(5)] and found.keys() <= given.keys()
    assert all(torch.equal(found[name], given[name]) for name in found)


class Limited(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.register_buffer('bound', torch.tensor(3.))

    def forward(self, x):
        return x.clamp(max=self.bound)


def test_an_activation_with_a_bound_of_its_own_loads_it():
    model = timm.create_model('test_san_patchwise', act_layer=Limited)
    state = model.state_dict()
    state['stages.0.blocks.0.act1.bound'] = torch.tensor(5.)
    model.load_state_dict(state)
    assert model.stages[0].blocks[0].act1.bound == 5


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_the_entry_has_the_dtype_of_the_network(dtype):
    """Not that of the weights that are loaded."""
    model = timm.create_model('test_san_patchwise').to(dtype)
    model.load_state_dict(timm.create_model('test_san_patchwise', relu_bound=3.).state_dict())
    assert first_relu(model).bound.dtype == dtype and first_relu(model).limit == 3.


@pytest.mark.parametrize('bound', [-1., 0., float('nan'), float('inf'), [1., 2.]])
def test_a_damaged_bound(bound):
    model = timm.create_model('test_san_patchwise')
    state = {name: torch.tensor(bound) if name.endswith('.bound') else tensor
             for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match='one positive finite number, got'):
        model.load_state_dict(state)


def test_made_under_inference_mode():
    with torch.inference_mode():
        model = timm.create_model('test_san_patchwise')
    assert first_relu(model.to('cpu').float()).bound == 6


@pytest.mark.parametrize('form', FORMS)
def test_a_block_without_norms_keeps_its_residual(form):
    """Whether gradients are on, where the ReLU works in place, does not matter."""
    torch.manual_seed(0)
    model = SAN(form, depths=(1,), widths=(32,), kernel_sizes=(3,), norm_layer=nn.Identity, num_classes=3).eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        without = model(x)
    torch.testing.assert_close(without, model(x))
