"""The table of relations: widths against the oracle's, unknown names, and a relation that is nowhere else."""
from tests import oracle
import pytest
import torch

from san_backbones import PairwiseAttention, ops
from san_backbones.ops import reference, relations, traced


def test_names():
    assert {form: set(relations.names(form)) for form in relations.FORMS} == {
        'pairwise': set(oracle.PAIRWISE_RELATIONS), 'patchwise': set(oracle.PATCHWISE_RELATIONS)}
    assert (ops.PAIRWISE_RELATIONS[0], ops.PATCHWISE_RELATIONS[0]) == ('subtraction', 'concatenation')
    for number, relation in enumerate(relations.RELATIONS):
        assert relations.number(relation.is_pairwise, relation.name) == number
        assert relations.find(relation.is_pairwise, relation.name) is relation


@pytest.mark.parametrize('relation', relations.RELATIONS, ids=lambda relation: f'{relation.form}-{relation.name}')
def test_widths(relation):
    for r, kernel_size in ((3, 1), (4, 3), (7, 5)):
        expected = oracle.relation_width(relation.form, relation.name, r, kernel_size)
        assert relation.width(r, kernel_size ** 2) == expected
        if relation.has_positions:
            assert relation.width(r, kernel_size ** 2, True) == expected + 2
        query, key = torch.randn(2, 1, r, 4, 5)
        padded = [ops.reflect_pad(x, kernel_size // 2) for x in (query, key)]
        related = reference.relate(padded[0] if relation.every_query else query, padded[1], None, None,
                                   relation.is_pairwise, relation.name, 'none', kernel_size, 1)
        assert related.shape[1] == expected


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="patchwise form must be one of 'concatenation', 'star', 'clique', got 'dot'"):
        relations.find(False, 'dot')
    x = torch.zeros(1, 2, 3, 3)
    for module in (reference, traced):
        with pytest.raises(ValueError, match='no pairwise relation is called star'):
            module.combine(x, x, 'star')
        with pytest.raises(ValueError, match='no patchwise relation is called dot'):
            module.combine_patch(x, x[:, :, None], 'dot', 1)


def test_a_relation_of_the_table_and_the_definition_alone(monkeypatch):
    """Runs wherever the definition does; fused backends say that they have not got it."""
    minimum = relations.Relation('minimum', 'pairwise', 'add')
    plain = reference.combine

    def combine(centre, neighbours, relation):
        return torch.minimum(centre, neighbours) if relation == 'minimum' else plain(centre, neighbours, relation)

    for module in (reference, traced):
        monkeypatch.setattr(module, 'combine', combine)
    monkeypatch.setattr(relations, 'RELATIONS', (*relations.RELATIONS, minimum))
    monkeypatch.setitem(relations._NUMBERS, (True, 'minimum'), len(relations.RELATIONS) - 1)
    monkeypatch.setattr(PairwiseAttention, 'relations', (*PairwiseAttention.relations, 'minimum'))
    torch.manual_seed(0)
    layer = PairwiseAttention(32, kernel_size=3, relation='minimum')
    x = torch.randn(2, 32, 5, 6)
    for training in (True, False):
        layer.train(training)
        expected = layer._forward_modules(layer.query(x), layer.key(x), layer.value(x), layer.place(x))
        for name in ('auto', 'tiled', 'reference'):
            with ops.use_backend(name):
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        compiled = torch.compile(layer, backend='aot_eager')
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        for backend in ops.fused.FUSED:
            with ops.use_backend(backend.name), pytest.raises(RuntimeError, match='it has no minimum relation'):
                layer(x)
