"""Uses the page of `san-backbones app` in a headless Chromium without a network, as visitors would, at the widths of a
phone and a desktop; and the file of `san-backbones attention --html`.

    python -m tools.check_app [--shots FOLDER [--docs]] [--config FILE --checkpoint FILE [--picture FILE]]

Pictures are dropped, chosen and broken, pixels pointed at and clicked, blocks, channels and networks switched, figures
downloaded, and two visitors come at once. It prints how long after the pointer a footprint is drawn. Without a detector
of yours an untrained one is made, if MMDetection is installed. Needs what tools.check_docs needs.
"""
import argparse
import base64
import contextlib
import io
import os
import pathlib
import statistics
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    JavascriptException,
    StaleElementReferenceException,
    TimeoutException,
)
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tools.check_docs import ROOT, WIDER, WIDTHS, browser, narrow

LATENCY = 200  # milliseconds
OPTIONS, TICK = 'ul[role=listbox] li', ' ✓\n'
DROP = """
const [selector, name, text] = arguments, bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], name, {type: 'image/png'}));
const zone = document.querySelector(selector + ' button, ' + selector + ' [role=button]');
for (const kind of ['dragenter', 'dragover', 'drop'])
    zone.dispatchEvent(new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
"""
WATCH = """
window.times = [];
let moved = null;
document.addEventListener('pointermove', event => { moved = event.timeStamp; }, true);
new MutationObserver(() => { if (moved !== null) { window.times.push(performance.now() - moved); moved = null; } })
    .observe(document.body, {attributes: true, attributeFilter: ['data-drawn']});
"""
TILES = """return [...document.querySelectorAll('.tile')].map(tile => {
    const box = tile.getBoundingClientRect(); return [box.width, box.height]; });"""
LETTERS = """return Math.min(...[...document.querySelectorAll('h2, p, label, select, figcaption, .bar')]
    .filter(element => element.textContent.trim()).map(element => parseFloat(getComputedStyle(element).fontSize)));"""


class Fault(Exception):
    """The page does not do what it should."""


def require(condition: Any, words: str) -> None:
    if not condition:
        raise Fault(words)


