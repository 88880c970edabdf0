"""A tiny architecture, and a handful of made-up pictures with boxes and masks: plain data, without OpenMMLab."""
import json

import cv2
import numpy as np

ARCH = dict(attention='patchwise', depths=(1, 1, 1, 1, 1), widths=(32, 32, 64, 64, 96), stem_width=16, kernel_sizes=3)
WIDTHS = [32, 64, 64, 96]  # of the maps that a neck or head takes
CLASSES = ('square', 'disc')


def picture(i, height=64, width=64):
    """(height, width, 3) uint8: noise, and a bright square that begins at (10, 8 i)."""
    image = np.random.default_rng(i).integers(0, 80, (height, width, 3), np.uint8)
    image[10:40, 8 * i:8 * i + 24] += 150
    return image


def coco(folder, pictures=4, classes=CLASSES):
    """Writes pictures with one square each, and coco.json, whose content it returns."""
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(1, pictures + 1):
        cv2.imwrite(str(folder / f'{i}.png'), picture(i))
        x = 8 * i
        images.append(dict(id=i, file_name=f'{i}.png', height=64, width=64))
        annotations.append(dict(id=i, image_id=i, category_id=1, iscrowd=0, area=24 * 30, bbox=[x, 10, 24, 30],
                                segmentation=[[x, 10, x + 24, 10, x + 24, 40, x, 40]]))
    content = dict(images=images, annotations=annotations,
                   categories=[dict(id=i, name=name) for i, name in enumerate(classes, 1)])
    (folder / 'coco.json').write_text(json.dumps(content))
    return content


def masks(folder, pictures=4, height=64, width=64):
    """Writes images/ and masks/: label 0 in the square, 1 elsewhere."""
    for name in ('images', 'masks'):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(1, pictures + 1):
        image = picture(i, height, width)
        cv2.imwrite(str(folder / f'images/{i}.jpg'), image)
        cv2.imwrite(str(folder / f'masks/{i}.png'), (image[..., 0] < 120).astype(np.uint8))
