"The published code's own results, where they lie beside the project."
from pathlib import Path

import pytest

from emorl.parity import compare, load_fixture, our_quantities

fixtures = Path(__file__).parents[2]/'shared/parity'

@pytest.mark.parametrize('plain', [False, True], ids=['fast', 'plain'])
@pytest.mark.parametrize('name', ['emorl_tetrominoes', 'emorl_clevr_geco', 'emorl_reversed_big', 'emorl_bottom_up_gru'])
def test_published_numbers(name, plain):
    path = fixtures/f'{name}.npz'
    if not path.exists(): pytest.skip(f'{path.name} is not beside the project')
    fixture = load_fixture(path)
    rows = compare(fixture, our_quantities(fixture, plain))
    assert len(rows) > 60
    assert not (bad := [r for r in rows if not r[1] < r[2]]), bad
