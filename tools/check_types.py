"""Measures how much of the public interface has a known type, with `pyright --verifytypes`; fails below `LEAST`.

    python -m tools.check_types

Lists what lacks a type. Types of other packages do not count.
"""
import json
import os
import pathlib
import subprocess
import sys
import sysconfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
LEAST = 0.95


def main() -> int:
    # pyright follows no editable installation, and looks for other packages on this path only
    path = os.pathsep.join([str(ROOT), sysconfig.get_path('purelib'), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run([sys.executable, '-m', 'pyright', '--verifytypes', 'san_backbones', '--ignoreexternal',
                           '--outputjson'], env=dict(os.environ, PYTHONPATH=path), cwd=ROOT, capture_output=True,
                          text=True)
    try:
        found = json.loads(done.stdout)['typeCompleteness']
    except (ValueError, KeyError):
        sys.exit(f'pyright gave no report: {(done.stdout + done.stderr).strip()[-500:]}')
    unknown = [symbol for symbol in found['symbols'] if symbol['isExported'] and not symbol['isTypeKnown']]
    for symbol in unknown:
        print(symbol['name'], *[entry['message'].splitlines()[0] for entry in symbol['diagnostics']], sep='\n    ')
    score = found['completenessScore']
    print(f'{score:.1%} of {sum(found["exportedSymbolCounts"].values())} public symbols have a known type; '
          f'{LEAST:.0%} are expected')
    return int(score < LEAST)


if __name__ == '__main__':
    sys.exit(main())
