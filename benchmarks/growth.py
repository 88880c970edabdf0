"""How cost grows with the image: time and peak memory of SAN15 and ResNet-50 from 224 to 1344 pixels a side.

    python benchmarks/growth.py

One image; inference and a training step with frozen norms, feature maps of a detection backbone.
"""
import json

import harness
from models import make

SIDES = (224, 320, 448, 640, 896, 1120, 1344)
CASES = ('resnet50', 'san15_pairwise', 'san15_patchwise')


def main():
    options = harness.parser(__doc__.splitlines()[0]).parse_args()
    if options.memory:
        case, setting = json.loads(options.memory)
        print(harness.measure_peak(lambda: make(case, setting)))
        return
    rows, machine = [], harness.machine()
    for training in (False, True):
        for side in SIDES:
            setting = (1, side, side, training)
            medians = harness.alternate({case: make(case, setting) for case in CASES}, options.rounds)
            for case in CASES:
                peak = harness.peak_memory((case, setting))
                megapixels = side ** 2 / 1e6
                rows.append(dict(
                    what='training step' if training else 'inference', model=case, side=side,
                    milliseconds=harness.figure(medians[case] * 1e3, 1),
                    peak_megabytes=harness.figure(peak and peak / 1e6),
                    milliseconds_per_megapixel=harness.figure(medians[case] * 1e3 / megapixels),
                    megabytes_per_megapixel=harness.figure(peak and peak / 1e6 / megapixels), machine=machine))
                harness.show(rows[-1])
    harness.write(options.results / f'growth-{harness.DEVICE.type}.csv', rows)


if __name__ == '__main__':
    main()
