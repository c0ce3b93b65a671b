"""Converting and making files: every source, every interruption, the same bytes; and memory that stays bounded."""
import errno, io, json, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from emorl.core import EmorlError
from emorl.data import hdf5
from emorl.data.datasets import convert, describe, file_kind, make_dataset, makers, open_dataset, verify
from emorl.data.hdf5 import HDF5Scenes, write_hdf5
from emorl.data.raycast import full
from emorl.data.scenes import Scenes, concat
from emorl.data.tetrominoes import Tetrominoes
from emorl.data.tfrecord import schemas
from test_data import same
from tfrecord_writer import write_tfrecord

def scenes_like(schema, n, seed=0, most=None):
    "Blobs in the layout of a published file, with factors that agree with the masks."
    rng, (h, w, c), k = np.random.default_rng(seed), schema.image, schema.entities
    mask, (y, x) = np.zeros((n, h, w), np.uint8), np.mgrid[:h, :w]
    count = rng.integers(1, (most or k - 1) + 1, n)
    for i in range(n):
        for o in range(1, count[i] + 1): mask[i][(y - rng.integers(h))**2 + (x - rng.integers(w))**2 < (h//8)**2] = o
    visibility = (np.arange(k) <= count[:, None]).astype(np.float32)
    factors = {f: rng.random((n, k, *s)).astype(np.float32) for f, s in schema.factors.items()}
    if 'material' in factors: factors |= {f: rng.integers(0, 8, (n, k), dtype=np.uint8) for f in ('size', 'material', 'shape', 'color')}
    image = (mask*20)[:, None].repeat(c, 1) + rng.integers(0, 3, (n, c, h, w), dtype=np.uint8)
    return Scenes(image.astype(np.uint8), mask, factors | dict(visibility=visibility))

def everything(path):
    "All scenes of both splits, in order."
    return concat([d.batch(range(len(d))) for d in (HDF5Scenes(path, s) for s in ('train', 'test'))])

@pytest.mark.parametrize('name', list(schemas))
def test_every_published_layout_round_trips(name, tmp_path):
    s = schemas[name]
    sent = scenes_like(s, 6 if s.entities == 11 else 20)
    counts = convert(write_tfrecord(tmp_path/'t', sent, s.layout), tmp_path/'h.h5', num_train=len(sent) - 3, num_test=3)
    assert counts == dict(train=len(sent) - 3, test=3) == verify(tmp_path/'h.h5')
    same(everything(tmp_path/'h.h5'), sent)

@pytest.mark.parametrize('name', list(makers))
def test_twin_to_tfrecord_to_hdf5_to_loader(name, tmp_path):
    if name == 'clevr6': pytest.skip('the published file has the scenes of clevr10')
    n, options = (2, dict(size=(240, 320), crop=full, samples=1)) if name == 'clevr10' else (8, {})
    scenes = makers[name](num=n, split='test', **options).batch(range(n))
    path = write_tfrecord(tmp_path/'t', scenes, 'h w k' if 'sprites' in name else 'k h w')
    convert(path, tmp_path/'h.h5', num_train=n - 1, num_test=1)
    same(everything(tmp_path/'h.h5'), scenes)

def test_published_columns_of_clevr(tmp_path):
    "Nine factors in the published order, presence last; 0 and 255; what the published files lack stands beside."
    sent = scenes_like(schemas['clevr_with_masks'], 4, most=7)
    convert(write_tfrecord(tmp_path/'t', sent), tmp_path/'h.h5', num_train=3, num_test=1)
    with h5py.File(tmp_path/'h.h5') as f:
        assert set(f) == {'train', 'test'} and f['train/imgs'].shape == (3, 240, 320, 3) and f['train/masks'].shape == (3, 11, 240, 320, 1)
        assert set(np.unique(f['train/masks'])) == {0, 255} and f['train/factors'].shape == (3, 11, 9)
        table = f['train/factors'][:]
    for i, k in enumerate('x y z rotation size material shape color visibility'.split()): assert np.array_equal(table[..., i], sent.factors[k][:3]), k

def test_clevr6_is_a_choice_by_visible_objects(tmp_path):
    sent = scenes_like(schemas['clevr_with_masks'], 12, seed=3)
    few = np.flatnonzero(sent.factors['visibility'].sum(1) <= 7)
    assert 2 < len(few) < 12
    path = write_tfrecord(tmp_path/'t', sent)
    counts = convert(path, tmp_path/'h.h5', num_train=len(few) - 2, num_test=2, max_objects=6)
    same(everything(tmp_path/'h.h5'), sent[few])
    assert counts == dict(train=len(few) - 2, test=2) and open_dataset(tmp_path/'h.h5').name == 'clevr6_with_masks'
    convert(path, tmp_path/'small.h5', max_objects=6, size=96)
    assert open_dataset(tmp_path/'small.h5').image_size == (3, 96, 96)
    assert np.array_equal(open_dataset(tmp_path/'small.h5', 'train').batch([0]).mask[0], sent.mask[few[0], 30:221:2, 65:256:2])

def clevrtex(folder, n=20):
    for i in range(n):
        at = folder/f'clevrtex_full/{i//10}/CLEVRTEX_full_{i:06}'
        at.parent.mkdir(parents=True, exist_ok=True)
        m = np.zeros((24, 32), np.uint8); m[i:i + 4, 5:20] = 1
        Image.fromarray(np.dstack([m*200, m*3, m + i])).save(f'{at}.png'); Image.fromarray(m).save(f'{at}_flat.png')
        Path(f'{at}.json').write_text(json.dumps(dict(objects=[dict(material='wood', shape='cube', size=1., rotation=30)])))
    return folder

def test_clevrtex_and_pictures_convert(tmp_path):
    src = clevrtex(tmp_path/'src')
    assert file_kind(src) == 'clevrtex' and convert(src, tmp_path/'c.h5', processes=2) == dict(train=16, val=2, test=2) == verify(tmp_path/'c.h5')
    same(HDF5Scenes(tmp_path/'c.h5', 'val').batch([0, 1]), open_dataset(src, 'val').batch([0, 1]))
    for p in src.rglob('*.json'): p.unlink()
    for p in list(src.rglob('CLEVRTEX*.png')): p.rename(p.with_name(p.name.removeprefix('CLEVRTEX_')))
    assert file_kind(src) == 'images' and convert(src, tmp_path/'i.h5') == dict(train=18, test=2)
    assert describe(src)['splits']['all']['scenes'] == 20 and len(describe(src)['sha256']) == 64
    same(everything(tmp_path/'i.h5'), open_dataset(src).batch(range(20)))

def test_flat_hdf5_converts(tmp_path):
    s = Tetrominoes(num=30).batch(range(30))
    with h5py.File(tmp_path/'f.h5', 'w') as f:
        f['image'], f['mask'], f['num_actual_objects'] = s.image.transpose(0, 2, 3, 1), s.mask[..., None], np.full((30, 1), 3)
        for k, v in s.factors.items(): f[k] = v if v.ndim == 3 else v[..., None]
    (tmp_path/'f-metadata.npy').write_bytes(b'\x80\x04a pickle nobody opens')
    assert file_kind(tmp_path/'f.h5') == 'flat_hdf5' and convert(tmp_path/'f.h5', tmp_path/'h.h5') == dict(train=27, test=3)
    same(everything(tmp_path/'h.h5'), s)

def test_flat_hdf5_that_does_not_count_its_entities(tmp_path):
    "Without `visibility`, and with the scenes of most objects last: no mask is lost."
    s = Tetrominoes(num=100).batch(range(100))
    mask = np.where(np.arange(100)[:, None, None] < 70, np.minimum(s.mask, 1), s.mask)
    with h5py.File(tmp_path/'f.h5', 'w') as f: f['image'], f['mask'] = s.image.transpose(0, 2, 3, 1), mask[..., None]
    assert convert(tmp_path/'f.h5', tmp_path/'h.h5') == verify(tmp_path/'h.h5') == dict(train=90, test=10)
    assert np.array_equal(everything(tmp_path/'h.h5').mask, mask)

@pytest.mark.parametrize('what, bad, says', [('half', .5, '0, 0.5'), ('128', 128, '0, 128'), ('soft', .25, '0, 0.25, 1')])
def test_soft_masks_are_refused(what, bad, says, tmp_path):
    "By every way into a file, and by the number of the scene."
    s = Tetrominoes(num=9).batch(range(9))
    masks = s.one_hot().numpy()[..., None].astype(np.float32)
    if what == 'soft': masks[6, :, 3, 4] = bad
    else: masks[6] *= bad
    with h5py.File(tmp_path/'s.h5', 'w') as f: f['train/imgs'], f['train/masks'] = s.image.transpose(0, 2, 3, 1), masks.astype(np.uint8 if what == '128' else np.float32)
    for act in (verify, describe, lambda p: convert(p, tmp_path/'h.h5'), lambda p: open_dataset(p, 'train').batch([8, 6])):
        with pytest.raises(EmorlError, match=f's.h5, train, scene 6: masks hold 0 and 255, or 0 and 1; these hold {says}[.]'): act(tmp_path/'s.h5')
    assert not (tmp_path/'h.h5').exists()

# ---- interruptions

def parts(out): return sorted(out.with_name(out.name + '.parts').glob('*-*.h5'))

@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "A TFRecord of 5000 scenes, and its conversion without a break."
    tmp = tmp_path_factory.mktemp('convert')
    write_tfrecord(tmp/'t', Tetrominoes(num=5000).batch(range(5000)))
    convert(tmp/'t', tmp/'straight.h5', num_train=4500, num_test=500)
    return tmp/'t', (tmp/'straight.h5').read_bytes()

run = """
import sys
from emorl.core import EmorlError
from emorl.data.datasets import convert, make_dataset
if __name__ == '__main__':
    try: {call}
    except (EmorlError, KeyboardInterrupt) as e: print(type(e).__name__, e); sys.exit(3)
"""

def interrupted(script, out, sig):
    "Run until the first part is there, send a signal; what was printed."
    p = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not parts(out) and p.poll() is None and time.time() < deadline: time.sleep(.002)
    p.send_signal(sig)
    text, err = p.communicate(timeout=120)
    assert 'Traceback' not in err, err
    return p.returncode, text

@pytest.mark.parametrize('processes, sig', [(1, signal.SIGINT), (1, signal.SIGTERM), (1, signal.SIGKILL), (2, signal.SIGINT), (2, signal.SIGKILL)])
def test_killed_conversion_goes_on(straight, tmp_path, processes, sig):
    src, whole = straight
    out, script = tmp_path/'o.h5', tmp_path/'run.py'
    call = f'convert({str(src)!r}, {str(out)!r}, num_train=4500, num_test=500, processes={processes})'
    script.write_text(run.format(call=call))
    code, text = interrupted(script, out, sig)
    assert not out.exists() and parts(out)
    if sig == signal.SIGKILL: assert code == -9
    else: assert code == 3 and 'KeyboardInterrupt Interrupted.' in text and 'are kept in' in text and 'o.h5.parts' in text
    convert(src, out, num_train=4500, num_test=500)
    assert out.read_bytes() == whole and os.listdir(tmp_path).count('o.h5.parts') == 0

@pytest.mark.parametrize('sig', [signal.SIGTERM, signal.SIGKILL])
def test_killed_making_goes_on_and_leaves_no_process(tmp_path, sig):
    out, script = tmp_path/'m.h5', tmp_path/'run.py'
    script.write_text(run.format(call=f"make_dataset('tetrominoes', 20000, {str(out)!r}, test=700, processes=2)"))
    code, text = interrupted(script, out, sig)
    assert not out.exists() and parts(out) and (code == -9 or 'Interrupted.' in text)
    deadline = time.time() + 20
    while (left := [p for p in Path('/proc').glob('[0-9]*/cmdline') if str(script).encode() in _read(p)]) and time.time() < deadline: time.sleep(.1)
    assert not left
    make_dataset('tetrominoes', 20000, out, test=700, processes=2)
    make_dataset('tetrominoes', 20000, tmp_path/'one.h5', test=700)
    assert out.read_bytes() == (tmp_path/'one.h5').read_bytes()

def _read(p):
    try: return p.read_bytes()
    except OSError: return b''

def test_full_disk_keeps_the_parts(straight, tmp_path, monkeypatch):
    (src, whole), out, room = straight, tmp_path/'o.h5', [500_000]
    def small(file, data, write=io.FileIO.write):
        room[0] -= len(data)
        if room[0] < 0: raise OSError(errno.ENOSPC, 'No space left on device')
        return write(file, data)
    with monkeypatch.context() as m:
        m.setattr(hdf5._Disk, 'put', small)
        for _ in range(2):  # the second try makes no progress, and loses none
            with pytest.raises(EmorlError, match='No space left on the disk while writing .*scenes are kept in .*o.h5.parts; the next try goes on from there'):
                convert(src, out, num_train=4500, num_test=500)
    assert parts(out) and not out.exists()
    convert(src, out, num_train=4500, num_test=500)
    assert out.read_bytes() == whole and os.listdir(tmp_path) == ['o.h5']

def test_full_disk_at_the_last_step(straight, tmp_path, monkeypatch):
    (src, whole), out = straight, tmp_path/'o.h5'
    def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(hdf5, '_append_part', full)
        with pytest.raises(EmorlError, match='5,000 scenes are kept'): convert(src, out, num_train=4500, num_test=500)
    stamps = [p.stat().st_mtime_ns for p in parts(out)]
    convert(src, out, num_train=4500, num_test=500)
    assert len(stamps) == 5 and out.read_bytes() == whole

def test_damaged_record_keeps_what_was_before(tmp_path):
    path = write_tfrecord(tmp_path/'t', Tetrominoes(num=1200).batch(range(1200)), compress=False)
    data = bytearray(path.read_bytes()); size = len(data)//1200
    data[1100*size + 500] ^= 1; path.write_bytes(data)
    with pytest.raises(EmorlError, match=r'record 1100 is damaged.* 1,024 scenes are kept'): convert(path, tmp_path/'o.h5', num_train=1190, num_test=10)

def test_one_at_a_time_and_one_plan(straight, tmp_path):
    src, _ = straight
    out = tmp_path/'o.h5'
    with hdf5._plan(out, dict(a=1)):
        with pytest.raises(EmorlError, match='Another process is writing'): convert(src, out)
    with pytest.raises(EmorlError, match='holds parts of something else'): convert(src, out)

def test_a_stream_is_written_the_same_by_several_processes(straight, tmp_path):
    src, whole = straight
    assert convert(src, tmp_path/'o.h5', num_train=4500, num_test=500, processes=2) == dict(train=4500, test=500)
    assert (tmp_path/'o.h5').read_bytes() == whole and os.listdir(tmp_path) == ['o.h5']

def test_numbers_may_change_between_two_tries(straight, tmp_path):
    "How a TFRecord is divided is settled at the end; what was written for other numbers is good for these."
    src, _ = straight
    with pytest.raises(EmorlError, match=r't has 5000 scenes, not 4900 \+ 200\. 5,000 scenes are kept'): convert(src, tmp_path/'o.h5', num_train=4900, num_test=200)
    kept = [p.stat().st_mtime_ns for p in parts(tmp_path/'o.h5')]
    assert len(kept) == 5 and convert(src, tmp_path/'o.h5', num_train=700, num_test=900) == dict(train=700, test=900)
    same(everything(tmp_path/'o.h5'), Tetrominoes(num=5000).batch(range(1600)))
    assert convert(src, tmp_path/'all.h5') == dict(train=4680, test=320)

@pytest.mark.parametrize('processes', [2])
def test_same_bytes_from_any_number_of_processes(tmp_path, processes):
    make_dataset('tetrominoes', 3000, tmp_path/'a.h5', test=300)
    make_dataset('tetrominoes', 3000, tmp_path/'b.h5', test=300, processes=processes)
    assert (tmp_path/'a.h5').read_bytes() == (tmp_path/'b.h5').read_bytes()
    same(everything(tmp_path/'a.h5'), concat([Tetrominoes(num=3000).batch(range(3000)), Tetrominoes(num=300, split='test').batch(range(300))]))

def test_source_replaced_while_converting(tmp_path, monkeypatch):
    path = write_tfrecord(tmp_path/'t', Tetrominoes(num=3000).batch(range(3000)))
    other, write = path.read_bytes(), hdf5._write_part
    def replacing(*args): path.write_bytes(other); return write(*args)
    monkeypatch.setattr(hdf5, '_write_part', replacing)
    with pytest.raises(EmorlError, match='was replaced while it was being read.* are kept'): convert(path, tmp_path/'o.h5', num_train=2500, num_test=500)
    with pytest.raises(EmorlError, match='state_of_source was'): convert(path, tmp_path/'o.h5', num_train=2500, num_test=500)

@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    "A conversion of CLEVR scenes takes no more memory for three times as many."
    peaks = []
    for n in (40, 160):
        write_tfrecord(tmp_path/'t', (scenes := scenes_like(schemas['clevr_with_masks'], n)))
        code = f"import resource; from emorl.data.datasets import convert; convert({str(tmp_path/'t')!r}, {str(tmp_path/'o.h5')!r}, num_train={n - 5}, num_test=5); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        peaks.append(int(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)//1024)
        del scenes
    assert peaks[1] < peaks[0] + 150, peaks  # MB; the 120 more are 390 MB unpacked
