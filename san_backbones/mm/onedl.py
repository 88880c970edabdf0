"""OneDL's maintained forks of OpenMMLab: other names of distributions, the same names of modules."""
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from mmengine.config import utils

__all__ = ['find_configs']


def find_configs() -> None:
    """Lets `mmseg::...` in `_base_` be found where mmseg comes from another distribution than mmsegmentation.

    mmengine looks up the distribution that a module has at OpenMMLab; where that is not installed it takes the name of
    a module too.
    """
    for module, package in utils.MODULE2PACKAGE.items():
        try:
            distribution(package)
        except PackageNotFoundError:
            if find_spec(module) is not None:
                utils.MODULE2PACKAGE[module] = module
