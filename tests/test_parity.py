"The published code's own results, where they lie beside the project; the tool that compares; the tool that makes such results."
import json, os
from pathlib import Path

import numpy as np
import pytest
import torch

from emorl.core import EmorlError
from emorl.parity import compare, load_fixture, make_fixture, our_quantities, parity_report, report

fixtures = Path(__file__).parents[2]/'shared/parity'
names = ['emorl_tetrominoes', 'emorl_clevr_geco', 'emorl_reversed_big', 'emorl_bottom_up_gru', 'slot_attention_small']

def fixture_path(name):
    path = fixtures/f'{name}.npz'
    if not path.exists(): pytest.skip(f'{path.name} is not beside the project')
    return path

@pytest.mark.parametrize('plain', [False, True], ids=['fast', 'plain'])
@pytest.mark.parametrize('name', names)
def test_published_numbers(name, plain):
    rows = report(fixture_path(name), plain)
    assert len(rows) > 40
    assert not (bad := [r for r in rows if not r.ok]), bad

@pytest.mark.parametrize('name', ['emorl_bottom_up_gru', 'slot_attention_small'])
def test_every_quantity_counts(name):
    fixture = load_fixture(fixture_path(name))
    ours, a = our_quantities(fixture), fixture.arrays
    quantities = [k for k in a if k != 'image' and not k.startswith('noise/')]
    def failed(arrays): return [r.quantity for r in compare(type(fixture)(fixture.meta, arrays, fixture.weights), ours) if not r.ok]
    for k in quantities:
        assert failed(a | {k: a[k] + .01*(1 + np.abs(a[k]).max())}) == [k]
        assert failed({n: v for n, v in a.items() if n != k}) == ([k] if ours[k].any() else []), k
        assert failed(a | {k: a[k][None].repeat(2, 0)}) == [k]
    assert failed(a | {'grad/new': np.ones(2)}) == ['grad/new'] and failed(a | {'deltas': np.ones(2)}) == ['deltas']
    for k in quantities: assert [r.quantity for r in compare(fixture, {n: v for n, v in ours.items() if n != k}) if not r.ok] == ([k] if a[k].any() else []), k

def saved(path, fixture, drop=(), **change):
    "A fixture's file with some arrays changed or gone."
    with np.load(fixture) as z: a = {k: z[k] for k in z.files if k not in drop} | {k.replace('__', '/'): v for k, v in change.items()}
    np.savez(path, **a)
    return path

def test_bad_files(tmp_path):
    good = make_fixture(stand_in(tmp_path), tmp_path/'good.npz', **small)
    meta = json.loads(str(np.load(good)['meta']))
    def refused(says, drop=(), **change):
        with pytest.raises(EmorlError, match=says): parity_report(saved(tmp_path/'bad.npz', good, drop, **change))
    assert parity_report(good)[1]
    refused('no meta', drop=['meta']); refused('lacks image', drop=['image']); refused('lacks noise/00', drop=['noise/00']); refused('no s/to_q.weight', drop=['s/to_q.weight'])
    refused("lacks 1 weights of the published model, 'to_q.weight' first", drop=['q/to_q.weight']); refused('No weight of the published model', q__to_w=np.ones(2), s__to_w=1., o__to_w=0.)
    refused('not those of its variant', **{'q/to_q.weight': np.ones((2, 2))})
    refused('no meta', meta='{'); refused('not a JSON object', meta='3'); refused('plain arrays', image=np.array([{}], dtype=object)); refused('not made of numbers', image=np.array('text'))
    refused('image of a fixture must be', image=np.zeros((1, 3, 9, 9))); refused('noise of a draw must be', noise__00=np.zeros((3, 4))); refused('draws 1 times', noise__01=np.zeros((4, 4)))
    for key, value, says in [('K', 'four', 'whole number'), ('K', 0, 'whole number'), ('kind', 'Slots', 'kind of fixture'), ('image_decoder', 'tiny', 'published decoder'), ('geco', 3, 'target, C_ema')]:
        refused(says, meta=json.dumps(meta | {key: value}))
    refused('lacks meta.K', meta=json.dumps({k: v for k, v in meta.items() if k != 'K'})); refused('not those of its variant', meta=json.dumps(meta | {'z_size': 5}))
    for content in (b'', b'text', good.read_bytes()[:3000]):
        (tmp_path/'bad.npz').write_bytes(content)
        with pytest.raises(EmorlError, match='not a parity fixture'): parity_report(tmp_path/'bad.npz')
    with pytest.raises(EmorlError, match='There is no file'): parity_report(tmp_path/'none.npz')

