"""What the benchmarks share: alternating timing, peak memory, the machine's own rates, and the CSV.

Everything runs on CUDA where there is a GPU, else on the CPU. Times are medians over rounds in which every case runs
once, one after the other, so that all of them see the same machine. Peak memory is that of a process of its own for
each case: on the CPU the highest resident size above that of the process when everything is imported and nothing is
built, on CUDA torch's own peak, weights included.
"""
import argparse
import csv
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

# on few cores, threads that spin while they wait take the time of those that work
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
import torch

RESULTS = pathlib.Path(__file__).parent / 'results'
DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def parser(description):
    """Options that every benchmark has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument('--rounds', type=int, default=7, help='times that every case runs')
    options.add_argument('--results', type=pathlib.Path, default=RESULTS, help='folder for the CSV')
    options.add_argument('--no-compile', action='store_true', help='leave out torch.compile, which takes minutes')
    options.add_argument('--memory', help=argparse.SUPPRESS)  # a child measures this case, given as JSON
    return options


def machine():
    """The device, in words."""
    if DEVICE.type == 'cuda':
        device = torch.cuda.get_device_name()
    else:
        name = platform.processor()
        if os.path.exists('/proc/cpuinfo'):
            with open('/proc/cpuinfo') as info:
                name = next((line.split(':')[1].strip() for line in info if line.startswith('model name')), name)
        device = f'{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}'
    return f'{device}, torch {torch.__version__}'


def synchronise():
    if DEVICE.type == 'cuda':
        torch.cuda.synchronize()


def seconds(function):
    """Time of one call."""
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - start


def alternate(cases, rounds, patience=20.):
    """Median seconds of each of `cases` (name: function), measured in turns after one call to warm up.

    A case whose calls have taken more than `patience` seconds sits out the rest of the rounds. One that fails is
    named, with why, and is NaN.
    """
    times = {name: [] for name in cases}
    for name, function in cases.items():
        try:
            function()
        except Exception as error:
            print(f'  {name} failed: {(str(error).strip().splitlines() or [repr(error)])[0][:200]}', flush=True)
            times[name] = None
    for _ in range(rounds):
        for name, function in cases.items():
            if times[name] is not None and sum(times[name]) < patience:
                times[name].append(seconds(function))
    return {name: statistics.median(t) if t else math.nan for name, t in times.items()}


def figure(value, digits=0):
    """A number for the CSV; blank where there is none."""
    return '' if value is None or math.isnan(value) else f'{value:.{digits}f}'


def ratio(value, other, digits=2):
    """One over the other for the CSV; blank where either is missing."""
    return '' if value is None or other is None else figure(value / other, digits)


def rates():
    """What this machine can do: float32 operations and bytes a second (matrix product; copy, read plus write)."""
    size = 2048 if DEVICE.type == 'cpu' else 8192
    a, b = torch.randn(2, size, size, device=DEVICE)
    source = torch.randn(2 ** 26 if DEVICE.type == 'cpu' else 2 ** 28, device=DEVICE)
    target = torch.empty_like(source)
    multiply = min(seconds(lambda: torch.mm(a, b)) for _ in range(7))
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(7))
    return 2 * size ** 3 / multiply, 2 * source.numel() * source.element_size() / copy


def resident(field):
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


def measure_peak(make, calls=2):
    """Bytes at the peak of building `make()` and calling its result. For a process of its own."""
    if DEVICE.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        function = make()
        for _ in range(calls):
            function()
        return torch.cuda.max_memory_allocated()
    idle = resident('VmRSS')
    function = make()
    for _ in range(calls):
        function()
    return resident('VmHWM') - idle


def peak_memory(case):
    """Runs this script again with `--memory case` and returns the bytes it prints, or None where it failed."""
    command = [sys.executable, sys.argv[0], '--memory', json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f'  {case}: no memory figure: {(done.stderr.strip().splitlines() or ["killed"])[-1]}', flush=True)
        return None
    return int(done.stdout.split()[-1])


def write(path, rows):
    """Writes rows (dicts of the same keys) as CSV and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    print(f'wrote {path}')


def show(row):
    print('  '.join(f'{key} {value}' for key, value in row.items() if value != '' and key != 'machine'), flush=True)
