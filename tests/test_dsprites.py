"""Sprites: outlines against real frames of dSprites, the laws of some thousand scenes, and scenes that never change."""
import hashlib
from pathlib import Path

import numpy as np
import pytest

from emorl.core import EmorlError
from emorl.data.dsprites import MultiDSprites, _outlines, _paint, colours, hsv_bytes, render, sample, shapes, variants
from emorl.data.hdf5 import HDF5Scenes, write_hdf5
from emorl.data.shifts import Shift
from emorl.data.tetrominoes import Tetrominoes
from emorl.data.tfrecord import read_tfrecord
from tfrecord_writer import write_tfrecord

frames_file = Path(__file__).resolve().parents[2]/'shared/data/dsprites_frames.npz'
published = dict(heart=slice(0, 96), ellipse=slice(96, 128), square=slice(128, 160))  # which frames show what
wanted = dict(square=.99, ellipse=.99, heart=.985)

def same(a, b):
    "Two batches of scenes hold the same bits."
    assert np.array_equal(a.image, b.image) and np.array_equal(a.mask, b.mask) and list(a.factors) == list(b.factors)
    for k in a.factors: assert a.factors[k].dtype == b.factors[k].dtype == np.float32 and np.array_equal(a.factors[k], b.factors[k]), k

def drawn(code, x, y, angle, scale):
    "Binary images [n 64 64] of one sprite each."
    x, y, angle, scale = (np.asarray(a, float).reshape(-1, 1) for a in (x, y, angle, scale))
    return _paint(np.full(x.shape, code), x, y, angle, scale)[0].reshape(-1, 64, 64) > 0

def fit(frame, code):
    "Best IoU over the published values of the pose: 40 angles, 6 scales, and the positions (32 x 32) that bring the centroids next to each other."
    angle, scale = (a.ravel() for a in np.meshgrid(np.linspace(0, 2*np.pi, 40), np.linspace(.5, 1, 6), indexing='ij'))
    centroid = lambda m: np.stack([m.sum(1) @ np.arange(64), m.sum(2) @ np.arange(64)], 1)/m.sum((1, 2))[:, None]  # column, row
    middle = drawn(code, angle*0 + .5, angle*0 + .5, angle, scale)
    ok = abs(np.log(middle.sum((1, 2))/frame.sum())) < .3
    angle, scale, middle = angle[ok], scale[ok], middle[ok]
    at = 31*(.5 + (centroid(frame[None]) - centroid(middle))/32)  # in steps of the lattice
    near = [(np.floor(at) + d).clip(0, 31)/31 for d in ([0, 0], [0, 1], [1, 0], [1, 1])]
    got = np.concatenate([drawn(code, *p.T, angle, scale) for p in near])
    return ((got & frame).sum((1, 2))/(got | frame).sum((1, 2))).max()

@pytest.mark.skipif(not frames_file.exists(), reason=f'no real frames at {frames_file}')
@pytest.mark.parametrize('shape', shapes)
def test_outline_is_that_of_the_real_frames(shape):
    frames = np.load(frames_file, allow_pickle=False)['imgs'][published[shape]] > 0
    iou = np.array([fit(f, shapes.index(shape) + 1) for f in frames])
    print(f'{shape}: mean IoU {iou.mean():.4f}, least {iou.min():.4f}, {(iou == 1).sum()} of {len(iou)} frames equal in every pixel')
    assert iou.mean() >= wanted[shape] and iou.min() > .97

@pytest.mark.skipif(not frames_file.exists(), reason=f'no real frames at {frames_file}')
def test_another_outline_fits_worse():
    "The check can fail: hearts are no ellipses."
    frames = np.load(frames_file, allow_pickle=False)['imgs'][:96:8] > 0
    assert np.mean([fit(f, 2) for f in frames]) < .9

def test_a_sprite_is_its_outline_over_the_whole_image():
    "The window of 28x28 pixels cuts nothing off, wherever the sprite is, whichever way it is turned."
    rng = np.random.default_rng(0); n = 400
    X, Y = np.arange(64) + .5, np.arange(64)[:, None] + .5
    for code, outline in enumerate(_outlines, 1):
        x, y, angle, scale = rng.random(n), rng.random(n), rng.random(n)*2*np.pi, .5 + .5*rng.random(n)
        x[:4], y[:4], angle[:4], scale[:4] = (0, 0, 1, 1), (0, 1, 0, 1), np.pi/4, 1
        for got, a, b, t, s in zip(drawn(code, x, y, angle, scale), x, y, angle, scale):
            dx, dy = X - 16 - 32*a, Y - 16 - 32*b
            assert np.array_equal(got, outline((dx*np.cos(t) - dy*np.sin(t))/s, (dx*np.sin(t) + dy*np.cos(t))/s))

