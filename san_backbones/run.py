"""Runs a program with the SAN models registered in timm: `python -m san_backbones.run SCRIPT [ARGS]`.

`python -m san_backbones.run -m MODULE [ARGS]` runs a module, as `python -m MODULE` would. With it, timm's unmodified
train.py, validate.py, inference.py, benchmark.py and onnx_export.py take SAN models by name, also under torchrun
(`torchrun --nproc-per-node=2 -m san_backbones.run train.py ...`). Spawned workers have the models as well.

For the tools of MMDetection and MMSegmentation use `san_backbones.mm.run`, which takes the same arguments.
"""
import atexit
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import CodeType
from typing import Any

import torch
import torch.distributed as dist

__all__ = ['start', 'without_gpus']

_PROGRAM = '_SAN_BACKBONES_RUN'  # environment variable that tells spawned workers which program is the main module


class _Spec(ModuleSpec):
    """Spec of the main module: named as this runner, so that workers start with it, in the package of the program."""

    package = ''

    @property
    def parent(self) -> str:
        return self.package


def without_gpus() -> bool:
    """Whether torchrun started this process on a machine without a GPU, where processes communicate over gloo."""
    return dist.is_available() and dist.is_torchelastic_launched() and not torch.cuda.is_available()


def _end() -> None:
    """Ends the process as Python does, but skips C++ destructors, in which a thread of gloo sometimes aborts."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _find(program: str) -> tuple[CodeType, str, str] | None:
    """Returns code, file and package of a script (a path) or module ('-m NAME'); None if it does not exist."""
    if not program.startswith('-m '):
        if not os.path.isfile(program):
            return None
        with open(program, 'rb') as script:
            return compile(script.read(), program, 'exec'), program, ''
    try:
        spec = importlib.util.find_spec(program[3:])
        if spec is not None and spec.submodule_search_locations is not None:  # a package
            spec = importlib.util.find_spec(f'{spec.name}.__main__')
    except (ImportError, ValueError):  # raised for its parent package
        return None
    loader: Any = spec and spec.loader
    if spec is None or not hasattr(loader, 'get_code'):
        return None
    code = loader.get_code(spec.name)
    return code and (code, spec.origin or '', spec.parent or '')


def start(namespace: dict[str, Any], prepare: Callable[[], None] | None = None) -> None:
    """Runs the program that `sys.argv` names as the main module.

    Args:
        namespace: Globals of the main module, which are replaced.
        prepare: Called first, but not in workers.

    Raises:
        SystemExit: There is no such program, or the program exits.
    """
    usage, name, is_worker = namespace['__doc__'], namespace['__spec__'].name, namespace['__name__'] != '__main__'
    given = sys.argv[1:]
    is_module = given[:1] == ['-m']
    if is_worker:  # runs the program's imports and definitions, as in every spawned worker
        program = os.environ[_PROGRAM]
    else:
        program = ' '.join(given[:2]) if is_module else os.path.abspath(given[0]) if given else ''
    found = _find(program)
    if found is None:
        sys.exit(f'{usage}\ngiven: {" ".join(given) or "nothing"}; expected the path of a Python script, or -m and the '
                 'name of a module')
    code, file, package = found
    if not is_worker:
        os.environ[_PROGRAM] = program
        if prepare is not None:
            prepare()
    spec = _Spec(name, None, origin=file)
    spec.package = package
    for key in [key for key in namespace if key not in ('__name__', '__builtins__')]:
        del namespace[key]
    namespace.update(__file__=file, __spec__=spec, __package__=package, __doc__=None)
    if is_worker:
        exec(code, namespace)
        return
    sys.argv = [file, *given[1 + is_module:]]
    if not is_module and not getattr(sys.flags, 'safe_path', False):
        sys.path[0] = os.path.dirname(file)
    try:
        exec(code, namespace)
    except SystemExit as end:
        if end.code or not without_gpus():
            raise
    if without_gpus():
        _end()


if __name__ in ('__main__', '__mp_main__'):
    from san_backbones.run import start as _start  # from a second copy: the program replaces this one's globals
    _start(globals())
