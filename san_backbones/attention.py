"""The two attention layers of SAN and their parameters (Zhao, Jia, Koltun, CVPR 2020, section 3).

Names of the paper's letters: phi is `query`, psi `key`, beta `value`, gamma `weight_mlp`, delta `relation`; `position`
maps coordinates. The computation is in `san_backbones.ops`.
"""
import operator
from collections import OrderedDict
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import fuse, ops
from .activations import make_act
from .checks import check_dtype, is_integer, one_of
from .layers import POINTWISE, RELU, SEQUENTIAL, Kind, has_bias, obstacle
from .norms import BATCH_NORM, as_norm, norm_constructor
from .ops import geometry, traced

__all__ = ['FootprintAttention', 'PairwiseAttention', 'PatchwiseAttention']


_GAMMA = dict(norm1=BATCH_NORM, act1=RELU, fc1=POINTWISE, norm2=BATCH_NORM, act2=RELU, fc2=POINTWISE)


def _weight_mlp(width: int, hidden: int, out: int, norm_layer: Any, act_layer: Any, dd: dict) -> nn.Sequential:
    """gamma: Norm, ReLU, Linear (no bias), Norm, ReLU, Linear."""
    norm_layer = norm_constructor(norm_layer)
    return nn.Sequential(OrderedDict([
        ('norm1', norm_layer(width, **dd)),
        ('act1', make_act(act_layer)),
        ('fc1', nn.Conv2d(width, hidden, 1, bias=False, **dd)),
        ('norm2', norm_layer(hidden, **dd)),
        ('act2', make_act(act_layer)),
        ('fc2', nn.Conv2d(hidden, out, 1, **dd)),
    ]))


