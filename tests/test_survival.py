"What a run survives: being killed, being told to stop, a full disk, a corrupt checkpoint, another training in its folder, the loss of one of its processes. Whatever it was, the run goes on to what it would have been."
import errno, itertools, json, os, random, re, resource, shutil, signal, subprocess, sys, threading, time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest, torch

import emorl.cli
from emorl.checkpoint import checkpoints, find_checkpoint, load_checkpoint
from emorl.files import read_json, read_lines, write_json
from emorl.runs import find_runs, is_alive, lock_run, summarize_run
from some_runs import context, train

pytestmark = pytest.mark.slow # Three minutes of killing and resuming

bin = Path(sys.executable).parent
shape = dict(num_slots=3, num_layers=1, num_refinements=1, slot_size=8, geco_target=-1.2, geco_options=dict(start=3),
             encoder=dict(widths=[8, 8], kernels=[5, 3], strides=[2, 2]), decoder_options=dict(widths=[8], kernels=[3, 3], paddings=[1, 1]))
plan = dict(num_steps=12, batch_size=4, lr=1e-3, warmup=4, half_life=5, refinements=[[0, 1], [7, 0]], average=.9, log_every=1, eval_every=4, eval_images=4, save_every=3)

def start(out, *args, **how):
    "A training that has begun; see `some_runs.train` for how it may pause and die."
    ours, theirs = context.Pipe()
    experiment = write_json(path := out.with_suffix('.json'), dict(name='tiny', data='tetrominoes', model=shape, train=plan)) or path
    p = context.Process(target=train, args=([str(a) for a in (experiment, '--out', out, *args)], out.with_suffix('.log'), theirs), kwargs=how, daemon=True)
    out.with_suffix('.log').unlink(missing_ok=True)
    p.start(); theirs.close(); started.append(p)
    p.pipe, p.log = ours, out.with_suffix('.log')
    return p

started = []

@pytest.fixture(autouse=True)
def nothing_is_left():
    "A test that fails leaves no training behind."
    yield
    while started: started[-1].kill(); started.pop().join()

def hear(p):
    "What a training tells next: that it begins, or where it pauses; None if it ended instead."
    assert p.pipe.poll(60), 'it tells nothing'
    with suppress(EOFError): return p.pipe.recv()

def end(p, code=0, within=60):
    "What a training printed, once it has ended as expected and without a trace."
    p.join(within)
    assert p.exitcode is not None, f'it still runs after {within} s'
    text = p.log.read_text()
    assert p.exitcode == code and 'Traceback' not in text, text[-3000:]
    return text

def made(out, *args, code=0, **how): return end(start(out, *args, **how), code)

def paused(out, *args, at, **how):
    "A training that waits in the middle of a call."
    p = start(out, *args, at=at, **how)
    assert (hear(p), hear(p)) == ('begins', at[1]), p.log.read_text()[-3000:]
    return p

def killed(p): p.kill(); end(p, -signal.SIGKILL)

def lines(out): return [{k: v for k, v in l.items() if k not in ('seconds', 'images_per_second', 'memory_mb')} for l in read_lines(out/'metrics.jsonl')]

def losses(out): return [l for l in lines(out) if 'NLL' in l]

def plain(x): return {k: plain(v) for k, v in x.items() if k != 'seconds'} if isinstance(x, dict) else [plain(v) for v in x] if isinstance(x, (list, tuple)) else x.tolist() if torch.is_tensor(x) else x

def traces(out): return {p.relative_to(out).as_posix(): os.readlink(p) if p.is_symlink() else None for p in out.rglob('*') if 'tb' not in p.parts}

def assert_same(out, whole):
    "The same lines, weights, optimizer, average and best checkpoint, and nothing left beside."
    assert lines(out) == lines(whole)
    assert traces(out) == traces(whole)
    a, b = (load_checkpoint(find_checkpoint(o), training=True) for o in (out, whole))
    assert plain(a.training) == plain(b.training) and plain(a.model) == plain(b.model) and a.config == b.config

