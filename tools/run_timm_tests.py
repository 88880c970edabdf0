"""Runs timm's own model tests on the models of this package.

timm's wheel has no tests, so pip downloads the source distribution of the installed version. The only change to the
tests: the module 'san' is added to the list of modules whose intermediate features are tested. Tests that load
pretrained weights get random ones from a folder.

    python -m tools.run_timm_tests [pytest arguments]
"""
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile

import timm
from safetensors.torch import save_file

import san_backbones  # noqa: F401
from san_backbones import hub

# test_model_inference compares with outputs in the Hub repositories of timm's own test models
SELECTED = '(san10 or san15 or san19 or test_san) and not test_model_inference'


def fetch_tests(folder: pathlib.Path, version: str) -> pathlib.Path:
    """Downloads timm's tests of a version into `folder` and returns their folder."""
    tests = folder / f'timm-{version}' / 'tests'
    if (tests / 'test_models.py').exists():
        return tests
    with tempfile.TemporaryDirectory() as download:
        subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm',
                        '--dest', download, f'timm=={version}'], check=True)
        archive, = pathlib.Path(download).glob('*.tar.gz')
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if m.name.startswith(f'timm-{version}/tests/')]
            tar.extractall(folder, members=members, filter='data')
    models = tests / 'test_models.py'
    text = models.read_text()
    marker = 'FEAT_INTER_FILTERS = ['
    if marker not in text:
        sys.exit(f'{models}: no line {marker!r}; adapt tools/run_timm_tests.py to timm {version}')
    models.write_text(text.replace(marker, f"{marker}'san', ", 1))
    (tests / 'pytest.ini').write_text('[pytest]\n')
    return tests


def write_weights(folder: pathlib.Path) -> None:
    """Writes random weights for every model with a repository on the Hub."""
    for name in timm.list_pretrained('*san*'):
        repository = timm.get_pretrained_cfg(name).hf_hub_id
        path = folder / f'{repository.partition("/")[2]}.safetensors' if repository else None
        if path and not path.exists() and hub.find_local(path.stem) is None:
            save_file(timm.create_model(name).state_dict(), path)


def main() -> int:
    cache = pathlib.Path(__file__).resolve().parent.parent / '.cache'
    cache.mkdir(exist_ok=True)
    tests = fetch_tests(cache, importlib.metadata.version('timm'))
    command = [sys.executable, '-m', 'pytest', 'test_models.py', '-k', SELECTED, '-q', '-p', 'no:cacheprovider',
               '-W', 'ignore', *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as weights:
        write_weights(pathlib.Path(weights))
        environment = {**os.environ, 'TORCH_BACKEND': 'san_backbones', hub.FOLDER_VARIABLE: weights}
        return subprocess.run(command, cwd=tests, env=environment).returncode


if __name__ == '__main__':
    sys.exit(main())
