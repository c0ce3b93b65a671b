"Loading: processes that read, are killed, interrupted or left alone; positions; files whose chunks have any shape."
import io, json, multiprocessing, os, signal, subprocess, sys, time
from contextlib import closing
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import pytest

from emorl.core import EmorlError
from emorl.data import hdf5
from emorl.data.datasets import Cropped, open_dataset
from emorl.data.hdf5 import HDF5Scenes, write_hdf5
from emorl.data.loading import Columns, Loader, from_tensors, one_pass
from emorl.data.scenes import Subset, images_only
from emorl.data.tetrominoes import Tetrominoes
from emorl.models.emorl import EfficientMORL, EmorlConfig
from emorl.train import TrainConfig, fit
from odd_datasets import Faulty, Known, Unknown
from test_data import same

num = 50

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp('loading')/'made.h5'
    write_hdf5(path, dict(train=Tetrominoes(num)))
    return path

def take(n, dataset, batch_size=8, **options):
    with closing(iter(Loader(dataset, batch_size, seed=1, **options))) as batches: return list(islice(batches, n))

def numbers(scenes, known={}):
    "Which scenes of the twin these are."
    if not known: known.update({s.tobytes(): i for i, s in enumerate(Tetrominoes(num).batch(range(num)).image)})
    return [known[s.tobytes()] for s in scenes.image]

def workers(): return multiprocessing.active_children()

# ---- order and position

def test_order_is_that_of_the_step_alone(made):
    data = HDF5Scenes(made, 'train')
    whole = take(14, data)  # two epochs and a bit
    for at in range(14):
        for a, b in zip(take(3, data, step=at), whole[at:]): same(a, b)
    for n, at in ((2, 0), (1, 9)):
        for a, b in zip(take(14 - at, data, step=at, workers=n), whole[at:], strict=True): same(a, b)
    assert not workers()

def test_saved_in_the_middle_of_an_epoch(made):
    data = HDF5Scenes(made, 'train')
    whole = [numbers(s) for s in take(20, data)]
    loader = Loader(data, 8, seed=1)
    batches = iter(loader)
    for at in range(1, 15):
        assert numbers(next(batches)) == whole[at - 1]
        state = json.loads(json.dumps(loader.state_dict()))  # what was made ahead of time does not count
        again = Loader(open_dataset(made, 'train', in_memory=True), 8, seed=1)
        again.load_state_dict(state)
        assert (again.epoch, again.position) == divmod(at*8, num)
        assert [numbers(s) for s in islice(again, 3)] == whole[at:at + 3]
    for k, other in dict(scenes=Subset(data, np.arange(49)), batch_size=data, seed=data, shuffle=data).items():
        now = Loader(other, 16 if k == 'batch_size' else 8, 2 if k == 'seed' else 1, shuffle=k != 'shuffle')
        with pytest.raises(EmorlError, match=f'its order is another: {k} was'): now.load_state_dict(state)
        assert now.step == 0

@pytest.mark.parametrize('world', [2, 3])
def test_ranks_share_an_epoch(made, world):
    data, batch = HDF5Scenes(made, 'train'), 6
    parts = [[numbers(s) for s in take(25, data, batch, rank=r, world=world)] for r in range(world)]
    together = [sum(step, []) for step in zip(*parts)]
    assert together == [numbers(s) for s in take(25, data, batch)]
    row = sum(together, [])
    for e in range(3): assert sorted(row[e*num:(e + 1)*num]) == list(range(num))
    passed = [(idx, s) for r in range(world) for idx, s in one_pass(data, batch, r, world)]
    assert np.array_equal(np.concatenate([idx for idx, _ in passed]), np.arange(num))
    for idx, s in passed: assert numbers(s) == idx.tolist()
    counts = [sum(len(s) for _, s in one_pass(data, batch, r, world)) for r in range(world)]
    assert max(counts) - min(counts) <= 1

