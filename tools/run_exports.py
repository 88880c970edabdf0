"""Exports models to every runtime of `san-backbones export`, and writes what came of it into the docs.

    python -m tools.run_exports [--only RUNTIME ...] [--models MODEL ...] [--keep]

Each runtime gets an environment of its own in .cache, which also sees the packages of the current one; pip installs
what its extra lacks, from the registry. It is removed afterwards unless --keep is given. The weights are random, and
norms are away from where they begin, so that a converter that drops a branch gives other numbers. Large models are
converted as classifiers at 224 pixels and as feature maps at 64, small ones as classifiers at 64. Then the classifiers
at 224 pixels and timm's resnet50, made by the same converter, run in turns, with as many threads as the runtime takes
by itself. Results go into the table of docs/how-to/export.md; with --only, into those rows.
"""
import argparse
import configparser
import datetime
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import timm
import torch
from safetensors.torch import save_file

import san_backbones  # noqa: F401
from san_backbones.export import _Flat
from san_backbones.runtimes import TARGETS
from tools.run_apart import ROOT, make

PAGE = ROOT / 'docs' / 'how-to' / 'export.md'
MODELS = {'test_san_patchwise': 64, 'test_san_pairwise': 64, 'san10_patchwise': 224, 'san10_pairwise': 224}
FEATURES_AT = 64  # pixels
TIME_LIMIT = 1500  # seconds for a model
ROUNDS = 9
WITH = {'onnx': 'onnxruntime', 'openvino': 'openvino', 'executorch': 'executorch', 'litert': 'litert-torch',
        'coreml': 'coremltools', 'ncnn': 'ncnn'}  # whose version is shown, beside torch's
HEADING = ('runtime', 'versions', 'models', 'converts', 'loads', 'largest difference', 'file, MB',
           'milliseconds', '`resnet50`', 'date')


class Result(NamedTuple):
    """Of one model: what `export --json` printed, or nothing and the last line of its errors."""
    report: dict | None
    said: str


def requirements(extra: str) -> list[str]:
    """The lines of an extra in setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'setup.cfg')
    return [line for line in parser['options.extras_require'].get(extra, '').splitlines()
            if line and not line.startswith('#')]


def write_weights(name: str, path: pathlib.Path) -> None:
    """Random weights; norms with factors of 0.75 to 1.25, and means and offsets that are not 0."""
    torch.manual_seed(0)
    model = timm.create_model(name, zero_init_last=False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, around in ((module.weight, 1.), (module.running_var, 1.), (module.bias, 0.),
                                   (module.running_mean, 0.)):
                tensor.data = torch.rand_like(tensor) / 2 - 0.25 + around
    save_file(model.state_dict(), path)


def try_model(python: pathlib.Path, to: str, name: str, size: int, path: pathlib.Path, features: bool) -> Result:
    """Exports one model in that environment, to the path."""
    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder) / f'{name}.safetensors'
        write_weights(name, weights)
        command = [python, '-m', 'san_backbones', 'export', name, '--to', to, '--size', str(size), '--json',
                   '--weights', weights, '--out', path, *(['--features'] if features else [])]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            return Result(None, f'not done after {TIME_LIMIT // 60} minutes')
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith('Error: ')] or done.stderr.splitlines()
        return Result(None, (lines or [f'ended with {done.returncode}'])[-1].removeprefix('Error: '))
    return Result(json.loads(done.stdout[done.stdout.index('{\n'):]), '')


def write_peer(to: str, path: pathlib.Path, size: int) -> None:
    """timm's resnet50 with random weights for that runtime; without the zeros of its last norms, for which a converter
    would leave out what is before them.
    """
    model, example = _Flat(timm.create_model('resnet50', zero_init_last=False).eval()), torch.zeros(1, 3, size, size)
    model.training = False
    with torch.no_grad():
        if to == 'onnx':
            torch.onnx.export(model, (example,), path, input_names=['images'], dynamo=True)
        else:
            TARGETS[to].write(model, example, path, False)


def time_programs(to: str, paths: list[str], size: int) -> list[float]:
    """Milliseconds for a picture, by each of the programs and by resnet50: medians of ROUNDS, in turns."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        peer = pathlib.Path(folder) / f'resnet50{TARGETS[to].suffix}'
        write_peer(to, peer, size)
        programs = [TARGETS[to].load(pathlib.Path(path)) for path in (*paths, peer)]
        image, spent = torch.randn(1, 3, size, size), [[] for _ in programs]
        for _ in range(ROUNDS + 1):
            for program, times in zip(programs, spent):
                start = time.perf_counter()
                program(image)
                times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(times[1:]) for times in spent]


