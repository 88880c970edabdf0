"""The Detectron2 backbone, by Detectron2's contract for backbones.

Detectron2 is not on PyPI and needs a compiler. Where it is installed, its own FPN is built around the backbone;
elsewhere a stand-in has the two classes that the backbone uses, as the documentation describes them:
https://detectron2.readthedocs.io/en/latest/modules/modeling.html#detectron2.modeling.Backbone and #ShapeSpec
"""
import importlib.util
import sys
import types
from abc import ABCMeta, abstractmethod
from collections import namedtuple

import pytest
import timm
import torch

import san_backbones

HERE = importlib.util.find_spec('detectron2') is not None
NAMES = ['res2', 'res3', 'res4', 'res5']


def _stand_in():
    class Backbone(torch.nn.Module, metaclass=ABCMeta):
        size_divisibility = 0
        padding_constraints: dict = {}

        @abstractmethod
        def forward(self):
            """Images to a dict of feature maps."""

        @abstractmethod
        def output_shape(self):
            """dict of ShapeSpec."""

    class ShapeSpec(namedtuple('ShapeSpec', 'channels height width stride', defaults=(None,) * 4)):
        def __new__(cls, *, channels=None, height=None, width=None, stride=None):
            return super().__new__(cls, channels, height, width, stride)

    return {'detectron2': types.ModuleType('detectron2'),
            'detectron2.layers': types.SimpleNamespace(ShapeSpec=ShapeSpec),
            'detectron2.modeling': types.SimpleNamespace(Backbone=Backbone)}


@pytest.fixture
def backbones(monkeypatch):
    """The module san_backbones.detectron2, and the classes that it was built on."""
    if not HERE:
        for name, module in _stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, 'san_backbones.detectron2', raising=False)
    module = importlib.import_module('san_backbones.detectron2')
    yield module
    if not HERE:
        del sys.modules['san_backbones.detectron2'], san_backbones.detectron2


def test_maps_and_their_shapes(backbones):
    torch.manual_seed(0)
    backbone = backbones.SANBackbone('test_san_patchwise').eval()
    expected = timm.create_model('test_san_patchwise', features_only=True, out_indices=(1, 2, 3, 4)).eval()
    expected.load_state_dict(backbone.net.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = backbone(images)
        assert all(torch.equal(a, b) for a, b in zip(maps.values(), expected(images), strict=True))
    shapes = backbone.output_shape()
    assert list(maps) == list(shapes) == NAMES and isinstance(backbone, backbones.Backbone)
    for name, shape in shapes.items():
        assert isinstance(shape, backbones.ShapeSpec) and shape.height is None
        assert maps[name].shape == (1, shape.channels, 64 // shape.stride, 96 // shape.stride)


def test_options(backbones):
    backbone = backbones.SANBackbone('test_san_pairwise', ['res1', 'res5'], in_chans=1, output_stride=8)
    assert [(shape.channels, shape.stride) for shape in backbone.output_shape().values()] == [(32, 2), (128, 8)]
    assert [m.shape[-1] for m in backbone(torch.randn(1, 1, 64, 64)).values()] == [32, 8]
    sum(m.mean() for m in backbone(torch.randn(2, 1, 64, 64)).values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    with torch.device('meta'):
        shapes = backbones.SANBackbone().output_shape()
    assert [shape.channels for shape in shapes.values()] == [256, 512, 1024, 2048]


@pytest.mark.parametrize('names', ['res2', [], ['res3', 'res2'], ['res2', 'res2'], ['stage1']])
def test_wrong_names(backbones, names):
    with pytest.raises(ValueError, match='out_features must be names of .*res1.*got'):
        backbones.SANBackbone('test_san_patchwise', names)


@pytest.mark.skipif(HERE, reason='Detectron2 is here')
def test_without_detectron2():
    with pytest.raises(ImportError, match='needs Detectron2.*not on PyPI'):
        importlib.import_module('san_backbones.detectron2')


@pytest.mark.skipif(not HERE, reason='needs Detectron2')
def test_fpn_of_detectron2(backbones):
    from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
    fpn = FPN(backbones.SANBackbone('test_san_patchwise', NAMES), NAMES, 32, top_block=LastLevelMaxPool())
    maps = fpn(torch.randn(2, 3, 64, 64))
    assert fpn.size_divisibility == 32
    assert {name: m.shape[-1] for name, m in maps.items()} == dict(p2=16, p3=8, p4=4, p5=2, p6=1)
    sum(m.mean() for m in maps.values()).backward()
    assert all(p.grad is not None for p in fpn.parameters())
