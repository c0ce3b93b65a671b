"The CLEVR twin: against independent computations, other processes, real renders and Blender, where they are at hand."
import hashlib, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emorl.core import EmorlError
from emorl.data.clevr import Clevr, render, sample
from emorl.data.raycast import _hit, _inside, _nearest, _normal, _pixels, _rays, _seen_of_lamp, frame, full, owners, picture, picture_blender, published_crop
from emorl.data.shifts import Shift
from emorl.data.tfrecord import read_tfrecord
from tfrecord_writer import write_tfrecord

real_renders = Path(__file__).resolve().parents[2]/'shared/data/clevr_renders.npz'

def digest(scenes): return hashlib.sha256(scenes.image.tobytes() + scenes.mask.tobytes() + b''.join(v.tobytes() for v in scenes.factors.values())).hexdigest()

def test_another_process_draws_the_same():
    code = ("import hashlib; from emorl.data.clevr import Clevr; s = Clevr(seed=5, size=(24, 32), split='test').batch([3, 0, 8]);"
            "print(hashlib.sha256(s.image.tobytes() + s.mask.tobytes() + b''.join(v.tobytes() for v in s.factors.values())).hexdigest())")
    there = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()
    data = Clevr(seed=5, size=(24, 32), split='test')
    assert digest(data.batch([3, 0, 8])) == there
    assert digest(data.batch([8, 3, 0])[[1, 2, 0]]) == there

def test_a_batch_is_its_scenes():
    data = Clevr(size=(16, 16))
    both = data.batch([2, 9])
    for i, n in enumerate((2, 9)):
        one = data.batch([n])
        assert (one.image[0] == both.image[i]).all() and (one.mask[0] == both.mask[i]).all()
        assert all((one.factors[k][0] == both.factors[k][i]).all() for k in one.factors)

# ---- the ray caster against slower ways to the same thing

def rounded(shape, h, rho, p):
    "Signed distance to a rounded body, from its definition."
    core = h - rho
    if shape == 2: return np.sqrt((p**2).sum(-1)) - h
    q = abs(p) - core if shape == 1 else np.stack([np.hypot(p[..., 0], p[..., 1]) - core, abs(p[..., 2]) - core], -1)
    return np.sqrt((np.maximum(q, 0)**2).sum(-1)) + np.minimum(q.max(-1), 0) - rho

@pytest.mark.parametrize('shape, share', [(1, .12), (2, 1.), (3, .06)])
def test_hits_are_where_a_fine_march_finds_them(shape, share):
    world = replace(sample(0, [0])[0], shape=np.array([shape]), half=np.array([.7]), xy=np.array([[.3, -.8]]), rotation=np.array([.9]),
                    colour=np.ones((1, 3)), metal=np.array([False]))
    rng = np.random.default_rng(shape)
    o = rng.normal(size=(3, 1500)); o = world.centre[0][:, None] + 3*o/np.sqrt((o**2).sum(0))
    d = world.centre[0][:, None] + rng.uniform(-1, 1, (3, 1500)) - o; d /= np.sqrt((d**2).sum(0))
    t = _hit(world, 0, o.astype(np.float32), d.astype(np.float32))
    c, s = np.cos(.9), np.sin(.9); turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    steps = np.arange(1, 6, .004)
    p = ((o[..., None] + d[..., None]*steps) - world.centre[0][:, None, None]).transpose(1, 2, 0) @ turn.T
    inside = rounded(shape, .7, .7*share, p) < 0
    first = np.where(inside.any(1), steps[inside.argmax(1)], np.inf)
    clear = inside.sum(1) != 0
    assert np.isfinite(t[clear]).all() and abs(t[clear] - first[clear]).max() < .006
    assert (np.isfinite(t) & ~clear).mean() < .01  # the march steps over the finest grazing hits
    hit = np.isfinite(t); at = o[:, hit] + t[hit]*d[:, hit]; eps = 1e-3
    n = _normal(world, 0, at.astype(np.float32)); local = lambda x: (x - world.centre[0][:, None]).T @ turn.T
    assert abs(rounded(shape, .7, .7*share, local(at + eps*n)) - eps).max() < 3e-4  # along the normal the distance grows by as much

