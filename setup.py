"Package metadata is read from settings.ini, the one place where it is written."
import re, shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters='=')
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

def absolute(link):
    "A link into the repository; on a package index a relative one leads nowhere."
    return f"{link[1] or ''}]({cfg['git_url']}/{'raw' if link[1] else 'blob'}/{cfg['branch']}/{link[2]})"
readme = re.sub(r'(!\[[^\]]*)?\]\((?!https?:|#|mailto:)([^)\s]+)\)', absolute, (here/'README.md').read_text(encoding='utf-8'))

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='MIT',
    long_description=readme, long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Natural Language :: English',
                 *(f'Programming Language :: Python :: {v}' for v in ('3', '3.10', '3.11', '3.12', '3.13'))],
    packages=find_packages(include=['emorl', 'emorl.*']), include_package_data=True, zip_safe=False,
    python_requires='>=' + cfg['min_python'], install_requires=shlex.split(cfg['requirements']),
    extras_require={k: shlex.split(cfg[f'{k}_requirements']) for k in ('dev', 'blender', 'inspect', 'docs')},
    entry_points={'console_scripts': shlex.split(cfg['console_scripts']), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
)