def go_on(out, whole):
    "Resume to the end: it is what an uninterrupted run is."
    made(out, '--resume')
    assert_same(out, whole)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run that nothing interrupts."
    out = tmp_path_factory.mktemp('whole')/'r'
    made(out)
    assert [c.name for c in checkpoints(out)] == ['step-00000009', 'step-00000012'] and sum('mse' in l for l in lines(out)) == 3
    return out

# ---- kill -9

def how_to_go_on(out): return '--resume' if checkpoints(out) else '--overwrite'

def test_killed_at_thirty_moments(whole, tmp_path):
    "At a random time, or before a random change of a file, in turns; as often as it takes until thirty have hit."
    chance, out, hits, torn = random.Random(0), tmp_path/'r', 0, 0
    while hits < 30:
        p = start(out, how_to_go_on(out), before=chance.randint(1, 60) if hits % 2 else None)
        hear(p)
        p.join(60 if hits % 2 else chance.uniform(0, 1))
        p.kill(); p.join()
        hits += p.exitcode != 0
        torn += any(out.glob('checkpoints/.step-*'))
        if p.exitcode == 0: assert_same(out, whole); shutil.rmtree(out)
    made(out, how_to_go_on(out))
    assert_same(out, whole)
    assert torn, 'none hit the writing of a checkpoint'

@pytest.mark.slow
def test_killed_before_every_change_of_a_file(whole, tmp_path):
    out = tmp_path/'r'
    for number in itertools.count(1):
        p = start(out, '--overwrite', before=number)
        p.join(60)
        if p.exitcode == 0: break
        assert p.exitcode == -signal.SIGKILL, p.log.read_text()[-3000:]
        made(out, how_to_go_on(out))
        assert_same(out, whole)
    assert number > 50

def test_killed_after_a_measurement_that_had_been_given_up(whole, tmp_path):
    "Its line is there once, though the checkpoint was made before it."
    out = tmp_path/'r'
    p = paused(out, at=('emorl.evaluate', '_one_batch', 2))
    os.kill(p.pid, signal.SIGTERM); end(p, 130)
    p = paused(out, '--resume', at=('emorl.train', 'train_step', 1)); killed(p)
    assert [l['step'] for l in lines(out)] == [*range(1, 5), 4, *range(5, 9), 8]
    go_on(out, whole)

# ---- Ctrl-C and SIGTERM

moments = {'step': ('emorl.train', 'train_step', 8), 'measurement': ('emorl.evaluate', '_one_batch', 10), 'checkpoint': ('emorl.checkpoint', 'write_model', 2), 'prune': ('emorl.train', 'prune', 3)}

@pytest.mark.parametrize('moment, sig', [('step', signal.SIGINT), ('measurement', signal.SIGINT), ('measurement', signal.SIGTERM), ('checkpoint', signal.SIGTERM), ('prune', signal.SIGINT)])
def test_told_to_stop(moment, sig, whole, tmp_path):
    "Within ten seconds there is a checkpoint and no process; what was being measured is measured later."
    out, long = tmp_path/'r', moment == 'measurement'
    p = paused(out, *['--eval-images', 10**6, '--eval-every', 8]*long, at=moments[moment])
    os.kill(p.pid, sig)
    with suppress(BrokenPipeError, OSError): p.pipe.send('go on')
    text = end(p, 130, within=10)
    last = checkpoints(out)[-1].name
    assert f'Interrupted and saved; go on with --resume --out {out}' in text and f'{int(last[5:])} steps' in text and not is_alive(out)
    if long:
        assert last == 'step-00000008' and not [l for l in lines(out) if 'mse' in l]
        made(out, '--resume', '--eval-every', 8)
        assert [l for l in lines(out) if 'mse' in l] == [l for l in lines(whole) if 'mse' in l and l['step'] in (8, 12)]
        assert losses(out) == losses(whole)
    else: go_on(out, whole)

def test_told_to_stop_twice(whole, tmp_path):
    "A second Ctrl-C, a while after the first, waits for nothing; the checkpoint before it is whole."
    p = paused(out := tmp_path/'r', at=('emorl.checkpoint', 'write_model', 3))
    os.kill(p.pid, signal.SIGINT)
    time.sleep(1.2)
    os.kill(p.pid, signal.SIGINT)
    assert 'emorl_train: interrupted' in end(p, 130, within=10)
    go_on(out, whole)

