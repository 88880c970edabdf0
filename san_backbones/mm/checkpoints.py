"""Checkpoints in the OpenMMLab world: loading mmengine's own, and safetensors from files and the Hugging Face Hub."""
import importlib
import inspect
from pickle import UnpicklingError
from typing import Any

import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

from .. import hub

__all__ = ['HUB_PREFIX', 'allow_mmengine_checkpoints', 'file_being_loaded', 'read_state_dict']

HUB_PREFIX = 'hf-hub:'

# what a checkpoint of mmengine's Runner holds besides tensors: message hub buffers, and the NumPy values in them
_MMENGINE_GLOBALS = (
    'mmengine.logging.history_buffer.HistoryBuffer',
    'numpy.ndarray',
    'numpy.dtype',
    'numpy._core.multiarray._reconstruct',
    'numpy._core.multiarray.scalar',
    'numpy.core.multiarray._reconstruct',
    'numpy.core.multiarray.scalar',
    'numpy.dtypes.Float32DType',
    'numpy.dtypes.Float64DType',
    'numpy.dtypes.Int32DType',
    'numpy.dtypes.Int64DType',
    'numpy.dtypes.BoolDType',
    '_codecs.encode',
)


def _history_buffer_method(owner: Any, name: str) -> Any:
    """Stands for `getattr` in checkpoints: HistoryBuffer pickles its own statistics methods that way, nothing else may.

    Raises:
        UnpicklingError: The file asks for another attribute.
    """
    if owner is not HistoryBuffer or name.startswith('_'):
        raise UnpicklingError(f'the checkpoint asks for attribute {name!r} of {owner!r}; only the statistics methods '
                              'of mmengine.logging.HistoryBuffer are allowed')
    return getattr(owner, name)


def allow_mmengine_checkpoints() -> None:
    """Lets `torch.load(weights_only=True)` read what mmengine's Runner saves.

    torch 2.6 and later refuse classes that are not on an allow-list; resuming, `load_from` and testing from a
    checkpoint then fail in mmengine 0.10.7. The classes allowed here hold data and run no code of the file's
    choosing; `weights_only` stays on.
    """
    allowed: list[Any] = [(_history_buffer_method, 'builtins.getattr')]
    for path in _MMENGINE_GLOBALS:
        module, _, name = path.rpartition('.')
        try:
            # under its name in the file: numpy.core and numpy._core are the same functions, pickled under either
            allowed.append((getattr(importlib.import_module(module), name), path))
        except (ImportError, AttributeError):  # the other NumPy generation's place
            continue
    torch.serialization.add_safe_globals(allowed)


@CheckpointLoader.register_scheme(prefixes=HUB_PREFIX)
def _load_from_hub(filename: str, map_location: Any = None) -> dict[str, torch.Tensor]:
    """`hf-hub:ORG/NAME[@REVISION]`: model.safetensors of that repository, as `hub.weights` finds it."""
    return _read_safetensors(hub.weights(filename[len(HUB_PREFIX):]), map_location)


def _read_safetensors(path: str, map_location: Any = None) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file
    return load_file(path, device=str(map_location or 'cpu'))


def read_state_dict(checkpoint: str, logger: str | None = 'current') -> dict[str, Any]:
    """Reads a checkpoint named in an `init_cfg`, to the CPU.

    Args:
        checkpoint: Path or URL that mmengine can open, a `.safetensors` path, or `hf-hub:ORG/NAME[@REVISION]`.
        logger: Where mmengine says what it loads.

    Returns:
        The content of the file, wrapped in `state_dict` or not.
    """
    if checkpoint.endswith('.safetensors') and '://' not in checkpoint:
        return _read_safetensors(checkpoint)
    return CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu', logger=logger)


def file_being_loaded() -> str | None:
    """The checkpoint that mmengine is loading into a model, None if it is not mmengine that loads.

    mmengine tells neither to the modules that it loads into, and merely warns where they differ from the checkpoint.
    Its frames know: the way from `load_checkpoint(..., filename, ...)`, or `_init_model(cfg, weights)` of inferencers,
    to `_load_checkpoint_to_model`. (EMAHook does not come that way: its names may have prefixes still.)
    """
    frame, loads = inspect.currentframe(), False
    while frame is not None:
        name = frame.f_code.co_name
        if frame.f_globals.get('__name__', '').startswith('mmengine.'):
            loads = loads or name == '_load_checkpoint_to_model'
            if loads and name in ('load_checkpoint', '_init_model'):
                return repr(frame.f_locals.get('filename', frame.f_locals.get('weights')))
        frame = frame.f_back
    return 'being loaded' if loads else None
