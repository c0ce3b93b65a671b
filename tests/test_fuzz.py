"""Any damage to a file is one sentence: never a hang, never a crash, never another exception. Seeded and bounded."""
import gzip, importlib, signal, subprocess, sys
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emorl.core import EmorlError
from emorl.data import tfrecord
from emorl.data.datasets import open_dataset, source_splits
from emorl.data.hdf5 import write_hdf5
from emorl.data.tetrominoes import Tetrominoes
from emorl.data.tfrecord import parse_example, read_tfrecord
from tfrecord_writer import example, features_of, frame, write_tfrecord

bounded = settings(max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
scenes = Tetrominoes(num=3).batch(range(3))

@contextmanager
def at_most(seconds):
    "Fail, rather than hang."
    def late(*_): raise AssertionError(f'it took more than {seconds} s')
    old = signal.signal(signal.SIGALRM, late); signal.alarm(seconds)
    try: yield
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, old)

def damage(data, edits):
    "Bytes overwritten, inserted, removed, the end cut off."
    data = bytearray(data)
    for kind, where, what in edits:
        at = int(where*len(data))
        if kind == 'flip': data[at:at + 1] = bytes([(data[at] if at < len(data) else 0) ^ (what[0] or 1)]) if what else b''
        elif kind == 'write': data[at:at + len(what)] = what
        elif kind == 'insert': data[at:at] = what
        elif kind == 'remove': del data[at:at + len(what)]
        else: del data[at:]
    return bytes(data)

edits = st.lists(st.tuples(st.sampled_from(['flip', 'write', 'insert', 'remove', 'cut']), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4)

def only_sentences(read, path):
    "Read; an `EmorlError` names the file, and nothing else is raised."
    with at_most(20):
        try: read(path)
        except EmorlError as e: assert str(path) in str(e), e

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Whole files, in all encodings."
    tmp = tmp_path_factory.mktemp('fuzz')
    write_tfrecord(tmp/'packed', scenes); write_tfrecord(tmp/'plain', scenes, compress=False)
    write_hdf5(tmp/'new', dict(train=[scenes], test=[scenes[:1]]))
    with h5py.File(tmp/'old', 'w') as f:  # the first version of the format, as the published files: no checksums anywhere
        hot = (scenes.one_hot().numpy()*255).astype(np.uint8)[..., None]
        f['train/imgs'], f['train/masks'] = scenes.image.transpose(0, 2, 3, 1), hot
    with h5py.File(tmp/'flat', 'w') as f:
        f['image'], f['mask'], f['num_actual_objects'] = scenes.image.transpose(0, 2, 3, 1), scenes.mask[..., None], np.full((3, 1), 3)
        for k, v in scenes.factors.items(): f[k] = v if v.ndim == 3 else v[..., None]
    return tmp

@pytest.fixture(params=['zlib', 'zlib_ng.zlib_ng'])
def unzip(request, monkeypatch):
    "Either of the two that may unpack gzip."
    try: monkeypatch.setattr(tfrecord, 'zlib', importlib.import_module(request.param))
    except ImportError: pytest.skip('zlib-ng is not installed')

@pytest.mark.parametrize('kind', ['packed', 'plain'])
def test_tfrecord(made, kind, tmp_path, unzip):
    whole = (made/kind).read_bytes()
    @bounded
    @given(edits)
    def run(e):
        (tmp_path/'x').write_bytes(damage(whole, e))
        only_sentences(lambda p: list(read_tfrecord(p)), tmp_path/'x')
    run()

def test_anything_as_a_tfrecord(tmp_path, unzip):
    @bounded
    @given(st.binary(max_size=300), st.booleans(), st.booleans())
    def run(data, framed, packed):
        data = frame(data) if framed else data
        (tmp_path/'x').write_bytes(gzip.compress(data) if packed else data)
        only_sentences(lambda p: list(read_tfrecord(p)), tmp_path/'x')
    run()

def test_damaged_messages_with_right_checksums(tmp_path):
    "What a hostile file can do: everything but a wrong checksum."
    payload = example(features_of(scenes, 0))
    @bounded
    @given(edits)
    def run(e):
        (tmp_path/'x').write_bytes(frame(payload) + frame(damage(payload, e)))
        only_sentences(lambda p: list(read_tfrecord(p)), tmp_path/'x')
    run()

def test_messages_alone():
    @bounded
    @given(st.binary(max_size=200))
    def run(data):
        try: parse_example(data)
        except (ValueError, IndexError, AttributeError, TypeError): pass
    run()

# HDF5 is a C library that was not written for hostile files, so it is read in a process of its own: a crash or a hang is seen, and is a failure.

reader = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_fuzz as t
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(path.name, flush=True)
    t.only_sentences(t.read_hdf5, path)
print('done')
"""

def read_hdf5(path):
    "All scenes of all splits."
    for split in source_splits(path):
        data = open_dataset(path, split)
        data.batch(range(min(len(data), 100)))

@pytest.mark.parametrize('kind', ['new', 'old', 'flat'])
def test_hdf5(made, kind, tmp_path):
    whole, n = (made/kind).read_bytes(), [0]
    @bounded
    @given(edits)
    def run(e): (tmp_path/f'{n[0]:04}').write_bytes(damage(whole, e)); n[0] += 1
    run()
    p = subprocess.run([sys.executable, '-c', reader.format(tests=str(Path(__file__).parent)), tmp_path], capture_output=True, text=True, timeout=240)
    assert p.returncode == 0 and p.stdout.endswith('done\n'), (p.returncode, p.stdout.split()[-1:], p.stderr[-3000:])
