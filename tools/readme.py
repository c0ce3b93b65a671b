"""README.md is what nbs/index.ipynb renders to: hidden cells gone, pictures in README_files/.

    python tools/readme.py            # write it
    python tools/readme.py --check    # say what differs, change nothing
"""
import argparse, difflib, os, re, sys, tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]

def rendered(root=root):
    "Path -> content of the files that `nbs/index.ipynb` renders to."
    os.chdir(root)
    import nbformat
    from nbconvert import MarkdownExporter
    from nbdev.processors import FilterDefaults, add_links
    from nbdev.serve_drv import main as process
    from traitlets.config import Config
    class Filter(FilterDefaults):
        "Without links into a documentation site: they would depend on which other libraries are installed."
        def base_procs(self): return [p for p in super().base_procs() if p is not add_links]
    with tempfile.TemporaryDirectory() as d:
        process((root/'nbs/index.ipynb', Path(d)/'index.ipynb', Filter))
        nb = nbformat.read(Path(d)/'index.ipynb', 4)
    front = nb.cells.pop(0) # nbdev turns the title cell into front matter; a README has no use for that
    assert front.cell_type == 'raw', 'nbs/index.ipynb must begin with a cell "# title", "> what it is"'
    import yaml
    front = yaml.safe_load(front.source.strip().strip('-'))
    nb.cells.insert(0, nbformat.v4.new_markdown_cell(f"# {front['title']}\n\n> {front['description']}"))
    nb.metadata.language_info = {'name': 'python'}
    for c in nb.cells:
        if c.cell_type != 'code': continue
        says = dict(re.findall(r'^#\|\s*(\w+):\s*(\w+)', c.source, re.M))
        c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip()
        c.metadata.tags = [k for k in ('echo', 'output') if says.get(k) == 'false'] + ['echo']*(not c.source)
    config = Config({'TagRemovePreprocessor': {'enabled': True, 'remove_input_tags': ['echo'], 'remove_all_outputs_tags': ['output']}})
    text, resources = MarkdownExporter(config=config).from_notebook_node(nb, {'output_files_dir': 'README_files', 'unique_key': 'README'})
    said = iter([o.metadata.get('image/png', {}).get('alt', 'png') for c in nb.cells if c.cell_type == 'code' and 'output' not in c.metadata.tags for o in c.outputs if 'image/png' in o.get('data', {})])
    text = re.sub(r'!\[png\]', lambda _: f'![{next(said)}]', text) # nbconvert calls every picture so
    text = re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', text, flags=re.M)).strip() + '\n'
    return {'README.md': text.encode(), **resources['outputs']}

def differences(new, root=root):
    "What would change, as text; nothing if the files stand as rendered."
    old = {p.relative_to(root).as_posix(): p.read_bytes() for p in [root/'README.md', *(root/'README_files').rglob('*')] if p.is_file()}
    res = [f'{k} {"is missing" if k in new else "is not made by it" if k not in new else ""}' for k in sorted(old.keys() ^ new.keys())]
    res += [f'{k} differs' for k in sorted(old.keys() & new.keys()) if old[k] != new[k]]
    a, b = (d.get('README.md', b'').decode().splitlines() for d in (old, new))
    return '\n'.join(res + list(difflib.unified_diff(a, b, 'README.md', 'nbs/index.ipynb', lineterm='', n=1)))

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--check', action='store_true')
    check, new = p.parse_args().check, rendered()
    diff = differences(new)
    if check:
        print(f'nbs/index.ipynb renders to something else (`make readme` writes it):\n{diff}' if diff else 'README.md is what nbs/index.ipynb renders to')
        return int(bool(diff))
    for f in (root/'README_files').rglob('*.*'): f.unlink()
    for k, v in new.items():
        (root/k).parent.mkdir(exist_ok=True)
        (root/k).write_bytes(v)
    print('README.md written' if diff else 'README.md is up to date')
    return 0

if __name__ == '__main__': sys.exit(main())
