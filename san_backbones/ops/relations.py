"""The relations delta: a table with one row for each, which all other code asks.

How a relation is computed stands in `reference.combine` and `reference.combine_patch`, and, for the fused backends that
have it, in `native/relations.h` and `triton/kernels.py`.
"""
from typing import Any, NamedTuple

import torch

__all__ = ['FORMS', 'PAIRWISE_RELATIONS', 'PATCHWISE_RELATIONS', 'POSITIONS', 'RELATIONS', 'Relation', 'constant',
           'find', 'names', 'number']

FORMS = ('pairwise', 'patchwise')
POSITIONS = ('relative', 'absolute', 'none')
POSITION_CHANNELS = 2


class Relation(NamedTuple):
    """One relation of phi(x_i), r channels, to the footprint of psi, r channels each.

    Its channels are phi(x_i) itself (where `operation` is 'join'), then those of every tap, then, in the pairwise form,
    the position channels. Pairwise: a vector for each tap. Patchwise: one vector with all taps.
    """
    name: str
    form: str  # one of FORMS
    operation: str  # of the channels of a pair: 'join'; 'add', what costs one addition each; 'multiply'
    summed: bool = False  # over the channels: a dot product
    backends: tuple[str, ...] = ()  # fused backends that have it

    @property
    def is_pairwise(self) -> bool:
        return self.form == 'pairwise'

    @property
    def has_positions(self) -> bool:
        """Whether it may have position channels."""
        return self.is_pairwise

    @property
    def every_query(self) -> bool:
        """Whether phi, as psi, is read at every tap."""
        return not self.is_pairwise and reads_every_query(self.name)

    def centre_width(self, r: int) -> int:
        """Channels ahead of those of the taps."""
        return r if self.operation == 'join' else 0

    def tap_width(self, r: int, area: int) -> int:
        """Channels of one tap, of a footprint of `area` taps."""
        if self.summed:
            return area if self.every_query else 1
        return r

    def width(self, r: int, area: int, has_place: bool = False) -> int:
        """Channels of delta, the position channels included: what gamma is applied to."""
        taps = 1 if self.is_pairwise else area
        return self.centre_width(r) + taps * self.tap_width(r, area) + (POSITION_CHANNELS if has_place else 0)

    def operations(self, r: int, area: int) -> int:
        """How often `operation` is computed for a pixel; of joining, never."""
        return 0 if self.operation == 'join' else r * area * (area if self.every_query else 1)


_FUSED = ('native', 'triton')

RELATIONS = (
    Relation('subtraction', 'pairwise', 'add', backends=_FUSED),
    Relation('summation', 'pairwise', 'add', backends=_FUSED),
    Relation('concatenation', 'pairwise', 'join', backends=_FUSED),
    Relation('hadamard', 'pairwise', 'multiply', backends=_FUSED),
    Relation('dot', 'pairwise', 'multiply', summed=True, backends=_FUSED),
    Relation('concatenation', 'patchwise', 'join', backends=_FUSED),
    Relation('star', 'patchwise', 'multiply', summed=True, backends=_FUSED),
    Relation('clique', 'patchwise', 'multiply', summed=True),
)
"""The number of a relation, in arguments of registered operators, is its place here."""

_NUMBERS = {(relation.is_pairwise, relation.name): number for number, relation in enumerate(RELATIONS)}


def names(form: str) -> tuple[str, ...]:
    """The relations of a form, the default first."""
    return tuple(relation.name for relation in RELATIONS if relation.form == form)


PAIRWISE_RELATIONS, PATCHWISE_RELATIONS = map(names, FORMS)


def find(pairwise: bool, name: str) -> Relation:
    """The relation of that name.

    Raises:
        ValueError: The form has none of that name; the message lists those it has.
    """
    return RELATIONS[number(pairwise, name)]


@torch.compiler.assume_constant_result
def _constant(pairwise: bool, name: str, what: str, sizes: tuple) -> Any:
    found = getattr(find(pairwise, name), what)
    return found(*sizes) if callable(found) else found


def constant(spec: Any, what: str, *sizes: Any) -> Any:
    """An attribute of the relation of `spec`, or what a method of it gives for `sizes`: a constant of a graph, since
    torch 2.6 traces no methods of named tuples. Raises as `find`.
    """
    return _constant(spec.pairwise, spec.relation, what, sizes)


@torch.compiler.assume_constant_result  # a graph holds the number, not the table
def number(pairwise: bool, name: str) -> int:
    """The place of a relation in `RELATIONS`. Raises as `find`."""
    if (pairwise, name) not in _NUMBERS:
        form = 'pairwise' if pairwise else 'patchwise'
        raise ValueError(f'relation of the {form} form must be one of {", ".join(map(repr, names(form)))}, '
                         f'got {name!r}')
    return _NUMBERS[pairwise, name]


@torch.compiler.assume_constant_result
def is_joined(pairwise: bool, name: str) -> bool:
    """Whether the channels of phi(x_i) come first, for code that graphs go through."""
    return find(pairwise, name).operation == 'join'


@torch.compiler.assume_constant_result
def is_summed(pairwise: bool, name: str) -> bool:
    """Whether a tap has one channel, for code that graphs go through."""
    return find(pairwise, name).summed


def reads_every_query(name: str) -> bool:
    """Whether a patchwise relation reads phi at every tap: a function, since TorchScript reads no tables."""
    return name == 'clique'
