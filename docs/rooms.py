"""A Sphinx extension: what a notebook needs to become a page of the book.

Cells that nbdev hides are left out, and its directives with them; a line under the title says where the page comes from; a page that exports ends with
tables of what it exports, read from its docments; names in code type lead to those tables. The code is read, never imported: building needs no torch.
"""
import ast, io, json, os, re, tokenize
from pathlib import Path

from docutils import nodes

# What lives on a floor, for the sidebar; the tens digit of a page says its floor
floors = {'0': 'Words', '1': 'Pure pieces', '2': 'Parts and data', '3': 'Models and loading', '4': 'Runs and parity', '5': 'Evaluation', '6': 'Training and widgets',
          '7': 'Presets', '8': 'Measuring', '9': 'Commands'}
sections = {'tutorials': 'Tutorials', 'explanations': 'Explanations', 'experiments': 'Experiments'}

def source(cell): return ''.join(cell['source'])
def markdown(*lines): return dict(cell_type='markdown', metadata={}, source='\n'.join(lines))
def directives(cell): return dict(re.findall(r'^#\|\s*([\w-]+):?[ \t]*(.*)$', source(cell), re.M)) if cell['cell_type'] == 'code' else {}

# ---- what a page exports

class Code:
    "Source text with its tree, its comments, and the words of any node as they were written."
    def __init__(self, text):
        self.lines, self.body = text.splitlines(), ast.parse(text).body
        found = (t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT)
        self.comments = {t.start[0]: t.string.lstrip('# ') for t in found}

    def said(self, node):
        "A node as it is written, in one line."
        if node is None: return ''
        lines = [o.encode() for o in self.lines[node.lineno - 1:node.end_lineno]] # an offset counts bytes
        lines[-1] = lines[-1][:node.end_col_offset]
        lines[0] = lines[0][node.col_offset:]
        return one_line(b' '.join(lines).decode())

    def row(self, name, kind, default, line=None):
        "Name, type, default and comment of a parameter or field; fastcore's `Param`, a type with a comment, and `field` are taken apart."
        what = self.comments.get(line, '')
        if isinstance(kind, ast.Call) and ast.unparse(kind.func) == 'Param': what, kind = what or kind.args[0].value, kind.args[1]
        if isinstance(default, ast.Call) and ast.unparse(default.func) == 'field':
            given = {k.arg: self.said(k.value) + '()'*(k.arg == 'default_factory') for k in default.keywords}
            return name, self.said(kind), given.get('default') or given.get('default_factory', ''), one_line(what)
        return name, self.said(kind), self.said(default), one_line(what)

    def parameters(self, f, skip=0):
        "A row for each parameter, but for the first `skip`, and for what is returned. A comment belongs to the only parameter that ends in its line."
        a = f.args
        plain = [*a.posonlyargs, *a.args]
        rows = [('', *r) for r in zip(plain, [None]*(len(plain) - len(a.defaults)) + a.defaults)][skip:]
        rows += [('*', a.vararg, None)]*bool(a.vararg) + [('', *r) for r in zip(a.kwonlyargs, a.kw_defaults)] + [('**', a.kwarg, None)]*bool(a.kwarg)
        ends = [(d or p).end_lineno for _, p, d in rows]
        lines = [n if ends.count(n) == 1 and n < f.body[0].lineno else None for n in ends]
        res = [self.row(star + p.arg, p.annotation, d, n) for (star, p, d), n in zip(rows, lines)]
        if f.returns: res.append(self.row('returns', f.returns, None, n if (n := f.returns.end_lineno) not in ends and n < f.body[0].lineno else None))
        return res

    def signature(self, name, f, skip=0):
        "A call, with defaults but without types, which the table tells."
        return f'{name}({", ".join(n + f"={d}"*bool(d) for n, _, d, _ in self.parameters(f, skip) if n != "returns")})'

    def function(self, f): return [*block(self.signature(f.name, f)), docstring(f), *table(self.parameters(f))]

    def method(self, m):
        "A public method or property: how to call it, its docstring, and a table if its parameters have comments."
        if m.name[0] == '_': return []
        skip = 0 if 'staticmethod' in decorators(m) else 1
        call, rows = m.name if {'property', 'cached_property'} & decorators(m) else self.signature(m.name, m, skip), self.parameters(m, skip)
        return ['', f'`.{call}` {one_line(docstring(m))}', *(table(rows) if any(w for *_, w in rows) else [])]

    def cls(self, c):
        "What a class is: its docstring, how to make one, its public methods and properties."
        methods = [n for n in c.body if isinstance(n, ast.FunctionDef)]
        init = next((m for m in methods if m.name == '__init__'), None)
        fields = [self.row(n.target.id, n.annotation, n.value, n.end_lineno) for n in c.body if isinstance(n, ast.AnnAssign) and n.target.id[0] != '_']
        bases = [f'`{b}`' for b in map(self.said, c.bases) if b != 'nn.Module']
        made = [*block(self.signature(c.name, init, 1)), *table(self.parameters(init, 1))] if init else table(fields)
        return [docstring(c), *[f'A kind of {", ".join(bases)}.']*bool(bases), '', *made, *(line for m in methods for line in self.method(m))]

