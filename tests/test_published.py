"The published code's names: every published run, weights there and back, checkpoint files good and bad."
import json, pickle
from pathlib import Path

import pytest
import torch

from emorl.core import EmorlError
from emorl.models.emorl import EfficientMORL, EmorlConfig
from emorl.models.slot_attention import SlotAttention, SlotAttentionConfig
from emorl.models.slot_model import make_config
from emorl.parity import load_fixture
from emorl.published import *
from emorl.train import TrainConfig, planned

fixtures = sorted((Path(__file__).parents[2]/'shared/parity').glob('*.npz'))

# ---- parameters

def published(k, size, z=64, decoder='iodine', likelihood='GMM', **training):
    "The settings of a published training run that are not the same in all of them."
    net = dict(K=k, input_size=[3, size, size], image_likelihood=likelihood, z_size=z, image_decoder=decoder, stochastic_layers=3, log_scale=-2.3025859, bottom_up_prior=False,
               reverse_prior_plusplus=True, use_DualGRU=True)
    return {'Net': net, 'dataset': dict(data_path='', h5_path='x.h5', masks=False), 'seed': 1, 'training': dict(batch_size=32, kl_beta_init=1, use_geco=True, use_scheduler=True,
        geco_beta_stepsize=1e-6, geco_ema_alpha=.99, checkpoint_freq=25000, iters=300000, load_from_checkpoint=False, lr=4e-4, clip_grad_norm=True, model='EfficientMORL',
        num_workers=8, run_suffix='', tensorboard_freq=100, out_dir='', tqdm=True) | training}

runs = {
    'multi_dsprites': published(6, 64, likelihood='Gaussian', use_geco=False, refinement_curriculum=[[-1, 3], [100000, 1], [200000, 1]]),
    'clevr6': published(7, 96, geco_reconstruction_target=-2.206, refinement_curriculum=[[-1, 3], [100000, 1], [200000, 1]]),
    'clevr6_old': published(7, 96, geco_reconstruction_target=-61000, refinement_curriculum=[[-1, 3], [100000, 1], [200000, 1]]),
    'clevr10': published(11, 128, geco_reconstruction_target=-2.1, geco_step_size_acceleration=5, mode='test', refinement_curriculum=[[-1, 3], [100000, 2], [200000, 2]]),
}

def test_published_runs_are_the_presets():
    from emorl.presets import presets
    for name in ('multi_dsprites', 'clevr6', 'clevr10'):
        e = published_experiment(runs[name])
        assert make_config(e['model']) == presets[name].model, name
        t, u = TrainConfig.from_dict(e['train']), presets[name].train
        for k in ('num_steps', 'batch_size', 'lr', 'warmup', 'decay', 'clip', 'refinements', 'save_every'): assert getattr(t, k) == getattr(u, k), (name, k)

def test_an_older_target_is_a_whole_images():
    assert published_experiment(runs['clevr6_old'])['model']['geco_target']*3*96*96 == pytest.approx(-61000)

def test_slot_attention():
    config = {'Net': dict(K=4, input_size=[3, 35, 35], z_size=32, image_decoder='small'), 'dataset': {}, 'seed': 1,
              'training': dict(batch_size=64, use_geco=False, use_scheduler=True, iters=500000, lr=4e-4, clip_grad_norm=False, model='SlotAttention', run_suffix='slot-attention')}
    e = published_experiment(config)
    assert make_config(e['model']) == SlotAttentionConfig()
    t = TrainConfig.from_dict(e['train'])
    assert (t.batch_size, t.num_steps, t.clip, t.refinements) == (64, 500000, None, ((0, 0),))

