"Datasets for `test_loading` that other processes must find, in a module that is quickly imported."
from operator import attrgetter

import numpy as np

from emorl.data.tetrominoes import Tetrominoes

twin = Tetrominoes(50)

class Odd(Exception):
    "Cannot be pickled."
    def __init__(self, a, b): super().__init__('odd')

class Faulty:
    "The twin, but scene 20 cannot be had."
    name, image_size, num_entities = 'faulty', twin.image_size, twin.num_entities
    def __init__(self, kind): self.kind = kind
    def __len__(self): return len(twin)
    def batch(self, indices):
        if 20 in np.asarray(indices): raise dict(zero=ZeroDivisionError('of my own making'), odd=Odd(1, 2), exit=SystemExit(3))[self.kind]
        return twin.batch(indices)

class Known:
    "A table."
    def __len__(self): return len(twin)
    def __getitem__(self, rows): return dict(image=twin.batch(rows).image)

class Unknown(Faulty):
    "Something that another process looks for in vain."
    def __init__(self): super().__init__('zero')
    def __reduce__(self): return attrgetter('missing'), (Known,)
