"""From pixels to features: a network in its form for inference, and what is taken of its stages."""
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..fuse import fuse_for_inference, missing_for_int8
from ..san import SAN

__all__ = ['POOLS', 'Network', 'digest', 'gem']

PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16, 'int8': torch.float32}
"""Dtypes of maps."""


def gem(maps: Tensor, p: float = 3.) -> Tensor:
    """Generalised mean over positions, (N, C, H, W) to (N, C): mean(max(x, 1e-6) ^ p) ^ (1 / p) (Radenovic, Tolias,
    Chum, 2018).
    """
    return maps.clamp(min=1e-6).pow(p).mean((2, 3)).pow(1 / p)


POOLS: Mapping[str, Any] = {
    'avg': lambda maps: maps.mean((2, 3)), 'max': lambda maps: maps.amax((2, 3)), 'gem': gem, 'none': lambda maps: maps}


def digest(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all parameters and buffers."""
    result = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        result.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\0'.encode())
        result.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


class Network:
    """Features of batches of pictures.

    Args:
        model: A model of timm's, in eval mode. It is changed: moved, and fused where it is a SAN.
        stages: Those whose outputs are taken, counted from 0; None: the last.
        pool: One of `POOLS`.
        logits: The classifier's, too.
        boxes: Pictures have boxes.
        device: Where to compute.
        precision: 'fp32', 'bf16' or 'fp16'; 'int8' as `fuse_for_inference` has it.

    Raises:
        IndexError: There are no such stages.
        ValueError: There is no classifier, the model gives no feature maps, or it does not compute in 8 bits here.
    """

    def __init__(self, model: Any, stages: Sequence[int] | None, pool: str, logits: bool, boxes: bool,
                 device: torch.device, precision: str = 'fp32'):
        kind = type(model).__name__
        if not hasattr(model, 'forward_intermediates') or not hasattr(model, 'feature_info'):
            raise ValueError(f'a {kind} gives no feature maps (it has no forward_intermediates): take another model')
        info: list[Any] = list(model.feature_info)
        self.stages: list[int] = sorted(set(stages)) if stages else list(range(len(info)))[-4 if boxes else -1:]
        if self.stages[-1] >= len(info) or self.stages[0] < 0:
            raise IndexError(f'the model has no such stage: asked for {", ".join(map(str, self.stages))}, it has 0 to '
                             f'{len(info) - 1}')
        if logits and not model.num_classes:
            raise ValueError('the model has no classifier, so it has no logits: leave them out, or take other weights')
        self.widths: list[int] = [info[i]['num_chs'] for i in self.stages]
        self.strides: list[int] = [info[i]['reduction'] for i in self.stages]
        self.names: list[str] = [info[i]['module'] for i in self.stages]
        self.classes: int = model.num_classes if logits else 0
        self.pool: str = pool
        self.boxes: bool = boxes
        self.device: torch.device = device
        self._dtype = PRECISIONS[precision]
        model = model.to(device, self._dtype, memory_format=torch.channels_last).eval()
        missing = missing_for_int8(model) if precision == 'int8' else None
        if missing is not None:
            raise ValueError(f"precision 'int8': {missing}; take another precision")
        self._model: Any = fuse_for_inference(model, precision == 'int8') if isinstance(model, SAN) else model

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Sets mean and standard deviation of the pixels, from 0 to 1, for each channel."""
        self._mean, self._std = (torch.tensor(x, device=self.device).view(1, -1, 1, 1) for x in (mean, std))

    @property
    def columns(self) -> dict[str, int]:
        """Names and lengths of the vectors: `features`, or one for each stage; `logits`."""
        several = len(self.stages) > 1
        found = {f'features_{stage}' if several else 'features': width
                 for stage, width in zip(self.stages, self.widths)} if self.pool != 'none' else {}
        return dict(found, logits=self.classes) if self.classes else found

    @property
    def maps(self) -> list[str]:
        """Names of the feature maps that are kept whole."""
        return self.names if self.pool == 'none' else []

    def __call__(self, images: Tensor, rois: list[Tensor] | None = None
                 ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
        """Features of images of one size.

        Args:
            images: (N, C, H, W), uint8.
            rois: For each image, boxes (K, 4) in its pixels: x1, y1, x2, y2.

        Returns:
            Vectors (N, D) by column, maps (N, C, H, W) by stage, float32, on the CPU; and None. With rois an image
            counts as often as it has boxes, a map is 7 x 7, what is of another stage than the box is zeros, and the
            third is the index of each box's stage in `stages`.
        """
        with torch.inference_mode():
            x = images.to(self.device, non_blocking=True).float().div_(255).sub_(self._mean).div_(self._std)
            x = x.to(self._dtype).contiguous(memory_format=torch.channels_last)
            last, maps = self._model.forward_intermediates(x, indices=self.stages)
            pool, level = POOLS[self.pool], None
            if rois is None:
                found = [pool(map.float()) for map in maps]
            else:
                level, found = _level(torch.cat(rois), self.strides), []
                for i, (map, stride) in enumerate(zip(maps, self.strides)):
                    some = pool(_aligned(map.float(), rois, level == i, stride))
                    found.append(some.new_zeros(len(level), *some.shape[1:]))
                    found[-1][(level == i).to(some.device)] = some
            vectors = {} if self.maps else dict(zip(self.columns, found))
            if self.classes:
                logits = self._model.forward_head(last).float()
                vectors['logits'] = logits if rois is None else logits.repeat_interleave(
                    torch.tensor([len(each) for each in rois], device=logits.device), 0)
            return ({name: x.cpu() for name, x in vectors.items()},
                    {name: x.cpu() for name, x in zip(self.maps, found)}, level)


def _level(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """The index of each box's stride in `strides`: equation 1 of Lin et al., *Feature Pyramid Networks for Object
    Detection*, 2017. A box of 224 pixels goes to stride 16, one half as large to half the stride.
    """
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    wanted = 2 ** torch.floor(4 + torch.log2(sides / 224 + 1e-6))
    return ((torch.tensor(strides) <= wanted[:, None]).sum(1) - 1).clamp(min=0)


def _aligned(map: Tensor, rois: list[Tensor], chosen: Tensor, stride: int) -> Tensor:
    """RoIAlign of the chosen boxes: 7 x 7 cells of 2 x 2 samples each, as Mask R-CNN has them."""
    from torchvision.ops import roi_align
    image = torch.repeat_interleave(torch.arange(len(rois)), torch.tensor([len(each) for each in rois]))
    boxes = torch.cat([image[:, None].float(), torch.cat(rois)], 1)[chosen]
    return roi_align(map, boxes.to(map), 7, 1 / stride, 2, aligned=True)
