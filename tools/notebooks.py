"""Run every notebook once, as `nbdev_test` would, and hold its text to what is committed.

    python tools/notebooks.py                     # run all, compare the pages tagged `deterministic: true`
    python tools/notebooks.py --update [PATHS]    # run and write the outputs back in place
    python tools/notebooks.py --flags slow        # also the cells marked `#| slow`

Each notebook runs in a process of its own, with one torch thread, so that pages cannot lean on each other. The comparison
is made only in the reference environment (tools/constraints.txt): numbers to three digits, white space not at all, other text
exactly; of a picture only that there is one.
"""
import argparse, json, math, os, platform, re, signal, subprocess, sys, tempfile, time, traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

root = Path(__file__).resolve().parents[1]
number = re.compile(r'[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?', re.I)

def reference_differences():
    "What about this environment differs from the pinned one that wrote the committed outputs."
    from importlib.metadata import PackageNotFoundError, version
    from packaging.requirements import Requirement
    lines = (root/'tools/constraints.txt').read_text(encoding='utf-8').splitlines()
    pins = [Requirement(o) for o in lines if o and not o.startswith('#')]
    if not all(p.marker.evaluate() for p in pins): return [f'Python {platform.python_version()} on {platform.system()} {platform.machine()}']
    def here(p):
        try: return version(p.name)
        except PackageNotFoundError: return 'missing'
    return [f'{p.name} {here(p)} (reference {p.specifier})' for p in pins if here(p) == 'missing' or not p.specifier.contains(here(p), True)]

def text_of(outputs):
    "The text a reader sees in a cell's outputs; widgets and pictures stand as their kind only, and objects have no address."
    res = []
    for o in outputs:
        if o['output_type'] == 'stream': res.append(''.join(o['text']))
        elif o['output_type'] == 'error': res.append(f"{o['ename']}: {o['evalue']}")
        elif any(k.startswith(('image/', 'application/vnd.jupyter.widget')) for k in o['data']): res.append('<picture>')
        else: res.append(''.join(o['data'].get('text/markdown') or o['data'].get('text/plain', '')))
    return re.sub(r' at 0x[0-9a-fA-F]+', '', '\n'.join(s.rstrip() for s in res))

def same(a, b, rel=2e-3, tiny=1e-6):
    "Equal text, but for numbers that agree to three digits (below `tiny` they are rounding error) and white space."
    bare = lambda s: re.sub(r'\s+', '', number.sub('#', s)) # a sign that flips at 1e-9 also shifts the columns of a printed tensor
    if bare(a) != bare(b): return False
    return all(math.isclose(float(x), float(y), rel_tol=rel, abs_tol=tiny) for x, y in zip(number.findall(a), number.findall(b)))

def run_notebook(path, flags, update, compare):
    "Execute one notebook in this process: what went wrong, what to note, and whether anything ran."
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
    if str2bool(front.get('skip_exec', False)): return dict(note='skip_exec', ran=0)
    left_out = set(get_config(path=root).tst_flags.split()) - set(flags)
    def directives(cell): return getattr(cell, 'directives_', {}) or {}
    def skipped(cell):
        if cell.cell_type != 'code' or 'nbdev_export(' in cell.source: return True
        return directives(cell).get('eval:', [''])[0].lower() == 'false' or bool(left_out & directives(cell).keys())
    ran = [c for c in nb.cells if not skipped(c)]
    old = {c.id: c.get('outputs', []) for c in ran}
    for c in ran: c.outputs = []
    shell = CaptureShell(path, mpl_format='png')
    os.chdir(path.parent)
    try: shell.run_all(nb, exc_stop=True, preproc=skipped)
    except BaseException: return dict(error=shell.prettytb(fname=path.name) if shell.exc else traceback.format_exc(), ran=len(ran))
    flagged = [k for c in nb.cells if c.cell_type == 'code' for k in left_out & directives(c).keys()]
    notes = [f'{flagged.count(k)} {k} left out' for k in sorted(set(flagged))]
    if update:
        new, raw = {c.id: c.outputs for c in ran}, read_nb(path)
        for c in raw.cells:
            if c.cell_type == 'code' and c.id in new: c.outputs, c.execution_count = new[c.id], None
        write_nb(raw, path)
    elif str2bool(front.get('deterministic', False)):
        if not compare: notes.append('outputs not compared')
        else:
            wrong = [(c, text_of(old[c.id]), text_of(c.outputs)) for c in ran]
            wrong = [f'the cell\n{c.source}\nprinted\n{b}\nwhere the page says\n{a}\n' for c, a, b in wrong if not same(a, b)]
            if wrong: return dict(error='\n'.join(wrong) + '(`make notebooks` refreshes it, if the new text is right)', ran=len(ran))
    return dict(note=', '.join(notes), ran=len(ran))

