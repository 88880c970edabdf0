"""The README's Python examples run."""
import re

import pytest
from code_blocks import ROOT, blocks, check_command, check_config, link_checkout, run_python

BLOCKS = [block for block in blocks(ROOT / 'README.md') if block.language == 'python']


def name(block):
    return f'line{block.line}'


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """A folder of one's own, from which the checkout's configs are where the README says."""
    link_checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('block', [b for b in BLOCKS if b.text.startswith('import timm')], ids=name)
def test_scripts(block):
    for word, module in dict(smp='segmentation_models_pytorch', transformers='transformers', visualize='matplotlib',
                             skimage='skimage', export_onnx='onnxruntime').items():
        if word in block.text:
            pytest.importorskip(module, reason='needs the test extra')
    run_python(block, {})


@pytest.mark.parametrize('block', [b for b in BLOCKS if b.is_config], ids=name)
def test_configs(block, folder):
    pytest.importorskip('mmdet', reason='needs the mm extra')
    pytest.importorskip('mmseg', reason='needs the mm extra')
    check_config(block, folder)


def test_runner():
    """The training script, up to the data: COCO is not here."""
    pytest.importorskip('mmdet', reason='needs the mm extra')
    block, = (b for b in BLOCKS if 'Runner' in b.text)
    with pytest.raises(FileNotFoundError, match='instances_train2017.json'):
        run_python(block, {})


def test_inferencer(folder):
    """The inferencer, on a video and a checkpoint of untrained weights."""
    pytest.importorskip('mmdet', reason='needs the mm extra')
    import cv2
    import numpy as np
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    import san_backbones.mm  # noqa: F401
    block, = (b for b in BLOCKS if 'DetInferencer' in b.text)
    config = Config.fromfile(re.search(r"'(mm_configs.*?)'", block.text)[1])
    init_default_scope(config.default_scope)
    torch.save(dict(state_dict=MODELS.build(config.model).state_dict(), meta=dict()), 'epoch_12.pth')
    video = cv2.VideoWriter('clip.mp4', cv2.VideoWriter_fourcc(*'mp4v'), 5, (64, 48))
    for level in (50, 100, 150):
        video.write(np.full((48, 64, 3), level, np.uint8))
    video.release()
    run_python(block, {})
    assert len(list((folder / 'out' / 'vis').iterdir())) == 3


def test_commands():
    pytest.importorskip('typer', reason='needs the cli extra')
    commands = re.findall(r'^    ((?:san-backbones|make) .*)', (ROOT / 'README.md').read_text(), re.M)
    assert len(commands) == 12
    for command in commands:
        check_command(command)


def test_every_kind_of_block_is_tested():
    untested = [b for b in BLOCKS if not b.text.startswith('import timm') and not b.is_config
                and 'Runner' not in b.text and 'DetInferencer' not in b.text]
    assert len(BLOCKS) == 12 and not untested
