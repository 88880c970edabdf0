"""Describes the small models in the oracle's terms."""
from tests import oracle

SMALL = dict(depths=(1, 1, 1, 1, 1), widths=(32, 64, 64, 96, 128), stem=16)
SPECS = {f'test_san_{form}': oracle.Spec(attention=form, **SMALL) for form in ('pairwise', 'patchwise')}
