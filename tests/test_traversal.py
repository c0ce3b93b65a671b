"Latent ranges, activeness, sweeps, and the pictures and films of them: every frame there, at every size."
import json, os, stat, subprocess, sys
from dataclasses import asdict

import imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import emorl.traversal
from emorl.checkpoint import save_checkpoint, load
from emorl.core import EmorlError, Reconstruction
from emorl.data.scenes import InMemory, Scenes
from emorl.data.tetrominoes import Tetrominoes
from emorl.models.emorl import EmorlConfig
from emorl.models.slot_attention import SlotAttentionConfig
from emorl.models.slot_model import build_model, image_noise
from emorl.traversal import *

def tiny(kind=EmorlConfig, size=(12, 17), channels=3, **options):
    torch.manual_seed(0)
    parts = dict(encoder=dict(widths=(8,), kernels=(5,), strides=(2,), channels=channels),
                 decoder_options=dict(widths=(8,), kernels=(3, 3), paddings=(1, 1), channels=channels))
    return build_model(kind(num_slots=3, slot_size=6, gain=1., image_size=size, **parts, **options)).eval()

def noise_scenes(n=8, size=(12, 17), channels=3, name='noise', seed=0):
    return InMemory(Scenes(np.random.default_rng(seed).integers(0, 256, (n, channels, *size), dtype=np.uint8)), name)

models = {'emorl': {}, 'emorl, no layers': dict(num_layers=0), 'emorl, no refinements': dict(num_refinements=0),
          'slot attention': dict(kind=SlotAttentionConfig), 'grey': dict(channels=1), 'one slot': {}}

# ---- ranges

@pytest.mark.parametrize('name', models)
def test_every_model_can_be_traversed(name, tmp_path):
    model, scenes = tiny(**models[name]), noise_scenes(channels=models[name].get('channels', 3))
    if name == 'one slot': model = build_model(EmorlConfig(**(asdict(model.config) | {'num_slots': 1, 'kind': 'emorl'})))
    k, c = model.config.num_slots, model.image_shape[0]
    ranges = latent_ranges(model, scenes, batch_size=3)
    active = latent_activeness(model, scenes, ranges, 4)
    t = traverse(model, scenes, 5, ranges, most_active(active, 2), num_frames=4)
    assert ranges.shape == (6, 2) and (ranges[:, 0] <= ranges[:, 1]).all() and active.shape == (4, 6) and t.frames.shape == (k, 2, 4, c, 12, 17)
    paths = write_traversals(t, tmp_path)
    assert sorted(p.name for p in paths) == sorted(os.listdir(tmp_path)) and len(paths) == 2*k + k + 2

@pytest.mark.parametrize('batch_size', [1, 3, 100])
def test_ranges_are_those_of_one_sample_per_image(batch_size):
    model, scenes = tiny(), noise_scenes()
    c, samples = model.config, []
    for i in range(7):
        with torch.no_grad(): samples.append(model(scenes.batch([i]).images, noise=image_noise([i], 4, c.num_draws(), 3, 6))[-1].slots.flatten(0, 1))
    samples = torch.cat(samples)
    np.testing.assert_allclose(latent_ranges(model, scenes, 7, 4, batch_size), torch.stack([samples.amin(0), samples.amax(0)], 1), atol=1e-4)

def test_broken_model_has_no_ranges():
    model = tiny()
    for p in model.refiner.parameters(): p.data.fill_(float('nan'))
    with pytest.raises(EmorlError, match='not finite'): latent_ranges(model, noise_scenes())

@pytest.fixture
def run(tmp_path):
    model = tiny()
    save_checkpoint(tmp_path/'run/checkpoints/step-00000001', {'model': asdict(model.config)}, model.state_dict())
    return model, tmp_path/'run'

def test_stored_ranges_are_replaced_never_appended(run, monkeypatch):
    model, folder = run
    file, count = folder/'checkpoints/step-00000001/latent_ranges.json', []
    measure = emorl.traversal.latent_ranges
    monkeypatch.setattr(emorl.traversal, 'latent_ranges', lambda *a, **k: count.append(1) or measure(*a, **k))
    def get(n, data=noise_scenes(), num=5, seed=0, model=model):
        count.clear(); ranges = stored_ranges(folder, model, data, num, seed)
        assert len(count) == n; np.testing.assert_array_equal(ranges, measure(model, data, num, seed)); return ranges
    get(1); get(0)
    said = json.loads(file.read_text())
    assert (said['dataset'], said['num_images'], said['seed'], len(said['min']), len(said['max'])) == ('noise', 5, 0, 6, 6)
    get(1, num=6); get(0, num=6); get(1, seed=1); get(1, data=noise_scenes(name='other')); get(1, data=noise_scenes(seed=1)); get(0, data=noise_scenes(seed=1))
    get(1, num=100); get(0, num=8)  # there are eight
    assert len(json.loads(file.read_text())['min']) == 6
    load(folder)  # what is sealed is as it was

