"""Operators for `mmcv.ops` without a compiler.

mmcv's lite distribution ships every Python file of `mmcv.ops` and lacks only the binary module `mmcv._ext`.
`install_operators` lets Python find a stand-in for that module, written on the operators of torch and torchvision.
It is asked last: where a compiled `mmcv._ext` is installed, that one is used.
"""
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

EXTENSION = 'mmcv._ext'
STAND_IN = Path(__file__).with_name('_mmcv_ext.py')


class StandInFinder(MetaPathFinder):
    """Finds `mmcv._ext` in this package, and nothing else.

    A finder rather than an entry in `sys.modules`: mmengine and mmcv ask the import system whether the module exists,
    and nothing heavy is imported before somebody imports `mmcv.ops`.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Returns the spec of the stand-in if `fullname` is `mmcv._ext`, else None."""
        if fullname != EXTENSION:
            return None
        return importlib.util.spec_from_file_location(fullname, STAND_IN)


def install_operators() -> None:
    """Makes `import mmcv._ext` work where mmcv is installed without it. Calling it again changes nothing."""
    if not any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        sys.meta_path.append(StandInFinder())


def operators_in_use() -> str:
    """Says where the operators of `mmcv.ops` come from.

    Returns:
        'compiled' if mmcv brings its own `mmcv._ext`, 'torchvision' if the stand-in serves, 'none' if mmcv is not
        installed, or lacks `mmcv._ext` and `install_operators` was not called.
    """
    try:
        spec = importlib.util.find_spec(EXTENSION)
    except ModuleNotFoundError:  # no mmcv at all
        return 'none'
    except ValueError:  # a module without a spec, put there by somebody else
        return 'compiled'
    if spec is None:
        return 'none'
    return 'torchvision' if spec.origin == str(STAND_IN) else 'compiled'
