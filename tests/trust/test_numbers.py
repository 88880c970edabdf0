"""What the numbers promise beside the definition: derivatives of derivatives, half precision, large logits, variances,
and results that depend on nothing but the input.
"""
import copy

import pytest
import timm
import torch

from san_backbones import PairwiseAttention, PatchwiseAttention, SAN, fuse_for_inference, ops
from san_backbones.ops import native, statistics

PATHS = ops.available_backends()
FORMS = [(cls, relation) for cls in (PairwiseAttention, PatchwiseAttention) for relation in cls.relations]
needs_loops = pytest.mark.skipif(native.unavailable() is not None, reason=f'no compiled loops: {native.unavailable()}')


def _layer(cls, dim=32, **kwargs):
    torch.manual_seed(0)
    layer = cls(dim, **kwargs).eval()
    for norm in (layer.weight_mlp.norm1, layer.weight_mlp.norm2):
        for tensor, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -0.5, 0.5), (norm.running_mean, -0.5, 0.5),
                                  (norm.running_var, 0.5, 1.5)):
            torch.nn.init.uniform_(tensor, low, high)
    return layer


# --- Derivatives -----------------------------------------------------------------------------------------------------

def _function(layer, x):
    """The layer as a function of its input and of all its parameters; running buffers stay what they are."""
    names = [name for name, _ in layer.named_parameters()]
    buffers = dict(layer.named_buffers())

    def function(x, *parameters):
        state = {**dict(zip(names, parameters)), **{name: b.clone() for name, b in buffers.items()}}
        return torch.func.functional_call(layer, state, x)

    return function, (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('cls, relation', FORMS)
@pytest.mark.parametrize('path', ['reference', 'tiled'])
def test_first_and_second_derivatives(path, cls, relation, training):
    """Of the input and of every parameter, by finite differences in float64; the tiled path refuses the second."""
    layer = _layer(cls, rel_planes=2, out_planes=4, share_planes=2, kernel_size=3, relation=relation).double()
    torch.manual_seed(1)
    function, inputs = _function(layer.train(training), torch.randn(2, 32, 2, 3).double().requires_grad_())
    with ops.use_backend(path):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        if path == 'reference':
            assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, atol=1e-4)
        else:
            with pytest.raises(RuntimeError, match="no second derivatives.*use_backend\\('reference'\\)"):
                torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
@pytest.mark.parametrize('path', PATHS)
def test_many_gradients_at_once(path, cls, training):
    layer, x = _layer(cls, kernel_size=3).train(training), torch.randn(1, 32, 4, 5, requires_grad=True)
    seeds = torch.randn(3, 1, 8, 4, 5)
    with ops.use_backend(path):
        y = layer(x)
        if path == 'reference':
            together, = torch.autograd.grad(y, x, seeds, is_grads_batched=True, retain_graph=True)
            for gradient, seed in zip(together, seeds):
                alone, = torch.autograd.grad(y, x, seed, retain_graph=True)
                torch.testing.assert_close(gradient, alone, rtol=1e-3, atol=1e-4)
        else:
            with pytest.raises(RuntimeError, match="no batch of them.*use_backend\\('reference'\\)"):
                torch.autograd.grad(y, x, seeds, is_grads_batched=True)


@needs_loops
def test_stem_refuses_second_derivatives():
    stem = SAN(depths=(1,), widths=(32,), kernel_sizes=3).stem
    image = torch.randn(1, 3, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match='no second derivatives'):
        torch.autograd.grad(stem(image).square().sum(), image, create_graph=True)


# --- Precision -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_softmax_with_logits_of_ten_thousand(path, dtype):
    """The largest logit wins, whatever the others are; equal ones share."""
    layer = _layer(PairwiseAttention, kernel_size=3, out_planes=8, position='none', relation='concatenation')
    with torch.no_grad():
        layer.weight_mlp.fc2.weight.fill_(1e4)
        layer.weight_mlp.fc2.bias.fill_(-1e4)
        x = torch.randn(1, 32, 6, 6)
        value = layer.value(x)
        layer, x = layer.to(dtype), x.to(dtype)
        with ops.use_backend(path):
            y = layer(x)
            layer.weight_mlp.fc2.weight.zero_()
            mean = layer(x)
    assert y.isfinite().all()
    values = ops.footprint(ops.reflect_pad(value, 1), 3, 1).flatten(2, 3)
    assert (y <= values.amax(2) + 0.02).all() and (y >= values.amin(2) - 0.02).all()  # a weighted mean
    torch.testing.assert_close(mean.float(), values.mean(2), rtol=0.02, atol=0.02)