# ---- a full disk

def one_line(text):
    "The error a command ended with."
    found = re.findall('^emorl_train: (.*)$', text, re.M)
    assert len(found) == 1, text[-3000:]
    return found[0]

@pytest.mark.parametrize('what, at, limit', [('checkpoint', ('emorl.train', 'save_checkpoint', 3), lambda out: 60_000), ('weights', ('emorl.train', 'save_checkpoint', 3), lambda out: 30_000),
                                             ('line', ('emorl.train', 'append_line', 8), lambda out: (out/'metrics.jsonl').stat().st_size + 20), ('configuration', ('emorl.train', 'write_json', 1), lambda out: 1000)])
def test_files_that_may_not_grow(what, at, limit, whole, tmp_path):
    "One clear line; what was written before is whole, and the run goes on from there."
    out = tmp_path/'r'
    p = paused(out, at=at)
    resource.prlimit(p.pid, resource.RLIMIT_FSIZE, (limit(out), resource.RLIM_INFINITY))
    p.pipe.send('go on')
    said = one_line(end(p, 1))
    assert os.strerror(errno.EFBIG) in said
    if what == 'configuration': made(out, '--overwrite'); assert_same(out, whole); return
    assert checkpoints(out)[-1].name == {'line': 'step-00000006'}.get(what, 'step-00000004')
    if what == 'line': assert not (out/'metrics.jsonl').read_text().endswith('\n')
    go_on(out, whole)

@pytest.fixture
def small_disk(tmp_path):
    "A folder on a disk of its own, which fits a run and not much more."
    (disk := tmp_path/'disk').mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', disk], capture_output=True).returncode: pytest.skip('this user may not mount a disk')
    yield disk
    subprocess.run(['umount', '-l', disk], check=True)

@pytest.mark.parametrize('at', [('emorl.train', 'save_checkpoint', 3), ('emorl.files', '_sync', 4), ('emorl.train', 'mark_best', 2), ('emorl.train', 'train_step', 1)], ids=lambda a: a[1])
def test_full_disk(at, whole, small_disk):
    out, filler = small_disk/'r', small_disk/'filler'
    p = paused(out, at=at)
    with open(filler, 'wb', buffering=0) as f, suppress(OSError):
        while f.write(bytes(512)): pass
    p.pipe.send('go on')
    assert 'No space left on' in one_line(end(p, 1))
    filler.unlink()
    made(out, how_to_go_on(out))
    assert_same(out, whole)

# ---- a corrupt checkpoint

def flip(path, at=.5):
    "Change one byte of a file."
    data = bytearray(path.read_bytes()); data[int(at*len(data))] ^= 1; path.write_bytes(data)

harms = {'a byte of training.pt': lambda c: flip(c/'training.pt'), 'a byte of the weights': lambda c: flip(c/'model.safetensors', .99), 'a byte of the manifest': lambda c: flip(c/'manifest.json'),
         'a file cut': lambda c: os.truncate(c/'training.pt', 1000), 'a file lost': lambda c: (c/'training.pt').unlink(), 'no manifest': lambda c: (c/'manifest.json').unlink(), 'nothing left': lambda c: [f.unlink() for f in c.iterdir()]}

@pytest.mark.parametrize('harm', harms)
def test_corrupt_checkpoint(harm, whole, tmp_path):
    "The one before it is used."
    out = shutil.copytree(whole, tmp_path/'r', symlinks=True)
    harms[harm](out/'checkpoints/step-00000012')
    assert find_checkpoint(out).name == 'step-00000009'
    go_on(out, whole)

def test_nothing_but_corrupt_checkpoints(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path/'r', symlinks=True)
    for c in checkpoints(out): flip(c/'training.pt')
    said = one_line(made(out, '--resume', code=1))
    assert f'No checkpoint of {out} is whole' in said and 'training.pt is not what was written' in said

