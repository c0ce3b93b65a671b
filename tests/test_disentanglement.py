"Disentanglement: the published arithmetic by another way, laws, and what must be refused."
import json, warnings
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import entropy, ks_2samp
from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from emorl.core import EmorlError
from emorl.metrics import disentanglement as m
from emorl.metrics.disentanglement import DCI, activeness, completeness, dci, disentanglement, gap, information, match_slots, mig, predict_properties, sap, separability

def sample(n=80, d=5, seed=0):
    "Objects with two continuous and two discrete factors, and a code that mixes them."
    rng = np.random.default_rng(seed)
    f = dict(x=rng.normal(size=n), y=rng.normal(size=n), shape=rng.integers(1, 4, n).astype(np.uint8), metal=rng.random(n) < .5)
    codes = np.stack([np.asarray(v, float) for v in f.values()], 1) @ rng.normal(size=(4, d)) + .3*rng.normal(size=(n, d))
    return codes, f

# ---- matching

def by_force(o, s, least_iou, least_pixels):
    "The best sum over all ways of pairing big objects with slots."
    objects, slots = [i for i in range(1, len(s)) if s[i] >= max(least_pixels, 1)], range(o.shape[1])
    short, long = sorted([objects, list(slots)], key=len)
    turn = (lambda a, b: (a, b)) if short is objects else (lambda a, b: (b, a))
    best = max(([turn(a, b) for a, b in zip(short, p)] for p in permutations(long, len(short))), key=lambda pairs: sum(o[i, j] for i, j in pairs))
    return sorted((i, j) for i, j in best if o[i, j] >= least_iou)

@pytest.mark.parametrize('slots', [1, 3, 5])
def test_matching_is_the_best_there_is(slots):
    rng = np.random.default_rng(slots)
    o, s = rng.random((30, 5, slots)), rng.integers(0, 120, (30, 5))
    image, entity, slot = match_slots(o, s, .3, 50)
    for i in range(30): assert sorted(zip(entity[image == i], slot[image == i])) == by_force(o[i], s[i], .3, 50)
    assert (entity > 0).all() and (np.diff(image) >= 0).all()

def test_matching_as_the_published_code_does_it():
    "There, small objects stay in the table with a huge penalty, and are taken out afterwards."
    from scipy.optimize import linear_sum_assignment
    rng = np.random.default_rng(7)
    for _ in range(50):
        o, s = rng.random((1, 5, 6))*.4, rng.integers(0, 120, (1, 5))
        table = np.where(s[0, 1:, None] < 50, -1e6, o[0, 1:])
        rows, cols = linear_sum_assignment(table, maximize=True)
        keep = table[rows, cols] >= .1
        image, entity, slot = match_slots(o, s)
        assert entity.tolist() == (rows[keep] + 1).tolist() and slot.tolist() == cols[keep].tolist()

def test_matching_of_nothing():
    for b, t, p in ((0, 4, 3), (2, 1, 3), (2, 4, 0)): assert [len(a) for a in match_slots(np.zeros((b, t, p)), np.full((b, t), 99))] == [0, 0, 0]
    assert len(match_slots(np.ones((1, 2, 1)), np.zeros((1, 2), int), 0, 0)[0]) == 0, 'an object without pixels is matched'
    assert all(a.dtype.kind == 'i' for a in match_slots(np.zeros((0, 4, 3)), np.zeros((0, 4))))

# ---- the published arithmetic, independently

