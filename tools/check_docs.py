"""Is the built book whole? Every link is followed in its files, then every page is opened in Chromium, if there is one, from a server on this machine.

    python tools/check_docs.py            # _docs, as `make docs` leaves it
    python tools/check_docs.py FOLDER --screenshots FOLDER

A link or an anchor that leads nowhere, a picture that is not drawn, mathematics that is not typeset, a page wider than a phone, an error in the
console, a request that fails or leaves this machine: each is a line, and the exit code is 1.
"""
import argparse, re, shutil, sys, threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

root = Path(__file__).resolve().parents[1]
flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']

# ---- the files

class Page(HTMLParser):
    "What a page names, what it leads to, and what it loads."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.math = set(), [], [], False
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get('id'): self.ids.add(a['id'])
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag in ('img', 'script', 'source', 'iframe') and a.get('src'): self.loads.append(a['src'])
        if tag == 'link' and a.get('href') and a.get('rel') != 'canonical': self.loads.append(a['href'])
        self.math |= 'math' in (a.get('class') or '').split()

def dead_links(site):
    "Sentences, one per link that leads nowhere or thing loaded from elsewhere."
    pages = {p: Page(p) for p in sorted(site.rglob('*.html')) if '_static' not in p.relative_to(site).parts}
    for path, page in pages.items():
        name = path.relative_to(site)
        yield from (f'{name} loads {u}' for u in page.loads if re.match(r'(\w+:)?//', u))
        for link in dict.fromkeys(page.links + page.loads):
            u = urlparse(link)
            if u.scheme or u.netloc: continue
            target = (path.parent/unquote(u.path)).resolve() if u.path else path
            if target.is_dir(): target /= 'index.html'
            if not target.is_file(): yield f'{name} leads to {link}, which is not there'
            elif u.fragment and target in pages and unquote(u.fragment) not in pages[target].ids | {'top'}: yield f'{name} leads to {link}, and nothing there is called {u.fragment}'

# ---- the browser

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

class Window:
    "A browser page that keeps what goes wrong in it."
    def __init__(self, browser, host):
        self.page, self.wrong, self.asked = browser.new_page(), [], set()
        p, say = self.page, self.wrong.append
        p.on('request', lambda r: self.asked.add(r))
        p.on('console', lambda m: say(f'the console says {m.text}') if m.type == 'error' else None)
        p.on('pageerror', lambda e: say(f'the page says {e}'))
        p.on('requestfailed', lambda r: say(f'{r.url}: {r.failure}') if r in self.asked else None) # Not what leaving the page before cut off
        p.on('response', lambda r: say(f'{r.url}: {r.status}') if r.status >= 400 else None)
        p.on('request', lambda r: say(f'{r.url} is on another host') if urlparse(r.url).scheme not in ('data', 'blob') and urlparse(r.url).netloc != host else None)

    def visit(self, url, picture=None):
        "Open a page, wait for its mathematics, look at it as wide as a phone and as a screen; sentences about what is wrong."
        self.wrong.clear(); self.asked.clear()
        self.page.goto(url)
        self.page.evaluate('async () => { if (window.MathJax) await window.MathJax.startup.promise; }')
        for width in (390, 1250):
            self.page.set_viewport_size(dict(width=width, height=900))
            self.wrong += (f'{o} ({width} wide)' for o in self.page.evaluate(look))
            if picture: self.page.screenshot(path=f'{picture}-{width}.png')
        return list(dict.fromkeys(self.wrong))

# Runs in the page
look = '''async () => {
  const wrong = [], all = s => [...document.querySelectorAll(s)];
  for (const m of all('.math')) if (!m.querySelector('mjx-container')) wrong.push('not typeset: ' + m.textContent.slice(0, 60));
  for (const p of all('article p, article td, article li')) {
    const words = [...p.childNodes].filter(n => n.nodeType == 3).map(n => n.textContent).join(' ');
    if (/\\|---|\\$[^$ ][^$]*\\$/.test(words)) wrong.push('Markdown left as it was: ' + words.trim().slice(0, 60));
  }
  for (const m of all('mjx-merror, [data-mjx-error]')) wrong.push('TeX with an error: ' + (m.getAttribute('data-mjx-error') || m.textContent));
  for (const i of all('img')) { i.loading = 'eager'; try { await i.decode(); } catch { wrong.push('not drawn: ' + i.src.slice(0, 90)); } }
  if (document.documentElement.scrollWidth > window.innerWidth + 1) wrong.push(`wider than the window: ${document.documentElement.scrollWidth}`);
  return wrong;
}'''

def in_browser(site, chromium, screenshots=None):
    "Sentences, one per thing that goes wrong when a reader opens the pages."
    from playwright.sync_api import sync_playwright
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f'127.0.0.1:{server.server_port}'
    try:
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=chromium, args=flags)
            w = Window(browser, host)
            for path in sorted(site.rglob('*.html')):
                name = path.relative_to(site).as_posix()
                if name.startswith('_'): continue
                yield from (f'{name}: {o}' for o in w.visit(f'http://{host}/{name}', screenshots and screenshots/path.relative_to(site).with_suffix('').as_posix().replace('/', '-')))
            yield from (f'search: {o}' for o in w.visit(f'http://{host}/search.html?q=geco'))
            try: w.page.locator('#search-results li a').first.wait_for(timeout=20_000)
            except Exception: yield 'search: finds no page about geco'
            browser.close()
    finally: server.shutdown(); server.server_close()

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('site', nargs='?', type=Path, default=root/'_docs'); p.add_argument('--screenshots', type=Path, help='keep what the browser shows in this folder')
    args = p.parse_args()
    site = args.site.resolve()
    if not (site/'index.html').is_file(): sys.exit(f'{site} holds no book; make docs builds one.')
    if args.screenshots: args.screenshots.mkdir(parents=True, exist_ok=True)
    wrong = list(dead_links(site))
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if chromium: wrong += in_browser(site, chromium, args.screenshots)
    for o in wrong: print(o)
    print(f'{len(list(site.rglob("*.html")))} pages' + (' opened in Chromium' if chromium else '; there is no Chromium to open them in') + f', {len(wrong)} things wrong')
    return int(bool(wrong))

if __name__ == '__main__': sys.exit(main())
