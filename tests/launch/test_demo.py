"""The demo in small: the chain from nothing to a report."""

import json

import pytest

from launch.demo import SMOKE_CLIPS, SMOKE_HELDOUT, run_demo

FIGURES = {"retrieval R@1", "right segment of a clip", "true sound over itself 0.3 s out of time", "autoencoder L1, relative",
           "flow loss, right video", "flow loss, shuffled minus right video", "reward, own minus shuffled video",
           "onset F1, own minus shuffled clip"}
"""What every evaluation holds, whichever preference round is kept."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_smoke_demo_goes_all_the_way_and_leaves_the_real_one_alone(tmp_path):
    said: list[str] = []
    assert run_demo(tmp_path, (), said.append, smoke=True) == []  # no bars
    assert said[0].startswith("smoke:") and f"drawing {SMOKE_CLIPS + SMOKE_HELDOUT} clips of sounding events" in said
    assert [path.name for path in tmp_path.iterdir()] == ["smoke"]
    run = tmp_path / "smoke" / "run"
    found = json.loads((run / "evaluation.json").read_text())
    assert found["bars"] == [] and {figure["name"] for figure in found["figures"]} >= FIGURES
    assert len(list((run / "examples").glob("*.mp4"))) == 4
    assert (run / "report.html").stat().st_size > 10_000
    for stage in ("autoencoder", "contrastive", "generative", "preference/round-1"):
        assert (run / stage / "export" / "complete.json").exists()
    before = (run / "generative" / "export" / "weights.safetensors").stat().st_mtime_ns
    run_demo(tmp_path, (), said.append, smoke=True)  # again: nothing is trained twice
    assert (run / "generative" / "export" / "weights.safetensors").stat().st_mtime_ns == before
