"""A validation samples while ZeRO-3 holds the weights in parts."""

import pytest

from tests.fixtures.two_ranks import run_on_two_ranks


@pytest.mark.slow
def test_it_answers_as_plain_torch_does(tmp_path):
    worst = run_on_two_ranks(__file__, "sampling_steps.py", tmp_path, "worst.json")
    assert len(worst) == 6 and max(worst.values()) < 1e-5, worst
