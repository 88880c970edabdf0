"""Measures how cost grows with the image: time and peak memory of SAN15 and ResNet-50 from 224 to 1344 pixels a side.

    python benchmarks/growth.py
    python benchmarks/growth.py --size 1000 8000 --rounds 1    # inference on one size, for instance a panorama

One image; inference and a training step with frozen norms, feature maps of a detection backbone.
"""

import harness
from models import make

SIDES = (224, 320, 448, 640, 896, 1120, 1344)
CASES = ('resnet50', 'san15_pairwise', 'san15_patchwise')


def main():
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument('--size', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'), help='inference on this size only')
    options = parser.parse_args()
    if harness.asked_for_memory(options, make):
        return
    rows, machine, dtype = [], harness.machine(), harness.set_precision(options.precision)
    for training in (False,) if options.size else (False, True):
        for height, width in [options.size] if options.size else [(side, side) for side in SIDES]:
            setting = (1, height, width, training)
            medians = harness.alternate({case: make(case, setting, dtype) for case in CASES}, options.rounds)
            for case in CASES:
                peak = harness.peak_memory((case, setting, options.precision))
                megapixels = height * width / 1e6
                rows.append(dict(
                    what='training step' if training else 'inference', model=case,
                    side=f'{height}x{width}' if options.size else width,
                    milliseconds=harness.figure(medians[case] * 1e3, 1),
                    peak_megabytes=harness.figure(peak and peak / 1e6),
                    milliseconds_per_megapixel=harness.figure(medians[case] * 1e3 / megapixels),
                    megabytes_per_megapixel=harness.figure(peak and peak / 1e6 / megapixels), machine=machine))
                harness.show(rows[-1])
    name = 'growth' if not options.size else 'size-{}x{}'.format(*options.size)
    harness.write(options.results / f'{name}-{harness.suffix(options.precision)}.csv', rows)


if __name__ == '__main__':
    main()
