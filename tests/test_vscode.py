"""The widgets as VS Code shows them: in the very bundle that its Jupyter extension puts into a notebook's outputs, in a real browser, with a real kernel.

VS Code's own are the bundle (widget manager, controls, the kernel's connection; from the npm registry, checked against the hash below) and anywidget's AMD script, found and loaded as VS Code does it.
vscode_page.html stands in for what surrounds them: a sandboxed page whose kernel is out of reach but for messages, the theme's colours, and links to bytes that are not followed.
Needs what test_browser.py needs, and the npm registry once; without them it is skipped, visibly. EMORL_SCREENSHOTS names a folder to keep what the browser showed.
"""
import base64, hashlib, io, json, os, re, shutil, subprocess, sys, tarfile
from pathlib import Path
from urllib.parse import quote, urlencode, urlparse
from urllib.request import Request, urlopen

import pytest
from jupyter_core.paths import jupyter_path

from test_browser import (Watched, browser, button, contrast, free_port, keep, opened, serving, titles, until, wait, windows,
    test_a_click_on_a_pixel_selects_its_owner, test_a_second_image_stays_when_the_step_changes, test_latent_slider_decodes_and_undo_takes_it_back, test_looking_is_no_edit, test_page_loads,
    test_removing_a_slot_removes_it, test_step_slider_changes_the_picture, test_upload)

version, digest = '1.0.9', 'bocCThfa4JDIDd7qCFAfW3HpzHfTLYxOTpTbiDfw4DXOUjKHnr6ObkMBiIkuzYPRybh5bY4FhYLemuDuTvIbpQ=='
inspect = "import emorl\nfrom emorl.data.tetrominoes import tetrominoes_real\nfrom emorl.inspect import SlotInspector\nSlotInspector(emorl.load('tetrominoes_cpu'), tetrominoes_real())"
explore = inspect.replace('emorl.inspect', 'emorl.monitor').replace('SlotInspector', 'RefinementExplorer')
on_tint = contrast.replace('[3] === 0', '[3] < .5') # VS Code tints every second row of a table, so lightly that what is below counts
sandbox = 'sandbox allow-same-origin allow-pointer-lock allow-scripts allow-downloads'

def registry():
    "Where npm looks for a package of this scope."
    npm = shutil.which('npm')
    said = subprocess.run([npm, 'config', 'get', '@vscode:registry', 'registry'], capture_output=True, text=True, timeout=60).stdout if npm else ''
    if not (found := re.search(r'https?://\S+', said)): pytest.skip('there is no npm to say where its registry is')
    return found[0].rstrip('/')