def hidden_shares(s):
    "Hidden share of every entity [n k], measured by drawing each alone; 0 for what does not exist."
    res = np.zeros(s.factors['shape'].shape)
    for e in range(1, s.num_entities):
        i = np.flatnonzero(s.factors['shape'][:, e] > 0)
        alone = render({k: v[i][:, [0, e]] for k, v in s.factors.items()})
        res[i, e] = 1 - (s.mask[i] == e).sum((1, 2))/(alone.mask == 1).sum((1, 2))
    return res

def check(s, least, most):
    "What every generated scene keeps."
    f, k = s.factors, most + 1
    assert s.num_entities == k and s.mask.max() < k and np.array_equal(s.one_hot().sum(1).numpy(), np.ones(s.mask.shape))
    there = f['visibility'] > 0; number = there[:, 1:].sum(1)
    assert set(np.unique(f['visibility'])) <= {0, 1} and there[:, 0].all() and number.min() >= least and number.max() <= most
    assert np.array_equal(there, np.stack([(s.mask == e).any((1, 2)) for e in range(k)], 1)), 'visible is what the masks show'
    assert np.array_equal(there[:, 1:], np.arange(most) < number[:, None]), 'sprites come before empty rows'
    assert set(np.unique(f['shape'][:, 1:][there[:, 1:]])) <= {1, 2, 3} and (f['shape'][:, 0] == 0).all()
    for name, low, high in (('x', 0, 1), ('y', 0, 1), ('orientation', 0, np.float32(2*np.pi)), ('scale', .5, 1)):
        v = f[name][:, 1:][there[:, 1:]]; assert v.min() >= low and v.max() <= high, name
    for v in f.values(): assert v.dtype == np.float32 and not v[~there].any(), 'a row of nothing is zero'
    colour = np.rint(255*f['color']).astype(np.uint8)
    assert np.array_equal(colour[np.arange(len(s))[:, None, None], s.mask].transpose(0, 3, 1, 2), s.image)
    assert (hidden_shares(s) < 1).all()
    same(render(f), s)

cases = [(v, s, r) for v, r in variants.items() for s in (Shift(), Shift(num_objects=(4, 7)), Shift(occlusion=(.3, .8)))]
@pytest.mark.parametrize('variant, shift, number', cases, ids=[f'{v}-{i % 3}' for i, (v, *_) in enumerate(cases)])
def test_laws(variant, shift, number):
    data = MultiDSprites(variant=variant, shift=shift, seed=5)
    s = data.batch(range(1000))
    check(s, *shift.number(number))
    assert s.image.shape[1:] == data.image_size and s.num_entities == data.num_entities
    if shift.occlusion:
        most = hidden_shares(s).max(1); assert most.min() >= .3 and most.max() <= .8
    if variant == 'colored_on_grayscale': assert (s.factors['color'][:, 0] == s.factors['color'][:, 0, :1]).all()
    if variant == 'binarized': assert set(np.unique(s.image)) == {0, 255}

def test_no_overlap():
    s = MultiDSprites(variant='colored_on_colored', shift=Shift(occlusion=(0, 0))).batch(range(300))
    check(s, 1, 4); assert hidden_shares(s).max() == 0

@pytest.mark.parametrize('variant', variants)
def test_batching_changes_nothing(variant):
    for shift in (Shift(), Shift(occlusion=(.4, .6)), Shift(num_objects=(1, 6))):
        data = MultiDSprites(variant=variant, shift=shift, seed=-3, split='val'); whole = data.batch(range(120))
        order = np.random.default_rng(1).permutation(120)
        same(data.batch(order), whole[order]); same(data.batch([119, 0, 119]), whole[[119, 0, 119]])
        for n in (1, 7): same(data.batch(range(50, 50 + n)), whole[50:50 + n])
    assert len(data.batch([])) == 0

def sectors(s):
    "Colour and shape of every sprite, and whether its hue is a degree away from the border of two names."
    there = s.factors['shape'] > 0; rgb = s.factors['color'][there].astype(float); top, low = rgb.max(1), rgb.min(1)
    i = rgb.argmax(1); second = np.take_along_axis(rgb, np.stack([(i + 1) % 3, (i + 2) % 3], 1), 1)
    hue = (2*i + (second[:, 0] - second[:, 1])/(top - low)) % 6
    clear = abs((hue + .5) % 1 - .5) < .48
    return [(colours[int(h + .5) % 6], shapes[int(c) - 1]) for h, c, ok in zip(hue, s.factors['shape'][there], clear) if ok]

