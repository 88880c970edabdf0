"""The command line `san-backbones`: what the package can do, without writing Python.

`main` is the entry point; the commands are in `app`, which needs typer (the extra `cli`).
"""
import importlib.util
import sys

__all__ = ['main']


def main() -> None:
    """Runs the command that the arguments of the process name; exits with its code.

    Raises:
        SystemExit: Always: 0 done, 1 failed with an explained error, 2 wrong usage.
    """
    if sys.argv[1:2] == ['weights']:  # needs no typer: errors about weights name it
        from ..weights.__main__ import main as weights
        sys.exit(weights(sys.argv[2:]))
    if importlib.util.find_spec('typer') is None:
        sys.exit("Error: the command line needs typer, which is not installed: pip install 'san-backbones[cli]'")
    from .app import app
    app(prog_name='san-backbones')
