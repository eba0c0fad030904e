"""Learning rates at the steps that matter."""

import pytest

from pipelines.config import OptimiserConfig
from pipelines.engine.schedule import learning_rate


def test_warm_up_is_that_of_mmaudio():
    config = OptimiserConfig(lr=1.0, warmup_steps=1000)
    assert learning_rate(0, 5000, config) == pytest.approx(1 / 1001)
    assert learning_rate(999, 5000, config) == pytest.approx(1000 / 1001)
    assert learning_rate(1000, 5000, config) == 1.0


def test_cosine_ends_at_zero():
    config = OptimiserConfig(lr=2.0, warmup_steps=10, schedule="cosine")
    assert learning_rate(10, 110, config) == 2.0
    assert learning_rate(60, 110, config) == pytest.approx(1.0)
    assert learning_rate(110, 110, config) == pytest.approx(0.0)


def test_steps_drop_tenfold():
    config = OptimiserConfig(lr=1.0, warmup_steps=0, schedule="steps", milestones=(240, 270))
    assert [learning_rate(step, 300, config) for step in (239, 240, 270)] == pytest.approx([1.0, 0.1, 0.01])
