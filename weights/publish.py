"""Publishes the authors' weights on the Hugging Face Hub, one repository per model.

    python weights/publish.py --org ORGANISATION --all --dry-run
    python weights/publish.py --org ORGANISATION san15_patchwise san19_patchwise

For each model: downloads the authors' file from Google Drive (or takes it from --source), checks it, converts it,
creates the repository, uploads what differs, downloads the weights again to check their digest, and writes the digests
into the manifest. Whatever was done is not done again: after an interruption or an error, run the same command.
"""
import argparse
import contextlib
import hashlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import common
import convert
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from san_backbones import hub
from san_backbones.hub import WeightsError

FILES = ['README.md', 'config.json', hub.FILENAME]
Fetch = Callable[[str, pathlib.Path], None]


# --- The authors' file -----------------------------------------------------------------------------------------------

def from_drive(drive_id: str, path: pathlib.Path) -> None:
    """Downloads a file from Google Drive.

    Raises:
        WeightsError: gdown is not installed, or did not get the file.
    """
    try:
        import gdown
    except ImportError as error:
        raise WeightsError("gdown, which downloads from Google Drive, is not installed: pip install '.[weights]'; or "
                           f'download the file with the id {drive_id} by other means and name its folder with '
                           '--source') from error
    url = f'https://drive.google.com/uc?id={drive_id}'
    try:
        got = gdown.download(url, str(path), resume=True)
        reason = 'it says why above'
    except Exception as error:
        got, reason = None, str(error).strip() or type(error).__name__
    if got is None or not path.is_file():
        raise WeightsError(f'Google Drive did not give {url} ({reason}). It limits how often a file is downloaded: try '
                           'later, or download it with a browser and name its folder with --source')


def provided(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The file of a model, such as san15_patchwise.in1k, in the folder of --source.

    Raises:
        WeightsError: It is not there.
    """
    architecture = common.architecture_of(name)
    paths = [path for model in (architecture, name) for path in (folder / model / 'model_best.pth',
                                                                folder / f'{model}.pth')]
    for path in paths:
        if path.is_file():
            return path
    raise WeightsError(f'{folder} has no file for {name}; expected {" or ".join(str(path) for path in paths[:2])}')


def fetched(name: str, entry: dict[str, Any], work: pathlib.Path, fetch: Fetch) -> pathlib.Path:
    """The authors' file, downloaded if no earlier run did."""
    path = work / name / entry['source_file']
    if not path.is_file():
        print(f'{name}: downloading {entry["source_file"]} from Google Drive')
        partial = work / name / 'partial' / entry['source_file']  # alone in a folder, where gdown looks for what it has
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        fetch(entry['drive_id'], partial)
        os.replace(partial, path)
    return path


def converted(name: str, entry: dict[str, Any], options: argparse.Namespace, fetch: Fetch) -> convert.Converted:
    """The model's files, made from the authors'.

    Raises:
        WeightsError: They cannot be had or are not what they should be. What was downloaded is then deleted if it is at
            fault, so that the next run downloads anew.
    """
    source = provided(options.source, name) if options.source else fetched(name, entry, options.work, fetch)
    found = hub.digest(source)
    if entry['source_sha256'] not in (None, found):
        if not options.source:
            source.unlink()
        raise WeightsError(f"{source} has the SHA-256 {found}, and the manifest pins {entry['source_sha256']} for the "
                           f"authors' file of {name} (Google Drive id {entry['drive_id']}). "
                           + ('Download it again' if options.source else 'It was deleted: run again to download it'))
    try:
        done = convert.convert(source, name, options.work / name / 'repository', manifest=options.manifest, force=True,
                               repository=f'{options.org}/{name}')
    except convert.Unreadable as error:
        if options.source:
            raise
        source.unlink()
        raise WeightsError(f'{error} It was deleted: run again to download it anew') from error
    if not done.authors:
        raise WeightsError(f"{source} is not in the authors' format, so it is not theirs; expected model_best.pth as "
                           f"Google Drive has it under the id {entry['drive_id']}")
    return done


# --- The Hub ---------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def asking(api: HfApi, what: str) -> Iterator[None]:
    """Turns whatever goes wrong with the Hub into an error that says what was tried and what to do."""
    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, 'response', None), 'status_code', None)
        remedy = {401: 'log in (hf auth login) or set HF_TOKEN to a token that may write to the organisation',
                  403: 'the token must be allowed to write to the organisation',
                  429: 'these are too many requests: wait'}.get(status, 'see whether the Hub can be reached')
        raise WeightsError(f'cannot {what} at {api.endpoint} ({type(error).__name__}: {error}); {remedy}, then run '
                           'again and it goes on from here') from error


def git_blob(content: bytes) -> str:
    """What git calls a file with this content."""
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def differing(api: HfApi, repository: str, folder: pathlib.Path) -> list[str] | None:
    """Which of a model's files the Hub does not have as they are in the folder; None if there is no repository."""
    with asking(api, f'look at {repository}'):
        try:
            siblings = api.model_info(repository, files_metadata=True).siblings or []
        except RepositoryNotFoundError:
            return None
    present = {sibling.rfilename: sibling.lfs.sha256 if sibling.lfs else sibling.blob_id for sibling in siblings}
    return [name for name in FILES
            if present.get(name) not in (hub.digest(folder / name), git_blob((folder / name).read_bytes()))]