# ---- making fixtures: our own stand-in has the published code's interface, and our model inside

clone_code = '''
import torch
from sacred import Ingredient
from torch import nn
from emorl.models.slot_model import build_model
from emorl.parity import variant_config, variant_defaults
from emorl.published import to_ours, to_published

net = Ingredient('Net')

@net.config
def cfg():
    K, z_size, image_decoder, input_size, batch_size = 7, 64, 'iodine', [3, 64, 64], 1
    stochastic_layers, refinement_iters, image_likelihood, log_scale = 3, 3, 'GMM', -1.
    bottom_up_prior, reverse_prior_plusplus, use_DualGRU, geco_warm_start = False, True, True, 1000

class Box(nn.Module):
    def forward(self, *results): return results[-1]

class Model(nn.Module):
    "Weights by published names; what they compute, our model computes."
    def __init__(self, **meta):
        super().__init__()
        self.ours = [build_model(variant_config(variant_defaults | meta)).double()]
        for name, w in to_published(self.ours[0].state_dict()).items():
            at = self
            *boxes, last = name.split('.')
            for b in boxes:
                if not hasattr(at, b): at.add_module(b, Box())
                at = getattr(at, b)
            at.register_parameter(last, nn.Parameter(w.clone(), requires_grad='geco' not in name))

    def run(self, x, target=None):
        model, mine = self.ours[0], dict(self.named_parameters())
        draw = lambda: torch.distributions.Normal(torch.zeros(x.shape[0]*model.config.num_slots, model.config.slot_size), 1.).rsample()
        noise = [draw() for _ in range(model.config.num_draws())]
        model.load_state_dict(to_ours({k: v.detach() for k, v in mine.items()}), strict=False)
        steps = model((x + 1)/2, noise=noise, gradient_batch=len(x))
        loss = model.training_loss(steps)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], retain_graph=True, allow_unused=True)
        grads = to_published({n: g for n, g in zip(names, grads) if g is not None})
        return steps, loss.detach() + sum(((p - p.detach())*grads[k]).sum() for k, p in mine.items() if k in grads)

class SlotAttention(Model):
    @net.capture
    def __init__(self, K, z_size, image_decoder, input_size, batch_size):
        super().__init__(kind='SlotAttention', K=K, z_size=z_size, image_decoder=image_decoder, S=input_size[1], B=batch_size)
    def forward(self, x):
        (s,), loss = self.run(x)
        return {'total_loss': loss, 'x_means': s.recon.rgb, 'masks': s.recon.log_masks, 'slots': s.slots}

class EfficientMORL(Model):
    @net.capture
    def __init__(self, K, z_size, image_decoder, input_size, batch_size, stochastic_layers, refinement_iters, image_likelihood, log_scale, bottom_up_prior,
                 reverse_prior_plusplus, use_DualGRU, geco_warm_start, use_geco=False):
        super().__init__(K=K, z_size=z_size, image_decoder=image_decoder, S=input_size[1], B=batch_size, stochastic_layers=stochastic_layers, refinement_iters=refinement_iters,
            image_likelihood=image_likelihood, std=2.718281828459045**log_scale, bottom_up_prior=bottom_up_prior, reverse_prior_plusplus=reverse_prior_plusplus, use_DualGRU=use_DualGRU,
            geco={'target': -1., 'C_ema': 0., 'beta': 0.} if use_geco else None)
        self.geco_warm_start = geco_warm_start
        if not use_geco: self.geco_C_ema, self.geco_beta = (nn.Parameter(torch.tensor(v), requires_grad=False) for v in (0., .55))
    def forward(self, x, geco, global_step, kl_beta):
        assert (geco is not None) == hasattr(self.ours[0].objective, 'multiplier') and global_step > self.geco_warm_start and kl_beta == 1
        if geco: self.ours[0].objective.constraint = geco.C
        steps, loss = self.run(x)
        first, *rest = steps
        class Posterior:
            def __init__(self, p): self.mean, self.stddev = p.loc.flatten(0, 1), p.std.flatten(0, 1)
        flat = [s.posterior.params.flatten(0, 1) for s in steps]
        self.hvae_networks((None, None, [Posterior(l.posterior) for l in first.layers], {}, flat[0]))
        for a, b in zip(flat, flat[1:]): self.refinenet(None, a, (b - a, None))
        l = len(first.layers)
        out = {f'means_{l-1+i}': s.recon.rgb for i, s in enumerate(steps)} | {f'masks_{l-1+i}': s.recon.log_masks for i, s in enumerate(steps)}
        out |= {f'attn_{n}': layer.attention.unflatten(-1, (1, *x.shape[2:])) for n, layer in enumerate(first.layers)}
        return out | {'total_loss': loss, 'nll': steps[-1].nll.mean(), 'kl': steps[-1].kl.mean()}
'''
geco_code = 'class GECO:\n    def __init__(self, nll_target, alpha=0.99): self.C = nll_target\n'
small = dict(kind='SlotAttention', S=9, K=2, z_size=4)

