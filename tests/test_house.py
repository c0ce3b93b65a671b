"The house rules: floors, and what every page must have and must not hold."
import ast, json, re
from configparser import ConfigParser
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
pages = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
ini = ConfigParser(delimiters='='); ini.read(root/'settings.ini', encoding='utf-8')
own = '{user}/{repo}'.format(**ini['DEFAULT']) # Where the badges and links of pages lead
named = dict(argvalues=pages, ids=lambda p: p.relative_to(root/'nbs').as_posix())

def cells(page, kind=None): return [c for c in json.loads(page.read_text(encoding='utf-8'))['cells'] if kind in (None, c['cell_type'])]
def source(cell): return ''.join(cell['source'])

# ---- floors: a module's floor is the tens digit of the page that exports it; it imports only from strictly lower floors

def floors(nbs):
    "Module -> floor; a module exported by two pages is a mistake."
    res = {}
    for page in sorted(nbs.rglob('*.ipynb')):
        found = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(source(c) for c in cells(page, 'code')), re.M)
        if not found: continue
        number = re.match(r'(\d)[0-9A-Z]_', page.name)
        assert number, f'{page.name} exports {found[1]} but has no number'
        assert found[1] not in res, f'{found[1]} is exported by two pages'
        res[found[1]] = int(number[1])
    return res

def imported(path, module, modules):
    "The package's modules (or packages) that a file imports, at its top or inside its functions."
    package = 'emorl.' + module if path.name == '__init__.py' else f'emorl.{module}'.rpartition('.')[0]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split('.')[:len(package.split('.')) - node.level + 1] if node.level else []
            base = '.'.join(above + [node.module]*bool(node.module))
            names = [f'{base}.{a.name}' if f'{base}.{a.name}'.removeprefix('emorl.') in modules else base for a in node.names]
        else: continue
        yield from {n.removeprefix('emorl').lstrip('.') for n in names if n.split('.')[0] == 'emorl'}

def violations(nbs, lib):
    "Sentences, one per import that breaks the rule."
    floor = floors(nbs)
    for path in sorted(lib.rglob('*.py')):
        module = '.'.join(path.relative_to(lib).with_suffix('').parts)
        if path.name in ('__init__.py', '_modidx.py'): continue
        if module not in floor: yield f'{module} is exported by no page'; continue
        for other in sorted(imported(path, module, floor)):
            if other not in floor: yield f'{module} imports {other or "emorl itself"}, which has no floor'
            elif floor[other] >= floor[module]: yield f'{module} (floor {floor[module]}) imports {other} (floor {floor[other]})'

def test_floors(): assert list(violations(root/'nbs', root/'emorl')) == []

def test_something_is_on_a_floor(): assert floors(root/'nbs').get('core') == 0

@pytest.mark.parametrize('line, wrong', [
    ('from ..core import a', None), ('from ..layers import b', None), ('from emorl.layers import b', None), ('import torch, numpy', None), ('from emorlish import x', None),
    ('from ..train import fit', 'data.scenes (floor 2) imports train (floor 6)'),
    ('from .sprites import c', 'data.scenes (floor 2) imports data.sprites (floor 2)'),
    ('from . import sprites', 'data.scenes (floor 2) imports data.sprites (floor 2)'),
    ('from .. import train', 'data.scenes (floor 2) imports train (floor 6)'),
    ('from .. import load', 'data.scenes imports emorl itself, which has no floor'),
    ('import emorl.train as t', 'data.scenes (floor 2) imports train (floor 6)'),
    ('from emorl.train import fit', 'data.scenes (floor 2) imports train (floor 6)'),
    ('def f():\n    from ..train import fit', 'data.scenes (floor 2) imports train (floor 6)'),
    ('from ..gone import x', 'data.scenes imports gone, which has no floor')])
def test_floor_checker_sees(line, wrong, tmp_path):
    def page(name, module):
        code = dict(cell_type='code', source=[f'#| default_exp {module}'], outputs=[])
        (tmp_path/'nbs').mkdir(exist_ok=True); (tmp_path/'nbs'/name).write_text(json.dumps(dict(cells=[code])))
        path = (tmp_path/'emorl').joinpath(*module.split('.')).with_suffix('.py')
        path.parent.mkdir(parents=True, exist_ok=True); path.write_text(''); return path
    page('00_core.ipynb', 'core'); page('10_layers.ipynb', 'layers'); page('2A_sprites.ipynb', 'data.sprites'); page('60_train.ipynb', 'train')
    page('20_scenes.ipynb', 'data.scenes').write_text(line)
    assert list(violations(tmp_path/'nbs', tmp_path/'emorl')) == [wrong]*bool(wrong)