def check_published(api: HfApi, repository: str, sha256: str) -> None:
    """Downloads the weights as a user would and checks their digest.

    Raises:
        WeightsError: It is another.
    """
    with tempfile.TemporaryDirectory() as cache, asking(api, f'download {hub.FILENAME} of {repository}'):
        found = hub.digest(api.hf_hub_download(repository, hub.FILENAME, cache_dir=cache))
    if found != sha256:
        raise WeightsError(f'{repository} at {api.endpoint} now holds a {hub.FILENAME} with the SHA-256 {found}; '
                           f'expected {sha256}, which was uploaded. Run again; if it stays so, delete the file on the '
                           'Hub first')


def publish(name: str, options: argparse.Namespace, fetch: Fetch, api: HfApi) -> None:
    """Takes one model from Google Drive to the Hub, leaving out what is done already."""
    entry = common.read_manifest(options.manifest)[name]
    repository = f'{options.org}/{name}'
    done = converted(name, entry, options, fetch)
    differs = differing(api, repository, done.folder)
    digests = {'source_sha256': done.source_sha256, 'sha256': done.sha256}
    recorded = all(entry[key] == value for key, value in digests.items())
    if options.dry_run:
        steps = [f'create {repository}'] * (differs is None)
        steps += [f'upload {", ".join(FILES if differs is None else differs)}'] * (differs != [])
        steps += [f'write the digests into {options.manifest}'] * (not recorded)
        print(f'{name}: would {", ".join(steps) or "do nothing: all is there"} ({done.folder}, SHA-256 {done.sha256})')
        return
    if differs is None:
        with asking(api, f'create {repository}'):
            api.create_repo(repository, private=True if options.private else None, exist_ok=True)
        print(f'{name}: created {api.endpoint}/{repository}')
    if differs != []:
        with asking(api, f'upload to {repository}'):
            api.upload_folder(repo_id=repository, folder_path=str(done.folder), allow_patterns=differs or FILES,
                              commit_message=f'{name}: weights, configuration, model card')
        print(f'{name}: uploaded {", ".join(differs or FILES)}')
    if differs != [] or not recorded:
        check_published(api, repository, done.sha256)
    if not recorded:
        common.record(options.manifest, name, **digests)
    print(f'{name}: {api.endpoint}/{repository} has the SHA-256 {done.sha256}, and so has {options.manifest}')


# --- Command line ----------------------------------------------------------------------------------------------------

def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(description=lines[0], epilog='\n'.join(lines[2:]),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', metavar='MODEL', help='such as san15_patchwise')
    parser.add_argument('--all', action='store_true', help='all models of the manifest')
    parser.add_argument('--org', required=True, metavar='NAME', help='organisation or user on the Hub')
    parser.add_argument('--dry-run', action='store_true',
                        help='download, convert and look at the Hub, but change neither it nor the manifest')
    parser.add_argument('--private', action='store_true', help='create private repositories')
    parser.add_argument('--source', type=pathlib.Path, metavar='FOLDER',
                        help='do not download: take FOLDER/MODEL/model_best.pth or FOLDER/MODEL.pth')
    parser.add_argument('--work', type=pathlib.Path, default=pathlib.Path('work_dirs/weights'), metavar='FOLDER',
                        help='where downloads and converted files are kept (default: %(default)s)')
    parser.add_argument('--manifest', type=pathlib.Path, default=common.MANIFEST, metavar='FILE')
    options = parser.parse_args(argv)
    if bool(options.models) == options.all:
        parser.error('expected names of models or --all')
    return options


@common.command
def main(argv: Sequence[str] | None = None, fetch: Fetch = from_drive, api: HfApi | None = None) -> int:
    """Publishes what the command line names; returns the exit status.

    A model that fails does not keep the others from being published.

    Args:
        argv: The command line.
        fetch: Called with a Google Drive id and a path; writes the file there, or raises WeightsError.
        api: The Hub; by default the one of the environment.
    """
    options = parse(argv)
    known = {name: entry for name, entry in common.read_manifest(options.manifest).items() if 'drive_id' in entry}
    names = [f'{common.architecture_of(model)}.{common.TAG}' for model in options.models] or list(known)
    unknown = [given for given, name in zip(options.models, names) if name not in known]
    if unknown:
        raise WeightsError(f'{options.manifest} has no {", ".join(unknown)}; expected some of {", ".join(known)}')
    api = api or HfApi()
    failed = []
    for name in names:
        try:
            publish(name, options, fetch, api)
        except WeightsError as error:
            print(f'error: {name}: {error}', file=sys.stderr)
            failed.append(name)
    if failed:
        print(f'not done: {", ".join(failed)}; run the same command again', file=sys.stderr)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