def stand_in(folder, code=clone_code):
    "A clone of nothing: our own files under the published names."
    lib = folder/'clone'/'lib'
    lib.mkdir(parents=True)
    (lib/'model.py').write_text(code); (lib/'geco.py').write_text(geco_code)
    return folder/'clone'

@pytest.mark.parametrize('variant', [small, dict(S=9, K=2, z_size=4, stochastic_layers=2, refinement_iters=1), dict(S=9, K=3, B=1, z_size=4, stochastic_layers=1, refinement_iters=0, use_DualGRU=False),
    dict(S=9, K=2, z_size=4, bottom_up_prior=True, image_likelihood='GMM', std=.1, geco=dict(target=-1.2, C_ema=-3., beta=1.7))], ids=['slot_attention', 'emorl', 'single', 'geco'])
def test_make(variant, tmp_path):
    out = make_fixture(stand_in(tmp_path), tmp_path/'out.npz', seed=3, **variant)
    text, ok = parity_report(out)
    assert ok, text
    a = np.load(out)
    assert all(a[k].dtype == np.int8 for k in a.files if k.startswith('q/')) and all(a[k].dtype == np.float32 for k in a.files if k.startswith(('rgb', 'log_masks')))
    torch.manual_seed(3)
    assert (a['noise/00'] == torch.randn(*a['noise/00'].shape, dtype=torch.float64).numpy()).all()
    assert len(list(tmp_path.iterdir())) == 2 # the clone and the fixture: nothing was left beside

def test_make_says_what_went_wrong(tmp_path):
    clone = stand_in(tmp_path, 'import a_module_that_nobody_has')
    with pytest.raises(EmorlError, match='a_module_that_nobody_has'): make_fixture(clone, tmp_path/'out.npz', **small)
    assert not list(tmp_path.glob('*.npz*')) and not list(tmp_path.glob('.*'))
    with pytest.raises(EmorlError, match='exclude each other'): make_fixture(clone, tmp_path/'out.npz', bottom_up_prior=True, reverse_prior_plusplus=True)

# ---- the real clone, for whoever has one: EMORL_PUBLISHED=path/to/EfficientMORL pytest tests/test_parity.py

geco = dict(target=-1.224, C_ema=-20., beta=2.)
variants = dict(default={}, no_layers=dict(stochastic_layers=0), one_layer=dict(stochastic_layers=1), no_refinement=dict(refinement_iters=0), nothing=dict(stochastic_layers=0, refinement_iters=0),
    five=dict(refinement_iters=5), big=dict(image_decoder='big', S=96, B=1, K=2, refinement_iters=1), iodine=dict(image_decoder='iodine', std=.1), mixture=dict(image_likelihood='GMM', std=.1),
    bottom_up=dict(bottom_up_prior=True), reversed_single=dict(reverse_prior_plusplus=False, use_DualGRU=False), geco=dict(geco=geco), geco_bottom_up=dict(bottom_up_prior=True, geco=geco),
    geco_reversed=dict(reverse_prior_plusplus=False, geco=geco), geco_no_layers=dict(stochastic_layers=0, geco=geco), beta=dict(kl_beta=3.5), beta_geco=dict(kl_beta=.3, geco=geco),
    no_beta=dict(kl_beta=0., geco=geco), one_image=dict(B=1), three_images=dict(B=3), one_slot=dict(K=1), slot_attention=dict(kind='SlotAttention'),
    slot_attention_iodine=dict(kind='SlotAttention', image_decoder='iodine'), slot_attention_big=dict(kind='SlotAttention', image_decoder='big', S=96, B=1, K=3))

@pytest.mark.parametrize('name', variants)
def test_real_clone(name, tmp_path):
    clone = os.environ.get('EMORL_PUBLISHED')
    if not clone: pytest.skip('EMORL_PUBLISHED names no clone of the published repository')
    text, ok = parity_report(make_fixture(clone, tmp_path/'out.npz', seed=sorted(variants).index(name), **variants[name]))
    assert ok, text
