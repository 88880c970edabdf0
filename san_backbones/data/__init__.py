"""Data sets of one's own for detection: found, checked, and converted to COCO's format.

>>> from san_backbones import data
>>> train, val = data.find('my_data')  # COCO's format; says what is missing or wrong
>>> data.convert('BCCD', 'bccd_coco')  # VOC's XML, YOLO's text or COCO's JSON, as they are found in the wild
"""
from .coco import Split, find
from .convert import Report, convert
from .labels import DataError

__all__ = ['DataError', 'Report', 'Split', 'convert', 'find']
