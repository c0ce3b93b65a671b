"""The book: the notebooks as a site. `make docs` builds it into _docs; nothing is executed, nothing is fetched."""
import sys
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).parent
sys.path.insert(0, str(here))
ini = ConfigParser(delimiters='=')
ini.read(here.parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

project, author, release = cfg['lib_name'], cfg['author'], cfg['version']
copyright = cfg['copyright']
extensions = ['myst_nb', 'sphinx-mathjax-offline', 'rooms'] # The second brings MathJax along, so that no page asks a foreign host for it
exclude_patterns = ['**/.ipynb_checkpoints', '**/_*', '**/.*']

nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst' # outputs may hold tables and mathematics, as cells do
nb_ipywidgets_js = {}
nb_code_prompt_show, nb_code_prompt_hide = 'Show the code', 'Hide the code'
myst_enable_extensions = ['dollarmath', 'amsmath', 'attrs_block']
myst_heading_anchors = 3
smartquotes = False # it would turn the dashes of an option into one long one

html_theme = 'furo'
html_title = cfg['title']
html_favicon = 'static/favicon.svg'
html_static_path = ['static']
html_css_files = ['rooms.css']
html_copy_source = html_show_sphinx = False
html_theme_options = dict(source_repository=cfg['git_url'], source_branch=cfg['branch'], source_directory=f"{cfg['nbs_path']}/", top_of_page_buttons=[])