@pytest.mark.parametrize('pairwise, relation', sorted(statistics.SUPPORTED))
@pytest.mark.parametrize('mean, deviation', [(1e3, 1e-2), (1e4, 1e-1), (1e6, 1.), (0., 1e-8), (1., 0.), (-1e5, 1e-2)])
def test_variance_beside_a_large_mean(pairwise, relation, mean, deviation):
    """Never negative, and as accurate as maps in float32 allow, whose own rounding is part of the exact variance."""
    torch.manual_seed(0)
    query, key = (mean + deviation * torch.randn(2, 3, 9, 11) for _ in range(2))
    spec = ops.Spec(pairwise, relation, 'none', 5, 2)
    m, var, _ = statistics.relation_statistics(query, key, None, spec)
    related = ops.reference.relate(query.double(), ops.reflect_pad(key.double(), 4), None, None, *spec)
    exact, exact_mean = torch.var_mean(related, (0, 2, 3, 4), correction=0)
    assert (var >= 0).all()
    torch.testing.assert_close(m.double(), exact_mean, rtol=1e-5, atol=1e-6 * (abs(mean) + deviation))
    lost = 1e-15 * related.square().mean().item() if relation == 'hadamard' else 0.  # a product is not centred
    torch.testing.assert_close(var.double(), exact, rtol=1e-7, atol=lost)


@pytest.mark.parametrize('bias', [0., 1e2, 1e4])
@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
@pytest.mark.parametrize('path', PATHS)
def test_variance_of_hidden_vectors_beside_a_large_mean(path, cls, bias):
    """norm1's bias puts norm2's input `bias` deviations from 0; float32 itself is then off by 1e-7 * bias."""
    layer = _layer(cls, 64, kernel_size=5).train()
    torch.nn.init.constant_(layer.weight_mlp.norm1.bias, bias)
    x = torch.randn(2, 64, 9, 9)
    exact = copy.deepcopy(layer).double()
    with torch.no_grad(), ops.use_backend('reference'):
        expected = exact(x.double())
    with torch.no_grad(), ops.use_backend(path):
        actual = layer(x)
    norm, exact_norm = layer.weight_mlp.norm2, exact.weight_mlp.norm2
    torch.testing.assert_close(norm.running_var.double(), exact_norm.running_var, rtol=1e-6 + 1e-6 * bias, atol=1e-9)
    assert (actual - expected).norm() < (1e-5 + 1e-6 * bias) * expected.norm()


@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 0.02), (torch.float16, 0.002)])
@pytest.mark.parametrize('cls, relation', FORMS)
@pytest.mark.parametrize('path', ['auto', *PATHS])
def test_no_variance_in_half_precision(path, cls, relation, dtype, bound):
    """A picture of one colour: mean / deviation is beyond float16, and its difference beyond bfloat16."""
    layer = _layer(cls, 64, kernel_size=3, relation=relation).train()
    with torch.no_grad():
        layer.query.bias.fill_(4.7)
        layer.key.bias.fill_(-4.3)
    x = torch.zeros(2, 64, 8, 8)
    with torch.no_grad(), ops.use_backend('reference'):
        expected = copy.deepcopy(layer).double()(x.double())
    if path in ('native', 'triton') and (layer.is_pairwise, relation) not in statistics.SUPPORTED:
        return
    with torch.no_grad(), torch.autocast('cpu', dtype), ops.use_backend(path):
        actual = layer(x)
    assert (actual.double() - expected).norm() < bound * expected.norm()  # false where it is NaN


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_squares_beyond_float32(path, cls):
    """Batch statistics and a step of maps of 1e20, whose variance is 1e40."""
    layer = _layer(cls, kernel_size=3).train()
    for conv in (layer.query, layer.key):
        torch.nn.init.normal_(conv.weight, std=1e20)
    leaf = torch.randn(2, 32, 7, 8, requires_grad=True)
    with ops.use_backend(path):
        y = layer(leaf)
        y.square().sum().backward()
    assert y.isfinite().all() and leaf.grad.isfinite().all()


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_infinite_running_statistics_stay_so(path, cls):
    layer = _layer(cls, kernel_size=3).train()
    norm, batch_norm = layer.weight_mlp.norm1, copy.deepcopy(layer.weight_mlp.norm1)
    for one in (norm, batch_norm):
        one.running_var.fill_(float('inf'))
    with torch.no_grad(), ops.use_backend(path):
        layer(torch.randn(2, 32, 7, 8))
        batch_norm(torch.randn(2, norm.num_features, 7, 8))
    assert torch.equal(norm.running_var, batch_norm.running_var) and norm.running_mean.isfinite().all()


