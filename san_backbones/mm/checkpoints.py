"""Checkpoints in the OpenMMLab world: loading mmengine's own, and safetensors from files and the Hugging Face Hub."""
import importlib
import inspect
import os
import re
import zipfile
from functools import partial
from pickle import UnpicklingError
from typing import Any

import torch
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint as _mmengine
from mmengine.runner.checkpoint import CheckpointLoader
from torch.hub import load_state_dict_from_url

from .. import hub

__all__ = ['HUB_PREFIX', 'allow_mmengine_checkpoints', 'file_being_loaded', 'read_state_dict',
           'resume_from_whole']

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
    'numpy.dtypes.UInt32DType',
    'numpy.dtypes.BoolDType',
    'builtins.slice',
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
    choosing. `weights_only` stays on, and is on where mmengine has it off: for what http:// and https:// name, and in
    onedl-mmengine, which reads once more without it what torch refuses.
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
    _mmengine.load_url = partial(load_state_dict_from_url, weights_only=True)
    if hasattr(_mmengine, '_safe_torch_load'):
        _mmengine._safe_torch_load = _load_data


def _load_data(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """`torch.load` of tensors and plain data, whatever `weights_only` says.

    Raises:
        UnpicklingError: The file holds more than that.
    """
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if 'GLOBAL' in line or 'allowed' in line), None)
        if reason is None:  # damaged
            raise
        reason = reason.partition('. Please')[0]
        name = file if isinstance(file, str) else 'the checkpoint'
        raise UnpicklingError(
            f'{name} holds more than tensors and plain data, which may be code that reading it would run, and is not '
            f'read ({reason}). Where you trust it, save its state dict alone: torch.save(torch.load(FILE, '
            "weights_only=False)['state_dict'], NEW_FILE)") from error


@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Reads a file as tensors and plain data, with errors that name the file.

    Raises:
        FileNotFoundError: There is none.
        RuntimeError: It is damaged.
        UnpicklingError: It holds more than tensors and plain data.
    """
    filename = os.path.expanduser(filename)
    if not os.path.isfile(filename):
        raise FileNotFoundError(f'{filename} can not be found.')
    try:
        return _load_data(filename, map_location)
    except (EOFError, RuntimeError, UnpicklingError) as error:
        if isinstance(error, torch.OutOfMemoryError) or zipfile.is_zipfile(filename):  # the file is whole
            raise
        reason = (str(error).splitlines() or ['it is empty'])[0]
        raise RuntimeError(
            f'{filename} ({os.path.getsize(filename)} bytes) cannot be read as a checkpoint ({type(error).__name__}: '
            f'{reason}); expected what torch.save wrote. If it was cut short, as when a training or a copy was '
            'interrupted, remove it and take another checkpoint') from error


def _is_whole(path: str) -> bool:
    """Whether the file was written to its end, or is a folder, as checkpoints of DeepSpeed are."""
    return os.path.isdir(path) or zipfile.is_zipfile(path)  # the list of contents comes last in what torch.save writes


def resume_from_whole(runner: Any) -> None:
    """Lets a training that was killed while it saved resume from the last checkpoint that it saved whole.

    mmengine resumes from what the file `last_checkpoint` names. Both files are written in place, so that after a kill
    the checkpoint may be cut short or the name missing. Then the newest whole one of the training is taken instead,
    and a warning says so.

    Args:
        runner: A Runner before it loads.

    Raises:
        RuntimeError: There was one, and none is whole now.
    """
    if not getattr(runner, '_resume', False) or runner._load_from is not None:
        return
    hook: Any = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
    if hook is None or '://' in str(hook.out_dir):
        return
    last, folder = os.path.join(runner.work_dir, 'last_checkpoint'), runner.work_dir
    if hook.out_dir not in (None, runner.work_dir):
        folder = os.path.join(hook.out_dir, os.path.basename(runner.work_dir))
    named = ''
    if os.path.isfile(last):
        with open(last) as file:
            named = file.read().strip()
    if '://' in named or _is_whole(named):
        return
    pattern = re.compile(re.escape(hook.filename_tmpl).replace(re.escape('{}'), r'(\d+)'))
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = sorted((int(match[1]), match[0]) for match in map(pattern.fullmatch, names) if match)
    found = [os.path.join(folder, name) for _, name in reversed(steps)]
    whole = next(filter(_is_whole, found), None)
    if whole is not None:
        runner.logger.warning(f'resuming from {whole}, the last checkpoint that is whole: the training was interrupted '
                              f'while it saved, and {last} names {named or "none"}')
        runner._load_from = whole
    elif os.path.isfile(last):
        raise RuntimeError(
            f'cannot resume: {last} names {named or "nothing"}, which is missing or cut short, and no other checkpoint '
            f'in {folder} is whole (found: {", ".join(found) or "none"}). Name a checkpoint with load_from, or remove '
            f'{last} to train from the beginning')
    elif found:
        runner.logger.warning(f'training from the beginning: {found[0]} was cut short while it was saved, and there is '
                              'no other checkpoint')


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
