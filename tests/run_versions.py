"""Installs the package with the oldest and the newest of what it needs, and runs the tests of its core.

    python tests/run_versions.py [--only NAME] [--keep]

Each corner of the range that setup.cfg gives has a fresh environment in .cache (several GB, while it runs), with
packages from the registry and the package installed from this checkout, as a user would. With --keep it stays there,
for whoever looks into a failure, and is used again. The results go into docs/reference/versions.md; with --only, into
one row of its table.
"""
import argparse
import datetime
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs' / 'reference' / 'versions.md'
SHOWN = ('torch', 'torchvision', 'timm', 'huggingface_hub', 'safetensors', 'numpy')
# what needs torch and timm only, and the Hub with its client; others skip what is not there
TESTS = ('tests/ops', 'tests/test_models.py', 'tests/test_fuse.py', 'tests/test_weights.py', 'tests/test_hub_server.py',
         'tests/test_export.py', 'tests/test_supply.py', 'tests/weights/test_authors.py')
TESTS_OF_MM = ('tests/mm', 'tests/trust/test_interruption.py')
TESTS_OF_EXTRAS = {'[mm]': TESTS_OF_MM, '[onedl]': TESTS_OF_MM}
LEFT_OUT = 'not test_in_the_interpreter'  # of Triton: minutes, and `make test` has it
TIME_LIMIT = 3600  # seconds for the tests of a corner


class Corner(NamedTuple):
    name: str
    python: str
    pins: tuple[str, ...] = ()
    extras: str = ''


CORNERS = (
    Corner('oldest', '3.10', ('torch==2.4.0', 'torchvision==0.19.0', 'timm==1.0.26', 'huggingface_hub==1.0.1')),
    Corner('oldest torch of the newest Python', '3.13', ('torch==2.6.0', 'timm==1.0.26', 'huggingface_hub<2')),
    Corner('oldest of the mm extra', '3.10', ('torch==2.6.0', 'timm==1.0.26', 'huggingface_hub<2', 'mmengine==0.10.7',
                                              'mmcv-lite==2.0.0', 'mmdet==3.3.0', 'mmsegmentation==1.2.2'), '[mm]'),
    Corner('newest of the mm extra', '3.13', extras='[mm]'),
    Corner('OneDL', '3.13', extras='[onedl]'),
    Corner('oldest of the onnx extra', '3.11', ('torch==2.8.0', 'timm==1.0.31', 'huggingface_hub<2', 'onnx==1.17.*',
                                                'onnxscript==0.6.1', 'onnxruntime==1.20.*'), '[onnx]'),
    Corner('in between', '3.12', ('torch==2.10.*', 'huggingface_hub==2.0.0'), '[onnx]'),
    Corner('newest, oldest Python', '3.10', extras='[onnx]'),
    Corner('newest', '3.13', extras='[onnx]'),
)


def interpreter(version: str) -> str | None:
    """A Python of that version: of the path, or of pyenv."""
    pyenv = pathlib.Path(os.environ.get('PYENV_ROOT', pathlib.Path.home() / '.pyenv')) / 'versions'
    for name in (sys.executable, shutil.which(f'python{version}'), *sorted(pyenv.glob(f'{version}.*/bin/python'))):
        if name is None:
            continue
        found = subprocess.run([name, '-c', 'import sys; print("%d.%d" % sys.version_info[:2])'], capture_output=True,
                               text=True)
        if found.stdout.strip() == version:
            return str(name)
    return None


def try_corner(corner: Corner, keep: bool) -> tuple[list[str], str]:
    """Versions of `SHOWN`, and what came of it."""
    python = interpreter(corner.python)
    if python is None:
        return ['-'] * len(SHOWN), f'not tried: no Python {corner.python} here'
    folder = ROOT / '.cache' / f'venv-versions-{corner.name.replace(",", "").replace(" ", "-")}'
    own = folder / ('Scripts' if os.name == 'nt' else 'bin')
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'} | {'OMP_NUM_THREADS': '1'}
    try:
        if not keep or not folder.exists():
            subprocess.run([python, '-m', 'venv', '--clear', folder], check=True)
        installed = subprocess.run(
            [own / 'python', '-m', 'pip', 'install', '--quiet', '--no-compile', '--disable-pip-version-check',
             f'{ROOT}{corner.extras}', *corner.pins, 'pytest', 'pytest-timeout', 'setuptools>=77,<82'],
            env=environment, capture_output=True, text=True)
        if installed.returncode:
            print(installed.stderr, file=sys.stderr)
            return ['-'] * len(SHOWN), 'cannot be installed'
        code = f'import json; from importlib.metadata import version; print(json.dumps([*map(version, {SHOWN})]))'
        shown = subprocess.run([own / 'python', '-c', code], env=environment, capture_output=True, text=True,
                               check=True)
        with tempfile.TemporaryDirectory() as temporary:
            report = pathlib.Path(temporary) / 'report.xml'
            # not `python -m pytest`, which would find the package in this folder rather than the installed one
            try:
                subprocess.run(
                    [own / 'pytest', '-q', '--tb=short', '--show-capture=no', '-p', 'no:cacheprovider', '-k', LEFT_OUT,
                     f'--junitxml={report}', *TESTS, *TESTS_OF_EXTRAS.get(corner.extras, ())],
                    cwd=ROOT, env=environment, timeout=TIME_LIMIT)
            except subprocess.TimeoutExpired:
                return json.loads(shown.stdout), f'not done after {TIME_LIMIT // 60} minutes'
            if not report.is_file():
                return json.loads(shown.stdout), 'no test ran'
            counts = xml.etree.ElementTree.parse(report).getroot().find('testsuite').attrib
        failed, skipped = int(counts['failures']) + int(counts['errors']), int(counts['skipped'])
        passed = int(counts['tests']) - failed - skipped
        return json.loads(shown.stdout), f'{passed} passed, {failed} failed, {skipped} skipped'
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def write(rows: dict[str, str]) -> None:
    """Replaces rows of the page's table, and puts them all into the order of `CORNERS`."""
    before = PAGE.read_text()
    present = {line.split('|')[1].strip(): line for line in before.splitlines() if line.startswith('| ')}
    heading = re.search(r'^\| corner .*\n\|[ |:-]*\n', before, re.M)
    known = {**present, **rows}
    table = ''.join(f'{known[corner.name]}\n' for corner in CORNERS if corner.name in known)
    rest = before[heading.end():].partition('\n\n')[2] if '\n\n' in before[heading.end():] else ''
    PAGE.write_text(before[:heading.end()] + table + (f'\n{rest}' if rest else ''))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', metavar='NAME', choices=[corner.name for corner in CORNERS])
    parser.add_argument('--keep', action='store_true', help='use the environment again if it is there')
    options = parser.parse_args()
    bad = 0
    for corner in CORNERS:
        if options.only in (None, corner.name):
            versions, result = try_corner(corner, options.keep)
            today = datetime.date.today().isoformat()
            write({corner.name: f'| {corner.name} | {corner.python} | {" | ".join(versions)} | {result} | {today} |'})
            shown = ', '.join(f'{name} {version}' for name, version in zip(SHOWN, versions, strict=True))
            print(f'{corner.name}: Python {corner.python}, {shown}: {result}', flush=True)
            bad += ' 0 failed' not in result and not result.startswith('not tried')
    return bool(bad)


if __name__ == '__main__':
    sys.exit(main())
