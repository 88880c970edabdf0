"""Builds the sdist and, from it, the wheels of all platforms on this machine, and checks them.

    python -m tools.wheels [--only TAG ...] [--out dist] [--install]

zig cross-compiles the loops; setup.py lists the platforms. Every wheel is built twice, in two folders, and both must be
identical. The exports, the imports and the oldest supported system of each library are checked, and it must not contain
a path of this machine. `twine check --strict`, `check-wheel-contents` and, for manylinux, `auditwheel` run too. With
--install the wheel for this machine is tested in a clean environment, as in `make test-package`. The tools are
installed from the registry into .cache.
"""
import argparse
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ('build', 'setuptools>=77,<82', 'ziglang==0.17.1', 'lief>=0.16', 'twine>=6', 'check-wheel-contents>=0.6',
         'auditwheel>=6')
EXPORTS = {'san_width', 'san_relations', 'san_panel', 'san_unchanged', 'san_kmp_use', 'san_kmp_parallel', *(
    f'{name}_{what}' for name in ('san', 'san_backward', 'san_linear', 'san_normed', 'san_scaled', 'san_stem')
    for what in ('run', 'bytes'))}
SUMS = 'SHA256SUMS'
# system libraries that a library may need, by the beginning of the tag
SYSTEM = {
    'manylinux': r'(libc\.so\.6|libm\.so\.6|ld-linux-(x86-64|aarch64)\.so\.\d)',
    'musllinux': r'(libc\.so|libc\.musl-\w+\.so\.1)',
    'macosx': r'/usr/lib/libSystem\.B\.dylib',
    'win': r'(?i)(kernel32\.dll|api-ms-win-crt-.*\.dll|ucrtbase\.dll|msvcrt\.dll)',
}


@functools.cache
def programs(name: str, packages: tuple[str, ...]) -> pathlib.Path:
    """Returns the folder of programs of an environment in .cache with these packages, which is made if needed."""
    folder = ROOT / '.cache' / f'venv-{name}'
    found, ready = folder / ('Scripts' if os.name == 'nt' else 'bin'), folder / '.ready'
    if not ready.exists() or ready.read_text() != repr(packages):
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([found / 'python', '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', *packages],
                       check=True)
        ready.write_text(repr(packages))
    return found


def tool(name: str) -> pathlib.Path:
    return programs('wheels', TOOLS) / name


