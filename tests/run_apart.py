"""Runs tests that need packages which do not go together with the others, in an environment of their own.

    python tests/run_apart.py mim|mmpretrain [pytest arguments]

The environment lies in .cache and sees the packages of the one that runs this, so pip installs only what is missing.
"""
import os
import pathlib
import subprocess
import sys
import sysconfig
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
# name: calls of pip install, tests
ENVIRONMENTS = {
    # --no-deps: openmim asks for opendatalab, which pins setuptools 60 and requests 2.28; `mim` never imports it
    'mim': ([['--no-deps', 'openmim>=0.3.9'], ['colorama', 'model-index', 'pandas', 'requests', 'tabulate']],
            ['tests/mm/test_mim.py']),
    # mmpretrain 1.2 cannot be imported beside transformers 5, and mmdet imports it wherever it finds it
    'mmpretrain': ([['mmpretrain>=1.2,<1.3']],
                   ['tests/mm/test_classification.py', 'tests/ecosystem/test_timm_in_mmpretrain.py']),
}


def prepare(name: str) -> pathlib.Path:
    """Makes the environment unless it is there, and returns its Python."""
    folder = ROOT / '.cache' / f'venv-{name}'
    python = folder / ('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
    ready = folder / 'ready'
    if not ready.exists():
        venv.create(folder, clear=True)  # without pip, which would bring an old setuptools along
        own = pathlib.Path(sysconfig.get_path('purelib', vars=dict(base=str(folder))))
        (own / 'beneath.pth').write_text(f'import site; site.addsitedir({sysconfig.get_path("purelib")!r})\n')
        for arguments in ENVIRONMENTS[name][0]:
            subprocess.run([sys.executable, '-m', 'pip', '--python', python, 'install', '--disable-pip-version-check',
                            *arguments], check=True)
        ready.touch()
    if name == 'mmpretrain':  # uses the transformers that it finds beneath, unless one too old for it lies above
        own = pathlib.Path(sysconfig.get_path('purelib', vars=dict(base=str(folder)))) / 'transformers-0.dist-info'
        own.mkdir(exist_ok=True)
        (own / 'METADATA').write_text('Metadata-Version: 2.1\nName: transformers\nVersion: 0\n')
    return python


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in ENVIRONMENTS:
        sys.exit(f'{__doc__}\ngiven: {" ".join(sys.argv[1:]) or "nothing"}; expected one of {", ".join(ENVIRONMENTS)}')
    name, *arguments = sys.argv[1:]
    return subprocess.run([prepare(name), '-m', 'pytest', *ENVIRONMENTS[name][1], *arguments], cwd=ROOT).returncode


if __name__ == '__main__':
    sys.exit(main())
