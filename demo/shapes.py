"""Generates a small instance segmentation data set: textured shapes on real photographs.

Every picture is a random crop of a photograph with a few shapes drawn over it, back to front. A shape is rotated,
scaled and squashed at random, filled with a tinted crop of another photograph, lit from one side, and casts a soft
shadow. Its mask covers only its visible part, so the masks of one picture never overlap, as in COCO.

The photographs come with scikit-image's wheel (nothing is downloaded); all of them are CC0, public domain, or without
known copyright restrictions. Training and validation pictures use different photographs, for backgrounds and for
textures.
"""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as rle

KINDS = ('square', 'star', 'ring')
PHOTOGRAPHS = dict(
    train=('astronaut.png', 'motorcycle_left.png', 'rocket.jpg', 'hubble_deep_field.jpg', 'ihc.png', 'brick.png',
           'gravel.png'),
    val=('chelsea.png', 'coffee.png', 'camera.png', 'grass.png'),
)

SHAPES_PER_PICTURE = (2, 5)  # fewest, most
RADIUS = (0.14, 0.28)        # of the circle around a shape, as a fraction of the picture's side
IN_SIGHT = 0.55              # every shape keeps at least this fraction of its area visible
SUPERSAMPLING = 4            # outlines are drawn this many times larger, so that edges come out smooth


def make(folder, train=320, val=40, size=192, seed=0, report=print):
    """Writes the data set in COCO's format, unless the same one is already there.

    Args:
        folder: The output folder, for `annotations/instances_{train,val}.json`, `train/` and `val/`.
        train: Number of training pictures.
        val: Number of held-out pictures.
        size: Side of the square pictures in pixels.
        seed: Random seed; the same seed gives the same pictures.
        report: Called with a line of text about the progress.

    Returns:
        The folder, as a `Path`.

    Raises:
        FileNotFoundError: scikit-image's photographs are not installed.
        FileExistsError: `folder` holds something that this function did not write.
    """
    folder = Path(folder)
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    recipe = dict(train=train, val=val, size=size, seed=seed, code=code)
    note = folder / 'recipe.json'  # written last, so an incomplete data set has none
    if note.exists() and note.read_text() == json.dumps(recipe):
        report(f'data set: {train} + {val} pictures of {size}x{size}, made earlier, in {folder}')
        return folder
    if folder.exists():
        strangers = {path.name for path in folder.iterdir()} - {'annotations', 'train', 'val', note.name}
        if strangers:
            raise FileExistsError(f'{folder} holds files that are not of this data set: {", ".join(sorted(strangers))}')
        shutil.rmtree(folder)

    report(f'data set: making {train} + {val} pictures of {size}x{size} in {folder}')
    (folder / 'annotations').mkdir(parents=True)
    for split, count in dict(train=train, val=val).items():
        coco = write_split(folder / split, split, count, size, seed)
        (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))
    note.write_text(json.dumps(recipe))
    return folder


