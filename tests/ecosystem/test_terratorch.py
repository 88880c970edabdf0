"""terratorch: SAN from its registry of timm's models, under a UPerNet."""
import importlib
import importlib.util
import json
import shlex
import subprocess
import sys

import pytest

if importlib.util.find_spec('terratorch') is None:
    pytest.skip('needs terratorch', allow_module_level=True)
# terratorch imports mmseg where it is, which wants mmcv's operators
importlib.import_module('san_backbones' if importlib.util.find_spec('mmseg') is None else 'san_backbones.mm')

import timm  # noqa: E402
import torch  # noqa: E402
from terratorch.registry import BACKBONE_REGISTRY  # noqa: E402
from terratorch.tasks import SemanticSegmentationTask  # noqa: E402

from tests import ROOT  # noqa: E402
from tests.ecosystem.steps import check_step  # noqa: E402

NAME = 'timm_test_san_patchwise'


def test_features_are_those_of_timm():
    backbone = BACKBONE_REGISTRY.build(NAME, pretrained=True).eval()
    expected = timm.create_model('test_san_patchwise', pretrained=True, features_only=True).eval()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(backbone(images), expected(images), strict=True))
    assert backbone.out_channels == [32, 64, 64, 96, 128]


def test_a_segmenter():
    torch.manual_seed(0)
    task = SemanticSegmentationTask(model_factory='EncoderDecoderFactory', model_args=dict(
        backbone=NAME, backbone_pretrained=True, decoder='UperNetDecoder', decoder_channels=16, num_classes=3))
    masks = task(torch.rand(2, 3, 64, 64)).output
    assert masks.shape == (2, 3, 64, 64)
    loss = torch.nn.functional.cross_entropy(masks, torch.randint(0, 3, (2, 64, 64)))
    check_step(loss, task, task.model.encoder)


def test_the_command_line_of_the_page(tmp_path):
    """It starts, also beside mmseg without operators, and a configuration may name a SAN."""
    page = (ROOT / 'docs/how-to/other-libraries.md').read_text()
    line, = (line for line in page.splitlines() if 'terratorch.__main__' in line)
    _, _, option, code, *_ = shlex.split(line)
    if importlib.util.find_spec('mmseg') is None:
        code = code.replace('san_backbones.mm', 'san_backbones')
    task = dict(class_path='terratorch.tasks.SemanticSegmentationTask', init_args=dict(
        model_factory='EncoderDecoderFactory', loss='ce', model_args=dict(
            backbone=NAME, backbone_pretrained=True, decoder='UperNetDecoder', decoder_channels=16, num_classes=3)))
    (tmp_path / 'mine.yaml').write_text(json.dumps(dict(model=task)))  # JSON is YAML, too
    done = subprocess.run([sys.executable, option, code, 'fit', '--config', tmp_path / 'mine.yaml', '--print_config'],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and NAME in done.stdout, done.stderr
