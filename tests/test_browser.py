"""The inspector in a real browser: Chromium against Voila, and once against JupyterLab.

Needs Chromium (on Debian: apt-get install --no-install-recommends chromium) and `pip install emorl[inspect,dev]`; without them it is skipped, visibly.
Set EMORL_SCREENSHOTS to a folder to keep what the browser showed.
"""
import io, json, os, re, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import urlopen

import nbformat
import numpy as np
import pytest
from PIL import Image

chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
if not chromium: pytest.skip('there is no Chromium', allow_module_level=True)
playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
pytest.importorskip('voila', reason='Voila is not installed')

from emorl.checkpoint import load
from emorl.data.tetrominoes import tetrominoes_real
from emorl.inspect import free_port
from emorl.session import Choice, Session

flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
wait = 60_000 # ms; a kernel with torch takes some seconds to start, more where others compute

@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=flags)
        yield b
        b.close()

def serving(command, url, cwd=None, env=None):
    "Run a server until it is closed; yields its process once it answers."
    p = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        for _ in range(600):
            if p.poll() is not None: pytest.fail(f'{command[0]} ended: {p.stdout.read()[-2000:]}')
            try: socket.create_connection((url.hostname, url.port), 1).close(); break
            except OSError: time.sleep(.1)
        else: pytest.fail(f'nobody listens at {url.geturl()}')
        yield p
    finally:
        p.terminate()
        try: p.wait(20)
        except subprocess.TimeoutExpired: pass
        try: os.killpg(p.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError): pass

@pytest.fixture(scope='module')
def voila():
    "The inspector of the shipped model, as the command serves it."
    port = free_port()
    code = f'from emorl.inspect import serve; serve("tetrominoes_cpu", "tetrominoes_real", {port}, open_browser=False)'
    for _ in serving([sys.executable, '-c', code], urlparse(url := f'http://127.0.0.1:{port}/')): yield url

class Watched:
    "A page, and everything that went wrong in it."
    def __init__(self, browser, url, size=(1250, 1000), **options):
        self.page = browser.new_page(viewport=dict(width=size[0], height=size[1]), **options)
        self.errors, self.requests, self.failed, self.sent, host = [], [], [], [], urlparse(url).netloc
        self.page.on('websocket', lambda w: w.on('framesent', lambda data: self.sent.append(data.encode() if isinstance(data, str) else data)))
        self.page.on('console', lambda m: self.errors.append(m.text) if m.type == 'error' else None)
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))
        self.page.on('request', lambda r: self.requests.append(r.url))
        self.page.on('requestfailed', lambda r: self.failed.append(f'{r.url} {r.failure}'))
        self.page.on('response', lambda r: self.failed.append(f'{r.url} {r.status}') if r.status >= 400 else None)
        self.foreign = lambda: [u for u in self.requests if urlparse(u).scheme not in ('data', 'blob') and urlparse(u).netloc != host]
        self.page.goto(url, timeout=wait)