def write_split(folder, split, count, size, seed):
    """Writes `count` pictures into `folder` and returns their COCO annotations as a dict."""
    folder.mkdir()
    photographs = read_photographs(split)
    images, annotations = [], []
    for image_id in range(1, count + 1):
        # One generator per picture: a picture does not depend on their number.
        rng = np.random.default_rng([seed, list(PHOTOGRAPHS).index(split), image_id])
        picture, kinds, masks = compose(photographs, size, rng)
        name = f'{image_id:06d}.jpg'
        cv2.imwrite(str(folder / name), picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
        images.append(dict(id=image_id, file_name=name, width=size, height=size))
        for kind, mask in zip(kinds, masks):
            annotations.append(annotate(mask, kind, image_id, annotation_id=len(annotations) + 1))
    categories = [dict(id=number, name=name, supercategory='shape') for number, name in enumerate(KINDS, start=1)]
    return dict(images=images, annotations=annotations, categories=categories)


def annotate(mask, kind, image_id, annotation_id):
    """Makes one entry of COCO's annotations. The mask is run-length encoded, since visible parts may have holes."""
    encoded = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    box, area = rle.toBbox(encoded).tolist(), int(rle.area(encoded))
    encoded['counts'] = encoded['counts'].decode('ascii')
    return dict(id=annotation_id, image_id=image_id, category_id=KINDS.index(kind) + 1, segmentation=encoded,
                bbox=box, area=area, iscrowd=0)


def read_photographs(split):
    """Reads the photographs of one split as BGR arrays."""
    package = importlib.util.find_spec('skimage')  # finds the folder without importing scikit-image
    folder = Path(package.origin).parent / 'data' if package else Path('skimage/data')
    missing = [name for name in PHOTOGRAPHS[split] if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f'the demo uses photographs that come with scikit-image, and {folder} lacks '
                                f'{", ".join(missing)}; `pip install scikit-image` brings them')
    return [cv2.imread(str(folder / name)) for name in PHOTOGRAPHS[split]]


def compose(photographs, size, rng):
    """Makes one picture.

    Returns:
        The picture (size x size x 3, BGR, uint8), the kinds of its shapes, and their visible masks
        (bool, size x size each), both from back to front.
    """
    picture = crop(photographs, size, rng)
    kinds, masks, areas = [], [], []
    for _ in range(rng.integers(SHAPES_PER_PICTURE[0], SHAPES_PER_PICTURE[1] + 1)):
        for _ in range(20):  # attempts to fit a shape; a crowded picture gets fewer
            kind = KINDS[rng.integers(len(KINDS))]
            centre = size * rng.uniform(0.08, 0.92, 2)
            radius = size * rng.uniform(*RADIUS)
            borders = [border * radius + centre for border in outline(kind, rng)]
            alpha = draw(borders, size)
            mask = alpha > 0.5
            behind = [other & ~mask for other in masks]
            whole, *holes = [cv2.contourArea(border.astype(np.float32)) for border in borders]
            whole -= sum(holes)
            if all(seen.sum() >= IN_SIGHT * area for seen, area in zip(behind + [mask], areas + [whole])):
                picture = paint(picture, alpha, crop(photographs, size, rng), centre, radius, rng)
                kinds, masks, areas = kinds + [kind], behind + [mask], areas + [whole]
                break
    noise = rng.normal(0, rng.uniform(0, 5), picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8), kinds, masks


def crop(photographs, size, rng):
    """Crops a random part of a random photograph to size x size, rotates and mirrors it, and changes its colours."""
    photograph = photographs[rng.integers(len(photographs))]
    side = int(min(photograph.shape[:2]) * rng.uniform(0.35, 0.95))
    top, left = (rng.integers(length - side + 1) for length in photograph.shape[:2])
    piece = cv2.resize(photograph[top:top + side, left:left + side], (size, size), interpolation=cv2.INTER_AREA)
    piece = np.rot90(piece, rng.integers(4))[:, ::rng.choice([-1, 1])].astype(np.float32)
    contrast, gain, lift = rng.uniform(0.7, 1.2), rng.uniform(0.8, 1.2, 3), rng.uniform(-25, 25)
    return np.clip((piece - 128) * contrast * gain + 128 + lift, 0, 255)


def outline(kind, rng):
    """Returns the borders of a shape in the unit circle, rotated and squashed at random: arrays of x, y rows.

    A second border encloses a hole.
    """
    transform = rotation(rng) @ np.diag([1.0, rng.uniform(0.75, 1.0)]) @ rotation(rng)
    radii = dict(square=[np.ones(4)], star=[np.tile([1, 0.45], 5)], ring=[np.ones(64), np.full(64, 0.5)])[kind]
    borders = []
    for radius in radii:
        angles = np.arange(len(radius)) * 2 * np.pi / len(radius)
        borders.append(np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1) @ transform)
    return borders


def rotation(rng):
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def draw(borders, size):
    """Computes how much of every pixel a shape covers: float32 in [0, 1], size x size."""
    large = np.zeros((size * SUPERSAMPLING, size * SUPERSAMPLING), np.uint8)
    cv2.fillPoly(large, [np.round(border * SUPERSAMPLING).astype(np.int32) for border in borders], 255)  # even-odd
    return cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def paint(picture, alpha, texture, centre, radius, rng):
    """Draws one shape over the picture: its shadow, then its tinted texture, lit from a random side."""
    size = len(picture)
    light = rng.uniform(0, 2 * np.pi)
    towards = np.array([np.cos(light), np.sin(light)])

    away = np.float32([[1, 0, -0.12 * radius * towards[0]], [0, 1, -0.12 * radius * towards[1]]])
    shadow = cv2.GaussianBlur(cv2.warpAffine(alpha, away, (size, size)), (0, 0), 0.08 * radius)
    picture = picture * (1 - 0.5 * shadow[..., None])

    tint = np.full((1, 1, 3), [rng.uniform(0, 180), rng.uniform(80, 255), rng.uniform(90, 255)], np.uint8)
    tint = cv2.cvtColor(tint, cv2.COLOR_HSV2BGR).astype(np.float32)
    strength = rng.uniform(0.35, 0.8)
    y, x = np.mgrid[:size, :size]
    shade = 1 + 0.3 * ((x - centre[0]) * towards[0] + (y - centre[1]) * towards[1]) / radius
    surface = (texture * (1 - strength) + tint * strength) * shade[..., None]
    return picture * (1 - alpha[..., None]) + np.clip(surface, 0, 255) * alpha[..., None]
