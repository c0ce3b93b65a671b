"Samples and slots as files; and foreign pickles, none of which may run, hang, or fill the memory."
import errno, io, json, os, pickle, pickletools, subprocess, tracemalloc, zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import emorl.export
from emorl.core import EmorlError
from emorl.data import hdf5
from emorl.data.scenes import InMemory, Scenes
from emorl.data.tetrominoes import tetrominoes_real
from emorl.export import *
from emorl.models.emorl import EmorlConfig
from emorl.models.slot_attention import SlotAttentionConfig
from emorl.models.slot_model import build_model, image_noise
from test_fuzz import at_most, bounded, damage

example = Path(__file__).parents[2]/'shared/data/rinfo_example.pkl'

def tiny(kind=EmorlConfig, size=(12, 17), **options):
    torch.manual_seed(0)
    return build_model(kind(**(dict(num_slots=3, slot_size=6, gain=1., image_size=size, encoder=dict(widths=(8,), kernels=(5,), strides=(2,)),
                                    decoder_options=dict(widths=(8,), kernels=(3, 3), paddings=(1, 1))) | options))).eval()

def noise_scenes(n=7, size=(12, 17), masks=True):
    rng = np.random.default_rng(0)
    return InMemory(Scenes(rng.integers(0, 256, (n, 3, *size), dtype=np.uint8), rng.integers(0, 4, (n, *size), dtype=np.uint8) if masks else None), 'noise')

# ---- samples

variants = {'default': (EmorlConfig, {}, 'L1 L2 L3 I1 I2 I3'), 'L = 1': (EmorlConfig, dict(num_layers=1, num_refinements=0), 'L1'),
            'L = 0': (EmorlConfig, dict(num_layers=0), 'L0 I1 I2 I3'),
            'slot attention': (SlotAttentionConfig, {}, 'L1 L2 L3')}

@pytest.mark.parametrize('kind, options, names', variants.values(), ids=variants)
def test_sample_round_trip(kind, options, names, tmp_path):
    model, scenes = tiny(kind, **options), noise_scenes()
    paths = write_samples(model, scenes, tmp_path, 2, seed=5)
    assert [p.name for p in paths] == ['rinfo_0.npz', 'rinfo_1.npz'] == sorted(os.listdir(tmp_path))
    c, t = model.config, len(names.split())
    noise = image_noise([1], 5, c.num_draws(), 3, 6)
    steps, (data, out) = model.trajectory(scenes.batch([1]).images, noise=noise), read_rinfo(paths[1]).values()
    assert out['steps'].tolist() == list(steps) == names.split()
    shapes = dict(recons=(12, 17, 3), pred_mask=(3, 12, 17, 1), pred_mask_logits=(3, 12, 17, 1), components=(3, 12, 17, 3),
                  slots=(3, 6), posterior_loc=(3, 6), posterior_std=(3, 6), nll=(), kl=())
    if c.num_layers: shapes['attention'] = (3, 6, 9, 1)
    assert {k: v.shape for k, v in out.items() if k != 'steps'} == {k: (1, t, *s) for k, s in shapes.items()}
    assert {k: v.shape for k, v in data.items()} == {'image': (1, 12, 17, 3), 'true_mask': (1, 4, 1, 12, 17)} and set(np.unique(data['true_mask'])) == {0, 255}
    for i, s in enumerate(steps.values()):
        expected = dict(recons=s.recon.image.movedim(1, -1), pred_mask=s.recon.masks.movedim(2, -1), slots=s.slots, posterior_std=s.posterior.std, nll=s.nll, kl=s.kl)
        for name, x in expected.items(): np.testing.assert_array_equal(out[name][0, i], x[0].numpy())

def test_the_same_file_in_every_way_but_the_date(tmp_path):
    model, scenes = tiny(), noise_scenes(masks=False)
    a, b = (read_rinfo(write_samples(model, scenes, tmp_path/d, 1)[0]) for d in 'ab')
    assert list(a['data']) == ['image']
    for k in a['outputs']: np.testing.assert_array_equal(a['outputs'][k], b['outputs'][k])
    wide = read_rinfo(write_samples(model, scenes, tmp_path, 1, num_slots=5, num_refinements=1)[0])['outputs']
    assert wide['pred_mask'].shape == (1, 4, 5, 12, 17, 1) and len(wide['steps']) == 4

