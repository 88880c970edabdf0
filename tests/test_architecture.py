"""The house has one direction: modules import from their own floor and those below, as docs/explanation says."""
import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'san_backbones'


def floors():
    """The floor of each top-level module, 0 being the lowest."""
    rows = [line.split('|')[2] for line in (ROOT / 'docs/explanation/architecture.md').read_text().splitlines()
            if line.startswith('| ') and '`' in line][1:]
    assert len(rows) > 3
    return {name: floor for floor, row in enumerate(reversed(rows)) for name in re.findall(r'`(\w+)`', row)}


def top_level(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imported(path):
    """The top-level modules of the package that a file imports, anywhere in it."""
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            base = list(package[:len(package) - node.level + 1]) if node.level else []
            module = [*base, *(node.module or '').split('.')]
            if not node.level:
                if module[0] != 'san_backbones':
                    continue
                module = module[1:]
            module = [part for part in module if part]
            yield from [module[0]] if module else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith('san_backbones.'):
                    yield alias.name.split('.')[1]


def test_every_module_has_a_floor():
    modules = {top_level(path) for path in PACKAGE.rglob('*.py')} - {'__init__'}
    assert modules == set(floors()), modules ^ set(floors())


def test_imports_go_down():
    floor = floors()
    up = [f'{path.relative_to(PACKAGE)} imports {name}' for path in PACKAGE.rglob('*.py') if top_level(path) in floor
          for name in imported(path) if name in floor and floor[name] > floor[top_level(path)]]
    assert not up


def test_operators_know_tensors_only():
    """No module of torch is subclassed or looked at below the layers; timm is not imported."""
    for path in (PACKAGE / 'ops').rglob('*.py'):
        text = path.read_text(encoding='utf-8')
        assert not re.search(r'^\s*(from|import) timm', text, re.M), path
        assert 'nn.Module' not in text, path


def test_mm_is_imported_by_no_other_floor():
    for path in PACKAGE.rglob('*.py'):
        if top_level(path) not in ('mm', 'cli', 'app'):
            assert 'mm' not in set(imported(path)), path