def test_corrupt_checkpoint_does_not_count(whole, tmp_path):
    "A run that went back behind a corrupt checkpoint, and stops before it is there again, keeps what it saves."
    out, rarely = tmp_path/'r', ('--eval-every', 100)
    killed(paused(out, *rarely, at=('emorl.train', 'train_step', 11)))
    flip(out/'checkpoints/step-00000009/training.pt')
    p = paused(out, '--resume', '--keep', 1, *rarely, at=('emorl.train', 'train_step', 2))
    os.kill(p.pid, signal.SIGTERM); p.pipe.send('go on'); end(p, 130)
    assert find_checkpoint(out).name == 'step-00000008'
    made(out, '--resume', *rarely)
    assert losses(out) == losses(whole)

def test_torn_line(whole, tmp_path):
    out = tmp_path/'r'
    killed(paused(out, at=('emorl.train', 'train_step', 8)))
    with open(out/'metrics.jsonl', 'a') as f: f.write('{"step": 8, "total_lo')
    assert summarize_run(out).step == 7
    go_on(out, whole)

# ---- another training in the folder, or another configuration

def test_two_trainings_in_one_folder(whole, tmp_path):
    out = tmp_path/'r'
    p = paused(out, at=('emorl.train', 'train_step', 8))
    kept = out.with_suffix('.kept'); p.log.rename(kept); p.log = kept
    for how in ('--resume', '--overwrite'): assert f'Another training is writing to {out}: process {p.pid} on ' in one_line(made(out, how, code=1))
    assert 'already holds a run; resume continues it, overwrite replaces it' in one_line(made(out, code=1))
    p.pipe.send('go on'); end(p)
    assert_same(out, whole)

def test_watchers_do_not_disturb(tmp_path):
    "Whoever looks whether a run is alive keeps nobody from training there, and sees no other watcher."
    lock_run(tmp_path).close()
    done, seen = threading.Event(), []
    def watch():
        while not done.is_set(): seen.append(is_alive(tmp_path))
    watchers = [threading.Thread(target=watch) for _ in range(3)]
    for w in watchers: w.start()
    try:
        while len(seen) < 3000: time.sleep(.01)
        assert not any(seen), f'{sum(seen)} of {len(seen)} looks saw a training'
        for _ in range(300): lock_run(tmp_path).close()
    finally:
        done.set()
        for w in watchers: w.join()

def test_other_configuration(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path/'r', symlinks=True)
    said = one_line(made(out, '--resume', '--lr', '2e-3', '--model.num_layers', 2, '--num-steps', 14, code=1))
    assert all(k in said for k in ('model.num_layers was 1, now 2', 'train.lr was 0.001, now 0.002')) and 'num_steps' not in said
    assert traces(out) == traces(whole) and read_json(out/'config.json') == read_json(whole/'config.json')
    assert 'cannot go on as another model: ' in one_line(made(out, '--resume', '--accept-changes', '--num-layers', 1, '--num-slots', 4, '--slot-size', 12, code=1))
    made(out, '--resume', '--accept-changes', '--lr', '2e-3', '--batch-size', 8, '--num-steps', 14)
    assert losses(out)[:12] == losses(whole) and [l['lr'] for l in losses(out)[12:]] == [2e-3*.5**((s - 4)/5) for s in (12, 13)]

def test_fewer_steps_than_were_made(whole, tmp_path):
    "Such a run has finished."
    out = shutil.copytree(whole, tmp_path/'r', symlinks=True)
    assert '12 steps' in made(out, '--resume', '--num-steps', 6) and lines(out) == lines(whole)

def test_best_by_another_measurement(tmp_path):
    "Scores of two measurements are not compared."
    out = tmp_path/'r'
    made(out, '--best', 'ari_fg', '--num-steps', 4)
    made(out, '--resume', '--best', 'mse')
    assert load_checkpoint(out/'checkpoints/best', training=True).training['best'] == -min(l['mse'] for l in lines(out) if 'mse' in l and l['step'] > 4)

