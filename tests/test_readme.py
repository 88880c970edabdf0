"""The README's examples run, and those of the page on OpenMMLab that need more than a page's test gives."""
import re

import pytest

from tests.code_blocks import ROOT, blocks, check_command, link_checkout, run_python

BLOCKS = [block for block in blocks(ROOT / 'README.md') if block.language == 'python']
OPENMMLAB = blocks(ROOT / 'docs/how-to/openmmlab.md')


def name(block):
    return f'line{block.line}'


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """A folder of one's own, from which the checkout's configs are where the README says."""
    link_checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('block', BLOCKS, ids=name)
def test_scripts(block, monkeypatch):
    """With weights that ship: no network."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    run_python(block, {})


def test_runner():
    """The training script, up to the data: COCO is not here."""
    pytest.importorskip('mmdet', reason='needs the mm extra')
    block, = (b for b in OPENMMLAB if 'Runner' in b.text)
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
    block, = (b for b in OPENMMLAB if 'DetInferencer' in b.text)
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
    assert len(commands) == 5
    for command in commands:
        check_command(command)


def test_short_and_whole():
    """A page that is read to its end; what it links to is there."""
    text = (ROOT / 'README.md').read_text()
    assert BLOCKS and 600 <= len(text.split()) <= 900
    for link in re.findall(r'\]\(([^)#\s]+)', text):
        assert link.startswith('https://') or (ROOT / link).exists(), link