def test_held_out_pairs():
    held = ('red heart', 'cyan square', 'blue ellipse'); pairs = {tuple(h.split()) for h in held}
    train = MultiDSprites(shift=Shift(held_out=held)).batch(range(1500))
    test = MultiDSprites(split='test', shift=Shift(held_out=held, show_held_out=True)).batch(range(500))
    check(train, 2, 5); check(test, 2, 5)
    assert set(sectors(test)) == pairs
    assert set(sectors(train)) == {(c, s) for c in colours for s in shapes} - pairs
    s = MultiDSprites(variant='binarized', shift=Shift(held_out=['white heart'])).batch(range(200))
    assert 3 not in s.factors['shape']

def test_statistics():
    s = MultiDSprites(saturation=(1, 1), value=(.25, .75), seed=9).batch(range(3000)); there = s.factors['shape'] > 0
    for k, (low, high) in dict(x=(0, 1), y=(0, 1), orientation=(0, 2*np.pi)).items():
        share = np.histogram(s.factors[k][there], 10, (low, high))[0]/there.sum(); assert abs(share - .1).max() < .015, k
    assert np.allclose(np.bincount([shapes.index(n) for _, n in sectors(s)])/len(sectors(s)), 1/3, atol=.02)
    assert np.allclose(np.bincount([colours.index(c) for c, _ in sectors(s)])/len(sectors(s)), 1/6, atol=.02)
    top, low = s.factors['color'][there].max(-1), s.factors['color'][there].min(-1)
    assert low.max() == 0 and top.min() > .245 and top.max() < .755 and abs(top.mean() - .5) < .01

def test_the_twin_never_changes():
    "Scenes are named by their number in results and runs: these sums are part of the format."
    sums = {}
    for variant in variants:
        s = MultiDSprites(variant=variant, split='test').batch(range(100))
        sums[variant] = hashlib.sha256(s.image.tobytes() + s.mask.tobytes()).hexdigest()[:16]
    assert sums == {'binarized': '98dced13c5635d2f', 'colored_on_grayscale': 'e66678eac2a01c5f', 'colored_on_colored': 'd8d769e27725b3e5'}

@pytest.mark.parametrize('variant', variants)
def test_files(variant, tmp_path):
    "The twin written in the published formats is read back as what it is."
    data = MultiDSprites(num=20, variant=variant); s = data.batch(range(20))
    write_tfrecord(tmp_path/'t', s, layout='h w k'); write_hdf5(tmp_path/'h', dict(test=data))
    got = next(read_tfrecord(tmp_path/'t')); back = HDF5Scenes(tmp_path/'h', 'test').batch(range(20))
    for b in (got, back):
        assert np.array_equal(b.image, s.image) and np.array_equal(b.mask, s.mask)
        for k, v in s.factors.items(): assert np.array_equal(b.factors[k].reshape(v.shape), v), k

@pytest.mark.parametrize('kw, says', [
    (dict(variant='colored'), 'No variant'), (dict(split='valid'), "did you mean 'val'"), (dict(num=0), 'not 0'),
    (dict(saturation=(.9, .1)), 'saturation is a range'),
    (dict(shift=Shift(held_out=('heart red',))), 'colour'),
    (dict(shift=Shift(num_objects=(1, 1), occlusion=(.5, .6))), 'at most 1 object'),
    (dict(variant='binarized', shift=Shift(held_out=('white heart', 'white square', 'white ellipse'))), 'none is left')])
def test_refusals(kw, says):
    with pytest.raises(EmorlError, match=says): MultiDSprites(**kw)

def test_a_condition_nobody_can_meet_ends():
    with pytest.raises(EmorlError, match='range is too narrow'): MultiDSprites(shift=Shift(num_objects=(2, 2), occlusion=(.9901, .9902))).batch([3])

def test_shifted_tetrominoes():
    held = Shift(num_objects=(2, 4), held_out=('red T', 'blue I'), show_held_out=True)
    data = Tetrominoes(shift=held); s = data.batch(range(300)); number = (s.factors['visibility'] > 0).sum(1) - 1
    assert set(number) == {2, 3, 4} and data.num_entities == s.num_entities == 5
    assert np.array_equal((s.mask > 0).sum((1, 2)), 100*number) and np.array_equal(s.image.max(1) > 0, s.mask > 0)
    assert set(np.unique(s.factors['shape'])) == {0, 1, 2, 15, 16, 17, 18}
    same(data.batch([200, 7]), s[[200, 7]]); same(Tetrominoes(shift=Shift(num_objects=(3, 3))).batch(range(50)), Tetrominoes().batch(range(50)))
    with pytest.raises(EmorlError, match='At most 5'): Tetrominoes(shift=Shift(num_objects=(3, 6)))