def test_a_run_on_another_number_of_processes_goes_on(made):
    data = HDF5Scenes(made, 'train')
    loader = Loader(data, 6, seed=1, rank=1, world=2)
    for _ in islice(loader, 5): pass
    parts = []
    for rank in range(3):
        again = Loader(data, 6, seed=1, rank=rank, world=3)
        again.load_state_dict(loader.state_dict())
        parts.append(numbers(next(iter(again))))
    assert sum(parts, []) == numbers(take(6, data, 6)[5])

def test_training_does_not_notice_who_loads(made, tmp_path):
    small = EmorlConfig(num_refinements=1, slot_size=8, num_slots=2, encoder=dict(widths=(8,), kernels=(5,), strides=(2,)), decoder_options=dict(widths=(8,), kernels=(3, 3), paddings=(1, 1)))
    def losses(dataset, n, steps=4, resume=False):
        import torch
        torch.manual_seed(0)
        plan = TrainConfig(num_steps=steps, batch_size=8, warmup=1, refinements=((0, 1),), workers=n, log_every=1, save_every=100)
        fit(EfficientMORL(small), dataset, plan, out=tmp_path/f'{n}{dataset.name}', resume=resume, progress=False)
        return [json.loads(l)['total_loss'] for l in (tmp_path/f'{n}{dataset.name}'/'metrics.jsonl').read_text().splitlines()]
    known, data = losses(Tetrominoes(num), 0), HDF5Scenes(made, 'train')
    data.name = 'file'
    assert losses(data, 0) == known
    losses(data, 1, steps=2)
    assert losses(data, 1, resume=True) == known and not workers()

# ---- the same scenes from anywhere

def layouts(folder):
    "The twin's scenes in files whose chunks differ."
    twin = Tetrominoes(num).batch(range(num))
    arrays = hdf5._stored(twin, 4)
    for name, options in dict(plain={}, whole=dict(chunks=True), patches=dict(chunks=(16, 9, 9, 1), compression='gzip'), blocks=dict(chunks=(25, 35, 35, 3), compression='gzip', shuffle=True)).items():
        with h5py.File(folder/f'{name}.h5', 'w') as f:
            for k, a in arrays.items():
                o = dict(options)
                if isinstance(o.get('chunks'), tuple) and k != 'imgs': o['chunks'] = (o['chunks'][0], *a.shape[1:])
                hdf5._label({k: f.create_dataset(f'train/{k}', data=a, **o)}, {}) if k != 'factors' else f.create_dataset('train/factors', data=a, **o).attrs.update(columns=np.bytes_(' '.join(hdf5._columns(twin.factors))))
        yield folder/f'{name}.h5'
    with h5py.File(folder/'flat.h5', 'w') as f:
        f['image'], f['mask'] = twin.image.transpose(0, 2, 3, 1), twin.mask[..., None]
        for k, a in twin.factors.items(): f[k] = a.reshape(num, 4, -1)
    yield folder/'flat.h5'

def test_memory_and_disk_hold_the_same(tmp_path):
    twin, idx = Tetrominoes(num), [7, 3, 3, 49, 0, 8]
    for path in layouts(tmp_path):
        data = open_dataset(path, 'train')
        same(data.batch(idx), twin.batch(idx))
        assert len(data.batch([])) == 0
        same(open_dataset(path, 'train', in_memory=True).batch(idx), twin.batch(idx))
        bare = images_only(Cropped(Subset(data, np.arange(20)), 21))
        assert np.array_equal(bare.batch([3, 1]).image, Cropped(twin, 21).batch([3, 1]).image) and bare.batch([3]).mask is None and not bare.batch([3]).factors
        assert bare.num_entities == images_only(data).num_entities == 0 and data.num_entities == 4
    for n in (0, 1):  # what is in memory needs no worker and gets none
        with closing(iter(Loader(open_dataset(path, 'train', in_memory=True), 8, seed=1, workers=n))) as batches: same(next(batches), take(1, twin)[0]); assert not workers()
    for n in (0, 1): same(take(3, open_dataset(path, 'train', size=21), workers=n)[2], take(3, Cropped(twin, 21))[2])

