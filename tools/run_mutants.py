"""Plants small faults in a copy of the checkout, one at a time, and reports which test detected each.

    python -m tools.run_mutants [--list] [--only TEXT] [--rest]

The faults are in mutants.py. It is an error if no test detects a fault, or if its text is not found any more. The
results go into the table tools/mutants.md. The compiled loops are built for the lowest instruction set only, which
takes a few seconds for each fault in C, or, for what is computed in 8 bits or bfloat16, for AVX-512. Faults whose tests
need VNNI or AMX are left out where the processor has none, and keep their rows. Tests run in forks of this process,
which has imported torch already.
"""
import argparse
import datetime
import functools
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import timm
import torch

from tools.mutants import MUTANTS, Mutant

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLE = ROOT / 'tools' / 'mutants.md'
LIMIT = 300  # seconds for the tests of one fault
FAILED = re.compile(r'^(?:FAILED|ERROR) (.+?)(?: - .*)?$', re.M)


class Result(NamedTuple):
    caught: bool
    by: str  # the first test that failed, or what happened instead
    seconds: float


def copy_checkout(to: pathlib.Path, with_avx512: bool) -> None:
    """Copies all files that git tracks or would add; `build` makes the compiled loops."""
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout
    for name in filter(None, listed.split('\0')):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    setup = to / 'setup.py'
    text = replaced(setup.read_text(), "if MACHINE in ('x86_64', 'amd64'):", 'if False:')
    if with_avx512:
        text = replaced(text, "{'baseline': []}", "{'baseline': ['-march=x86-64-v4']}")
    setup.write_text(text)


def build(folder: pathlib.Path) -> None:
    done = subprocess.run([sys.executable, 'setup.py', '-q', 'build_ext', '--inplace', '--force'], cwd=folder,
                          capture_output=True, text=True)
    if done.returncode or not list(folder.glob('san_backbones/ops/native/_*')):
        sys.exit(f'the compiled loops cannot be built:\n{done.stdout}{done.stderr}')


