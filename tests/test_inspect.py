"The inspector without a browser: its widgets are driven by their traits. (What each part does is shown on the pages 38, 45 and 61.)"
import datetime, io, threading, time

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('anywidget', reason='anywidget is not installed')

from emorl.board import Background, tile
from emorl.checkpoint import load
from emorl.core import Reconstruction
from emorl.data.hdf5 import HDF5Scenes, write_hdf5
from emorl.data.scenes import InMemory, Scenes
from emorl.data.tetrominoes import tetrominoes_real
from emorl.inspect import SlotInspector, app, app_notebook, free_port
from emorl.metrics.disentanglement import activeness
from emorl.models.adapter import Adapted
from emorl.models.emorl import EfficientMORL, EmorlConfig
from emorl.models.slot_attention import SlotAttention, SlotAttentionConfig
from emorl.session import Choice, Remembering, Session, SlotScene
from emorl.viz import slot_colors

@pytest.fixture(scope='module')
def model(): return load('tetrominoes_cpu')
@pytest.fixture(scope='module')
def scenes(): return tetrominoes_real()
@pytest.fixture
def inspector(model, scenes): return SlotInspector(model, scenes, ranges=np.tile([-3., 3.], (32, 1))).wait()

def sources(inspector, row=0): return [t['src'] for t in inspector.knobs.board.rows[row]['tiles']]
def keys(inspector, row=1): return [t['key'] for t in inspector.knobs.board.rows[row]['tiles']]
def upload(inspector, data): inspector.knobs.upload.value = [dict(name='x.png', type='image/png', size=len(data), content=memoryview(data), last_modified=datetime.datetime.now())]
def png(pixels):
    file = io.BytesIO(); Image.fromarray(pixels).save(file, 'PNG'); return file.getvalue()

def test_every_step_has_its_picture(inspector):
    k, seen = inspector.knobs, []
    for _, n in k.step.options: k.step.value = n; inspector.wait(); seen.append(sources(inspector)[2])
    assert len(set(seen)) == len(k.step.options) == 6 and inspector.session.step == 'I3'

@pytest.mark.parametrize('knob, value', [('index', 4), ('seed', 1), ('num_slots', 5), ('num_refinements', 1)])
def test_a_choice_is_inferred_once(inspector, knob, value):
    first, k = sources(inspector), inspector.knobs
    old = getattr(k, knob).value
    setattr(getattr(k, knob), 'value', value); inspector.wait()
    assert sources(inspector) != first and len(inspector.session.known) == 2
    if knob == 'num_slots': assert keys(inspector) == [f'slot/{i}' for i in range(5)] == [f'slot/{i}' for _, i in k.slot.options]
    if knob == 'num_refinements': assert k.step.options[-1][1] == 'I1' == k.step.value
    setattr(getattr(k, knob), 'value', old); inspector.wait()
    assert len(inspector.session.known) == 2
    if knob != 'num_refinements': assert sources(inspector) == first

def test_clicks_select(inspector):
    k = inspector.knobs
    k.board.clicked = dict(key='slot/2', x=-1, y=-1, count=1); inspector.wait()
    assert k.slot.value == 2 and [t['selected'] for t in k.board.rows[1]['tiles']] == [False, False, True, False]
    k.board.clicked = dict(key='scene/attention', x=20.5/35, y=14.5/35, count=2)
    assert k.slot.value == inspector.session.owner(20, 14)
    before = k.slot.value
    k.board.clicked = dict(key='scene/image', x=-1, y=-1, count=3)
    assert k.slot.value == before, 'the keyboard points at no pixel'

def test_a_dragged_slider_is_one_change_and_never_waits(inspector):
    k, s, own = inspector.knobs, inspector.session, inspector.selected
    knob = k.latents[0]
    start, before = s.scene.slots[own, knob.latent].item(), sources(inspector)[2]
    began = time.perf_counter()
    for v in np.linspace(0, 100, 201): knob.slider.value = int(v)
    assert time.perf_counter() - began < 5 and len(s.states) == 2
    inspector.wait()
    assert sources(inspector)[2] != before and s.scene.slots[own, knob.latent].item() == pytest.approx(knob.range[1])
    k.undo.click(); inspector.wait()
    assert sources(inspector)[2] == before and knob.number.value == pytest.approx(start, abs=1e-3) and k.undo.disabled

def shows(knob, value):
    "Whether slider and number say it."
    assert knob.number.value == pytest.approx(value, abs=6e-4) and abs(knob.value(knob.slider.value) - value) <= .501*(knob.range[1] - knob.range[0])/100

