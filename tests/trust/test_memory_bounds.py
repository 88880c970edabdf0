"""Memory of the operators on one long thin map: the maps and a little more, whatever the footprint.

Every call runs under a limit to the address space of the process (RLIMIT_AS), all in a process of their own. There
glibc gives every larger block back when it is freed: with its defaults it learns to keep blocks of up to 32 MiB, and
a call could live on what the one before it left.
"""
import itertools
import os
import subprocess
import sys

import pytest
import torch

from san_backbones import PairwiseAttention, PatchwiseAttention, ops

PIXELS, SIDE = 60_000, 64
MAPS = 4 * PIXELS * (SIDE + SIDE // 16 * 2 + SIDE // 4)  # bytes of input, query, key, value
PADDED = 4 * 7 * (PIXELS + 6) * (SIDE // 16 + SIDE // 4 + 2)  # key, value and place, one pixel and its reflections high
SLACK = 48 << 20  # tiles (TILE_ELEMENTS numbers, several at a time), partial sums, the allocator
# in training: input, maps and output, copies with channels last, gradients of all of them
BOUNDS = {False: 2 * MAPS + 2 * PADDED + SLACK, True: 6 * MAPS + 2 * PADDED + SLACK}


def call(cls, path, training, size):
    layer = cls(SIDE, kernel_size=7).train(training).requires_grad_(training)
    with ops.use_backend(path):
        y = layer(torch.randn(1, SIDE, *size))
        if training:
            y.sum().backward()


def fits(cls, path, training, size):
    """Whether a call succeeds with the allowed memory."""
    import resource
    call(cls, path, training, (4, 5))  # threads of autograd, buffers of libraries
    with open('/proc/self/statm') as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BOUNDS[training], resource.RLIM_INFINITY))
    try:
        call(cls, path, training, size)
        return True
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main():
    torch.set_num_threads(1)
    for cls in (PairwiseAttention, PatchwiseAttention):
        # the limit is one: the definition, which has tensors of the size of all footprints, does not get by
        assert not fits(cls, 'reference', False, (1, PIXELS))
        for path in ops.available_backends():
            if path != 'reference':
                for training, size in itertools.product((False, True), ((1, PIXELS), (PIXELS, 1))):
                    assert fits(cls, path, training, size), (cls, path, training, size)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc, sets RLIMIT_AS')
def test_a_long_thin_map():
    result = subprocess.run([sys.executable, __file__], text=True, capture_output=True, env={
        **os.environ, 'OMP_NUM_THREADS': '1', 'MALLOC_ARENA_MAX': '1', 'MALLOC_MMAP_THRESHOLD_': str(128 << 10)})
    assert result.returncode == 0, result.stderr[-2000:]


if __name__ == '__main__':
    main()
