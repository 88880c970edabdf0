"""Opens every page of docs/_build in a headless Chromium without a network, at the widths of a phone and a desktop.

    python -m tools.check_docs [--shots FOLDER] [--pages NAME ...]

A page passes if no formula is left as source, nothing is wider than the page except blocks that scroll, the browser's
console has no error, every internal link leads to an existing page and anchor, every picture loads, and nothing is
requested from another host. The search must find the expected pages. Needs Chromium or Chrome with its driver (Debian:
chromium-driver) and selenium.
"""
import argparse
import functools
import http.server
import pathlib
import re
import shutil
import sys
import threading
import urllib.parse

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILT = ROOT / 'docs' / '_build'
WIDTHS = (390, 1280)
WIDER = """
// accepts blocks that scroll, but not the whole text, which the theme lets scroll on a phone
const wide = [], limit = arguments[0] + 1;
for (const element of document.querySelectorAll('body *')) {
    const right = element.getBoundingClientRect().right;
    if (right <= limit || !element.checkVisibility({visibilityProperty: true})) continue;
    let scrolls = false;
    for (let parent = element; parent && !parent.querySelector('article'); parent = parent.parentElement) {
        const style = getComputedStyle(parent), fits = parent.getBoundingClientRect().right <= limit;
        if (style.position === 'fixed' || fits && /auto|scroll/.test(style.overflowX)) scrolls = true;
    }
    if (!scrolls) wide.push(element.tagName + ' ' + element.textContent.trim().slice(0, 40));
}
if (document.documentElement.scrollWidth > limit) wide.push('the page');
return wide;
"""
SOURCES = r"""
const text = document.querySelector('article').cloneNode(true);
for (const code of text.querySelectorAll('pre, code, math, script, .headerlink')) code.remove();
return (text.textContent.match(/\$[^$\n]+\$|\\\(|\\\[|\\(frac|sum|mathcal|gamma|alpha|operatorname)\b/g) || []);
"""
LOADED = """
return performance.getEntriesByType('resource').map(entry => entry.name).concat(
    [...document.images].filter(image => !image.naturalWidth).map(image => 'missing ' + image.src));
"""


def browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    found = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    driver = shutil.which('chromedriver')
    if found is None or driver is None:
        sys.exit('neither Chromium nor Chrome with chromedriver is here (Debian: apt install chromium chromium-driver)')
    options.binary_location = found
    for argument in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
                     '--disable-background-networking', '--disable-component-update', '--disable-sync',
                     '--hide-scrollbars', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'):
        options.add_argument(argument)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def narrow(chrome: webdriver.Chrome, width: int) -> None:
    chrome.execute_cdp_cmd('Emulation.setDeviceMetricsOverride',
                           dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600))


def anchors(page: pathlib.Path, kept: dict[pathlib.Path, set[str]]) -> set[str]:
    if page not in kept:
        kept[page] = set(re.findall(r'\sid="([^"]+)"', page.read_text()))
    return kept[page]


def dead_links(chrome: webdriver.Chrome, page: pathlib.Path, kept: dict) -> list[str]:
    dead = []
    for link in {element.get_attribute('href') for element in chrome.find_elements(By.CSS_SELECTOR, 'a[href]')}:
        parts = urllib.parse.urlsplit(link)
        if parts.hostname != '127.0.0.1':
            continue
        target = BUILT / urllib.parse.unquote(parts.path).lstrip('/')
        if not target.is_file():
            dead.append(f'no page {parts.path}')
        elif parts.fragment and urllib.parse.unquote(parts.fragment) not in anchors(target, kept):
            dead.append(f'no anchor {parts.path}#{parts.fragment}')
    return dead


def check(chrome: webdriver.Chrome, address: str, name: str, shots: pathlib.Path | None, kept: dict) -> list[str]:
    wrong = []
    for width in WIDTHS:
        narrow(chrome, width)
        chrome.get(f'{address}/{name}')
        where = f'{name} at {width} pixels'
        wrong += [f'{where}: wider than the page: {element}' for element in chrome.execute_script(WIDER, width)[:5]]
        wrong += [f'{where}: a formula as source: {text}' for text in chrome.execute_script(SOURCES)]
        wrong += [f'{where}: {loaded}' for loaded in chrome.execute_script(LOADED) if not loaded.startswith(address)]
        wrong += [f'{where}: console: {entry["message"]}' for entry in chrome.get_log('browser')
                  if entry['level'] in ('SEVERE', 'WARNING') and '/favicon.ico' not in entry['message']]
        if shots is not None:
            path = shots / f'{name.replace("/", "-").removesuffix(".html")}-{width}.png'
            path.write_bytes(chrome.get_screenshot_as_png())
    return wrong + [f'{name}: {link}' for link in dead_links(chrome, BUILT / name, kept)]


def search(chrome: webdriver.Chrome, address: str) -> list[str]:
    """Checks that the search finds the right page for some words."""
    wrong = []
    for words, page in (('footprint softmax', 'mathematics'), ('SANBackbone', 'mm'), ('relu_bound', 'from-scratch')):
        chrome.get(f'{address}/search.html?q={urllib.parse.quote(words)}')
        try:
            WebDriverWait(chrome, 20).until(lambda chrome, page=page: any(
                page in (link.get_attribute('href') or '')
                for link in chrome.find_elements(By.CSS_SELECTOR, '#search-results li a')))
        except Exception as error:  # selenium raises many kinds of errors
            wrong.append(f'search: {words!r} does not find the page {page} ({type(error).__name__})')
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shots', type=pathlib.Path, metavar='FOLDER', help='keep a screenshot of each page and width')
    parser.add_argument('--pages', nargs='+', metavar='NAME', help='such as how-to/export.html (default: all)')
    options = parser.parse_args()
    if not (BUILT / 'index.html').is_file():
        parser.error(f'there is no {BUILT / "index.html"}: make docs')
    pages = options.pages or sorted(str(path.relative_to(BUILT)) for path in BUILT.rglob('*.html')
                                    if '_modules' not in path.parts and '_static' not in path.parts)
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    handler = type('Quiet', (http.server.SimpleHTTPRequestHandler,), {'log_message': lambda *_: None})
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(handler, directory=BUILT)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_address[1]}'
        chrome, kept = browser(), {}
        try:
            wrong = [fault for name in pages for fault in check(chrome, address, name, options.shots, kept)]
            wrong += search(chrome, address)
        finally:
            chrome.quit()
            server.shutdown()
    for fault in wrong:
        print(fault)
    print(f'{len(pages)} pages at {" and ".join(map(str, WIDTHS))} pixels: {len(wrong)} faults')
    return bool(wrong)


if __name__ == '__main__':
    sys.exit(main())