@pytest.mark.parametrize('setting, value', [('--save-every', 0), ('--log-every', 0), ('--eval-every', 0), ('--keep', 0), ('--num-steps', -1)])
def test_numbers_that_make_no_sense(setting, value, tmp_path):
    assert setting[2:].replace('-', '_') in one_line(made(tmp_path/'r', setting, value, code=1)) and not (tmp_path/'r').exists()

# ---- processes that a launcher restarts

launch = dict(TORCHELASTIC_RUN_ID='mine')
restarted = launch | dict(TORCHELASTIC_RESTART_COUNT='1')

def test_restart_goes_on(whole, tmp_path):
    out = tmp_path/'r'
    killed(paused(out, at=('emorl.train', 'train_step', 2), env=launch))  # no checkpoint yet
    killed(paused(out, at=('emorl.train', 'train_step', 8), env=restarted))
    made(out, '--overwrite', env=restarted)
    assert_same(out, whole)

def test_restart_of_what_was_refused(whole, tmp_path):
    "A launcher's restart continues what it began, not what somebody else left in the folder."
    out = shutil.copytree(whole, tmp_path/'r', symlinks=True)
    for env in (launch, restarted): assert 'already holds a run' in one_line(made(out, '--num-steps', 14, code=1, env=env))
    assert lines(out) == lines(whole)
    made(out, '--overwrite', '--num-steps', 3, env=restarted)  # the first start ended before it came to that
    assert [l['step'] for l in losses(out)] == [1, 2, 3]

def test_target_of_geco_survives(tmp_path):
    "Killed in the watch, at its end, after it; resumed, and restarted by a launcher with the words of the first start."
    auto = '--geco-target', 'auto', '--geco-share', .5, '--eval-every', 12
    made(tmp_path/'whole', *auto)
    for name, number, again, env in (('train_step', 4, '--resume', {}), ('save_figure', 1, '--resume', {}), ('write_json', 2, '--resume', {}), ('train_step', 11, '--overwrite', restarted)):
        out = tmp_path/f'{name}-{number}'
        killed(paused(out, *auto, env=launch, at=('emorl.train' if name == 'train_step' else 'emorl.geco_target', name, number)))
        made(out, how_to_go_on(out) if again == '--resume' else again, *auto, env=env)
        assert_same(out, tmp_path/'whole')
    assert 'train.lr was' in one_line(made(out, '--resume', '--lr', 1, *auto, code=1))
    made(out, '--resume', '--lr', 1, *auto, '--accept-changes')

# ---- what emorl_runs says

def test_runs(whole, tmp_path, capsys):
    def told(): emorl.cli.emorl_runs([str(tmp_path), '--json']); return {Path(r['path']).name: r for r in json.loads(capsys.readouterr().out)}
    shutil.copytree(whole, tmp_path/'whole', symlinks=True)
    living = paused(tmp_path/'r', at=('emorl.train', 'train_step', 8))
    killed(paused(tmp_path/'last', at=('emorl.train', 'evaluate', 3)))  # its last step is made, but not saved
    with open(tmp_path/'last/metrics.jsonl', 'a') as f: f.write('{"step": 12, "ari_')
    runs = told()
    assert {k: (r['state'], r['step'], r['num_steps'], r['preset']) for k, r in runs.items()} == {'whole': ('finished', 12, 12, 'tiny'), 'r': ('running', 7, 12, 'tiny'), 'last': ('stopped', 12, 12, 'tiny')}
    assert runs['r']['train']['NLL'] == losses(whole)[6]['NLL'] and runs['r']['held_out']['step'] == 4 and runs['r']['quiet'] < 60
    killed(living)
    assert told()['r']['state'] == 'stopped'
    made(tmp_path/'r', '--resume')
    emorl.cli.emorl_runs([str(tmp_path)])
    table = capsys.readouterr().out.splitlines()
    assert sum('finished' in l and '12/12' in l for l in table) == 2 and sum('stopped' in l for l in table) == 1

def test_runs_of_which_one_is_ruined(whole, tmp_path):
    "The others are listed."
    for name in 'ab': shutil.copytree(whole, tmp_path/name, symlinks=True)
    (tmp_path/'a/metrics.jsonl').write_bytes(b'\xff\xfe no json\n')
    assert {r.path.name: r.step for r in find_runs(tmp_path)}['b'] == 12

