"""Publishes the authors' weights on the Hugging Face Hub, one repository per model.

    san-backbones weights publish --org ORGANISATION --all --dry-run
    san-backbones weights publish --org ORGANISATION --all --images PICTURES
    san-backbones weights publish --org ORGANISATION san15_patchwise san19_patchwise

For each model: downloads the authors' file from Google Drive or a mirror (or takes it from --source), checks it,
converts it, verifies it on a folder of pictures if one is given, creates the repository, uploads changed files,
downloads the weights again to check their digest, and writes the digests into the manifest. Completed steps are not
repeated: after an interruption or an error, run the same command.
"""
import argparse
import contextlib
import hashlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from .. import hub
from ..hub import Unavailable, WeightsError
from . import authors, common, convert, verify

FILES = ['README.md', 'config.json', hub.FILENAME]


# --- The authors' file -----------------------------------------------------------------------------------------------

def get_source(name: str, entry: dict[str, Any], options: argparse.Namespace) -> authors.Source:
    """Gets the authors' file: from --source, from an earlier run, or by downloading.

    Raises:
        WeightsError: It is not available.
    """
    if options.source:
        path = authors.find_in_folder(options.source, name, entry)
        return authors.Source(path, str(path), False)
    path = options.work / name / entry['source_file']
    if not path.is_file():
        reason = authors.refusal(path)
        if reason is not None:
            raise Unavailable(f"the authors' file of {name} is not requested: {reason}", name)
        print(f'{name}: getting {entry["source_file"]}')
        source = authors.download(name, entry, path.parent / 'partial', '--work')
        if not source.ours:
            return source
        os.replace(source.path, path)
    return authors.Source(path, str(path), True)


def convert_source(name: str, entry: dict[str, Any], options: argparse.Namespace) -> convert.Converted:
    """Makes the model's files from the authors'.

    Raises:
        WeightsError: The authors' file is not available or not the expected one. A wrong download is deleted, so that
            the next run downloads it again.
    """
    with authors.explain_disk_errors(options.work / name, '--work'):
        source = get_source(name, entry, options)
        try:
            return _convert_source(source.path, name, entry, options)
        except convert.WrongFile as error:
            if not source.ours:
                raise
            source.path.unlink()
            raise WeightsError(f'{str(error).rstrip(".")}. It was deleted: run again to download it anew') from error


def _convert_source(source: pathlib.Path, name: str, entry: dict[str, Any],
               options: argparse.Namespace) -> convert.Converted:
    found = hub.digest(source)
    if entry['source_sha256'] not in (None, found):
        raise convert.WrongFile(f"{source} has the SHA-256 {found}, and the manifest pins {entry['source_sha256']} for "
                                f"the authors' file of {name} (Google Drive id {entry['drive_id']}). Download it again")
    note = authors.provenance(name)
    try:
        authors.check_trust(note, entry, found, authors.cache_folder() / name)
    except WeightsError as error:
        raise convert.WrongFile(f"{source} is not the authors' file of {name}: {error}") from error
    done = convert.convert(source, name, options.work / name / 'repository', manifest=options.manifest, force=True,
                           repository=f'{options.org}/{name}')
    if not done.authors:
        raise convert.WrongFile(f"{source} is not in the authors' format, so it is not theirs; expected model_best.pth "
                                f"as Google Drive has it under the id {entry['drive_id']}")
    return done


# --- The Hub ---------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def explain_hub_errors(api: HfApi, what: str) -> Iterator[None]:
    """Turns errors of the Hub into a WeightsError that says what was tried and what to do."""
    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, 'response', None), 'status_code', 0)
        remedy = {401: 'log in (hf auth login) or set HF_TOKEN to a token that may write to the organisation',
                  403: 'the token must be allowed to write to the organisation',
                  429: 'these are too many requests: wait'}.get(status, 'see whether the Hub can be reached')
        raise WeightsError(f'cannot {what} at {api.endpoint} ({type(error).__name__}: {error}); {remedy}, then run '
                           'again and it goes on from here') from error


