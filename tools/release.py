"""Does the steps of a release, except the upload.

    python -m tools.release prepare VERSION    # writes the version and the changelog's heading; review and commit it
    python -m tools.release build VERSION      # dist/: sdist, wheels of all platforms, SBOM, checksums
    python -m tools.release check VERSION      # checks that dist/ is complete and of that version; copies it to upload/
    python -m tools.release try VERSION        # uploads it to a package index on 127.0.0.1, and installs it from there

`make release VERSION=0.2.0` does the last three. For a tag vVERSION the workflow does the same, and publishes.
"""
import argparse
import datetime
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv

from tools import wheels

ROOT = wheels.ROOT
DIST, UPLOAD = ROOT / 'dist', ROOT / 'upload'
TOOLS = ('twine>=6', 'cyclonedx-bom>=6', 'pypiserver>=2.3', 'setuptools<82')
VERSION = r'(\d+)\.(\d+)\.(\d+)(rc\d+)?'
HOMES = {  # where the version is written, and how
    'san_backbones/_version.py': r"(?<=__version__ = ')[^']+(?=')",
    'CITATION.cff': r'(?<=^version: )\S+',
}


def current() -> dict[str, str]:
    return {name: re.search(pattern, (ROOT / name).read_text(), re.M)[0] for name, pattern in HOMES.items()}


def order(version: str) -> tuple:
    match = re.fullmatch(VERSION, version)
    return (*map(int, match.group(1, 2, 3)), match[4] is None, match[4] or '')


def prepare(version: str) -> None:
    changelog = ROOT / 'CHANGELOG.md'
    text = changelog.read_text()
    released = re.findall(rf'^## ({VERSION}) - ', text, re.M)
    if any(order(name) >= order(version) for name, *_ in released):
        sys.exit(f'{version} is not newer than {released[0][0]}, the last that CHANGELOG.md names')
    if not re.search(r'^## Unreleased\n\n(?!## )\S', text, re.M):
        sys.exit('CHANGELOG.md has nothing under "## Unreleased": describe what a user sees')
    today = datetime.date.today().isoformat()
    changelog.write_text(text.replace('## Unreleased\n', f'## Unreleased\n\n## {version} - {today}\n', 1))
    for name, pattern in HOMES.items():
        path = ROOT / name
        path.write_text(re.sub(pattern, version, path.read_text(), count=1, flags=re.M))
    print(f'Wrote {version} into CHANGELOG.md, {", ".join(HOMES)}. Look at `git diff`, commit, then: '
          f'make release VERSION={version}')


def tool(name: str) -> pathlib.Path:
    return wheels.programs('release', TOOLS) / name


def agree(version: str) -> None:
    """Exits unless all files name this version."""
    for name, found in current().items():
        if found != version:
            sys.exit(f'{name} says {found}, not {version}: python -m tools.release prepare {version}')
    if not re.search(rf'^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$', (ROOT / 'CHANGELOG.md').read_text(), re.M):
        sys.exit(f'CHANGELOG.md has no heading "## {version} - DATE": python -m tools.release prepare {version}')


def build(version: str) -> None:
    agree(version)
    subprocess.run([sys.executable, ROOT / 'tools' / 'wheels.py', '--out', DIST], check=True)
    # the SBOM lists the versions that were tested together
    subprocess.run([tool('cyclonedx-py'), 'requirements', ROOT / 'requirements' / 'dev.lock', '--output-reproducible',
                    '--output-format', 'JSON', '-o', DIST / f'san_backbones-{version}.cdx.json'], check=True)
    (DIST / wheels.SUMS).write_text(wheels.sums(DIST))


def check(version: str) -> None:
    agree(version)
    if not (DIST / wheels.SUMS).is_file():
        sys.exit(f'there is no dist/{wheels.SUMS}: python -m tools.release build {version}')
    if (DIST / wheels.SUMS).read_text() != wheels.sums(DIST):
        sys.exit(f'dist/ is not what dist/{wheels.SUMS} says: python -m tools.release build {version}')
    expected = {f'san_backbones-{version}.tar.gz',
                *(f'san_backbones-{version}-py3-none-{tag}.whl' for tag in wheels.platforms_of_setup())}
    archives = {path.name: path for path in DIST.iterdir() if path.name.endswith(('.whl', '.tar.gz'))}
    if {*archives} != expected:
        sys.exit(f'dist/ lacks {sorted(expected - {*archives})}, and should not have {sorted({*archives} - expected)}')
    subprocess.run([tool('twine'), 'check', '--strict', *archives.values()], check=True)
    parts = json.loads((DIST / f'san_backbones-{version}.cdx.json').read_text())['components']
    if not {'torch', 'timm'} <= {part['name'] for part in parts}:
        sys.exit('the SBOM names neither torch nor timm')
    shutil.rmtree(UPLOAD, ignore_errors=True)
    UPLOAD.mkdir()
    for path in archives.values():
        shutil.copy(path, UPLOAD)
    print(f'upload/ holds {len(archives)} archives of {version}')


def try_it(version: str) -> None:
    """Uploads to an index on this machine, then installs from it and runs the README's first example."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    index = f'http://127.0.0.1:{port}'
    with tempfile.TemporaryDirectory() as folder:
        packages, user = pathlib.Path(folder, 'packages'), pathlib.Path(folder, 'user')
        packages.mkdir()
        server = subprocess.Popen([tool('pypi-server'), 'run', '-i', '127.0.0.1', '-p', str(port), '-P', '.', '-a', '.',
                                   '--disable-fallback', packages])
        try:
            for _ in range(100):
                try:
                    urllib.request.urlopen(f'{index}/simple/', timeout=1).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(.1)
            subprocess.run([tool('twine'), 'upload', '--non-interactive', '--disable-progress-bar', '--repository-url',
                            index, '-u', 'anybody', '-p', 'anything', *sorted(UPLOAD.iterdir())], check=True,
                           env={**os.environ, 'NO_PROXY': '127.0.0.1'})
            venv.create(user, with_pip=True)
            subprocess.run([user / 'bin' / 'python', '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check',
                            '--extra-index-url', f'{index}/simple/', '--only-binary', 'san-backbones',
                            f'san-backbones=={version}'], check=True)
            readme = (ROOT / 'README.md').read_text()
            snippet = re.search(r'```python\n(.*?)```', readme, re.S)
            subprocess.run([user / 'bin' / 'python', '-c', snippet[1]], check=True, cwd=folder)
            print(f"san-backbones {version} came from {index}, and README's first snippet runs")
        finally:
            server.terminate()
            server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = {'prepare': prepare, 'build': build, 'check': check, 'try': try_it}
    parser.add_argument('step', choices=steps)
    parser.add_argument('version')
    options = parser.parse_args()
    if not re.fullmatch(VERSION, options.version):
        parser.error(f'version: expected X.Y.Z or X.Y.ZrcN, got {options.version!r}')
    steps[options.step](options.version)


if __name__ == '__main__':
    main()