@pytest.fixture(scope='module')
def bundle(request):
    "VS Code's bundle, fetched once; a last line hands out its connection to a kernel, which VS Code builds in a second time from the same source."
    kept = request.config.cache.mkdir('vscode')/f'jupyter-ipywidgets8-{version}.tgz'
    try: data = kept.read_bytes() if kept.exists() else urlopen(f'{registry()}/@vscode/jupyter-ipywidgets8/-/{kept.name}', timeout=60).read()
    except (OSError, subprocess.SubprocessError) as e: pytest.skip(f'the npm registry cannot be reached: {e}')
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != digest: kept.unlink(missing_ok=True); pytest.fail(f'{kept.name} is not the file that was looked at')
    kept.write_bytes(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as t: script = t.extractfile('package/dist/ipywidgets.js').read().decode()
    return script + '\nexport const kernels = __webpack_require__(5089), servers = __webpack_require__(1089)\n'

def mapping(script):
    "Which module is in which file, as VS Code reads it from an `extension.js`: by its text, for it is not run."
    found = re.search(r'require(?:js)?\??\.config\(\{(.*?)\)', script, re.S)
    inner = re.sub(r'//.*', '', found[1]).split('{')[-1].split('}')[0] if found else ''
    pairs = [p.split(':', 1) for p in inner.split(',') if ':' in p]
    return {k.strip().strip('\'"'): v.strip().strip('\'"') for k, v in pairs}

def lay_out(folder, bundle):
    "All that the page loads."
    here = next(Path(p) for p in jupyter_path('nbextensions') if (Path(p)/'anywidget').is_dir())
    shutil.copytree(here, folder/'nbextensions')
    shutil.copy(Path(__file__).with_name('vscode_page.html'), folder)
    shutil.copy(next(p for r in jupyter_path('voila/templates/base/static') if (p := Path(r)/'require.min.js').exists()), folder)
    (folder/'ipywidgets.js').write_text(bundle)
    scripts = {}
    for e in (folder/'nbextensions').glob('*/extension.js'): scripts |= {k: v for k, v in mapping(e.read_text()).items() if not k.startswith(('@jupyter-widgets/', 'jupyter-js-widgets'))}
    (folder/'scripts.json').write_text(json.dumps(scripts))

@pytest.fixture(scope='module')
def notebook(bundle, tmp_path_factory):
    "Code of a cell -> address of a page that runs it and shows its output; all in one kernel."
    folder = tmp_path_factory.mktemp('vscode')
    (static := folder/'static').mkdir(); lay_out(static, bundle)
    env = os.environ | {k: str(folder/k) for k in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR')}
    port = free_port()
    command = [sys.executable, '-m', 'jupyter_server', '--no-browser', '--allow-root', f'--port={port}', '--ServerApp.port_retries=0', '--IdentityProvider.token=', '--ServerApp.disable_check_xsrf=True',
               f'--ServerApp.extra_static_paths={static}', f'--ServerApp.tornado_settings={dict(headers={"Content-Security-Policy": sandbox})}']
    for _ in serving(command, urlparse(url := f'http://127.0.0.1:{port}/'), folder, env):
        kernel = json.load(urlopen(Request(url + 'api/kernels', b'{}', method='POST'), timeout=60))['id']
        yield lambda code: f'{url}static/vscode_page.html?' + urlencode(dict(kernel=kernel, code=code), quote_via=quote)

@pytest.fixture(scope='module')
def voila(notebook):
    "In Voila's place, for the tests that test_browser.py lends."
    return notebook(inspect)

@pytest.fixture(autouse=True)
def own_folder(monkeypatch):
    if folder := os.environ.get('EMORL_SCREENSHOTS'): (own := Path(folder)/'vscode').mkdir(exist_ok=True); monkeypatch.setenv('EMORL_SCREENSHOTS', str(own))

def test_vs_code_finds_the_script_of_anywidget(tmp_path, bundle):
    lay_out(tmp_path, bundle)
    scripts = json.loads((tmp_path/'scripts.json').read_text())
    assert scripts == {'anywidget': 'nbextensions/anywidget/index'} and (tmp_path/(scripts['anywidget'] + '.js')).is_file()

@pytest.mark.parametrize('ground', ['on-white', 'on-theme'])
def test_text_is_legible_in_every_theme(opened, ground):
    "VS Code's Jupyter extension puts a widget on white whatever the theme; people with a dark one make that transparent, and tell ipywidgets the theme's colour."
    p = opened.page
    for theme in ('vscode-dark', 'vscode-light'):
        p.evaluate('names => document.body.className = names', f'{theme} {ground}')
        for text in ('.emorl-label', '.emorl-tile > span', '.widget-label', '.widget-readout', '.widget-html-content', 'td', 'button.jupyter-button', 'input', 'select'):
            assert p.evaluate(on_tint, text) > 4.5, f'{theme}: {text}'
        keep(p, f'{theme}-{ground}.png')

def test_files_are_handed_over(opened):
    p = opened.page
    for kind, head in (('PNG', '\x89PNG'), ('GIF', 'GIF8'), ('npz', 'PK')):
        p.evaluate('saved.length = 0'); button(p, kind).click()
        p.wait_for_function('saved.length', timeout=wait)
        name, start = p.evaluate('saved[0]')
        assert name == f'slots-0-I3.{kind.lower()}' and start.startswith(head)

def test_refinement_explorer(browser, notebook):
    w = Watched(browser, notebook(explore)); p = w.page
    tracks = p.locator('.widget-html-content img').first
    first = tracks.get_attribute('src', timeout=wait)
    assert tracks.evaluate('i => i.decode().then(() => i.naturalWidth)') > 100
    p.locator('.widget-slider .noUi-handle').focus(); p.keyboard.press('ArrowRight')
    until(lambda: tracks.get_attribute('src') != first, 'another estimate stands out')
    keep(p, 'explorer.png'); p.close()
    assert w.errors == [] and w.failed == [] and w.foreign() == []

def test_training_monitor(browser, notebook, tmp_path):
    lines = tmp_path/'metrics.jsonl'
    def write(*steps): lines.write_text(''.join(json.dumps(dict(step=s, NLL=-100.*s, KL=10.*s)) + '\n' for s in steps))
    write(1, 2)
    w = Watched(browser, notebook(f'from emorl.monitor import TrainingMonitor\nTrainingMonitor({str(tmp_path)!r}, .5)')); p = w.page
    curves = p.locator('.widget-html-content img').first
    first = curves.get_attribute('src', timeout=wait)
    write(1, 2, 3)
    until(lambda: curves.get_attribute('src') != first and 'step 3' in p.locator('#container').inner_text(), 'it looks again by itself')
    keep(p, 'training.png'); p.close()
    assert w.errors == [] and w.failed == [] and w.foreign() == []