def png(height: int, width: int, colour: tuple[int, int, int]) -> bytes:
    pixels, file = np.full((height, width, 3), colour, np.uint8), io.BytesIO()
    pixels[height // 4:height // 2, width // 4:width // 2] = 255 - pixels[0, 0]
    Image.fromarray(pixels).save(file, 'PNG')
    return file.getvalue()


class Visitor:
    """A browser on the page."""

    def __init__(self, address: str, width: int, shots: pathlib.Path | None, folder: pathlib.Path) -> None:
        self.chrome, self.address, self.width, self.shots, self.folder = browser(), address, width, shots, folder
        self.chrome.execute_cdp_cmd('Browser.setDownloadBehavior', dict(behavior='allow', downloadPath=str(folder)))
        narrow(self.chrome, width)
        self.chrome.get(address)
        self.wait(lambda: self.all('iframe.footprints'), 'no footprints')

    def all(self, selector: str) -> list[Any]:
        return self.chrome.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> Any:
        return self.chrome.find_element(By.CSS_SELECTOR, selector)

    def wait(self, condition: Callable[[], Any], words: str, seconds: float = 90) -> Any:
        try:
            waiting = WebDriverWait(self.chrome, seconds, 0.1, [JavascriptException, StaleElementReferenceException])
            return waiting.until(lambda chrome: condition())
        except TimeoutException:
            raise Fault(f'{words} within {seconds:g} s') from None

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """In the frame of the footprints."""
        self.wait(lambda: self.all('iframe.footprints'), 'no footprints')
        self.chrome.switch_to.frame(self.one('iframe.footprints'))
        try:
            self.wait(lambda: self.one('body').get_attribute('data-ready'), 'the footprints are not drawn')
            yield
        finally:
            self.chrome.switch_to.default_content()

    def title(self) -> str:
        with self.inside():
            return self.one('h1').text

    def press(self, element: Any) -> None:
        """Clicks, when what shows that something is computed is gone."""
        self.chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        for _ in range(300):
            try:
                return element.click()
            except ElementClickInterceptedException:
                time.sleep(0.1)
        raise Fault('something else lies over what is to be clicked, for 30 s')

    def tab(self, name: str) -> None:
        self.press(next(tab for tab in self.all('button[role=tab]') if tab.text == name and tab.is_displayed()))

    def choose(self, dropdown: str, text: str) -> None:
        self.press(self.one(f'#{dropdown} input'))
        self.wait(lambda: [option for option in self.all(OPTIONS) if option.text.strip(TICK) == text],
                  f'{dropdown} has no {text}', 10)[0].click()

    def drop(self, selector: str, name: str, data: bytes) -> None:
        for clear in self.all(f'{selector} button[aria-label="Clear"]'):
            clear.click()
            time.sleep(0.5)
        self.wait(lambda: self.all(f'{selector} button'), 'nowhere to drop', 10)
        self.chrome.execute_script(DROP, selector, name, base64.b64encode(data).decode())

    def words(self, text: str) -> None:
        """Waits for an error that says `text`, and closes it."""
        said = self.wait(lambda: [toast.text for toast in self.all('.toast-body, [data-testid=toast-body]')
                                  if text in toast.text], f'nothing on the page says {text!r}', 30)[0]
        require('Traceback' not in said and 'File "' not in said, f'a stack trace: {said}')
        self.shoot('error')
        for button in self.all('.toast-close, [data-testid=toast-close]'):
            with contextlib.suppress(Exception):  # it may go by itself
                button.click()

    def shoot(self, name: str) -> None:
        if self.shots is None:
            return
        height = self.chrome.execute_script('return document.documentElement.scrollHeight')
        self.chrome.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(
            width=self.width, height=min(height, 5000), deviceScaleFactor=1, mobile=self.width < 600))
        time.sleep(0.8)
        (self.shots / f'{name}-{self.width}.png').write_bytes(self.chrome.get_screenshot_as_png())
        narrow(self.chrome, self.width)

    def quiet(self) -> None:
        """Nothing went wrong that only the console tells, nothing came from elsewhere, nothing is too wide."""
        entries = [entry['message'] for entry in self.chrome.get_log('browser')
                   if entry['level'] == 'SEVERE' and '/favicon.ico' not in entry['message']]
        require(not entries, f'console: {entries}')
        loaded = self.chrome.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        away = [name for name in loaded if not name.startswith((self.address, 'data:', 'blob:'))]
        require(not away, f'loaded from elsewhere: {away}')
        wide = self.chrome.execute_script(WIDER.replace("!parent.querySelector('article')", 'true'), self.width)
        require(not wide, f'wider than the page: {wide[:5]}')

    def file(self, name: str) -> pathlib.Path:
        return self.wait(lambda: next((path for path in self.folder.glob(name) if path.stat().st_size), None),
                         f'no download {name}', 60)


def attention(visitor: Visitor) -> list[float]:
    """Points, clicks and switches in the view of footprints; returns how long footprints took to follow, in ms."""
    with visitor.inside():
        picture = visitor.one('.picture')
        visitor.chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
        visitor.chrome.execute_script(WATCH)
        seen = set()
        for step in range(20):
            ActionChains(visitor.chrome, 0).move_to_element_with_offset(picture, 4 * step - 40, 2 * step - 20).perform()
            time.sleep(0.05)
            seen.add(visitor.one('#where').text)
        require(len(seen) > 10, f'the pixel does not follow the pointer: {seen}')
        times = visitor.chrome.execute_script('return window.times')
        ActionChains(visitor.chrome, 0).move_to_element_with_offset(picture, 10, 10).click().perform()
        visitor.wait(lambda: 'held.' in visitor.one('#where').text, 'a click does not hold the pixel', 5)
        body = visitor.one('body')
        x, y = body.get_attribute('data-x'), body.get_attribute('data-y')
        ActionChains(visitor.chrome, 0).move_to_element_with_offset(picture, -40, -30).perform()
        time.sleep(0.3)
        require(body.get_attribute('data-x') == x, 'a held pixel moves')
        require(visitor.all('.untrained'), 'an untrained network does not say so')
        tiles = visitor.chrome.execute_script(TILES)
        square = all(abs(width - height) < 1.5 and width > 60 for width, height in tiles)
        require(len(tiles) == 8 and square, f'tiles are not square: {tiles}')
        bars = [len(section.find_elements(By.CSS_SELECTOR, '.bar')) for section in visitor.all('section')]
        require(bars == [2, 2], f'one colour bar for each scale, got {bars}')
        smallest = visitor.chrome.execute_script(LETTERS)
        require(smallest >= 12, f'letters of {smallest} pixels')
    visitor.tab('Code')
    visitor.wait(lambda: f'({x}, {y})' in visitor.one('#attention-code').text.replace('\n', ''),
                 'the code does not name the pixel', 10)
    visitor.tab('View')
    with visitor.inside():
        visitor.one('select[name=channel] option[value=all]').click()
        visitor.wait(lambda: len(visitor.all('.many .tile')) == 16, 'not all channels are shown', 5)
        visitor.all('.many figure')[3].click()
        visitor.wait(lambda: not visitor.all('.many .tile'), 'a channel cannot be chosen', 5)
        require(visitor.one('select[name=channel]').get_attribute('value') == '3', 'another channel was chosen')
    visitor.shoot('attention')
    visitor.tab('Code')
    visitor.wait(lambda: 'channel=3' in visitor.one('#attention-code').text.replace('\n', ''), 'no channel in the code',
                 10)
    visitor.shoot('code')
    visitor.tab('View')
    return times


