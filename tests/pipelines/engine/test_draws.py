"""Random numbers follow the position alone."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.engine.draws import Draws


@given(st.integers(0, 2**31), st.lists(st.integers(0, 2**40), min_size=2, max_size=6, unique=True))
def test_any_batching_draws_the_same(seed, positions):
    def draw(part):
        draws = Draws(seed, torch.tensor(part))
        return draws.normal(3), draws.uniform(), draws.normal(2, 2)

    whole, parts = draw(positions), [draw([position]) for position in positions]
    for number, value in enumerate(whole):
        assert torch.equal(value, torch.cat([part[number] for part in parts]))


def test_positions_and_seeds_are_independent():
    values = torch.stack([Draws(seed, torch.arange(2000)).normal(4).flatten() for seed in (0, 1)])
    assert abs(torch.corrcoef(values)[0, 1]) < 0.05
    assert abs(values.mean()) < 0.03 and abs(values.std() - 1) < 0.03
    assert len(values.flatten().unique()) > 15_990