def test_sliders_follow_the_slot_and_keep_ranges(inspector):
    k, s = inspector.knobs, inspector.session
    for slot in (0, 1, 2, 0):
        k.slot.value = slot; inspector.wait()
        assert len(k.sliders.children) == 6 and len({x.latent for x in k.latents}) == 6
        for x in k.latents: assert x.slot == slot and x.range[0] <= -3 and x.range[1] >= 3; shows(x, s.scene.slots[slot, x.latent].item())
    assert not s.edited

def test_a_slider_has_nothing_that_a_browser_rounds(inspector):
    k = inspector.knobs
    for slot in range(4):
        k.slot.value = slot; inspector.wait()
        for x in k.latents: assert type(x.slider.value) is int and (x.slider.min, x.slider.max, x.slider.step) == (0, 100, 1)

def test_a_late_ranking_does_not_hide_the_sliders(inspector, monkeypatch):
    k, begun, held, real = inspector.knobs, threading.Event(), threading.Event(), activeness
    def slow(*args): begun.set(); held.wait(30); return real(*args)
    monkeypatch.setattr('emorl.inspect.activeness', slow)
    k.step.value = 'I2'; assert begun.wait(30)
    k.step.value = 'I3'; inspector.refresh.wait(); assert k.sliders.layout.visibility == 'visible', 'known from before'
    shown = []; k.sliders.layout.observe(lambda c: shown.append(c.new), 'visibility')
    held.set(); inspector.wait(); assert shown == [] and inspector.ranked == inspector.seen

def test_a_number_may_leave_the_range(inspector):
    k, s, own = inspector.knobs, inspector.session, inspector.selected
    x = k.latents[0]; lo, hi = x.range
    x.number.value = hi + 2; inspector.wait()
    assert x.range == (lo, hi + 2) and x.slider.value == 100 and s.scene.slots[own, x.latent].item() == pytest.approx(hi + 2)
    x.slider.value = 99; inspector.wait(); assert x.range == (lo, hi + 2) and x.slider.value == 99, 'it stays wide under the hand'
    shows(x, s.scene.slots[own, x.latent].item()); assert len(s.states) == 2
    k.undo.click(); k.slot.value = (own + 1) % 4; inspector.wait(); k.slot.value = own; inspector.wait(); assert k.latents[0].range == (lo, hi)

def test_remove_duplicate_undo_reset(inspector):
    k, s = inspector.knobs, inspector.session
    k.slot.value = 1; k.remove.click(); inspector.wait()
    assert keys(inspector) == ['slot/0', 'slot/2', 'slot/3'] and inspector.selected in (0, 2, 3)
    k.slot.value = 2; k.duplicate.click(); inspector.wait()
    assert keys(inspector) == ['slot/0', 'slot/2', 'slot/3', 'slot/4'] and k.slot.value == 4
    assert [t['color'] for t in k.board.rows[1]['tiles']] == ['#%02x%02x%02x' % tuple((slot_colors(5)[i]*255).round().int().tolist()) for i in (0, 2, 3, 4)]
    k.reset.click(); inspector.wait(); assert keys(inspector) == ['slot/0', 'slot/1', 'slot/2', 'slot/3'] and not s.edited
    k.undo.click(); inspector.wait(); assert s.edited and k.slot.value in (0, 2, 3, 4)
    for _ in range(4):
        k.remove.click(); inspector.wait()
    assert 'last slot' in k.message.value and len(keys(inspector)) == 1
    k.undo.click(); inspector.wait(); assert k.message.value == '' and len(keys(inspector)) == 2

def test_a_click_never_waits_for_the_background(inspector):
    k, held, draw, own = inspector.knobs, threading.Event(), inspector.refresh.work, inspector.selected
    inspector.refresh.work = lambda: (held.wait(30), draw())
    began = time.perf_counter(); k.duplicate.click(); assert time.perf_counter() - began < 5 and k.slot.value == own
    held.set(); inspector.wait(); assert k.slot.value == 4 == inspector.selected and keys(inspector)[-1] == 'slot/4'
    k.duplicate.click(); k.undo.click(); inspector.wait(); assert k.slot.value == 4 and k.message.value == '', 'a copy that is gone again is not selected'

