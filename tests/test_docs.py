"""The book and what stands around it: pages are made as they should be, the check sees what is wrong, and the whole book is whole.

Needs `pip install emorl[docs]`, and Chromium for the pages as a reader sees them; without them those tests are skipped, visibly.
"""
import importlib, json, re, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

import pytest

root = Path(__file__).resolve().parents[1]
ini = ConfigParser(delimiters='=')
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)

@pytest.fixture
def rooms(monkeypatch):
    pytest.importorskip('docutils', reason='pip install emorl[docs]')
    monkeypatch.syspath_prepend(str(root/'docs'))
    return importlib.import_module('rooms')

@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(root/'tools'))
    return importlib.import_module

def code(text, outputs=()): return dict(cell_type='code', source=text, outputs=list(outputs), metadata={})
def about(rooms, text): return '\n'.join(next(iter(rooms.exports(dict(cells=[code('#| default_exp a'), code('#| export\n' + text)]))[1].values())))

# ---- tables from docments

@pytest.mark.parametrize('text, lines', [
    ("def f(\n    a:int,  # How many\n    *rest,\n    b:float|None=1e-6, # How far\n)->str:  # A word\n    'Say it.'",
     ['f(a, *rest, b=1e-6)', 'Say it.', '| `a` | `int` |  | How many |', '| `*rest` |  |  |  |', r'| `b` | `float\|None` | `1e-6` | How far |', '| *returns* | `str` |  | A word |']),
    ("def f(a, b): # not of a parameter\n    return a", ['f(a, b)']),
    ("@command\ndef f(\n    a:Param('A file', str, nargs='?')='x', # \n    *, c:bool=False, **more):\n    'Do.'", ["| `a` | `str` | `'x'` | A file |", '| `c` | `bool` | `False` |  |', '| `**more` |  |  |  |']),
    ("def f(é:int='ä'): pass", ["| `é` | `int` | `'ä'` |  |"]),
    ("@dataclass\nclass A(B):\n    'A thing.'\n    n:int=3 # Three\n    d:dict=field(default_factory=dict)\n    _hidden:int=0\n    @property\n    def size(self):\n        'How big.'\n    def grow(self, by:int): 'More.'\n    def _secret(self): pass",
     ['A thing.', 'A kind of `B`.', '| `n` | `int` | `3` | Three |', '| `d` | `dict` | `dict()` |  |', '`.size` How big.', '`.grow(by)` More.']),
    ("class A(nn.Module):\n    def __init__(self,\n        n:int, # So many\n    ): pass", ['A(n)', '| `n` | `int` |  | So many |'])])
def test_exports_are_told(rooms, text, lines):
    told = about(rooms, text)
    assert [o for o in lines if o not in told] == [], told
    assert '_' not in told and 'self' not in told and 'Module' not in told

def test_only_exports_are_told(rooms):
    module, told, values = rooms.exports(dict(cells=[code('#| default_exp m'), code('#| export\nx, y = 1, 2\nz = 3\n_w = 4\ndef _g(): pass'), code('#| exporti\ndef h(): pass'), code('def k(): pass')]))
    assert (module, told, values) == ('m', {}, ['z'])

def test_every_module_of_the_package_is_told(rooms):
    "What the static reading finds is what nbdev exports."
    for path in sorted((root/'nbs/api').glob('*.ipynb')):
        module, told, values = rooms.exports(json.loads(path.read_text(encoding='utf-8')))
        if not module: continue
        text = (root/'emorl'/(module.replace('.', '/') + '.py')).read_text(encoding='utf-8')
        promised = re.findall(r"'(\w+)'", re.search(r'__all__ = \[(.*?)\]', text, re.S)[1])
        assert set(promised) - {*told, *values} == set(), module
        assert set(told) - set(promised) == set(), module

# ---- cells and links

def test_cells_as_a_reader_sees_them(rooms):
    shown = rooms.shown
    assert shown(code('#| hide\n1')) is shown(code('#| default_exp a')) is None
    assert shown(code('#| export\n#| slow\na = 1'))['source'] == 'a = 1'
    assert shown(code('#| echo: false\n1'))['metadata']['tags'] == ['remove-input']
    assert shown(code('import a\nfrom b import c'))['metadata']['tags'] == ['hide-input'] and shown(code('%pip x'))['metadata']['tags'] == []
    widget = dict(output_type='display_data', metadata={}, data={'application/vnd.jupyter.widget-view+json': {}, 'text/plain': 'Box()'})
    assert [list(o['data']) for o in shown(code('x', [widget]))['outputs']] == [['text/markdown']]
    picture = dict(output_type='execute_result', metadata={'image/png': {'alt': 'A cat.'}}, data={'image/png': ''})
    assert shown(code('x', [picture]))['metadata']['mystnb'] == {'image': {'alt': 'A cat.'}} and 'mystnb' not in shown(code('x'))['metadata']

@pytest.mark.parametrize('link, new', [
    ('[a](nbs/api/00_core.ipynb#words)', '[a](/api/00_core.ipynb#words)'), ('![a](nbs/inspector.png)', '![a](/inspector.png)'), ('[a](Makefile)', '[a](HOST/blob/main/Makefile)'),
    ('[a](https://x.y/z)', '[a](https://x.y/z)'), ('[a](#here)', '[a](#here)'), ('[a](nowhere.ipynb)', '[a](nowhere.ipynb)')])
