"""The SAN of Zhao, Jia and Koltun (CVPR 2020), written out a second time for the tests.

Nothing here is fast and nothing here is shared with the package: each function spells out one sentence of the paper's
definition, on a plain dictionary of tensors whose keys are those of the authors' released checkpoints.  Everything is
differentiable by autograd; give it float64.

Shapes: ``N`` images, ``C`` channels, ``K = k * k`` footprint positions in row-major order, ``H x W`` pixels.
"""
from dataclasses import dataclass, replace
from collections.abc import Sequence

import torch

State = dict[str, torch.Tensor]

# delta of one pair (phi(x_i), psi(x_j)) and of one patch (phi(x_i), all phi(x_j), all psi(x_j)), of vectors: what
# test_oracle.py compares the tensors' form below with
PAIRS = {
    'summation': lambda phi, psi: phi + psi,
    'subtraction': lambda phi, psi: phi - psi,
    'concatenation': lambda phi, psi: [*phi, *psi],
    'hadamard': lambda phi, psi: phi * psi,
    'dot': lambda phi, psi: [phi @ psi],
}
PATCHES = {
    'concatenation': lambda phi, phis, psis: [*phi, *(psi[channel] for channel in range(len(phi)) for psi in psis)],
    'star': lambda phi, phis, psis: [phi @ psi for psi in psis],
    'clique': lambda phi, phis, psis: [left @ right for left in phis for right in psis],
}
PAIRWISE_RELATIONS, PATCHWISE_RELATIONS = tuple(PAIRS), tuple(PATCHES)
RELEASED_RELATION = {'pairwise': 'subtraction', 'patchwise': 'concatenation'}

BN_EPS = 1e-5
BN_MOMENTUM = 0.1


# --- What is built ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Spec:
    """The hyper-parameters of one SAN (CVPR 2020, section 4 and table 1)."""

    attention: str = 'pairwise'
    depths: tuple[int, ...] = (2, 1, 2, 4, 1)
    kernels: tuple[int, ...] = (3, 7, 7, 7, 7)
    widths: tuple[int, ...] = (64, 256, 512, 1024, 2048)
    stem: int = 64
    in_chans: int = 3
    share: int = 8
    relation: str | None = None
    position: str = 'relative'

    @property
    def delta(self) -> str:
        """The relation function, by default the one of the released models."""
        return self.relation or RELEASED_RELATION[self.attention]

    def structure(self) -> dict:
        """The keyword arguments that :func:`network` needs beside the image and the state."""
        return dict(attention=self.attention, depths=self.depths, kernels=self.kernels, share=self.share,
                    relation=self.delta, position=self.position)


DEPTHS = {'san10': (2, 1, 2, 4, 1), 'san15': (3, 2, 3, 5, 2), 'san19': (3, 3, 4, 6, 3)}
MODELS = {
    f'{size}_{attention}': Spec(attention=attention, depths=depths)
    for size, depths in DEPTHS.items() for attention in ('pairwise', 'patchwise')
}


def as_spec(name_or_spec: str | Spec) -> Spec:
    return MODELS[name_or_spec] if isinstance(name_or_spec, str) else name_or_spec


def relation_width(attention: str, relation: str, rel_planes: int, kernel_size: int) -> int:
    """Number of channels of delta, before any position channels."""
    area = kernel_size ** 2
    if attention == 'pairwise':
        return {'summation': rel_planes, 'subtraction': rel_planes, 'concatenation': 2 * rel_planes,
                'hadamard': rel_planes, 'dot': 1}[relation]
    return {'concatenation': rel_planes * (area + 1), 'star': area, 'clique': area ** 2}[relation]


# --- Footprints ------------------------------------------------------------------------------------------------------

def reflect(i: int, n: int) -> int:
    """Index ``i`` brought into ``[0, n)`` by reflecting at the two end pixels as often as it takes."""
    if n == 1:
        return 0
    while not 0 <= i < n:
        if i < 0:
            i = -i
        if i > n - 1:
            i = 2 * (n - 1) - i
    return i