def picture(page, title): return page.locator(f'.emorl-tile:has(span:text-is("{title}")) img').first.get_attribute('src', timeout=wait)
def titles(page, row): return page.locator(f'.emorl-row:has(.emorl-label:text-is("{row}")) .emorl-tile > span').all_inner_texts()
def until(condition, what, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition(): return
        time.sleep(.05)
    pytest.fail(f'waited {seconds} s in vain: {what}')
def keep(page, name):
    if folder := os.environ.get('EMORL_SCREENSHOTS'): page.screenshot(path=Path(folder)/name)
def button(page, text): return page.get_by_role('button', name=text, exact=True)
contrast = r"""selector => { // of the text that is hardest to read, against what it stands on (WCAG asks for 4.5)
  const parts = s => s.match(/[\d.]+/g).map(Number)
  const light = s => parts(s).slice(0, 3).map(c => (c /= 255) <= .04045 ? c/12.92 : ((c + .055)/1.055)**2.4).reduce((sum, c, i) => sum + c*[.2126, .7152, .0722][i], 0)
  const under = e => { while (e && parts(getComputedStyle(e).backgroundColor)[3] === 0) e = e.parentElement; return e ? getComputedStyle(e).backgroundColor : 'rgb(255, 255, 255)' }
  const of = e => { const [a, b] = [light(getComputedStyle(e).color), light(under(e))]; return (Math.max(a, b) + .05)/(Math.min(a, b) + .05) }
  return Math.min(...[...document.querySelectorAll(selector)].filter(e => e.offsetParent && !e.disabled).map(of)) }"""
def slider(page, row): return page.locator(f'.widget-slider:has(label:text-is("{row}")) .noUi-handle')

@pytest.fixture(scope='module')
def windows():
    "The page that tests share, if there is one already."
    pages = []
    yield pages
    for w in pages: w.page.close()

@pytest.fixture
def opened(browser, voila, windows):
    "The inspector as it opens (in a new page if the test before left it otherwise); in the end, nothing must have gone wrong."
    def fresh(w): return 'reconstruction' in titles(w.page, 'scene') and titles(w.page, 'slots') == ['slot 0', 'slot 1', 'slot 2', 'slot 3'] and picture(w.page, 'image') == w.first
    if windows and not fresh(windows[0]): windows.pop().page.close()
    if not windows: windows.append(Watched(browser, voila))
    w = windows[0]
    w.page.locator('.widget-slider label:has-text("latent")').first.wait_for(timeout=wait)
    w.first = picture(w.page, 'image')
    yield w
    assert w.errors == [] and w.failed == [] and w.foreign() == []

def test_page_loads(opened):
    p = opened.page
    assert titles(p, 'slots') == titles(p, 'masks') == ['slot 0', 'slot 1', 'slot 2', 'slot 3']
    assert 'reconstruction' in titles(p, 'scene'), 'nothing was edited by only looking'
    assert p.locator('.widget-slider:has(label:has-text("latent"))').count() == 6
    for src in (picture(p, 'image'), picture(p, 'reconstruction')): assert src.startswith('data:image/png') and len(src) > 200
    assert p.locator('.widget-slider:has(label:text-is("step")) .widget-readout').inner_text() == 'I3', 'the last step, not the one that a play button starts from'
    drawn = p.locator('.emorl-tile img').first.evaluate('i => [i.complete, i.naturalWidth]')
    assert drawn == [True, 35]
    assert all(p.locator('img').evaluate_all('all => all.map(i => i.alt)')), 'every picture says what it shows'
    keep(p, 'inspector.png')

def test_a_dark_browser_gets_a_dark_page(opened):
    p = opened.page
    for scheme in ('dark', 'light'):
        p.emulate_media(color_scheme=scheme)
        ground = p.evaluate('getComputedStyle(document.body).backgroundColor')
        assert (int(re.search(r'\d+', ground)[0]) > 127) == (scheme == 'light'), f'{scheme}: the page is {ground}'
        for text in ('.emorl-label', '.emorl-tile > span', '.widget-label', '.widget-readout', '.widget-html-content', 'td', 'button.jupyter-button', 'input', 'select'):
            assert p.evaluate(contrast, text) > 4.5, f'{scheme}: {text}'
        keep(p, f'inspector-{scheme}.png')

def test_step_slider_changes_the_picture(opened):
    p = opened.page
    first = picture(p, 'reconstruction')
    slider(p, 'step').focus(); p.keyboard.press('ArrowLeft')
    until(lambda: picture(p, 'reconstruction') != first, 'another step has another picture')
    second = picture(p, 'reconstruction')
    p.keyboard.press('ArrowRight')
    until(lambda: picture(p, 'reconstruction') == first, 'and going back the first again')
    assert second != first
    until(lambda: p.locator('tr[style*="700"] td').first.inner_text() == 'I3', 'its numbers stand out')

def test_latent_slider_decodes_and_undo_takes_it_back(opened):
    p = opened.page
    first = picture(p, 'reconstruction')
    handle = p.locator('.widget-slider:has(label:has-text("latent")) .noUi-handle').first
    at, lo, hi = (float(handle.get_attribute(f'aria-value{a}')) for a in ('now', 'min', 'max'))
    handle.focus()
    number = p.locator('.widget-hbox:has(> .widget-slider label:has-text("latent")) > .widget-text input').first
    value = number.input_value()
    for _ in range(12): p.keyboard.press('ArrowRight' if at - lo < hi - at else 'ArrowLeft') # where there is room
    until(lambda: 'edited' in titles(p, 'scene') and picture(p, 'edited') != first, 'a moved latent changes the picture')
    until(lambda: number.input_value() != value, 'and says its value')
    def rests(): # the browser sends the last of many values only when those before are answered
        before = picture(p, 'edited'); time.sleep(1)
        return picture(p, 'edited') == before
    until(rests, 'the picture comes to rest')
    button(p, 'undo').click()
    until(lambda: 'reconstruction' in titles(p, 'scene') and picture(p, 'reconstruction') == first, 'undo takes all of it back')
    until(lambda: number.input_value() == value, 'and its number too')
    number.fill('2.5'); number.press('Enter')
    until(lambda: 'edited' in titles(p, 'scene') and picture(p, 'edited') != first, 'a value can be typed')
    button(p, 'undo').click()
    until(lambda: 'reconstruction' in titles(p, 'scene') and picture(p, 'reconstruction') == first, 'and be taken back')

def test_removing_a_slot_removes_it(opened):
    p = opened.page
    p.locator('.emorl-row:has(.emorl-label:text-is("slots")) .emorl-tile').nth(1).click()
    until(lambda: p.locator('.emorl-row:has(.emorl-label:text-is("slots")) .emorl-tile').nth(1).get_attribute('aria-pressed') == 'true', 'a click selects')
    button(p, 'remove').click()
    until(lambda: titles(p, 'slots') == titles(p, 'masks') == ['slot 0', 'slot 2', 'slot 3'], 'the slot is gone')
    button(p, 'reset').click()
    until(lambda: titles(p, 'slots') == ['slot 0', 'slot 1', 'slot 2', 'slot 3'], 'and back')

def test_a_click_on_a_pixel_selects_its_owner(opened):
    p = opened.page
    chosen = lambda: p.locator('.emorl-tile[aria-pressed="true"] span').first.inner_text()
    session = Session(load('tetrominoes_cpu'), tetrominoes_real())
    session.open(Choice(0))
    for x, y in [(10, 95), (52, 5), (95, 95)]: # three corners, three objects in this scene
        p.locator('.emorl-tile img').first.click(position=dict(x=x, y=y))
        until(lambda: chosen() == f'slot {session.owner(x*35//104, y*35//104)}', 'the slot that owns this corner')
    p.locator('.emorl-tile').nth(7).focus(); p.keyboard.press('Enter')
    until(lambda: chosen() == p.locator('.emorl-tile > span').nth(7).inner_text(), 'the keyboard selects a slot too')
    time.sleep(1) # sliders were put on every slot in turn, which browsers are not to answer
    assert 'reconstruction' in titles(p, 'scene'), 'nothing was edited by only looking'

def test_looking_is_no_edit(opened):
    p = opened.page
    opened.sent.clear()
    tiles = p.locator('.emorl-row:has(.emorl-label:text-is("slots")) .emorl-tile')
    for _ in range(8): # faster than the browser answers
        for k in (1, 2, 0): tiles.nth(k).click(); time.sleep(.08)
        time.sleep(.8)
        assert 'reconstruction' in titles(p, 'scene')
    told = [set(json.loads(t)) for frame in opened.sent for t in re.findall(rb'"method":"update","state":(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})', frame)]
    assert len(told) >= 12 and set.union(*told) == {'clicked'}, 'the kernel hears of clicks, and of nothing that the browser rounded'

def files(pixels):
    file = io.BytesIO(); Image.fromarray(pixels).save(file, 'PNG')
    return dict(name='mine.png', mimeType='image/png', buffer=file.getvalue())

def test_upload(opened):
    p = opened.page
    first = picture(p, 'image')
    def choose(file):
        with p.expect_file_chooser() as chooser: p.locator('button.jupyter-widgets:has-text("upload")').click()
        chooser.value.set_files(file)
    choose(files(np.zeros((20, 30, 3), np.uint8)))
    until(lambda: p.locator('[role=alert]').count() and '30 wide and 20 high' in p.locator('[role=alert]').inner_text(), 'a picture of a wrong size is refused in a sentence')
    choose(dict(name='words.png', mimeType='image/png', buffer=b'no picture'))
    until(lambda: 'not a picture' in p.locator('[role=alert]').inner_text(), 'what is no picture too')
    assert picture(p, 'image') == first
    choose(files(tetrominoes_real().batch([6]).image[0].transpose(1, 2, 0)))
    until(lambda: picture(p, 'image') != first and not p.locator('[role=alert]').count(), 'a right one is shown')

def test_files_are_handed_over(opened):
    p = opened.page
    for kind, head in (('PNG', b'\x89PNG'), ('GIF', b'GIF8'), ('npz', b'PK')):
        with p.expect_download(timeout=wait) as d: button(p, kind).click()
        assert d.value.suggested_filename == f'slots-0-I3.{kind.lower()}' and Path(d.value.path()).read_bytes().startswith(head)

def test_a_second_image_stays_when_the_step_changes(opened):
    p = opened.page
    first = picture(p, 'reconstruction')
    button(p, 'put beside').click()
    until(lambda: titles(p, 'second')[:2] == ['second image', 'painted'], 'a second image is there')
    slider(p, 'step').focus(); p.keyboard.press('ArrowLeft')
    until(lambda: picture(p, 'reconstruction') != first, 'another step')
    assert titles(p, 'second')[:2] == ['second image', 'painted']
    p.keyboard.press('ArrowRight'); until(lambda: picture(p, 'reconstruction') == first, 'and back')
    button(p, 'undo').click(); until(lambda: not titles(p, 'second'), 'undo takes it away')

def test_ctrl_c_ends_the_server_and_its_kernels(browser):
    port = free_port()
    code = f'from emorl.inspect import serve; serve("tetrominoes_cpu", "tetrominoes_real", {port}, open_browser=False)'
    for p in serving([sys.executable, '-c', code], urlparse(url := f'http://127.0.0.1:{port}/')):
        urlopen(url, timeout=60).read() # whole: a kernel that is ended at work can say what it could not send
        os.killpg(p.pid, signal.SIGINT) # what Ctrl-C sends to all of a terminal's foreground
        p.wait(30)
        said = p.stdout.read()
        assert p.returncode == 0 and "Traceback" not in said, said

def test_jupyterlab(browser, tmp_path):
    "The same widget in a notebook; Lab is only asked about what this package adds to it."
    source = "import emorl\nfrom emorl.data.tetrominoes import tetrominoes_real\nfrom emorl.inspect import SlotInspector\nSlotInspector(emorl.load('tetrominoes_cpu'), tetrominoes_real())"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata={'kernelspec': {'name': 'python3', 'display_name': 'Python 3'}}), tmp_path/'a.ipynb')
    port = free_port()
    env = os.environ | {k: str(tmp_path/k) for k in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR')}
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', f'--port={port}', '--ServerApp.port_retries=0', '--IdentityProvider.token=', '--LabApp.news_url=', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    for _ in serving(command, urlparse(url := f'http://127.0.0.1:{port}/'), tmp_path, env):
        w = Watched(browser, url + 'lab/tree/a.ipynb', (1400, 1100)); p = w.page
        cell = p.locator('.jp-CodeCell').first
        cell.wait_for(timeout=wait)
        for _ in range(6): # Lab swallows keys until it is ready
            if (asks := p.locator('.jp-Dialog button.jp-mod-accept')).count(): asks.first.click() # which kernel, if it was too early
            try: p.locator('.jp-CodeCell .cm-content').first.click(timeout=10_000); p.keyboard.press('Shift+Enter'); p.wait_for_selector('.emorl-tile', timeout=20_000); break
            except playwright.TimeoutError: pass
        first = picture(p, 'reconstruction')
        slider(p, 'step').focus(); p.keyboard.press('ArrowLeft')
        until(lambda: picture(p, 'reconstruction') != first, 'the step slider changes the picture')
        keep(p, 'jupyterlab.png')
        p.close()
        assert [e for e in w.errors if re.search('emorl|anywidget|widget', e, re.I)] == [] and w.foreign() == []
