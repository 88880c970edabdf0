"""Builds the sdist and from it the wheel, installs each in a clean environment, and runs smoke.py there.

    python -m tools.run_package [ARCHIVE ...]

Given wheels or sdists are tested instead. The environment gets torch and timm from the registry, like a user's. It is
in .cache.
"""
import pathlib
import shutil
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = ROOT / '.cache'


def build() -> list[pathlib.Path]:
    built = CACHE / 'package'
    shutil.rmtree(built, ignore_errors=True)
    build = subprocess.run([sys.executable, '-m', 'build', '--outdir', built, ROOT], text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    if build.returncode:
        sys.exit(build.stdout)
    wheel, = built.glob('*.whl')
    sdist, = built.glob('*.tar.gz')
    for archive in (wheel, sdist):
        if archive.stat().st_size > 40e6:
            sys.exit(f'{archive.name} has {archive.stat().st_size / 1e6:.1f} MB, expected 40 at most')
    return [wheel, sdist]


def main() -> None:
    folder, elsewhere = CACHE / 'venv-package', CACHE / 'nowhere'
    archives = [pathlib.Path(name).resolve() for name in sys.argv[1:]] or build()
    venv.create(folder, clear=True, with_pip=True)
    elsewhere.mkdir(exist_ok=True)  # working folder, from which the sources cannot be imported
    python = folder / ('Scripts/python.exe' if sys.platform == 'win32' else 'bin/python')
    try:
        for archive in archives:
            how = [] if archive is archives[0] else ['--force-reinstall', '--no-deps']
            subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', *how, archive],
                           check=True)
            subprocess.run([python, '-m', 'pip', 'check'], check=True, stdout=subprocess.DEVNULL)
            print(archive.name, end=' ', flush=True)
            subprocess.run([python, ROOT / 'tools' / 'smoke.py'], check=True, cwd=elsewhere)
    finally:
        shutil.rmtree(folder)  # several GB


if __name__ == '__main__':
    main()