def test_a_published_sample():
    if not example.exists(): pytest.skip(f'{example.name} is not here')
    found = read_rinfo(example)
    with open(example, 'rb') as f: true = pickle.load(f)
    assert {p: list(v) for p, v in found.items()} == {p: list(v) for p, v in true.items()}
    for p in true:
        for k, v in true[p].items():
            np.testing.assert_array_equal(found[p][k], v)
            assert found[p][k].dtype == v.dtype and found[p][k].flags.writeable and found[p][k].flags.c_contiguous == v.flags.c_contiguous

def test_ours_has_the_published_names_and_meaning():
    if not example.exists(): pytest.skip(f'{example.name} is not here')
    theirs = read_rinfo(example)
    scenes = tetrominoes_real().batch([0])
    ours = sample_arrays(tiny(size=(35, 35), num_slots=4, encoder=dict(widths=(8,), kernels=(5,), strides=(1,))), scenes.images, scenes.one_hot())
    for p in theirs:
        for k, v in theirs[p].items(): assert ours[f'{p}/{k}'].shape == v.shape, k
    for o in (theirs['outputs'], {k: ours[f'outputs/{k}'] for k in theirs['outputs']}):
        np.testing.assert_allclose(np.exp(o['pred_mask_logits']), o['pred_mask'], atol=1e-5)
        np.testing.assert_allclose((o['components'] - 1).sum(2) + 1, o['recons'], atol=1e-5)
        np.testing.assert_array_equal(o['attention'][:, 2], o['attention'][:, 5])

# ---- pickles that are something else

class Calls:
    def __init__(self, f, *args): self.how = f, args
    def __reduce__(self): return self.how

class Stateful:
    def __reduce__(self): return Calls, (), {'a': 1}

good = {'data': {'image': np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3), 'true_mask': np.full((1, 1, 1, 2, 2), 255.)},
        'outputs': {'recons': np.asfortranarray(np.eye(4)), 'n': 3, 's': 'a text', 'x': .5}}
reconstruct = np.zeros(1).__reduce__()[0]

def read(tmp_path, data):
    (tmp_path/'rinfo_0.pkl').write_bytes(data)
    return read_rinfo(tmp_path/'rinfo_0.pkl')

@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_what_is_allowed(protocol, tmp_path):
    found = read(tmp_path, pickle.dumps(good, protocol))
    for p in good:
        for k, v in good[p].items(): np.testing.assert_array_equal(found[p][k], v); assert type(found[p][k]) is type(v)

wraps = {'alone': lambda o: o, 'value': lambda o: {'data': o}, 'in an array': lambda o: {'data': {'image': np.array([o, None], dtype=object)}}, 'key': lambda o: {'data': {o: 1}},
         'in tuples': lambda o: {'data': (1, (2, o))}}

@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('wrap', wraps.values(), ids=wraps)
def test_what_would_run_is_refused(protocol, wrap, tmp_path):
    ran = tmp_path/'ran'
    nested = Calls(Calls, Calls(os.system, f'touch {ran}'))
    opens = f'open({str(ran)!r}, "w")'
    for f in (Calls(os.system, f'touch {ran}'), Calls(eval, opens), Calls(exec, opens), Calls(open, str(ran), 'w'), nested, Stateful(), Calls, print, Calls(np.load, str(ran)),
              Calls(reconstruct, Calls, (0,), b'b'), Calls(subprocess.getoutput, f'touch {ran}')):
        with pytest.raises(EmorlError, match='rinfo_0.pkl is refused: .*Nothing in it was executed'): read(tmp_path, pickle.dumps(wrap(f), protocol))
    assert not ran.exists()

@pytest.mark.parametrize('obj, words', [
    (Calls(os.system, 'x'), 'asks for posix.system'),
    (Calls(eval, '1'), 'asks for builtins.eval'),
    (Calls(Calls, Calls(os.system, 'x')), 'asks for test_export.Calls'),
    ({'data': {'image': np.array([{}], dtype=object)}}, "dtype 'O8', not of numbers"),
    ({'a': np.zeros(2, 'U3')}, "dtype 'U3'"),
    ({'a': np.zeros(2, [('x', 'f4')])}, "dtype 'V4'"),
    ({'a': np.datetime64('2020')}, "dtype 'M8'"),
    ({'a': np.zeros(2, 'c8')}, "dtype 'c8'"),
    ({'a': {1: 2}}, 'keys are texts'),
    ({'a': [1]}, 'instruction EMPTY_LIST'),
    ({'a': {1, 2}}, 'instruction EMPTY_SET'),
    ({'a': b'x'}, 'a is of type bytes'),
    ({'a': (1, 2)}, 'a is of type tuple'),
    ({'a': None}, 'a is of type NoneType'),
    ([], 'instruction EMPTY_LIST'),
    (3, 'no dictionary but of type int'),
    (np.zeros(3), 'no dictionary'),
    ({'a': 1j}, 'asks for builtins.complex'),
    ({'a': reconstruct}, '_reconstruct|of type _Name'),
    ({'a': np.dtype('f4')}, 'of type _Dtype'),
    ({'a': np.ndarray}, 'of type _Name'),
])
def test_what_was_found_is_said(obj, words, tmp_path):
    with pytest.raises(EmorlError, match=words): read(tmp_path, pickle.dumps(obj, 4))