def switch(visitor: Visitor) -> None:
    with visitor.inside():
        picture = visitor.one('.picture')
        visitor.chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
        time.sleep(0.5)
        ActionChains(visitor.chrome, 0).move_to_element(picture).click().perform()
        visitor.wait(lambda: 'held.' in visitor.one('#where').text, 'a click does not hold the pixel', 5)
    time.sleep(1)  # until it is told
    visitor.choose('block', 'stages.3.blocks.0')

    def block() -> bool:
        with visitor.inside():
            return 'stages.3.blocks.0' in visitor.one('section > p.quiet').text
    visitor.wait(block, 'the block is not shown')
    with visitor.inside():
        require('held' in visitor.one('#where').text, 'the pixel is lost with the block')
    visitor.choose('beside', 'none')

    def alone() -> bool:
        with visitor.inside():
            return len(visitor.all('section')) == 1
    visitor.wait(alone, 'the network beside it stays')
    visitor.choose('network', 'test_san_patchwise.shapes')

    def small() -> bool:
        with visitor.inside():
            return visitor.one('h2').text == 'test_san_patchwise.shapes'
    visitor.wait(small, 'the network is not shown')


def download(visitor: Visitor, name: str) -> None:
    for kind in ('png', 'svg'):
        visitor.press(visitor.one(f'#{name}-{kind}'))
        path = visitor.file(f'{name}*.{kind}')
        if kind == 'png':
            require(np.asarray(Image.open(path)).std() > 5, f'{path.name} is empty')
        else:
            require('<svg' in path.read_text()[:2000], f'{path.name} is no SVG')
        path.unlink()


def features(visitor: Visitor) -> None:
    visitor.tab('Features')
    panels = [f'#{which}-{panel} img' for panel in ('nearest', 'colours', 'likeness') for which in ('this', 'that')]
    visitor.wait(lambda: all(visitor.all(panel) for panel in panels), 'no features')
    visitor.wait(lambda: 'of the variance' in visitor.one('#features-note').text, 'no note', 20)
    before = visitor.one(panels[0]).get_attribute('src')
    picture = visitor.one(panels[1])
    visitor.chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    ActionChains(visitor.chrome, 0).move_to_element_with_offset(picture, 20, 20).click().perform()
    visitor.wait(lambda: visitor.one(panels[0]).get_attribute('src') != before, 'a click chooses no patch', 30)
    visitor.tab('Code')
    visitor.wait(lambda: 'picture=1' in visitor.one('#features-code').get_attribute('textContent'), 'not in the code',
                 10)
    visitor.tab('View')
    time.sleep(1)
    visitor.shoot('features')
    download(visitor, 'features')


def boxes(visitor: Visitor, picture: pathlib.Path | None) -> None:
    visitor.tab('Detections')
    visitor.wait(lambda: visitor.all('#found img'), 'nothing of the detector')
    if picture is not None:
        before = visitor.one('#found img').get_attribute('src')
        visitor.drop('#first-file', picture.name, picture.read_bytes())
        visitor.wait(lambda: visitor.one('#found img').get_attribute('src') != before, 'a dropped picture is not shown')
        visitor.wait(lambda: visitor.all('#look img'), 'nothing of what the backbone looks at')
        time.sleep(1)
        visitor.shoot('boxes')
    value = visitor.one('#least input[type=number]')
    value.clear()
    value.send_keys('0\n')
    visitor.chrome.execute_script("arguments[0].dispatchEvent(new Event('pointerup', {bubbles: true}))", value)
    visitor.wait(lambda: visitor.all('#look img'), 'nothing of what the backbone looks at')
    time.sleep(1)
    if picture is None:
        visitor.shoot('boxes')
    before = visitor.one('#look img').get_attribute('src')
    visitor.press(visitor.one('#box input'))
    visitor.wait(lambda: len(visitor.all(OPTIONS)) > 1, 'no other box to choose', 10)
    visitor.all(OPTIONS)[1].click()
    visitor.wait(lambda: visitor.one('#look img').get_attribute('src') != before, 'another box is not looked into', 30)
    download(visitor, 'boxes')


