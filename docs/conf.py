"""Sphinx: `sphinx-build -W -n --keep-going -b html docs docs/_build`. Needs the extras mm and docs, no network."""
import pathlib
import re
import sys
import warnings

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
warnings.filterwarnings('ignore', message='pkg_resources is deprecated', category=UserWarning)  # mmengine asks for it

import figures  # noqa: E402
import latex2mathml.converter  # noqa: E402
from docutils import nodes  # noqa: E402

from san_backbones._version import __version__ as release  # noqa: E402

project = 'san-backbones'
author = copyright = 'The san-backbones authors'
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence']
myst_heading_anchors = 3
html_theme = 'furo'
html_static_path, html_css_files = ['static'], ['narrow.css']
html_math_renderer = 'mathml'
html_title = f'san-backbones {release}'
default_role = 'code'
exclude_patterns = ['_build', '_figures']

autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
autodoc_member_order = 'bysource'
autodoc_default_options = {'members': True, 'show-inheritance': True}
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False
# Objects of other packages, whose inventories would have to come from the network; ours must resolve.
nitpick_ignore_regex = [
    ('py:.*', r'(torch|timm|mmengine|mmcv|numpy|typing|collections|pathlib|os|nn|matplotlib|PIL|typer|click)\b.*'),
    ('py:class', r'(Tensor|Runner|Figure|Picture|Pixels|BlockId|optional'
                 r'|san_backbones\.(attention\.FootprintAttention|ops\.native\.attention\.RoundedGamma))'),
]

SECTION = re.compile(r'(Args|Arguments|Attributes|Example|Examples|Note|Raises|Returns|Yields):$')


def show_formulas(app, what, name, obj, options, lines):
    """Indented paragraphs of a docstring are formulas or code: reStructuredText would take them for quotations."""
    if lines and lines[0].startswith('Alias for field number'):  # what a NamedTuple says of its fields
        lines.clear()
    result, in_section = [], False
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else ''
        if line and not line.startswith(' '):
            in_section = bool(SECTION.match(line))
        elif line.startswith('    ') and not before.strip() and not in_section \
                and not (result and result[-1].startswith('    ')) and '::' not in result[-2:]:
            last = next((text for text in reversed(result) if text.strip()), '')
            if not last.startswith('    '):
                result += ['::', '']
        result.append(line)
    lines[:] = result


def formula(display):
    """Formulas as MathML, which browsers draw themselves: no script, nothing from the network."""
    def visit(translator, node):
        translator.body.append(latex2mathml.converter.convert(node.astext(), display=display))
        raise nodes.SkipNode
    return visit, None


def setup(app):
    app.add_html_math_renderer('mathml', formula('inline'), formula('block'))
    app.connect('builder-inited', lambda app: figures.draw_all(HERE / '_figures'))
    app.connect('autodoc-process-docstring', show_formulas, priority=100)  # before napoleon