def test_runs_while_checkpoints_come_and_go(tmp_path):
    done, made = threading.Event(), tmp_path/'r/checkpoints/step-00000001'
    def work():
        while not done.is_set(): made.mkdir(parents=True); shutil.rmtree(made)
    (worker := threading.Thread(target=work)).start()
    try:
        for _ in range(2000): find_runs(tmp_path)
    finally: done.set(); worker.join()

# ---- several processes, and several machines

def ended(p, within=60):
    "What a launcher and its processes printed; all of them are gone."
    try: p.wait(within)
    finally: kill_all(p)
    return p.log.read_text()

def workers(launcher):
    "The processes that a launcher has started, by rank."
    found = {}
    for pid in map(int, Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split() if launcher.poll() is None else ()):
        if rank := re.search(rb'\0RANK=(\d+)\0', Path(f'/proc/{pid}/environ').read_bytes()): found[int(rank[1])] = pid
    return found

def kill_all(launcher):
    "As if the machine were gone: the launcher's processes have sessions of their own."
    for pid in workers(launcher).values(): os.kill(pid, signal.SIGKILL)
    launcher.kill(); launcher.wait()

def torchrun(out, *args, launcher=('--standalone', '--nproc-per-node', 2), prefix=(), **env):
    "A training that torchrun has started."
    write_json(experiment := out.with_suffix('.json'), dict(name='tiny', data='tetrominoes', model=shape, train=plan))
    log = out.with_name(f'{out.name}-{time.monotonic_ns()}.log')
    env = {k: v for k, v in os.environ.items() if not k.startswith('ACCELERATE')} | {'OMP_NUM_THREADS': '1'} | env
    with open(log, 'w') as f: p = subprocess.Popen(list(map(str, [*prefix, bin/'torchrun', *launcher, bin/'emorl_train', experiment, '--out', out, *args])), stdout=f, stderr=f, env=env, start_new_session=True)
    p.log = log
    return p

def shared(out, *args, **how):
    "What a training of two processes printed."
    p = torchrun(out, *args, **how)
    text = ended(p, 300)
    assert p.returncode == 0, text[-3000:]
    return text

def wait_for(what, within=60):
    "Until something is true."
    over = time.monotonic() + within
    while not (found := what()):
        assert time.monotonic() < over, 'it does not happen'
        time.sleep(.02)
    return found

def reached(out, step): return lambda: (out/'metrics.jsonl').exists() and len(losses(out)) >= step

long = '--num-steps', 160, '--save-every', 20, '--eval-every', 100

@pytest.fixture(scope='module')
def whole_long(tmp_path_factory):
    "A run that two processes share and nothing interrupts."
    out = tmp_path_factory.mktemp('shared')/'r'
    shared(out, *long)
    return out

@pytest.mark.slow
def test_twenty_launches(tmp_path):
    for i in range(20): assert '2 steps' in shared(tmp_path/'r', '--overwrite', '--num-steps', 2)

@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 1])
def test_a_worker_is_lost(rank, whole_long, tmp_path):
    "The others say so, and end; the run goes on from its last checkpoint."
    p = torchrun(out := tmp_path/'r', *long)
    wait_for(reached(out, 50))
    os.kill(workers(p)[rank], signal.SIGKILL)
    text = ended(p)
    assert p.returncode > 0 and f'emorl_train: Process {1 - rank} of 2 lost the others at step ' in text and '/emorl/' not in text, text[-3000:]
    assert not is_alive(out)
    shared(out, '--resume', *long)
    assert_same(out, whole_long)

fresh_store = dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1') # Else processes that start again may find the addresses of those before them: pytorch/pytorch#135712

@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 1])
def test_a_lost_worker_is_started_again(rank, whole_long, tmp_path):
    p = torchrun(out := tmp_path/'r', *long, launcher=('--standalone', '--nproc-per-node', 2, '--max-restarts', 1), **fresh_store)
    wait_for(reached(out, 50))
    os.kill(workers(p)[rank], signal.SIGKILL)
    text = ended(p)
    assert p.returncode == 0 and '160 steps' in text, text[-3000:]
    assert_same(out, whole_long)

