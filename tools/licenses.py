"""Which licences does an installed emorl bring along?

    python tools/licenses.py               # of what `pip install emorl` needs, as a Markdown table
    python tools/licenses.py dev docs      # of these extras too
    python tools/licenses.py --check       # exit code 1 if a package does not say its licence

Nothing is fetched: packages say it themselves, in the metadata of this environment.
"""
import argparse, re, sys
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

def needed(name, extras=()):
    "Names of all packages that `name` needs here, itself not among them; those that are not installed are left out."
    found, todo = {}, [(name, frozenset(extras))]
    while todo:
        name, extras = todo.pop()
        try: dist = distribution(name)
        except PackageNotFoundError: continue
        if (done := found.get(canonicalize_name(name))) is not None and extras <= done: continue
        found[canonicalize_name(name)] = extras | (done or frozenset())
        for r in map(Requirement, dist.requires or ()):
            if not r.marker or any(r.marker.evaluate({'extra': e}) for e in ('', *extras)): todo.append((r.name, frozenset(r.extras)))
    return sorted(found)

def licence(meta):
    "What a package says: its SPDX expression, else its classifiers, else the first line of its licence; nothing if it says none of these."
    classes = [c.split(' :: ')[-1] for c in meta.get_all('Classifier', []) if c.startswith('License :: ') and not c.endswith('OSI Approved')]
    text = (meta.get('License') or '').strip()
    return meta.get('License-Expression') or ', '.join(classes) or ('' if text.upper() == 'UNKNOWN' else text.splitlines()[0][:80] if text else '')

def homepage(meta):
    links = dict(u.split(', ', 1) for u in meta.get_all('Project-URL', []) if ', ' in u)
    return meta.get('Home-page') or next((v for k, v in links.items() if re.search('home|source|repo|github', k, re.I)), '')

def rows(name='emorl', extras=()):
    "(name, version, licence, home page) of everything that `name` needs."
    metas = [distribution(n).metadata for n in needed(name, extras) if n != canonicalize_name(name)]
    return [(m['Name'], m['Version'], licence(m), homepage(m)) for m in metas]

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('extras', nargs='*', help='extras of emorl: dev, docs, inspect, blender'); p.add_argument('--check', action='store_true', help='fail if a package says no licence')
    args = p.parse_args()
    try: found = rows(extras=args.extras)
    except PackageNotFoundError: sys.exit('emorl is not installed in this environment.')
    print('| package | version | licence | |', '|---|---|---|---|', *(f'| {n} | {v} | {c or "**does not say**"} | {u} |' for n, v, c, u in found), sep='\n')
    silent = [n for n, _, c, _ in found if not c]
    if silent: print(f'{len(silent)} of {len(found)} do not say: {", ".join(silent)}', file=sys.stderr)
    return int(args.check and bool(silent))

if __name__ == '__main__': sys.exit(main())
