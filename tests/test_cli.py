"What a notebook cannot show: commands as processes, signals, full disks, several processes."
import errno, json, os, re, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest

import emorl.cli
from emorl.checkpoint import checkpoints, load

bin = Path(sys.executable).parent
quick = ['--batch-size', '4', '--eval-images', '4', '--eval-every', '4', '--save-every', '4']

def run(cmd, *args, ok=0, **kw):
    "Output of a command, which must leave with code `ok` and without a trace."
    p = subprocess.run([bin/cmd, *map(str, args)], capture_output=True, text=True, timeout=300, **kw)
    assert p.returncode == ok, p.stderr[-2000:]
    assert 'Traceback' not in p.stderr
    return p.stdout, p.stderr

@pytest.fixture
def error(capsys):
    "The one line a failing command prints, without its name. In this process: starting one takes seconds."
    def error(cmd, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e: getattr(emorl.cli, cmd)([str(a) for a in args])
        out, err = capsys.readouterr()
        assert e.value.code == 1 and not out and 'Traceback' not in err, (out, err)
        lines = [l for l in err.splitlines() if l.startswith(f'{cmd}: ')]
        assert len(lines) == 1, err
        return lines[0].removeprefix(f'{cmd}: ')
    return error

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A run of six steps."
    out = tmp_path_factory.mktemp('runs')/'six'
    run('emorl_train', 'tetrominoes_cpu', '--out', out, '--num-steps', 6, *quick)
    return out

def test_train_leaves_a_run(trained):
    assert {p.name for p in trained.iterdir()} == {'checkpoints', 'config.json', 'lock', 'metrics.jsonl', 'tb'}
    assert [c.name for c in checkpoints(trained)] == ['step-00000004', 'step-00000006']
    lines = [json.loads(l) for l in (trained/'metrics.jsonl').read_text().splitlines()]
    assert any('ari_fg' in l for l in lines) and lines[-1]['step'] == 6

def test_evaluate_as_json(trained, tmp_path):
    out, _ = run('emorl_evaluate', trained, '--data', 'tetrominoes_real', '--json', '--out', tmp_path)
    res = json.loads(out)
    assert res['num_images'] == 10
    for k in ('ari_fg', 'mse', 'kl', 'nll'):
        assert {'mean', 'std', 'ci95'} <= res[k].keys() and res[k]['ci95'][0] <= res[k]['mean'] <= res[k]['ci95'][1]
    folder = tmp_path/'results/tetrominoes_cpu/six-step-00000006-seed=0'
    assert json.loads((folder/'results.json').read_text())['tetrominoes_real'] == res
    assert (folder/'slots.png').read_bytes().startswith(b'\x89PNG')
    assert (folder/'ARI.txt').read_text() == f"{res['ari_fg']['mean']:.3f},{res['ari_fg']['std']*.9**.5:.3f}\n" # NumPy's deviation divides by n

def test_evaluate_otherwise(error):
    plain, other = (json.loads(run('emorl_evaluate', 'tetrominoes_cpu', '--data', 'tetrominoes_real', '--json', *more)[0]) for more in ([], ['--means', '--spare-seeds', 2]))
    assert [r['settings']['spare_seeds'] for r in (plain, other)] == [4, 2] and [r['settings']['sample'] for r in (plain, other)] == [True, False] and other['mse']['mean'] < plain['mse']['mean']
    assert 'spare_seeds is at least 0; got -1' in error('emorl_evaluate', 'tetrominoes_cpu', '--spare-seeds=-1')
    assert 'start at random' in error('emorl_evaluate', 'tetrominoes_plain_cpu', '--spare-seeds', 1)

def test_evaluate_several_in_one_table(trained, tmp_path):
    out, _ = run('emorl_evaluate', trained, 'tetrominoes_cpu', '--data', 'tetrominoes_real', '--seeds', 0, 1, '--metrics', 'published', 'mbo_fg', '--steps', '--markdown', '--out', tmp_path)
    assert '| tetrominoes_real, 4 evaluations | mean | std | 95 % interval | images | each |' in out and '| failures | 50%' in out and '| ari_fg L1 |' in out
    assert sorted(p.name for p in tmp_path.glob('results/*/*')) == ['six-step-00000006-seed=0', 'six-step-00000006-seed=1', 'tetrominoes_cpu-seed=0', 'tetrominoes_cpu-seed=1']
    res = json.loads(run('emorl_evaluate', trained, '--data', 'tetrominoes_real', '--seeds', 0, 1, '--json')[0])
    assert set(res) == {'tetrominoes_cpu/six-step-00000006-seed=0', 'tetrominoes_cpu/six-step-00000006-seed=1', 'spread'}

def test_evaluate_on_several_processes(trained):
    "The same numbers, said once."
    env = {k: v for k, v in os.environ.items() if not k.startswith('ACCELERATE')} | {'OMP_NUM_THREADS': '1'}
    args = ['emorl_evaluate', trained, '--data', 'tetrominoes_real', '--batch-size', 3, '--metrics', 'published', 'breakdown', '--json']
    one = json.loads(run(*args, env=env)[0])
    p = subprocess.run(list(map(str, [bin/'torchrun', '--standalone', '--nproc-per-node', 2, bin/args[0], *args[1:]])), capture_output=True, text=True, timeout=300, env=env)
    assert p.returncode == 0, p.stderr[-2000:]
    assert json.loads(p.stdout) == one

def test_robustness_and_what_slots_hold(trained, error, tmp_path):
    out, _ = run('emorl_robustness', trained, '--num-images', 4, '--studies', 'slots', 'objects', '--out', tmp_path)
    assert 'objects' in out and json.loads((tmp_path/'robustness.json').read_text())['objects']['5']['num_images'] == 4
    assert (tmp_path/'robustness.png').exists() and 'which tetrominoes_real cannot' in error('emorl_robustness', trained, '--data', 'tetrominoes_real', '--studies', 'objects')
    folder = Path(run('emorl_traverse', trained, '--data', 'tetrominoes_real', '--num-images', 4, '--num-latents', 2, '--out', tmp_path)[0].strip())
    k = load(trained).config.num_slots
    assert {f'slot_{i}_row_{r}.gif' for i in range(k) for r in range(2)} | {'traversal.mp4', 'traversal.gif', 'z_range.txt', 'activeness.npy'} <= {p.name for p in folder.iterdir()}
    assert (trained/'checkpoints/step-00000006/latent_ranges.json').exists() and load(trained)
    assert 'scenes 0 to 9; 10 was asked for' in error('emorl_traverse', trained, '--data', 'tetrominoes_real', '--index', 10)
    assert Path(run('emorl_sample', trained, '--data', 'tetrominoes_real', '--num-images', 2, '--out', tmp_path)[0].strip()) == folder and (folder/'rinfo_1.npz').exists()
    assert run('emorl_encode', 'tetrominoes_real', '--model', trained, '--out', tmp_path/'s.h5')[0].strip() == str(tmp_path/'s.h5')

@pytest.mark.parametrize('preset', ['slot_attention_tetrominoes', 'iodine_tetrominoes'])
def test_baselines_by_the_same_commands(preset, tmp_path):
    out = tmp_path/'run'
    assert '3 steps' in run('emorl_train', preset, '--out', out, '--num-steps', 3, *quick)[0]
    assert '4 steps' in run('emorl_train', preset, '--out', out, '--num-steps', 4, '--resume', *quick)[0]
    res = json.loads(run('emorl_evaluate', out, '--data', 'tetrominoes_real', '--json', '--out', tmp_path)[0])
    assert res['num_images'] == 10 and res['mse']['mean'] > 0 and (res['kl']['mean'] == 0) == (preset[0] == 's')
    assert len(list(tmp_path.glob('results/*/*/slots.png'))) == 1
    # to a file of the published code and back: the same model
    assert run('emorl_convert', out, tmp_path/'x.pth')[0].strip() == str(tmp_path/'x.pth')
    run('emorl_convert', tmp_path/'x.pth', tmp_path/'back', '--config', preset)
    again = json.loads(run('emorl_evaluate', tmp_path/'back', '--data', 'tetrominoes_real', '--json')[0])
    assert again == res

def test_parity_of_files(error, tmp_path):
    path = Path(__file__).parents[2]/'shared/parity/slot_attention_small.npz'
    if not path.exists(): pytest.skip(f'{path.name} is not beside the project')
    assert '1 of 1 files agree' in run('emorl_parity', path)[0]
    with np.load(path) as z: arrays = {k: z[k] for k in z.files}
    np.savez(tmp_path/'other.npz', **arrays | {'total_loss': arrays['total_loss']*1.001})
    out, err = run('emorl_parity', path, tmp_path/'other.npz', ok=1)
    assert '1 of 2 files agree' in out and err == f'emorl_parity: Not as published: {tmp_path/"other.npz"}\n'

def test_benchmark_ends_with_json():
    out, _ = run('emorl_benchmark', '--preset', 'slot_attention_tetrominoes', '--batch-size', 1, '--eval-batch', 2, '--rounds', 1, '--json')
    res = json.loads(out.splitlines()[-1])
    assert res['train_step'].keys() >= {'plain_over_fast', 'memory_fast_over_plain'} and res['evaluate']['plain_over_fast'] > 0

def test_evaluate_prints_a_table_per_dataset(trained):
    out, _ = run('emorl_evaluate', trained, '--data', 'tetrominoes', 'tetrominoes_real', '--num-images', 10)
    assert out.count('ari_fg') == 2 and 'tetrominoes_real, 10 images' in out

def test_real_file_equals_rendered_scenes(trained):
    path = Path(__file__).parents[2]/'shared/data/tetrominoes_mini.tfrecords'
    if not path.exists(): pytest.skip(f'{path.name} is not beside the project')
    a, b = (json.loads(run('emorl_evaluate', trained, '--data', d, '--json')[0]) for d in (path, 'tetrominoes_real'))
    assert {k: a[k] for k in ('ari_fg', 'mse', 'kl', 'nll')} == {k: b[k] for k in ('ari_fg', 'mse', 'kl', 'nll')}

def test_resume_and_overwrite(error, tmp_path):
    args = ['tetrominoes_cpu', '--out', tmp_path/'r', '--seed', 1, *quick]
    run('emorl_train', *args, '--num-steps', 3)
    assert 'already holds a run' in error('emorl_train', *args)
    assert 'train.lr was' in error('emorl_train', *args, '--resume', '--lr', '1e-5')
    assert '5 steps' in run('emorl_train', *args, '--resume', '--num-steps', 5)[0]
    run('emorl_train', *args, '--overwrite', '--num-steps', 2)
    assert [c.name for c in checkpoints(tmp_path/'r')] == ['step-00000002']

@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_is_saved_and_goes_on(tmp_path, sig):
    args = [bin/'emorl_train', 'tetrominoes_cpu', '--out', tmp_path/'r', '--num-steps', '100000', '--batch-size', '4', '--eval-every', '100000']
    p = subprocess.Popen(list(map(str, args)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path/'r/metrics.jsonl', time.time() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.time() < deadline: time.sleep(.2)
    p.send_signal(sig)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'Traceback' not in err and 'Interrupted and saved' in err, err[-2000:]
    step = int(re.search(r'(\d+) steps', out)[1])
    assert checkpoints(tmp_path/'r')[-1].name == f'step-{step:08}'
    load(tmp_path/'r')

@pytest.mark.parametrize('args, says', [
    (['emorl_train', 'tetrominos_cpu'], "did you mean 'tetrominoes_cpu'"),
    (['emorl_train', 'tetrominoes_cpu', '--lrr', '1'], "did you mean 'lr'"),
    (['emorl_train', 'tetrominoes_cpu', '--lr', 'fast'], "'fast' cannot be used"),
    (['emorl_train', 'tetrominoes_cpu', '--lr'], 'has no value'),
    (['emorl_train', 'tetrominoes_cpu', '--data', 'tetrominose'], "did you mean 'tetrominoes'"),
    (['emorl_train', 'nowhere.json'], 'There is no file'),
    (['emorl_train', 'clevrtex'], 'name its file with --data'),
    (['emorl_train', 'slot_attention_tetrominoes', '--refinements', '[[0,2]]'], 'has no refinements'),
    (['emorl_evaluate', 'nowhere'], 'neither a run, nor a checkpoint'),
    (['emorl_evaluate', 'tetrominoes_cpu', '--metrics', 'arifg'], "did you mean 'ari_fg'"),
    (['emorl_evaluate', 'tetrominoes_cpu', 'tetrominoes_cpu', '--data', 'tetrominoes_real'], 'are called tetrominoes_cpu/tetrominoes_cpu'),
    (['emorl_sample', 'tetrominoes_cpu', '--data', 'multi_dsprites_colored_on_grayscale'], 'is for images of (3, 35, 35)'),
    (['emorl_robustness', 'tetrominoes_cpu', '--studies', 'slot'], "did you mean 'slots'"),
    (['emorl_encode', 'tetrominose'], "did you mean 'tetrominoes'"),
    (['emorl_data', 'info', 'nowhere.h5'], 'nowhere.h5'),
    (['emorl_data', 'make', 'clevr6', '--out', 'x.h5', '--shift', '{"num_object":[2,4]}'], "did you mean 'num_objects'"),
    (['emorl_data', 'make', 'clevr6', '--out', 'x.h5', '--shift', 'more'], "got 'more'"),
    (['emorl_benchmark', '--preset', 'clver6'], "did you mean 'clevr6'"),
    (['emorl_parity', 'nowhere.npz'], 'nowhere.npz'),
    (['emorl_parity', 'make', '--published', '.', '--out', 'x.npz'], 'lib/model.py'),
    (['emorl_convert', 'x.pth', 'folder'], '--config'),
    (['emorl_convert', 'x.pth', 'folder', '--config', 'tetrominoes'], 'x.pth'),
    (['emorl_convert', 'tetrominoes_cpu', 'x.pth'], 'the published code knows only its own models'),
])
def test_errors_are_one_line(args, says, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in error(*args)
    assert not list(tmp_path.iterdir()) # nothing half-made is left

def test_an_error_as_a_process(tmp_path):
    p, d = (subprocess.run([bin/'emorl_train', 'nope', *debug], capture_output=True, text=True, cwd=tmp_path) for debug in ([], ['--debug']))
    assert p.returncode == 1 and p.stderr.count('\n') == 1 and p.stderr.startswith('emorl_train: No preset')
    assert d.returncode == 1 and 'Traceback' in d.stderr

def test_files_that_are_not_what_they_say(trained, error, tmp_path):
    text = tmp_path/'scenes.h5'; text.write_text('not a dataset')
    assert 'scenes.h5' in error('emorl_evaluate', trained, '--data', text)
    made = tmp_path/'t.h5'
    run('emorl_data', 'make', 'tetrominoes', '--num', 20, '--num-test', 6, '--out', made)
    assert 'test' in error('emorl_evaluate', trained, '--data', made, '--split', 'tset')
    assert json.loads(run('emorl_evaluate', trained, '--data', made, '--json')[0])['num_images'] == 6
    run('emorl_train', 'tetrominoes_cpu', '--data', made, '--out', tmp_path/'r', '--num-steps', 1, *quick)
    cut = tmp_path/'cut.h5'; cut.write_bytes(made.read_bytes()[:-3000])
    assert 'cut.h5' in error('emorl_evaluate', trained, '--data', cut)

def test_model_for_another_image_size(error, tmp_path):
    import h5py
    with h5py.File(tmp_path/'big.h5', 'w') as f:
        for s in ('train', 'test'):
            f[f'{s}/imgs'] = np.zeros((4, 64, 64, 3), np.uint8)
            f[f'{s}/masks'] = np.eye(2, dtype=np.uint8)[np.zeros((4, 64, 64), int)].transpose(0, 3, 1, 2)[..., None]*255
    assert '(3, 35, 35)' in error('emorl_train', 'tetrominoes_cpu', '--data', tmp_path/'big.h5', '--out', tmp_path/'r')

def test_full_disk_keeps_the_old_checkpoint(trained, monkeypatch, tmp_path):
    import emorl.checkpoint as c
    from emorl.core import EmorlError
    folder = c.save_checkpoint(tmp_path/'step-00000001', {'model': {}}, {}, {'step': 1})
    def full(*a, **k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(c.torch, 'save', full)
    with pytest.raises(EmorlError, match='No space left on the disk'): c.save_checkpoint(folder, {'model': {}}, {}, {'step': 2})
    assert c.load_checkpoint(folder, training=True).training['step'] == 1
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000001']

def test_shipped_model_on_real_scenes(capsys):
    emorl.cli.emorl_evaluate(['tetrominoes_cpu', '--data', 'tetrominoes_real', '--json'])
    assert json.loads(capsys.readouterr().out)['ari_fg']['mean'] > .95

def test_torchrun_shares_one_training(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith('ACCELERATE')} | {'OMP_NUM_THREADS': '1'}
    train = ['tetrominoes_cpu', '--out', tmp_path/'r', '--num-steps', 3, '--log-every', 1, *quick]
    cmd = [bin/'torchrun', '--standalone', '--nproc-per-node', 2, bin/'emorl_train', *train]
    p = subprocess.run(list(map(str, cmd)), capture_output=True, text=True, timeout=300, env=env)
    assert p.returncode == 0, p.stderr[-2000:]
    assert p.stdout.count('3 steps') == 1
    steps = [l['step'] for l in map(json.loads, (tmp_path/'r/metrics.jsonl').read_text().splitlines()) if 'NLL' in l]
    assert steps == [1, 2, 3] # one run, not two on top of each other
