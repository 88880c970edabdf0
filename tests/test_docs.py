"""Every code block of the documentation runs, and the pages are complete; see code_blocks for how blocks are run."""
import ast
import contextlib
import json
import re
from collections import OrderedDict

import pytest

from tests.code_blocks import ROOT, blocks, check_command, link_checkout, run_page

DOCS = ROOT / 'docs'
PAGES = sorted(page for page in DOCS.rglob('*.md') if '_build' not in page.parts)
NEEDS_MM = ('mmengine', 'mmdet', 'mmseg', 'san_backbones.mm', '_base_')
MOST_LEFT_OUT = 3  # blocks marked `% not run: REASON`
LANGUAGES = {'python', 'console', 'text', 'bibtex', 'json', 'yaml', 'toml'}


@pytest.fixture
def fresh_mmengine(monkeypatch):
    """Removes the loggers and visualisers of earlier tests, which would keep writing to their old files.

    Without formatting either: MMEngine formats the whole config for every log and checkpoint, which takes longer than
    training does here.
    """
    with contextlib.suppress(ModuleNotFoundError):
        from accelerate.state import AcceleratorState
        AcceleratorState._reset_state(True)  # a page decides on its device
    try:
        from mmengine.utils import ManagerMixin
    except ModuleNotFoundError:
        return
    managers = [ManagerMixin]
    for manager in managers:
        monkeypatch.setattr(manager, '_instance_dict', OrderedDict())
        managers += manager.__subclasses__()
    for name in ('mmengine.config.config.FormatCode', 'yapf.yapflib.yapf_api.FormatCode'):  # OneDL's
        monkeypatch.setattr(name, lambda text, **kwargs: (text, True), raising=False)


# a translation's code is that of its original: test_translations
@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page) and '.zh-CN' not in page.name],
                         ids=lambda page: page.relative_to(DOCS).as_posix())
def test_page(page, tmp_path, monkeypatch, fresh_mmengine):
    if any(name in block.text for block in blocks(page) for name in NEEDS_MM):
        pytest.importorskip('mmdet', reason='needs the mm extra')
        pytest.importorskip('mmseg', reason='needs the mm extra')
        import san_backbones.mm  # noqa: F401
    if page.stem == 'extract-features':
        for module in ('duckdb', 'faiss', 'pandas', 'polars', 'pyarrow', 'tqdm'):
            pytest.importorskip(module, reason='needs the test extra')
    for name in ('SAN_BACKBONES_WEIGHTS', 'SAN_BACKBONES_BACKEND', 'SAN_BACKBONES_HUB_ORG', 'SAN_BACKBONES_AUTHORS',
                 'SAN_BACKBONES_AUTHORS_URL'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('SAN_BACKBONES_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('MPLBACKEND', 'agg')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.chdir(tmp_path)
    link_checkout(tmp_path)
    run_page(page, tmp_path)


def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """Without Jupyter: its cells in order; the last line of a cell that makes a figure is the figure."""
    pytest.importorskip('matplotlib', reason='needs the visualize extra')
    monkeypatch.setenv('SAN_BACKBONES_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((DOCS / 'tutorial/first_look.ipynb').read_text())
    assert notebook['nbformat'] == 4 and len({cell['id'] for cell in notebook['cells']}) == len(notebook['cells'])
    namespace, figures = {}, 0
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code':
            assert cell['outputs'] == [] and cell['execution_count'] is None, 'outputs are not kept in the repository'
            *lines, last = ast.parse(''.join(cell['source'])).body
            exec(compile(ast.Module(lines, []), cell['id'], 'exec'), namespace)
            if isinstance(last, ast.Expr):
                shown = eval(compile(ast.Expression(last.value), cell['id'], 'eval'), namespace)
                if shown is not None:  # as Jupyter shows it
                    shown.savefig(tmp_path / f'{cell["id"]}.png', dpi=40)
                    figures += 1
            else:
                exec(compile(ast.Module([last], []), cell['id'], 'exec'), namespace)
    assert figures == 4 and (namespace['after'] - namespace['before']).abs().max() < 1e-3


def test_figures_of_pages_are_those_of_their_code():
    """What a page writes is shown on it, and drawn by its code at the build."""
    pages = ast.literal_eval(re.search(r'^PAGES = ({.*?^})', (DOCS / 'figures.py').read_text(), re.M | re.S)[1])
    for page in PAGES:
        text, name = page.read_text(), page.relative_to(DOCS).as_posix()
        shown = re.findall(rf'\(\.\./_figures/{page.stem}-([\w-]+\.\w+)\)', text)
        written = re.findall(r"savefig\('([\w-]+\.png)'", text)
        if name in pages:
            assert shown and (shown == written or {path.rpartition('/')[2] for path in pages[name]} == set(shown)), name
        else:
            assert not shown and not written, name


def test_few_blocks_are_left_out():
    everything = [block for page in PAGES for block in blocks(page)]
    left_out = [f'{block.page.name}:{block.line}: {block.mark}' for block in everything
                if block.mark.startswith('not run')]
    assert len(left_out) <= MOST_LEFT_OUT, left_out
    for block in everything:
        if block.mark.startswith('run by '):
            assert block.page.name in (ROOT / block.mark.removeprefix('run by ')).read_text(), block.mark
    assert sum(block.language == 'python' for block in everything) >= 40
    assert {block.language for block in everything} <= LANGUAGES


def test_every_fence_is_seen():
    """No block escapes: an indented or differently written fence would not be run."""
    for page in PAGES:
        text = page.read_text()
        fences = [line for line in text.splitlines() if line.lstrip().startswith('```') and '{' not in line]
        directives = [line for line in text.splitlines() if line.startswith('```{')]
        assert len(fences) == 2 * len(blocks(page)) + len(directives), page
        assert '{code-block}' not in text and '~~~' not in text, page


@pytest.mark.parametrize('command', [
    'make no-such-target', "pip install 'san-backbones[no-such-extra]'", 'python weights/no_such_script.py',
    'python weights/convert.py --no-such-option', 'python -m san_backbones.no_such_module', 'no-such-program',
    'san-backbones weights no-such-command', 'san-backbones weights get --no-such-option',
    'san-backbones no-such-command', 'san-backbones list --no-such-option',
    'torchrun --no-such-option 2 tools/train.py CONFIG', 'python -c "import san_backbones.no_such_module"',
    'python tools/train.py mm_configs/mask_rcnn/mask-rcnn_san15-patchwise_fpn_1x_coco.py --cfg-options '
    'model.no_such_part.depth=1'])
def test_a_wrong_command_is_noticed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    if 'tools/train.py' in command:
        pytest.importorskip('mmdet', reason='needs the mm extra')
    with pytest.raises(AssertionError, match='no such|no_such|no-such|unknown'):
        check_command(command)