def drops(visitor: Visitor) -> None:
    visitor.tab('Attention')
    visitor.drop('#first-file', 'mine.png', png(120, 200, (200, 60, 40)))
    visitor.wait(lambda: visitor.title() == 'mine.png', 'a dropped picture is not shown')
    with visitor.inside():
        require('200 x 120 pixels' in visitor.one('#note').text, 'the picture has another size')
    for name, data, words in (
            ('broken.png', png(64, 64, (9, 9, 9))[:100], 'cannot be read as a picture'),
            ('words.png', b'these are words', 'cannot be read as a picture'),
            ('wide.png', png(8, 20_000, (9, 9, 9)), '20000 x 8 pixels'),
            ('heavy.png', os.urandom(21_000_000), '20')):
        visitor.drop('#first-file', name, data)
        visitor.words(words)
    visitor.press(visitor.all('#first-gallery .grid-container button')[2])
    visitor.wait(lambda: visitor.title() == 'coffee', 'the page does not go on after errors')


def two_at_once(first: Visitor, second: Visitor) -> None:
    for visitor, index in ((first, 1), (second, 3)):
        visitor.press(visitor.all('#first-gallery .grid-container button')[index])
    for visitor, name in ((first, 'astronaut'), (second, 'rocket')):
        visitor.wait(lambda visitor=visitor, name=name: visitor.title() == name, f'no {name} of two visitors')
    first.drop('#first-file', 'one.png', png(90, 90, (0, 90, 0)))
    second.drop('#first-file', 'two.png', png(120, 80, (0, 0, 90)))
    for visitor, name in ((first, 'one.png'), (second, 'two.png')):
        visitor.wait(lambda visitor=visitor, name=name: visitor.title() == name, f'no {name} of two visitors')


def one_file(visitor: Visitor, page: pathlib.Path) -> None:
    """The file of `attention --html`."""
    visitor.chrome.get_log('browser')  # a file that is too large is told there, too
    visitor.chrome.get(page.as_uri())
    visitor.wait(lambda: visitor.one('body').get_attribute('data-ready'), 'the file is not drawn', 30)
    ActionChains(visitor.chrome, 0).move_to_element_with_offset(visitor.one('.picture'), 30, 30).perform()
    before = visitor.one('#where').text
    ActionChains(visitor.chrome, 0).move_to_element_with_offset(visitor.one('.picture'), -30, -10).perform()
    visitor.wait(lambda: visitor.one('#where').text != before, 'the pixel does not follow', 5)
    for index in range(len(visitor.all('select[name=block] option'))):
        option = visitor.all('select[name=block] option')[index]
        name = option.get_attribute('value')
        option.click()
        visitor.wait(lambda name=name: name in visitor.one('section > p.quiet').text, f'no {name}', 5)
    wide = visitor.chrome.execute_script('return document.documentElement.scrollWidth')
    require(wide <= visitor.width, f'the file is {wide} pixels wide')
    loaded = visitor.chrome.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    require(all(name.startswith(('data:', 'blob:')) for name in loaded), f'the file loads {loaded}')
    entries = [entry['message'] for entry in visitor.chrome.get_log('browser') if entry['level'] == 'SEVERE']
    require(not entries, f'console of the file: {entries}')
    visitor.shoot('file')


def untrained_detector(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path] | None:
    try:
        import san_backbones.mm  # noqa: F401
        from tests.mm import small_configs
    except ImportError:
        return None
    import torch
    from mmengine.registry import MODELS
    config = small_configs.detection(folder)
    config.dump(folder / 'detector.py')
    torch.manual_seed(0)
    torch.save(dict(state_dict=MODELS.build(config.model).state_dict(), meta=dict(
        dataset_meta=dict(classes=small_configs.CLASSES))), folder / 'detector.pth')
    return folder / 'detector.py', folder / 'detector.pth'