@pytest.mark.slow
@pytest.mark.parametrize('sig', [signal.SIGTERM, signal.SIGINT])
def test_torchrun_is_told_to_stop(sig, whole_long, tmp_path):
    p = torchrun(out := tmp_path/'r', *long)
    wait_for(reached(out, 50))
    p.send_signal(sig)
    text = ended(p, 20)
    assert p.returncode and '/emorl/' not in text and text.count('Interrupted and saved') == 1, text[-3000:]
    assert checkpoints(out)[-1].name == f'step-{len(losses(out)):08}'
    shared(out, '--resume', *long)
    assert_same(out, whole_long)

@pytest.mark.slow
def test_several_processes_in_the_folder_of_another_training(whole, tmp_path):
    p = paused(out := tmp_path/'r', at=('emorl.train', 'train_step', 8))
    other = torchrun(out, '--resume')
    text = ended(other)
    assert other.returncode == 1 and f'Another training is writing to {out}: process {p.pid} on ' in text and '/emorl/' not in text, text[-3000:]
    p.pipe.send('go on'); end(p)
    assert_same(out, whole)

@pytest.fixture
def hosts():
    "Two machines, each a prefix of its commands, its address, and its environment: network namespaces, or addresses of this machine where there may be none."
    names, address = [f'emorl{os.getpid()}{s}' for s in 'ab'], ['10.213.7.1', '10.213.7.2']
    def ip(*words): return subprocess.run(['ip', *words], capture_output=True).returncode == 0
    try:
        if all(ip('netns', 'add', n) for n in names) and ip('link', 'add', 'veth', 'netns', names[0], 'type', 'veth', 'peer', 'veth', 'netns', names[1]):
            for n, a in zip(names, address): assert ip('-n', n, 'addr', 'add', f'{a}/24', 'dev', 'veth') and ip('-n', n, 'link', 'set', 'veth', 'up') and ip('-n', n, 'link', 'set', 'lo', 'up')
            yield [(('ip', 'netns', 'exec', n), a, dict(GLOO_SOCKET_IFNAME='veth')) for n, a in zip(names, address)]
        else: yield [((), a, dict(GLOO_SOCKET_IFNAME='lo')) for a in ('127.0.0.1', '127.0.0.2')]
    finally:
        for n in names: ip('netns', 'del', n)

def on_hosts(hosts, out, *args, **env):
    "The launchers of a training on two machines, a process on each."
    (_, first, _), port = hosts[0], emorl.train.free_port()
    return [torchrun(out, *args, prefix=prefix, launcher=('--nnodes', 2, '--node-rank', r, '--nproc-per-node', 1, '--master-addr', first, '--master-port', port), **own, **env) for r, (prefix, _, own) in enumerate(hosts)]

@pytest.mark.slow
def test_two_hosts(hosts, whole, tmp_path):
    "The losses of one process, to rounding; and those of two processes on one machine."
    for p in on_hosts(hosts, out := tmp_path/'r'): assert '/emorl/' not in ended(p, 120) and p.returncode == 0, p.log.read_text()[-3000:]
    shared(tmp_path/'near')
    assert_same(out, tmp_path/'near')
    for a, b in zip(losses(out), losses(whole)): assert a == pytest.approx(b, rel=1e-3)

@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 1])
def test_a_host_is_lost(hosts, rank, whole_long, tmp_path):
    "Its launcher and its process are killed: the other host says so, and ends; both go on together."
    both = on_hosts(hosts, out := tmp_path/'r', *long)
    wait_for(reached(out, 50))
    kill_all(both[rank])
    text = ended(both[1 - rank])
    assert both[1 - rank].returncode > 0 and f'Process {1 - rank} of 2 lost the others' in text and '/emorl/' not in text, text[-3000:]
    for p in on_hosts(hosts, out, '--resume', *long): assert ended(p, 120) and p.returncode == 0, p.log.read_text()[-3000:]
    assert_same(out, whole_long)
