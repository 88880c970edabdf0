"""SANBackbone: SAN as MMEngine backbone with multi-scale feature maps, for MMDetection, MMSegmentation and others."""
import inspect
import re
from typing import Any
from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
from mmengine.logging import MMLogger
from mmengine.model import BaseModule, PretrainedInit
from timm.models import adapt_input_conv, get_pretrained_cfg, is_model_pretrained
from torch.nn.modules.batchnorm import _BatchNorm

from .. import hub, san
from ..checks import check_image, is_integer
from .checkpoints import file_being_loaded, read_state_dict

__all__ = ['SANBackbone']

ARCHITECTURES: dict[str, dict[str, Any]] = {
    f'{name}_{attention}': dict(depths=depths, attention=attention)
    for name, depths in (('san10', san.DEPTHS['san10']), ('san15', san.DEPTHS['san15']), ('san19', san.DEPTHS['san19']))
    for attention in ('pairwise', 'patchwise')
}


def _norm_layer(norm_cfg: dict[str, Any] | None):
    """Converts a norm_cfg to the function that SAN calls with a number of channels."""
    if norm_cfg is None:
        return nn.BatchNorm2d
    if not isinstance(norm_cfg, dict) or 'type' not in norm_cfg:
        raise TypeError(f"norm_cfg must be None or a dict with a 'type' such as dict(type='SyncBN'), got {norm_cfg!r}")
    from mmcv.cnn import build_norm_layer
    groups = norm_cfg.get('num_groups')

    def make(channels: int, device=None, dtype=None) -> nn.Module:
        cfg = norm_cfg
        if is_integer(groups):  # some layers have 2 or 6 channels
            cfg = dict(norm_cfg, num_groups=max(n for n in range(1, groups + 1) if channels % n == 0))
        try:
            norm = build_norm_layer(cfg, channels)[1]
            norm.eval()(torch.zeros(1, channels, 2, 2))  # norms for other ranks fail only when called
        except Exception as error:
            raise ValueError(
                f'norm_cfg {norm_cfg!r} cannot normalise the {channels} channels of one of the layers ({error}); '
                "use dict(type='BN') or dict(type='SyncBN')") from error
        return norm.train()

    return make


def _is_pretrained(cfg: Mapping[str, Any]) -> bool:
    """Whether an `init_cfg` names a checkpoint: by name, with a scope or without, or by mmengine's class."""
    kind = cfg.get('type')
    return kind is PretrainedInit or isinstance(kind, str) and kind.rpartition('.')[2] in (
        'Pretrained', 'PretrainedInit')


def _side_in_training(checkpoint: str) -> int | None:
    """Returns the side of the pictures that a checkpoint learnt at, if its name or folder is that of known weights."""
    for part in re.split(r'[/\\@:]', checkpoint):
        name = part.removesuffix('.safetensors')
        if '.' in name and is_model_pretrained(name) and (cfg := get_pretrained_cfg(name)) is not None:
            return cfg.input_size[-1]
    return None


