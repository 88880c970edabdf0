"""Where the checkout's scripts are, and what the small models are in the oracle's terms."""
import pathlib

import oracle

WEIGHTS = pathlib.Path(__file__).resolve().parents[2] / 'weights'

SMALL = dict(depths=(1, 1, 1, 1, 1), widths=(32, 64, 64, 96, 128), stem=16)
SPECS = {f'test_san_{form}': oracle.Spec(attention=form, **SMALL) for form in ('pairwise', 'patchwise')}
