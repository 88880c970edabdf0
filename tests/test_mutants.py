"""The planted faults can be planted: each text is found once, and each test exists."""
import ast
import functools

import pytest

from tools.mutants import MUTANTS
from tools.run_mutants import ROOT, locate


@functools.cache
def definitions(path):
    """The functions and classes of a test file, methods as CLASS::METHOD."""
    found = set()
    for node in ast.parse((ROOT / path).read_text(encoding='utf-8')).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found.update(f'{node.name}::{method.name}' for method in node.body if isinstance(method, ast.FunctionDef))
    return found


@pytest.mark.parametrize('mutant', MUTANTS, ids=lambda mutant: mutant.name)
def test_text_and_tests_are_found(mutant):
    assert mutant.old != mutant.new
    locate(ROOT, mutant)
    for test in mutant.tests:
        path, _, name = test.partition('::')
        assert (ROOT / path).exists(), f'no {path}'
        assert not name or name.partition('[')[0] in definitions(path), f'{path} has no {name}'


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