class SANBackbone(BaseModule):
    """SAN (Zhao, Jia, Koltun, CVPR 2020) as a backbone; parameters are named as in the timm model.

    Args:
        arch: 'san10_pairwise', 'san10_patchwise', ..., 'san19_patchwise'; or a dict of arguments of
            `san_backbones.SAN` (`attention`, `relation`, `depths`, `widths`, `kernel_sizes`, ...).
        in_channels: Channels of the image.
        out_indices: Stages whose outputs are returned, from 0 to 4 (strides 2, 4, 8, 16, 32; 64, 256, 512, 1024 and
            2048 channels).
        frozen_stages: -1 freezes nothing, 0 the stem, n the stem and the first n stages: no gradients, and norms in
            eval mode.
        norm_eval: Keep all norms in eval mode in training; their parameters still learn.
        norm_cfg: Norms of all layers, for instance dict(type='SyncBN', requires_grad=True); None is BN. With
            dict(type='GN', num_groups=32), a layer whose channels are not divisible by `num_groups` uses the largest
            smaller number that divides them. Norms other than batch norms run the attention by its plain definition,
            whose memory grows with the footprint.
        with_cp: Recompute blocks in the backward pass to save memory.
        output_stride: 8, 16 or 32: stages beyond it dilate instead of pooling.
        position_ref_size: Image side in pixels whose coordinate steps are used at every size; no effect on the
            patchwise form. The default 224 is the training size of the released models; None spans [-1, 1] over each
            image, as the released code does.
        drop_path_rate: Stochastic depth rate.
        relu_bound: Upper bound of the first ReLU of each block; 0 for none. A number given here is kept when weights
            are loaded. None uses the bound of loaded weights (the released ones have none); a new network gets 6 in
            the patchwise form and no bound in the pairwise form.
        zero_init_last: Whether the last convolution of each block begins as zeros, and so each block as the identity;
            without it, as torch initialises it. No effect on loaded weights.
        ceil_mode: Round up when pooling halves an odd side, so that maps have the sizes of a ResNet's, ceil(side /
            stride), which PAFPN, FPN_CARAFE and DyHead expect. The released networks round down; for multiples of the
            last stride there is no difference.
        init_cfg: For instance dict(type='Pretrained', checkpoint='san15_patchwise.pth'). A checkpoint that does not
            fit is an error. Weights for three image channels are adapted to `in_channels` as in timm.
        pretrained: The checkpoint of such an `init_cfg`, as segmentors pass on their own `pretrained`.

    Raises:
        ValueError, TypeError: An argument is out of range; the message says what is allowed.

    Example:
        >>> backbone = SANBackbone('san15_patchwise', out_indices=(1, 2, 3, 4))
        >>> [tuple(f.shape) for f in backbone(torch.rand(1, 3, 64, 64))]
        [(1, 256, 16, 16), (1, 512, 8, 8), (1, 1024, 4, 4), (1, 2048, 2, 2)]
    """

    init_cfg: Any

    def __init__(
            self,
            arch: str | dict[str, Any] = 'san15_patchwise',
            in_channels: int = 3,
            out_indices: Sequence[int] = (1, 2, 3, 4),
            frozen_stages: int = -1,
            norm_eval: bool = False,
            norm_cfg: dict[str, Any] | None = None,
            with_cp: bool = False,
            output_stride: int = 32,
            position_ref_size: int | None = 224,
            drop_path_rate: float = 0.,
            relu_bound: float | None = None,
            zero_init_last: bool = True,
            ceil_mode: bool = False,
            init_cfg: dict[str, Any] | None = None,
            pretrained: str | None = None,
    ):
        if pretrained is not None:
            if init_cfg is not None:
                raise ValueError(f'init_cfg {init_cfg!r} and pretrained {pretrained!r} are two ways to name weights: '
                                 'give one (in a segmentor, set model.pretrained=None)')
            init_cfg = dict(type='Pretrained', checkpoint=pretrained)
        super().__init__(init_cfg=init_cfg)
        net = san.SAN(
            **self._architecture(arch), in_chans=in_channels, num_classes=0, norm_layer=_norm_layer(norm_cfg),
            output_stride=output_stride, position_ref_size=position_ref_size, drop_path_rate=drop_path_rate,
            relu_bound=relu_bound, zero_init_last=zero_init_last)
        n_stages = len(net.stages)
        out_indices = tuple(out_indices) if isinstance(out_indices, Sequence) else (out_indices,)
        if not out_indices or any(not is_integer(i, 0) or i >= n_stages for i in out_indices) \
                or list(out_indices) != sorted(set(out_indices)):
            raise ValueError(
                f'out_indices must be increasing stage numbers from 0 to {n_stages - 1}, got {out_indices!r}')
        if not is_integer(frozen_stages, -1) or frozen_stages > n_stages:
            raise ValueError(f'frozen_stages must be from -1 (none) to {n_stages} (all), got {frozen_stages!r}')
        self.arch: str | dict[str, Any] = arch
        self.out_indices: tuple[int, ...] = out_indices
        self.out_channels: tuple[int, ...] = tuple(net.feature_info[i]['num_chs'] for i in out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.in_channels = in_channels
        self.position_ref_size = position_ref_size
        net.set_grad_checkpointing(with_cp)
        if not isinstance(ceil_mode, bool):
            raise TypeError(f'ceil_mode must be True or False, got {ceil_mode!r}')
        for module in net.modules():
            if isinstance(module, (nn.MaxPool2d, san.PatchStem)):
                module.ceil_mode = ceil_mode
        self.stem: nn.Module = net.stem
        # later stages are left out: their parameters would be unused
        self.stages: nn.Sequential = net.stages[:out_indices[-1] + 1]
        self._freeze_stages()

    @staticmethod
    def _architecture(arch: str | dict[str, Any]) -> dict[str, Any]:
        if isinstance(arch, str):
            if arch not in ARCHITECTURES:
                raise ValueError(f'arch must be one of {", ".join(map(repr, ARCHITECTURES))} or a dict, got {arch!r}')
            return ARCHITECTURES[arch]
        reserved = {'self', 'in_chans', 'num_classes', 'global_pool', 'drop_rate', 'norm_layer', 'output_stride',
                    'position_ref_size', 'drop_path_rate', 'relu_bound', 'zero_init_last', 'device', 'dtype'}
        allowed = [name for name in inspect.signature(san.SAN).parameters if name not in reserved]
        if not isinstance(arch, dict) or not set(arch) <= set(allowed):
            raise ValueError(f'arch must be a model name or a dict with keys of {allowed}, got {arch!r}')
        return arch

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images (N, in_channels, H, W) to a tuple of feature maps, one for each of `out_indices`."""
        check_image(x, self.in_channels)
        x = self.stem(x)
        outputs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outputs.append(x)
        return tuple(outputs)

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        for module in (self.stem, *self.stages[:self.frozen_stages]):
            module.eval()
            for parameter in module.parameters():
                parameter.requires_grad = False

    def train(self, mode: bool = True) -> 'SANBackbone':
        """Sets the mode; frozen stages and, with `norm_eval`, all norms stay in eval mode."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Initialises the weights as `init_cfg` says.

        Raises:
            RuntimeError: The checkpoint of a 'Pretrained' init_cfg does not fit this backbone.
            TypeError: `init_cfg` is neither a dict nor a list of dicts.
        """
        init_cfg = self.init_cfg
        cfgs = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg] if init_cfg else []
        if not all(isinstance(cfg, Mapping) for cfg in cfgs):
            raise TypeError("init_cfg must be a dict with a 'type', such as dict(type='Pretrained', checkpoint=...), a "
                            f'list of them, or None, got {init_cfg!r}')
        pretrained = [cfg for cfg in cfgs if _is_pretrained(cfg)]
        self.init_cfg = [cfg for cfg in cfgs if not _is_pretrained(cfg)] or None
        super().init_weights()
        self.init_cfg = init_cfg
        for cfg in pretrained:
            if not isinstance(cfg.get('checkpoint'), str):
                raise ValueError(f"init_cfg of type 'Pretrained' needs a 'checkpoint', a path or URL, got {cfg!r}")
            self._load_pretrained(cfg['checkpoint'], cfg.get('prefix') or '')
        if not pretrained and (self.frozen_stages >= 0 or self.norm_eval):
            MMLogger.get_current_instance().warning(
                f'SANBackbone: frozen_stages={self.frozen_stages}, norm_eval={self.norm_eval} keep random weights or '
                'statistics as they are, unless a checkpoint is loaded later (load_from, resume); to train from random '
                'weights set frozen_stages=-1 and norm_eval=False')
        self._is_init = True

    def _read(self, checkpoint: str) -> dict[str, Any]:
        try:
            content = read_state_dict(checkpoint)
        except FileNotFoundError as error:
            raise FileNotFoundError(f'init_cfg names the checkpoint {checkpoint!r}, which does not exist') from error
        except hub.WeightsError as error:
            raise RuntimeError(
                f'init_cfg names the checkpoint {checkpoint!r}: {error} To train from random weights instead, set '
                'init_cfg=None, frozen_stages=-1 and norm_eval=False of the backbone') from error
        except Exception as error:
            raise RuntimeError(
                f'init_cfg names the checkpoint {checkpoint!r}, which cannot be read ({type(error).__name__}: {error});'
                ' expected a PyTorch checkpoint of tensors or a .safetensors file') from error
        if not isinstance(content, Mapping):
            raise TypeError(f'checkpoint {checkpoint!r} holds a {type(content).__name__}, expected a dict of tensors '
                            "or one with a 'state_dict'")
        return san.checkpoint_filter_fn(content)

    def _load_pretrained(self, checkpoint: str, prefix: str) -> None:
        state_dict = self._read(checkpoint)
        prefix = prefix.rstrip('.')
        if not prefix and all(name.startswith('backbone.') for name in state_dict
                              if name.split('.')[0] in ('backbone', 'stem', 'stages')):
            prefix = 'backbone'  # a detector or segmentor trained with this backbone
        if prefix and any(name.startswith(prefix + '.') for name in state_dict):
            state_dict = {name[len(prefix) + 1:]: t for name, t in state_dict.items() if name.startswith(prefix + '.')}
        state_dict = self._adapt_stem(self._keep_built(state_dict))
        wrong = san.misfits(state_dict, self.state_dict())
        if wrong:
            raise RuntimeError(
                f'checkpoint {checkpoint!r} does not fit SANBackbone(arch={self.arch!r}): {wrong}. Give the arch that '
                "the checkpoint was made for, or its 'prefix' in init_cfg if the weights sit under one.")
        self.load_state_dict(state_dict)
        MMLogger.get_current_instance().info(f'SANBackbone: loaded {len(state_dict)} tensors from {checkpoint}')
        side = _side_in_training(checkpoint)
        if self.position_ref_size is not None and side not in (None, self.position_ref_size) \
                and any('.attn.position.' in name for name in state_dict):
            MMLogger.get_current_instance().warning(
                f'SANBackbone: {checkpoint} learnt at {side} pixels, and position_ref_size={self.position_ref_size} '
                f'gives its coordinates another step; set position_ref_size={side}')

    def _keep_built(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Drops the classifier and the stages after the last output, which are not built."""
        last = len(self.stages)
        beyond = re.compile(r'head\.|stages\.(\d+)\.')
        return {name: tensor for name, tensor in state_dict.items()
                if not (found := beyond.match(name)) or found[1] and int(found[1]) < last}

    def _adapt_stem(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Adapts a stem for three image channels to `in_channels`, as timm does."""
        weight = state_dict.get('stem.conv.weight')
        if isinstance(weight, torch.Tensor) and weight.dim() == 4 and weight.shape[1] == 3 != self.in_channels:
            state_dict = {**state_dict, 'stem.conv.weight': adapt_input_conv(self.in_channels, weight)}
            MMLogger.get_current_instance().info(
                f'SANBackbone: stem.conv is for 3 image channels and was adapted to {self.in_channels}: '
                + ('their sum' if self.in_channels == 1 else f'repeated in turns and scaled by 3 / {self.in_channels}'))
        return state_dict

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Refuses a checkpoint that fits only in part: mmengine would warn and leave the rest random.

        Raises:
            RuntimeError: mmengine loads a file (`load_from`, resuming, testing, inferencers) whose tensors under
                `prefix` do not fit this backbone.
        """
        file = file_being_loaded()
        if file is not None:
            given = {name[len(prefix):]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
            wrong = san.misfits(self._keep_built(given), self.state_dict())
            if wrong:
                where = prefix.rstrip('.')
                raise RuntimeError(
                    f'checkpoint {file} does not fit the {where} SANBackbone(arch={self.arch!r}): {wrong}. '
                    'Give the arch that it was made for; load weights of a backbone alone by its '
                    "init_cfg=dict(type='Pretrained', checkpoint=...), and weights that fit in part by "
                    'model.load_state_dict(..., strict=False).')
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