class Counted(io.FileIO):
    "A file that remembers which parts of it were read."
    reads = []
    def readinto(self, buffer):
        at, n = self.tell(), super().readinto(buffer)
        self.reads.append((at, n)); return n

def test_a_batch_reads_each_chunk_once(tmp_path, monkeypatch):
    real = h5py.File
    for path in layouts(tmp_path):
        if path.stem not in ('patches', 'blocks'): continue
        with real(path) as f: places = {f[f'train/{k}'].id.get_chunk_info(i).byte_offset for k in ('imgs', 'masks', 'factors') for i in range(f[f'train/{k}'].id.get_num_chunks())}
        data = HDF5Scenes(path, 'train')
        monkeypatch.setattr(hdf5.h5py, 'File', lambda p, mode: real(Counted(p), mode, rdcc_nbytes=4096))  # whatever the library's own default is
        data.batch([0])
        Counted.reads.clear()
        rng = np.random.default_rng(0)
        same(data.batch(idx := rng.permutation(num)[:32]), Tetrominoes(num).batch(idx))
        found = [at for at, _ in Counted.reads if at in places]
        assert found and len(found) == len(set(found))
        data.close(); monkeypatch.undo()

# ---- processes

@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_a_dataset_in_another_process(made, method):
    data = HDF5Scenes(made, 'train')
    data.batch([0])
    with multiprocessing.get_context(method).Pool(2) as pool: got = pool.map(data.batch, [[i, 49 - i] for i in range(6)])
    for i, s in enumerate(got): assert numbers(s) == [i, 49 - i]

def in_a_child(act):
    "Fork, act in the child, leave as a program does; its exit code."
    if (pid := os.fork()) == 0:
        try: act(); code = 0
        except BaseException: code = 1
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def test_fork_while_loading(made):
    data = HDF5Scenes(made, 'train')
    whole = [numbers(s) for s in take(9, data)]
    batches = iter(Loader(data, 8, seed=1, workers=1))
    assert numbers(next(batches)) == whole[0]
    crew = batches.gi_frame.f_locals['ahead'].gi_frame.f_locals['crew']
    assert in_a_child(crew.close) == 0  # a copy of this process must not end what is ours
    def child(): assert [numbers(s) for s in take(9, data)] == whole
    assert in_a_child(child) == 0
    assert [numbers(s) for s in islice(batches, 8)] == whole[1:]
    batches.close()
    assert not workers()

