"The report of ClevrTex, from a folder of a variant to its tables."
import json
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

import emorl.cli
from emorl.checkpoint import save_checkpoint
from emorl.core import set_seed
from emorl.data.clevrtex import variants
from emorl.metrics.segmentation import clevrtex_names
from emorl.models.emorl import EfficientMORL, EmorlConfig

def write_variant(folder, variant, n=20):
    "Pictures of up to three squares on a ground."
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(n):
        mask = np.zeros((240, 320), np.uint8)
        for o in range(1, i % 3 + 2): mask[60 + 10*o:110 + 10*o, 60*o:60*o + 45] = o
        stem = folder/f'CLEVRTEX_{variant}_{i:06}'
        Image.fromarray((60*mask[..., None] + rng.integers(0, 60, (240, 320, 3))).astype(np.uint8)).save(f'{stem}.png')
        Image.fromarray(mask).save(f'{stem}_flat.png')
        objects = [dict(material=('oak', 'rust')[o % 2], shape='cube', size=.45*o, rotation=0.) for o in range(1, i % 3 + 2)]
        (folder/f'{stem.name}.json').write_text(json.dumps(dict(ground_material=('grass', 'sand')[i % 2], objects=objects)))

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "An untrained model for pictures of 128 x 128, as a checkpoint."
    set_seed(0)
    config = EmorlConfig(num_slots=4, slot_size=8, num_layers=1, num_refinements=1, image_size=(128, 128), std=.1, encoder=dict(widths=(8, 8), kernels=(5, 3), strides=(4, 2)),
                         decoder_options=dict(widths=(4,), kernels=(3, 3), paddings=(1, 1)))
    return save_checkpoint(tmp_path_factory.mktemp('model')/'m', {'model': asdict(config)}, EfficientMORL(config).state_dict())

@pytest.mark.parametrize('variant', variants)
def test_report(variant, model, tmp_path, capsys):
    write_variant(tmp_path/'data', variant)
    emorl.cli.emorl_evaluate([str(model), '--data', str(tmp_path/'data'), '--metrics', 'clevrtex', '--markdown', '--out', str(tmp_path)])
    text = capsys.readouterr().out
    res = json.loads(next(tmp_path.glob('results/*/*/results.json')).read_text())[f'clevrtex_{variant}']
    n = 20 if variant == 'outd' else 2
    assert res['num_images'] == n and {*clevrtex_names.values(), 'mse_sum'} <= res.keys()
    kinds = res['breakdown']
    assert set(kinds['ground_material']) == {'objects', 'grass', 'sand'} and kinds['ground_material']['grass']['num'] == n//2
    assert set(kinds['material']) >= {'background', 'rust'} and set(kinds['size']) >= {'0', '0.45'} and set(kinds['shape']) == {'background', 'cube'}
    assert 'mse_sum' in text and 'grass' in text

def test_of_a_frame_that_shows_the_ground_alone():
    "Undefined, or 0 as the published evaluation has it."
    from emorl.metrics.segmentation import segment_scores
    got = segment_scores(np.zeros((1, 4, 4), int), np.arange(16).reshape(1, 4, 4) % 3, ['ari_fg', 'ari_fg_published'])
    assert np.isnan(got['ari_fg'][0]) and got['ari_fg_published'][0] == 0