def export(folder: pathlib.Path) -> pathlib.Path:
    import skimage.data
    import timm

    from san_backbones.viewer import attention_page
    model = timm.create_model('san10_patchwise.distilled', pretrained=True)
    path = folder / 'footprints.html'
    path.write_text(attention_page({'san10_patchwise.distilled': model}, skimage.data.chelsea(), size=224, title='cat'))
    return path


def for_docs(shots: pathlib.Path) -> None:
    """Makes the screenshots small enough for the documentation."""
    scales = {'attention-1280': 0.75, 'features-1280': 0.6, 'boxes-1280': 0.75, 'attention-390': 0.75}
    for name, scale in scales.items():
        with Image.open(shots / f'{name}.png') as shot:
            shot = shot.convert('RGB')
            if name == 'attention-390':
                shot = shot.crop((0, round(2.3 * shot.width), shot.width, 5 * shot.width))
            shot = shot.resize([round(side * scale) for side in shot.size], Image.Resampling.LANCZOS)
            shot.save(ROOT / 'docs' / 'static' / f'page-{name.partition("-1280")[0]}.jpg', quality=88)


def check(name: str, step: Callable[[], Any], wrong: list[str]) -> Any:
    try:
        return step()
    except Exception as error:  # selenium raises many kinds of errors
        line = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__][-1]
        wrong.append(f'{name}: {str(error).splitlines()[0]} ({type(error).__name__}, line {line})')
        print(wrong[-1], flush=True)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shots', type=pathlib.Path, metavar='FOLDER', help='keep screenshots')
    parser.add_argument('--config', type=pathlib.Path, metavar='FILE', help='of a detector, for its view')
    parser.add_argument('--checkpoint', type=pathlib.Path, metavar='FILE', help='its weights')
    parser.add_argument('--picture', type=pathlib.Path, metavar='FILE', help='to drop into the view of the detector')
    parser.add_argument('--docs', action='store_true', help='draw the pictures of docs/how-to/see-in-a-browser.md')
    parser.add_argument('--widths', type=int, nargs='+', default=WIDTHS, metavar='N', help='(default: %(default)s)')
    options = parser.parse_args()
    if options.docs and options.shots is None:
        parser.error('--docs needs --shots')
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        os.environ['GRADIO_TEMP_DIR'] = str(folder / 'uploads')
        from san_backbones.app import create, launch
        files = (options.config, options.checkpoint) if options.config else untrained_detector(folder)
        page = create(**dict(zip(('config', 'checkpoint'), files, strict=True)) if files else {})
        _, address, public = launch(page, prevent_thread_lock=True, quiet=True)
        require(public is None and urllib.request.urlopen(address).status == 200, 'the page is shared, or not there')
        exported = export(folder)
        for width in options.widths:
            (folder / str(width)).mkdir()
            visitor = Visitor(address, width, options.shots, folder / str(width))
            try:
                times = check(f'attention at {width}', lambda v=visitor: attention(v), wrong)
                if times:
                    print(f'{width} pixels wide: a footprint is drawn {statistics.median(times):.0f} ms after the '
                          f'pointer moved (median of {len(times)}), {max(times):.0f} ms at most')
                    if max(times) > LATENCY:
                        wrong.append(f'attention at {width}: {max(times):.0f} ms is more than {LATENCY}')
                        print(wrong[-1])
                check(f'downloads at {width}', lambda v=visitor: download(v, 'attention'), wrong)
                check(f'quiet at {width}', visitor.quiet, wrong)
                check(f'features at {width}', lambda v=visitor: features(v), wrong)
                if files:
                    check(f'boxes at {width}', lambda v=visitor: boxes(v, options.picture), wrong)
                check(f'quiet at {width}', visitor.quiet, wrong)
                check(f'drops at {width}', lambda v=visitor: drops(v), wrong)
                check(f'switches at {width}', lambda v=visitor: switch(v), wrong)
                if width == options.widths[-1]:
                    second = Visitor(address, width, None, folder / str(width))
                    try:
                        check('two visitors', lambda v=visitor, s=second: two_at_once(v, s), wrong)
                    finally:
                        second.chrome.quit()
                check(f'file at {width}', lambda v=visitor: one_file(v, exported), wrong)
            finally:
                visitor.chrome.quit()
        page.close()
    if options.docs:
        for_docs(options.shots)
    print(f'the page at {" and ".join(map(str, options.widths))} pixels: {len(wrong)} faults')
    return bool(wrong)


if __name__ == '__main__':
    sys.exit(main())
