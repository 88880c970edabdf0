"""Feature extraction: from a picture to a hundred million, streamed, resumed and spread.

`extract` says all; the command `san-backbones features` does the same.
"""
from .cluster import ray_actor
from .extractor import Settings
from .job import Report, Share, extract
from .maps import Maps

__all__ = ['Maps', 'Report', 'Settings', 'Share', 'extract', 'ray_actor']