@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
@pytest.mark.parametrize('path', PATHS)
def test_gradients_in_half_precision(path, cls, dtype, bound):
    """All gains and biases positive, so that no ReLU's input rounds to the other side of 0."""
    layer = _layer(cls, kernel_size=3)
    for norm in (layer.weight_mlp.norm1, layer.weight_mlp.norm2):
        torch.nn.init.constant_(norm.bias, 3.)
        torch.nn.init.constant_(norm.weight, 0.2)
    layer.to(dtype)
    x, seed = torch.randn(2, 32, 7, 8).to(dtype), torch.randn(2, 8, 7, 8).to(dtype)
    results = []
    for precise in (False, True):
        module = copy.deepcopy(layer).double() if precise else layer
        leaf = (x.double() if precise else x).requires_grad_()
        with ops.use_backend('reference' if precise else path):
            results.append(torch.autograd.grad(module(leaf), [leaf, module.value.weight], seed.to(leaf.dtype)))
    for actual, expected in zip(*results):
        assert actual.dtype == dtype
        assert (actual.double() - expected).norm() < bound * expected.norm()


# --- Results depend on the input alone -------------------------------------------------------------------------------

@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _step(model, image, path):
    """Output, gradients and buffers of a training step."""
    model = copy.deepcopy(model).train()
    with ops.use_backend(path):
        y = model(image)
        y.square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('name', ['test_san_pairwise', 'test_san_patchwise'])
def test_deterministic_algorithms(name, path, deterministic):
    """A training step runs under them, and twice the same."""
    torch.manual_seed(0)
    model, image = timm.create_model(name, num_classes=3), torch.randn(2, 3, 64, 64)
    for a, b in zip(_step(model, image, path), _step(model, image, path)):
        assert torch.equal(a, b)


@pytest.fixture
def defaults():
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)


@pytest.mark.parametrize('default', [torch.float64, torch.bfloat16, torch.float16, 'meta'])
@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('name', ['test_san_pairwise', 'test_san_patchwise'])
def test_defaults_of_torch_do_not_matter(name, path, default, defaults):
    """For new tensors; and float16 counts to 65504 only."""
    torch.manual_seed(0)
    model, image = timm.create_model(name, num_classes=3), torch.randn(5, 3, 128, 128)
    expected = _step(model, image, path)
    torch.set_default_device(default) if default == 'meta' else torch.set_default_dtype(default)
    for a, b in zip(_step(model, image, path), expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_threads_do_not_matter(cls, path, threads):
    """Maps large enough for torch to share its sums among threads; no bit of the compiled loops' results changes."""
    torch.manual_seed(0)
    layer = _layer(cls, kernel_size=3, rel_planes=2).train()
    x = torch.randn(1, 32, 130, 140)
    maps = [torch.randn(1, c, 130, 140) for c in (2, 2, 8)]
    results = []
    for count in (1, 2, 3):
        threads(count)
        leaves = [m.clone().requires_grad_() for m in maps]
        with ops.use_backend(path):
            y = layer._forward_operators(*leaves, layer.place(x))
        results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            if path == 'native':
                assert torch.equal(a, b)
            assert (a - b).norm() <= 1e-5 * a.norm()


@pytest.mark.parametrize('fused', [False, True], ids=['plain', 'fused'])
@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('name', ['test_san_pairwise', 'test_san_patchwise'])
def test_company_and_layout_do_not_matter(name, path, fused, threads):
    """A picture alone, in a batch, last of it, in channels_last, by two threads."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    if fused:
        fuse_for_inference(model)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad(), ops.use_backend(path):
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        turned = model(images.flip(0)).flip(0)
        last = model(images.contiguous(memory_format=torch.channels_last))
        converted = copy.deepcopy(model).to(memory_format=torch.channels_last)(images)
        threads(2)
        shared = model(images)
        results = [alone, turned, last, converted, shared]
    for result in results:
        assert (result - together).norm() < 1e-5 * together.norm()


@needs_loops
@pytest.mark.parametrize('cls', [PairwiseAttention, PatchwiseAttention])
def test_native_images_do_not_see_each_other(cls):
    """Not a bit."""
    layer = _layer(cls, kernel_size=5)
    x = torch.randn(3, 32, 9, 10)
    with torch.no_grad(), ops.use_backend('native'):
        query, key, value, place = layer.query(x), layer.key(x), layer.value(x), layer.place(x)
        together = layer._forward_operators(query, key, value, place)
        for i in range(3):
            one = layer._forward_operators(query[i:i + 1], key[i:i + 1], value[i:i + 1], place)
            assert torch.equal(one[0], together[i])
