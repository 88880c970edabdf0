"""Measures the attention of SAN15's five stages alone: ours, the plain definition and its torch.compile, in turns.

    python benchmarks/operators.py

At 224 x 224, batch 8 (--size, one number or height and width; --batch). Forward, and forward plus backward in all maps
and parameters, with norms in eval mode; each timed call follows one of the same layer, as in a network. A row's floor
is the larger of its operations over the rate of a large matrix product and its bytes (each map read or written once)
over that of a large copy, which take their turns with it. The last rows add up all fifteen layers of the network.
"""
import math

import harness
import torch

from san_backbones import PairwiseAttention, PatchwiseAttention, ops

STAGES = ((64, 2, 3, 3), (256, 4, 7, 2), (512, 8, 7, 3), (1024, 16, 7, 5), (2048, 32, 7, 2))  # dim, stride, k, depth


def work(layer, batch, size, training, dtype):
    """Counts the operations and bytes that the attention needs at least."""
    r, m, cw, area = layer.rel_planes, layer.out_planes, layer.out_planes // layer.share_planes, layer.kernel_size ** 2
    if layer.pairwise:
        per_pixel = area * ((r + 2) * r + r * cw + m)
    else:
        per_pixel = r * (area + 1) * cw + cw * area * cw + area * m
    pixels, maps = batch * math.prod(size), 2 * r + 2 * m
    return 2 * pixels * per_pixel * (3 if training else 1), dtype.itemsize * pixels * maps * (3 if training else 1)


def make(layer, batch, size, training, path, dtype):
    """Returns a function that runs the attention of `layer` once by `path`."""
    def map_of(channels):
        x = torch.randn(batch, channels, *size, device=harness.DEVICE).to(dtype, memory_format=torch.channels_last)
        return x.requires_grad_(training)

    query, key, value = map_of(layer.rel_planes), map_of(layer.rel_planes), map_of(layer.out_planes)
    gradient = torch.randn_like(value)
    spec = layer.spec()

    def attend(query, key, value):
        return ops.footprint_attention(query, key, value, layer.place(value), layer.gamma(), spec)
    called = torch.compile(attend, dynamic=False) if path == 'compiled' else attend
    backend = 'auto' if path == 'ours' else 'reference'

    def call():
        with ops.use_backend(backend), torch.set_grad_enabled(training), harness.autocast(dtype):
            y = called(query, key, value)
            if training:
                torch.autograd.grad(y, (query, key, value, *parameters), gradient)
    parameters = [p for name, p in layer.named_parameters() if name.startswith(('weight_mlp', 'position'))]
    return call


def main():
    options = harness.parser(__doc__.splitlines()[0])
    options.add_argument('--size', type=int, nargs='+', default=[224])
    options.add_argument('--batch', type=int, default=8)
    options = options.parse_args()
    dtype = harness.set_precision(options.precision)
    floor, machine = harness.Floor(dtype), harness.machine()
    print(machine)
    paths = ['ours', 'reference'] + ([] if options.no_compile else ['compiled'])
    rows = []
    for cls in (PairwiseAttention, PatchwiseAttention):
        for training in (False, True):
            form = cls.__name__.replace('Attention', '').lower()
            what = 'forward and backward' if training else 'forward'
            total = dict.fromkeys([*paths, 'floor'], 0.)
            for dim, stride, kernel_size, depth in STAGES:
                torch.manual_seed(0)
                layer = cls(dim, kernel_size=kernel_size, device=harness.DEVICE).eval()
                size = [length // stride for length in (options.size * 2)[:2]]
                cases = {path: make(layer, options.batch, size, training, path, dtype) for path in paths}
                medians = harness.alternate({**cases, **floor.cases}, options.rounds, warm=True)
                medians['floor'] = floor.seconds(medians, *work(layer, options.batch, size, training, dtype))
                for path in total:
                    total[path] += depth * medians[path]
                name = f'{dim} channels, {size[0]} x {size[1]}, k = {kernel_size}'
                rows.append(row(form, what, name, medians, machine))
                torch.compiler.reset()
            rows.append(row(form, what, 'SAN15, 15 layers', total, machine))
    size = 'x'.join(map(str, options.size))
    instructions = f'-{torch.backends.cpu.get_cpu_capability().lower()}' if harness.DEVICE.type == 'cpu' else ''
    harness.write(options.results / f'operators-{size}-{harness.suffix(options.precision)}{instructions}.csv', rows)


def row(form, what, layer, t, machine):
    figure, ratio = harness.figure, harness.ratio
    result = dict(form=form, what=what, layer=layer, ours_ms=figure(t['ours'] * 1e3, 2),
                  reference_ms=figure(t['reference'] * 1e3, 2),
                  compiled_ms=figure(t.get('compiled', math.nan) * 1e3, 2),
                  floor_ms=figure(t['floor'] * 1e3, 2), reference_to_ours=ratio(t['reference'], t['ours'], 1),
                  compiled_to_ours=ratio(t.get('compiled'), t['ours'], 1), times_floor=ratio(t['ours'], t['floor'], 1),
                  machine=machine)
    harness.show(result)
    return result


if __name__ == '__main__':
    main()