def test_ranges_of_other_weights_are_stale(run):
    model, folder = run
    step = folder/'checkpoints/step-00000001'
    first = stored_ranges(step, model, noise_scenes())
    old = (step/'latent_ranges.json').read_text()
    for p in model.refiner.parameters(): p.data.mul_(1.5)
    save_checkpoint(step, {'model': asdict(model.config)}, model.state_dict())
    assert not (step/'latent_ranges.json').exists()  # it went with the folder
    (step/'latent_ranges.json').write_text(old)
    assert not np.allclose(stored_ranges(step, model, noise_scenes()), first)

def test_where_nothing_can_be_written_ranges_are_returned(run, monkeypatch):
    model, folder = run
    def refuse(*_): raise EmorlError('Cannot write: Read-only file system.')
    monkeypatch.setattr(emorl.traversal, 'write_json', refuse)
    with pytest.warns(UserWarning, match='not kept: Cannot write'): ranges = stored_ranges(folder, model, noise_scenes())
    np.testing.assert_array_equal(ranges, latent_ranges(model, noise_scenes()))

def test_published_text_form(tmp_path):
    ranges = np.array([[-1.5, 2.], [1e-9, 3]])
    assert write_z_range(tmp_path/'z_range.txt', ranges).read_text() == '-1.5,2.0\n1e-09,3.0\n'
    write_z_range(tmp_path/'z_range.txt', ranges[:1])
    np.testing.assert_array_equal(np.loadtxt(tmp_path/'z_range.txt', delimiter=','), ranges[0])

# ---- sweeps

def test_activeness_as_published():
    "Decode everything anew for every value, and take the variance by hand."
    model, scenes = tiny(), noise_scenes()
    ranges, c = latent_ranges(model, scenes), model.config
    found = latent_activeness(model, scenes, ranges, 3, seed=2, decode_chunk=5)
    for i in range(3):
        with torch.no_grad():
            slots, by_slot = model(scenes.batch([i]).images, noise=image_noise([i], 2, c.num_draws(), 3, 6))[-1].slots, []
            for k in range(3):
                moved = slots.repeat(36, 1, 1)
                for j in range(6): moved[6*j:6*j+6, k, j] = torch.linspace(*ranges[j].tolist(), 6)
                images = model.decoder(moved, (12, 17)).image.double().numpy().reshape(6, 6, -1)
                by_slot.append(((images - images.mean(1, keepdims=True))**2).sum(1).mean(1)/5)
        assert any(np.allclose(found[i], b, rtol=1e-3, atol=1e-7) for b in by_slot)
    assert not any(np.allclose(found[i], found[j]) for i, j in [(0, 1), (0, 2), (1, 2)])

