"""Shared by the benchmarks: options, the floors, and the CSV; `san_backbones.measure` measures.

Everything runs on CUDA if available, else on the CPU.
"""
import argparse
import csv
import json
import math
import os
import pathlib
import sys

# on few cores, waiting threads that spin take time from working ones
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
import torch

from san_backbones import measure, ops

RESULTS = pathlib.Path(__file__).parent / 'results'
DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


PRECISIONS = {
    'fp32': 'float32', 'tf32': 'float32, matrix products in tf32', 'bf16': 'bfloat16 autocast',
    'fp16': 'float16 autocast'}


def parser(description, precisions=True):
    """Returns a parser with the options of all benchmarks, and with --precision if there is a choice."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument('--rounds', type=int, default=7, help='times that every case runs')
    if precisions:
        options.add_argument('--precision', choices=PRECISIONS, default='fp32', help='; '.join(
            f'{name}: {meaning}' for name, meaning in PRECISIONS.items()))
    options.add_argument('--results', type=pathlib.Path, default=RESULTS, help='folder for the CSV')
    options.add_argument('--no-compile', action='store_true', help='leave out torch.compile, which takes minutes')
    options.add_argument('--memory', help=argparse.SUPPRESS)  # a child measures this case, given as JSON
    return options


def machine():
    """Describes the device."""
    return measure.machine(DEVICE)


def set_precision(precision):
    """Sets one of PRECISIONS for the process; returns the dtype of maps, for `autocast`."""
    torch.set_float32_matmul_precision('high' if precision == 'tf32' else 'highest')
    torch.backends.cudnn.allow_tf32 = precision == 'tf32'
    return {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(precision, torch.float32)


def autocast(dtype):
    return torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)


def suffix(precision):
    """Returns the suffix of a result file: its device and precision."""
    return DEVICE.type if precision == 'fp32' else f'{DEVICE.type}-{precision}'


def seconds(function):
    """Times one call."""
    return measure.seconds(function, DEVICE)


def alternate(cases, rounds, patience=20., warm=False):
    """`measure.alternate` on DEVICE."""
    return measure.alternate(cases, rounds, DEVICE, patience, warm=warm)


def figure(value, digits=0):
    """Formats a number for the CSV; blank if missing."""
    return '' if value is None or math.isnan(value) else f'{value:.{digits}f}'


def ratio(value, other, digits=2):
    """Formats value / other for the CSV; blank if either is missing."""
    return '' if value is None or other is None else figure(value / other, digits)


class Floor:
    """The least time for a number of operations and of bytes, by what this machine does in the same turns: neighbours
    make it slower and quicker within minutes.

    `cases` are to be timed with the rest: a large matrix product in dtype, torch's or ours, whichever is quicker at the
    beginning, and a large copy.
    """

    def __init__(self, dtype=torch.float32):
        size = 2048 if DEVICE.type == 'cpu' else 8192
        a, b = torch.randn(2, size, size, device=DEVICE).to(dtype)
        source = torch.randn(2 ** 26 if DEVICE.type == 'cpu' else 2 ** 28, device=DEVICE)
        target = torch.empty_like(source)
        ours, rows = ops.Linear(b), a.view(1, 1, size, size)
        products = [lambda: torch.mm(a, b)] + ([lambda: ours(rows)] if ours.runs_packed(rows) else [])
        quickest = min(products, key=lambda product: min(seconds(product) for _ in range(5)))
        self.cases = {'product': quickest, 'copy': lambda: target.copy_(source)}
        self.operations, self.bytes = 2 * size ** 3, 2 * source.numel() * source.element_size()  # read plus written

    def seconds(self, times, operations, moved=0):
        """The larger of operations over the rate of the product and bytes over that of the copy, by the seconds that
        `cases` took.
        """
        return max(operations * times['product'] / self.operations, moved * times['copy'] / self.bytes)


def measure_peak(make, calls=2):
    """`measure.measure_peak` on DEVICE."""
    return measure.measure_peak(make, DEVICE, calls)


def asked_for_memory(options, make):
    """Whether `peak_memory` runs this script; if so, prints the peak of the case, whose last item is the precision."""
    if options.memory:
        *case, precision = json.loads(options.memory)
        dtype = set_precision(precision)
        print(measure_peak(lambda: make(*case, dtype)))
    return bool(options.memory)


def peak_memory(case):
    """Runs this script again with `--memory case` and returns the bytes that it prints, or None if it fails."""
    return measure.peak_memory([sys.executable, sys.argv[0], '--memory', json.dumps(case)], case)


def write(path, rows):
    """Writes rows (dicts with equal keys) as CSV and prints the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    print(f'wrote {path}')


def show(row):
    print('  '.join(f'{key} {value}' for key, value in row.items() if value != '' and key != 'machine'), flush=True)
