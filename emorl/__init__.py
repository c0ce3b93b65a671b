__version__ = "0.0.1"

def __getattr__(name):
    "`emorl.load`, without importing torch before it is asked for."
    if name == 'load':
        from emorl.checkpoint import load
        return load
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

def __dir__(): return [*globals(), 'load']
