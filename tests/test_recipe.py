"The default recipe, shortened: slow."
from dataclasses import replace

import pytest

from emorl.presets import override, presets, run_experiment

@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_a_minute_of_training_binds(seed, tmp_path):
    "500 of the 5,000 steps: slots hold objects, shades are still faint, masks have no detail yet."
    _, res = run_experiment(override(presets['tetrominoes_cpu'], dict(num_steps=500, seed=seed)), tmp_path, progress=False)
    assert res['ari_fg'] > .85 and res['mse'] < .02, res

@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in presets if n.endswith('_gpu')])
def test_presets_for_gpus_take_a_step(name, tmp_path):
    "On a CPU, on a few scenes: compiled, in bfloat16. ClevrTex is not built in; CLEVR's twin has as many pixels."
    e = replace(presets[name], data='clevr10') if name == 'clevrtex_gpu' else presets[name]
    model, ends = run_experiment(override(e, dict(batch_size=2, num_steps=2, num_slots=2, num_layers=1, eval_images=2, eval_every=2, workers=0)), tmp_path, progress=False)
    assert ends['finished'] and model.config.decoder == e.model.decoder and ends['mse'] < 1, ends
