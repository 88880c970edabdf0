"""One HTML file in which one points at a pixel of a picture and sees what a block attends to there.

The file holds the picture, the weights of the blocks at all pixels, and the script that draws them. It asks for nothing
from the network, and its content security policy forbids it.
"""
from __future__ import annotations

import base64
import html
import importlib.resources
import io
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .. import visualize
from ..attention_maps import AttentionBlock, BlockId, effective_size, find_block
from ..ops import geometry
from ..study import Study
from ..visualize import Picture

__all__ = ['LIMIT', 'UNTRAINED', 'attention_page', 'page_of']

LIMIT = 5_000_000
"""Most bytes of a page."""
UNTRAINED = 'Untrained: the weights are random. The shapes are right, the values mean nothing.'
LEVELS = (127, 63, 31, 15)  # values on each side of zero to which departures are rounded, the first that fits
LONGEST = 720  # pixels of the picture in the page

_PARTS = ('strongest', 'mean', 'all')


def attention_page(
        models: nn.Module | Mapping[str, nn.Module],
        image: Picture,
        blocks: BlockId | Sequence[BlockId] | None = None,
        pixel: tuple[float, float] | None = None,
        channel: int | str = 'strongest',
        *,
        size: int | None = None,
        untrained: str | Sequence[str] = (),
        title: str = 'What a block attends to',
        limit: int = LIMIT,
) -> str:
    """Makes a page of footprint weights that needs no server and no network.

    On the page one moves a pixel over the picture and sees its footprint on the pixels that it weighs, its weights over
    the channels, the part that is the same at every pixel and the part that the content adds; several networks stand
    side by side. Weights are stored as their mean over the picture, in float32, and the departures from it, rounded to
    1/127 of each channel's largest or, where the page would be too large, more coarsely; the page says how.

    Args:
        models: A SAN, or a module that holds one; or several by their names.
        image: A path, a PIL picture, or a uint8 array (H, W, 3), RGB.
        blocks: A block, as for `attention_weights`, or a list of them; None is the last of each stage. A tuple of
            two numbers is (stage, block).
        pixel: (x, y) on the given picture that is chosen first; None is the centre.
        channel: Weight channel that is drawn first: a number, 'strongest', 'mean' or 'all'.
        size: Shorter side to which the picture is scaled for the networks, as for `visualize.footprint_figure`.
        untrained: Names of the models whose weights are random, which the page says; [''] for a model without a name.
        title: Heading of the page.
        limit: Most bytes of the page.

    Returns:
        HTML.

    Raises:
        ValueError: There is no SAN, block, channel or pixel as given, or the page would have more bytes than `limit`.
        ImportError: matplotlib is missing.
    """
    named = models if isinstance(models, Mapping) else {'': models}
    untrained = [untrained] if isinstance(untrained, str) else untrained
    pixel = None if pixel is None else (float(pixel[0]), float(pixel[1]))
    channel = int(channel) if isinstance(channel, np.integer) else channel
    studies = {name: Study(model, image, size) for name, model in named.items()}
    return page_of(studies, blocks, pixel, channel, untrained=untrained, title=title, limit=limit)


def page_of(
        studies: Mapping[str, Study],
        blocks: BlockId | Sequence[BlockId] | Mapping[str, BlockId] | None = None,
        pixel: tuple[float, float] | None = None,
        channel: int | str = 'strongest',
        part: str = 'weights',
        *,
        untrained: Sequence[str] = (),
        title: str = 'What a block attends to',
        limit: int = LIMIT,
) -> str:
    """`attention_page` of pictures that ran through their networks already.

    `blocks` may be a block for each network, by name; `part` is what is drawn on the picture first: 'weights', or
    'content' for what the content adds.
    """
    visualize.new_figure(1, 1)  # fails early if matplotlib is missing
    if not studies:
        raise ValueError('give at least one network')
    first = next(iter(studies.values()))
    point, = visualize.list_points(first.shown, None if pixel is None else [pixel], None)
    chosen = {name: _blocks(study, blocks[name] if isinstance(blocks, Mapping) else blocks)
              for name, study in studies.items()}
    groups = max(len(studies[name].seen(block.name).mean) for name, found in chosen.items() for block in found)
    if channel not in _PARTS and not (isinstance(channel, int) and 0 <= channel < groups):
        raise ValueError(f'channel must be a weight channel, 0 to {groups - 1}, or one of {", ".join(_PARTS)}, got '
                         f'{channel!r}')
    size = 0
    for levels in LEVELS:
        networks = [dict(name=name, untrained=name in untrained,
                         blocks=[_facts(study, block, levels) for block in chosen[name]])
                    for name, study in studies.items()]
        page = _fill(title, dict(_common(first), networks=networks, channel=channel, part=part, pixel=point,
                                 held=pixel is not None, block=next(iter(chosen.values()))[-1].name,
                                 names=_names(chosen), note=_note(first, levels)))
        size = len(page.encode())
        if size <= limit:
            return page
    raise ValueError(f'the page would have {size / 1e6:.1f} MB, and {limit / 1e6:.1f} are allowed: take a smaller '
                     'size, or fewer blocks')


