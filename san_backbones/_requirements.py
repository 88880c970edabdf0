"""The oldest torch and timm that work, checked before anything of theirs is used: a version below fails far from here,
with an error that names neither.
"""
import re

import timm
import torch

__all__ = ['LEAST', 'check']

LEAST = {'torch': '2.6', 'timm': '1.0.31'}  # as in setup.cfg, where the reasons are


def _numbers(version: str) -> list[int]:
    """[2, 6, 0] of '2.6.0+cu124' and of '2.6.0rc1'."""
    return [int(number) for number in re.findall(r'\d+', version.partition('+')[0])[:3]]


def check() -> None:
    """Raises ImportError where torch or timm is older than `LEAST` says."""
    for name, found in (('torch', torch.__version__), ('timm', timm.__version__)):
        if _numbers(found) < _numbers(LEAST[name]):
            together = ' torchvision' if name == 'torch' else ''  # one build of it goes with one of torch
            raise ImportError(f"san_backbones needs {name} {LEAST[name]} or later, found {name} {found}: pip install "
                              f"--upgrade '{name}>={LEAST[name]}'{together}")


check()
