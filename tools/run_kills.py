"""Kills trainings, downloads, conversions, publications and extractions at random times and at changes to files.

    python -m tools.run_kills KIND|all [--kills 20] [--exact 20] [--seed 0]

KIND is training, download, first-use, conversion, publishing or features.

Each job is then run again and must end as if nothing had happened; an incomplete result must not be accepted in
between. Prints a line of figures for each job. Trainings need the mm extra.
"""
import argparse
import pathlib
import sys
import tempfile

import torch

from tools.kills import Conversion, Download, Extraction, FirstUse, Publishing, Training, interrupt


def jobs(kind: str, base: pathlib.Path) -> list:
    """Returns the jobs of a kind."""
    if kind == 'training':
        import mmengine.config.config as mmengine_config
        # MMEngine formats the whole config for each log and checkpoint, which takes longer than the training here
        mmengine_config.FormatCode = lambda text, **kwargs: (text, True)
        return [Training(base / 'pictures', loop, keep) for loop, keep in (('iters', 2), ('epochs', -1))]
    if kind == 'download':
        return [Download()]
    if kind == 'first-use':
        return [FirstUse(base / 'authors')]
    if kind == 'conversion':
        return [Conversion(base / 'one'), Conversion(base / 'two', over=True)]
    if kind == 'features':
        return [Extraction(base / 'features', pool, workers) for pool in ('avg', 'none') for workers in (0, 1)]
    return [Publishing(base / 'drive')]


def main() -> int:
    kinds = ['training', 'download', 'first-use', 'conversion', 'publishing', 'features']
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=[*kinds, 'all'])
    parser.add_argument('--kills', type=int, default=20, help='after a random time, of each job')
    parser.add_argument('--exact', type=int, default=20, help='just before and after changes to files, of each job')
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder).resolve()
        for kind in kinds if options.what == 'all' else [options.what]:
            for job in jobs(kind, base):
                try:
                    figures = interrupt(job, base / 'trials', options.kills, options.exact, options.seed)
                    print(', '.join(f'{key} {value}' for key, value in figures.items()), flush=True)
                except AssertionError as error:
                    print(f'FAILED: {error}', flush=True)
                    failed = True
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
