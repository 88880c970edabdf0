"""Draws the figures of the pages: `python docs/figures.py FOLDER [PAGE]`.

conf.py calls `draw_all` before each build. Nothing here is drawn by hand: positions, weights and counts come out of the
code that they explain, the floors of the house out of the table on their page, and the figures of PAGES out of the code
on those pages.
"""
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import san_backbones  # noqa: F401, registers the models
from san_backbones import SAN, PairwiseAttention, PatchwiseAttention
from san_backbones.count import count_multiply_adds, count_parameters
from san_backbones.ops import coordinates, footprint, padding, reflect_pad, reflection_index
from san_backbones.ops.reference import aggregate

HERE = pathlib.Path(__file__).resolve().parent
BLUE, ORANGE, GREEN, RED, GREY = '#0072B2', '#E69F00', '#009E73', '#D55E00', '0.55'  # Okabe and Ito
STYLE: Any = {'font.size': 9, 'axes.titlesize': 9.5, 'axes.spines.top': False, 'axes.spines.right': False,
         'svg.hashsalt': 'san', 'svg.fonttype': 'path', 'legend.frameon': False}


def scene(size: int = 28) -> torch.Tensor:
    """A picture with one straight and one round edge: (1, 1, size, size) in [0, 1]."""
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing='ij')
    disc = ((y - 0.6) ** 2 + (x - 0.62) ** 2 < 0.06).float()
    slope = (x + 0.55 * y < 0.55).float()
    generator = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(size, size, generator=generator)
    return (0.25 + 0.55 * disc + 0.4 * slope * (1 - disc) + noise)[None, None]


def bilateral(sharpness: float = 9., kernel_size: int = 7) -> PairwiseAttention:
    """A pairwise attention on one-channel maps whose weights are softmax_j(-sharpness |x_i - x_j|), set by hand."""
    layer: Any = PairwiseAttention(1, rel_planes=2, out_planes=1, share_planes=1, kernel_size=kernel_size,
                                   position='none', norm_layer=torch.nn.Identity).eval()
    signs = torch.tensor([1., -1.]).view(2, 1, 1, 1)
    with torch.no_grad():
        for projection in (layer.query, layer.key):  # (x, -x): of the difference one sign survives the ReLU
            projection.weight.copy_(signs)
            projection.bias.zero_()
        layer.value.weight.fill_(1.)
        layer.value.bias.zero_()
        layer.weight_mlp.fc1.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
        layer.weight_mlp.fc2.weight.fill_(-sharpness)
        layer.weight_mlp.fc2.bias.zero_()
    return layer


def guided(kernel_size: int = 7) -> PatchwiseAttention:
    """A patchwise attention whose weights grow towards the brighter side of the footprint, set by hand.

    Two numbers describe a footprint, its slope to the right and downwards; each place is weighed by how far it lies
    along that slope. No function of the pair (x_i, x_j) can do that.
    """
    area, reach = kernel_size ** 2, kernel_size // 2
    layer: Any = PatchwiseAttention(1, rel_planes=1, out_planes=1, share_planes=1, kernel_size=kernel_size,
                                    norm_layer=torch.nn.Identity).eval()
    down, right = torch.meshgrid(torch.arange(-reach, reach + 1.), torch.arange(-reach, reach + 1.), indexing='ij')
    hidden = torch.stack([right, -right, down, -down]).flatten(1)  # each slope in both signs, for the ReLU
    layer.weight_mlp.fc1 = torch.nn.Conv2d(area + 1, 4, 1, bias=False)
    layer.weight_mlp.norm2 = torch.nn.Identity()
    layer.weight_mlp.fc2 = torch.nn.Conv2d(4, area, 1)
    with torch.no_grad():
        for projection in (layer.query, layer.key, layer.value):
            projection.weight.fill_(1.)
            projection.bias.zero_()
        layer.weight_mlp.fc1.weight.copy_(torch.cat([torch.zeros(4, 1), hidden], 1)[:, :, None, None])
        layer.weight_mlp.fc2.weight.copy_(hidden.t()[:, :, None, None] / area ** 1.5)
        layer.weight_mlp.fc2.bias.fill_(1. / area)
    return layer


