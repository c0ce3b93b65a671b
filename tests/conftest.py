"What every test shares: one thread, no display, Ctrl-C that works, and slow tests that say that they were left out."
import os, signal

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')

# A shell's background job ignores Ctrl-C, and so would every program that a test starts and interrupts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

def pytest_collection_modifyitems(config, items):
    "Without `-m`, tests marked slow are skipped, visibly."
    if config.getoption('-m'): return
    for item in items:
        if item.get_closest_marker('slow'): item.add_marker(pytest.mark.skip(reason='slow: make test-slow'))