def git_blob(content: bytes) -> str:
    """Returns git's name of a file with this content."""
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def changed_files(api: HfApi, repository: str, folder: pathlib.Path) -> list[str] | None:
    """Lists the model's files that differ on the Hub from those in the folder; None if there is no repository."""
    with explain_hub_errors(api, f'look at {repository}'):
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
        WeightsError: The digest differs.
    """
    with tempfile.TemporaryDirectory() as cache, explain_hub_errors(api, f'download {hub.FILENAME} of {repository}'):
        found = hub.digest(api.hf_hub_download(repository, hub.FILENAME, cache_dir=cache))
    if found != sha256:
        raise WeightsError(f'{repository} at {api.endpoint} now holds a {hub.FILENAME} with the SHA-256 {found}; '
                           f'expected {sha256}, which was uploaded. Run again; if that does not help, delete the file '
                           'on the Hub first')


def publish(name: str, options: argparse.Namespace, api: HfApi) -> None:
    """Brings one model from Google Drive to the Hub, without repeating completed steps."""
    entry = common.read_manifest(options.manifest)[name]
    repository = f'{options.org}/{name}'
    done = convert_source(name, entry, options)
    if options.images:
        model, _, _ = verify.load(str(done.folder), {})
        if not verify.quick(model, name, options.images, entry):
            raise WeightsError(f'{done.folder} did not pass on {options.images}, see above; it was not published')
    differs = changed_files(api, repository, done.folder)
    digests = {'source_sha256': done.source_sha256, 'sha256': done.sha256}
    recorded = all(entry[key] == value for key, value in digests.items())
    if options.dry_run:
        steps = [f'create {repository}'] * (differs is None)
        steps += [f'upload {", ".join(FILES if differs is None else differs)}'] * (differs != [])
        steps += [f'write the digests into {options.manifest}'] * (not recorded)
        print(f'{name}: would {", ".join(steps) or "do nothing: all is there"} ({done.folder}, SHA-256 {done.sha256})')
        return
    if differs is None:
        with explain_hub_errors(api, f'create {repository}'):
            api.create_repo(repository, private=True if options.private else None, exist_ok=True)
        print(f'{name}: created {api.endpoint}/{repository}')
    if differs != []:
        with explain_hub_errors(api, f'upload to {repository}'):
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
    parser = common.parser('publish', __doc__)
    parser.add_argument('models', nargs='*', metavar='MODEL', help='such as san15_patchwise')
    parser.add_argument('--all', action='store_true', help='all models of the manifest')
    parser.add_argument('--org', required=True, metavar='NAME', help='organisation or user on the Hub')
    parser.add_argument('--dry-run', action='store_true',
                        help='download, convert and look at the Hub, but change neither it nor the manifest')
    parser.add_argument('--private', action='store_true', help='create private repositories')
    parser.add_argument('--source', type=pathlib.Path, metavar='FOLDER',
                        help='do not download: take FOLDER/MODEL/model_best.pth or FOLDER/MODEL.pth')
    parser.add_argument('--images', type=pathlib.Path, metavar='FOLDER',
                        help='publish only what passes `verify --quick` on these pictures')
    parser.add_argument('--work', type=pathlib.Path, default=pathlib.Path('work_dirs/weights'), metavar='FOLDER',
                        help='where downloads and converted files are kept (default: %(default)s)')
    parser.add_argument('--manifest', type=pathlib.Path, default=common.MANIFEST, metavar='FILE')
    options = parser.parse_args(argv)
    if bool(options.models) == options.all:
        parser.error('expected names of models or --all')
    return options


@common.command
def main(argv: Sequence[str] | None = None, api: HfApi | None = None) -> int:
    """Publishes the models named on the command line; returns the exit status. Goes on after a failure.

    Args:
        argv: The command line.
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
            publish(name, options, api)
        except WeightsError as error:
            print(f'error: {name}: {error}', file=sys.stderr)
            failed.append(name)
    if failed:
        print(f'not done: {", ".join(failed)}; run the same command again', file=sys.stderr)
    return 1 if failed else 0