# Instructions by hand: what no honest pickler writes
array, f4, text = b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R', b'cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R', \
    b'X\x01\x00\x00\x00a'
def filled(shape, data=b'C\x04abcd', dtype=f4, order=b'\x89'): return array + b'(K\x01' + shape + dtype + order + data + b'tb'
trillion = b'\x8a\x06' + (2**40).to_bytes(6, 'little')
by_hand = {
    'a shape beyond its bytes': b'}' + text + filled(trillion + b'\x85') + b's',
    'many dimensions': b'}' + text + filled(b'(' + b'K\x02'*100 + b't') + b's',
    'a negative shape': b'}' + text + filled(b'J\xff\xff\xff\xffJ\xfc\xff\xff\xff\x86') + b's',
    'a shape of tuples': b'}' + text + filled(b'J\x00\xca\x9a\x3bK\x01\x85\x86') + b's',
    'a shape that is a text': b'}' + text + filled(text + b'\x85') + b's',
    'bytes of a gigabyte': b'}' + text + b'\x8e' + (2**30).to_bytes(8, 'little') + b's',
    'bytes of an exabyte': b'}' + text + b'\x8e' + (2**60).to_bytes(8, 'little') + b's',
    'a text of an exabyte': b'}\x8d' + (2**60).to_bytes(8, 'little') + b'a',
    'a frame of an exabyte': b'\x95' + (2**60).to_bytes(8, 'little') + b'}',
    'a far memo': b'}r\xff\xff\xff\xffj\xff\xff\xff\xff',
    'a memo far by text': b'}p99999999999999999999\n',
    'a missing memo': b'h\x07',
    'doubled tuples as a key': b'}' + b')' + b''.join(b'\x94h' + bytes([i]) + b'h' + bytes([i]) + b'\x86' for i in range(60)) + b'K\x01s',
    'doubled dictionaries': b'}' + text + b'K\x01s' + b''.join(b'\x94}' + text + b'h' + bytes([i]) + b's' + b'X\x01\x00\x00\x00b' + b'h' + bytes([i]) + b's' for i in range(60)),
    'a dictionary in itself': b'}\x94' + text + b'h\x00s',
    'deep dictionaries': b'}' + text + (b'}' + text)*5000 + b'K\x01' + b's'*5001,
    'a dtype of objects': b'}' + text + filled(b'K\x01\x85', dtype=f4.replace(b'f4', b'O8')) + b's',
    'a dtype built as a record': b'}' + text + f4 + b'(K\x03X\x01\x00\x00\x00<NX\x01\x00\x00\x00xN' + b'K\x00K\x00K\x00tb' + b's',
    'state for a text': text + b'}b',
    'state for a name': b'cnumpy\nndarray\n}b',
    'a call of a text': text + b')R',
    'a call of the result': array + b')R',
    'an instance': b'(ios\nsystem\n',
    'an object': b'(cos\nsystem\no',
    'a new object': b'cos\nsystem\n)\x81',
    'a registered extension': b'\x82\x01',
    'a persistent name': b'Pevil\n',
    'a name of names': b')))\x93',
    'a long number': b'I' + b'9'*100_000 + b'\n',
    'nothing but an end': b'',
    'an empty stack': b's',
    'no mark': b'u',
    'odd items': b'}(' + text + b'u',
    'the same thing many times': b'}(' + text + filled(b'K\x01\x85')+ b'\x94' + b''.join(b'X\x02\x00\x00\x00' + bytes([97 + i//26, 97 + i % 26]) + b'h\x00' for i in range(200)) + b'u',
}

harmless = {'a frame of an exabyte': 0, 'a far memo': 0, 'a memo far by text': 0, 'the same thing many times': 201}

@pytest.mark.parametrize('name', by_hand)
def test_what_no_honest_pickler_writes(name, tmp_path):
    with at_most(10):
        if name in harmless: assert len(read(tmp_path, b'\x80\x04' + by_hand[name] + b'.')) == harmless[name]; return
        with pytest.raises(EmorlError) as e: read(tmp_path, b'\x80\x04' + by_hand[name] + b'.')
    assert str(tmp_path) in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 500

def shared_bytes(n=3000):
    "A pickle in which many arrays are made of the same megabyte."
    size = b'B' + (2**20).to_bytes(4, 'little') + bytes(2**20) + b'q\x00'
    key = lambda i: b'X\x04\x00\x00\x00' + f'{i:04}'.encode()
    one = lambda i: key(i) + filled(b'J' + (2**18).to_bytes(4, 'little') + b'\x85', data=b'h\x00' if i else size)
    return b'\x80\x04}(' + b''.join(map(one, range(n))) + b'u.'

def promising(shape):
    "A `.npz` whose only array is said to be much larger than it is."
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w') as z:
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, dict(descr='<f4', fortran_order=False, shape=shape))
        z.writestr('data/x.npy', head.getvalue() + b'abcd')
    return f.getvalue()

def test_memory_is_bounded(tmp_path):
    files = {f'{i}.pkl': b'\x80\x04' + b + b'.' for i, b in enumerate(by_hand.values())} | {'shared.pkl': shared_bytes()}
    files |= {'shape.npz': promising((2**28, 2**4)), 'shape2.npz': promising((2**40,))}
    for name, data in files.items(): (tmp_path/name).write_bytes(data)
    tracemalloc.start()
    for name in files:
        tracemalloc.reset_peak(); before = tracemalloc.get_traced_memory()[0]
        try: read_rinfo(tmp_path/name)
        except EmorlError: pass
        assert tracemalloc.get_traced_memory()[1] - before < 4*len(files[name]) + 5e6, name  # the compiler of patterns, traces of errors
    tracemalloc.stop()

def test_a_zip_that_unpacks_to_more(tmp_path):
    path = write_sample(tmp_path/'zeros.npz', {'data/x': np.zeros(2**23)})
    assert len(emorl.export._read_npz(path, 2**26 + 128)) == 1 and path.stat().st_size < 2**17
    with pytest.raises(EmorlError, match='unpacks to 67108992 bytes; at most 67108991'): emorl.export._read_npz(path, 2**26 + 127)
    lies = path.read_bytes().replace((2**26 + 128).to_bytes(4, 'little'), (2**16).to_bytes(4, 'little'))
    path.write_bytes(lies)
    with pytest.raises(EmorlError): read_rinfo(path)

edits = st.tuples(st.sampled_from(['flip', 'write', 'insert', 'remove', 'cut']), st.floats(0, 1), st.binary(min_size=1, max_size=6))

@given(st.lists(edits, min_size=1, max_size=4), st.sampled_from(['3', '4', '5', 'npz']))
@bounded
def test_damage(tmp_path_factory, edits, kind):
    "Arrays, or a sentence."
    path = tmp_path_factory.getbasetemp()/'damaged'
    flat = {f'{p}/{k}': np.asarray(v) for p in good for k, v in good[p].items()}
    whole = pickle.dumps(good, int(kind)) if kind != 'npz' else write_sample(path, flat).read_bytes()
    path.write_bytes(damage(whole, edits))
    with at_most(10):
        try: found = read_rinfo(path)
        except EmorlError as e: assert str(path) in str(e) and '\n' not in str(e); return
    assert isinstance(found, dict)

pieces = [o.code.encode('latin1') for o in pickletools.opcodes] + list(by_hand.values()) + [array, f4, b'K\x01', b'C\x01a', text, b')', b'q\x00', b'h\x00']

@given(st.lists(st.sampled_from(pieces), max_size=30))
@bounded
def test_random_programs(tmp_path_factory, parts):
    path = tmp_path_factory.getbasetemp()/'program'
    path.write_bytes(b'\x80\x04' + b''.join(parts) + b'.')
    with at_most(10):
        try: read_rinfo(path)
        except EmorlError as e: assert '\n' not in str(e)

def test_a_npz_with_objects_is_refused(tmp_path):
    def refused(words, **arrays):
        with open(tmp_path/'x.npz', 'wb') as f: np.savez(f, **arrays)
        with pytest.raises(EmorlError, match=words): read_rinfo(tmp_path/'x.npz')
    refused('objects|not of numbers', x=np.array([{}, Calls(os.system, f'touch {tmp_path}/ran')], dtype=object))
    refused('not of numbers', x=np.zeros(2, [('a', 'f4')])); refused('not of numbers', x=np.zeros(2, 'M8[s]'))
    assert not (tmp_path/'ran').exists()
    with zipfile.ZipFile(tmp_path/'y.npz', 'w') as z: z.writestr('readme.txt', 'hello')
    with pytest.raises(EmorlError, match='readme.txt in it is no array'): read_rinfo(tmp_path/'y.npz')

def test_a_folder_is_no_sample(tmp_path):
    with pytest.raises(EmorlError, match='There is no file'): read_rinfo(tmp_path)

# ---- slots of a dataset

@pytest.mark.parametrize('kind', [EmorlConfig, SlotAttentionConfig])
@pytest.mark.parametrize('options', [{}, dict(num_slots=5), dict(seed=3)])
def test_encode_is_the_models_own(kind, options, tmp_path):
    model, scenes = tiny(kind), noise_scenes()
    files = [encode_dataset(model, scenes, tmp_path/f'{b}.h5', batch_size=b, **options) for b in (1, 3, 7, 100)]
    contents = []
    for f in files:
        with h5py.File(f) as h: contents.append(({k: v[()] for k, v in h.items()}, dict(h.attrs), h['masks'].attrs['scale']))
    first, attributes, scale = contents[0]
    k = options.get('num_slots', 3)
    assert {n: (v.shape, v.dtype.str) for n, v in first.items()} == {
        'slots': ((7, k, 6), '<f4'), 'std': ((7, k, 6), '<f4'), 'masks': ((7, k, 12, 17), '|u1'), 'segmentation': ((7, 12, 17), '|u1')}
    for i in range(7):
        slots, masks = model.encode(scenes.batch([i]).images, **options)
        np.testing.assert_array_equal(first['slots'][i], slots[0].numpy())  # batches of one: to the last bit
        np.testing.assert_allclose(first['masks'][i]*scale, masks[0, :, 0].numpy(), atol=.5/255 + 1e-6)
        np.testing.assert_array_equal(first['segmentation'][i], masks[0, :, 0].argmax(0).numpy())
    for other, said, _ in contents[1:]:
        assert said == attributes
        for n in ('slots', 'std'): np.testing.assert_allclose(other[n], first[n], atol=1e-4, rtol=1e-4)
        assert np.abs(other['masks'].astype(int) - first['masks']).max() <= 1
    assert [attributes[a] for a in ('dataset', 'seed', 'num_slots', 'num_refinements')] == ['noise', options.get('seed', 0), k, model.config.num_refinements]
    assert build_model(json.loads(attributes['model'])).config == model.config
    assert (first['std'] > 0).all() == (kind is EmorlConfig)

def test_encode_batch_by_batch(tmp_path):
    seen = []
    class Watched(InMemory):
        def batch(self, indices): seen.append(list(indices)); return super().batch(indices)
    data, rounds = Watched(noise_scenes().scenes), []
    encode_dataset(tiny(), data, tmp_path/'a.h5', 5, 2, progress=lambda batches: rounds.append(len(batches)) or batches, checkpoint='mine')
    assert seen == [[0, 1], [2, 3], [4]] and rounds == [3]
    with h5py.File(tmp_path/'a.h5') as f: assert len(f['slots']) == 5 and f.attrs['checkpoint'] == 'mine' and f['masks'].compression == 'gzip'

def test_full_disk(tmp_path, monkeypatch):
    "The old file stays, nothing is left beside it, and HDF5 survives to write another."
    model, scenes, path = tiny(), noise_scenes(), tmp_path/'slots.h5'
    before = encode_dataset(model, scenes, path, 2).read_bytes()
    with monkeypatch.context() as m:
        def small(file, data, write=io.FileIO.write):
            if file.tell() > 3000: raise OSError(errno.ENOSPC, 'No space left on device')
            return write(file, data)
        m.setattr(hdf5._Disk, 'put', small)
        with pytest.raises(EmorlError, match='No space left on the disk while writing .*slots.h5'): encode_dataset(model, scenes, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['slots.h5']
    with h5py.File(encode_dataset(model, scenes, path)) as f: assert len(f['slots']) == 7

def test_what_cannot_be_encoded(tmp_path):
    for words, options in (('at least one image', dict(num_images=0)), ('one per batch', dict(batch_size=0))):
        with pytest.raises(EmorlError, match=words): encode_dataset(tiny(), noise_scenes(), tmp_path/'a.h5', **options)
    with pytest.raises(EmorlError, match='is a folder'): encode_dataset(tiny(), noise_scenes(), tmp_path)
    assert os.listdir(tmp_path) == []
