"""The oldest torch and timm that work, checked before anything of theirs is used: a version below fails far from here,
with an error that names neither.
"""
import re
from collections.abc import Mapping

import timm
import torch

__all__ = ['LEAST', 'LEAST_FOR_CONVERSION', 'LEAST_FOR_ONNX', 'LEAST_FOR_PICKLES', 'check', 'check_pickles',
           'older']

# as in setup.cfg, where the reasons are
LEAST = {'torch': '2.4', 'timm': '1.0.26'}
LEAST_FOR_PICKLES = {'torch': '2.6'}  # to read .pth files: of the mm extra, and of san_backbones.weights
LEAST_FOR_ONNX = {'torch': '2.8'}  # of the onnx extra
LEAST_FOR_CONVERSION = {'timm': '1.0.31'}  # of san_backbones.weights.convert, whose config.json timm writes


def _numbers(version: str) -> list[int]:
    """[2, 6, 0] of '2.6.0+cu124' and of '2.6.0rc1'."""
    return [int(number) for number in re.findall(r'\d+', version.partition('+')[0])[:3]]


def older(found: str, least: str) -> bool:
    """Whether version `found` comes before `least`."""
    return _numbers(found) < _numbers(least)


def check(who: str, least: Mapping[str, str], why: str = '') -> None:
    """Raises ImportError where torch or timm is older than `least` says, with the reason `why`."""
    for name, found in (('torch', torch.__version__), ('timm', timm.__version__)):
        if name in least and older(found, least[name]):
            together = ' torchvision' if name == 'torch' else ''  # one build of it goes with one of torch
            raise ImportError(f"{who} needs {name} {least[name]} or later{why}, found {name} {found}: pip install "
                              f"--upgrade '{name}>={least[name]}'{together}")


def check_pickles(who: str) -> None:
    """Raises ImportError where `torch.load` would run code of a checkpoint's author (CVE-2025-32434)."""
    check(who, LEAST_FOR_PICKLES, ', because older ones may run code that a checkpoint brings')


check('san_backbones', LEAST)
