"""SAN: self-attention networks for image recognition.

Paper: `Exploring Self-attention for Image Recognition` - https://arxiv.org/abs/2004.13621
(Zhao, Jia, Koltun, CVPR 2020)

A convolution aggregates features over a footprint and transforms them. SAN keeps the transformation (1x1 convolutions
and nonlinearities) and aggregates by self-attention over the footprint, with vector weights: one weight per group of
channels, not one scalar per position. The pairwise form weighs a neighbour by the pair of pixels, the patchwise form
produces the weights of a footprint from the whole footprint.
"""
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
    resolve_pretrained_cfg,
)
from timm.models._features import FeatureListNet, feature_take_indices
from torch.utils.checkpoint import checkpoint

from . import fuse, hub, ops
from .activations import PLAIN_RELUS, BoundedReLU, ReLU, is_setting, may_write_over, resolve_bound
from .attention import PairwiseAttention, PatchwiseAttention
from .norms import (
    as_norm,
    check_dtype,
    has_bias,
    has_process_wide_hooks,
    is_batch_norm,
    is_integer,
    is_plain,
    is_pointwise,
    make_act,
    norm_constructor,
)
from .ops import PAIRWISE_RELATIONS, PATCHWISE_RELATIONS, POSITIONS, pointwise

__all__ = ['SAN']

# an attention layer stays one node of a traced feature extractor, so that it keeps its mode and its fast paths there
register_notrace_module(PairwiseAttention)
register_notrace_module(PatchwiseAttention)
register_notrace_module(BoundedReLU)
register_notrace_module(ReLU)

DEPTHS = {'san10': (2, 1, 2, 4, 1), 'san15': (3, 2, 3, 5, 2), 'san19': (3, 3, 4, 6, 3)}
RELATIONS: dict[str, tuple[str, ...]] = {'pairwise': PAIRWISE_RELATIONS, 'patchwise': PATCHWISE_RELATIONS}