def test_a_test_configuration():
    config = {'Net': runs['clevr6']['Net'] | {'refinement_iters': 1, 'bottom_up_prior': True, 'reverse_prior_plusplus': False, 'use_DualGRU': False}, 'seed': 3,
              'test': dict(batch_size=1, output_size=[3, 96, 96], num_images_to_process=320, use_geco=True, geco_reconstruction_target=-2.206, eval_type='ARI_MSE_KL', mode='test',
                           model='EfficientMORL', experiment_name='mine', out_dir='', checkpoint='', checkpoint_dir='')}
    e = published_experiment(config)
    c = make_config(e['model'])
    assert (e['name'], c.num_refinements, c.hierarchy, c.gru, c.gru_init, c.geco_target, e['train']) == ('mine', 1, 'bottom_up', 'single', 'torch', -2.206, {'refinements': [[0, 1]], 'seed': 3})

def test_silence_means_the_published_defaults():
    e = published_experiment({'training': {}})
    c, t = make_config(e['model']), TrainConfig.from_dict(e['train'])
    assert (c.num_slots, c.slot_size, c.image_size, c.num_layers, c.std, c.decoder, c.likelihood, c.hierarchy) == (4, 64, (64, 64), 3, .1, 'iodine', 'gaussian', 'reversed++')
    assert (t.lr, t.batch_size, t.num_steps, t.decay, t.warmup, t.clip, t.save_every) == (3e-4, 16, 500000, 'none', 0, 5., 25000)
    assert [planned(s, t.refinements) for s in (0, 99_999, 100_000, 400_000)] == [3, 3, 1, 1]

@pytest.mark.parametrize('config, says', [
    ({'Net': {'stochastic_layer': 3}, 'training': {}}, "did you mean 'Net.stochastic_layers'"), ({'Nett': {'K': 3}, 'training': {}}, "did you mean 'Net.K'"),
    ({'Net': {'K': '4'}, 'training': {}}, 'Net.K is like 4'), ({'Net': {'K': 4.5}, 'training': {}}, 'Net.K is like 4'), ({'Net': {'use_DualGRU': 1}, 'training': {}}, 'like true'),
    ({'Net': {'image_decoder': 'tiny'}, 'training': {}}, "published image_decoder is called 'tiny'"), ({'Net': {'image_likelihood': 'gaussian'}, 'training': {}}, "did you mean 'Gaussian'"),
    ({'Net': {'input_size': [1, 35, 35]}, 'training': {}}, r'\[3, height, width\]'), ({'training': {'refinement_curriculum': [3]}}, r'must be \[step, I\]'),
    ({'Net': {'bottom_up_prior': True, 'reverse_prior_plusplus': True}, 'training': {}}, 'exclude each other'), ({'Net': {}}, 'has neither'), ([], 'got list'),
    ({'training': {'lr': float('nan')}}, 'like 0.0003'), ({'seed': 'one', 'training': {}}, 'seed is like 0')])
def test_what_the_published_code_does_not_know_is_refused(config, says):
    with pytest.raises(EmorlError, match=says): published_experiment(config)

# ---- weights

models = {'dual': EmorlConfig(slot_size=8), 'single_geco': EmorlConfig(slot_size=8, gru='single', decoder='iodine', geco_target=-1.), 'big': EmorlConfig(slot_size=8, decoder='big'),
          'slot_attention': SlotAttentionConfig(slot_size=8), 'slot_attention_big': SlotAttentionConfig(slot_size=8, decoder='big')}

def ours(name):
    torch.manual_seed(0)
    model = (SlotAttention if models[name].kind == 'slot_attention' else EfficientMORL)(models[name])
    return model, {k: torch.randn_like(v) if v.is_floating_point() else torch.tensor(True) for k, v in model.state_dict().items()}

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)

@pytest.mark.parametrize('name', models)
def test_ours_there_and_back(name):
    _, state = ours(name)
    there = to_published(state)
    check_names(there, 'it')
    assert same(to_ours(there), state)
    assert list(there) == [k for k in names_of(state) if k in there]

def test_a_part_of_the_weights_converts():
    _, state = ours('dual')
    part = {k: v for k, v in state.items() if 'gru' in k or k == 'refiner.loc.bias'}
    assert same(to_ours(to_published(part)), part)
    assert to_published({}) == {}

# ---- files