# ---- pages

machine = re.compile(r'(?<![\w.~])/(?:work|root|home|Users)/\w+')
outside = re.compile(r'site-packages|(?<![\w.])/(?:tmp|var|opt|usr)/\w+|\.venv/')
registry = re.compile(r'https?://[\w.:-]*(?:pypi|pythonhosted|npmjs)|Looking in indexes|--(?:extra-)?index-url[ =]+https?:', re.I)

def output_text(page): return '\n'.join(json.dumps({k: v for k, v in (o.get('data') or o).items() if not k.startswith('image/')}) for c in cells(page, 'code') for o in c['outputs'])

@pytest.mark.parametrize('page', **named)
def test_page_is_fit_to_commit(page):
    everything = '\n'.join(map(source, cells(page))) + output_text(page)
    assert not [o['ename'] for c in cells(page, 'code') for o in c['outputs'] if o['output_type'] == 'error'], 'a committed output is an error'
    for pattern, what in [(machine, 'a path of a machine'), (registry, 'the host of a package registry')]:
        assert not pattern.findall(everything), f'{what} stands in the page'
    assert not outside.findall(output_text(page)), 'a path of the machine that ran it stands in an output'
    assert page.stat().st_size < 1_000_000, f'{page.stat().st_size/1e6:.1f} MB: make the pictures smaller'

@pytest.mark.parametrize('page', **named)
def test_page_has_a_title(page):
    lines = source(cells(page)[0]).splitlines()
    assert cells(page)[0]['cell_type'] == 'markdown' and lines[0].startswith('# '), 'the first cell is `# title`'
    assert any(o.startswith('> ') for o in lines), 'under the title stands `> one line`'

@pytest.mark.parametrize('page', [p for p in pages if p.parent.name == 'api'], ids=lambda p: p.name)
def test_api_page_tells_shows_and_asserts(page):
    code = [source(c) for c in cells(page, 'code')]
    if not any(re.search(r'^#\|\s*exports?\b', s, re.M) for s in code): return
    shown = [s for s in code if not re.search(r'^#\|\s*(hide|exporti?|default_exp)\b', s, re.M)]
    assert sum(len(source(c)) for c in cells(page, 'markdown')[1:]) > 200, 'no prose says why'
    assert any(c['outputs'] for c in cells(page, 'code')), 'it shows nothing'
    assert any(re.search(r'\bassert\b|\btest_\w+\(|assert_close|assert_equal', s) for s in shown), 'it asserts nothing where a reader sees it'

@pytest.mark.parametrize('path', sorted(p for p in (root/'emorl').rglob('*.py') if p.name[0] != '_'), ids=lambda p: p.relative_to(root).as_posix())
def test_definitions_are_short(path):
    found = [n for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert [f'{n.name}: {n.end_lineno - n.lineno + 1} lines' for n in found if n.end_lineno - n.lineno >= 40] == []

@pytest.mark.parametrize('page', [p for p in pages if p.parent.name == 'tutorials'], ids=lambda p: p.name)
def test_tutorial_opens_in_colab(page):
    assert f'https://colab.research.google.com/github/{own}/blob/main/{page.relative_to(root).as_posix()})' in source(cells(page)[0])

@pytest.mark.parametrize('page', **named)
def test_links_into_the_own_repository_lead_somewhere(page):
    links = re.findall(rf'github(?:\.com)?/{own}/(?:blob|tree)/main/([^)\s#"]+)', '\n'.join(map(source, cells(page, 'markdown'))))
    assert [o for o in links if not (root/o).exists()] == []

# ---- the front page

def test_readme_needs_nothing_from_this_machine():
    text = (root/'README.md').read_text(encoding='utf-8')
    assert not machine.findall(text) and not registry.findall(text)
    links = [o for o in re.findall(r'\]\(([^)\s]+)\)', text) if not re.match(r'https?:|#|mailto:', o)]
    assert [o for o in links if not (root/o.split('#')[0]).exists()] == [], 'a link leads nowhere'