def timed(python: pathlib.Path, to: str, paths: list[pathlib.Path], size: int) -> list[float]:
    """`time_programs` in that environment; nothing if it fails, which is said."""
    names = [str(path) for path in paths]
    code = f'from tools.run_exports import time_programs; print(time_programs({to!r}, {names!r}, {size}))'
    environment = {name: value for name, value in os.environ.items() if name != 'OMP_NUM_THREADS'}
    done = subprocess.run([python, '-c', code], cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(f'{to}: not timed: {done.stderr.strip()[-300:]}', flush=True)
        return []
    return json.loads(done.stdout.splitlines()[-1])


def show(report: dict) -> str:
    return report['note'] or f'{report["difference"]:.1e} on {report["pictures"]}, {report["bytes"] / 1e6:.1f} MB'


def versions(python: pathlib.Path, to: str) -> str:
    names = ['torch', *([WITH[to]] if to in WITH else [])]
    code = f'from importlib.metadata import version; print(*[name + " " + version(name) for name in {names}], sep=", ")'
    return subprocess.run([python, '-c', code], capture_output=True, text=True, check=True).stdout.strip()


def row(to: str, results: dict[tuple[str, bool], Result], shown: str, times: list[float]) -> str:
    """The line of the table. Results are those of classifiers, and of the features of a model."""
    reports = {case: result.report for case, result in results.items() if result.report}
    names = [name for name, features in results if not features]
    compared = [report['difference'] for report in reports.values() if report['difference'] is not None]

    def count(number: int) -> str:
        return 'yes' if number == len(results) else f'{number} of {len(results)}' if number else 'no'
    ran_nothing = bool(reports) and not compared
    tried = 'all four' if names == list(MODELS) else ', '.join(f'`{name}`' for name in names)
    cells = (
        TARGETS[to].name, shown, tried, count(len(reports)),
        'converted only' if ran_nothing else count(len(compared)), f'{max(compared):.1e}' if compared else '-',
        ', '.join(f'{reports[name, False]["bytes"] / 1e6:.1f}' if (name, False) in reports else '-' for name in names),
        ', '.join(f'{ms:.0f}' for ms in times[:-1]) or '-', f'{times[-1]:.0f}' if times else '-',
        datetime.date.today().isoformat())
    return f'| {" | ".join(cells)} |'


def write(rows: dict[str, str]) -> None:
    """Replaces rows of the page's table, in the order of `TARGETS`."""
    before = PAGE.read_text()
    table = re.search(rf'^\| {" [|] ".join(HEADING)} \|\n\|[ |:-]*\n((?:\|.*\n)*)', before, re.M)
    known = {line.split('|')[1].strip(): line for line in table[1].splitlines()} | rows
    lines = ''.join(f'{known[target.name]}\n' for target in TARGETS.values() if target.name in known)
    PAGE.write_text(before[:table.start(1)] + lines + before[table.end(1):])


def run(to: str, models: list[str], keep: bool) -> bool:
    """Tries one runtime, writes its row, prints refusals; whether all models went through."""
    wanted = requirements(TARGETS[to].extra)
    name = f'export-{to}'
    try:
        try:
            python = make(name, [['--quiet', '--no-compile', *wanted]] if wanted else [], capture_output=True)
        except subprocess.CalledProcessError as error:
            print(f'{to}: cannot be installed: {error.stderr.decode()[-500:]}', flush=True)
            return False
        results, shown, large = {}, versions(python, to), []
        with tempfile.TemporaryDirectory() as folder:
            for model in models:
                for features in ((False, True) if MODELS[model] > FEATURES_AT else (False,)):
                    start = time.monotonic()
                    path = pathlib.Path(folder) / f'{model}{"_features" if features else ""}{TARGETS[to].suffix}'
                    result = try_model(python, to, model, FEATURES_AT if features else MODELS[model], path, features)
                    results[model, features] = result
                    print(f'{to}, {path.stem}, {time.monotonic() - start:.0f} s: '
                          f'{result.said or show(result.report)}', flush=True)
                    if result.report and result.report['difference'] is not None and MODELS[model] > FEATURES_AT \
                            and not features:
                        large.append(path)
                    write({TARGETS[to].name: row(to, results, shown, [])})  # as far as it has come
            times = timed(python, to, large, MODELS[models[-1]]) if large else []
        write({TARGETS[to].name: row(to, results, shown, times)})
        return all(result.report for result in results.values())
    finally:
        if not keep:
            shutil.rmtree(ROOT / '.cache' / f'venv-{name}', ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', metavar='RUNTIME', nargs='+', choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument('--models', metavar='MODEL', nargs='+', choices=list(MODELS), default=list(MODELS))
    parser.add_argument('--keep', action='store_true', help='keep the environments, and reuse those that exist')
    options = parser.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    went = [run(to, options.models, options.keep) for to in options.only]
    return int(not all(went))


if __name__ == '__main__':
    sys.exit(main())