def run(name, tmp_path, steps=2):
    "A model of ours after a few steps of Adam, and the file that the published code would have saved."
    model, state = ours(name)
    model.load_state_dict(state)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    adam = torch.optim.Adam(trained.values(), 1e-3)
    for _ in range(steps):
        for p in trained.values(): p.grad = torch.randn_like(p)
        adam.step()
    named = name_optimizer(adam.state_dict(), list(trained))
    path = tmp_path/'run-state-25000.pth'
    write_published(path, PublishedCheckpoint(to_published(model.state_dict()), 25000, convert_optimizer(named, to_published), 1))
    return model, list(trained), adam, path

@pytest.mark.parametrize('name', models)
def test_file_there_and_back(name, tmp_path):
    model, trained, adam, path = run(name, tmp_path)
    raw = torch.load(path, weights_only=True)
    assert set(raw) == {'step', 'model', 'model_opt', 'kl_beta'} and all(k.startswith('module.') for k in raw['model'])
    read = read_published(path)
    assert (read.step, read.kl_beta) == (25000, 1)
    back = to_ours(read.weights)
    assert same({k: v for k, v in back.items() if k in model.state_dict()}, model.state_dict())
    assert {k.split('.')[0] for k in back.keys() - model.state_dict().keys()} <= {'objective'}
    again = number_optimizer(convert_optimizer(read.optimizer, to_ours), trained)
    fresh = torch.optim.Adam([torch.nn.Parameter(p.clone()) for p in adam.param_groups[0]['params']], 1e-3)
    fresh.load_state_dict(again)
    for a, b in zip(fresh.state.values(), adam.state.values()): assert same(a, b)
    write_published(tmp_path/'again.pth', read)
    more = torch.load(tmp_path/'again.pth', weights_only=True)
    assert same(more['model'], raw['model']) and list(more['model']) == list(raw['model']) and more['model_opt']['param_groups'] == raw['model_opt']['param_groups']
    assert all(same(more['model_opt']['state'][k], v) for k, v in raw['model_opt']['state'].items())

def older(raw, **extra):
    "The file as an older version of the published code would have written it."
    names = {k: k.replace('hvae_networks.', 'object_discovery_block.' if 'indep_prior' in k or 'gru' in k else '') for k in raw['model']}
    raw['model'] = {names[k]: v for k, v in raw['model'].items()} | {f'module.{k}': v for k, v in extra.items()}
    return raw

@pytest.mark.parametrize('name', ['dual', 'single_geco', 'slot_attention'])
def test_older_names(name, tmp_path):
    _, _, _, path = run(name, tmp_path)
    new, raw = read_published(path), torch.load(path, weights_only=True)
    extra = {} if name == 'slot_attention' else {'object_discovery_block.gru.cell.zeros': torch.zeros(16, 8), 'gru.cell.zeros_n': torch.zeros(8, 8)}
    torch.save(older(raw, **extra), path)
    assert same(read_published(path).weights, new.weights)
    assert all(same(v, new.optimizer['state'][k]) for k, v in read_published(path).optimizer['state'].items())

def test_what_is_no_weight_any_more_takes_its_optimizer_entry_along(tmp_path):
    _, _, _, path = run('dual', tmp_path)
    new, raw = read_published(path), torch.load(path, weights_only=True)
    raw['model'] = {'module.generation_relation.0.weight': torch.ones(3)} | raw['model']
    opt = raw['model_opt']
    opt['state'] = {0: {'step': torch.tensor(1.), 'exp_avg': torch.ones(3), 'exp_avg_sq': torch.ones(3)}} | {k + 1: v for k, v in opt['state'].items()}
    opt['param_groups'][0]['params'].append(len(opt['param_groups'][0]['params']))
    torch.save(raw, path)
    read = read_published(path)
    assert same(read.weights, new.weights) and read.optimizer['state'].keys() == new.optimizer['state'].keys()
    assert all(same(v, new.optimizer['state'][k]) for k, v in read.optimizer['state'].items())

