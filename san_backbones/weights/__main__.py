"""Runs `san-backbones weights COMMAND`; it does not need the extra 'cli'."""
import importlib
import sys
from collections.abc import Sequence

__all__ = ['COMMANDS', 'main']

COMMANDS = dict(
    get="gets a model's pretrained weights onto this machine",
    convert='converts a checkpoint to what timm and the Hub read',
    verify='measures accuracy on pictures and compares with the paper',
    publish="puts the authors' weights on the Hub")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in the arguments and returns its exit status, 2 for an unknown command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ['--help']
    if name in COMMANDS:
        return importlib.import_module(f'{__package__}.{name}').main(rest)
    wrong = name not in ('-h', '--help')
    lines = [f'error: there is no command {name!r}'] * wrong + ['usage: san-backbones weights COMMAND ...', '']
    lines += [f'  {command:8} {what}' for command, what in COMMANDS.items()]
    lines += ['', 'san-backbones weights COMMAND --help explains a command.']
    print('\n'.join(lines), file=sys.stderr if wrong else sys.stdout)
    return 2 if wrong else 0


if __name__ == '__main__':
    sys.exit(main())