def published(codes, factors, seed=0, model=GradientBoostingRegressor):
    order = np.random.RandomState(5).permutation(len(codes))
    half = -(-len(codes)//2)  # the test half is rounded up, and drawn first
    test, train = order[:half], order[half:]
    table, score, train_score = [], [], []
    for y in factors.values():
        y = np.asarray(y).astype(float)
        p = model(random_state=seed).fit(codes[train], y[train])
        table.append(np.abs(p.feature_importances_))
        score.append(np.mean(p.predict(codes[test]) == y[test])); train_score.append(np.mean(p.predict(codes[train]) == y[train]))
    r = np.stack(table, 1)
    purity = lambda a: 1 - entropy(a + 1e-11, base=len(a))  # of each column
    return r, (purity(r.T)*r.sum(1)).sum()/r.sum(), (purity(r)*r.sum(0)).sum()/r.sum(), np.mean(score), np.mean(train_score)

@pytest.mark.parametrize('n', [80, 81])
def test_paper_compatible(n):
    codes, f = sample(n)
    f['z'] = np.full(n, .7)  # a constant is kept here: no split, no importance, and hit exactly
    r = dci(codes, f, groups=np.zeros(n), paper_compatible=True, seed=3)
    table, d, c, i, train = published(codes, f, 3)
    assert r.names == ('x', 'y', 'shape', 'metal', 'z') and set(r.measures.values()) == {'equality'}
    np.testing.assert_allclose(r.importance, table, atol=1e-12)
    np.testing.assert_allclose([r.disentanglement, r.completeness, r.informativeness, np.mean(list(r.train_scores.values()))], [d, c, i, train], atol=1e-6)
    assert r.informativeness == r.informativeness_by_equality == 1/5 and r.importance[:, 4].sum() == 0

def test_paper_compatible_with_discrete_factors_only():
    "The first predictor is a classifier, and equality is accuracy."
    codes, f = sample(100)
    f = dict(shape=f['shape'], metal=f['metal'])
    r, (table, d, c, i, _) = dci(codes, f, paper_compatible=True), published(codes, f, model=GradientBoostingClassifier)
    np.testing.assert_allclose(r.importance, table, atol=1e-12); np.testing.assert_allclose([r.disentanglement, r.completeness, r.informativeness], [d, c, i], atol=1e-6)
    assert i > .5

def test_a_regressor_never_hits_a_class_exactly():
    "Why the released arithmetic cannot have given the published informativeness."
    rng = np.random.default_rng(0)
    f = dict(x=rng.normal(size=200), color=rng.integers(1, 9, 200), size=rng.integers(1, 3, 200))
    codes = np.stack([v.astype(float) for v in f.values()], 1)
    right, released = dci(codes, f), dci(codes, f, paper_compatible=True)
    assert right.scores['color'] > .95 and right.scores['size'] == 1 and released.informativeness == 0
    assert np.isclose(right.informativeness_by_equality, (right.scores['color'] + 1)/3)

# ---- the right arithmetic

def test_scores_of_a_fresh_predictor_for_each_factor():
    codes, f = sample(120)
    groups = np.arange(120)//4
    r = dci(codes, f, groups, seed=2)
    train, test = m._halves(120, groups, 2)
    for j, (k, y) in enumerate(f.items()):
        p = (GradientBoostingRegressor if y.dtype.kind == 'f' else GradientBoostingClassifier)(random_state=2).fit(codes[train], y[train])
        np.testing.assert_allclose(r.importance[:, j], p.feature_importances_, atol=1e-12)
        assert np.isclose(r.scores[k], p.score(codes[test], y[test])) and np.isclose(r.train_scores[k], p.score(codes[train], y[train]))
    assert np.isclose(r.chance['metal'], (f['metal'][test] == (f['metal'][train].mean() > .5)).mean())

def test_what_an_image_gives_away():
    "A code that only knows which image it is from knows the light of that image; halves of images do not fall for it."
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(30), 6)
    f = dict(light=rng.normal(size=30)[image], kind=rng.normal(size=180))
    codes = rng.normal(size=(30, 4))[image]
    with_images, without = dci(codes, f, image, 'random_forest'), dci(codes, f, None, 'random_forest')
    assert without.scores['light'] > .4 and with_images.scores['light'] < .1
    assert predict_properties(codes, f, image)['mlp']['light'] < .2 < predict_properties(codes, f)['mlp']['light']

def test_labels_are_names():
    "Strings, truth values, bytes and torch tensors are the same as integers."
    codes, f = sample(100)
    text = f | dict(shape=np.array(['', 'cube', 'cylinder', 'sphere'])[f['shape']], metal=f['metal'].astype(np.int64))
    tensors = {k: torch.from_numpy(np.asarray(v)) for k, v in f.items()}
    one, two, three = dci(codes, f), dci(codes, text), dci(torch.from_numpy(codes), tensors, torch.arange(100))
    for other in (two, three): np.testing.assert_array_equal(one.importance, other.importance); assert one.scores == other.scores
    assert mig(codes, f) == mig(codes, text) and sap(codes, f) == sap(codes, text)

def test_nothing_is_modified():
    codes, f = sample(60); before = codes.copy(), {k: v.copy() for k, v in f.items()}
    for fn in (dci, information, separability, predict_properties): fn(codes, f)
    np.testing.assert_array_equal(codes, before[0])
    for k in f: np.testing.assert_array_equal(f[k], before[1][k])

