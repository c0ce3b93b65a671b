"""Data: what a notebook cannot show well. Worker processes, damaged files by the hundred, a full disk, and the published sample."""
import errno, gzip, hashlib, io, os
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
from torch.utils.data import DataLoader

from emorl.core import EmorlError
from emorl.data import hdf5
from emorl.data.datasets import describe, make_dataset, open_dataset
from emorl.data.hdf5 import HDF5Scenes, write_hdf5
from emorl.data.scenes import batch_indices
from emorl.data.tetrominoes import Tetrominoes, tetrominoes_real
from emorl.data.tfrecord import read_tfrecord
from tfrecord_writer import write_tfrecord

sample = Path(__file__).resolve().parents[2]/'shared/data/tetrominoes_mini.tfrecords'

def same(a, b):
    "Two batches of scenes hold the same bits."
    assert a.image.dtype == b.image.dtype and np.array_equal(a.image, b.image) and np.array_equal(a.mask, b.mask)
    assert set(a.factors) == set(b.factors)
    for k in a.factors: assert a.factors[k].dtype == b.factors[k].dtype and np.array_equal(a.factors[k], b.factors[k]), k

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A file of 200 and 40 generated scenes."
    path = tmp_path_factory.mktemp('data')/'made.h5'
    make_dataset('tetrominoes', num=200, out=path, test=40)
    return path

@pytest.mark.skipif(not sample.exists(), reason=f'no sample of the published file at {sample}')
def test_ten_real_scenes_bit_for_bit():
    real = tetrominoes_real().scenes
    same(next(read_tfrecord(sample)), real)
    same(open_dataset(sample, 'test').batch(range(10)), real)
    facts = describe(sample)
    assert facts['splits']['all']['scenes'] == 10 and facts['splits']['all']['objects'] == {3: 10}

def test_the_twin_never_changes():
    "Scenes are named by their number in results and runs: these sums are part of the format."
    sums = {}
    for split in ('train', 'val', 'test'):
        scenes = Tetrominoes(split=split).batch(range(100))
        sums[split] = hashlib.sha256(scenes.image.tobytes() + scenes.mask.tobytes()).hexdigest()[:16]
    assert sums == {'train': '07e6d0ca9fecf6d5', 'val': 'e5c216897a9b8176', 'test': 'a412d6d82ec33b04'}

def test_round_trip(tmp_path):
    twin = Tetrominoes(num=50, split='test')
    write_tfrecord(tmp_path/'t', twin.batch(range(50)))
    write_hdf5(tmp_path/'h', dict(test=read_tfrecord(tmp_path/'t')))
    data = open_dataset(tmp_path/'h', 'test')
    for step in range(9):
        idx = batch_indices(len(data), 16, step, seed=1)
        same(data.batch(idx), twin.batch(idx))

def _who_read(data, idx):
    "In a worker: what was read, by which process, through whose handle."
    scenes = data.batch(idx)
    return scenes, os.getpid(), data._pid

@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_one_handle_per_worker(made, method):
    data, twin = HDF5Scenes(made, 'train'), Tetrominoes(num=200)
    data.batch([0])  # the parent holds a handle when the workers start
    steps = [batch_indices(200, 16, s) for s in range(12)]
    loader = DataLoader(steps, batch_size=None, num_workers=2, collate_fn=partial(_who_read, data), multiprocessing_context=method)
    pids = set()
    for idx, (scenes, pid, owner) in zip(steps, loader):
        same(scenes, twin.batch(idx))
        assert pid == owner != os.getpid()
        pids.add(pid)
    assert len(pids) == 2
    same(data.batch([5, 3]), twin.batch([5, 3]))

def _read_all(path):
    "All scenes of a file, whatever it is."
    data = open_dataset(path, 'train')
    return data.batch(range(len(data)))

@pytest.mark.parametrize('compress', [True, False])
def test_damaged_tfrecord(tmp_path, compress):
    path = write_tfrecord(tmp_path/'good', Tetrominoes(num=3).batch(range(3)), compress=compress)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    good = _read_all(path)
    for trial in range(150):
        data = bytearray(whole)
        at = int(rng.integers(len(whole)))
        if trial % 3: data[at] ^= 1 << int(rng.integers(8))
        else: del data[at:]
        (bad := tmp_path/'bad').write_bytes(data)
        try: scenes = _read_all(bad)
        except EmorlError as e: assert str(bad) in str(e)
        else:  # the cut fell between two records, or the bit is one of gzip's header that says nothing
            same(scenes, good[:len(scenes)])
            assert len(scenes) < 3 if trial % 3 == 0 else compress and at < 10

def test_damaged_hdf5(made, tmp_path):
    whole, rng = made.read_bytes(), np.random.default_rng(0)
    with h5py.File(made) as f: chunks = [f[f'train/{k}'].id.get_chunk_info(0) for k in ('imgs', 'masks', 'factors')]
    places = [(c.byte_offset + int(rng.integers(c.size)), 1) for c in chunks for _ in range(10)] + [(int(rng.integers(1, len(whole))), 0) for _ in range(20)] + [(0, 1), (9, 1)]
    for i, (at, flip) in enumerate(places):
        data = bytearray(whole)
        if flip: data[at] ^= 1 << int(rng.integers(8))
        else: del data[at:]
        (bad := tmp_path/f'bad{i}').write_bytes(data)  # a new name each: the library remembers files
        with pytest.raises(EmorlError, match=str(bad)): _read_all(bad)

def test_full_disk(made, tmp_path, monkeypatch):
    "The old file stays, nothing is left beside it, and HDF5 survives to write another."
    def small(file, data, write=io.FileIO.write):
        if file.tell() > 20_000: raise OSError(errno.ENOSPC, 'No space left on device')
        return write(file, data[:1000])  # and a disk that takes a little at a time
    path = tmp_path/'x.h5'
    make_dataset('tetrominoes', num=20, out=path, test=5)
    before = path.read_bytes()
    with monkeypatch.context() as m:
        m.setattr(hdf5._Disk, 'put', small)
        with pytest.raises(EmorlError, match='No space left on the disk while writing .*x.h5'): make_dataset('tetrominoes', num=2000, out=path, test=5)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['x.h5']
    make_dataset('tetrominoes', num=30, out=path, test=5)
    assert len(open_dataset(path, 'train')) == 30

def test_what_a_file_is_not(tmp_path):
    (tmp_path/'a.h5').write_bytes(b''); (tmp_path/'b.tfrecords').write_bytes(gzip.compress(b'a letter to nobody')); (tmp_path/'c.h5').write_bytes(b'PK\x03\x04 and more')
    for name, words in (('a.h5', 'is empty'), ('b.tfrecords', 'neither an HDF5 nor a TFRecord'), ('c.h5', 'neither'), ('d.h5', 'no file'), ('', 'holds no pictures')):
        with pytest.raises(EmorlError, match=words): open_dataset(tmp_path/name)
