"""Checks the minimum versions of torch and timm before either is used: older ones fail later, with obscure errors."""
import re
from collections.abc import Mapping

import timm
import torch

__all__ = ['LEAST', 'LEAST_FOR_CONVERSION', 'LEAST_FOR_ONNX', 'LEAST_FOR_PICKLES', 'check', 'check_pickles',
           'older']

# as in setup.cfg, which gives the reasons
LEAST = {'torch': '2.4', 'timm': '1.0.26'}
LEAST_FOR_PICKLES = {'torch': '2.6'}  # to read .pth files: the mm extra, san_backbones.weights
LEAST_FOR_ONNX = {'torch': '2.8'}  # the onnx extra
LEAST_FOR_CONVERSION = {'timm': '1.0.31'}  # san_backbones.weights.convert: timm writes its config.json


def _numbers(version: str) -> list[int]:
    """'2.6.0+cu124' and '2.6.0rc1' to [2, 6, 0]."""
    return [int(number) for number in re.findall(r'\d+', version.partition('+')[0])[:3]]


def older(found: str, least: str) -> bool:
    """Whether version `found` comes before `least`."""
    return _numbers(found) < _numbers(least)


def check(who: str, least: Mapping[str, str], why: str = '') -> None:
    """Raises ImportError if torch or timm is older than in `least`; `why` goes into the message."""
    for name, found in (('torch', torch.__version__), ('timm', timm.__version__)):
        if name in least and older(found, least[name]):
            together = ' torchvision' if name == 'torch' else ''  # each torchvision needs one torch
            raise ImportError(f"{who} needs {name} {least[name]} or later{why}, found {name} {found}: pip install "
                              f"--upgrade '{name}>={least[name]}'{together}")


def check_pickles(who: str) -> None:
    """Raises ImportError if `torch.load` may run code from a checkpoint (CVE-2025-32434)."""
    check(who, LEAST_FOR_PICKLES, ', because older ones may run code that a checkpoint brings')


check('san_backbones', LEAST)