def test_the_seed_is_all_that_is_random():
    codes, f = sample(60)
    assert dci(codes, f, seed=1).json() == dci(codes, f, seed=1).json() != dci(codes, f, seed=2).json()
    assert predict_properties(codes, f, seed=1) == predict_properties(codes, f, seed=1)

def test_json():
    codes, f = sample(60)
    with pytest.warns(UserWarning, match="'z' has one value only"): r = dci(codes, f | dict(z=np.zeros(60)))
    got = json.loads(json.dumps(r.json()))
    assert got['constant'] == ['z'] and got['disentanglement'] == r.disentanglement and np.shape(got['importance']) == (5, 4)
    with pytest.raises(AttributeError): r.scores = {}

def test_a_dead_latent_counts_for_nothing():
    codes, f = sample(100)
    r = dci(np.c_[codes, np.zeros(100)], f)
    assert r.importance[-1].sum() == 0 and np.isfinite([r.disentanglement, r.completeness]).all()
    r = dci(np.zeros((100, 3)), f)  # nothing to split
    assert r.disentanglement == r.completeness == 0 and r.scores == r.chance

def test_rounding_below_zero():
    "A latent's importance may come out as -1e-17; its entropy would be infinite."
    class Model:
        feature_importances_ = np.array([1., -1e-17])
        def fit(self, x, y): return self
        def predict(self, x): return np.zeros(len(x))
    r, *_ = m._use(Model(), Model(), np.zeros((4, 2)), np.zeros(4), (np.arange(2), np.arange(2, 4)), m._equality)
    assert (r >= 0).all() and np.isfinite(disentanglement(np.stack([r, r], 1)))

@pytest.mark.parametrize('shape', [(2, 2), (3, 5), (64, 8)])
def test_entropies(shape):
    r = np.random.default_rng(1).random(shape); r[0] = 0; r /= r.sum(0)
    with np.errstate(invalid='ignore'): rows = 1 - entropy(r.T, base=shape[1])
    assert np.isclose(disentanglement(r), np.nansum(rows*r.sum(1))/r.sum())
    assert np.isclose(completeness(r), (1 - entropy(r, base=shape[0])).mean())  # columns sum to 1
    rng = np.random.default_rng(2); s = r[rng.permutation(shape[0])][:, rng.permutation(shape[1])]
    assert np.isclose(disentanglement(s), disentanglement(r)) and np.isclose(completeness(s), completeness(r))

# ---- MIG, SAP

def test_information_from_the_joint_histogram():
    codes, f = sample(400)
    got = information(codes, f, bins=7)
    h = lambda p: -(p[p > 0]*np.log(p[p > 0])).sum()
    for k, v in f.items():
        v = np.asarray(v, float)
        for i, z in enumerate(codes.T):
            p = np.histogram2d(z, v, [7, 7 if k in 'xy' else len(np.unique(v))])[0]/400
            assert np.isclose(got[k][i], (h(p.sum(0)) + h(p.sum(1)) - h(p))/h(p.sum(0)), atol=1e-9)
    assert np.isclose(mig(codes, f, 7), np.mean([np.sort(s)[-1] - np.sort(s)[-2] for s in got.values()]))

def test_one_threshold_is_the_largest_gap_of_the_distributions():
    rng = np.random.default_rng(0); v = rng.random(500) < .2
    for shift in (0, 1, 3):
        z = rng.normal(size=500) + shift*v
        best = (1 + ks_2samp(z[v], z[~v]).statistic)/2
        got = separability(np.c_[z, z], dict(v=v))['v'][0]
        assert best - .05 < got <= best + 1e-12

def test_scales_do_not_matter():
    codes, f = sample(200); scaled = codes*[1e-3, 1, 1e3, -1, 7] + 5
    for k, s in separability(codes, f).items(): np.testing.assert_allclose(separability(scaled, f)[k], s, atol=1e-6)
    for k, s in information(codes, f).items(): np.testing.assert_allclose(information(codes*[1e-3, 1, 1e3, 2, 7], f)[k], s, atol=.02)
    assert gap(np.array([.2, .9, .6])) == pytest.approx(.3)

# ---- activeness, properties

