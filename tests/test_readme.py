"""The README's Python examples run."""
import pathlib
import re

import pytest

README = pathlib.Path(__file__).resolve().parents[1] / 'README.md'
BLOCKS = re.findall(r'```python\n(.*?)```', README.read_text(), re.S)


@pytest.mark.parametrize('block', [b for b in BLOCKS if b.startswith('import timm')])
def test_scripts(block):
    exec(compile(block, 'README.md', 'exec'), {})


@pytest.mark.parametrize('block', [b for b in BLOCKS if b.startswith('_base_')])
def test_configs(block, tmp_path):
    pytest.importorskip('mmdet', reason='needs the mm extra')
    pytest.importorskip('mmseg', reason='needs the mm extra')
    import san_backbones.mm  # noqa: F401
    from mmengine.config import Config
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import HOOKS, MODELS, init_default_scope
    (tmp_path / 'mm_configs').symlink_to(README.parent / 'mm_configs')
    (tmp_path / 'config.py').write_text(block)
    config = Config.fromfile(tmp_path / 'config.py')
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    assert type(model.backbone).__name__ == 'SANBackbone'
    build_optim_wrapper(model, config.optim_wrapper)
    for hook in config.get('custom_hooks', []):
        HOOKS.build(hook)


def test_runner(monkeypatch, tmp_path):
    """The training script, up to the data: COCO is not here."""
    pytest.importorskip('mmdet', reason='needs the mm extra')
    block, = (b for b in BLOCKS if 'Runner' in b)
    (tmp_path / 'mm_configs').symlink_to(README.parent / 'mm_configs')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='instances_train2017.json'):
        exec(compile(block, 'README.md', 'exec'), {})


def test_inferencer(monkeypatch, tmp_path):
    """The inferencer, on a video and a checkpoint of untrained weights."""
    pytest.importorskip('mmdet', reason='needs the mm extra')
    import cv2
    import numpy as np
    import san_backbones.mm  # noqa: F401
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope
    block, = (b for b in BLOCKS if 'DetInferencer' in b)
    (tmp_path / 'mm_configs').symlink_to(README.parent / 'mm_configs')
    monkeypatch.chdir(tmp_path)
    config = Config.fromfile(re.search(r"'(mm_configs.*?)'", block)[1])
    init_default_scope(config.default_scope)
    torch.save(dict(state_dict=MODELS.build(config.model).state_dict(), meta=dict()), 'epoch_12.pth')
    video = cv2.VideoWriter('clip.mp4', cv2.VideoWriter_fourcc(*'mp4v'), 5, (64, 48))
    for level in (50, 100, 150):
        video.write(np.full((48, 64, 3), level, np.uint8))
    video.release()
    exec(compile(block, 'README.md', 'exec'), {})
    assert len(list((tmp_path / 'out' / 'vis').iterdir())) == 3


def test_every_kind_of_block_is_tested():
    untested = [b for b in BLOCKS if not b.startswith(('import timm', '_base_')) and 'Runner' not in b
                and 'DetInferencer' not in b]
    assert len(BLOCKS) == 9 and not untested
