"""Laws of the segmentation scores, on scenes that nobody thought of; and the pairing by brute force. Seeded and bounded."""
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import adjusted_rand_score

from emorl.core import EmorlError
from emorl.metrics.segmentation import (ari, by_category, clevrtex_names, contingency, covering, iou, mbo, miou, object_ious, object_sum,
                                        published_metrics, resize_masks, segment_scores, segmentation_metrics, to_index)

bounded = settings(max_examples=120, derandomize=True, database=None, deadline=None)
fg = [n for n in segmentation_metrics if n.endswith('_fg')]
full = [n for n in segmentation_metrics if not n.endswith('_fg')]
same = lambda a, b, **kw: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12, **kw)

@st.composite
def scenes(draw, most=4):
    "True and predicted labels [b h w]: from unrelated to equal, with labels that are not used."
    b, h, w = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    t, p, share = draw(st.integers(1, most)), draw(st.integers(1, most)), draw(st.sampled_from([0, .5, .9, 1]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    true, other = rng.integers(t, size=(b, h, w)), rng.integers(p, size=(b, h, w))
    return true, np.where(rng.random(true.shape) < share, true, other), rng

def overlaps(t, p):
    "IoU of one image's labels, from sets of pixels."
    px = lambda a, v: {tuple(x) for x in np.argwhere(a == v)}
    return {(i, j): len(px(t, i) & px(p, j))/len(px(t, i) | px(p, j)) for i in np.unique(t) for j in np.unique(p)}

def best_pairings(o, labels, slots):
    "Overlap of each label, in every one-to-one pairing with the highest sum."
    ways = [[o.get(x, 0.) for x in zip(labels, way)] for way in set(permutations([*slots] + [None]*len(labels), len(labels)))]
    return [np.array(m) for m in ways if sum(m) > max(map(sum, ways)) - 1e-9]

def dice(m): return 2*m/(1 + m)

# ---- values

@given(scenes())
@bounded
def test_ari_is_that_of_scikit_learn(scene):
    t, p, _ = scene
    for i, (a, b) in enumerate(zip(ari(t, p), ari(t, p, False))):
        keep = t[i] > 0
        same(b, adjusted_rand_score(t[i].ravel(), p[i].ravel()))
        same(a, adjusted_rand_score(t[i][keep], p[i][keep]) if keep.any() else np.nan)

@given(scenes(most=3))
@bounded
def test_everything_by_brute_force(scene):
    "Where several pairings are best, the scores are those of one of them."
    t, p, _ = scene
    got = segment_scores(t, p)
    for i in range(len(t)):
        labels, slots, o = np.unique(t[i]), np.unique(p[i]), overlaps(t[i], p[i])
        s = {n: v[i] for n, v in got.items()}
        pairs, seen = max(len(labels), len(slots)), 0 in labels
        for end, scored in (('_fg', labels[labels > 0]), ('', labels)):
            if not len(scored): assert all(np.isnan(s[n]) for n in fg); continue
            best, size = [max(o[k, j] for j in slots) for k in scored], [(t[i] == k).sum() for k in scored]
            same([s['mbo' + end], s['msc' + end], s['sc' + end]], [np.mean(best)]*2 + [np.dot(size, best)/np.sum(size)])
            same(s['miou' + end], best_pairings(o, scored, slots)[0].sum()/len(scored))
        per_pair = lambda m, num: [m.sum()/num, dice(m).sum()/num]
        of = lambda m: per_pair(m, pairs) + (per_pair(m[seen:], pairs - seen) if (labels > 0).any() else [-1, -1])
        mine = np.nan_to_num([s[n] for n in ('miou_pairs', 'dice', 'miou_pairs_fg', 'dice_fg')], nan=-1)
        assert min(np.abs(mine - of(m)).max() for m in best_pairings(o, labels, slots)) < 1e-12
        assert s['count_acc'] == (len(labels) == len(slots))

def published_ari(t, p):
    "The released arithmetic of FG-ARI on one image: pairs of foreground pixels, what is no number made 0, what has one cell made 1."
    n = np.array([[((t == i) & (p == j)).sum() for j in range(p.max() + 1)] for i in range(1, t.max() + 1)], float).reshape(t.max(), p.max() + 1)
    a, b, total = n.sum(1), n.sum(0), n.sum()
    with np.errstate(invalid='ignore'):
        chance = (a*(a - 1)).sum()*(b*(b - 1)).sum()/(total*(total - 1))
        score = ((n*(n - 1)).sum() - chance)/(((a*(a - 1)).sum() + (b*(b - 1)).sum())/2 - chance)
    return 1. if (n > 0).sum() == 1 else np.nan_to_num(score)

@given(scenes(most=3))
@bounded
def test_ari_as_published(scene):
    t, p, _ = scene
    got = ari(t, p, paper_compatible=True)
    same(got, [published_ari(*pair) for pair in zip(t, p)])
    np.testing.assert_array_equal(got, segment_scores(t, p, 'ari_fg_published')['ari_fg_published'])
    other = ari(t, p)
    assert (np.isnan(other) | (got == other) | (got == 0)).all()

def test_scores_to_compare_with_are_asked_for_by_name(): assert not set(published_metrics) & set(segment_scores(np.ones((1, 2, 2), int), np.ones((1, 2, 2), int)))

# ---- laws

@given(scenes())
@bounded
def test_names_of_slots_do_not_matter(scene):
    t, p, rng = scene
    a, b = segment_scores(t, p), segment_scores(t, rng.permutation(9)[p])
    for n in segmentation_metrics: np.testing.assert_array_equal(a[n], b[n], err_msg=n)
    a, b = object_ious(t, p), object_ious(t, rng.permutation(9)[p])
    for n in a: np.testing.assert_array_equal(a[n], b[n], err_msg=n)

def test_names_of_slots_do_not_matter_where_pairings_tie():
    "Slot 0 with the background and slot 2 with the large object, or slot 0 with the large one and slot 2 with the small: 1/3 + 2/5 = 2/5 + 1/3, but not without the background."
    t, p = np.array([[[2, 2, 1, 0, 2, 2]]]), np.array([[[0, 0, 2, 0, 2, 2]]])
    assert len({round(m[1:].sum(), 9) for m in best_pairings(overlaps(t, p), range(3), (0, 2))}) == 2
    assert len({segment_scores(t, np.array(names)[p], 'miou_pairs_fg')['miou_pairs_fg'].item() for names in permutations(range(3))}) == 1

@given(scenes())
@bounded
def test_names_of_objects_do_not_matter(scene):
    "But that of the background does; and where several pairings are best, those scores can differ that the sum of overlaps does not fix."
    t, p, rng = scene
    renamed = np.where(t > 0, 1 + rng.permutation(9)[t], 0)
    ways = [best_pairings(overlaps(x, y), np.unique(x), np.unique(y)) for x, y in zip(t, p)]
    unique = all(len({(*np.round(sorted(m), 9), round(m[0], 9)) for m in w}) == 1 for w in ways)
    a, b = segment_scores(t, p), segment_scores(renamed, p)
    for n in segmentation_metrics:
        if unique or n not in ('dice', 'dice_fg', 'miou_pairs_fg'): same(a[n], b[n], err_msg=n)

@given(scenes())
@bounded
def test_bounds_and_order(scene):
    t, p, _ = scene
    s, has = segment_scores(t, p), (t > 0).any((1, 2))
    for n, v in s.items():
        assert v.dtype == np.float64 and v.shape == (len(t),)
        np.testing.assert_array_equal(np.isnan(v), ~has if n in fg else False)
        v = v[~np.isnan(v)]
        assert (v <= 1 + 1e-12).all() and (n.startswith('ari') or (v >= 0).all()), n
    for end in ('_fg', ''):
        above = lambda x, y: (np.nan_to_num(s[x + end]) >= np.nan_to_num(s[y + end]) - 1e-12).all()
        assert above('mbo', 'miou') and above('dice', 'miou_pairs') and above('miou', 'miou_pairs')

@given(scenes())
@bounded
def test_equal_segmentations_score_1(scene):
    t, _, rng = scene
    has = (t > 0).any((1, 2))
    for n, v in segment_scores(t, rng.permutation(9)[t]).items(): same(v, np.where(has | (n in full), 1., np.nan), err_msg=n)

@given(scenes())
@bounded
def test_nothing_is_modified_and_images_do_not_meet(scene):
    t, p, _ = scene
    soft = torch.nn.functional.one_hot(torch.tensor(p), int(p.max()) + 1).permute(0, 3, 1, 2)[:, :, None].double()*.8 + .1
    copies = t.copy(), p.copy(), soft.clone()
    for a in (t, p): a.setflags(write=False)
    whole, from_masks = segment_scores(t, p), segment_scores(torch.tensor(t), soft)
    alone = [segment_scores(t[i:i + 1], p[i:i + 1]) for i in range(len(t))]
    for n in segmentation_metrics:
        np.testing.assert_array_equal(whole[n], np.concatenate([a[n] for a in alone]), err_msg=n)
        np.testing.assert_array_equal(whole[n], from_masks[n], err_msg=n)
    object_ious(t, p); object_sum(t, t); resize_masks(soft, 7); contingency(t, p)
    assert (t == copies[0]).all() and (p == copies[1]).all() and (soft == copies[2]).all()

@given(scenes())
@bounded
def test_one_name_at_a_time_is_the_same(scene):
    t, p, _ = scene
    s = segment_scores(t, p)
    for n in segmentation_metrics: np.testing.assert_array_equal(segment_scores(t, p, n)[n], s[n])
    for f, n in ((ari, 'ari'), (mbo, 'mbo'), (covering, 'sc'), (miou, 'miou')):
        np.testing.assert_array_equal(f(t, p), s[n + '_fg']); np.testing.assert_array_equal(f(t, p, False), s[n])

@given(scenes())
@bounded
def test_objects_make_up_the_scores(scene):
    t, p, rng = scene
    k = 6
    got, s, o = object_ious(t, p, k), segment_scores(t, p), iou(t, p)
    seen = np.stack([(t == i).any((1, 2)) for i in range(k)], 1)
    for v in got.values(): assert v.shape == (len(t), k); np.testing.assert_array_equal(np.isnan(v), ~seen)
    same(np.nanmean(got['matched'], 1), s['miou']); same(np.nanmean(got['best'], 1), s['mbo'])
    np.testing.assert_array_equal(np.nan_to_num(got['best'])[:, :o.shape[1]], o.max(2))
    categories = rng.integers(3, size=seen.shape)
    groups = by_category(got['best'], categories)
    assert sum(map(len, groups.values())) == seen.sum() and all((g == got['best'][seen & (categories == c)]).all() for c, g in groups.items())
    error = rng.random(t.shape)
    sums = object_sum(error, t, k)
    np.testing.assert_array_equal(np.isnan(sums), ~seen); same(np.nansum(sums, 1), error.sum((1, 2)))

def test_objects_without_category_are_left_out():
    groups = by_category(torch.tensor([[.5, np.nan, .25]]), [[np.nan, 1, 2]])
    assert {k: v.tolist() for k, v in groups.items()} == {2: [.25]}

# ---- masks made larger

@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 24), st.integers(1, 24), st.integers(0, 99))
@bounded
def test_resizing_is_that_of_pillow(h, w, new_h, new_w, seed):
    masks = np.random.default_rng(seed).dirichlet([.3]*3, size=(2, h, w)).transpose(0, 3, 1, 2).astype(np.float32)
    got = resize_masks(masks[:, :, None], (new_h, new_w))
    want = [[np.asarray(Image.fromarray(m).resize((new_w, new_h), Image.Resampling.BICUBIC)) for m in image] for image in masks]
    np.testing.assert_allclose(got[:, :, 0], want, rtol=0, atol=2e-6)
    np.testing.assert_allclose(got.sum(1), 1, rtol=0, atol=2e-6)
    assert got.dtype == np.float64 and to_index(got).shape == (2, new_h, new_w)

# ---- refusals and names

def test_published_names_are_ours(): assert set(clevrtex_names.values()) <= set(segmentation_metrics)

@pytest.mark.parametrize('call, says', [
    (lambda t: segment_scores(t, t, ['fg_ari']), "No segmentation metric is called 'fg_ari'; did you mean"),
    (lambda t: segment_scores(t, t[:, 1:]), 'must cover the same pixels; got [1, 2, 2] and [1, 1, 2]'),
    (lambda t: by_category(np.zeros((1, 2)), np.zeros((1, 3))), 'Expected a category for each value, [1, 2]; got [1, 3]'),
    (lambda t: object_sum(t[0], t), 'Expected one value per pixel, [1, 2, 2]; got [2, 2]'),
    (lambda t: object_ious(t, t, 1), 'Expected true labels from 0 to 0; got 0 to 1'),
    (lambda t: resize_masks(t, 4), 'got [1, 2, 2] and 4 x 4'),
    (lambda t: resize_masks(t[None], (4, -1)), '4 x -1')])
def test_bad_input_is_one_sentence(call, says):
    with pytest.raises(EmorlError) as e: call(np.array([[[0, 1], [1, 1]]]))
    assert says in str(e.value)
