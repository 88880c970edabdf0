"""Pictures that are made here, and the small network whose trained weights ship."""
import numpy as np
from PIL import Image

MODEL = 'test_san_patchwise'


def noise(path, height=48, width=64, seed=0, mode='RGB', **options):
    """Saves a smooth picture, which survives JPEG, and returns its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    picture.save(path, **options)
    return np.asarray(picture)