def one_line(text): return re.sub(r'\s+', ' ', text).strip()
def docstring(n): return ast.get_docstring(n) or ''
def block(text): return ['```python', text, '```']
def span(text): return f'`{text}`' if text else ''
def decorators(n): return {ast.unparse(d.func if isinstance(d, ast.Call) else d).split('.')[-1] for d in n.decorator_list}

def table(rows):
    "Rows as Markdown; nothing if they say no more than a signature does."
    if not any(what or kind for _, kind, _, what in rows): return []
    cells = [('*returns*' if n == 'returns' else span(n), span(k), span(d), w) for n, k, d, w in rows]
    return ['', '| name | type | default | what |', '|---|---|---|---|', *('| ' + ' | '.join(c.replace('|', r'\|') for c in row) + ' |' for row in cells), '']

def exports(nb):
    "The module that a notebook exports, name -> Markdown lines about it, and the names of plain values."
    code = [c for c in nb['cells'] if c['cell_type'] == 'code']
    module = next((d['default_exp'] for c in code if (d := directives(c)).get('default_exp')), None)
    about, values = {}, []
    for c in code:
        if not {'export', 'exports'} & directives(c).keys(): continue
        parsed = Code(source(c))
        for n in parsed.body:
            if isinstance(n, ast.Assign): values += [t.id for t in n.targets if isinstance(t, ast.Name) and t.id[0] != '_']
            if isinstance(n, ast.FunctionDef) and n.name[0] != '_': about[n.name] = parsed.function(n)
            if isinstance(n, ast.ClassDef) and n.name[0] != '_': about[n.name] = parsed.cls(n)
    return module, about, values

def label(module, name): return f'emorl.{module}.{"class." if name[0].isupper() else ""}{name}' # Sphinx tells no capitals from small letters

def export_cells(nb):
    "The section on what a page exports."
    module, about, values = exports(nb)
    if not about and not values: return []
    res = [markdown('## Exports', '', f'What `emorl.{module}` holds for others.' + (f' Values: {", ".join(f"`{v}`" for v in values)}.' if values else ''))]
    return res + [markdown(f'({label(module, name)})=', f'### {name}', '', *lines) for name, lines in about.items()]

# ---- a notebook as a page

def links(text, folder, app):
    "Relative links as the site has them: pages and pictures where they lie, every other file of the repository at its host."
    root, nbs = Path(app.confdir).parent, Path(app.srcdir)
    def new(m):
        target, _, anchor = m[2].partition('#')
        path = Path(os.path.normpath(folder/target))
        if not target or re.match(r'\w+:', target) or not path.exists(): return m[0]
        inside = path.is_relative_to(nbs) and path.suffix in ('.ipynb', '.png', '.gif', '.jpg', '.svg')
        where = '/' + path.relative_to(nbs).as_posix() if inside else f'{app.config.html_theme_options["source_repository"]}/blob/main/{path.relative_to(root).as_posix()}'
        return f'{m[1]}({where}{"#" + anchor if anchor else ""})'
    return re.sub(r'(\[[^\]]*\])\(([^)\s]+)\)', new, text)

def under_title(docname, nb, app):
    "Where a page comes from and where it can be run."
    options = app.config.html_theme_options
    path = f'{options["source_repository"].removeprefix("https://github.com/")}/blob/{options["source_branch"]}/{options["source_directory"]}{docname}.ipynb'
    module = exports(nb)[0]
    parts = [f'`emorl.{module}`, floor {docname.split("/")[-1][0]}']*bool(module) + [f'[notebook](https://github.com/{path})']
    parts += [f'[open in Colab](https://colab.research.google.com/github/{path})']*docname.startswith('explanations/') # Tutorials have a badge of their own
    return ['', '{.room}', ' · '.join(parts), '']

def parsed(text):
    "Statements of a cell; none if it holds magic."
    try: return ast.parse(text).body or [None]
    except SyntaxError: return [None]

