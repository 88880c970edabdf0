"""Compiles the Triton kernels for GPUs that need not be present, and reports ptxas's resource usage.

    python benchmarks/triton_offline.py                       every layer of SAN15; fp32, bf16; sm_80, sm_90
    python benchmarks/triton_offline.py --widths 256 --arch 90 --dtypes bf16 --kernels attend_pairwise

One line for each kernel and configuration of its tuning: registers per thread, bytes of stack (spilled registers),
bytes of shared memory, seconds to compile. None of these says how fast a kernel is.
"""
import argparse
import itertools
import pathlib
import re
import subprocess
import tempfile
import time
import warnings
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from san_backbones.ops import fused, relations
from san_backbones.ops.folding import Shape
from san_backbones.ops.triton import kernels, launch

PAIRWISE = ('attend_pairwise', 'pairwise_sums', 'attend_pairwise_backward')
PATCHWISE = ('attend_patchwise', 'patchwise_sums', 'patchwise_hidden_backward', 'attend_patchwise_backward')
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
MAPS = {'query', 'key', 'value', 'gradient', 'output'}


def constants(name: str, width: int, dtype: str = 'fp32', relation: str = 'subtraction', kernel_size: int = 7,
              precision: str = 'ieee') -> dict[str, Any]:
    """Returns the constants of kernel `name` for an attention in `width` channels."""
    pairwise = name in PAIRWISE
    r, m = max(1, width // 16), width // 4
    hidden, channels = (r, m // 8) if pairwise else (m // 8, m // 8)
    maps = [torch.empty(1, 1, 1, c, dtype=DTYPES[dtype]) for c in (r, r, m)]
    place = torch.empty(1, 1, 1, 2) if pairwise else None
    shape = Shape(
        relation=relations.number(pairwise, relation if pairwise else 'concatenation'), absolute=0,
        kernel_size=kernel_size, dilation=1, hidden=hidden, channels=channels, lanes=channels,
        backend=[backend.name for backend in fused.FUSED].index('triton'))
    return {**launch.constants(shape, [*maps, place]), 'PRECISION': precision}


def report(name: str, c: dict[str, Any], configuration: launch.Configuration, dtype: str = 'fp32', arch: int = 80,
           of_sums: bool = False) -> dict[str, int | float]:
    """Compiles kernel `name`. `of_sums` selects the variant of a backward kernel that differentiates batch statistics,
    and the variant of `attend_pairwise` that prepares the backward pass.
    """
    c = {**c, 'M': configuration.pixels}
    kernel = getattr(kernels, name)
    absent = {'shift'}
    if name.endswith('backward'):
        absent |= {'value', 'weight2', 'bias2', 'shift2', 'gradient', 'lse', 'slope', 'hidden', 'd_value'} if of_sums \
            else {'slopes'}
    elif name == 'attend_pairwise':
        absent |= {'output'} if of_sums else {'gradient', 'lse', 'slope'}
    signature, constexprs, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in c or argument in absent:
            signature[argument], constexprs[argument] = 'constexpr', c.get(argument)
        elif argument in kernels.IMAGE_SIZES:
            signature[argument] = 'i32'
        else:
            signature[argument] = '*' + (dtype if argument in MAPS else 'fp64' if argument == 'sums' else 'fp32')
            attributes[index,] = [['tt.divisibility', 16]]
    start = time.perf_counter()
    compiled = triton.compile(ASTSource(kernel, signature, constexprs, attributes), target=GPUTarget('cuda', arch, 32),
                              options=dict(num_warps=configuration.num_warps, num_stages=configuration.num_stages))
    seconds = time.perf_counter() - start
    tool = pathlib.Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        usage = subprocess.run([tool, '-res-usage', file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r'REG:(\d+) STACK:(\d+)', usage).groups())
    return dict(registers=registers, stack=stack, shared=compiled.metadata.shared, seconds=round(seconds, 1))


def main() -> None:
    import harness  # only here: tests import this file for `report`
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--widths', type=int, nargs='+', default=[64, 256, 512, 1024, 2048])
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES, default=['fp32', 'bf16'])
    parser.add_argument('--arch', type=int, nargs='+', default=[80, 90])
    parser.add_argument('--kernels', nargs='+', choices=PAIRWISE + PATCHWISE, default=PAIRWISE + PATCHWISE)
    parser.add_argument('--precision', choices=['ieee', 'tf32'], default='ieee', help='of float32 products')
    parser.add_argument('--configuration', type=int, nargs=3, metavar=('PIXELS', 'WARPS', 'STAGES'),
                        help='instead of those of the tuning')
    parser.add_argument('--results', type=pathlib.Path, default=harness.RESULTS, help='folder for the CSV')
    args = parser.parse_args()
    warnings.filterwarnings('ignore', message='TRITON_DEFAULT_FP_FUSION')
    chosen = args.configuration and [launch.Configuration(*args.configuration)]
    rows = []
    for name, width, dtype, arch in itertools.product(args.kernels, args.widths, args.dtypes, args.arch):
        kernel_size = 3 if width == 64 else 7
        c = constants(name, width, dtype, kernel_size=kernel_size, precision=args.precision)
        for configuration in chosen or launch.configurations(name, c):
            rows.append(dict(kernel=name, width=width, kernel_size=kernel_size, dtype=dtype, arch=arch,
                             **configuration._asdict(), **report(name, c, configuration, dtype, arch),
                             triton=triton.__version__))
            harness.show(rows[-1])
    harness.write(args.results / 'triton-offline.csv', rows)


if __name__ == '__main__':
    main()
