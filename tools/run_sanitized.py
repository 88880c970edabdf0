"""Builds the compiled loops with AddressSanitizer and UndefinedBehaviorSanitizer and runs their tests on them.

    python -m tools.run_sanitized [CAPABILITY ...]

The package is built into .cache/sanitized and imported from there; installed loops are not touched. The tests run for
every instruction set that torch finds here (default, avx2, avx512), or for the given ones. Needs Linux and a GCC with
libasan and libubsan (`CC` names another).
"""
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import setuptools  # noqa: F401  (first: it brings distutils)
import distutils.core  # isort: skip

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / '.cache' / 'sanitized'
FLAGS = ['-fsanitize=address,undefined', '-fno-sanitize-recover=all', '-fno-omit-frame-pointer', '-g1', '-O1']
TESTS = ('tests/ops/test_linear.py', 'tests/ops/test_int8_gamma.py', 'tests/ops/test_conformance.py',
         'tests/ops/test_native.py', 'tests/ops/test_pointwise.py', 'tests/ops/test_statistics.py',
         'tests/trust/test_bad_input.py', 'tests/trust/test_refusals.py')
# tests that need other builds, or a compiler of graphs
LEFT_OUT = ('other_instruction_sets', 'libraries_of_other_sources', 'operator_contract', 'registered_as',
            'compiled_graphs')
BUILDS = {'default': 'baseline', 'avx2': 'avx2', 'avx512': 'avx512'}


def find(library: str, compiler: list[str]) -> pathlib.Path:
    """Finds the sanitizer's library that the compiler links."""
    path = pathlib.Path(subprocess.check_output([*compiler, f'-print-file-name={library}'], text=True).strip())
    if not path.is_absolute() or not path.exists():  # GCC prints the bare name if it has none
        sys.exit(f'{shlex.join(compiler)} has no {library}, which -fsanitize needs: install it (it comes '
                 'with gcc on Debian and Ubuntu; Fedora: dnf install libasan libubsan) or set CC to a GCC that has it. '
                 'Clang keeps its sanitizers elsewhere and is not supported here')
    return path.resolve()


def build(compiler: list[str]) -> None:
    """Copies the Python files, and compiles the libraries that setup.py describes with the sanitizers."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    package = ROOT / 'san_backbones'
    shutil.copytree(package, FOLDER / 'san_backbones', ignore=shutil.ignore_patterns('*.so', '__pycache__'))
    capability = torch.backends.cpu.get_cpu_capability().lower()
    names = {BUILDS['default'], BUILDS['avx2'] if 'avx' in capability else '', BUILDS.get(capability, '')}
    os.chdir(ROOT)
    for extension in distutils.core.run_setup('setup.py', stop_after='init').ext_modules:
        name = extension.name.rpartition('.')[2]
        if name[1:] in names:
            target = FOLDER / 'san_backbones' / 'ops' / 'native' / f'{name}.so'
            # after the flags of setup.py: -O3 would take minutes
            subprocess.run([*compiler, '-shared', '-fPIC', *extension.extra_compile_args, *FLAGS, '-o', target,
                            *extension.sources], check=True)


def run_tests(capability: str, environment: dict[str, str]) -> bool | None:
    """Whether the tests pass with the build for a CPU capability of torch; None if the processor lacks it."""
    environment = {**environment, 'ATEN_CPU_CAPABILITY': capability}
    code = ('import san_backbones; from san_backbones.ops import native; '
            'print(san_backbones.__file__, native.build(), sep="\\n")')
    seen = subprocess.run([sys.executable, '-c', code], cwd=FOLDER, env=environment, text=True, capture_output=True)
    if seen.returncode:
        sys.exit(f'the sanitized package does not start:\n{seen.stderr}')
    where, name = seen.stdout.split('\n')[:2]
    if pathlib.Path(where).parent.parent != FOLDER:
        sys.exit(f'{where} was imported instead of the package in {FOLDER}')
    if name != BUILDS[capability]:
        print(f'{capability}: this processor takes {name}', flush=True)
        return None
    print(f'{capability}: {name}', flush=True)
    # -p imports the package from that folder, before pytest puts the checkout on the path. A fault in a process that a
    # test starts fails that test
    command = [sys.executable, '-m', 'pytest', '-p', 'san_backbones', '-p', 'no:cacheprovider', '-q', '-x',
               '-c', ROOT / 'pyproject.toml', '--rootdir', ROOT,
               '-k', ' and '.join(f'not {name}' for name in LEFT_OUT),
               *(ROOT / test for test in TESTS if (ROOT / test).exists())]
    return subprocess.run(command, cwd=FOLDER, env=environment).returncode == 0


def main() -> None:
    if not sys.platform.startswith('linux'):
        sys.exit(f'the sanitizers are preloaded, which works on Linux only; this is {sys.platform}')
    compiler = shlex.split(os.environ.get('CC', 'gcc'))
    if shutil.which(compiler[0]) is None:
        sys.exit(f'no compiler {compiler[0]}: install GCC, or set CC to one')
    preload = [find(library, compiler) for library in ('libasan.so', 'libubsan.so')]
    build(compiler)
    environment = {
        **os.environ,
        'LD_PRELOAD': ' '.join(map(str, preload)),
        'ASAN_OPTIONS': 'detect_leaks=0:abort_on_error=0:exitcode=99',  # Python and torch free little at exit
        'UBSAN_OPTIONS': 'print_stacktrace=1:halt_on_error=1',
        'PYTHONPATH': os.pathsep.join([str(FOLDER), os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep),
        'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1'),
    }
    results = {capability: run_tests(capability, environment) for capability in sys.argv[1:] or BUILDS}
    failed = [capability for capability, passed in results.items() if passed is False]
    if failed or not any(results.values()):
        sys.exit(f'failed: {", ".join(failed)}' if failed else 'nothing was tested')
    print('no fault found: ' + ', '.join(capability for capability, passed in results.items() if passed))


if __name__ == '__main__':
    main()
