"""What these tests share."""
import pytest
from tests.extract.noise_pictures import noise


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """As one process, without a network."""
    from huggingface_hub import constants
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'SLURM_PROCID', 'SLURM_STEP_NUM_TASKS'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)


@pytest.fixture
def folder(tmp_path):
    """Seven pictures of different kinds and sizes, in a folder and one below it, in their order."""
    names = ['a.png', 'b.jpg', 'c.webp', 'd.bmp', 'sub/a.png', 'sub/e.jpg', 'sub/z.png']
    for seed, name in enumerate(names):
        noise(tmp_path / 'pictures' / name, 40 + 3 * seed, 60 - 2 * seed, seed)
    return tmp_path / 'pictures'
