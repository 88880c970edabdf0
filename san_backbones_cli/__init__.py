"""The command line `san-backbones`.

`main` is the entry point; the commands are in `app`, which needs typer (the extra `cli`). They are a package apart
because `import san_backbones` loads torch and timm, which takes seconds; help, wrong usage and completion do without.
"""
import importlib.util
import io
import sys

__all__ = ['main']


def main() -> None:
    """Runs the command in `sys.argv` and exits with its code.

    Raises:
        SystemExit: Always: 0 done, 1 failed with an explained error, 2 wrong usage.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # for names of files that are not UTF-8
    if sys.argv[1:2] == ['weights']:  # works without typer, since error messages about weights refer to it
        from san_backbones.weights.__main__ import main as weights
        sys.exit(weights(sys.argv[2:]))
    if importlib.util.find_spec('typer') is None:
        sys.exit("Error: the command line needs typer, which is not installed: pip install 'san-backbones[cli]'")
    from .app import app
    app(prog_name='san-backbones')
