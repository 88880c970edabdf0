"""Gets pretrained weights, as `pretrained=True` does on first use, and prints where they are.

    san-backbones weights get san15_patchwise
    san-backbones weights get --all
    san-backbones weights get san15_patchwise --out FOLDER

They come from the folder that SAN_BACKBONES_WEIGHTS names, the package, the Hugging Face Hub or the authors' own files,
in this order. With --out they are copied to FOLDER/MODEL.TAG/model.safetensors; a machine without a network finds them
there with SAN_BACKBONES_WEIGHTS=FOLDER.
"""
import argparse
import pathlib
import sys
from collections.abc import Sequence

from .. import hub
from ..hub import WeightsError
from . import authors, common

__all__ = ['main']


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser('get', __doc__)
    parser.add_argument('models', nargs='*', metavar='MODEL', help='such as san15_patchwise')
    parser.add_argument('--all', action='store_true', help="all models with files of the authors'")
    parser.add_argument('--out', type=pathlib.Path, metavar='FOLDER', help='copy them there')
    options = parser.parse_args(argv)
    if bool(options.models) == options.all:
        parser.error('expected names of models or --all')
    return options


@common.command
def main(argv: Sequence[str] | None = None) -> int:
    """Gets the weights named on the command line; returns the exit status. Goes on after a failure."""
    options = parse(argv)
    sources = [common.repository_of(model) for model in options.models] or [
        f'{hub.ORGANISATION}/{name}' for name, entry in hub.manifest().items() if 'drive_id' in entry]
    failed = False
    for source in dict.fromkeys(sources):
        model = source.rpartition('/')[2]
        try:
            path = pathlib.Path(hub.weights(source))
            sha256 = hub.digest(path)
            note = authors.provenance(model) if path.parent == authors.cache_folder() / model else {}
            if options.out:
                common.replace_files(options.out / model, {hub.FILENAME: path.read_bytes()})
                path = options.out / model / hub.FILENAME
        except (WeightsError, OSError) as error:
            print(f'error: {error}', file=sys.stderr)
            failed = True
            continue
        entry = hub.manifest().get(model) or {}
        print(f'{model}: {path}')
        print(f'  SHA-256 {sha256}, licence {entry.get("license") or "not said"}')
        if note:
            trust = 'pinned' if note['pinned'] else 'taken on trust'
            print(f"  made of {note['origin']} ({note['authors']}), SHA-256 {note['source_sha256']}, {trust} on "
                  f'{note["date"]}')
    if options.out and not failed:
        print(f'{hub.FOLDER_VARIABLE}={options.out} uses them')
    return int(failed)