class FootprintAttention(nn.Module):
    """Base of both forms: phi, psi, beta, gamma, and the call of the operators."""

    __jit_unused_properties__: list[str] = ['dim', 'rel_planes', 'out_planes']
    pairwise: bool = True
    relations: tuple[str, ...] = ()

    def __init__(
            self,
            dim: int,
            rel_planes: int | None,
            out_planes: int | None,
            share_planes: int,
            kernel_size: int,
            dilation: int,
            relation: str,
            position: str,
            position_ref_size: int | None,
            norm_layer: type[nn.Module] | str,
            act_layer: type[nn.Module] | str,
            dd: dict[str, Any],
    ):
        super().__init__()
        if not is_integer(dim):
            raise ValueError(f'dim must be a positive integer, got {dim!r}')
        rel_planes = dim // 16 if rel_planes is None else rel_planes
        out_planes = dim // 4 if out_planes is None else out_planes
        if not is_integer(kernel_size) or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be an odd positive integer (a footprint has a centre), '
                             f'got {kernel_size!r}')
        if not is_integer(dilation):
            raise ValueError(f'dilation must be a positive integer, got {dilation!r}')
        if not all(map(is_integer, (rel_planes, out_planes, share_planes))) or out_planes % share_planes:
            raise ValueError(
                'rel_planes, out_planes and share_planes must be positive integers and out_planes a multiple of '
                'share_planes, got '
                f'rel_planes={rel_planes}, out_planes={out_planes}, share_planes={share_planes} (dim={dim}); '
                'with the defaults dim must be a multiple of 32')
        if position_ref_size is not None and not is_integer(position_ref_size, 2):
            raise ValueError(f'position_ref_size must be None or a map size of at least 2 pixels, '
                             f'got {position_ref_size!r}')
        self._made = (dim, rel_planes, out_planes)
        self.share_planes: int = share_planes
        self.kernel_size: int = kernel_size
        self.dilation: int = dilation
        self.relation: str = one_of(f'relation of {type(self).__name__}', relation, self.relations)
        self.position_mode: str = one_of('position', position, ops.POSITIONS)
        self.position_ref_size: int | None = position_ref_size
        # one step of the footprint spans what one pixel spans on the reference map, whatever the dilation
        self.position_step: float = 0. if position_ref_size is None else 2. / (position_ref_size - 1) / dilation
        self.is_pairwise: bool = self.pairwise  # TorchScript sees instance attributes only

        self.query: nn.Conv2d = nn.Conv2d(dim, rel_planes, 1, **dd)
        self.key: nn.Conv2d = nn.Conv2d(dim, rel_planes, 1, **dd)
        self.value: nn.Conv2d = nn.Conv2d(dim, out_planes, 1, **dd)
        self.position: nn.Conv2d | None = None if position == 'none' else nn.Conv2d(2, 2, 1, **dd)
        weight_planes = out_planes // share_planes
        width = ops.relations.find(self.pairwise, relation).width(rel_planes, kernel_size ** 2, position != 'none')
        hidden, out = self._weight_mlp_widths(rel_planes, weight_planes)
        self.weight_mlp: nn.Sequential = _weight_mlp(width, hidden, out, norm_layer, act_layer, dd)

    # read from the layers, since tools may have pruned them; as constructed if another module replaces one
    @property
    def dim(self) -> int:
        """Channels of the input."""
        return getattr(self.query, 'in_channels', self._made[0])

    @property
    def rel_planes(self) -> int:
        """Channels of phi and psi."""
        return getattr(self.query, 'out_channels', self._made[1])

    @property
    def out_planes(self) -> int:
        """Channels of beta and of the output."""
        return getattr(self.value, 'out_channels', self._made[2])

    def _weight_mlp_widths(self, r: int, weight_planes: int) -> tuple[int, int]:
        """Hidden width and outputs of gamma."""
        raise NotImplementedError

    def place(self, x: Tensor) -> Tensor | None:
        """Returns p, the mapped coordinates of the pixels of x, (1, 2, H, W), or None without positions.

        Does not call the convolution: half precision and autocast would round the coordinates.
        """
        position = self.position
        if position is None:
            return None
        xy = geometry.coordinates(x, self.position_step)
        if not torch.jit.is_scripting():
            mapped = self._place_by_module(xy)
            if mapped is not None:
                return mapped
        weight, bias = position.weight.to(xy.dtype), position.bias
        assert bias is not None
        mapped = weight[:, 0] * xy[0] + weight[:, 1] * xy[1] + bias.to(xy.dtype)[:, None, None]
        return mapped.unsqueeze(0)

    @torch.jit.ignore
    def _place_by_module(self, xy: Tensor) -> Tensor | None:
        """Calls the position layer if it is more than a plain convolution (hooks, an adapter); else returns None."""
        position: Any = self.position
        if isinstance(xy, torch.fx.Proxy) or POINTWISE.fits(position):
            return None
        like = next(position.parameters(), xy)
        with torch.autocast('cpu' if xy.device.type == 'meta' else xy.device.type, enabled=False):
            return position(xy.unsqueeze(0).to(like.dtype)).to(xy.dtype)

    def _forward_modules(self, query: Tensor, key: Tensor, value: Tensor, place: Tensor | None) -> Tensor:
        """Runs the traced form with gamma called as a module: for exports, and for any other norm or layer."""
        relation = traced.relate(
            query, key, place, self.is_pairwise, self.relation, self.position_mode, self.kernel_size, self.dilation)
        return traced.aggregate(
            self.weight_mlp(relation), value, self.is_pairwise, self.kernel_size, self.dilation)

    def gamma_is_plain(self) -> bool:
        """Whether gamma is what `ops.Gamma` describes: batch norms (or none), ReLUs, 1x1 convolutions, and no hooks."""
        mlp: Any = self.weight_mlp
        if not SEQUENTIAL.fits(mlp) or list(mlp._modules) != list(_GAMMA) or obstacle(mlp, _GAMMA) is not None:
            return False
        return has_bias(mlp.fc2) and (not has_bias(mlp.fc1) or isinstance(mlp.norm2, nn.Identity))

    @torch.jit.ignore
    def gamma(self) -> ops.Gamma:
        """Returns gamma, the mapping from relations to weights, as the operators take it."""
        mlp: Any = self.weight_mlp
        weight1 = mlp.fc1.weight  # read once: a parametrisation computes it on each access
        return ops.Gamma(
            as_norm(mlp.norm1, weight1[0, :, 0, 0]), weight1,
            as_norm(mlp.norm2, weight1[:, 0, 0, 0], mlp.fc1.bias), mlp.fc2.weight, mlp.fc2.bias)

    @torch.jit.ignore
    def obstacle(self, name: str) -> str | None:
        """Says why this layer, called `name` in messages, cannot be folded; None if it can."""
        if not _ATTENTION.fits(self):
            return f'{name} is a {type(self).__name__} and not a {_ATTENTION.name} without hooks'
        found = obstacle(self, dict.fromkeys(('query', 'key', 'value'), POINTWISE), f'{name}.')
        if found is None and not self.gamma_is_plain():
            found = f'{name} has other layers than it was made with, or a hook'
        return found

    @torch.jit.ignore
    def projections(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Returns phi, psi and scale * beta as one linear map: weight (2 r + m, dim) and bias, in float32 or wider."""
        query, key, (weight, bias) = (fuse.linear_of(conv) for conv in (self.query, self.key, self.value))
        weights, biases = zip(query, key, (weight * scale[:, None], bias * scale))
        return torch.cat(weights), torch.cat(biases)

    @torch.jit.ignore
    def spec(self) -> ops.Spec:
        """Returns form, relation, position and footprint as the operators take them."""
        size, dilation = operator.index(self.kernel_size), operator.index(self.dilation)  # torch 2.4 makes symbols
        return ops.Spec(self.is_pairwise, self.relation, self.position_mode, size, dilation)

    @torch.jit.ignore
    def _check(self, x: Tensor) -> None:
        if isinstance(x, Tensor) and (x.dim() != 4 or x.shape[1] != self.dim or 0 in x.shape[2:]):
            raise ValueError(f'expected a map of shape (N, {self.dim}, H, W) with H and W at least 1, '
                             f'got {list(x.shape)}')
        if isinstance(x, Tensor):
            if not x.is_floating_point():
                raise ValueError(f'expected a map of a floating dtype, got {x.dtype}: convert it, as in x.float()')
            check_dtype(x, self.query)

    @torch.jit.ignore
    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """phi, psi and beta of x by one convolution, which reads x once; None where they must be called as modules."""
        convs: Any = (self.query, self.key, self.value)
        if not isinstance(x, Tensor) or ops.symbolic_caller(x) is not None \
                or not all(POINTWISE.fits(conv) and has_bias(conv) for conv in convs):
            return None
        weights, biases = zip(*((conv.weight, conv.bias) for conv in convs))
        query, key, value = F.conv2d(x, torch.cat(weights), torch.cat(biases)).split([len(y) for y in weights], 1)
        return query, key, value

    @torch.jit.ignore
    def _forward_operators(self, query: Tensor, key: Tensor, value: Tensor, place: Tensor | None) -> Tensor:
        if isinstance(value, torch.fx.Proxy) or torch.jit.is_tracing() \
                or (ops.is_compiling(value) and ops.is_exporting()) or not self.gamma_is_plain():
            return self._forward_modules(query, key, value, place)  # keeps gamma's layers and their names
        return ops.footprint_attention(query, key, value, place, self.gamma(), self.spec())

    def forward(self, x: Tensor) -> Tensor:
        """Attends to the footprint of every pixel.

        Args:
            x: (N, dim, H, W), H and W at least 1.

        Returns:
            (N, out_planes, H, W) in the dtype of the value projection.

        Raises:
            ValueError: x has another shape, or another dtype than the weights, or batch statistics would be taken
                over a single value.
        """
        if not torch.jit.is_scripting():
            self._check(x)
        joint = None if torch.jit.is_scripting() else self._project(x)
        query, key, value = (self.query(x), self.key(x), self.value(x)) if joint is None else joint
        place = self.place(x)
        if torch.jit.is_scripting():
            return self._forward_modules(query, key, value, place)
        return self._forward_operators(query, key, value, place)

    def extra_repr(self) -> str:
        text = f'{self.relation}, kernel_size={self.kernel_size}, dilation={self.dilation}'
        if self.is_pairwise:
            text += f', position={self.position_mode}, position_ref_size={self.position_ref_size}'
        return text


_ATTENTION = Kind.by_forward('SAN attention', FootprintAttention.forward)


class PairwiseAttention(FootprintAttention):
    """Pairwise self-attention (section 3.1): the weight of a neighbour depends on the pair of pixels only.

        y_i = sum_{j in R(i)} softmax_j( gamma([delta(x_i, x_j), p_i - p_j]) ) * beta(x_j)

    A new layer multiplies torch's initial weights of gamma's last linear map by four: otherwise the softmax is flat and
    the layer starts by blurring its footprint. The paper leaves the initialisation open.

    Args:
        dim: Channels of the input.
        rel_planes: Channels r of phi and psi; default dim // 16.
        out_planes: Channels m of beta and of the output; default dim // 4.
        share_planes: Channels that share one attention weight; they are out_planes / share_planes apart.
        kernel_size: Footprint size k, odd.
        dilation: Pixels between neighbours of a footprint.
        relation: delta, one of `ops.PAIRWISE_RELATIONS`.
        position: 'relative' appends p_i - p_j to the relation, 'absolute' p_j, 'none' nothing.
        position_ref_size: Side in pixels of the map whose coordinate step is used at every size; None spans [-1, 1]
            over the given map, as the released models do. With dilation d, d pixels span one such step.
        norm_layer: Norm of gamma, called with the number of channels, or timm's name of one. Batch norms run on every
            backend, others on the plain definition, whose memory grows with k * k.
        act_layer: Activations of gamma, or timm's name of one. Activations other than ReLU run on the plain
            definition too.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: An option is out of range; the message says what is allowed.
    """
    pairwise: bool = True
    relations: tuple[str, ...] = ops.PAIRWISE_RELATIONS

    def __init__(
            self,
            dim: int,
            rel_planes: int | None = None,
            out_planes: int | None = None,
            share_planes: int = 8,
            kernel_size: int = 7,
            dilation: int = 1,
            relation: str = 'subtraction',
            position: str = 'relative',
            position_ref_size: int | None = None,
            norm_layer: type[nn.Module] | str = nn.BatchNorm2d,
            act_layer: type[nn.Module] | str = nn.ReLU,
            device: Any = None,
            dtype: Any = None,
    ):
        super().__init__(dim, rel_planes, out_planes, share_planes, kernel_size, dilation, relation, position,
                         position_ref_size, norm_layer, act_layer, {'device': device, 'dtype': dtype})
        self._begin_sharp()

    @torch.no_grad()
    def _begin_sharp(self) -> None:
        fc2: Any = self.weight_mlp.fc2
        fc2.weight.mul_(4)  # not the bias: all neighbours share it, so the softmax cancels it

    def _weight_mlp_widths(self, r: int, weight_planes: int) -> tuple[int, int]:
        return r, weight_planes


class PatchwiseAttention(FootprintAttention):
    """Patchwise self-attention (section 3.2): all weights of a footprint depend on the whole footprint.

        y_i = sum_{j in R(i)} gamma( delta(x_R(i)) )_j * beta(x_j)

    A new layer starts near a convolution with fixed random kernels, one for each weight channel: they are the bias of
    gamma's last linear map, and its weights are small. The paper leaves the initialisation open.

    Args:
        dim: Channels of the input.
        rel_planes: Channels r of phi and psi; default dim // 16.
        out_planes: Channels m of beta and of the output; default dim // 4.
        share_planes: Channels that share one attention weight; they are out_planes / share_planes apart.
        kernel_size: Footprint size k, odd.
        dilation: Pixels between neighbours of a footprint.
        relation: delta, one of `ops.PATCHWISE_RELATIONS`.
        norm_layer: Norm of gamma, called with the number of channels, or timm's name of one. Batch norms run on every
            backend, others on the plain definition, whose memory grows with k * k.
        act_layer: Activations of gamma, or timm's name of one. Activations other than ReLU run on the plain
            definition too.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: An option is out of range; the message says what is allowed.
    """
    pairwise: bool = False
    relations: tuple[str, ...] = ops.PATCHWISE_RELATIONS

    def __init__(
            self,
            dim: int,
            rel_planes: int | None = None,
            out_planes: int | None = None,
            share_planes: int = 8,
            kernel_size: int = 7,
            dilation: int = 1,
            relation: str = 'concatenation',
            norm_layer: type[nn.Module] | str = nn.BatchNorm2d,
            act_layer: type[nn.Module] | str = nn.ReLU,
            device: Any = None,
            dtype: Any = None,
    ):
        super().__init__(dim, rel_planes, out_planes, share_planes, kernel_size, dilation, relation, 'none',
                         None, norm_layer, act_layer, {'device': device, 'dtype': dtype})
        self._begin_near_fixed_kernels()

    @torch.no_grad()
    def _begin_near_fixed_kernels(self) -> None:
        fc2: Any = self.weight_mlp.fc2
        fc2.weight.mul_(0.1)
        fc2.bias.normal_(std=1 / self.kernel_size)  # squares sum to 1 over a kernel: keeps the variance

    def _weight_mlp_widths(self, r: int, weight_planes: int) -> tuple[int, int]:
        return weight_planes, self.kernel_size ** 2 * weight_planes