def test_without_module_without_optimizer_without_geco(tmp_path):
    _, _, _, path = run('dual', tmp_path)
    new, raw = read_published(path), torch.load(path, weights_only=True)
    torch.save({'model': {k.removeprefix('module.'): v for k, v in raw['model'].items() if 'geco' not in k}, 'step': 5, 'model_opt': {}, 'kl_beta': torch.tensor(1.)}, path)
    read = read_published(path)
    assert read.optimizer is None and read.step == 5 and same(read.weights, {k: v for k, v in new.weights.items() if 'geco' not in k})

def test_an_optimizer_of_something_else_is_left_out(tmp_path):
    _, _, _, path = run('dual', tmp_path)
    raw = torch.load(path, weights_only=True)
    raw['model_opt'] = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    torch.save(raw, path)
    with pytest.warns(UserWarning, match='does not fit its model'): assert read_published(path).optimizer is None

@pytest.mark.parametrize('fixture', fixtures or [None], ids=lambda p: p.stem if p else 'none')
def test_files_of_published_weights(fixture, tmp_path):
    if not fixture: pytest.skip('no fixtures beside the project')
    weights = load_fixture(fixture).weights
    state = {'module.' + k: v.float() for k, v in weights.items()}
    if 'slot_attention' not in fixture.stem: state = {'module.geco_C_ema': torch.tensor(-3.), 'module.geco_beta': torch.tensor(1.7)} | state
    torch.save({'step': 200000, 'model': state, 'model_opt': None, 'kl_beta': 1}, tmp_path/'x.pth')
    read = read_published(tmp_path/'x.pth')
    assert same({'module.' + k: v for k, v in to_published(to_ours(read.weights)).items()}, state)
    write_published(tmp_path/'y.pth', read)
    assert same(torch.load(tmp_path/'y.pth', weights_only=True)['model'], state)

class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (self.path, 'w')

def test_a_pickle_is_not_executed(tmp_path):
    _, _, _, path = run('dual', tmp_path)
    raw, done = torch.load(path, weights_only=True), tmp_path/'done'
    for part in ('model', 'model_opt', 'kl_beta'):
        torch.save(raw | {part: Evil(str(done))}, tmp_path/'evil.pth')
        with pytest.raises(EmorlError, match='nothing in it was executed'): read_published(tmp_path/'evil.pth')
    (tmp_path/'bare.pth').write_bytes(pickle.dumps(Evil(str(done))))
    with pytest.raises(EmorlError, match='nothing in it was executed'): read_published(tmp_path/'bare.pth')
    assert not done.exists()

def test_bad_files(tmp_path):
    _, _, _, path = run('dual', tmp_path)
    raw = torch.load(path, weights_only=True)
    def refused(content, says):
        if isinstance(content, bytes): (tmp_path/'bad.pth').write_bytes(content)
        else: torch.save(content, tmp_path/'bad.pth')
        with pytest.raises(EmorlError, match=says): read_published(tmp_path/'bad.pth')
    whole = path.read_bytes()
    for n in (0, 1, 100, len(whole)//2, len(whole) - 1): refused(whole[:n], 'is not a checkpoint')
    refused(b'text', 'is not a checkpoint'); refused({'state_dict': {}}, 'a dictionary of step, model'); refused([1], 'a dictionary of step, model')
    refused(raw['model'], 'a dictionary of step, model'); refused(raw | {'model': {'module.a': 3}}, 'a dictionary of step, model'); refused(raw | {'step': 'last'}, 'must be numbers')
    refused(raw | {'model': {k: v for k, v in raw['model'].items() if 'to_k' not in k}}, 'lacks 1 weights of the published model')
    refused(raw | {'model': raw['model'] | {'module.hvae_networks.to_x.weight': torch.zeros(1)}}, 'did you mean')
    refused(raw | {'model': {'module.backbone.weight': torch.zeros(1)}}, 'backbone')
    with pytest.raises(EmorlError, match='There is no file'): read_published(tmp_path/'none.pth')
    with pytest.raises(EmorlError, match='lacks'): write_published(tmp_path/'no.pth', PublishedCheckpoint({'to_q.weight': torch.zeros(2)}))
    assert not (tmp_path/'no.pth').exists()