class Pool(nn.MaxPool2d):
    """2x2 max pooling of stride 2. A side of one pixel stays one pixel, so that there is no least size of an image."""

    def __init__(self):
        super().__init__(2, 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, C, max(H // 2, 1), max(W // 2, 1))."""
        if self.is_by_twos():
            return pointwise.halve(input)
        return F.max_pool2d(  # type: ignore[call-overload]
            input, self.kernel_size, self.stride, self.padding, self.dilation, ceil_mode=self.ceil_mode,
            return_indices=self.return_indices)

    def is_by_twos(self) -> bool:
        """Whether nobody has changed it since."""
        return not self.ceil_mode and not self.return_indices and self.kernel_size == 2 and self.stride == 2 \
            and self.padding == 0 and self.dilation == 1


register_notrace_module(Pool)


class Stem(nn.Module):
    """1x1 convolution, norm, ReLU and 2x2 max pooling."""

    def __init__(
            self,
            in_chans: int,
            width: int,
            norm_layer: type[nn.Module] | str = nn.BatchNorm2d,
            act_layer: type[nn.Module] | str = nn.ReLU,
            device: Any = None,
            dtype: Any = None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv: nn.Conv2d = nn.Conv2d(in_chans, width, 1, bias=False, **dd)
        self.norm: nn.Module = norm_constructor(norm_layer)(width, **dd)
        self.act: nn.Module = make_act(act_layer)
        self.pool: Pool = Pool()

    @torch.jit.ignore
    def _forward_operator(self, x: torch.Tensor) -> torch.Tensor | None:
        conv, norm = self.conv, self.norm
        if isinstance(x, torch.Tensor):
            check_dtype(x, conv)
        if isinstance(x, torch.fx.Proxy) or not is_pointwise(conv) or not is_batch_norm(norm) \
                or not is_plain(self.act, PLAIN_RELUS) or not is_plain(self.pool, (Pool.forward,)) \
                or not self.pool.is_by_twos() \
                or (has_bias(conv) and not isinstance(norm, nn.Identity)) or not ops.serves(x):
            return None
        if 1 in x.shape[2:]:
            return None
        weight = conv.weight.flatten(1)  # once: a parametrisation computes it
        return ops.stem(x, weight, as_norm(norm, weight[:, 0], conv.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) to (N, width, H // 2, W // 2), at least a pixel; on the CPU in channels_last format."""
        if not torch.jit.is_scripting():
            pooled = self._forward_operator(x)
            if pooled is not None:
                return pooled
        return self.pool(self.act(self.norm(self.conv(x))))


class _SpareBuffers:
    """Lets the module work on copies of its buffers, so that computing it again counts no batch a second time.

    Entered once for each recomputation, of which each backward pass makes one.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self) -> None:
        self.kept = [(owner, name, buffer) for owner in self.module.modules()
                     for name, buffer in owner.named_buffers(recurse=False)]
        for owner, name, buffer in self.kept:
            setattr(owner, name, buffer.clone())

    def __exit__(self, *_: Any) -> None:
        for owner, name, buffer in self.kept:
            setattr(owner, name, buffer)


class Block(nn.Module):
    """Pre-activation residual block: x + conv1x1( relu(norm2( attn( relu(norm1(x)) ) )) ).

    The first ReLU may have an upper bound.
    """

    def __init__(
            self,
            dim: int,
            attention: Callable[..., PairwiseAttention | PatchwiseAttention],
            norm_layer: type[nn.Module] | str = nn.BatchNorm2d,
            act_layer: type[nn.Module] | str = nn.ReLU,
            drop_path: float = 0.,
            act1_layer: Callable[..., nn.Module] | None = None,
            device: Any = None,
            dtype: Any = None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        make_norm = norm_constructor(norm_layer)
        self.norm1: nn.Module = make_norm(dim, **dd)
        self.act1: nn.Module = make_act(act_layer) if act1_layer is None else act1_layer(inplace=True, **dd)
        self.attn: PairwiseAttention | PatchwiseAttention = attention(dim, **dd)
        self.norm2: nn.Module = make_norm(self.attn.out_planes, **dd)
        self.act2: nn.Module = make_act(act_layer)
        self.conv: nn.Conv2d = nn.Conv2d(self.attn.out_planes, dim, 1, **dd)
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, dim, H, W) to the same."""
        residual = x
        x = self.norm1(x)
        if not torch.jit.is_scripting():
            if x is residual:  # no norm: what follows may write over it
                x = x.clone()
        x = self.act1(x)
        x = self.attn(x)
        x = self.act2(self.norm2(x))
        x = self.drop_path(self.conv(x))
        # in place: one map less to find memory for
        return x.add_(residual) if may_write_over() else x + residual

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if isinstance(self.act1, BoundedReLU) and any(name.startswith(f'{prefix}conv.') for name in state_dict):
            self.act1.follow(state_dict.get(f'{prefix}act1.bound'), self.attn.query.weight)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Stage(nn.Module):
    """Max pool (unless the stem pooled, or dilated instead), 1x1 conv to the stage width, blocks, norm, ReLU."""

    block_type: type[Block] = Block

    def __init__(
            self,
            in_dim: int,
            dim: int,
            depth: int,
            attention: Callable[..., PairwiseAttention | PatchwiseAttention],
            downsample: bool = True,
            norm_layer: type[nn.Module] | str = nn.BatchNorm2d,
            act_layer: type[nn.Module] | str = nn.ReLU,
            drop_path_rates: Sequence[float] = (),
            act1_layer: Callable[..., nn.Module] | None = None,
            device: Any = None,
            dtype: Any = None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grad_checkpointing: bool = False
        self._folding = False
        self._folded: list[fuse.FoldedStage | None] = [None]
        # norm and act come last in forward; registered here, tools that fuse a norm into the convolution registered
        # before it (mmcv's fuse_conv_bn) leave them alone
        self.norm: nn.Module = norm_constructor(norm_layer)(dim, **dd)
        self.act: nn.Module = make_act(act_layer)
        self.pool: nn.Module = Pool() if downsample else nn.Identity()
        self.conv: nn.Conv2d = nn.Conv2d(in_dim, dim, 1, bias=False, **dd)
        self.blocks: nn.Sequential = nn.Sequential(*[
            Block(dim, attention, norm_layer=norm_layer, act_layer=act_layer, act1_layer=act1_layer,
                  drop_path=drop_path_rates[i] if drop_path_rates else 0., **dd)
            for i in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_dim, H, W) to (N, dim, H // 2, W // 2), at least a pixel, or to (N, dim, H, W)."""
        x = self.conv(self.pool(x))
        if not torch.jit.is_scripting():
            if ops.is_exporting():
                # the residual reads the convolution as well as the first norm, which PyTorch 2 Export Quantization
                # would fold into it
                x = x.clone()
            if self._folding:
                folded = self._inference_form(x)
                if folded is not None:
                    return folded(x)
            if self.grad_checkpointing:
                for block in self.blocks:
                    x = self._checkpointed(block, x)
                return self.act(self.norm(x))
        return self.act(self.norm(self.blocks(x)))

    @torch.jit.ignore
    def _checkpointed(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """block(x), computed again in the backward pass, where it leaves its running statistics alone."""
        if ops.is_compiling(x):  # which traces the block once, and takes no context
            return checkpoint(block, x, use_reentrant=False)
        return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _SpareBuffers(block)))

    @torch.jit.ignore
    def set_folding(self, enable: bool = True) -> None:
        """Runs folded for inference (`fuse_for_inference`); folds anew in the next call."""
        self._folding = enable
        self._folded = [None]

    @torch.jit.ignore
    def _inference_form(self, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The folded stage, if x calls for it."""
        if isinstance(x, torch.fx.Proxy) or ops.is_compiling(x):
            return None
        if self.training or torch.is_grad_enabled():
            self._folded = [None]  # trained: on a GPU not every write is seen
        if self.training or torch.is_autocast_enabled(x.device.type) or ops.symbolic_caller(x) is not None:
            return None
        if has_process_wide_hooks():
            return None
        if not ops.is_plain_tensor(x):
            return None  # what such tensors and modes make of a fold is of use to nobody else
        if torch.is_grad_enabled():
            warnings.warn('a model fused for inference was called where gradients are enabled, and runs unfused; call '
                      'it under torch.inference_mode() or torch.no_grad()', stacklevel=2)
            return None
        kept = self._folded  # a list that is replaced where folds become invalid: what is being folded then is not kept
        kept[0] = folded = fuse.folded(self, kept[0])
        return folded

    def _apply(self, fn, recurse=True):
        self._folded = [None]  # moved or converted
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_folded': [None]}


def _check_image(x: torch.Tensor, in_chans: int) -> None:
    if not torch.jit.is_scripting():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f'expected a tensor of images of shape (N, {in_chans}, H, W), got a {type(x).__name__}: '
                            'convert it, as with torch.from_numpy')
    if not x.is_floating_point():
        raise ValueError(f'expected images of a floating dtype, normalised, got {x.dtype}: convert them, as in '
                         'images.float() / 255')
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f'expected images of shape (N, {in_chans}, H, W), got {list(x.shape)}')
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f'expected images of at least one pixel, got {x.shape[2]} x {x.shape[3]}')


register_notrace_function(_check_image)
torch.fx.wrap('_check_image')


def _per_stage(name: str, value: int | Sequence[int], length: int, least: float) -> tuple[int, ...]:
    values = (value,) * length if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(values) != length or not all(is_integer(v, least) for v in values):
        raise ValueError(f'{name} must have one integer for each of the {length} stages of depths, got {value!r}')
    return values


class SAN(nn.Module):
    """Self-attention network.

    Args:
        attention: 'pairwise' or 'patchwise'.
        relation: Relation function delta; None takes the released models': 'subtraction' for pairwise (others:
            'summation', 'concatenation', 'hadamard', 'dot'), 'concatenation' for patchwise (others: 'star', 'clique').
        depths: Blocks per stage.
        widths: Channels per stage, multiples of 32 with the default ratios.
        kernel_sizes: Footprint size per stage, odd; one integer serves all stages.
        stem_width: Channels of the stem.
        share_planes: Channels that share one attention weight.
        position: Position channels of the pairwise form: 'relative', 'absolute' or 'none'. No effect on the patchwise
            form, which has no positions.
        position_ref_size: Image side in pixels whose coordinate steps are used at every image size, so that features
            do not depend on where in an image a patch lies (224 for weights trained at 224); None spans [-1, 1] over
            the image at hand, as the released models do. At least 2 pixels must remain in the last stage. No effect
            on the patchwise form.
        output_stride: 8, 16 or 32. Stages that would go beyond it keep the resolution and dilate their footprints.
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: Pooling of the head, '' for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, growing linearly over the blocks.
        relu_bound: Upper bound of the first ReLU of each block; 0 for none. None: what loaded weights were made
            with (the released ones: no bound), in a new network 6 for the patchwise form and no bound for the
            pairwise one. A number given here holds whatever is loaded. Other activations have none.
        norm_layer: Norm of all layers, called with the number of channels, or timm's name of one ('groupnorm1').
        act_layer: Activation of all layers, or timm's name of one ('gelu'). With norms other than batch norms or
            activations other than ReLU, the attention runs by its plain definition, whose memory grows with the
            footprint.
        device: Where parameters are made.
        dtype: Their dtype.

    Raises:
        ValueError: An option is out of range; the message says what is allowed.
    """

    def __init__(
            self,
            attention: str = 'patchwise',
            relation: str | None = None,
            depths: Sequence[int] = (3, 2, 3, 5, 2),
            widths: Sequence[int] = (64, 256, 512, 1024, 2048),
            kernel_sizes: int | Sequence[int] = (3, 7, 7, 7, 7),
            stem_width: int = 64,
            share_planes: int = 8,
            position: str = 'relative',
            position_ref_size: int | None = None,
            output_stride: int = 32,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            relu_bound: float | None = None,
            norm_layer: type[nn.Module] | str = nn.BatchNorm2d,
            act_layer: type[nn.Module] | str = nn.ReLU,
            device: Any = None,
            dtype: Any = None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if attention not in RELATIONS:
            raise ValueError(f"attention must be 'pairwise' or 'patchwise', got {attention!r}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride must be 8, 16 or 32, got {output_stride!r}')
        depths = tuple(depths)
        if not depths or not all(is_integer(depth, 0) for depth in depths):
            raise ValueError(f'depths must hold the number of blocks of each stage, got {depths!r}')
        for name, value in (('in_chans', in_chans), ('stem_width', stem_width), ('share_planes', share_planes)):
            if not is_integer(value):
                raise ValueError(f'{name} must be a positive integer, got {value!r}')
        if not 0 <= drop_rate <= 1:
            raise ValueError(f'drop_rate must be in [0, 1], got {drop_rate!r}')
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate!r}')
        if position not in POSITIONS:
            raise ValueError(f'position must be one of {", ".join(map(repr, POSITIONS))}, got {position!r}')
        widths = _per_stage('widths', widths, len(depths), 1)
        kernel_sizes = _per_stage('kernel_sizes', kernel_sizes, len(depths), -math.inf)  # layers say which they take
        if position_ref_size is not None and not (
                is_integer(position_ref_size, 2 ** (len(depths) + 1))):
            raise ValueError(
                f'position_ref_size must be None or an integer of at least {2 ** (len(depths) + 1)} (2 pixels in the '
                f'last of {len(depths)} stages), got {position_ref_size!r}')
        act1_layer = partial(BoundedReLU, resolve_bound(relu_bound, attention), relu_bound is not None)
        is_relu = type(make_act(act_layer)) is ReLU
        if relu_bound is not None and not is_relu:
            raise ValueError(f'relu_bound is the bound of a ReLU, got relu_bound={relu_bound!r} with '
                             f'act_layer={act_layer!r}: leave one of them out')
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.feature_info: list[dict[str, Any]] = []

        self.stem = Stem(in_chans, stem_width, norm_layer=norm_layer, act_layer=act_layer, **dd)
        drop_path_rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        stride, dilation, in_dim = 1, 1, stem_width
        for i, (depth, dim, kernel_size) in enumerate(zip(depths, widths, kernel_sizes)):
            downsample = stride < output_stride
            stride, dilation = (stride * 2, dilation) if downsample else (stride, dilation * 2)
            options: dict[str, Any] = dict(
                share_planes=share_planes, kernel_size=kernel_size, dilation=dilation, norm_layer=norm_layer,
                act_layer=act_layer)
            if relation is not None:
                options['relation'] = relation
            if attention == 'pairwise':
                ref = None if position_ref_size is None else position_ref_size // 2 ** (i + 1)
                layer: Callable[..., PairwiseAttention | PatchwiseAttention] = partial(
                    PairwiseAttention, position=position, position_ref_size=ref, **options)
            else:
                layer = partial(PatchwiseAttention, **options)
            stages.append(Stage(
                in_dim, dim, depth, layer, downsample=downsample and i > 0, norm_layer=norm_layer, act_layer=act_layer,
                act1_layer=act1_layer if is_relu else None, drop_path_rates=drop_path_rates[i], **dd))
            self.feature_info.append(dict(num_chs=dim, reduction=stride, module=f'stages.{i}'))
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        self.num_features = in_dim
        self._set_head(num_classes, global_pool, **dd)

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.load_state_dict`; the authors' released checkpoints are translated, however they get here."""
        if not any(name.startswith(('stem.', 'stages.')) for name in state_dict):
            state_dict = checkpoint_filter_fn(state_dict, self)
        return super().load_state_dict(state_dict, *args, **kwargs)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters exempt from weight decay beyond biases and norms: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put parameters into layer groups, for layer-wise learning rates."""
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.conv', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^stages\.(\d+)\.norm', (99999,)),  # with the last block of its stage
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        stages: Any = self.stages
        for stage in stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def fuse_for_inference(self) -> 'SAN':
        """Runs folded in eval mode without gradients; see `san_backbones.fuse_for_inference`."""
        fuse.fuse_for_inference(self)
        return self

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer, `nn.Identity` if there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier, keeping device, dtype and mode.

        Args:
            num_classes: Classes of the new classifier; 0 for none.
            global_pool: New pooling, '' for none; None keeps the present one.
        """
        like = self.stem.conv.weight  # the head itself may hold no parameter to tell device and dtype
        pool_type = self.head.global_pool.pool_type if global_pool is None else global_pool
        self._set_head(num_classes, pool_type, device=like.device, dtype=like.dtype)

    def _set_head(self, num_classes: int, global_pool: str, **dd: Any) -> None:
        if not is_integer(num_classes, 0):
            raise ValueError(f'num_classes must be a positive integer, or 0 for no classifier, got {num_classes!r}')
        self.num_classes: int = num_classes
        self.head: Any = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=self.drop_rate, **dd).train(self.training)
        self.head_hidden_size: int = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Forward features that returns the outputs of stages.

        Args:
            x: Images, (N, in_chans, H, W).
            indices: Last n stages if int, all if None, the given ones if a sequence.
            norm: Every stage ends with its own norm, so there is none to apply: no effect.
            stop_early: Stop after the last stage asked for.
            output_fmt: 'NCHW', the only one.
            intermediates_only: Return the stage outputs only.

        Returns:
            List of stage outputs, or (final features, list).
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        _check_image(x, self.in_chans)
        x = self.stem(x)
        if torch.jit.is_scripting() or not stop_early:  # can't slice in torchscript
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Removes the stages (and the head) that the given stage outputs do not need.

        Args:
            indices: As for `forward_intermediates`.
            prune_norm: No effect: every stage keeps its own norm.
            prune_head: Remove the classifier even where all stages stay.

        Returns:
            The indices of the stages taken, counted from the first.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if prune_end:
            self.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_chans, H, W) to the unpooled features of the last stage, (N, num_features, H', W')."""
        _check_image(x, self.in_chans)
        return self.stages(self.stem(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features of the last stage to logits, or to pooled features where `pre_logits`."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_chans, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


class _Features(FeatureListNet):
    """timm's list of feature maps. It recomputes blocks, as the classifier does; of stages, norms would count a batch
    twice.
    """

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        for module in self.values():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable


_RELEASED_NAMES = (
    (r'^conv_in\.', 'stem.conv.'),
    (r'^bn_in\.', 'stem.norm.'),
    (r'^conv(\d)\.', r'stages.\1.conv.'),
    (r'^bn(\d)\.', r'stages.\1.norm.'),
    (r'^layer(\d)\.', r'stages.\1.blocks.'),
    (r'\.sam\.conv1\.', '.attn.query.'),
    (r'\.sam\.conv2\.', '.attn.key.'),
    (r'\.sam\.conv3\.', '.attn.value.'),
    (r'\.sam\.conv_p\.', '.attn.position.'),
    (r'\.sam\.conv_w\.0\.', '.attn.weight_mlp.norm1.'),
    (r'\.sam\.conv_w\.2\.', '.attn.weight_mlp.fc1.'),
    (r'\.sam\.conv_w\.3\.', '.attn.weight_mlp.norm2.'),
    (r'\.sam\.conv_w\.5\.', '.attn.weight_mlp.fc2.'),
    (r'\.bn1\.', '.norm1.'),
    (r'\.bn2\.', '.norm2.'),
    (r'^fc\.', 'head.fc.'),
)


def checkpoint_filter_fn(
        state_dict: Mapping[str, Any],
        model: nn.Module | None = None,
) -> dict[str, torch.Tensor]:
    """Translates a checkpoint as the authors released it to this model's names; others pass through.

    Args:
        state_dict: The released file's content, wrapped (`{'state_dict': ...}`) or not, with or without the `module.`
            prefix of data-parallel training; or a checkpoint of this package.
        model: Not needed; timm passes it.

    Returns:
        State dict with this package's parameter names.
    """
    for wrapper in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):  # averaged weights first, as timm prefers
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
            break
    translated = {}
    for name, tensor in state_dict.items():
        name = re.sub(r'^(module\.)+', '', name)
        for pattern, replacement in _RELEASED_NAMES:
            name = re.sub(pattern, replacement, name)
        translated[name] = tensor
    return translated


def _cfg(url: str = '', **kwargs: Any) -> dict[str, Any]:
    return {
        'url': url, 'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv', 'classifier': 'head.fc',
        'paper_ids': 'arXiv:2004.13621', 'paper_name': 'Exploring Self-attention for Image Recognition',
        'origin_url': 'https://github.com/hszhao/SAN', 'license': 'mit',
        **kwargs
    }


default_cfgs = generate_default_cfgs({
    **{f'{name}_{attention}.in1k': _cfg(hf_hub_id=f'{hub.ORGANISATION}/{name}_{attention}.in1k')
       for name in DEPTHS for attention in ('pairwise', 'patchwise')},
    # the patchwise models, the more accurate ones
    **{f'{name}.in1k': _cfg(hf_hub_id=f'{hub.ORGANISATION}/{name}_patchwise.in1k') for name in DEPTHS},
    # learnt from a trained network on pictures without labels; ships with the package
    'san10_patchwise.distilled': _cfg(
        hf_hub_id=f'{hub.ORGANISATION}/san10_patchwise.distilled', input_size=(3, 64, 64), pool_size=(2, 2),
        crop_pct=1., interpolation='bicubic', license='apache-2.0', origin_url=None,
        description='distilled from EfficientNet-Lite0 on small photographs without labels'),
    'test_san_pairwise.untrained': _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
    # tells the demo's shapes apart; ships with the package
    'test_san_patchwise.shapes': _cfg(
        hf_hub_id=f'{hub.ORGANISATION}/test_san_patchwise.shapes', num_classes=3, input_size=(3, 96, 96),
        pool_size=(3, 3), crop_pct=1., label_names=('square', 'star', 'ring'), license='apache-2.0', paper_ids=None,
        paper_name=None, origin_url=None, description='squares, stars and rings of demo/shapes.py, cut out'),
    'test_san_patchwise.untrained': _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
})


def _release(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Which model a state dict seems to be of, for messages."""
    blocks = {match.groups() for match in map(re.compile(r'stages\.(\d+)\.blocks\.(\d+)\.').match, state_dict) if match}
    depths = tuple(sum(block[0] == str(stage) for block in blocks) for stage in range(5))
    attention = 'pairwise' if any('.attn.position.' in name for name in state_dict) else 'patchwise'
    release = next((name for name, released in DEPTHS.items() if released == depths), None)
    return f'{release}_{attention}' if release else f'a SAN of depths {depths}' if any(depths) else 'no SAN'


def misfits(given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], any_shape: str = '\0') -> str:
    """Says in what tensors differ from those of a model.

    Args:
        given: Tensors by name.
        expected: The model's state dict.
        any_shape: Beginning of the names whose shapes may differ.

    Returns:
        How many are missing, of another shape and unexpected, and the first of each; '' if they fit.
    """
    def some(kind: str, names: list[str]) -> str:
        first = f' ({", ".join(names[:5])}{", ..." if len(names) > 5 else ""})' if names else ''
        return f'{kind} {len(names)}{first}'

    given, expected = ({name: tensor for name, tensor in tensors.items() if not is_setting(name)}
                       for tensors in (given, expected))
    missing = [name for name in expected if name not in given]
    wrong = [f'{name} {list(given[name].shape)} instead of {list(tensor.shape)}' for name, tensor in expected.items()
             if name in given and given[name].shape != tensor.shape and not name.startswith(any_shape)]
    unexpected = [name for name in given if name not in expected]
    if not missing and not wrong and not unexpected:
        return ''
    return f'{some("missing", missing)}, {some("wrong shape", wrong)}, {some("unexpected", unexpected)}'


def _checked_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """`checkpoint_filter_fn`, and an error where names do not fit: timm lets any pass as soon as it adapts the head."""
    translated = checkpoint_filter_fn(state_dict, model)
    given, expected = ({name: tensor for name, tensor in tensors.items() if not name.startswith('head.')}
                       for tensors in (translated, model.state_dict()))
    wrong = misfits(given, expected, any_shape='stem.conv.')
    if wrong:
        raise hub.WeightsError(f'these weights are not of this model: {wrong}; they seem to be of '
                               f'{_release(translated)}. Create the model they were made for')
    return translated


def _create_san(variant: str, pretrained: bool = False, **kwargs: Any) -> SAN:
    path = None
    if pretrained:
        overlay = kwargs.get('pretrained_cfg_overlay') or {}
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
        if cfg.source == 'hf-hub' or (cfg.source != 'local-dir' and not cfg.state_dict and not cfg.file):
            if cfg.hf_hub_id:
                path = hub.weights(cfg.hf_hub_id, cfg.hf_hub_filename or hub.FILENAME, kwargs.get('cache_dir'))
                kwargs['pretrained_cfg_overlay'] = dict(overlay, file=path, source='')
    strict = kwargs.get('pretrained_strict', True)
    try:
        model: Any = build_model_with_cfg(
            SAN, variant, pretrained,
            pretrained_filter_fn=_checked_filter_fn if strict else checkpoint_filter_fn,
            feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), flatten_sequential=True, feature_cls=_Features),
            **kwargs,
        )
    except hub.WeightsError as error:
        raise hub.WeightsError(f'{variant}: {error}' + (f'. The file is {path}' if path else '')) from None
    if path is not None:  # where the weights lie on this machine is no part of what they are
        model.pretrained_cfg.pop('file', None)
        model.pretrained_cfg.pop('source', None)
    return model


_SAN10, _SAN15, _SAN19 = (dict(depths=depths) for depths in DEPTHS.values())
_TEST = dict(depths=(1, 1, 1, 1, 1), widths=(32, 64, 64, 96, 128), stem_width=16)


@register_model
def san10_pairwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN10 with pairwise self-attention (subtraction)."""
    return _create_san('san10_pairwise', pretrained, **dict(_SAN10, attention='pairwise', **kwargs))


@register_model
def san10_patchwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN10 with patchwise self-attention (concatenation)."""
    return _create_san('san10_patchwise', pretrained, **dict(_SAN10, attention='patchwise', **kwargs))


@register_model
def san15_pairwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN15 with pairwise self-attention (subtraction)."""
    return _create_san('san15_pairwise', pretrained, **dict(_SAN15, attention='pairwise', **kwargs))


@register_model
def san15_patchwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN15 with patchwise self-attention (concatenation)."""
    return _create_san('san15_patchwise', pretrained, **dict(_SAN15, attention='patchwise', **kwargs))


@register_model
def san19_pairwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN19 with pairwise self-attention (subtraction)."""
    return _create_san('san19_pairwise', pretrained, **dict(_SAN19, attention='pairwise', **kwargs))


@register_model
def san19_patchwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN19 with patchwise self-attention (concatenation)."""
    return _create_san('san19_patchwise', pretrained, **dict(_SAN19, attention='patchwise', **kwargs))


@register_model
def san10(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN10, patchwise."""
    return _create_san('san10', pretrained, **dict(_SAN10, attention='patchwise', **kwargs))


@register_model
def san15(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN15, patchwise."""
    return _create_san('san15', pretrained, **dict(_SAN15, attention='patchwise', **kwargs))


@register_model
def san19(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN19, patchwise."""
    return _create_san('san19', pretrained, **dict(_SAN19, attention='patchwise', **kwargs))


@register_model
def test_san_pairwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """A small pairwise SAN for tests."""
    return _create_san('test_san_pairwise', pretrained, **dict(_TEST, attention='pairwise', **kwargs))


@register_model
def test_san_patchwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """A small patchwise SAN for tests."""
    return _create_san('test_san_patchwise', pretrained, **dict(_TEST, attention='patchwise', **kwargs))
