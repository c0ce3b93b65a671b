"`emorl_train` in a process that may be killed, for test_survival.py: forked from one that has imported everything, so that it starts at once."
import importlib, multiprocessing, os, signal, sys

context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['pytest', 'emorl.cli', 'torch._dynamo', 'torch.distributed.fsdp'])  # the last two come with the first optimizer, and take seconds

changes = {'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.symlink', 'os.truncate', 'shutil.rmtree'}

def die_before(number, folder):
    "Kill this process just before it changes something below a folder for that number of times, counted from 1."
    def hook(event, args):
        nonlocal number
        if event == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR) or event in changes:
            inside = event in ('os.remove', 'os.rmdir') and args[-1] >= 0  # rmtree names files relative to an open folder
            number -= inside or str(folder) in str(args)
            if not number: os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def pause_at(module, name, number, pipe):
    "When a function is called for that number of times, tell, and wait for an answer, before it does anything."
    module = importlib.import_module(module)
    func, calls = getattr(module, name), 0
    def paused(*args, **kw):
        nonlocal calls
        calls += 1
        if calls == number: pipe.send(name); pipe.recv()
        return func(*args, **kw)
    setattr(module, name, paused)

def train(argv, log, pipe, at=None, before=None, env={}):
    "The life of the process: its output goes to a file; it tells when the training begins, and when it pauses at a call `at`: (module, function, number)."
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1); os.dup2(fd, 2)
    os.environ.update(env)
    import emorl.cli, emorl.presets
    fit = emorl.presets.fit
    def told(*args, **kw):
        if before: die_before(before, args[4])
        if at: pause_at(*at, pipe)
        pipe.send('begins')
        return fit(*args, **kw)
    emorl.presets.fit = told
    emorl.cli.emorl_train(argv)
