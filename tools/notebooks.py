"""Run every notebook once, as `nbdev_test` would, and hold its text to what is committed.

    python tools/notebooks.py                     # run all, compare the pages tagged `deterministic: true`
    python tools/notebooks.py --update [PATHS]    # run and write the outputs back in place
    python tools/notebooks.py --flags slow        # also the cells marked `#| slow`

Each notebook runs in a process of its own, with one torch thread, so that pages cannot lean on each other. The comparison
is made only in the reference environment (tools/reference.json): numbers to three digits, other text exactly, images not at all.
"""
import argparse, json, math, os, platform, re, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

root = Path(__file__).resolve().parents[1]
number = re.compile(r'[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?', re.I)

def reference_differences():
    "What about this environment differs from the one that wrote the committed outputs."
    ref = json.loads((root/'tools/reference.json').read_text())
    here = {'python': '.'.join(platform.python_version_tuple()[:2]), 'machine': platform.machine(), 'system': platform.system()}
    here |= {k: version(k).split('+')[0] for k in ref if k not in here}
    return [f'{k} {here[k]} (reference {v})' for k, v in ref.items() if here[k] != v]

def text_of(outputs):
    "The text a reader sees in a cell's outputs; widgets and pictures stand as their kind only."
    res = []
    for o in outputs:
        if o['output_type'] == 'stream': res.append(''.join(o['text']))
        elif o['output_type'] == 'error': res.append(f"{o['ename']}: {o['evalue']}")
        elif any(k.startswith(('image/', 'application/vnd.jupyter.widget')) for k in o['data']): res.append('<picture>')
        else: res.append(''.join(o['data'].get('text/markdown') or o['data'].get('text/plain', '')))
    return re.sub(r'0x[0-9a-f]{6,}', '0x', '\n'.join(s.rstrip() for s in res))

def same(a, b, rel=2e-3, tiny=1e-6):
    "Equal text, but for numbers that agree to three digits (below `tiny` they are rounding error)."
    if number.sub('#', a) != number.sub('#', b): return False
    close = lambda x, y: math.isclose(x, y, rel_tol=rel, abs_tol=tiny)
    return all(close(float(x), float(y)) for x, y in zip(number.findall(a), number.findall(b)))

def run_notebook(path, flags, update, compare):
    "Execute one notebook in this process. Returns seconds and what went wrong."
    os.environ['IN_TEST'] = '1'
    import warnings; warnings.filterwarnings('ignore', category=SyntaxWarning)
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from fastcore.basics import str2bool
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    front = getattr(nb, 'frontmatter_', {})
    if str2bool(front.get('skip_exec', False)): return 0, None, 'skip_exec'
    skip = set(get_config().tst_flags.split()) - set(flags)
    def skipped(cell):
        if cell.cell_type != 'code': return True
        direc = getattr(cell, 'directives_', {}) or {}
        return 'nbdev_export(' in cell.source or direc.get('eval:', [''])[0].lower() == 'false' or bool(skip & direc.keys())
    old = {c.id: c.get('outputs', []) for c in nb.cells if c.cell_type == 'code'}
    ran, start = [], time.time()
    for c in nb.cells:
        if c.cell_type == 'code' and not skipped(c): c.outputs = []; ran.append(c)
    shell = CaptureShell(path, mpl_format='png')
    os.chdir(path.parent)
    try: shell.run_all(nb, exc_stop=True, preproc=skipped)
    except BaseException: return time.time() - start, shell.prettytb(fname=path.relative_to(root)), None
    new = {c.id: c.get('outputs', []) for c in ran}
    note = None
    if update:
        raw = read_nb(path)
        for c in raw.cells:
            if c.cell_type == 'code' and c.id in new: c.outputs, c.execution_count = new[c.id], None
        write_nb(raw, path)
    elif str2bool(front.get('deterministic', False)):
        if not compare: note = 'outputs not compared'
        else:
            for i, (k, outs) in enumerate(new.items()):
                a, b = text_of(old[k]), text_of(outs)
                if not same(a, b): return time.time() - start, f'code cell {i} ({k}) printed\n{b}\nwhere the page says\n{a}\n(`make notebooks` refreshes it)', None
    return time.time() - start, None, note

def child(path, args):
    env = os.environ | {'OMP_NUM_THREADS': '1', 'MPLCONFIGDIR': os.environ.get('MPLCONFIGDIR', str(root/'.venv/.matplotlib'))}
    cmd = [sys.executable, __file__, '--one', str(path), '--flags', args.flags] + ['--update']*args.update
    p = subprocess.run(cmd, capture_output=True, text=True, env=env, cwd=root)
    try: res = json.loads(p.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError): res = dict(seconds=0, error=f'exit {p.returncode}\n{p.stderr[-3000:]}', note=None)
    if p.returncode and not res['error']: res['error'] = f'exit {p.returncode} after the last cell\n{p.stderr[-3000:]}'
    name = path.relative_to(root/'nbs')
    print(f"{'FAIL' if res['error'] else 'ok  '} {name} {res['seconds']:.0f} s" + (f" ({res['note']})" if res['note'] else ''), flush=True)
    if res['error']: print(res['error'], flush=True)
    return not res['error']

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('paths', nargs='*', type=Path); p.add_argument('--update', action='store_true'); p.add_argument('--flags', default='')
    p.add_argument('--workers', type=int, default=2); p.add_argument('--one', type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    differs = reference_differences()
    if args.one:
        seconds, error, note = run_notebook(args.one.resolve(), args.flags.split(), args.update, not differs)
        print('\n' + json.dumps(dict(seconds=seconds, error=error, note=note)))
        return 0
    nbs = [f.resolve() for f in args.paths] or sorted(f for f in (root/'nbs').rglob('*.ipynb') if not any(x.startswith(('.', '_')) for x in f.relative_to(root).parts))
    if differs and not args.update: print('Outputs are not compared; not the reference environment: ' + ', '.join(differs))
    with ThreadPoolExecutor(args.workers) as ex: ok = list(ex.map(lambda f: child(f, args), nbs))
    print(f'{sum(ok)} passed, {len(ok) - sum(ok)} failed')
    return int(not all(ok))

if __name__ == '__main__': sys.exit(main())
