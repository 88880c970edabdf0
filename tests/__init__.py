"""Tests, in the structure of the package, and their helpers. They are imported from the folder above this one."""
import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]


def environment(**more: str) -> dict[str, str]:
    """Returns the variables of a process that finds this checkout's modules and computes with one thread."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path, **more}
