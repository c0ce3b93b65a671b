"The default recipe, shortened: slow."
import pytest

from emorl.presets import override, presets, run_experiment

@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_a_minute_of_training_binds(seed, tmp_path):
    "650 of the 5,200 steps: slots hold objects, shapes are still blurred."
    _, res = run_experiment(override(presets['tetrominoes_cpu'], dict(num_steps=650, seed=seed)), tmp_path, progress=False)
    assert res['ari_fg'] > .75 and res['mse'] < .035, res