@pytest.mark.parametrize('lead', [(), (4,), (2, 3)])
def test_activeness_pixel_by_pixel(lead):
    images = torch.rand(*lead, 6, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    flat = images.reshape(-1, 6, 3, 4, 5).double().numpy()
    want = [np.mean([np.var(s[:, c, h, w], ddof=1) for c in range(3) for h in range(4) for w in range(5)]) for s in flat]
    got = activeness(images)
    assert got.shape == lead and got.dtype == np.float64
    np.testing.assert_allclose(np.reshape(got, -1), want, rtol=1e-5)
    np.testing.assert_allclose(activeness(images.half()), got, rtol=1e-2); np.testing.assert_allclose(activeness(images.numpy()), got)

def test_linear_probe_by_hand():
    codes, f = sample(100)
    train, test = m._halves(100, seed=4)
    scale = StandardScaler().fit(codes[train])
    p = LogisticRegression(max_iter=1000).fit(scale.transform(codes[train]), f['shape'][train])
    got = predict_properties(codes, f, seed=4)
    assert np.isclose(got['linear']['shape'], p.score(scale.transform(codes[test]), f['shape'][test]))
    assert {k: list(v) for k, v in got.items()} == dict.fromkeys(('linear', 'mlp', 'baseline'), list(f))
    assert got['linear']['x'] > .5 > .1 > got['baseline']['x']

# ---- refusals

everything = pytest.mark.parametrize('fn', [dci, mig, sap, information, separability, predict_properties])

@everything
@pytest.mark.parametrize('change, words', [
    (lambda c, f: (c[:0], {k: v[:0] for k, v in f.items()}), 'none was matched'),
    (lambda c, f: (c[:19], {k: v[:19] for k, v in f.items()}), 'at least 20 matched objects; got 19'),
    (lambda c, f: (c[:, 0], f), 'numeric codes'), (lambda c, f: (c[:, :1], f), 'got 1'), (lambda c, f: (c.astype(str), f), 'numeric codes'),
    (lambda c, f: (np.where(c > 2, np.inf, c), f), 'not finite'), (lambda c, f: (c, {}), 'mapping'), (lambda c, f: (c, [f['x']]), 'mapping'),
    (lambda c, f: (c, f | dict(rgb=np.zeros((len(c), 3)))), "'rgb' needs one value for each"), (lambda c, f: (c, f | dict(x=f['x']*np.nan)), "'x' holds values that are not finite"),
    (lambda c, f: (c, dict(a=np.zeros(len(c)), b=np.array(['one']*len(c)))), 'No factor varies among these objects: a, b'), (lambda c, f: (c, f | dict(x=f['x']*1j)), 'complex128')])
def test_refusals(fn, change, words):
    with pytest.raises(EmorlError, match=words): fn(*change(*sample(40)))

@everything
def test_a_constant_factor_is_said_once_and_left_out(fn):
    codes, f = sample(60)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always'); fn(codes, f | dict(z=np.full(60, 2)))
    assert [str(w.message) for w in said if "'z'" in str(w.message)] == ["Factor 'z' has one value only, so it is left out."]

@pytest.mark.parametrize('fn', [dci, predict_properties])
def test_halves_that_cannot_be_used(fn):
    codes, f = sample(40)
    with pytest.raises(EmorlError, match='of one image'): fn(codes, f, np.zeros(40))
    with pytest.raises(EmorlError, match='one group for each of 40 objects'): fn(codes, f, np.zeros(39))
    with pytest.raises(EmorlError, match="value rare of factor 'shape' occurs in only one half"): fn(codes, f | dict(shape=np.array(['common']*39 + ['rare'])))
    with pytest.raises(EmorlError, match="'x' does not vary in one half"): fn(codes, f | dict(x=np.r_[1., np.zeros(39)]))

def test_twenty_objects_are_enough():
    codes, f = sample(20, seed=1)
    f = {k: f[k] for k in ('x', 'y', 'metal')}
    assert np.isfinite(dci(codes, f).informativeness) and all(np.isfinite(list(v.values())).all() for v in predict_properties(codes, f).values())

def test_dci_needs_two_factors():
    codes, f = sample(40)
    with pytest.raises(EmorlError, match="only 'x' does"): dci(codes, dict(x=f['x'], z=np.zeros(40)))
    with pytest.raises(EmorlError, match='first; \'shape\' is discrete'): dci(codes, dict(shape=f['shape'], x=f['x']), paper_compatible=True)
    with pytest.raises(EmorlError, match="'kind' is text"): dci(codes, dict(x=f['x'], kind=np.array(list('ab')*20)), paper_compatible=True)