def weights(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The weights a layer of one weight channel gives to the footprint of every pixel: (k, k, H, W)."""
    logits = []
    hook = layer.weight_mlp.register_forward_hook(lambda module, args, output: logits.append(output))
    with torch.no_grad():
        layer(x)  # a hook makes it call gamma as a module
    hook.remove()
    result = logits[0].unflatten(3, x.shape[2:])
    result = result.softmax(2)[0, 0] if layer.is_pairwise else result[0, :, 0]
    return result.unflatten(0, [layer.kernel_size] * 2)


def _frame(axis, centre, k, colour, dilation=1):
    reach = dilation * (k // 2)
    axis.add_patch(Rectangle((centre[1] - reach - .5, centre[0] - reach - .5), 2 * reach + 1, 2 * reach + 1, fill=False,
                             edgecolor=colour, linewidth=1.8))
    axis.plot(centre[1], centre[0], 'x', color=colour, markersize=6, markeredgewidth=1.8)


def _bare(axis):
    axis.set(xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set_visible(True)
        side.set_color('0.7')


def footprints() -> Figure:
    """The weights that a convolution and both attentions give to the footprints of three pixels."""
    picture, k = scene(), 7
    pixels = {(11, 6): BLUE, (17, 11): ORANGE, (6, 22): GREEN}
    box = np.exp(-(np.hypot(*np.mgrid[-3:4, -3:4]) / 2.2) ** 2)
    found = {'convolution': None, 'pairwise': weights(bilateral(), picture), 'patchwise': weights(guided(), picture)}
    figure = Figure(figsize=(8.6, 4.3))
    grid = figure.add_gridspec(3, 5, width_ratios=(3.1, 1, 1, 1, 1), wspace=0.15, hspace=0.12)
    axis = figure.add_subplot(grid[:, 0])
    axis.imshow(picture[0, 0], cmap='gray', vmin=0, vmax=1)
    axis.set_title('x, and R(i) of three pixels i')
    _bare(axis)
    for centre, colour in pixels.items():
        _frame(axis, centre, k, colour)
    brightest = {name: max(float(found_weights[..., y, x].max()) for y, x in pixels)
                 for name, found_weights in found.items() if found_weights is not None}
    for row, (centre, colour) in enumerate(pixels.items()):
        columns = {'the footprint': picture[0, 0, centre[0] - 3:centre[0] + 4, centre[1] - 3:centre[1] + 4].numpy()}
        for name, all_weights in found.items():
            columns[name] = box / box.sum() if all_weights is None else all_weights[..., centre[0], centre[1]].numpy()
        for column, (name, values) in enumerate(columns.items(), 1):
            axis = figure.add_subplot(grid[row, column])
            if column == 1:
                axis.imshow(values, cmap='gray', vmin=0, vmax=1)
            else:
                axis.imshow(values, cmap='viridis', vmin=0, vmax=brightest.get(name))
            _bare(axis)
            for side in axis.spines.values():
                side.set_color(colour)
                side.set_linewidth(1.8)
            if row == 0:
                axis.set_title(name)
    return figure


def sharing() -> Figure:
    """Which weight channel each output channel uses, asked of `aggregate` by giving one weight at a time."""
    m, shares, k = 32, 8, 3
    cw = m // shares
    value = reflect_pad(torch.ones(1, m, 4, 4), padding(k, 1))
    uses = torch.zeros(m, cw)
    for channel in range(cw):
        logits = torch.zeros(1, cw, k * k, 4, 4)
        logits[:, channel] = 1
        uses[:, channel] = aggregate(logits.flatten(1, 2).unsqueeze(2), value, False, k, 1)[0, :, 0, 0]
    owner = uses.argmax(1)
    figure = Figure(figsize=(8.6, 1.35))
    axis = figure.add_axes((0.01, 0.3, 0.98, 0.42))
    colours = [BLUE, ORANGE, GREEN, RED]
    for channel in range(m):
        axis.add_patch(Rectangle((channel, 0), 0.92, 1, color=colours[owner[channel]]))
        axis.text(channel + .46, .5, str(channel), ha='center', va='center', color='white', fontsize=8)
    axis.set(xlim=(-.1, m), ylim=(-.05, 1.05))
    axis.set_axis_off()
    axis.set_title(f'output channels of m = {m}, coloured by the weight channel (of cw = {cw}) that each is multiplied '
                   'with', loc='left')
    for channel in range(cw):
        axis.text(8 * channel + .1, -.65, f'weight channel {channel}: c mod {cw} = {channel}', color=colours[channel])
    return figure


def geometry() -> Figure:
    """Footprints at several dilations, reflection at a corner, and repeated reflection on a narrow map."""
    size, k = 15, 5
    numbers = torch.arange(size * size, dtype=torch.float32).view(1, 1, size, size)
    figure = Figure(figsize=(8.6, 4.6))
    grid = figure.add_gridspec(2, 4, height_ratios=(1.7, 1), hspace=0.35, wspace=0.12)
    cases = [((7, 7), 1, 'dilation 1'), ((7, 7), 2, 'dilation 2'), ((7, 7), 3, 'dilation 3'),
             ((1, 2), 2, 'dilation 2, at the border')]
    for column, (centre, dilation, title) in enumerate(cases):
        read = footprint(reflect_pad(numbers, padding(k, dilation)), k, dilation)[0, 0, :, :, centre[0], centre[1]]
        count = torch.bincount(read.flatten().long(), minlength=size * size).view(size, size)
        axis = figure.add_subplot(grid[0, column])
        axis.imshow(np.where(count == 0, np.nan, count), cmap='Blues', vmin=-1, vmax=5)
        for y, x in (count > 1).nonzero().tolist():
            axis.text(x, y, str(int(count[y, x])), ha='center', va='center', fontsize=7,
                      color='white' if count[y, x] > 2 else 'black')
        axis.set_xticks(np.arange(-.5, size), minor=True)
        axis.set_yticks(np.arange(-.5, size), minor=True)
        axis.grid(which='minor', color='0.88', linewidth=.5)
        axis.tick_params(which='both', length=0, labelbottom=False, labelleft=False)
        axis.add_patch(Rectangle((centre[1] - .5, centre[0] - .5), 1, 1, fill=False, edgecolor=RED, linewidth=1.8))
        axis.set_title(title)
        axis.set(xlim=(-.5, size - .5), ylim=(size - .5, -.5))
    axis = figure.add_subplot(grid[1, :])
    narrow, pad = 4, 9
    index = reflection_index(narrow, pad)
    place = torch.arange(-pad, narrow + pad)
    axis.axvspan(-.5, narrow - .5, color='0.93')
    axis.plot(place, index, '-o', color=BLUE, markersize=4, linewidth=1)
    axis.set(xticks=place[::3], yticks=range(narrow), xlabel='position on the padded axis; grey: the map itself',
             ylabel='pixel that is read')
    axis.set_title(f'an axis of {narrow} pixels, padded by {pad} on each side: the mirror is applied again')
    return figure


def positions() -> Figure:
    """What a step of one pixel is worth at each size, and what that does to a crop."""
    figure = Figure(figsize=(8.6, 2.9))
    grid = figure.add_gridspec(1, 3, width_ratios=(1.35, 1, 1), wspace=0.3)
    axis = figure.add_subplot(grid[0])
    widths = [28, 56, 84, 112, 168, 224, 336]
    for ref, colour, name in ((None, RED, 'None, as released'), (56, BLUE, '56: images of 224')):
        step = 0. if ref is None else 2 / (ref - 1)
        offset = [float(torch.diff(coordinates(torch.zeros(1, 1, 2, w), step)[0, 0])[0]) for w in widths]
        axis.plot(widths, offset, '-o', color=colour, markersize=4, label=name)
    axis.axvline(56, color=GREY, linewidth=.8, linestyle=':')
    axis.set(xlabel='width of the map at stride 4, in pixels', ylabel="one pixel's step in x", ylim=(0, .115))
    axis.legend(fontsize=7.5, title='position_ref_size', title_fontsize=7.5)
    torch.manual_seed(0)
    x, k = torch.randn(1, 32, 40, 40), 7
    top, side = 8, 20
    window = slice(top, top + side)
    for column, ref in enumerate((None, 56), 1):
        torch.manual_seed(1)
        layer: Any = PairwiseAttention(32, kernel_size=k, position_ref_size=ref).eval()
        with torch.no_grad():
            layer.position.weight.mul_(4)
            whole, part = layer(x)[:, :, window, window], layer(x[:, :, window, window])
        error = (whole - part).abs().mean(1)[0] / whole.abs().mean()
        axis = figure.add_subplot(grid[column])
        image = axis.imshow(error.clamp(min=1e-8).log10(), cmap='magma', vmin=-7, vmax=0)
        axis.set_title(f'|F(x)[crop] - F(x[crop])|\nposition_ref_size = {ref}', fontsize=8)
        _bare(axis)
    bar = figure.colorbar(image, ax=figure.axes[1:], shrink=.8, pad=.03)
    bar.set_label('relative, log10')
    return figure


def complexity() -> Figure:
    """Parameters and multiply-adds of SAN15 by footprint, and the size of what has a k x k axis."""
    sizes = (3, 5, 7, 9, 11)
    figure = Figure(figsize=(8.6, 2.7))
    axes = figure.subplots(1, 3)
    for attention, colour in (('pairwise', BLUE), ('patchwise', ORANGE)):
        models = [SAN(attention, kernel_sizes=(3, k, k, k, k), device='meta') for k in sizes]
        axes[0].plot(sizes, [count_parameters(model) / 1e6 for model in models], '-o', color=colour, markersize=4,
                     label=attention)
        axes[1].plot(sizes, [count_multiply_adds(model) / 1e9 for model in models], '-o', color=colour, markersize=4)
    pixels, r, cw, m = 200 * 336, 16, 8, 64  # stride 4 of an image of 800 x 1344, 256 channels
    kept = [4 * pixels * k * k * (r + 2 + r + cw) / 2 ** 20 for k in sizes]
    axes[2].plot(sizes, kept, '-o', color=GREY, markersize=4, label='relation, hidden, weights: k² axis')
    axes[2].plot(sizes, [4 * pixels * (2 * r + 2 * m) / 2 ** 20] * len(sizes), '-', color=GREEN,
                 label='φ, ψ, β and y: no k² axis')
    axes[2].legend(fontsize=7.5)
    axes[2].set(yscale='log', ylim=(20, 2e4))
    axes[0].legend()
    for axis, title in zip(axes, ('SAN15: parameters, millions', 'SAN15 at 224: multiply-adds, 10⁹',
                                  'one pairwise layer at 800x1344: MiB'), strict=True):
        axis.set_title(title)
        axis.set(xticks=sizes, xlabel='footprint k')
        if axis is not axes[2]:
            axis.set_ylim(0)
    figure.tight_layout()
    return figure


def architecture() -> Figure:
    """The floors of explanation/architecture.md, from its table, and the ways of an image and of a weight file."""
    rows = [[cell.strip() for cell in line.split('|')[1:3]] for line in
            (HERE / 'explanation/architecture.md').read_text(encoding='utf-8').splitlines()
            if line.startswith('| ') and '`' in line][1:]
    images = {'programs': 'a detector', 'network': 'SAN, Stage, Block', 'layers': 'query, key, value, gamma',
              'operators': 'relation, weights, sum'}
    files = {'people': 'weights get, verify', 'programs': 'init_cfg', 'network': 'folder, package, Hub, authors'}
    figure = Figure(figsize=(9.4, 4.4))
    axis = figure.add_subplot()
    for level, (floor, modules) in enumerate(reversed(rows)):
        axis.add_patch(Rectangle((0, level), 11.6, 0.86, facecolor='0.96', edgecolor='0.6'))
        axis.text(0.1, level + 0.55, floor, weight='bold', fontsize=9, va='center')
        axis.text(0.1, level + 0.23, modules.replace('`', ''), fontsize=6, va='center', family='monospace')
        for x, colour, steps in ((12.1, BLUE, images), (15.8, ORANGE, files)):
            if floor in steps:
                axis.plot(x, level + 0.43, 'o', color=colour, markersize=5)
                axis.text(x + 0.18, level + 0.43, steps[floor], fontsize=8, va='center', color=colour)
    names = [floor for floor, _ in reversed(rows)]
    for x, colour, title, steps in ((12.1, BLUE, 'an image', images),
                                    (15.8, ORANGE, 'a weight file', files)):
        levels = [names.index(floor) + 0.43 for floor in steps]
        axis.plot([x, x], [min(levels), max(levels)], color=colour, linewidth=1.5)
        axis.text(x, len(rows) + 0.1, title, fontsize=9, weight='bold', color=colour)
    axis.set(xlim=(-0.1, 20), ylim=(-0.1, len(rows) + 0.5))
    axis.axis('off')
    return figure


FIGURES = (footprints, sharing, geometry, positions, complexity, architecture)


# pages whose own code draws, and the pictures that it writes and the page shows
PAGES = {
    'how-to/see-attention.md': ('*.png',),
    'tutorial/detection.md': ('truth.png',),
    'tutorial/segmentation.md': ('segmented/vis/0000.jpg',),
}


SMALLEST = 400  # pixels: smaller pictures are enlarged


def run_page(page: pathlib.Path, folder: pathlib.Path, pictures: tuple[str, ...]) -> None:
    """Runs the Python blocks of a page, and keeps the pictures that they write as `folder/PAGE-NAME`.

    A block whose first line names a file is written there, too, as readers are told to.
    """
    here, namespace = os.getcwd(), {'__name__': page.stem}
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        os.symlink(HERE.parent / 'mm_configs', 'mm_configs')
        try:
            for block in re.findall(r'^```python\n(.*?)^```$', page.read_text(), re.M | re.S):
                named = re.match(r'# (\w+\.py)\n', block)
                if named:
                    pathlib.Path(named[1]).write_text(block)
                else:
                    exec(compile(block, str(page), 'exec'), namespace)
        finally:
            os.chdir(here)
        for path in [path for pattern in pictures for path in pathlib.Path(work).glob(pattern)]:
            picture = Image.open(path)
            times = max(1, SMALLEST // picture.width)
            picture.resize((times * picture.width, times * picture.height)).save(folder / f'{page.stem}-{path.name}')


def draw_page(page: str, folder: pathlib.Path) -> None:
    """Runs a page in a process of its own: trainings leave loggers and registries behind."""
    done = subprocess.run([sys.executable, __file__, folder, page], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'the code of {page} failed:\n{done.stderr[-3000:]}')


def draw_all(folder: pathlib.Path) -> None:
    """Writes each figure as `folder/NAME.svg`, the same bytes each time, and those of the pages as `PAGE-NAME.png`."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for page in PAGES:
        draw_page(page, folder)
    random = torch.get_rng_state()
    for figure in FIGURES:
        with rc_context(STYLE):
            figure().savefig(folder / f'{figure.__name__}.svg', bbox_inches='tight', facecolor='white',
                             metadata={'Date': None})
    torch.set_rng_state(random)


if __name__ == '__main__':
    target = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else 'docs/_figures').absolute()
    if len(sys.argv) > 2:
        run_page(HERE / sys.argv[2], target, PAGES[sys.argv[2]])
    else:
        draw_all(target)