def test_links(rooms, link, new):
    app = SimpleNamespace(confdir=root/'docs', srcdir=root/'nbs', config=SimpleNamespace(html_theme_options={'source_repository': 'HOST'}))
    assert rooms.links(link, root, app) == new

# ---- the check

page = '<html><head><link rel="icon" href="i.svg">{}</head><body>{}</body></html>'
wrong_pages = [
    ('', '<a href="gone.html">x</a>', 'index.html leads to gone.html, which is not there'),
    ('', '<a href="#gone">x</a>', 'index.html leads to #gone, and nothing there is called gone'),
    ('', '<img src="gone.png">', 'index.html leads to gone.png, which is not there'),
    ('<script src="https://example.org/a.js"></script>', '', 'index.html loads https://example.org/a.js')]

def site(folder, head='', body=''):
    (folder/'index.html').write_text(page.format(head, body)); (folder/'search.html').write_text(page.format('', '<div id="search-results"><li><a href="#">x</a></li></div>'))
    (folder/'i.svg').write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    return folder

@pytest.mark.parametrize('head, body, said', wrong_pages)
def test_dead_links_are_seen(tool, tmp_path, head, body, said): assert list(tool('check_docs').dead_links(site(tmp_path, head, body))) == [said]

@pytest.mark.parametrize('body, said', [
    ('<p>fine</p>', []), ('<div class="math">x^2</div>', ['not typeset: x^2']), ('<div class="math"><mjx-container><mjx-merror>no such macro</mjx-merror></mjx-container></div>', ['TeX with an error: no such macro']),
    ('<div style="width:700px">x</div>', ['wider than the window: 7']), ('<script>console.error("oh")</script>', ['the console says oh']), ('<script>throw Error("oh")</script>', ['the page says oh']),
    ('<article><p>| a | |---|</p></article>', ['Markdown left as it was: | a']), ('<article><p>of $K$</p></article>', ['Markdown left as it was: of $K$']),
    ('<img src="i.txt">', ['i.txt: 404', 'not drawn']), ('<script>fetch("http://127.0.0.1:1/")</script>', ['is on another host'])])
def test_the_browser_sees(tool, tmp_path, body, said):
    if not chromium: pytest.skip('there is no Chromium')
    pytest.importorskip('playwright', reason='playwright is not installed')
    found = list(tool('check_docs').in_browser(site(tmp_path, '', body), chromium))
    assert [o for o in said if not any(o in f for f in found)] == [] and bool(found) == bool(said), found

def test_the_book_is_whole(tmp_path):
    pytest.importorskip('myst_nb', reason='pip install emorl[docs]')
    out = tmp_path/'book'
    built = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-d', tmp_path/'trees', '-c', root/'docs', root/'nbs', out], capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stdout + built.stderr
    checked = subprocess.run([sys.executable, root/'tools/check_docs.py', out], capture_output=True, text=True, timeout=900)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    text = (out/'api/13_objective.html').read_text(encoding='utf-8')
    assert 'id="emorl-objective-step-weights"' in text and 'default_exp' not in text and 'fastcore.test' not in text
    assert 'alt="Two scenes; every rectangle is outlined in the colour of its slot."' in (out/'api/2B_viz.html').read_text(encoding='utf-8')

# ---- what stands around it

def data(name): return pytest.importorskip('yaml').safe_load((root/name).read_text(encoding='utf-8'))

def test_citation():
    cite = data('CITATION.cff')
    assert str(cite['version']) == cfg['version']
    paper = cite['preferred-citation']
    assert [a['family-names'] for a in paper['authors']] == ['Emami', 'He', 'Ranka', 'Rangarajan'] and paper['year'] == 2021

def test_the_change_log_knows_the_version(): assert re.search(rf"^## .*\b{re.escape(cfg['version'])}\b", (root/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)

def test_conda_has_the_torch_that_pip_has():
    torch = next(o for o in cfg['requirements'].split() if o.startswith('torch'))
    assert torch.replace('torch', 'pytorch') in data('environment.yml')['dependencies']

def test_workflows():
    flows = {p.stem: data(p.relative_to(root)) for p in (root/'.github/workflows').glob('*.yml')}
    assert flows.keys() >= {'test', 'docs', 'release', 'audit'}
    matrix = flows['test']['jobs']['test']['strategy']['matrix']
    promised = re.findall(r"'(3\.\d+)'", (root/'setup.py').read_text(encoding='utf-8'))
    assert matrix['python'] == promised and {o.split('-')[0] for o in matrix['os']} == {'ubuntu', 'macos'}
    for name, flow in flows.items():
        assert flow['permissions'] == {'contents': 'read'}, f'{name}: what more a job needs, it says itself'
        for job in flow['jobs'].values(): assert not [s for s in job['steps'] if 'secrets.' in json.dumps(s)], f'{name}: trusted publishing needs no secret'

def test_licences(tool):
    pytest.importorskip('torch', reason='an environment for the book alone has none of the dependencies')
    found = tool('licenses').rows()
    assert {'torch', 'numpy', 'safetensors'} <= {n.lower() for n, *_ in found} and all(c for *_, c, _ in found)
