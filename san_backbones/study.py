"""A picture that ran through a network once, for views that are drawn again and again.

The attention of any block and the map of any stage come from what was kept of that run. Whatever is computed is that of
`attention_maps` and `visualize`.
"""
from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from . import visualize
from .attention_maps import BlockId, Hook, evaluating, find_block, find_network, footprint_weights, run_hooked
from .visualize import Picture

__all__ = ['Study']


class Study:
    """Runs the SAN in a model on a picture, in eval mode, and keeps what its blocks take in and its stages give out.

    Args:
        model: A SAN, or a module that holds one; its mode is restored afterwards.
        image: A path, a PIL picture, or a uint8 array (H, W, 3), RGB.
        size: Shorter side in pixels to which the picture is scaled, as for `visualize.footprint_figure`.

    Attributes:
        net: The SAN's parts.
        shown: The picture as given and as the network takes it.
        maps: The feature maps of the stages, (C, H, W) each, float32.

    Raises:
        ValueError: There is no SAN in `model`, or the picture cannot be shown to it.
    """

    def __init__(self, model: nn.Module, image: Picture, size: int | None = None) -> None:
        self.model, self.net = model, find_network(model)
        self.shown = visualize.prepare_picture(model, self.net, image, size)
        self.maps: list[Tensor] = []
        self._inputs: dict[str, Tensor] = {}
        self._seen: dict[str, visualize.Seen] = {}
        hooks: list[Hook] = [(block.attn, True, functools.partial(self._inputs.__setitem__, name))
                             for name, block in self.net.blocks.items()]
        hooks += [(stage.get_submodule('act'), False, lambda x: self.maps.append(x[0].float().cpu()))
                  for stage in self.net.stages]
        with evaluating(model):
            run_hooked(self.net, self.shown.images, hooks)

    def seen(self, block: BlockId | None = None) -> visualize.Seen:
        """Returns the weights of a block at all pixels, computed on the first call.

        Raises:
            ValueError: There is no such block; the message lists them.
        """
        found = find_block(self.net, block)
        if found.name not in self._seen:
            with evaluating(self.model), torch.no_grad():
                weights = footprint_weights(found.attn, self._inputs[found.name])[0]
            self._seen[found.name] = visualize.see_block(weights, found)
        return self._seen[found.name]