def test_second_image(inspector):
    k, s, own = inspector.knobs, inspector.session, inspector.selected
    k.swap.click(); assert 'no second image' in k.message.value
    k.other.value = 7; k.beside.click(); inspector.wait()
    assert keys(inspector, -1) == ['other/image', 'other/painted', 'other/0', 'other/1', 'other/2', 'other/3'] and k.message.value == ''
    mine, theirs = s.scene.slots.clone(), s.other.slots.clone()
    k.board.clicked = dict(key='other/1', x=.5, y=.5, count=1); assert k.other_slot.value == 1
    k.swap.click(); assert torch.equal(s.scene.slots[own], theirs[1]) and torch.equal(s.other.slots[1], mine[own])
    k.undo.click(); k.blend.value = .25; k.blend.value = .5; inspector.wait()
    assert torch.allclose(s.scene.slots[own], (mine[own] + theirs[1])/2, atol=1e-6) and len(s.states) == 3
    k.undo.click(); inspector.wait(); assert k.blend.value == 0 and torch.equal(s.scene.slots[own], mine[own]), 'the slider says what is'
    k.blend.value = .5; k.slot.value = (own + 1) % 4; inspector.wait(); assert k.blend.value == 0, 'another slot is not on its way'

def test_a_second_image_stays_at_other_steps(inspector):
    k, s = inspector.knobs, inspector.session
    k.other.value = 7; k.beside.click(); inspector.wait()
    beside = sources(inspector, -1)
    for step in ('L2', 'I1', 'I3'): k.step.value = step; inspector.wait(); assert keys(inspector, -1)[0] == 'other/image' and sources(inspector, -1) == beside
    k.step.value = 'L3'; inspector.wait(); k.swap.click(); inspector.wait(); assert sources(inspector, -1) != beside, 'swapped at this step'
    k.step.value = 'I3'; inspector.wait(); assert sources(inspector, -1) == beside and not s.edited
    k.undo.click(); inspector.wait(); assert len(inspector.knobs.board.rows) == 4
    k.step.value = 'L3'; inspector.wait(); assert s.edited and len(inspector.knobs.board.rows) == 5, 'where it was used it stays'

def test_a_move_is_quick(inspector):
    knob = inspector.knobs.latents[0]
    def move(v):
        began = time.process_time(); knob.number.value = float(v); inspector.refresh.wait(); return time.process_time() - began
    assert np.median([move(v) for v in np.linspace(-2.9, 2.9, 15)]) < .15, 'of the processor, so that what others do does not count'

def test_upload(inspector, scenes):
    k = inspector.knobs
    upload(inspector, png(scenes.batch([6]).image[0].transpose(1, 2, 0))); inspector.wait()
    assert k.message.value == '' and np.array_equal(inspector.session.now.scenes.image, scenes.batch([6]).image) and 'uploaded' in k.facts.value
    for bad, says in [(b'no picture', 'not a picture'), (png(np.zeros((20, 30, 3), np.uint8)), '30 wide and 20 high'), (png(np.zeros((35, 35, 3), np.uint8))[:60], 'not a picture')]:
        upload(inspector, bad); inspector.wait()
        assert says in k.message.value and np.array_equal(inspector.session.now.scenes.image, scenes.batch([6]).image), 'what was there stays'
    k.seed.value = 3; inspector.wait(); assert k.message.value == '' and inspector.session.now.choice.picture
    k.index.value = 2; inspector.wait(); assert inspector.session.now.choice.index == 2 and not inspector.session.now.choice.picture

def test_markup_in_an_error_is_text(inspector):
    inspector._failed(ValueError('<script>alert(1)</script>')); assert '<script>' not in inspector.knobs.message.value

def test_errors_of_datasets(model, scenes, tmp_path):
    write_hdf5(tmp_path/'a.h5', {'test': scenes})
    gone = HDF5Scenes(tmp_path/'a.h5', 'test'); (tmp_path/'a.h5').unlink()
    k = SlotInspector(model, gone).wait().knobs
    assert 'a.h5' in k.message.value and k.board.rows == []
    write_hdf5(tmp_path/'b.h5', {'test': scenes})
    inspector = SlotInspector(model, opened := HDF5Scenes(tmp_path/'b.h5', 'test')).wait(); k = inspector.knobs
    opened.close(); k.index.value = 1; inspector.wait(); assert k.message.value == '' and inspector.session.now.choice.index == 1, 'a closed file is opened again'
    opened.close(); (tmp_path/'b.h5').unlink(); k.index.value = 2; inspector.wait()
    assert 'b.h5' in k.message.value and k.index.value == 1 and k.board.rows, 'and if it is gone, what was there stays'
    bare = InMemory(Scenes(scenes.batch(range(3)).image), 'bare')
    k = SlotInspector(model, bare, ranges=np.tile([-3., 3.], (32, 1))).wait().knobs
    assert k.message.value == '' and 'bare has none' in k.facts.value and 'FG-ARI' not in k.numbers.value
    wide = InMemory(Scenes(np.zeros((2, 3, 8, 9), np.uint8)), 'wide')
    assert 'wide holds (3, 8, 9)' in SlotInspector(model, wide).wait().knobs.message.value

