"The report of ClevrTex, from a folder of a variant to its tables."
import json
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

import emorl.cli
from emorl.checkpoint import load, save_checkpoint
from emorl.core import set_seed
from emorl.data.clevr import Clevr
from emorl.data.clevrtex import ClevrTex, variants
from emorl.data.datasets import open_at
from emorl.evaluate import evaluate
from emorl.metrics.segmentation import clevrtex_names
from emorl.models.emorl import EfficientMORL, EmorlConfig

grounds, materials, shapes, sizes, colors = ('grass', 'sand'), ('oak', 'rust'), ('cube', 'monkey'), ('large', 'medium', 'small'), ('blue', 'red')
def number(i): return i % 3 + 1

def write_variant(folder, variant, n=20, **changes):
    "Pictures of up to three squares on a ground; `changes` of what is said of every object."
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(n):
        mask = np.zeros((240, 320), np.uint8)
        for o in range(1, number(i) + 1): mask[60 + 10*o:110 + 10*o, 60*o:60*o + 45] = o
        stem = folder/f'CLEVRTEX_{variant}_{i:06}'
        Image.fromarray((60*mask[..., None] + rng.integers(0, 60, (240, 320, 3))).astype(np.uint8)).save(f'{stem}.png')
        Image.fromarray(mask).save(f'{stem}_flat.png')
        objects = [dict(material=materials[o % 2], shape=shapes[o % 2], size=sizes[o - 1], rotation=7.5*o, color=colors[o % 2]) | changes for o in range(1, number(i) + 1)]
        (folder/f'{stem.name}.json').write_text(json.dumps(dict(ground_material=grounds[i % 2], objects=objects)))

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "An untrained model for pictures of 128 x 128, as a checkpoint."
    set_seed(0)
    config = EmorlConfig(num_slots=4, slot_size=8, num_layers=1, num_refinements=1, image_size=(128, 128), std=.1, gain=1., encoder=dict(widths=(8, 8), kernels=(5, 3), strides=(4, 2)),
                         decoder_options=dict(widths=(4,), kernels=(3, 3), paddings=(1, 1)))
    return save_checkpoint(tmp_path_factory.mktemp('model')/'m', {'model': asdict(config)}, EfficientMORL(config).state_dict())

@pytest.mark.parametrize('mask_size', [None, 192])
@pytest.mark.parametrize('variant', variants)
def test_report(variant, mask_size, model, tmp_path, capsys):
    "All rows of the published report, for as many entities as there are."
    write_variant(tmp_path/'data', variant)
    size = ['--mask-size', str(mask_size)] if mask_size else []
    emorl.cli.emorl_evaluate([str(model), '--data', str(tmp_path/'data'), '--metrics', 'clevrtex', 'breakdown', *size, '--markdown', '--out', str(tmp_path)])
    text = capsys.readouterr().out
    res = json.loads(next(tmp_path.glob('results/*/*/results.json')).read_text())[f'clevrtex_{variant}']
    n = 20 if variant == 'outd' else 2
    assert res['num_images'] == n
    for name in ('ari_fg', 'ari', 'miou_pairs', 'miou_pairs_fg', 'miou', 'sc', 'dice', 'dice_fg', 'count_acc', 'mse_sum'):
        assert res[name].keys() >= {'mean', 'std', 'ci95'} and res[name]['num'] == n and f'| {name} |' in text
    kinds, objects = res['breakdown'], sum(map(number, range(n)))
    words = dict(entity=['background', 'object'], ground_material=grounds, material=materials, shape=shapes, size=sizes) | (dict(color=colors) if variant == 'vbg' else {})
    assert kinds.keys() == words.keys()
    for kind, of_kind in kinds.items():
        assert of_kind.keys() <= set(words[kind]) and (n < 20 or of_kind.keys() == set(words[kind]))
        for word, scores in of_kind.items():
            assert f'| {kind} {word} |' in text
            for s in scores.values(): assert s['ci95'][0] <= s['mean'] <= s['ci95'][1]
        for m in ('iou', 'mse'): assert sum(s[m]['num'] for s in of_kind.values()) == (n if kind == 'ground_material' else objects + n*(kind == 'entity'))
        if kind not in ('entity', 'ground_material'):  # every object is of one kind
            for m in ('iou', 'mse'): assert sum(s[m]['num']*s[m]['mean'] for s in of_kind.values()) == pytest.approx(objects*kinds['entity']['object'][m]['mean'])
    for m in ('iou', 'mse'): assert np.mean([s[m]['mean'] for s in kinds['ground_material'].values()]) == pytest.approx(kinds['entity']['background'][m]['mean'])
    assert n*res['mse_sum']['mean'] == pytest.approx(sum(s['mse']['num']*s['mse']['mean'] for s in kinds['entity'].values()), rel=1e-4)

def test_masks_that_are_judged_larger(model, tmp_path):
    "Overlaps are of the larger masks; errors are of the images, the same as without."
    write_variant(tmp_path/'data', 'outd')
    net, data, large = load(model), open_at(tmp_path/'data', 'test', (128, 128)), open_at(tmp_path/'data', 'test', (192, 192))
    one, two = (evaluate(net, data, metrics=['breakdown'], judge=j).whole['breakdown'] for j in (None, large))
    for kind in one:
        for word in one[kind]: assert one[kind][word]['mse'] == two[kind][word]['mse']
    assert one['entity']['background']['iou']['mean'] != two['entity']['background']['iou']['mean']

def test_of_clevr10(model):
    res = evaluate(load(model), Clevr(2, variant='clevr10', size=(128, 128)), metrics=['clevrtex'])
    assert set(res.values) == {*clevrtex_names.values(), 'mse_sum'} and set(res.whole['breakdown']) == {'entity', 'material', 'shape', 'size', 'color'}

def test_what_is_said_of_the_ground(tmp_path):
    write_variant(tmp_path/'vbg', 'vbg'); write_variant(tmp_path/'pbg', 'pbg', size=.45, color=[0, 0, 1])  # sizes may be numbers; colours are read in vbg only
    vbg, pbg = ClevrTex(tmp_path/'vbg'), ClevrTex(tmp_path/'pbg')
    factors = vbg.batch([0, 1]).factors
    assert vbg.names['ground_material'] == list(grounds) and factors['ground_material'].tolist() == [[1, *[0]*10], [2, *[0]*10]]
    assert vbg.names['color'] == list(colors) and factors['color'][1, :4].tolist() == [0, 2, 1, 0] and 'color' not in pbg.batch([0]).factors
    assert pbg.batch([1]).factors['size'][0, :4].tolist() == pytest.approx([0, .45, .45, 0])
    (tmp_path/'vbg/CLEVRTEX_vbg_000000.json').write_text(json.dumps(dict(objects=[])))  # nothing is said of it
    assert ClevrTex(tmp_path/'vbg').batch([0]).factors['ground_material'].tolist() == [[0]*11]

def test_sizes_that_are_numbers_are_kinds(model, tmp_path):
    write_variant(tmp_path/'data', 'full', size=.45)
    assert list(evaluate(load(model), open_at(tmp_path/'data', 'test', (128, 128)), metrics=['breakdown']).whole['breakdown']['size']) == ['0.45']