running = set()

def kill(p):
    "End a process and what it started."
    try: os.killpg(p.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError): pass

def child(path, flags='', update=False, compare=True, timeout=900):
    "Run one notebook in a process of its own, tell what came of it in a line, return it as a dict."
    name, start = os.path.relpath(path, root/'nbs'), time.time()
    with tempfile.TemporaryDirectory() as d:
        report = Path(d)/'report.json'
        env = os.environ | {'OMP_NUM_THREADS': '1', 'MPLCONFIGDIR': os.environ.get('MPLCONFIGDIR', str(Path(sys.prefix)/'.matplotlib'))}
        cmd = [sys.executable, __file__, str(path), '--report', str(report), '--flags', flags] + ['--update']*update + ['--compare']*compare
        with open(Path(d)/'log', 'w+') as log:
            p = subprocess.Popen(cmd, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=root, start_new_session=True)
            running.add(p)
            try: died = p.wait(timeout) and f'exit {p.returncode} after the last cell' # a child that crashes while it ends counts too
            except subprocess.TimeoutExpired: died = f'stopped after {timeout} s'
            finally: kill(p); p.wait(); running.discard(p)
            log.seek(0); printed = log.read()[-3000:]
        res = dict(error=None, note='', ran=0)
        if report.exists(): res |= json.loads(report.read_text())
        elif not died: died = 'ended without a report'
    if died and not res['error']: res['error'] = f'{died}\n{printed}'
    res['name'] = name
    word = 'FAIL' if res['error'] else 'ok' if res['ran'] else 'none'
    print(f"{word:4} {name} {time.time() - start:.0f} s" + f" ({res['note'] or 'no code to run'})"*bool(res['note'] or not res['ran']), flush=True)
    return res

def find():
    "All notebooks; those of the upper floors first, since they take longest."
    return sorted((f for f in (root/'nbs').rglob('*.ipynb') if not any(x.startswith(('.', '_')) for x in f.relative_to(root).parts)), reverse=True)

def run(paths=(), flags='', update=False, workers=2):
    "Run the notebooks, two at a time; a list of what came of each."
    differs = reference_differences()
    if differs: print(('The outputs written here are not those of' if update else 'Outputs are not compared; this is not') +
                      ' the reference environment: ' + ', '.join(differs), flush=True)
    timeout = 3600 if flags else 900
    with ThreadPoolExecutor(workers) as ex:
        jobs = [ex.submit(child, f, flags, update, not differs, timeout) for f in [Path(f).resolve() for f in paths] or find()]
        try: return [j.result() for j in jobs]
        except KeyboardInterrupt:
            ex.shutdown(wait=False, cancel_futures=True)
            for p in list(running): kill(p)
            raise

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('paths', nargs='*', type=Path); p.add_argument('--update', action='store_true'); p.add_argument('--flags', default='')
    p.add_argument('--workers', type=int, default=2)
    p.add_argument('--report', type=Path, help=argparse.SUPPRESS); p.add_argument('--compare', action='store_true', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.report: # the child's side
        res = run_notebook(args.paths[0], args.flags.split(), args.update, args.compare)
        args.report.write_text(json.dumps(res))
        return 0
    results = run(args.paths, args.flags, args.update, args.workers)
    failed = [r for r in results if r['error']]
    for r in failed: print(f"\n---- {r['name']}\n{r['error']}")
    print(f"{sum(bool(r['ran']) for r in results) - sum(bool(r['ran']) for r in failed)} passed, {len(failed)} failed")
    return int(bool(failed) or not results)

if __name__ == '__main__': sys.exit(main())
