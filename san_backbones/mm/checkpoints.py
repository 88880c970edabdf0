"""Loads checkpoints for OpenMMLab: mmengine's own, and safetensors from files and the Hugging Face Hub."""
import inspect
import os
import re
import zipfile
from pickle import UnpicklingError
from typing import Any

import torch
from mmengine.hooks import CheckpointHook
from mmengine.runner.checkpoint import CheckpointLoader

from .. import hub

__all__ = ['HUB_PREFIX', 'allow_mmengine_checkpoints', 'file_being_loaded', 'read_state_dict', 'resume_from_whole']

HUB_PREFIX = 'hf-hub:'


def allow_mmengine_checkpoints() -> None:
    """Lets `torch.load(weights_only=True)` read what mmengine's Runner saves, as `import san_backbones.mm` does.

    The allowed classes hold data and run no code that the file chooses. `weights_only` stays on, and is turned on where
    mmengine has it off. `effects.pickles` and `effects.checkpoints` make these changes and can undo them.
    """
    from . import effects
    effects.pickles.install()
    effects.checkpoints.install()


def load_data(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """`torch.load` that reads only tensors and plain data, for any value of `weights_only`.

    Raises:
        UnpicklingError: The file holds more than tensors and plain data.
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
            f'{name} holds more than tensors and plain data. Reading it could run code, so it is not read ({reason}). '
            'If you trust it, save its state dict alone: torch.save(torch.load(FILE, '
            "weights_only=False)['state_dict'], NEW_FILE)") from error


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Reads a file as tensors and plain data, with errors that name the file.

    Raises:
        FileNotFoundError: The file does not exist.
        RuntimeError: The file is damaged.
        UnpicklingError: The file holds more than tensors and plain data.
    """
    filename = os.path.expanduser(filename)
    if not os.path.isfile(filename):
        raise FileNotFoundError(f'{filename} can not be found.')
    try:
        return load_data(filename, map_location)
    except (EOFError, RuntimeError, UnpicklingError) as error:
        if isinstance(error, torch.OutOfMemoryError) or zipfile.is_zipfile(filename):  # the file is whole
            raise
        reason = (str(error).splitlines() or ['it is empty'])[0]
        raise RuntimeError(
            f'{filename} ({os.path.getsize(filename)} bytes) cannot be read as a checkpoint ({type(error).__name__}: '
            f'{reason}); expected what torch.save wrote. If it was cut short, as when a training or a copy was '
            'interrupted, remove it and take another checkpoint') from error


def _is_whole(path: str) -> bool:
    """Whether the file is complete, or is a folder, as checkpoints of DeepSpeed are."""
    return os.path.isdir(path) or zipfile.is_zipfile(path)  # torch.save writes the zip's directory last


def resume_from_whole(runner: Any) -> None:
    """Lets a training that was killed while it saved resume from the last complete checkpoint.

    mmengine resumes from the checkpoint that the file `last_checkpoint` names. It overwrites both files, so after a
    kill the checkpoint may be truncated or the name missing. Then the newest complete checkpoint of the training is
    used instead, with a warning.

    Args:
        runner: A Runner before it loads.

    Raises:
        RuntimeError: A checkpoint is named, and none is complete.
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


def load_from_hub(filename: str, map_location: Any = None) -> dict[str, torch.Tensor]:
    """Loads `hf-hub:ORG/NAME[@REVISION]`: model.safetensors of that repository, as `hub.weights` finds it."""
    return _read_safetensors(hub.weights(filename[len(HUB_PREFIX):]), map_location)


def _read_safetensors(path: str, map_location: Any = None) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file
    return load_file(path, device=str(map_location or 'cpu'))


def read_state_dict(checkpoint: str, logger: str | None = 'current') -> dict[str, Any]:
    """Reads a checkpoint named in an `init_cfg`, to the CPU.

    Args:
        checkpoint: Path or URL that mmengine can open, a `.safetensors` path, or `hf-hub:ORG/NAME[@REVISION]`.
        logger: Where mmengine logs what it loads.

    Returns:
        The content of the file, wrapped in `state_dict` or not.
    """
    if checkpoint.endswith('.safetensors') and '://' not in checkpoint:
        return _read_safetensors(checkpoint)
    return CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu', logger=logger)


def file_being_loaded() -> str | None:
    """Returns the checkpoint that mmengine is loading into a model; None if mmengine is not loading.

    mmengine does not pass this to the modules, and only warns if they differ from the checkpoint. So this searches the
    call stack for `_load_checkpoint_to_model`, below `load_checkpoint(..., filename, ...)` or, in inferencers,
    `_init_model(cfg, weights)`. EMAHook loads in another way, since its names may still have prefixes.
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
