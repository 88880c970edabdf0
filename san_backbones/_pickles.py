"""The allow-list for `torch.load(weights_only=True)`: what checkpoints may hold besides tensors.

All entries hold data; none runs code that the file chooses.
"""
import importlib
from pickle import UnpicklingError
from typing import Any

__all__ = ['MMENGINE', 'NUMPY', 'SCRIPTS', 'entries', 'history_buffer_method']

# numpy.core and numpy._core hold the same functions; pickles use either name
NUMPY = ('numpy.ndarray', 'numpy.dtype', '_codecs.encode',
         *(f'numpy.{core}.multiarray.{name}' for core in ('core', '_core') for name in ('_reconstruct', 'scalar')),
         *(f'numpy.dtypes.{name}DType' for name in ('Float32', 'Float64', 'Int32', 'Int64', 'UInt32', 'Bool')))
# what training scripts save beside the tensors: their arguments, and accuracies computed by NumPy
SCRIPTS = ('argparse.Namespace', *NUMPY)
# what mmengine's Runner saves: buffers of its message hub, and the NumPy values in them
MMENGINE = ('mmengine.logging.history_buffer.HistoryBuffer', 'builtins.slice', 'builtins.getattr', *NUMPY)


def history_buffer_method(owner: Any, name: str) -> Any:
    """Replaces `getattr` in checkpoints: only HistoryBuffer, which pickles its statistics methods so, may use it.

    Raises:
        UnpicklingError: The file asks for another attribute.
    """
    from mmengine.logging import HistoryBuffer
    if owner is not HistoryBuffer or name.startswith('_'):
        raise UnpicklingError(f'the checkpoint asks for attribute {name!r} of {owner!r}; only the statistics methods '
                              'of mmengine.logging.HistoryBuffer are allowed')
    return getattr(owner, name)


def entries(names: tuple[str, ...]) -> list[Any]:
    """Returns entries for `torch.serialization.add_safe_globals`, without names that the installed NumPy lacks."""
    found: list[Any] = []
    for path in names:
        if path == 'builtins.getattr':
            found.append((history_buffer_method, path))
            continue
        module, _, name = path.rpartition('.')
        try:
            found.append((getattr(importlib.import_module(module), name), path))
        except (ImportError, AttributeError):
            continue
    return found
