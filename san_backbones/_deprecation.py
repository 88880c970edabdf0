"""Keeps old names working, with a warning, until an announced release (docs: *Promises*)."""
import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ['renamed', 'renamed_arguments']

Function = TypeVar('Function', bound=Callable[..., Any])


def _warn(old: str, new: str, until: str) -> None:
    warnings.warn(f'{old} is now {new}; the old name goes with san-backbones {until}', DeprecationWarning, stacklevel=3)


def renamed(module: str, until: str, **names: str) -> Callable[[str], Any]:
    """Returns a module's `__getattr__` that resolves old names.

    Args:
        module: The module's `__name__`.
        until: The version that drops the old names.
        names: The new name for each old one.

    Example:
        >>> __getattr__ = renamed(__name__, '0.4', fuse='fuse_for_inference')
    """
    def getattr_of_module(name: str) -> Any:
        if name not in names:
            raise AttributeError(f'module {module!r} has no attribute {name!r}')
        _warn(f'{module}.{name}', f'{module}.{names[name]}', until)
        return getattr(sys.modules[module], names[name])
    return getattr_of_module


def renamed_arguments(until: str, **names: str) -> Callable[[Function], Function]:
    """Returns a decorator for a function whose keyword arguments have new names.

    Args:
        until: The version that drops the old names.
        names: The new name for each old one.

    Raises:
        TypeError: In the call, if both names are given.
    """
    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(f'{function.__name__}() got {old!r} and {new!r}, which are one argument')
                    _warn(f'the argument {old!r} of {function.__name__}()', repr(new), until)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)
        return call  # type: ignore[return-value]
    return decorate