def replaced(text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        sys.exit(f'expected this text once, found it {text.count(old)} times:\n{old}')
    return text.replace(old, new)


def locate(folder: pathlib.Path, mutant: Mutant) -> pathlib.Path:
    """Finds the file that the fault goes into."""
    files = [path for path in sorted(folder.glob(mutant.where)) if path.is_file()]
    counts = {path: path.read_text().count(mutant.old) for path in files}
    if sum(counts.values()) != 1:
        found = ', '.join(f'{count} times in {path.relative_to(folder)}' for path, count in counts.items() if count)
        sys.exit(f'{mutant.name}: expected its text once in {mutant.where}, found it {found or "nowhere"}. Correct '
                 f'the entry in tools/mutants.py:\n{mutant.old}')
    return max(counts, key=lambda path: counts[path])


@functools.cache
def _has(feature: str) -> bool:
    """Asks the loops of the checkout in another process: this one must not import the package."""
    command = [sys.executable, '-c', f'from san_backbones.ops import native; print(native.has_{feature}())']
    return subprocess.check_output(command, cwd=ROOT, text=True).strip() == 'True'


def serves(mutant: Mutant) -> bool:
    """Whether this processor runs the tests of a fault."""
    return _has('amx') if mutant.with_amx else not mutant.with_avx512 or _has('int8')


def _run_tests(folder: pathlib.Path, arguments: Sequence[str], output: pathlib.Path, interpret: bool) -> None:
    """Runs pytest in a process that was forked before the package was imported."""
    os.setpgrp()
    with open(output, 'wb') as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(folder)
    os.environ.update(PYTHONPATH=str(folder), OMP_NUM_THREADS='1', PYTHONDONTWRITEBYTECODE='1')
    options = ['-q', '-rfE', '--no-header', '--tb=no', '-p', 'no:cacheprovider', *arguments]
    if interpret:  # must be set before Triton is imported
        os.environ['TRITON_INTERPRET'] = '1'
        os.execv(sys.executable, [sys.executable, '-m', 'pytest', *options])
    sys.dont_write_bytecode = True
    sys.path[0] = str(folder)
    torch.set_num_threads(1)
    code = pytest.main(options)
    sys.stdout.flush()
    os._exit(code)


def run_tests(folder: pathlib.Path, arguments: Sequence[str], limit: float | None = None,
              interpret: bool = False) -> tuple[int | None, str]:
    """Runs tests; returns pytest's exit code, None if it did not end in time, and its output."""
    output = folder / 'pytest-output'
    process = multiprocessing.get_context('fork').Process(
        target=_run_tests, args=(folder, arguments, output, interpret))
    process.start()
    process.join(limit)
    code = process.exitcode
    if code is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return code, output.read_text(errors='replace')


def judge(folder: pathlib.Path, mutant: Mutant) -> Result:
    """Plants the fault, runs its tests, and removes it again."""
    path = locate(folder, mutant)
    sound, start = path.read_text(), time.monotonic()
    path.write_text(replaced(sound, mutant.old, mutant.new))
    libraries = {library: library.read_bytes() for library in folder.glob('san_backbones/ops/native/_*.so')}
    try:
        if mutant.compiled:
            build(folder)
        code, output = run_tests(folder, ['-x', *mutant.tests], LIMIT, mutant.interpreted)
    finally:
        path.write_text(sound)
        for library, content in libraries.items():
            library.write_bytes(content)
    seconds, failed = time.monotonic() - start, FAILED.search(output)
    if code is None:
        return Result(True, f'no end within {LIMIT} s', seconds)
    if code < 0:
        return Result(True, f'signal {-code}', seconds)
    if code in (1, 2) and failed:
        return Result(True, failed[1], seconds)
    if code:
        print(output)
        return Result(False, 'the tests did not run', seconds)
    return Result(False, output.strip().splitlines()[-1], seconds)


def confirmed(folder: pathlib.Path, results: Sequence[tuple[Mutant, Result]]) -> list[tuple[Mutant, Result]]:
    """Corrects results of tests that fail without any fault."""
    failed: set[tuple[bool, str]] = set()
    for interpret in (False, True):
        tests = sorted({result.by for mutant, result in results if result.caught and result.by.startswith('tests/')
                        and mutant.interpreted == interpret})
        if tests:
            failed |= {(interpret, test) for test in FAILED.findall(run_tests(folder, tests, interpret=interpret)[1])}
    return [(mutant, result._replace(caught=False, by=f'{result.by} fails anyway')
             if (mutant.interpreted, result.by) in failed else result) for mutant, result in results]


def rows_of_table() -> dict[str, str]:
    lines = TABLE.read_text().splitlines() if TABLE.exists() else ()
    return {line.split(' | ')[0].removeprefix('| '): line for line in lines}


def write_table(results: Sequence[tuple[Mutant, Result]]) -> None:
    """Replaces the rows of these faults, and removes rows of faults that no longer exist."""
    rows = rows_of_table()
    for mutant, result in results:
        by = f'`{result.by}`'.replace('|', '\\|') if result.caught else f'**nothing**: {result.by}'
        rows[mutant.name] = f'| {mutant.name} | `{mutant.where}` | {by} | {result.seconds:.0f} |'
    kept = [rows[mutant.name] for mutant in MUTANTS if mutant.name in rows]
    versions = f'Python {sys.version_info[0]}.{sys.version_info[1]}, torch {torch.__version__}, timm {timm.__version__}'
    TABLE.write_text('\n'.join([
        '# Planted faults', '',
        'Faults that `make test-mutants` plants one at a time, and the first test that detected each.',
        f'{sum("**nothing**" not in row for row in kept)} of {len(MUTANTS)} were detected. Last run: '
        f'{datetime.date.today().isoformat()}, {versions}.', '',
        '| fault | in | detected by | s |', '| --- | --- | --- | ---: |', *kept]) + '\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--list', action='store_true', help='list the faults and stop')
    parser.add_argument('--only', metavar='TEXT', help='those whose names contain TEXT')
    parser.add_argument('--rest', action='store_true', help='those that the table does not list as detected')
    options = parser.parse_args()
    noticed = {name for name, row in rows_of_table().items() if '**nothing**' not in row} if options.rest else ()
    mutants = [mutant for mutant in MUTANTS
               if (not options.only or options.only in mutant.name) and mutant.name not in noticed]
    if not mutants:
        parser.error(f'no fault is called {options.only!r}; --list names them')
    for mutant in mutants:
        locate(ROOT, mutant)
        if options.list:
            print(f'{mutant.name} ({mutant.where}): {", ".join(mutant.tests)}')
    if options.list:
        return 0
    left_out = [mutant for mutant in mutants if not serves(mutant)]
    mutants = [mutant for mutant in mutants if mutant not in left_out]
    results: list[tuple[Mutant, Result]] = []
    for with_avx512 in sorted({mutant.with_avx512 for mutant in mutants}):
        found: list[tuple[Mutant, Result]] = []
        with tempfile.TemporaryDirectory(prefix='mutants-') as name:
            folder = pathlib.Path(name)
            copy_checkout(folder, with_avx512)
            build(folder)
            for mutant in mutants:
                if mutant.with_avx512 == with_avx512:
                    result = judge(folder, mutant)
                    found.append((mutant, result))
                    write_table(results + found)
                    print(f'{"caught  " if result.caught else "SURVIVED"} {result.seconds:4.0f} s  {mutant.name}: '
                          f'{result.by}', flush=True)
            results += confirmed(folder, found)
    if results:
        write_table(results)
    survived = [mutant.name for mutant, result in results if not result.caught]
    print(f'{len(results) - len(survived)} of {len(results)} faults were detected')
    if survived:
        print('not detected: ' + '; '.join(survived))
    if left_out:
        print('this processor cannot run the tests of: ' + '; '.join(mutant.name for mutant in left_out))
    return bool(survived)


if __name__ == '__main__':
    sys.exit(main())
