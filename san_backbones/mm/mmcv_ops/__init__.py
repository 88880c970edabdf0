"""Operators for `mmcv.ops` without a compiler; README.md lists them and what they were compared with.

mmcv's lite distribution ships every Python file of `mmcv.ops` and lacks only the binary module `mmcv._ext`. `install`
lets Python find a stand-in for that module, written with operators of torch and torchvision. An installed compiled
`mmcv._ext` takes precedence.
"""
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ['StandInFinder', 'install', 'operators_in_use', 'uninstall']

EXTENSION = 'mmcv._ext'


class StandInLoader(Loader):
    """Makes a module with the contents of `extension`."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Returns None, which makes a module as usual."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Imports `extension`, and so torch and torchvision, and fills the module."""
        extension = vars(importlib.import_module(f'{__name__}.extension'))
        own = {name for name in extension if name.startswith('__')} - {'__doc__', '__getattr__'}
        vars(module).update({name: value for name, value in extension.items() if name not in own})


class StandInFinder(MetaPathFinder):
    """Finds `mmcv._ext` in this package, and nothing else.

    A finder instead of an entry in `sys.modules`: mmengine and mmcv ask the import system whether the module exists,
    and torchvision is imported only with `mmcv.ops`.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Returns the spec of the stand-in if `fullname` is `mmcv._ext`, else None."""
        return ModuleSpec(fullname, StandInLoader(), origin=__name__) if fullname == EXTENSION else None


def install() -> None:
    """Makes `import mmcv._ext` work where mmcv is installed without it. Calling it again changes nothing."""
    if not any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        sys.meta_path.append(StandInFinder())


def uninstall() -> None:
    """Undoes `install`. Modules of `mmcv.ops` that are imported already keep the operators that they have."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, StandInFinder)]
    loaded = sys.modules.get(EXTENSION)
    if loaded is not None and isinstance(getattr(loaded.__spec__, 'loader', None), StandInLoader):
        del sys.modules[EXTENSION]


def operators_in_use() -> str:
    """Says where the operators of `mmcv.ops` come from.

    Returns:
        'compiled' if mmcv has its own `mmcv._ext`, 'torchvision' if the stand-in is used, 'none' if mmcv is not
        installed, or lacks `mmcv._ext` and `install` was not called.
    """
    try:
        spec = importlib.util.find_spec(EXTENSION)
    except ModuleNotFoundError:  # no mmcv at all
        return 'none'
    except ValueError:  # a module without a spec, put into sys.modules by other code
        return 'compiled'
    if spec is None:
        return 'none'
    return 'torchvision' if isinstance(spec.loader, StandInLoader) else 'compiled'