def build(source: pathlib.Path, out: pathlib.Path, kind: str, epoch: str, tag: str = '') -> pathlib.Path:
    """Builds the sdist or a wheel of `source`, and returns the new file in `out`."""
    before = {*out.iterdir()}
    shutil.rmtree(source / 'build', ignore_errors=True)  # may be of another platform
    environment = {**os.environ, 'SOURCE_DATE_EPOCH': epoch, 'SAN_BACKBONES_PLATFORM': tag}
    done = subprocess.run([tool('python'), '-m', 'build', f'--{kind}', '--no-isolation', '--outdir', out, source],
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode or re.search(r'\.[ch]:\d+:\d+: warning:', done.stdout):
        sys.exit(done.stdout)
    built, = {*out.iterdir()} - before
    return built


def digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sums(folder: pathlib.Path) -> str:
    """Returns the content of SHA256SUMS for the other files of a folder."""
    files = sorted(path for path in folder.iterdir() if path.name != SUMS)
    return ''.join(f'{digest(path)}  {path.name}\n' for path in files)


LOOK = """
import json, lief, sys
library = lief.parse(sys.argv[1])
if isinstance(library, lief.PE.Binary):
    found = dict(needs=[i.name for i in library.imports], exports=[e.name for e in library.get_export().entries])
elif isinstance(library, lief.MachO.Binary):
    needs = [i.name for i in library.libraries if i.command != lief.MachO.LoadCommand.TYPE.ID_DYLIB]
    found = dict(needs=needs, own=[i.name for i in library.libraries if i.name not in needs],
                 exports=[s.name[1:] for s in library.exported_symbols], oldest=library.build_version.minos)
else:
    needs = [e.name for e in library.dynamic_entries if e.tag == lief.ELF.DynamicEntry.TAG.NEEDED]
    versions = [a.name for r in library.symbols_version_requirement for a in r.get_auxiliary_symbols()]
    found = dict(needs=needs, exports=[s.name for s in library.exported_symbols], versions=versions)
print(json.dumps(found))
"""


def faults(wheel: pathlib.Path, tag: str, hidden: list[bytes]) -> list[str]:
    """Lists what is wrong with the libraries of a wheel."""
    wrong = []
    builds = {'baseline', 'avx2', 'avx512'} if tag.endswith(('x86_64', 'amd64')) else {'baseline'}
    suffix = '.dll' if tag.startswith('win') else '.so'
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = {name for name in archive.namelist() if name.endswith(('.so', '.dll'))}
        expected = {f'san_backbones/ops/native/_{build}{suffix}' for build in builds}
        if names != expected:
            wrong.append(f'it holds {sorted(names)}, expected {sorted(expected)}')
        for name in sorted(names):
            content = archive.read(name)
            wrong += [f'{name}: holds the path {path.decode()}' for path in hidden if path in content]
            path = pathlib.Path(folder, pathlib.PurePosixPath(name).name)
            path.write_bytes(content)
            seen = json.loads(subprocess.check_output([tool('python'), '-c', LOOK, path], text=True))
            if missing := EXPORTS - {*seen['exports']}:
                wrong.append(f'{name}: does not export {sorted(missing)}')
            pattern = next(pattern for start, pattern in SYSTEM.items() if tag.startswith(start))
            wrong += [f'{name}: needs {library}' for library in seen['needs'] if not re.fullmatch(pattern, library)]
            wrong += [f'{name}: needs {version}, newer than glibc 2.17' for version in seen.get('versions', ())
                      if tuple(map(int, re.findall(r'\d+', version))) > (2, 17)]
            wrong += [f'{name}: calls itself {own}' for own in seen.get('own', ()) if own != f'@rpath/{path.name}']
            if seen.get('oldest', [11, 0, 0]) > [11, 0, 0]:
                wrong.append(f'{name}: needs macOS {seen["oldest"]}')
    return wrong


def main() -> int:
    platforms = platforms_of_setup()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', nargs='+', metavar='TAG', choices=platforms, default=platforms,
                        help=', '.join(platforms))
    parser.add_argument('--out', type=pathlib.Path, default=ROOT / 'dist')
    parser.add_argument('--install', action='store_true', help='test the wheel for this machine')
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for old in options.out.iterdir():
        if old.name == SUMS or old.name.endswith(('.whl', '.tar.gz', '.cdx.json')):  # may be of another version
            old.unlink()
    epoch = os.environ.get('SOURCE_DATE_EPOCH') or subprocess.check_output(
        ['git', 'log', '-1', '--format=%ct'], cwd=ROOT, text=True).strip()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix='first-') as first, tempfile.TemporaryDirectory(prefix='other-') as other:
        sdist = build(ROOT, options.out, 'sdist', epoch)
        sources = []
        for folder in (first, other):
            with tarfile.open(sdist) as archive:
                archive.extractall(folder, filter='data')
            sources.append(pathlib.Path(folder) / sdist.name.removesuffix('.tar.gz'))
        hidden = [os.fsencode(path) for path in (ROOT, *sources, pathlib.Path.home(), tempfile.gettempdir())]
        print(f'{sdist.name}  {sdist.stat().st_size / 1e6:.2f} MB', flush=True)
        for tag in options.only:
            wheel = build(sources[0], options.out, 'wheel', epoch, tag)
            with tempfile.TemporaryDirectory() as folder:
                again = build(sources[1], pathlib.Path(folder), 'wheel', epoch, tag)
                found = faults(wheel, tag, hidden)
                if digest(again) != digest(wheel):
                    found.append('a second build gives another file')
            if tag.startswith('manylinux'):
                said = subprocess.run([tool('auditwheel'), 'show', wheel], capture_output=True, text=True)
                if f'"{tag.partition(".")[0]}"' not in said.stdout:
                    found.append(f'auditwheel says otherwise: {said.stdout}{said.stderr}')
            print(f'{wheel.name}  {wheel.stat().st_size / 1e6:.2f} MB  sha256 {digest(wheel)[:16]}  '
                  f'{"; ".join(found) or "right"}', flush=True)
            wrong += [f'{tag}: {fault}' for fault in found]
    built = [*options.out.glob('*.whl'), sdist]
    # in the folder for OpenMMLab's mim two configs may be equal (W002), and none is meant to be imported (W004)
    checks = [[tool('twine'), 'check', '--strict', *built],
              [tool('check-wheel-contents'), '--ignore', 'W002,W004', *options.out.glob('*.whl')]]
    wrong += [f'{check[0].name} found a fault' for check in checks if subprocess.run(check).returncode]
    (options.out / SUMS).write_text(sums(options.out))
    if options.install:
        machine = subprocess.check_output([tool('python'), '-c', 'import sysconfig; print(sysconfig.get_platform())'],
                                          text=True).strip().replace('-', '_')
        fits = [path for path in options.out.glob('*.whl') if machine.removeprefix('linux') in path.name
                and ('manylinux' in path.name or not machine.startswith('linux'))]
        subprocess.run([sys.executable, ROOT / 'tools' / 'run_package.py', *fits], check=True)
    for fault in wrong:
        print(fault, file=sys.stderr)
    return bool(wrong)


def platforms_of_setup() -> list[str]:
    """Reads the tags from the table in setup.py, without running the rest of it."""
    text = (ROOT / 'setup.py').read_text()
    table = re.search(r'^PLATFORMS = (\{.*?^\})', text, re.M | re.S)
    assert table is not None
    return list(eval(table[1], {}))


if __name__ == '__main__':
    sys.exit(main())
