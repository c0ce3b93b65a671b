"What every test shares: one thread, no display, and slow tests that say that they were left out."
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')

import pytest

def pytest_collection_modifyitems(config, items):
    "Without `-m`, tests marked slow are skipped, visibly."
    if config.getoption('-m'): return
    for item in items:
        if item.get_closest_marker('slow'): item.add_marker(pytest.mark.skip(reason='slow: make test-slow'))
