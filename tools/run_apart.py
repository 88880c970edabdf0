"""Runs tests with packages that conflict with the others, in a separate environment.

    python -m tools.run_apart mim|mmpretrain [pytest arguments]

The environment is in .cache and also sees the packages of the current one, so pip installs only what is missing.
"""
import os
import pathlib
import subprocess
import sys
import sysconfig
import tempfile
import venv
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
# name: arguments of pip install, tests
ENVIRONMENTS = {
    # --no-deps: openmim requires opendatalab, which pins setuptools 60 and requests 2.28; `mim` never imports it
    'mim': ([['--no-deps', 'openmim>=0.3.9'], ['colorama', 'model-index', 'pandas', 'requests', 'tabulate']],
            ['tests/mm/test_mim.py']),
    # mmpretrain 1.2 cannot be imported with transformers 5, and mmdet imports it if it is installed
    'mmpretrain': ([['mmpretrain>=1.2,<1.3']],
                   ['tests/mm/test_classification.py', 'tests/ecosystem/test_timm_in_mmpretrain.py']),
}


def make(name: str, installs: list[list[str]], **options) -> pathlib.Path:
    """Makes the environment if needed, with `pip install` of each list; returns its Python. Options go to pip's run."""
    folder = ROOT / '.cache' / f'venv-{name}'
    python = folder / ('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
    ready = folder / 'ready'
    if not ready.exists():
        venv.create(folder, clear=True)  # without pip, which would install an old setuptools
        own = pathlib.Path(sysconfig.get_path('purelib', vars=dict(base=str(folder))))
        (own / 'beneath.pth').write_text(f'import site; site.addsitedir({sysconfig.get_path("purelib")!r})\n')
        for arguments in installs:
            subprocess.run([sys.executable, '-m', 'pip', '--python', python, 'install', '--disable-pip-version-check',
                            *arguments], check=True, **options)
        ready.touch()
    return python


def count_tests(pytest: list[str | pathlib.Path], arguments: list[str], minutes: int, **options) -> str:
    """Runs that pytest, and says how many tests passed, failed and were skipped. Options go to its run."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / 'report.xml'
        try:
            subprocess.run([*pytest, '-p', 'no:cacheprovider', '-q', '--tb=short', '--show-capture=no',
                            f'--junitxml={report}', *arguments], cwd=ROOT, timeout=60 * minutes, **options)
        except subprocess.TimeoutExpired:
            return f'not done after {minutes} minutes'
        if not report.is_file():
            return 'no test ran'
        counts = xml.etree.ElementTree.parse(report).getroot().find('testsuite').attrib
    failed, skipped = int(counts['failures']) + int(counts['errors']), int(counts['skipped'])
    passed = int(counts['tests']) - failed - skipped
    return f'{passed} passed, {failed} failed, {skipped} skipped'


def prepare(name: str) -> pathlib.Path:
    """`make` of one of `ENVIRONMENTS`."""
    python = make(name, ENVIRONMENTS[name][0])
    folder = python.parent.parent
    if name == 'mmpretrain':  # hides the transformers of the current environment behind metadata of version 0
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
