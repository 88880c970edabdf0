"""Collects what a bug report needs to know about this machine."""
import os
import pathlib
import platform
import re
import sys
from importlib import metadata
from typing import Any

import torch

from .. import __version__, hub, ops
from ..measure import processor
from ..ops import native
from ..ops.backends import ENVIRONMENT_VARIABLE

__all__ = ['facts']

PACKAGES = (
    'torch', 'timm', 'torchvision', 'huggingface_hub', 'gdown', 'safetensors', 'numpy', 'pillow', 'triton', 'typer',
    'mmengine', 'mmcv', 'mmcv-lite', 'mmdet', 'mmsegmentation', 'mmpretrain', 'transformers',
    'segmentation_models_pytorch', 'accelerate', 'lightning', 'onnx', 'onnxscript', 'onnxruntime', 'matplotlib',
    'pyarrow', 'webdataset', 'ray')
# OneDL's forks of OpenMMLab, with the same modules
FORKS = {'mmengine': 'onedl-mmengine', 'mmcv': 'onedl-mmcv', 'mmdet': 'onedl-mmdetection',
         'mmsegmentation': 'onedl-mmsegmentation', 'mmpretrain': 'onedl-mmpretrain'}
VARIABLES = (
    ENVIRONMENT_VARIABLE, native.QUIET_VARIABLE, ops.triton.TUNE_VARIABLE,
    hub.FOLDER_VARIABLE, hub.ORGANISATION_VARIABLE, hub.AUTHORS_VARIABLE, hub.MIRROR_VARIABLE, hub.CACHE_VARIABLE,
    'HF_ENDPOINT', 'HF_HOME', 'HF_HUB_CACHE',
    'HF_HUB_OFFLINE', 'HF_TOKEN', 'ATEN_CPU_CAPABILITY', 'CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS', 'OMP_WAIT_POLICY')


def _version(package: str) -> str | None:
    if package == 'torch':  # its own version names the CUDA build; its metadata may not
        return torch.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    """Returns versions by package; OneDL's forks are listed under their own names."""
    versions = {}
    for package in PACKAGES:
        found, fork = _version(package), FORKS.get(package)
        if found is None and fork is not None and (of_fork := _version(fork)) is not None:
            package, found = fork, of_fork
        versions[package] = found
    return versions


def _public(text: str) -> str:
    """Removes passwords and queries, which may hold tokens, in addresses and the user's name in paths."""
    home = str(pathlib.Path.home())
    text = re.sub(re.escape(home) + r'(?=/|\\|$)', '~', text) if len(home) > 1 else text
    return re.sub(r'(//[^\s?]*\?)\S*', r'\1...', re.sub(r'//[^/\s]*@', '//', text))


def _backends(device: str) -> dict[str, str | None]:
    """Returns for every backend why it cannot run float32 inference of each form on a device; None if it can."""
    reasons: dict[str, str | None] = {}
    for backend in ops.BACKENDS:
        refusals = {}
        for form in ops.relations.FORMS:
            spec = ops.Spec(form == 'pairwise', ops.relations.names(form)[0], 'none', 7, 1)
            request = ops.Request(spec, torch.device(device), torch.float32, (1, 64, 56, 56), False, False, None)
            refusals[form] = backend.refusal(request)
        told = {form: reason for form, reason in refusals.items() if reason is not None}
        alike = len(set(refusals.values())) == 1
        reasons[backend.name] = None if not told else _public(
            told['pairwise'] if alike else '; '.join(f'{form}: {reason}' for form, reason in told.items()))
    return reasons


def facts() -> dict[str, Any]:
    """Collects versions, the machine, the backends and why they cannot run, and environment variables.

    Returns:
        Plain data. Tokens and passwords are removed from variables, and the home folder is written as `~`.
    """
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    folder = pathlib.Path(native.__file__).parent
    problem = native.unavailable()
    builds = sorted(path.name for path in folder.iterdir() if path.suffix in ('.so', '.dll'))
    return dict(
        versions={'san_backbones': __version__, 'python': platform.python_version(),
                  **_versions()},
        machine=dict(
            system=platform.platform(), python=f'{sys.implementation.name}, {platform.architecture()[0]}',
            processor=processor(), cores=os.cpu_count(), threads=torch.get_num_threads(),
            instructions=torch.backends.cpu.get_cpu_capability(), gpus=gpus, cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version() if gpus else None),
        compiled_loops=dict(found=builds, serving=native.build() if problem is None else None,
                            **dict(zip(('runtime', 'threads'), native.pool() if problem is None else (None, None))),
                            problem=problem and _public(problem)),
        paths={device: _backends(device) for device in ('cpu', *(['cuda'] if gpus else []))},
        variables={name: '(set)' if name == 'HF_TOKEN' else _public(os.environ[name])
                   for name in VARIABLES if name in os.environ})