def test_rectangles_lose_nothing():
    for world in sample(3, range(6)):
        mask, alone = owners(world)
        for k in range(len(world)):
            only = replace(world, **{f: getattr(world, f)[k:k + 1] for f in ('shape', 'half', 'xy', 'rotation', 'colour', 'metal')})
            d = _rays(world.camera, *_pixels(frame, full, 1)).reshape(3, -1)
            seen = _nearest(only, np.asarray(world.camera, np.float32)[:, None].repeat(d.shape[1], 1), d, np.full(d.shape[1], -1))[0]
            assert (seen == 1).sum() == alone[k]
            assert ((mask == k + 1).ravel() <= (seen == 1)).all()

def test_shadow_rays_left_out_hit_nothing(monkeypatch):
    world = sample(1, [4])[0]
    p = np.random.default_rng(0).uniform(-4, 4, (3, 4000)).astype(np.float32); p[2] = 0
    args = p, np.zeros(4000, int), np.ones(4000, bool), np.arange(4000) % 4
    fast = [_seen_of_lamp(world, i, *args) for i in range(4)]
    monkeypatch.setattr('emorl.data.raycast._bound', lambda world, k: 100.)
    for i in range(4): assert (fast[i] == _seen_of_lamp(world, i, *args)).all()

def test_turned_alike_looks_alike():
    world = sample(2, [1])[0]
    cubes, round_ = world.shape == 1, world.shape != 1
    turned = replace(world, rotation=world.rotation + np.where(cubes, np.pi/2, 1.))
    a, b = (picture(w, (60, 60), published_crop).astype(int) for w in (world, turned))
    assert (abs(a - b) > 2).mean() < .002

def test_axis_parallel_rays():
    o, d = np.array([[-3.], [0], [0]], np.float32), np.array([[1.], [0], [0]], np.float32)
    for shape in (1, 2, 3): assert np.allclose(np.ravel(_inside(shape, np.float32(.5), o, d)), [2.5, 3.5])
    o[1] = .6
    for shape in (1, 2, 3):
        enter, leave = _inside(shape, np.float32(.5), o, d)
        assert not (enter < leave)[0]

# ---- files, real renders, Blender

def test_round_trip_through_the_published_format(tmp_path):
    scenes = Clevr(size=frame, crop=full, samples=1).batch([0, 1])
    write_tfrecord(tmp_path/'clevr.tfrecords', scenes)
    back = next(read_tfrecord(tmp_path/'clevr.tfrecords'))
    assert (back.image == scenes.image).all() and (back.mask == scenes.mask).all() and set(back.factors) == set(scenes.factors)
    for k, v in scenes.factors.items(): assert back.factors[k].dtype == v.dtype and (back.factors[k] == v).all()

@pytest.mark.skipif(not real_renders.exists(), reason='the three real renders are not at hand')
def test_corners_are_as_bright_as_the_real_ones():
    real = np.load(real_renders)['imgs'][:, 29:221, 64:256]
    worlds = sample(0, range(60), 'clevr6')
    bare = [replace(w, **{f: getattr(w, f)[:0] for f in ('shape', 'half', 'xy', 'rotation', 'colour', 'metal')}) for w in worlds]  # no object stands in a corner
    ours = render(bare, (24, 24), samples=1).image[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean(0)  # [3 4], over the lamps' places
    theirs = np.stack([[i[:8, :8], i[:8, -8:], i[-8:, :8], i[-8:, -8:]] for i in real]).mean((0, 2, 3)).T
    assert abs(ours - theirs).max() < 6, f'{ours.round()} against {theirs.round()}'

def test_without_blender_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'bpy', None)
    with pytest.raises(EmorlError, match=r'pip install .emorl\[blender\]'): Clevr(engine='blender', size=(8, 8)).batch([0])

def test_blender_sees_the_same_world():
    pytest.importorskip('bpy', reason='Blender is not installed: pip install emorl[blender]', exc_type=ImportError)
    world = sample(0, [0], 'clevr6')[0]
    for size in ((48, 48), (32, 48)):
        a, b = (draw(world, size, published_crop, 1).astype(float) for draw in (picture, picture_blender))
        assert abs(a - b).mean() < 6 and abs(a.mean() - b.mean()) < 5

def test_a_split_never_shows_what_is_held_out():
    held = ('red cube', 'cyan sphere')
    pairs = lambda s: set(zip(s.factors['color'].ravel().tolist(), s.factors['shape'].ravel().tolist())) - {(0, 0)}
    options = dict(size=(4, 4), samples=1)
    assert not pairs(Clevr(shift=Shift(held_out=held), **options).batch(range(30))) & {(2, 1), (7, 2)}
    assert pairs(Clevr(shift=Shift(held_out=held, show_held_out=True), **options).batch(range(5))) == {(2, 1), (7, 2)}