def footprint(x: torch.Tensor, kernel_size: int, dilation: int = 1) -> torch.Tensor:
    """Read every pixel's k x k footprint: ``(N, C, H, W) -> (N, C, K, H, W)``."""
    height, width = x.shape[-2:]
    centre = kernel_size // 2
    views = []
    for row in range(kernel_size):
        for column in range(kernel_size):
            ys = [reflect(y + dilation * (row - centre), height) for y in range(height)]
            xs = [reflect(z + dilation * (column - centre), width) for z in range(width)]
            views.append(x[:, :, ys, :][:, :, :, xs])
    return torch.stack(views, dim=2)


def everywhere(x: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Repeat the centre's value at each footprint position: ``(N, C, H, W) -> (N, C, K, H, W)``."""
    return torch.stack([x] * kernel_size ** 2, dim=2)


# --- Layers ----------------------------------------------------------------------------------------------------------

def linear_map(x: torch.Tensor, params: State, name: str) -> torch.Tensor:
    """A 1x1 convolution: the same linear map at every position of ``(N, C, ...)``."""
    matrix = params[f'{name}.weight']
    matrix = matrix.reshape(matrix.shape[0], matrix.shape[1])
    y = torch.einsum('oc,nc...->no...', matrix, x)
    if f'{name}.bias' in params:
        y = y + per_channel(params[f'{name}.bias'], y)
    return y


def per_channel(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return vector.reshape(1, -1, *[1] * (like.dim() - 2))


def batch_norm(x: torch.Tensor, params: State, name: str, training: bool, running: State) -> torch.Tensor:
    """Batch normalisation over all axes but the channels'; in training the new running statistics go to ``running``."""
    mean, variance = params[f'{name}.running_mean'], params[f'{name}.running_var']
    if training:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        count = x.numel() // x.shape[1]
        old_mean, old_variance = mean, variance
        mean = x.mean(dim=axes)
        variance = (x - per_channel(mean, x)).square().mean(dim=axes)
        unbiased = variance * count / (count - 1)
        running[f'{name}.running_mean'] = ((1 - BN_MOMENTUM) * old_mean + BN_MOMENTUM * mean).detach()
        running[f'{name}.running_var'] = ((1 - BN_MOMENTUM) * old_variance + BN_MOMENTUM * unbiased).detach()
    normal = (x - per_channel(mean, x)) / per_channel((variance + BN_EPS).sqrt(), x)
    return normal * per_channel(params[f'{name}.weight'], x) + per_channel(params[f'{name}.bias'], x)


def relu(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def max_pool(x: torch.Tensor) -> torch.Tensor:
    """2x2 maximum, stride 2; a last odd row or column is dropped, but the only one stays."""
    if 1 in x.shape[2:]:
        axis = 2 if x.shape[2] == 1 else 3
        return max_pool(torch.cat([x, x], axis))
    height, width = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
    corners = [x[:, :, row:height:2, column:width:2] for row in (0, 1) for column in (0, 1)]
    return torch.stack(corners).amax(dim=0)


# --- Self-attention --------------------------------------------------------------------------------------------------

def coordinates(n: int, position: str, reference: int | None, dilation: int = 1) -> torch.Tensor:
    """The coordinate of each of ``n`` pixels along one axis.

    The released models use ``linspace(-1, 1, n)``, whatever ``n`` is.  With a ``reference`` map size the step is that
    of a map of that size, divided by the dilation, so that neighbours in a footprint are one such step apart; for
    absolute positions the map's centre is then the origin.
    """
    if reference is None:
        if n == 1:
            return torch.tensor([-1.0], dtype=torch.float64)
        return torch.tensor([-1 + 2 * i / (n - 1) for i in range(n)], dtype=torch.float64)
    step = 2 / (reference - 1) / dilation
    origin = (n - 1) / 2 if position == 'absolute' else 0
    return torch.tensor([(i - origin) * step for i in range(n)], dtype=torch.float64)


def position_map(height: int, width: int, position: str, reference: int | None, dilation: int = 1) -> torch.Tensor:
    """``(1, 2, H, W)``: each pixel's x coordinate, then its y coordinate."""
    xs = coordinates(width, position, reference, dilation)
    ys = coordinates(height, position, reference, dilation)
    return torch.stack([torch.stack([xs] * height, dim=0), torch.stack([ys] * width, dim=1)]).unsqueeze(0)


def position_channels(
        like: torch.Tensor, params: State, position: str, reference: int | None, kernel_size: int, dilation: int,
) -> torch.Tensor:
    """The two position channels of a pairwise relation: ``p_i - p_j``, or ``p_j`` for absolute positions."""
    count, _, height, width = like.shape
    mapped = linear_map(position_map(height, width, position, reference, dilation).to(like), params, 'conv_p')
    there = footprint(mapped, kernel_size, dilation)
    if position == 'relative':
        there = everywhere(mapped, kernel_size) - there
    return torch.cat([there] * count, dim=0)


def pairwise_delta(query: torch.Tensor, key: torch.Tensor, relation: str, kernel_size: int, dilation: int):
    """``delta(x_i, x_j)`` for each pixel i and each j of its footprint: ``(N, width, K, H, W)``."""
    here = everywhere(query, kernel_size)
    there = footprint(key, kernel_size, dilation)
    if relation == 'summation':
        return here + there
    if relation == 'subtraction':
        return here - there
    if relation == 'concatenation':
        return torch.cat([here, there], dim=1)
    if relation == 'hadamard':
        return here * there
    if relation == 'dot':
        return (here * there).sum(dim=1, keepdim=True)
    raise ValueError(f'no pairwise relation {relation!r}')


def patchwise_delta(query: torch.Tensor, key: torch.Tensor, relation: str, kernel_size: int, dilation: int):
    """``delta(x_R(i))`` for each pixel i: ``(N, width, H, W)``.

    Channels: concatenation has the r of phi(x_i), then psi with the channel outermost; star has one per footprint
    position; clique has one per pair of positions (j, k), j outermost.
    """
    positions = range(kernel_size ** 2)
    there = footprint(key, kernel_size, dilation)
    if relation == 'concatenation':
        return torch.cat([query, there.flatten(1, 2)], dim=1)
    if relation == 'star':
        return torch.stack([(query * there[:, :, j]).sum(dim=1) for j in positions], dim=1)
    if relation == 'clique':
        left = footprint(query, kernel_size, dilation)
        pairs = [(left[:, :, j] * there[:, :, k]).sum(dim=1) for j in positions for k in positions]
        return torch.stack(pairs, dim=1)
    raise ValueError(f'no patchwise relation {relation!r}')


def gamma(relation: torch.Tensor, params: State, training: bool, running: State) -> torch.Tensor:
    """The weight MLP: norm, ReLU, linear (no bias), norm, ReLU, linear."""
    hidden = relu(batch_norm(relation, params, 'conv_w.0', training, running))
    hidden = linear_map(hidden, params, 'conv_w.2')
    hidden = relu(batch_norm(hidden, params, 'conv_w.3', training, running))
    return linear_map(hidden, params, 'conv_w.5')


def softmax_over_footprint(logits: torch.Tensor) -> torch.Tensor:
    exponential = (logits - logits.amax(dim=2, keepdim=True).detach()).exp()
    return exponential / exponential.sum(dim=2, keepdim=True)


def aggregate(weights: torch.Tensor, value: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """``y[c] = sum_o w[c mod cw, o] * value[c, i + o]``: the sharers of a weight channel lie ``cw`` channels apart."""
    weight_channels = weights.shape[1]
    weight_of = [channel % weight_channels for channel in range(value.shape[1])]
    return (weights[:, weight_of] * footprint(value, kernel_size, dilation)).sum(dim=2)


def attention(
        x: torch.Tensor,
        params: State,
        attention: str = 'pairwise',
        relation: str | None = None,
        position: str = 'relative',
        position_ref_size: int | None = None,
        kernel_size: int = 7,
        dilation: int = 1,
        share: int = 8,
        training: bool = False,
) -> tuple[torch.Tensor, State]:
    """One self-attention layer (CVPR 2020, eqs. 2-4): ``(N, C, H, W) -> (N, m, H, W)``.

    Args:
        x: The input.
        params: ``conv1`` phi, ``conv2`` psi, ``conv3`` beta, ``conv_p`` positions, ``conv_w.{0,2,3,5}`` gamma.
        attention: 'pairwise' or 'patchwise'.
        relation: One of the five pairwise or three patchwise relations; by default the released models'.
        position: 'relative', 'absolute' or 'none' (pairwise only).
        position_ref_size: Size in pixels of the map whose coordinate step is used; None means the map itself.
        kernel_size: Side of the footprint.
        dilation: Distance of neighbouring footprint positions.
        share: Number of value channels that share one weight.
        training: Normalise by the batch's statistics.

    Returns:
        The output, and in training the new running statistics of gamma's two norms by name (else an empty dict).
    """
    relation = relation or RELEASED_RELATION[attention]
    query, key, value = (linear_map(x, params, name) for name in ('conv1', 'conv2', 'conv3'))
    count, channels, height, width = value.shape
    running = {}
    if attention == 'pairwise':
        delta = pairwise_delta(query, key, relation, kernel_size, dilation)
        if position != 'none':
            places = position_channels(x, params, position, position_ref_size, kernel_size, dilation)
            delta = torch.cat([delta, places], dim=1)
        weights = softmax_over_footprint(gamma(delta, params, training, running))
    else:
        delta = patchwise_delta(query, key, relation, kernel_size, dilation)
        weights = gamma(delta, params, training, running)
        weights = weights.reshape(count, channels // share, kernel_size ** 2, height, width)
    assert weights.shape == (count, channels // share, kernel_size ** 2, height, width)
    return aggregate(weights, value, kernel_size, dilation), running


# --- The network -----------------------------------------------------------------------------------------------------

def under(state: State, prefix: str) -> State:
    """The entries below ``prefix``, named without it."""
    return {name[len(prefix):]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def block(x: torch.Tensor, params: State, training: bool, running: State, bound: float | None = None,
          **options) -> torch.Tensor:
    """``x + conv(relu(bn2(attention(relu(bn1(x))))))``: the pre-activation residual block; ``params`` as released.

    Ours, not the paper's: the first ReLU may have an upper ``bound``.
    """
    y = relu(batch_norm(x, params, 'bn1', training, running))
    if bound is not None:
        y = torch.where(y > bound, torch.full_like(y, bound), y)
    y, inner = attention(y, under(params, 'sam.'), training=training, **options)
    running.update({f'sam.{name}': tensor for name, tensor in inner.items()})
    y = relu(batch_norm(y, params, 'bn2', training, running))
    return x + linear_map(y, params, 'conv')


def network(
        image: torch.Tensor,
        state: State,
        attention: str,
        depths: Sequence[int],
        kernels: Sequence[int],
        training: bool = False,
        output_stride: int = 32,
        position_ref_size: int | None = None,
        relation: str | None = None,
        position: str = 'relative',
        share: int = 8,
        bound: float | None = None,
) -> dict:
    """The whole SAN (CVPR 2020, table 1).

    ``position_ref_size`` is the image size whose positions' steps are used at each stage.  Where ``output_stride`` is
    reached, a stage does not pool and doubles the dilation of its footprints instead.

    Returns:
        ``logits``; ``features``, the five stages' outputs after their norm and ReLU; ``running``, in training, the new
        running statistics of every norm by name.
    """
    running = {}
    x = relu(batch_norm(linear_map(image, state, 'conv_in'), state, 'bn_in', training, running))
    stride, dilation = 1, 1
    features = []
    for stage, (depth, kernel_size) in enumerate(zip(depths, kernels)):
        if stride < output_stride:
            x = max_pool(x)
            stride *= 2
        else:
            dilation *= 2
        x = linear_map(x, state, f'conv{stage}')
        reference = None if position_ref_size is None else position_ref_size // 2 ** (stage + 1)
        for index in range(depth):
            inner = {}
            x = block(x, under(state, f'layer{stage}.{index}.'), training, inner, bound, attention=attention,
                      relation=relation, position=position, position_ref_size=reference, kernel_size=kernel_size,
                      dilation=dilation, share=share)
            running.update({f'layer{stage}.{index}.{name}': tensor for name, tensor in inner.items()})
        x = relu(batch_norm(x, state, f'bn{stage}', training, running))
        features.append(x)
    logits = linear_map(x.mean(dim=(2, 3)), state, 'fc')
    return dict(logits=logits, features=features, running=running)


# --- States ----------------------------------------------------------------------------------------------------------

def is_parameter(name: str) -> bool:
    """Whether a state entry is learned by gradient descent."""
    return not name.endswith(('running_mean', 'running_var', 'num_batches_tracked'))


def attention_shapes(spec: Spec, channels: int, kernel_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one attention layer: r = C/16 relation channels, m = C/4 outputs, m/share weight channels."""
    relation, out = channels // 16, channels // 4
    weights = out // spec.share
    width = relation_width(spec.attention, spec.delta, relation, kernel_size)
    shapes = {}
    for name, planes in (('conv1', relation), ('conv2', relation), ('conv3', out)):
        shapes.update(conv_shapes(name, channels, planes, bias=True))
    if spec.attention == 'patchwise':
        hidden, last = weights, weights * kernel_size ** 2
    else:
        hidden, last = relation, weights
        if spec.position != 'none':
            shapes.update(conv_shapes('conv_p', 2, 2, bias=True))
            width += 2
    shapes.update(norm_shapes('conv_w.0', width))
    shapes.update(conv_shapes('conv_w.2', width, hidden, bias=False))
    shapes.update(norm_shapes('conv_w.3', hidden))
    shapes.update(conv_shapes('conv_w.5', hidden, last, bias=True))
    return shapes


def conv_shapes(name: str, inputs: int, outputs: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes = {f'{name}.weight': (outputs, inputs, 1, 1)}
    if bias:
        shapes[f'{name}.bias'] = (outputs,)
    return shapes


def norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    shapes = {f'{name}.{entry}': (channels,) for entry in ('weight', 'bias', 'running_mean', 'running_var')}
    return {**shapes, f'{name}.num_batches_tracked': ()}


def state_shapes(name_or_spec: str | Spec, num_classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a released checkpoint."""
    spec = as_spec(name_or_spec)
    shapes = {**conv_shapes('conv_in', spec.in_chans, spec.stem, bias=False), **norm_shapes('bn_in', spec.stem)}
    inputs = spec.stem
    for stage, (depth, kernel_size, channels) in enumerate(zip(spec.depths, spec.kernels, spec.widths)):
        shapes.update(conv_shapes(f'conv{stage}', inputs, channels, bias=False))
        for index in range(depth):
            inner = norm_shapes('bn1', channels)
            attention_layer = attention_shapes(spec, channels, kernel_size)
            inner.update({f'sam.{name}': shape for name, shape in attention_layer.items()})
            inner.update(norm_shapes('bn2', channels // 4))
            inner.update(conv_shapes('conv', channels // 4, channels, bias=True))
            shapes.update({f'layer{stage}.{index}.{name}': shape for name, shape in inner.items()})
        shapes.update(norm_shapes(f'bn{stage}', channels))
        inputs = channels
    shapes.update({'fc.weight': (num_classes, inputs), 'fc.bias': (num_classes,)})
    return shapes


def random_tensor(name: str, shape: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
    """A value that keeps activations near unit size: small biases, norms' scales and variances around 1."""
    if name.endswith('num_batches_tracked'):
        return torch.tensor(0)
    if name.endswith('running_var') or (name.endswith('.weight') and len(shape) == 1):
        return 0.75 + 0.5 * torch.rand(shape, generator=draw, dtype=torch.float64)
    normal = torch.randn(shape, generator=draw, dtype=torch.float64)
    if name.endswith(('.bias', 'running_mean')):
        return 0.1 * normal
    return normal * (2 / shape[1]) ** 0.5 * (0.3 if name.endswith('.conv.weight') else 1)


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> State:
    draw = torch.Generator().manual_seed(seed)
    return {name: random_tensor(name, shape, draw) for name, shape in shapes.items()}


def settle(state: State, spec: Spec, draw: torch.Generator) -> None:
    """Give every norm the statistics of a random batch, a little off and never much smaller than their mean.

    Without norms that fit their inputs the patchwise models, each block of which is of second degree in its input,
    overflow in evaluation mode.
    """
    image = torch.randn(2, spec.in_chans, 64, 64, generator=draw, dtype=torch.float64)
    for name, new in network(image, state, training=True, **spec.structure())['running'].items():
        batch = (new - (1 - BN_MOMENTUM) * state[name]) / BN_MOMENTUM
        if name.endswith('running_var'):
            noise = torch.rand(batch.shape, generator=draw, dtype=torch.float64)
            state[name] = batch.clamp(min=batch.mean()) * (1 + 0.2 * noise)
        else:
            state[name] = batch + 0.1 * torch.randn(batch.shape, generator=draw, dtype=torch.float64)


def random_state(
        name_or_spec: str | Spec, seed: int, num_classes: int = 1000, dtype: torch.dtype = torch.float64,
) -> State:
    """A made-up state of the right names and shapes, in which no norm's statistics are trivial."""
    spec = as_spec(name_or_spec)
    state = random_tensors(state_shapes(spec, num_classes), seed)
    settle(state, spec, torch.Generator().manual_seed(seed + 1))
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def released_checkpoint(state: State, module_prefix: bool = True, wrap: bool = True) -> dict:
    """The dictionary that the authors' files hold: from a DataParallel model, beside the trainer's own entries."""
    prefix = 'module.' if module_prefix else ''
    renamed = {prefix + name: tensor for name, tensor in state.items()}
    return {'state_dict': renamed, 'epoch': 100} if wrap else renamed


# --- Costs -----------------------------------------------------------------------------------------------------------

def parameter_count(name_or_spec: str | Spec, num_classes: int = 1000) -> int:
    shapes = state_shapes(name_or_spec, num_classes)
    return sum(torch.Size(shape).numel() for name, shape in shapes.items() if is_parameter(name))


def attention_multiply_adds(spec: Spec, channels: int, kernel_size: int, pixels: int) -> int:
    """Linear maps and aggregation of one attention layer with the released relations; the softmax is not counted."""
    relation, out, area = channels // 16, channels // 4, kernel_size ** 2
    weights = out // spec.share
    width = relation_width(spec.attention, spec.delta, relation, kernel_size)
    total = pixels * channels * (relation + relation + out)
    if spec.attention == 'pairwise':
        if spec.position != 'none':
            total += pixels * 2 * 2
            width += 2
        total += pixels * area * (width * relation + relation * weights)
    else:
        total += pixels * (width * weights + weights * area * weights)
    return total + pixels * area * out


def multiply_adds(name_or_spec: str | Spec, size: int = 224, num_classes: int = 1000) -> int:
    """Multiply-adds of all linear maps and aggregations for one square image."""
    spec = as_spec(name_or_spec)
    total = size ** 2 * spec.in_chans * spec.stem
    inputs = spec.stem
    for depth, kernel_size, channels in zip(spec.depths, spec.kernels, spec.widths):
        size //= 2
        pixels = size ** 2
        total += pixels * inputs * channels
        per_block = attention_multiply_adds(spec, channels, kernel_size, pixels) + pixels * channels // 4 * channels
        total += depth * per_block
        inputs = channels
    return total + inputs * num_classes


def small_spec(**changes) -> Spec:
    """A SAN small enough for many float64 passes: five stages of one block, all widths different."""
    small = Spec(depths=(1, 1, 1, 1, 1), kernels=(3, 5, 3, 5, 3), widths=(64, 96, 64, 96, 128))
    return replace(small, **changes)
