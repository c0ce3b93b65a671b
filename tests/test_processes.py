"N processes equal one: losses, gradients, GECO and weights of a training that two processes share."
import json, os, subprocess, sys
from pathlib import Path

import pytest, torch

bin, here = Path(sys.executable).parent, Path(__file__).parent
env = {k: v for k, v in os.environ.items() if not k.startswith('ACCELERATE')} | {'OMP_NUM_THREADS': '1'}

def steps(out, world, shape, num_steps, batch=4, parts=1):
    "What every process wrote down."
    start = [bin/'torchrun', '--standalone', '--nproc-per-node', world] if world > 1 else [sys.executable]
    p = subprocess.run(list(map(str, [*start, here/'some_steps.py', out, num_steps, batch, json.dumps(shape), parts])), capture_output=True, text=True, timeout=600, env=env)
    assert p.returncode == 0, p.stderr[-3000:]
    return [torch.load(f'{out}-{r}.pt', weights_only=True) for r in range(world)]

shapes = {
    'published':    dict(geco_target=-1.2, geco_options=dict(start=3, acceleration=5.)),
    'one layer':    dict(num_layers=1, num_refinements=1),
    'no layer':     dict(num_layers=0, num_refinements=2, geco_target=-1.),
    'no refinement any more': dict(num_layers=1, num_refinements=1, refinements=[[0, 1], [4, 0], [8, 1]]),
    'detail on the way': dict(num_layers=1, num_refinements=1, decoder='canvas', decoder_options=dict(cells=4, hidden=16, detail=6, detail_from=5)),
    'no refinement': dict(num_refinements=0, hierarchy='bottom_up', gru='single'),
}

@pytest.mark.parametrize('name, parts', [*((name, 1) for name in shapes), ('published', 2)])
def test_two_processes_equal_one(name, parts, tmp_path):
    "In one part or in several, which exchange their gradients once."
    num = 50 if (name, parts) == ('published', 1) else 10
    (one,), two = (steps(tmp_path/str(w), w, shapes[name], num, parts=parts if w > 1 else 1) for w in (1, 2))
    for a, b in zip(one['lines'], two[0]['lines']):
        assert a.keys() == b.keys()
        for k in a: assert abs(a[k] - b[k]) <= 1e-8*max(1, abs(a[k])), (k, a[k], b[k])
    assert two[0]['lines'] == two[1]['lines']                                   # what is logged, GECO included, is the same everywhere
    for k, v in two[0]['state'].items():
        assert torch.equal(v, two[1]['state'][k]), k                            # and so are the weights
        torch.testing.assert_close(v, one['state'][k], rtol=1e-8, atol=1e-8, msg=k)

def test_every_image_once_an_epoch(tmp_path):
    (one,), two = (steps(tmp_path/str(w), w, dict(num_refinements=0), 10) for w in (1, 2)) # 10 batches of 4 are one epoch of 40
    shared = torch.cat([t['seen'] for t in two], 1)
    assert torch.equal(shared, one['seen']) and len(shared.flatten().unique()) == 40
