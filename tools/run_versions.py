"""Installs the package with the oldest and the newest supported dependencies, and runs its core tests.

    python -m tools.run_versions [--only NAME] [--keep]

Each corner of the ranges in setup.cfg gets a fresh environment in .cache (several GB while it runs), with packages from
the registry and the package installed from this checkout, as a user would do. With --keep the environment stays, to
investigate a failure, and is reused. The results go into docs/reference/versions.md; with --only, into one row of its
table.
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
from typing import NamedTuple

from tools.run_apart import ROOT, count_tests

PAGE = ROOT / 'docs' / 'reference' / 'versions.md'
SHOWN = ('torch', 'torchvision', 'timm', 'huggingface_hub', 'safetensors', 'numpy')
# tests that need only torch, timm and huggingface_hub; they skip what is not installed
TESTS = ('tests/ops', 'tests/test_models.py', 'tests/test_fuse.py', 'tests/test_weights.py', 'tests/test_hub_server.py',
         'tests/test_export.py', 'tests/test_supply.py', 'tests/weights/test_authors.py')
TESTS_OF_MM = ('tests/test_models.py', 'tests/mm', 'tests/trust/test_interruption.py')  # the core: by other corners
TESTS_OF_TOOLS = ('tests/test_cli.py', 'tests/extract', 'tests/distill', 'tests/test_visualize.py',
                  'tests/test_viewer.py', 'tests/app')
TESTS_OF_RUNTIMES = ('tests/test_runtimes.py',)
OLDEST = ('torch==2.4.0', 'torchvision==0.19.0', 'timm==1.0.26')
OLDEST_OF_MM = ('torch==2.6.0', 'timm==1.0.26', 'huggingface_hub<2', 'mmengine==0.10.7', 'mmcv-lite==2.0.0',
                'mmdet==3.3.0', 'mmsegmentation==1.2.2')
OLDEST_OF_FEATURES = ('typer==0.20.0', 'pyarrow==17.0.0', 'tqdm==4.60.0', 'fsspec==2023.5.0', 'webdataset==0.2.96')
LEFT_OUT = 'not test_in_the_interpreter'  # Triton's interpreter takes minutes, and `make test` covers it
TIME_LIMIT = 60  # minutes for the tests of a corner


class Corner(NamedTuple):
    name: str
    python: str
    pins: tuple[str, ...] = ()
    extras: str = ''
    tests: tuple[str, ...] = TESTS


CORNERS = (
    Corner('oldest', '3.10', ('torch==2.4.0', 'torchvision==0.19.0', 'timm==1.0.26', 'huggingface_hub==1.0.1')),
    Corner('oldest torch of the newest Python', '3.13', ('torch==2.6.0', 'timm==1.0.26', 'huggingface_hub<2')),
    Corner('oldest of the mm extra', '3.10', OLDEST_OF_MM, '[mm]', TESTS_OF_MM),
    Corner('newest of the mm extra', '3.13', extras='[mm]', tests=TESTS_OF_MM),
    Corner('OneDL', '3.13', extras='[onedl]', tests=TESTS_OF_MM),
    Corner('OneDL, Python 3.14', '3.14', extras='[onedl]', tests=TESTS_OF_MM),
    Corner('oldest of the onnx extra', '3.11', ('torch==2.8.0', 'timm==1.0.31', 'huggingface_hub<2', 'onnx==1.17.*',
                                                'onnxscript==0.6.1', 'onnxruntime==1.20.*'), '[onnx]'),
    Corner('in between', '3.12', ('torch==2.10.*', 'huggingface_hub==2.0.0'), '[onnx]'),
    Corner('newest, oldest Python', '3.10', extras='[onnx]'),
    Corner('newest', '3.13', extras='[onnx]'),
    Corner('Python 3.14', '3.14', extras='[onnx]'),
    # matplotlib 3.8.0 wants numpy 1
    Corner('oldest of the command line, features and app', '3.10',
           (*OLDEST, *OLDEST_OF_FEATURES, 'numpy<2', 'matplotlib==3.8.0', 'gradio==6.31.0', 'scikit-image==0.22.0'),
           '[cli,distill,features,visualize,app]', TESTS_OF_TOOLS),
    Corner('oldest of other libraries', '3.10',
           ('torch==2.6.0', 'torchvision==0.21.0', 'timm==1.0.26', 'segmentation-models-pytorch==0.6.0',
            'transformers==5.20.0', 'accelerate==1.15.0', 'scipy'),
           '[smp,transformers,accelerate]', ('tests/ecosystem',)),
    Corner('oldest of the openvino extra', '3.11', ('openvino==2025.0.0',), '[cli,openvino]', TESTS_OF_RUNTIMES),
    # executorch 1.5 itself asks for coremltools 9.0
    Corner('oldest of the executorch and coreml extras', '3.10', ('executorch==1.5.0', 'coremltools==9.0'),
           '[cli,executorch,coreml]', TESTS_OF_RUNTIMES),
    Corner('oldest of the litert extra', '3.10', ('litert-torch==0.10.0',), '[cli,litert]', TESTS_OF_RUNTIMES),
    # scikit-image 0.22 wants numpy 1
    Corner('oldest of the ncnn and demo extras', '3.10',
           ('numpy<2', 'ncnn==1.0.20250503', 'pnnx==20260112', 'scikit-image==0.22.0'), '[cli,ncnn,demo]',
           TESTS_OF_RUNTIMES),
    Corner('oldest of the ray extra', '3.10', (*OLDEST, *OLDEST_OF_FEATURES, 'ray==2.40.0'), '[ray]',
           ('tests/extract/test_cluster.py',)),
    Corner('oldest of the mmpretrain extra', '3.10', (*OLDEST_OF_MM, 'mmpretrain==1.2.0'), '[mm,mmpretrain]',
           ('tests/mm/test_classification.py', 'tests/ecosystem/test_timm_in_mmpretrain.py')),
)


def interpreter(version: str) -> str | None:
    """Finds a Python of that version on the PATH or in pyenv."""
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
    """Installs and tests a corner; returns the versions of `SHOWN`, and the result as text."""
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
        # processes that tests start find the checkout before the installed package: both get the same loops
        for path in folder.rglob('san_backbones/ops/native/_*'):
            if path.suffix in ('.so', '.dll'):
                shutil.copy2(path, ROOT / 'san_backbones/ops/native')
        code = f'import json; from importlib.metadata import version; print(json.dumps([*map(version, {SHOWN})]))'
        shown = subprocess.run([own / 'python', '-c', code], env=environment, capture_output=True, text=True,
                               check=True)
        # -p imports the installed package before pytest puts this folder, which has the sources, on the path
        said = count_tests([own / 'pytest'], ['-p', 'san_backbones', '-k', LEFT_OUT, *corner.tests], TIME_LIMIT,
                           env=environment)
        return json.loads(shown.stdout), said
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def write(rows: dict[str, str]) -> None:
    """Replaces rows of the page's table, and sorts all rows in the order of `CORNERS`."""
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
    parser.add_argument('--keep', action='store_true', help='keep the environment, and reuse it if it exists')
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
