"""SAN: self-attention networks for image recognition.

Paper: `Exploring Self-attention for Image Recognition` - https://arxiv.org/abs/2004.13621
(Zhao, Jia, Koltun, CVPR 2020)

A convolution aggregates features over a footprint and transforms them. SAN keeps the transformation (1x1 convolutions
and nonlinearities) and aggregates by self-attention over the footprint, with vector weights: one weight per group of
channels instead of one scalar per position. The pairwise form computes the weight of a neighbour from a pair of pixels,
the patchwise form computes all weights of a footprint from the whole footprint.
"""
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

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
from .activations import BoundedReLU, ReLU, is_setting, make_act, may_write_over, resolve_bound
from .attention import PairwiseAttention, PatchwiseAttention
from .checks import check_dtype, check_image, is_integer, one_of, per_stage
from .layers import BOUNDED_RELU, DROP_PATH, POINTWISE, POOL, RELU, has_bias, is_plain, obstacle
from .norms import BATCH_NORM, as_norm, norm_constructor, norm_relu, norm_relu_beside
from .ops import PAIRWISE_RELATIONS, PATCHWISE_RELATIONS, POSITIONS
from .pooling import Pool

__all__ = ['SAN']

# an attention layer stays one node of a traced feature extractor, and so keeps its mode and its backends
register_notrace_module(PairwiseAttention)
register_notrace_module(PatchwiseAttention)
register_notrace_module(BoundedReLU)
register_notrace_module(ReLU)
register_notrace_module(Pool)

DEPTHS = {'san10': (2, 1, 2, 4, 1), 'san15': (3, 2, 3, 5, 2), 'san19': (3, 3, 4, 6, 3)}
RELATIONS: dict[str, tuple[str, ...]] = {'pairwise': PAIRWISE_RELATIONS, 'patchwise': PATCHWISE_RELATIONS}


