"""Memory: estimated, given back by an engine that is stopped, and no whole model on ranks that need none."""

import json

import pytest

from pipelines.engine.memory import GB, model_states, table
from tests.fixtures.two_ranks import run_on_two_ranks


def test_a_billion_parameters_by_hand():
    """bf16: two bytes each for weights and gradients, four for masters and averages, eight for moments."""
    alone, many = (model_states(10**9, 3, ranks) for ranks in (1, 64))
    assert alone.total == 20 * GB and many.total == pytest.approx(20 * GB / 64, rel=1e-6)
    assert model_states(10**9, 0, 64).total == pytest.approx((16 + 4 / 64) * GB)
    assert "| 2 | 4.2 | 3.1 | 2.6 | 2.3 |" in table(10**9)


@pytest.mark.slow
def test_stopped_engines_leave_nothing_and_other_ranks_gather_nothing(tmp_path):
    first = run_on_two_ranks(__file__, "memory_steps.py", tmp_path, "found-0.json")
    other = json.loads((tmp_path / "found-1.json").read_text())
    for found in (first, other):
        assert len(found["left"]) == 14
        assert all(running > 5e5 and after < 1000 for running, after in found["left"].values()), found["left"]
    assert list(first["gathered"].values()) == [[4 * 16 * (64 * 64 + 64)] * 2] * 4
    assert list(other["gathered"].values()) == [[0, 0]] * 4
