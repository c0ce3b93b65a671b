"The default recipe, shortened (slow); the presets for GPUs, on a CPU."
from dataclasses import replace

import pytest

from emorl.presets import override, presets, run_experiment

@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_a_minute_of_training_binds(seed, tmp_path):
    "500 of the 5,000 steps: slots hold objects, shades are still faint, masks have no detail yet."
    _, res = run_experiment(override(presets['tetrominoes_cpu'], dict(num_steps=500, seed=seed)), tmp_path, progress=False)
    assert res['ari_fg'] > .85 and res['mse'] < .02, res

gpu = [n for n in presets if n.endswith('_gpu')]
quick = ('tetrominoes_gpu', False) # The others take minutes, for want of bfloat16 or in the compiler
@pytest.mark.parametrize('name, compile', [pytest.param(n, c, marks=[pytest.mark.slow]*((n, c) != quick)) for n in gpu for c in (False, True)])
def test_presets_for_gpus_take_a_step(name, compile, tmp_path):
    "On a CPU, on a few scenes, in bfloat16. ClevrTex is not built in; CLEVR's twin has as many pixels."
    e = replace(presets[name], data='clevr10') if name == 'clevrtex_gpu' else presets[name]
    assert e.train.compile and e.train.precision == 'bf16'
    few = dict(batch_size=2, num_steps=2, num_slots=2, num_layers=1, eval_images=2, eval_every=2, workers=0, compile=compile)
    model, ends = run_experiment(override(e, few), tmp_path, progress=False)
    assert ends['finished'] and model.config.decoder == e.model.decoder and ends['mse'] < 1, ends
