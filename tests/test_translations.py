"""Pages in Chinese say what the English ones do: the same headings, code, links, numbers and names."""
import re

import pytest

from tests import ROOT

PAGES = sorted(page for page in [*ROOT.glob('*.zh-CN.md'), *(ROOT / 'docs').rglob('*.zh-CN.md')]
               if '_build' not in page.parts)
CODE = re.compile(r'^```.*?^```$|(?:^    \S[^\n]*\n)+', re.M | re.S)
LINK = re.compile(r'\]\(([^)\s]+)\)')


def english(page):
    return page.with_name(page.name.replace('.zh-CN', ''))


def text(page):
    """Without the line that leads to the other language."""
    lines = page.read_text(encoding='utf-8').splitlines(keepends=True)
    switch = [line for line in lines if '简体中文' in line]
    assert len(switch) == 1 and LINK.findall(switch[0]) == [
        english(page).name if '.zh-CN' in page.name else page.name.replace('.md', '.zh-CN.md')]
    return ''.join(line for line in lines if line not in switch)


def outline(page):
    """The levels of headings, and between them how many items, rows of tables and lines of quotes begin."""
    prose = CODE.sub('', text(page))
    return [mark if mark[0] == '#' else mark[0] for mark in re.findall(r'^(#+ |- |\d\. |\| |> - )', prose, re.M)]


def test_there_are_two():
    assert [page.name for page in PAGES] == ['README.zh-CN.md', 'detection.zh-CN.md']


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
class TestPage:

    def test_outline(self, page):
        assert outline(page) == outline(english(page)) and len(outline(page)) > 20

    def test_code(self, page):
        assert CODE.findall(text(page)) == CODE.findall(text(english(page))) != []

    def test_links(self, page):
        """Those to pages that have a translation lead there."""
        def wanted(link):
            path, hash_, anchor = link.partition('#')
            other = path.replace('.md', '.zh-CN.md')
            return link if not path.endswith('.md') or not (page.parent / other).exists() else other + hash_ + anchor
        assert LINK.findall(text(page)) == [wanted(link) for link in LINK.findall(text(english(page)))]

    @pytest.mark.parametrize('what', [r'`[^`]+`', r'(?<![\w.])\d[\d,.]*\d?(?:x|[MG]\b)?'], ids=['names', 'numbers'])
    def test_facts(self, page, what):
        """The same names and numbers; their order is the language's."""
        found, there = (sorted(' '.join(fact.rstrip('.,').split())
                               for fact in re.findall(what, CODE.sub('', text(one)), re.A))
                        for one in (page, english(page)))
        assert found == there

    def test_it_is_chinese(self, page):
        prose = CODE.sub('', text(page))
        paragraphs = [part for part in prose.split('\n\n') if len(part) > 80 and not part.startswith('|')]
        assert paragraphs and all(re.search('[\u4e00-\u9fff]{4}', part) for part in paragraphs)