def test_a_killed_worker_ends_with_a_sentence(made):
    batches = iter(Loader(HDF5Scenes(made, 'train'), 8, workers=2))
    next(batches)
    os.kill(workers()[0].pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(EmorlError, match=r'A process that loads tetrominoes ended before its next batch \(killed by SIGKILL\)'):
        for _ in range(9): next(batches)
    assert not workers() and time.monotonic() - start < 9

@pytest.mark.parametrize('kind, error, words', [('zero', ZeroDivisionError, 'of my own making'), ('odd', RuntimeError, 'Odd: odd'), ('exit', EmorlError, 'exit code 3')])
def test_an_error_of_the_dataset_arrives(kind, error, words):
    batches = iter(Loader(Faulty(kind), 8, shuffle=False, workers=1))
    assert [numbers(next(batches))[0] for _ in range(2)] == [0, 8]
    with pytest.raises(error, match=words) as e: next(batches)
    if error is ZeroDivisionError: assert 'in batch' in str(e.value.__cause__)  # where it happened
    assert not workers()

def test_a_replaced_file(made, tmp_path):
    path = tmp_path/'x.h5'
    path.write_bytes(made.read_bytes())
    for n in (0, 1):
        batches = iter(Loader(HDF5Scenes(path, 'train'), 8, workers=n))
        next(batches)
        write_hdf5(path, dict(train=Tetrominoes(num + n + 1)))
        with pytest.raises(EmorlError, match='x.h5 was replaced after it was opened'):
            for _ in range(9): next(batches)
    assert not workers()

def test_what_cannot_be_sent(made):
    for n in (0, 1): assert numbers(take(1, Columns(Known()), workers=n)[0]) == numbers(take(1, Tetrominoes(num))[0])
    odd = Columns(Known())
    with open(made) as odd.table.file, pytest.raises(EmorlError, match='table cannot be sent to another process .* or load with workers=0'): take(1, odd, workers=1)
    with pytest.raises(EmorlError, match="unknown in another process .*'missing'.* or load with workers=0"): take(1, Unknown(), workers=1)
    assert not workers()

script = '''
import os, sys, time
from emorl.data.hdf5 import HDF5Scenes
from emorl.data.loading import Loader
if __name__ == '__main__':
    path, what = sys.argv[1:]
    loader = Loader(HDF5Scenes(path, 'train'), 8, workers=1 + (what == 'loading'))
    batches = iter(loader)
    if what == 'starting': print('ready', flush=True)
    next(batches)
    if what != 'starting': print('ready', flush=True)
    if what == 'leaves': sys.exit()
    if what == 'stubborn':
        import signal
        came = []
        for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, lambda *_: came.append(1))
        print('set', flush=True)
        while len(came) < 2: time.sleep(.01)
        for _ in range(30): next(batches)
        print('went on', flush=True)
        batches.close(); sys.exit()
    while True: next(batches); time.sleep(.01)
'''

@pytest.fixture
def program(made, tmp_path):
    "Starts the script in a session of its own; afterwards nothing of it may live."
    (tmp_path/'script.py').write_text(script)
    started = []
    def start(what):
        p = subprocess.Popen([sys.executable, tmp_path/'script.py', made, what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(p)
        assert p.stdout.readline() == 'ready\n'
        return p
    yield start
    for p in started:
        try: p.wait(30)
        except subprocess.TimeoutExpired: os.killpg(p.pid, signal.SIGKILL); raise
        try:
            for _ in range(100): os.killpg(p.pid, 0); time.sleep(.1)
        except ProcessLookupError: continue
        os.killpg(p.pid, signal.SIGKILL)
        raise AssertionError('it left processes behind')

def test_a_program_may_leave_without_closing(program):
    p = program('leaves')
    assert p.communicate(timeout=30)[1] == '' and p.returncode == 0

@pytest.mark.parametrize('when', ['starting', 'loading'])
def test_ctrl_c(program, when):
    p = program(when)
    time.sleep(.5)
    os.killpg(p.pid, signal.SIGINT)  # as a terminal does: to all of them
    said = p.communicate(timeout=60)[1]
    assert said.count('Traceback') == 1 and said.rstrip().endswith('KeyboardInterrupt') and p.returncode == -signal.SIGINT

def test_a_program_that_finishes_first_still_gets_its_batches(program):
    p = program('stubborn')
    assert p.stdout.readline() == 'set\n'
    for s in (signal.SIGINT, signal.SIGTERM): os.killpg(p.pid, s)
    said = p.communicate(timeout=60)
    assert said == ('went on\n', '') and p.returncode == 0

def test_a_killed_program_leaves_no_workers(program):
    p = program('loading')
    p.kill()
    p.communicate(timeout=30)

def test_tensors_go_round_as_files_do(made, tmp_path):
    scenes = Tetrominoes(num).batch(range(num))
    data = from_tensors(scenes.images, scenes.one_hot(), name='mine')
    write_hdf5(tmp_path/'mine.h5', dict(train=data))
    again = open_dataset(tmp_path/'mine.h5', 'train')
    for a, b in zip(take(3, again), take(3, data), strict=True): same(a, b)
    assert again.name == 'mine'
