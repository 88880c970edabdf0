"""What SECURITY.md promises: versions, digests, what is run at installation, what a checkpoint may do."""
import configparser
import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import timm
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import san_backbones
from san_backbones import _requirements, hub
from tests import ROOT

LOCK = ROOT / 'requirements' / 'dev.lock'
LOCKED_EXTRAS = ('mm', 'demo', 'test', 'lint')  # those of the Makefile


# --- Versions --------------------------------------------------------------------------------------------------------

def declared(*extras):
    """Requirements of setup.cfg that hold here, for these extras and those that they name."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'setup.cfg')
    lines, pending = parser['options']['install_requires'].splitlines(), list(extras)
    for extra in pending:
        lines += parser['options.extras_require'][extra].splitlines()
    for requirement in (Requirement(line) for line in lines if line and not line.startswith('#')):
        if requirement.name == 'san-backbones':
            yield from declared(*requirement.extras)
        elif requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def test_the_check_at_import_is_that_of_setup_cfg():
    bounds = {requirement.name: str(requirement.specifier) for requirement in declared()}
    assert {name: f'>={least}' for name, least in _requirements.LEAST.items()} == {
        name: bounds[name] for name in ('torch', 'timm')}
    for extra, least in (('mm', _requirements.LEAST_FOR_PICKLES), ('onnx', _requirements.LEAST_FOR_ONNX)):
        of_extra = [str(requirement.specifier) for requirement in declared(extra) if requirement.name == 'torch']
        here = len([*declared(extra)]) > len([*declared()])  # the mm extra is empty on Python 3.14
        assert of_extra == [bounds['torch'], *[f'>={least["torch"]}'] * here]


@pytest.mark.parametrize('module, version', [
    (torch, '2.3.1'), (torch, '2.3.1+cu121'), (torch, '1.13.0'), (timm, '1.0.25'), (timm, '0.9.16')])
def test_older_versions_are_refused(module, version, monkeypatch):
    monkeypatch.setattr(module, '__version__', version)
    name, least = module.__name__, _requirements.LEAST[module.__name__]
    expected = f"needs {name} {least} or later, found {name} {version}: pip install --upgrade '{name}>={least}'"
    with pytest.raises(ImportError, match=re.escape(expected)):
        importlib.reload(_requirements)


@pytest.mark.parametrize('module, version', [
    (torch, '2.4.0'), (torch, '2.4.0a0+git12ab34'), (torch, '2.10.1'), (torch, '3.0'), (timm, '1.0.26'),
    (timm, '1.0.31.dev0'), (timm, '1.1'), (timm, '1.0.100')])
def test_others_are_not(module, version, monkeypatch):
    monkeypatch.setattr(module, '__version__', version)
    importlib.reload(_requirements)


def test_the_check_comes_before_anything_else():
    code = "import timm; timm.__version__ = '1.0.20'\ntry:\n    import san_backbones\nexcept ImportError as error:\n" \
           "    import sys\n    print(error, sorted(name for name in sys.modules if name.startswith('san_backbones')))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 'needs timm' in done.stdout and 'san_backbones.ops' not in done.stdout


@pytest.mark.skipif(sys.version_info >= (3, 14), reason='no mm extra')
@pytest.mark.parametrize('version, refused', [('2.5.1', True), ('2.4.0+cu121', True), ('2.6.0', False)])
def test_pickles_are_read_by_no_older_torch(version, refused):
    """Whose `torch.load` may run code of the file."""
    pytest.importorskip('mmengine')
    code = f"import torch, timm, san_backbones; torch.__version__ = '{version}'\ntry:\n    import san_backbones.mm\n" \
           "except ImportError as error:\n    print(error)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ('san_backbones.mm needs torch 2.6 or later, because' in done.stdout) == refused


# --- The lock --------------------------------------------------------------------------------------------------------

def locked():
    """Version and hashes of each package, by its normalised name."""
    if not LOCK.is_file():
        pytest.skip('the lock is not in an sdist')
    entries = re.findall(r'^(\S+)==(\S+)((?: \\\n +--hash=sha256:[0-9a-f]{64})*)$', LOCK.read_text(), re.M)
    return {canonicalize_name(name): (version, hashes.split('--hash=')[1:]) for name, version, hashes in entries}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11) or not sys.platform.startswith('linux'),
                    reason='the lock is for Python 3.11 on Linux')
def test_the_lock_satisfies_setup_cfg():
    lock = locked()
    wrong = [f'{requirement} is {lock.get(canonicalize_name(requirement.name), ("absent",))[0]}'
             for requirement in declared(*LOCKED_EXTRAS)
             if canonicalize_name(requirement.name) not in lock
             or lock[canonicalize_name(requirement.name)][0] not in requirement.specifier]
    assert not wrong, 'renew the lock (make lock): ' + ', '.join(wrong)


def test_the_lock_has_digests_and_no_addresses():
    lock, text = locked(), LOCK.read_text()
    assert len(lock) == len(re.findall(r'^[^\s#-]', text, re.M)) and all(hashes for _, hashes in lock.values())
    assert not re.search(r'://|index|find-links|\bfile:|^-e', text, re.M)


# --- What ships, and its installation --------------------------------------------------------------------------------

def test_shipped_weights_have_the_digests_of_the_manifest(monkeypatch, tmp_path):
    shipped = sorted((ROOT / 'weights').glob('*/' + hub.FILENAME))
    manifest = json.loads((ROOT / 'weights' / 'manifest.json').read_text())['models']
    assert shipped and {path.parent.name: hub.digest(path) for path in shipped} == {
        path.parent.name: manifest[path.parent.name]['sha256'] for path in shipped}
    monkeypatch.setenv(hub.FOLDER_VARIABLE, str(tmp_path))
    for path in shipped:
        changed = bytearray(path.read_bytes())
        changed[-1] ^= 1
        folder = tmp_path / path.parent.name
        folder.mkdir()
        (folder / hub.FILENAME).write_bytes(changed)
        with pytest.raises(hub.WeightsError, match='SHA-256'):
            timm.create_model(path.parent.name, pretrained=True)


AUDIT = '''
import runpy, sys
events = []
def audit(event, arguments):
    if event.startswith(('subprocess.', 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'socket.', 'urllib.')):
        process = event.startswith(('subprocess.', 'os.posix_spawn'))
        print('EVENT process' if process else f'EVENT {event}', arguments[0] if process else arguments, file=sys.stderr)
sys.addaudithook(audit)
sys.argv = ['setup.py', '-q', 'bdist_wheel']
sys.path.insert(0, '')
runpy.run_path('setup.py', run_name='__main__')
'''


@pytest.mark.skipif(os.name == 'nt', reason='stands in for a Unix compiler')
def test_an_installation_runs_the_compiler_and_nothing_else(tmp_path):
    """Every process and connection of a build is seen. The compiler, a stand-in, fails, and the wheel is made."""
    source = tmp_path / 'source'
    kept = ('setup.py', 'setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE', 'MANIFEST.in', 'model-index.yml',
            'san_backbones', 'mm_configs', 'weights')
    for name in kept:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = dict(ignore=shutil.ignore_patterns('*.so', '__pycache__')) if copy is shutil.copytree else {}
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name, **options)
    compiler = tmp_path / 'compiler'
    compiler.write_text('#!/bin/sh\nexit 1\n')
    compiler.chmod(0o755)
    done = subprocess.run([sys.executable, '-c', AUDIT], cwd=source, capture_output=True, text=True,
                          env={**os.environ, 'CC': str(compiler)})
    assert done.returncode == 0, done.stderr[-3000:]
    events = [line for line in done.stderr.splitlines() if line.startswith('EVENT')]
    assert events and set(events) == {f'EVENT process {compiler}'}
    wheel, = (source / 'dist').glob('*.whl')
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    for shipped in ('test_san_patchwise.shapes', 'san10_pairwise.distilled', 'san10_patchwise.distilled'):
        assert f'san_backbones/.weights/{shipped}/{hub.FILENAME}' in names
    assert wheel.stat().st_size < 40e6
    assert not [name for name in names if name.endswith(('.pth', '.so', '.pkl', '.bin')) or '.data/' in name]


# --- Checkpoints are data --------------------------------------------------------------------------------------------

class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f'touch {self.target}',)


def by_path(path, tmp_path):
    timm.create_model('test_san_patchwise', checkpoint_path=str(path))


def by_overlay(path, tmp_path):
    timm.create_model('test_san_patchwise', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def by_folder(path, tmp_path):
    folder = tmp_path / 'folder'
    shutil.copytree(ROOT / 'weights' / 'test_san_patchwise.shapes', folder)
    (folder / hub.FILENAME).unlink()
    shutil.copy(path, folder / 'pytorch_model.bin')
    timm.create_model(f'local-dir:{folder}', pretrained=True)


def by_command_line(path, tmp_path):
    pytest.importorskip('typer', reason='needs the cli extra')
    from san_backbones.cli import weights
    weights.load('test_san_patchwise', path)


def by_backbone(path, tmp_path):
    pytest.importorskip('mmengine', reason='needs the mm extra')
    from san_backbones.mm import SANBackbone
    small = dict(depths=(1,), widths=(32,), kernel_sizes=(3,), stem_width=16)
    SANBackbone(small, out_indices=(0,), init_cfg=dict(type='Pretrained', checkpoint=str(path))).init_weights()


def by_mmengine(path, tmp_path):
    pytest.importorskip('mmengine', reason='needs the mm extra')
    from mmengine.runner import load_checkpoint

    import san_backbones.mm  # noqa: F401
    load_checkpoint(timm.create_model('test_san_patchwise'), str(path), map_location='cpu')


@pytest.mark.parametrize('load', [by_path, by_overlay, by_folder, by_command_line, by_backbone, by_mmengine],
                         ids=lambda load: load.__name__)
@pytest.mark.parametrize('old_format', [False, True])
def test_nothing_of_a_checkpoint_is_run(load, old_format, tmp_path, monkeypatch):
    monkeypatch.delenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', raising=False)
    path, target = tmp_path / 'model.pth', tmp_path / 'was-run'
    state = timm.create_model('test_san_patchwise').state_dict()
    torch.save({'state_dict': state, 'epoch': Malicious(target)}, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(Exception, match=r'(posix|nt|os)\.system|weights.only|Weights only'):
        load(path, tmp_path)
    assert not target.exists()


def test_the_package_alone_allows_no_more_classes():
    code = 'import timm, torch; before = torch.serialization.get_safe_globals(); import san_backbones\n' \
           'assert torch.serialization.get_safe_globals() == before'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=pathlib.Path(san_backbones.__file__).parent.parent)


def test_the_package_alone_loads_no_downloader():
    """gdown and what it brings are for who asks for weights that are not here."""
    code = 'import sys, timm; before = set(sys.modules); import san_backbones\n' \
           'print({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))'
    done = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True,
                          cwd=pathlib.Path(san_backbones.__file__).parent.parent)
    assert eval(done.stdout) <= {'san_backbones', 'torch'}
