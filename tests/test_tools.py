"The tools that judge everything else: they must see what is wrong."
import importlib, json, os, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]

@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(root/'tools'))
    return importlib.import_module

@pytest.mark.parametrize('a, b, equal', [
    ('loss 1.234', 'loss 1.2345', True), ('loss 1.234', 'loss 1.244', False), ('loss 1.234', 'cost 1.234', False), ('-.5', '.5', False),
    ('tensor([ 0.1000, -0.0000])', 'tensor([0.1000, 0.0000])', True), ('3e-9', '-2e-8', True), ('1 2', '12', False), ('1 2', '1 2 3', False), ('nan', '1.', False)])
def test_numbers_agree_to_three_digits(tool, a, b, equal): assert tool('notebooks').same(a, b) == equal

def test_objects_have_no_address(tool):
    out = lambda s: [dict(output_type='execute_result', data={'text/plain': s})]
    assert tool('notebooks').text_of(out('<A at 0x7f12>')) == tool('notebooks').text_of(out('<A>'))

def notebook(path, *codes):
    from nbformat import v4, write
    nb = v4.new_notebook(cells=[v4.new_markdown_cell('# t\n\n> t\n- deterministic: true')])
    for code, said in codes: nb.cells.append(v4.new_code_cell(code, outputs=[v4.new_output('stream', name='stdout', text=said)]*bool(said)))
    write(nb, path)
    return path

@pytest.mark.parametrize('codes, error', [
    ([('print(1/3)', '0.3333\n')], None), ([('print(1/3)', '0.4\n')], 'where the page says'), ([('print(2)', '')], 'where the page says'),
    ([('1/0', '')], 'ZeroDivisionError'), ([('#| slow\n1/0', ''), ('a = 1', '')], None), ([('import os; os._exit(0)', '')], 'without a report'),
    ([('import os, atexit; _ = atexit.register(os._exit, 3)', '')], 'after the last cell'), ([('import time; time.sleep(99)', '')], 'stopped after')])
def test_runner_sees(tool, tmp_path, codes, error):
    page = notebook(tmp_path/'page.ipynb', *codes)
    res = tool('notebooks').child(page, timeout=2 if error == 'stopped after' else 100)
    assert (error in res['error']) if error else (res['error'] is None and res['ran'])

def test_runner_writes_in_place(tool, tmp_path):
    page = notebook(tmp_path/'page.ipynb', ('print(2)', '1\n'))
    assert not tool('notebooks').child(page, update=True)['error'] and not tool('notebooks').child(page)['error']
    assert json.loads(page.read_text())['cells'][1]['outputs'][0]['text'] == ['2\n']

def test_readme_check_sees(tool, tmp_path):
    (tmp_path/'README.md').write_text('old\n')
    differences = tool('readme').differences
    assert differences({'README.md': b'old\n'}, tmp_path) == ''
    assert '+new' in differences({'README.md': b'new\n'}, tmp_path)
    assert 'README_files/a.png is missing' in differences({'README.md': b'old\n', 'README_files/a.png': b''}, tmp_path)

def test_checks_count_what_failed(tool, monkeypatch, capsys):
    check = tool('check')
    def tests(): raise check.Failed('two were wrong', 3, 2)
    def export(): raise OSError('gone')
    tests.__doc__ = export.__doc__ = ''
    for f in (tests, export): monkeypatch.setattr(check, f.__name__, f)
    monkeypatch.setattr(sys, 'argv', ['check.py', 'export', 'tests'])
    assert check.main() == 1
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == '3 passed, 3 failed' and 'two were wrong' in said and 'OSError: gone' in said

@pytest.mark.skipif(os.name == 'nt', reason='needs make')
def test_make_refuses_an_old_python(tmp_path):
    for name in ('Makefile', 'settings.ini', 'setup.py'): (tmp_path/name).write_bytes((root/name).read_bytes())
    old = tmp_path/'python-old'
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.18\nexit 1\n'); old.chmod(0o755)
    p = subprocess.run(['make', 'demo', f'PYTHON={old}'], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode and 'needs Python 3.10 or newer' in p.stderr and 'Python 3.9.18' in p.stderr and not (tmp_path/'.venv').exists()