def shown(cell):
    "A cell as a reader of the book sees it, or nothing."
    says = directives(cell)
    if 'hide' in says or 'default_exp' in says or says.get('include') == 'false': return
    if cell['cell_type'] != 'code': return cell
    text = re.sub(r'^#\|.*\n?', '', source(cell), flags=re.M).strip('\n')
    fold = 'code-fold' in says or all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in parsed(text))
    tags = ['remove-input']*(says.get('echo') == 'false' or not text) + ['hide-input']*fold + ['remove-output']*(says.get('output') == 'false')
    outputs = [o for o in cell['outputs'] if 'application/vnd.jupyter.widget-view+json' not in o.get('data', {})]
    if len(outputs) < len(cell['outputs']): outputs.append(dict(output_type='display_data', metadata={}, data={'text/markdown': '*Here stands a widget when the notebook runs.*'}))
    said = [a for o in outputs if (a := o.get('metadata', {}).get('image/png', {}).get('alt'))] # myst-nb looks for it at the cell, not at the output
    return cell | dict(source=text, outputs=outputs, metadata={'tags': tags} | ({'mystnb': {'image': {'alt': ' '.join(said)}}} if said else {}))

def toctree(caption, *patterns): return ['```{toctree}', f':caption: {caption}', ':hidden:', ':glob:', *patterns, '```']

def contents(nbs):
    "The sidebar: every section that has pages, then the API by floor."
    front = ['```{toctree}', ':hidden:', 'Front page <self>', '```']
    trees = [front] + [toctree(caption, f'{folder}/*') for folder, caption in sections.items() if any((nbs/folder).glob('*.ipynb'))]
    found = sorted({p.name[0] for p in (nbs/'api').glob('[0-9]*.ipynb')})
    trees += [toctree(f'API {n}: {floors.get(n, "")}', f'api/{n}*') for n in found]
    return markdown(*(line for t in trees for line in t))

def page(app, docname, content):
    "A notebook as myst-nb shall read it."
    path = Path(app.env.doc2path(docname))
    if path.suffix != '.ipynb': return
    nb = json.loads(content[0])
    title, *rest = nb['cells']
    folder = Path(app.confdir).parent if docname == 'index' else path.parent # the front page is the README too, whose links start at the top
    lines = [o for o in source(title).splitlines() if not re.match(r'- [\w-]+: ', o)]
    at = max(i for i, o in enumerate(lines) if o.startswith(('# ', '> '))) + 1
    if docname != 'index': lines[at:at] = under_title(docname, nb, app)
    cells = [markdown(*lines), *filter(None, map(shown, rest)), *export_cells(nb)]
    if docname == 'index': cells.append(contents(Path(app.srcdir)))
    for i, c in enumerate(cells):
        c['id'] = f'cell-{i}'
        if c['cell_type'] == 'markdown': c['source'] = links(source(c), folder, app)
    language = dict(name='python', pygments_lexer='ipython3')
    content[0] = json.dumps(nb | dict(cells=cells, metadata=nb['metadata'] | dict(language_info=language)))

# ---- names lead to what they name

def index_names(app):
    "Name -> (page, anchor): every page by its name, and every exported name that only one page has."
    found = {}
    for path in sorted(Path(app.srcdir).glob('*/*.ipynb')):
        docname = path.relative_to(app.srcdir).with_suffix('').as_posix()
        module, about, _ = exports(json.loads(path.read_text(encoding='utf-8')))
        for name, place in [(path.stem, (docname, '')), (docname, (docname, '')), *((n, (docname, nodes.make_id(label(module, n)))) for n in about)]:
            found.setdefault(name, set()).add(place)
        if module: found.setdefault(f'emorl.{module}', set()).add((docname, ''))
    app.env.room_names = {k: v.pop() for k, v in found.items() if len(v) == 1}

def link_names(app, doctree, docname):
    "Put a link around every name in code type that has a place, but not where it stands itself."
    for node in list(doctree.findall(nodes.literal)):
        target, anchor = app.env.room_names.get(node.astext().removesuffix('()'), (None, None))
        if not target or (target == docname and not anchor) or any(isinstance(p, (nodes.reference, nodes.title)) for p in ancestors(node)): continue
        uri = '' if target == docname else app.builder.get_relative_uri(docname, target)
        node.replace_self(nodes.reference('', '', node.deepcopy(), internal=True, refuri=uri + f'#{anchor}'*bool(anchor)))

def ancestors(node):
    while node := node.parent: yield node

def setup(app):
    app.connect('builder-inited', index_names)
    app.connect('source-read', page)
    app.connect('doctree-resolved', link_names)
    return dict(version='1', parallel_read_safe=False, parallel_write_safe=True)