def test_a_picture_is_kept_while_another_is_inferred(inspector, monkeypatch):
    saved, go, k, infer = [], threading.Event(), inspector.knobs, inspector.session.infer
    monkeypatch.setattr(k.board, 'save', lambda name, data: saved.append((name, data)))
    k.png.click()
    monkeypatch.setattr(inspector.session, 'infer', lambda choice: go.wait(60) and infer(choice))
    k.index.value = 3; k.png.click()
    assert [n for n, _ in saved] == ['slots-0-I3.png']*2 and saved[0][1] == saved[1][1], 'what is on the screen, at once'
    go.set(); inspector.wait(); k.png.click(); assert saved[-1][0] == 'slots-3-I3.png' and saved[-1][1] != saved[0][1]

def test_exports(inspector, monkeypatch):
    saved = []
    monkeypatch.setattr(inspector.knobs.board, 'save', lambda name, data: saved.append((name, data)))
    for b in ('png', 'gif', 'npz'): getattr(inspector.knobs, b).click()
    assert [n for n, _ in saved] == ['slots-0-I3.png', 'slots-0-I3.gif', 'slots-0-I3.npz']
    assert Image.open(io.BytesIO(saved[0][1])).size[0] >= 600 and Image.open(io.BytesIO(saved[1][1])).n_frames == 6
    with np.load(io.BytesIO(saved[2][1])) as f: assert f['slots'].shape == (4, 32)
    inspector.knobs.remove.click(); inspector.wait(); inspector.knobs.gif.click()
    def frames(data):
        with Image.open(io.BytesIO(data)) as gif:
            for n in range(gif.n_frames): gif.seek(n); yield np.asarray(gif.convert('RGB')).astype(int)
    old, new = (list(frames(saved[n][1])) for n in (1, 3))
    assert len(new) == 7 and np.abs(new[5] - old[5]).mean() < 2 < np.abs(new[6] - new[5]).mean(), 'it ends with the edit'

@pytest.mark.parametrize('make', [lambda: EfficientMORL(EmorlConfig(num_slots=2, slot_size=8, num_layers=0, num_refinements=1)),
                                  lambda: EfficientMORL(EmorlConfig(num_slots=2, slot_size=8, num_layers=2, num_refinements=0)),
                                  lambda: SlotAttention(SlotAttentionConfig(num_slots=2, slot_size=8, image_size=(35, 35)))], ids=['no layers', 'no refinements', 'slot attention'])
def test_other_models(make, scenes):
    k = (i := SlotInspector(make().eval(), scenes).wait()).knobs
    assert k.message.value == '' and len(keys(i)) == 2
    k.latents[0].number.value = 2.5; k.remove.click(); i.wait(); assert k.message.value == '' and len(keys(i)) == 1

def test_a_model_without_a_decoder_can_be_looked_at(scenes):
    i = SlotInspector(Adapted(lambda x: {'masks': x.mean(1).gt(.1).long()}, (3, 35, 35), num_slots=2), scenes, ranges=np.zeros((0, 2))).wait()
    assert len(keys(i)) == 2
    i.knobs.remove.click(); i.wait(); assert 'no decoder' in i.knobs.message.value and len(i.session.states) == 1

def test_background_answers_the_last_wish():
    seen, wish, started = [], [0], threading.Event()
    def work(): started.set(); time.sleep(.002); seen.append(wish[0])
    b = Background(work)
    for n in range(1, 300): wish[0] = n; b(); time.sleep(.0003)
    b.wait(); assert seen[-1] == 299 and len(seen) < 299 and b.last.done() and not b.asked

def test_app_knows_the_data_of_a_checkpoint(tmp_path):
    assert app('tetrominoes_cpu').session.dataset.name == 'tetrominoes'
    (tmp_path/'run').mkdir(); assert repr(str(tmp_path/'run')) in app_notebook(str(tmp_path/'run')).cells[0].source
    assert 1024 < free_port() < 65536