class Stem(nn.Module):
    """The paper's stem: 1x1 convolution, norm, ReLU and 2x2 max pooling."""

    stride: int = 2

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
        if isinstance(x, torch.fx.Proxy) \
                or obstacle(self, dict(conv=POINTWISE, norm=BATCH_NORM, act=RELU, pool=POOL)) is not None \
                or (has_bias(conv) and not isinstance(norm, nn.Identity)) or not ops.serves(x):
            return None
        if 1 in x.shape[2:]:
            return None
        weight = conv.weight.flatten(1)  # read once: a parametrisation computes it on each access
        return ops.stem(x, weight, as_norm(norm, weight[:, 0], conv.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) to (N, width, H // 2, W // 2), at least 1 x 1; on the CPU in channels_last format."""
        if not torch.jit.is_scripting():
            pooled = self._forward_operator(x)
            if pooled is not None:
                return pooled
        return self.pool(self.act(self.norm(self.conv(x))))


def _whole_patches(x: torch.Tensor, side: int, ceil_mode: bool) -> torch.Tensor:
    """Pads x with zeros below and on the right: to at least one patch of that side, or to whole patches (ceil_mode)."""
    height, width = x.shape[-2], x.shape[-1]
    if ceil_mode:
        return F.pad(x, [0, -width % side, 0, -height % side])
    if min(height, width) < side:
        return F.pad(x, [0, max(side - width, 0), 0, max(side - height, 0)])
    return x


register_notrace_function(_whole_patches)
torch.fx.wrap('_whole_patches')


class PatchStem(nn.Module):
    """ConvNeXt's stem: a convolution over patches of 4x4 pixels, norm and ReLU."""

    stride: int = 4

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
        self.ceil_mode = False
        self.conv: nn.Conv2d = nn.Conv2d(in_chans, width, 4, stride=4, bias=False, **dd)
        self.norm: nn.Module = norm_constructor(norm_layer)(width, **dd)
        self.act: nn.Module = make_act(act_layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) to (N, width, H // 4, W // 4), at least 1 x 1; rounded up with `ceil_mode`."""
        if not torch.jit.is_scripting():
            if isinstance(x, torch.Tensor):
                check_dtype(x, self.conv)
        return self.act(self.norm(self.conv(_whole_patches(x, 4, self.ceil_mode))))


STEMS: dict[str, type[Stem] | type[PatchStem]] = {'point': Stem, 'patch': PatchStem}


class SpareBuffers:
    """Context in which a module works on copies of its buffers, so that recomputation does not count a batch twice.

    Each backward pass recomputes once, and enters the context once.
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

    The first ReLU may have an upper bound. With `zero_init_last` the convolution begins as zeros, and so the block as
    the identity.
    """

    def __init__(
            self,
            dim: int,
            attention: Callable[..., PairwiseAttention | PatchwiseAttention],
            norm_layer: type[nn.Module] | str = nn.BatchNorm2d,
            act_layer: type[nn.Module] | str = nn.ReLU,
            drop_path: float = 0.,
            act1_layer: Callable[..., nn.Module] | None = None,
            zero_init_last: bool = True,
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
        if zero_init_last:
            self.init_last_as_zeros()

    @torch.jit.ignore
    def init_last_as_zeros(self) -> None:
        """Fills the last convolution with zeros."""
        nn.init.zeros_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, dim, H, W) to the same."""
        if torch.jit.is_scripting():
            residual = x
            x = self.act1(self.norm1(x))
            x = self.act2(self.norm2(self.attn(x)))
        else:
            x, residual = norm_relu_beside(self.norm1, self.act1, x)
            x = norm_relu(self.norm2, self.act2, self.attn(x))
        x = self.drop_path(self.conv(x))
        # in place: saves the memory of one feature map
        return x.add_(residual) if may_write_over() else x + residual

    @torch.jit.ignore
    def obstacle(self, name: str) -> str | None:
        """Says why this block, called `name` in messages, cannot be folded; None if it can."""
        if not is_plain(self, (Block.forward,)):
            return f'{name} is a {type(self).__name__} and not a block of SAN without hooks'
        layers = dict(drop_path=DROP_PATH, norm1=BATCH_NORM, act1=BOUNDED_RELU, norm2=BATCH_NORM, act2=RELU,
                      conv=POINTWISE)
        found = obstacle(self, layers, f'{name}.')
        if found is None and not hasattr(type(self.attn), 'obstacle'):
            found = f'{name}.attn is a {type(self.attn).__name__} and not a SAN attention without hooks'
        return self.attn.obstacle(f'{name}.attn') if found is None else found

    @torch.jit.ignore
    def fold(self, offset: torch.Tensor, int8: bool = False) -> tuple[fuse.FoldedBlock, torch.Tensor]:
        """Returns the folded block for x + offset (a vector of its channels), and the offset of its output."""
        attention, conv = self.attn, self.conv
        scale, shift = fuse.scale_and_shift(self.norm1, attention.query.weight[0, :, 0, 0], offset)
        out_weight, out_bias = fuse.linear_of(conv)
        out_scale, out_shift = fuse.scale_and_shift(self.norm2, conv.weight[0, :, 0, 0])
        weight, bias = (part.to(conv.weight.dtype) for part in attention.projections(out_scale))
        limit = getattr(self.act1, 'limit', None)  # torch's own ReLU has none
        project, gamma = ops.Linear(weight, bias, int8), attention.gamma()._replace(cache={})
        rounded = ops.round_gamma(gamma, attention.spec(), attention.rel_planes) \
            if int8 and project.packed and weight.dtype == torch.float32 else None
        return fuse.FoldedBlock(
            ops.ScaleShiftReLU(scale, shift, limit), project, attention, gamma, rounded, out_shift,
            ops.Linear(out_weight.to(conv.weight.dtype), int8=int8), {}), offset + out_bias

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # weights without a bound are those of a whole block: a few of its tensors, or its parameters alone, say nothing
        whole = any(name.startswith(f'{prefix}conv.') for name in state_dict) and (
            getattr(self.norm1, 'running_mean', None) is None or f'{prefix}norm1.running_mean' in state_dict)
        if isinstance(self.act1, BoundedReLU) and (whole or f'{prefix}act1.bound' in state_dict):
            self.act1.follow(state_dict.get(f'{prefix}act1.bound'), self.attn.query.weight)
        elif not hasattr(self.act1, 'bound'):
            state_dict.pop(f'{prefix}act1.bound', None)  # other activations have no use for it
        super()._load_from_state_dict(state_dict, prefix, *args)


class Stage(fuse.FoldableStage):
    """Max pool (without `downsample`: none), 1x1 convolution to the stage's width, blocks, norm, ReLU."""

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
            zero_init_last: bool = True,
            device: Any = None,
            dtype: Any = None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grad_checkpointing: bool = False
        self.stride: int = 2 if downsample else 1
        # norm and act run last, but are registered first: tools that fuse a norm into the convolution registered before
        # it (mmcv's fuse_conv_bn) then leave them alone
        self.norm: nn.Module = norm_constructor(norm_layer)(dim, **dd)
        self.act: nn.Module = make_act(act_layer)
        self.pool: nn.Module = Pool() if downsample else nn.Identity()
        self.conv: nn.Conv2d = nn.Conv2d(in_dim, dim, 1, bias=False, **dd)
        self.blocks: nn.Sequential = nn.Sequential(*[
            Block(dim, attention, norm_layer=norm_layer, act_layer=act_layer, act1_layer=act1_layer,
                  drop_path=drop_path_rates[i] if drop_path_rates else 0., zero_init_last=zero_init_last, **dd)
            for i in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_dim, H, W) to (N, dim, H // 2, W // 2), at least 1 x 1, or without `downsample` to (N, dim, H, W)."""
        if not torch.jit.is_scripting():
            if self._folding:
                folded = self.inference_form(x)
                if folded is not None:
                    return folded(x)
        x = self.conv(self.pool(x))
        if not torch.jit.is_scripting():
            if ops.is_exporting():
                # the residual and the first norm both read the convolution; without the copy PyTorch 2 Export
                # Quantization would fold the norm into it
                x = x.clone()
            if self.grad_checkpointing:
                for block in self.blocks:
                    x = self._checkpointed(block, x)
                return norm_relu(self.norm, self.act, x)
            return norm_relu(self.norm, self.act, self.blocks(x))
        return self.act(self.norm(self.blocks(x)))

    @torch.jit.ignore
    def _checkpointed(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Computes block(x), and recomputes it in the backward pass without changing running statistics."""
        if ops.is_compiling(x):  # the compiler traces the block once, and takes no context
            return checkpoint(block, x, use_reentrant=False)
        return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), SpareBuffers(block)))


register_notrace_function(check_image)
torch.fx.wrap('check_image')


class SAN(nn.Module):
    """Self-attention network.

    Args:
        attention: 'pairwise' or 'patchwise'.
        relation: Relation function delta, one of `ops.PAIRWISE_RELATIONS` or `ops.PATCHWISE_RELATIONS`; None takes the
            released models': 'subtraction' for pairwise, 'concatenation' for patchwise.
        depths: Blocks per stage.
        widths: Channels per stage, multiples of 32 with the default ratios.
        kernel_sizes: Footprint size per stage, odd; one integer serves all stages.
        stem_width: Channels of the stem.
        stem: 'point', the paper's 1x1 convolution and 2x2 pooling, or 'patch', ConvNeXt's 4x4 convolution of stride 4:
            the first stage then sees neighbourhoods, and runs at stride 4 like the second.
        share_planes: Channels that share one attention weight.
        position: Position channels of the pairwise form: 'relative', 'absolute' or 'none'. No effect on the patchwise
            form, which has no positions.
        position_ref_size: Image side in pixels whose coordinate steps are used at every image size, so that features
            do not depend on where in an image a patch lies (224 for weights trained at 224); None spans [-1, 1] over
            each image, as the released models do. At least 2 pixels must remain in the last stage. No effect on the
            patchwise form.
        output_stride: 8, 16 or 32. Stages that would exceed it keep the resolution and dilate their footprints.
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: Pooling of the head, '' for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate, which grows linearly over the blocks.
        relu_bound: Upper bound of the first ReLU of each block; 0 for none. A number given here is kept when weights
            are loaded. None uses the bound of loaded weights (the released ones have none); a new network gets 6 in
            the patchwise form and no bound in the pairwise form. Other activations have no bound.
        zero_init_last: Whether the last convolution of each block begins as zeros, and so each block as the identity,
            as in timm's ResNets; without it, as torch initialises it. No effect on loaded weights.
        norm_layer: Norm of all layers, called with the number of channels, or timm's name of one ('groupnorm1').
        act_layer: Activation of all layers, or timm's name of one ('gelu'). With norms other than batch norms or
            activations other than ReLU, the attention runs by its plain definition, whose memory grows with the
            footprint.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

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
            stem: str = 'point',
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
            zero_init_last: bool = True,
            norm_layer: type[nn.Module] | str = nn.BatchNorm2d,
            act_layer: type[nn.Module] | str = nn.ReLU,
            device: Any = None,
            dtype: Any = None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        one_of('attention', attention, tuple(RELATIONS))
        one_of('stem', stem, tuple(STEMS))
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
        one_of('position', position, POSITIONS)
        widths = per_stage('widths', widths, len(depths), 1)
        kernel_sizes = per_stage('kernel_sizes', kernel_sizes, len(depths), -math.inf)  # the layers check the values
        strides = [2 ** (i + 1) for i in range(len(depths))]  # of the stages, if none dilates
        if position_ref_size is not None and not is_integer(position_ref_size, 2 * strides[-1]):
            raise ValueError(
                f'position_ref_size must be None or an integer of at least {2 * strides[-1]} (2 pixels in the '
                f'last of {len(depths)} stages), got {position_ref_size!r}')
        act1_layer = partial(BoundedReLU, resolve_bound(relu_bound, attention), relu_bound is not None)
        is_relu = type(make_act(act_layer)) is ReLU
        if relu_bound is not None and not is_relu:
            raise ValueError(f'relu_bound is the bound of a ReLU, got relu_bound={relu_bound!r} with '
                             f'act_layer={act_layer!r}: leave one of them out')
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.feature_info: list[dict[str, Any]] = []

        self.stem: Stem | PatchStem = STEMS[stem](
            in_chans, stem_width, norm_layer=norm_layer, act_layer=act_layer, **dd)
        drop_path_rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        stride, in_dim = self.stem.stride, stem_width
        for i, (depth, dim, kernel_size) in enumerate(zip(depths, widths, kernel_sizes)):
            wanted = max(strides[i], self.stem.stride)
            downsample = stride < min(wanted, output_stride)
            options: dict[str, Any] = dict(
                share_planes=share_planes, kernel_size=kernel_size, dilation=max(wanted // output_stride, 1),
                norm_layer=norm_layer, act_layer=act_layer)
            if relation is not None:
                options['relation'] = relation
            if attention == 'pairwise':
                ref = None if position_ref_size is None else position_ref_size // wanted
                layer: Callable[..., PairwiseAttention | PatchwiseAttention] = partial(
                    PairwiseAttention, position=position, position_ref_size=ref, **options)
            else:
                layer = partial(PatchwiseAttention, **options)
            stage = Stage(
                in_dim, dim, depth, layer, downsample=downsample, norm_layer=norm_layer, act_layer=act_layer,
                act1_layer=act1_layer if is_relu else None, drop_path_rates=drop_path_rates[i],
                zero_init_last=zero_init_last, **dd)
            stride *= stage.stride
            stages.append(stage)
            self.feature_info.append(dict(num_chs=dim, reduction=stride, module=f'stages.{i}'))
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        self.num_features = in_dim
        self._set_head(num_classes, global_pool, **dd)

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads as `nn.Module.load_state_dict`, and also takes the authors' released checkpoints."""
        if not any(name.startswith(('stem.', 'stages.')) for name in state_dict):
            state_dict = checkpoint_filter_fn(state_dict, self)
        return super().load_state_dict(state_dict, *args, **kwargs)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns names of parameters exempt from weight decay besides biases and norms: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns patterns that group parameters by layer, for layer-wise learning rates."""
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
    def fuse_for_inference(self, int8: bool = False) -> 'SAN':
        """Folds the stages for inference; see `san_backbones.fuse_for_inference`."""
        fuse.fuse_for_inference(self, int8)
        return self

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Returns the last linear layer, `nn.Identity` if there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier, keeping device, dtype and mode.

        Args:
            num_classes: Classes of the new classifier; 0 for none.
            global_pool: New pooling, '' for none; None keeps the current one.
        """
        self.read_widths()
        like = self.stem.conv.weight  # gives device and dtype; the head may have no parameters
        pool_type = self.head.global_pool.pool_type if global_pool is None else global_pool
        self._set_head(num_classes, pool_type, device=like.device, dtype=like.dtype)

    @torch.jit.ignore
    def read_widths(self) -> None:
        """Sets `num_features` and `feature_info` to the widths that the stages have, which pruning changes."""
        stages: Any = self.stages
        for info, stage in zip(self.feature_info, stages):
            info['num_chs'] = stage.conv.weight.shape[0]
        self.num_features = stages[-1].conv.weight.shape[0]

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
        """Computes the features and returns the outputs of stages.

        Args:
            x: Images, (N, in_chans, H, W).
            indices: Last n stages if int, all if None, the given ones if a sequence.
            norm: No effect: every stage ends with its own norm.
            stop_early: Stop after the last requested stage.
            output_fmt: 'NCHW', the only one.
            intermediates_only: Return the stage outputs only.

        Returns:
            List of stage outputs, or (final features, list).
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        check_image(x, self.in_chans)
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
            prune_head: Remove the classifier even if all stages stay.

        Returns:
            The indices of the requested stages, counted from the first.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_chans, H, W) to the unpooled features of the last stage, (N, num_features, H', W')."""
        check_image(x, self.in_chans)
        return self.stages(self.stem(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features of the last stage to logits, or with `pre_logits` to pooled features."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_chans, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


class _Features(FeatureListNet):
    """timm's feature extractor, but it recomputes blocks, as the classifier does: recomputing whole stages would count
    a batch twice in their norms.
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


_OWN_NAMES = re.compile(r'(^|\.)(stem\.conv|stages\.\d+\.conv)\.weight$')


def checkpoint_filter_fn(
        state_dict: Mapping[str, Any],
        model: nn.Module | None = None,
) -> dict[str, torch.Tensor]:
    """Translates the names of a checkpoint that the authors released to this package's; others pass through.

    Args:
        state_dict: The content of a released file, wrapped (`{'state_dict': ...}`) or not, with or without the
            `module.` prefix of data-parallel training; or a checkpoint of this package.
        model: Not used; timm passes it.

    Returns:
        State dict with this package's parameter names.
    """
    for wrapper in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):  # averaged weights first, as timm prefers
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
            break
    translated = {re.sub(r'^(module\.)+', '', name): tensor for name, tensor in state_dict.items()}
    if any(_OWN_NAMES.search(name) for name in translated):
        return translated
    for pattern, replacement in _RELEASED_NAMES:
        translated = {re.sub(pattern, replacement, name): tensor for name, tensor in translated.items()}
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
    # learned from a trained network on pictures without labels; these ship with the package
    **{f'san10_{attention}.distilled': _cfg(
        hf_hub_id=f'{hub.ORGANISATION}/san10_{attention}.distilled', input_size=(3, 64, 64), pool_size=(2, 2),
        crop_pct=1., interpolation='bicubic', license='apache-2.0', origin_url=None,
        description='distilled from EfficientNet-Lite0 on small photographs without labels')
       for attention in ('pairwise', 'patchwise')},
    'test_san_pairwise.untrained': _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
    # classifies the demo's shapes; ships with the package
    'test_san_patchwise.shapes': _cfg(
        hf_hub_id=f'{hub.ORGANISATION}/test_san_patchwise.shapes', num_classes=3, input_size=(3, 96, 96),
        pool_size=(3, 3), crop_pct=1., label_names=('square', 'star', 'ring'), license='apache-2.0', paper_ids=None,
        paper_name=None, origin_url=None, description='squares, stars and rings of demo/shapes.py, cut out'),
    'test_san_patchwise.untrained': _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
})


def _guess_model(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Guesses which model a state dict belongs to, for messages."""
    blocks = {match.groups() for match in map(re.compile(r'stages\.(\d+)\.blocks\.(\d+)\.').match, state_dict) if match}
    depths = tuple(sum(block[0] == str(stage) for block in blocks) for stage in range(5))
    attention = 'pairwise' if any('.attn.position.' in name for name in state_dict) else 'patchwise'
    release = next((name for name, released in DEPTHS.items() if released == depths), None)
    return f'{release}_{attention}' if release else f'a SAN of depths {depths}' if any(depths) else 'no SAN'


class Misfits(NamedTuple):
    """Differences between given tensors and those of a model; false if there are none."""
    missing: list[str]
    wrong: list[str]
    """Tensors of another shape or kind, with what was found and what is expected."""
    unexpected: list[str]

    def __bool__(self) -> bool:
        return any(self)

    def __str__(self) -> str:
        """Counts each kind, and names the first five."""
        return ', '.join(
            f'{kind} {len(names)}' + (f' ({", ".join(names[:5])}{", ..." if len(names) > 5 else ""})' if names else '')
            for kind, names in zip(('missing', 'wrong shape', 'unexpected'), self))


def misfits(given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], any_shape: str = '\0') -> Misfits:
    """Compares given tensors with those of a model.

    Args:
        given: Tensors by name.
        expected: The model's state dict.
        any_shape: Prefix of names whose shapes may differ.
    """
    given, expected = ({name: tensor for name, tensor in tensors.items() if not is_setting(name)}
                       for tensors in (given, expected))
    wrong = []
    for name, right in expected.items():
        found = given.get(name, right)
        if found.shape != right.shape and not name.startswith(any_shape):
            wrong.append(f'{name} {list(found.shape)} instead of {list(right.shape)}')
        elif found.is_complex() or (right.is_floating_point() and not found.is_floating_point()):
            wrong.append(f'{name} {found.dtype} instead of {right.dtype}')
    return Misfits([name for name in expected if name not in given], wrong,
                   [name for name in given if name not in expected])


def _checked_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Runs `checkpoint_filter_fn` and checks the names: timm accepts any names once it adapts the head."""
    translated = checkpoint_filter_fn(state_dict, model)
    given, expected = ({name: tensor for name, tensor in tensors.items() if not name.startswith('head.')}
                       for tensors in (translated, model.state_dict()))
    wrong = misfits(given, expected, any_shape='stem.conv.')
    if wrong:
        raise hub.WeightsError(f'these weights are not of this model: {wrong}; they seem to be of '
                               f'{_guess_model(translated)}. Create the model they were made for')
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
    if path is not None:  # the path on this machine must not be saved with the model
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