def _blocks(study: Study, blocks: BlockId | Sequence[BlockId] | None) -> list[AttentionBlock]:
    if blocks is None:
        return list({block.stage: block for block in study.net.blocks.values()}.values())
    if not isinstance(blocks, (str, int)) and not len(blocks):
        raise ValueError('blocks is empty: give at least one block, or None for the last of each stage')
    alone = isinstance(blocks, (str, int)) or isinstance(blocks, tuple) and isinstance(blocks[0], int)
    several: Sequence[Any] = [blocks] if alone else blocks  # type: ignore[assignment]
    return [find_block(study.net, block) for block in several]


def _names(chosen: Mapping[str, Sequence[AttentionBlock]]) -> dict[str, str]:
    return {block.name: f'{block.name}, stride {block.stride}' for found in chosen.values() for block in found}


def _text(values: Tensor) -> str:
    return base64.b64encode(np.ascontiguousarray(values.float().numpy()).tobytes()).decode()


def _facts(study: Study, block: AttentionBlock, levels: int) -> dict[str, Any]:
    """What the page knows of a block: its footprint, its mean weights, and each pixel's departure from them."""
    seen, shown, layer = study.seen(block.name), study.shown, block.attn
    height, width = shown.on_stride(block.stride)
    departures = seen.weights - seen.mean
    step = departures.abs().amax((0, 2, 3)).clamp(min=1e-30) / levels
    rounded = (departures / step[:, None, None]).round().to(torch.int8).permute(1, 2, 3, 0).contiguous()
    pad = geometry.padding(layer.kernel_size, layer.dilation)
    left, right, bottom, top = shown.box(0, 0, 1, 1, block.stride)
    return dict(
        name=block.name, title=f'{visualize.describe_block(block)}, {len(seen.mean)} weight channels', label=seen.label,
        pairwise=layer.is_pairwise, kernel=layer.kernel_size, dilation=layer.dilation, groups=len(seen.mean),
        height=height, width=width, cell=[right - left, bottom - top],
        rows=geometry.reflection_index(height, pad).tolist(), columns=geometry.reflection_index(width, pad).tolist(),
        mean=_text(seen.mean), step=step.tolist(), fixed=seen.fixed(), departs=_text(seen.departure()),
        uses=_text(effective_size(seen.weights).mean(1)), most=_largest(seen.weights),
        most_content=_largest(departures),
        departures=base64.b64encode(zlib.compress(rounded.numpy().tobytes(), 9)).decode())


def _largest(values: Tensor) -> list[float]:
    """Ends of the colour scales for (P, G, k, k): of each channel, of the mean of all, and of all together."""
    each = values.abs().amax((0, 2, 3))
    return [*each.tolist(), values.mean(1).abs().max().item(), each.max().item()]


def _common(study: Study) -> dict[str, Any]:
    """The picture, and the colours of the scales as `visualize` has them: 256 RGBA values each."""
    tall, wide = study.shown.original.shape[:2]
    picture, file = Image.fromarray(study.shown.original), io.BytesIO()
    picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    picture.save(file, 'JPEG', quality=88)
    scales = dict(signed=visualize.Scale('RdBu_r', -1, 1, ''), plain=visualize.Scale('inferno', 0, 1, ''))
    colours = {name: base64.b64encode((255 * scale.overlay(np.linspace(scale.least, scale.most, 256))).round().astype(
        np.uint8).tobytes()).decode() for name, scale in scales.items()}
    return dict(picture='data:image/jpeg;base64,' + base64.b64encode(file.getvalue()).decode(), width=wide, height=tall,
                colours=colours, untrained=UNTRAINED)


def _note(study: Study, levels: int) -> str:
    (height, width), (tall, wide) = study.shown.scaled.shape[:2], study.shown.original.shape[:2]
    scaled = '' if (height, width) == (tall, wide) else f' The networks saw it at {width} x {height} pixels.'
    return (f'The picture has {wide} x {tall} pixels.{scaled} Departures from the mean weights are rounded to '
            f'1/{levels} of the largest of their channel. Beyond the border the picture is mirrored.')


def _fill(title: str, data: Mapping[str, Any]) -> str:
    template = (importlib.resources.files(__package__) / 'page.html').read_text(encoding='utf-8')
    text = json.dumps(data, separators=(',', ':'), allow_nan=False).replace('<', '\\u003c')
    parts = dict(__TITLE__=html.escape(title), __DATA__=text)
    return re.sub('|'.join(parts), lambda found: parts[found[0]], template)
