"""Tries SAN in other libraries, each in an environment of its own, and writes what came of it into the docs.

    python -m tools.run_hosts [--only HOST ...] [--keep]

The environment is in .cache and also sees the packages of the current one; pip installs what is missing, from the
registry. It is removed afterwards unless --keep is given. The tests are those of tests/ecosystem, and the blocks of
docs/how-to/other-libraries.md, whose table gets the results; with --only, those rows of it.
"""
import argparse
import datetime
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

from tests import environment
from tools.run_apart import ROOT, count_tests, make

PAGE = ROOT / 'docs' / 'how-to' / 'other-libraries.md'
HEADING = ('library', 'versions', 'tests', 'date')
TIME_LIMIT = 30  # minutes for the tests of a host


class Host(NamedTuple):
    """A library: its distribution, what pip installs for it, and its tests in tests/ecosystem (by its name)."""
    distribution: str
    requirement: str = ''  # nothing: the extra `test` brings it
    tests: tuple[str, ...] = ()

    def files(self) -> list[str]:
        names = self.tests or (self.distribution.replace('-', '_'),)
        return [*(f'tests/ecosystem/test_{name}.py' for name in names),
                'tests/test_docs.py::test_page[how-to/other-libraries.md]']


HOSTS = (
    Host('segmentation_models_pytorch', tests=('segmentation_models',)),
    Host('transformers', tests=('transformers', 'transformers_hosts')),
    Host('torchvision'),
    Host('accelerate'),
    Host('anomalib', 'anomalib>=2.7'),
    Host('autotimm', 'autotimm>=0.7'),
    Host('effdet', 'effdet>=0.4'),
    Host('fastai', 'fastai>=2.8'),
    Host('grad-cam', 'grad-cam>=1.5', ('grad_cam',)),
    Host('lightly-train', 'lightly-train>=0.18'),
    # bounds above: without them pip tries one version after the other, for longer than anybody waits
    Host('terratorch', 'terratorch>=1.2.11,<1.2.12'),
    Host('torchgeo', 'torchgeo>=0.8,<0.9'),
    Host('ultralytics', 'ultralytics>=8.4'),
)


def versions(python: pathlib.Path, host: Host) -> str:
    code = ('import sys; from importlib.metadata import version; '
            'print(*[f"{name} {version(name)}" for name in dict.fromkeys(sys.argv[1:])], sep=", ")')
    return subprocess.run([python, '-c', code, host.distribution, 'torch', 'timm'], capture_output=True, text=True,
                          check=True).stdout.strip()


def try_host(host: Host, keep: bool) -> tuple[str, str]:
    """Returns the versions that were installed, and what the tests said."""
    name = f'host-{host.distribution}'
    try:
        try:
            python = make(name, [['--quiet', '--no-compile', host.requirement]] if host.requirement else [])
        except subprocess.CalledProcessError:
            return '-', 'cannot be installed'
        said = count_tests([python, '-m', 'pytest'], host.files(), TIME_LIMIT, env=environment())
        return versions(python, host), said
    finally:
        if not keep:
            shutil.rmtree(ROOT / '.cache' / f'venv-{name}', ignore_errors=True)


def write(rows: dict[str, str]) -> None:
    """Replaces rows of the page's table, in the order of `HOSTS`."""
    before = PAGE.read_text()
    table = re.search(rf'^\| {" [|] ".join(HEADING)} \|\n\|[ |:-]*\n((?:\|.*\n)*)', before, re.M)
    known = {line.split('|')[1].strip(): line for line in table[1].splitlines()} | rows
    lines = ''.join(f'{known[host.distribution]}\n' for host in HOSTS if host.distribution in known)
    PAGE.write_text(before[:table.start(1)] + lines + before[table.end(1):])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [host.distribution for host in HOSTS]
    parser.add_argument('--only', metavar='HOST', nargs='+', choices=names, default=names)
    parser.add_argument('--keep', action='store_true', help='keep the environments, and reuse those that exist')
    options = parser.parse_args()
    bad = 0
    for host in HOSTS:
        if host.distribution in options.only:
            found, result = try_host(host, options.keep)
            today = datetime.date.today().isoformat()
            write({host.distribution: f'| {host.distribution} | {found} | {result} | {today} |'})
            print(f'{host.distribution}: {found}: {result}', flush=True)
            bad += ' 0 failed' not in result
    return bool(bad)


if __name__ == '__main__':
    sys.exit(main())