@pytest.mark.parametrize('k', [1, 2, 5])
def test_one_slot_against_the_rest(k):
    "Exact, also where one slot owns everything or nothing."
    torch.manual_seed(1)
    def decoder(slots, size):  # logits of up to some hundreds
        flat = slots.flatten(0, 1)
        paint = torch.einsum('nd,dchw->nchw', flat, torch.linspace(-9, 9, 3*4*5*7, dtype=torch.float64).view(3, 4, 5, 7)).unflatten(0, slots.shape[:2])
        return Reconstruction(paint[:, :, :3].sigmoid(), 20*paint[:, :, 3:])
    slots, variants = torch.randn(1, k, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    for i in range(k):
        whole = slots.repeat(7, 1, 1); whole[:, i] = variants
        torch.testing.assert_close(vary(decoder, decoder(slots, (5, 7)), i, variants, 3), decoder(whole, (5, 7)).image, rtol=0, atol=1e-12)

def test_only_some_latents():
    model, scenes = tiny(), noise_scenes()
    ranges = latent_ranges(model, scenes)
    every, some = (latent_activeness(model, scenes, ranges, 4, latents=l) for l in (None, [5, 2]))
    np.testing.assert_allclose(some[:, [2, 5]], every[:, [2, 5]], rtol=1e-5)
    assert np.isnan(some[:, [0, 1, 3, 4]]).all() and set(most_active(some)) == {2, 5} and len(most_active(every)) == 6
    for bad in ([6], [-1], [.5]):
        with pytest.raises(EmorlError, match=f'latents 0 to 5; {bad[0]} was asked for'): latent_activeness(model, scenes, ranges, 1, latents=bad)

def test_every_slot_gets_its_turn():
    model, scenes, chosen = tiny(), noise_scenes(40), []
    vary = emorl.traversal.vary
    with pytest.MonkeyPatch.context() as m:
        m.setattr(emorl.traversal, 'vary', lambda d, r, k, *a: chosen.append(k) or vary(d, r, k, *a))
        latent_activeness(model, scenes, latent_ranges(model, scenes), 40); first = list(chosen); chosen.clear()
        latent_activeness(model, scenes, latent_ranges(model, scenes), 20, batch_size=7)
    assert set(first) == {0, 1, 2} and chosen == first[:20]

def test_traversal_is_of_whole_scenes_and_true_ranges():
    model, scenes = tiny(), noise_scenes()
    ranges, c = latent_ranges(model, scenes), model.config
    t = traverse(model, scenes, 3, ranges, [4, 1], num_frames=3, decode_chunk=2)
    with torch.no_grad(): slots = model(scenes.batch([3]).images, noise=image_noise([3], 0, c.num_draws(), 3, 6))[-1].slots
    for k in range(3):
        for r, j in enumerate([4, 1]):
            for f, value in enumerate((ranges[j, 0], ranges[j].mean(), ranges[j, 1])):
                moved = slots.clone(); moved[0, k, j] = value
                with torch.no_grad(): torch.testing.assert_close(t.frames[k, r, f], model.decoder(moved, (12, 17)).image[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(t.image, scenes.batch([3]).images[0])

# ---- files

def frames_of(path):
    with Image.open(path) as im:
        def at(i): im.seek(i); return np.asarray(im.convert('RGB')), im.info['duration'], im.size
        return [at(i) for i in range(im.n_frames)]

def pattern(n, h, w, equal):
    "Blocky noise; equal frames come in runs, or all frames are one."
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (n, -(-h//7), -(-w//7), 3), dtype=np.uint8).repeat(7, 1).repeat(7, 2)[:, :h, :w]
    return blocks[np.array({'no': range(n), 'runs': [i//3 for i in range(n)], 'all': [0]*n}[equal])]

@pytest.mark.parametrize('equal', ['no', 'runs', 'all'])
@pytest.mark.parametrize('n, h, w', [(1, 35, 35), (2, 1, 1), (8, 35, 35), (8, 36, 49), (8, 128, 3), (31, 20, 21)])
def test_every_frame_of_a_gif(n, h, w, equal, tmp_path):
    frames = pattern(n, h, w, equal)
    back = frames_of(write_gif(tmp_path/'a.gif', frames, 4))
    assert len(back) == n and {d for _, d, _ in back} == {250} and {s for *_, s in back} == {(w, h)}
    assert max(np.abs(x.astype(int) - f).mean() for (x, *_), f in zip(back, frames)) < 12  # 256 colours
    for i in range(1, n): assert np.array_equal(back[i][0], back[i-1][0]) == np.array_equal(frames[i], frames[i-1]) or equal == 'no'

@pytest.mark.parametrize('equal', ['no', 'runs', 'all'])
@pytest.mark.parametrize('n, h, w, fps', [(1, 35, 35, 4), (2, 16, 16, 4), (8, 35, 35, 4), (8, 36, 49, 7), (9, 140, 141, 29.97), (31, 20, 21, 24)])
def test_every_frame_of_a_film(n, h, w, fps, equal, tmp_path):
    frames = pattern(n, h, w, equal)
    path = write_mp4(tmp_path/'a.mp4', frames, fps)
    assert count_frames(path) == n
    with imageio.get_reader(path, 'ffmpeg') as film: back, said = np.stack([x for x in film]), film.get_meta_data()
    assert back.shape == (n, h + h % 2, w + w % 2, 3) and said['fps'] == pytest.approx(fps, abs=.01) and said['duration'] == pytest.approx(n/fps, abs=.02)
    assert np.abs(back[:, :h, :w].astype(int) - frames).mean((1, 2, 3)).max() < 20  # colours are coarse; frames in each other's place differ by 85
    assert os.listdir(tmp_path) == ['a.mp4']

def test_a_film_plays_everywhere(tmp_path):
    "Colours at a quarter of the resolution are the one format that every player knows."
    path = write_mp4(tmp_path/'a.mp4', pattern(8, 35, 35, 'no'))
    assert 'h264' in (text := subprocess.run([emorl.traversal._ffmpeg()[1], '-i', path], capture_output=True, text=True).stderr) and 'yuv420p' in text
    assert path.read_bytes().index(b'moov') < path.read_bytes().index(b'mdat')  # it can start before all of it has come

def test_files_are_replaced(tmp_path):
    for n in (8, 3):
        assert len(frames_of(write_gif(tmp_path/'a.gif', pattern(n, 9, 9, 'no')))) == n
        assert count_frames(write_mp4(tmp_path/'a.mp4', pattern(n, 16, 16, 'no'))) == n
    (tmp_path/'b.gif').mkdir()
    with pytest.raises(EmorlError, match='a folder of that name'): write_gif(tmp_path/'b.gif', pattern(2, 9, 9, 'no'))

# ---- ffmpeg by name

@pytest.fixture
def named(tmp_path, monkeypatch):
    "Write a film where moviepy is imported anew, as in a fresh process, with these environment variables."
    def write(**env):
        for m in [m for m in sys.modules if m.split('.')[0] in ('moviepy', 'imageio', 'imageio_ffmpeg')]: monkeypatch.delitem(sys.modules, m)
        for k in ('FFMPEG_BINARY', 'IMAGEIO_FFMPEG_EXE'): monkeypatch.delenv(k, raising=False)
        for k, v in env.items(): monkeypatch.setenv(k, v)
        (tmp_path/'film.mp4').write_text('what stood there')
        return count_frames(write_mp4(tmp_path/'film.mp4', pattern(8, 35, 35, 'no')))
    return write

def refusal(named, tmp_path, **env):
    with pytest.raises(EmorlError) as e: named(**env)
    assert (tmp_path/'film.mp4').read_text() == 'what stood there' and not [n for n in os.listdir(tmp_path) if n.endswith('.tmp')]
    return str(e.value)

def wrapper(tmp_path, text):
    path = tmp_path/'my ffmpeg'
    path.write_text(text.format(log=tmp_path/'log', ffmpeg=imageio_ffmpeg.get_ffmpeg_exe())); path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)

@pytest.mark.parametrize('variable', ['FFMPEG_BINARY', 'IMAGEIO_FFMPEG_EXE'])
def test_the_named_ffmpeg_is_used(variable, named, tmp_path):
    assert named(**{variable: wrapper(tmp_path, '#!/bin/sh\necho "$@" >> "{log}"\nexec "{ffmpeg}" "$@"\n')}) == 8
    lines = (tmp_path/'log').read_text().splitlines()
    assert ['rawvideo' in l for l in lines if '-i ' in l] == [True, False, False]  # it wrote; it read back, there and here

@pytest.mark.parametrize('variable', ['FFMPEG_BINARY', 'IMAGEIO_FFMPEG_EXE'])
def test_no_such_ffmpeg(variable, named, tmp_path): assert '/no/such/ffmpeg' in refusal(named, tmp_path, **{variable: '/no/such/ffmpeg'})

bad = {'does nothing': 'exit 0', 'fails at once': 'exit 1', 'fails at the end': 'cat > /dev/null\nexit 1',
       'loses frames': 'case "$*" in *rawvideo*) exec "{ffmpeg}" -t 1.5 "$@";; *) exec "{ffmpeg}" "$@";; esac'}

@pytest.mark.parametrize('text', bad.values(), ids=bad)
def test_a_bad_ffmpeg_is_noticed(text, named, tmp_path):
    said = refusal(named, tmp_path, FFMPEG_BINARY=wrapper(tmp_path, f'#!/bin/sh\n{text}\n'))
    assert 'film.mp4' in said and '\n' not in said and ('6 of 8 frames' in said) == ('-t 1.5' in text)

def test_pixels_that_are_no_numbers():
    frames = torch.tensor([float('nan'), -3., 7., .5]).view(1, 1, 2, 2)
    assert as_pixels(frames, 1)[0, :, :, 0].tolist() == [[0, 0], [255, 128]]
