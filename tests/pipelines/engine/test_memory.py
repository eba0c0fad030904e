"""Memory: estimated, given back by an engine that is stopped, and no whole model on ranks that need none."""

import json
from pathlib import Path

import pytest
import torch

from models.generators.mmdit import PRESETS, MMDiT
from pipelines.engine.memory import GB, SIZES, model_states, table
from tests.fixtures.two_ranks import run_on_two_ranks


def test_a_billion_parameters_by_hand():
    """bf16: two bytes each for weights, four for masters and averages, eight for moments; gradients once more flat, and in fp32."""
    alone, many = (model_states(10**9, 3, ranks) for ranks in (1, 64))
    assert alone.total == 26 * GB and many.total == pytest.approx(26 * GB / 64, rel=1e-6)
    assert model_states(10**9, 0, 64).total == pytest.approx((20 + 4 / 64) * GB)
    assert model_states(10**9, 2, 8, offload_optimiser=True).total == pytest.approx((2 + 2 / 8) * GB), "the host makes the copies"


def test_the_table_of_the_documentation_is_ours():
    documented = (Path(__file__).resolve().parents[3] / "docs" / "training.md").read_text()
    assert table() in documented and "| 1 B | 2 | 5.00 | 3.50 | 2.75 | 2.38 |" in table()
    assert SIZES["0.16 B (`small_16k`)"] == sum(p.numel() for p in on_meta(MMDiT, PRESETS["small_16k"]).parameters())


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(config)


@pytest.mark.slow
def test_engines_take_what_is_estimated_leave_nothing_and_other_ranks_gather_nothing(tmp_path):
    first = run_on_two_ranks(__file__, "memory_steps.py", tmp_path, "found-0.json")
    other = json.loads((tmp_path / "found-1.json").read_text())
    for found in (first, other):
        assert len(found["left"]) == 14
        assert all(running > 5e5 and after < 1000 for running, after in found["left"].values()), found["left"]
    assert list(first["gathered"].values()) == [[4 * 16 * (64 * 64 + 64)] * 2] * 4
    assert len(first["peaks"]) == 8
    for case, (estimated, measured) in first["peaks"].items():
        assert measured == pytest.approx(estimated, rel=0.01), case
    assert list(other["gathered"].values()) == [[0, 0]] * 4
