"""SAN vision backbones (Zhao, Jia, Koltun, CVPR 2020).

Importing the package registers the models with timm:

    >>> import san_backbones, timm
    >>> model = timm.create_model('san15_patchwise', features_only=True, out_indices=(1, 2, 3, 4))
"""
from . import _requirements, ops  # noqa: F401, first: it refuses versions of torch and timm that are too old
from ._version import __version__
from .attention import PairwiseAttention, PatchwiseAttention
from .diagnosis import diagnose
from .fuse import fuse_for_inference, refold
from .san import SAN

__all__ = ['SAN', 'PairwiseAttention', 'PatchwiseAttention', '__version__', 'diagnose', 'fuse_for_inference', 'ops',
           'refold']
