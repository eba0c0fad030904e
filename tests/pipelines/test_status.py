"""Where a run stands, read from its folder."""

import json
import os
import shutil
import time

import pytest

from launch.status import status_lines
from pipelines.engine.log import STATUS, PhaseStatus, RunLog
from pipelines.status import run_status

KNOWN = {"step": 120, "steps": 1000, "loss": 0.52, "samples_per_second": 31.0, "seconds_left": 723.4, "reason": ""}


@pytest.fixture
def run(tmp_path):
    for name in ("autoencoder/export", "contrastive/checkpoints/step-00000100", "contrastive/checkpoints/step-00000120", "generative"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "autoencoder" / "export" / "complete.json").write_text("{}")
    (tmp_path / "contrastive" / "checkpoints" / "step-00000100" / "complete.json").write_text("{}")
    clips = [{"url": "shards", "shard": "shard-000001", "key": key, "position": position} for position, key in enumerate("abaa")]
    (tmp_path / "contrastive" / "quarantine.jsonl").write_text("".join(f"{json.dumps(clip)}\n" for clip in clips) + '{"url": "sha')
    (tmp_path / "contrastive" / STATUS).write_text(json.dumps(KNOWN | {"state": "running"}))
    return tmp_path


def test_each_stage_in_a_line(run):
    assert status_lines(run) == [
        "autoencoder  complete",
        "contrastive  running, step 120 of 1000, loss 0.52, 31 samples/s, 0:12:03 left, checkpoint of step 100, 2 clips quarantined",
        "generative   waiting"]


def test_silence_is_told_from_work(run):
    path = run / "contrastive" / STATUS
    os.utime(path, (time.time() - 61, time.time() - 61))
    assert run_status(run)[1].state == "gone"
    path.write_text(json.dumps(KNOWN | {"state": "stopped", "reason": "asked to stop"}))
    os.utime(path, (0, 0))
    assert run_status(run)[1].state == "stopped", "a run that said why it ended is not missed"
    assert status_lines(run)[1].endswith("step 120 of 1000, loss 0.52, checkpoint of step 100, 2 clips quarantined, asked to stop")


def test_rounds_in_their_order(run):
    for number in (1, 2, 10, "2-old", ""):
        (run / "preference" / f"round-{number}").mkdir(parents=True)
    assert [stage.name for stage in run_status(run)][3:] == ["preference/round-1", "preference/round-2", "preference/round-10"]


def test_work_between_the_stages_is_shown_while_it_goes_on(run):
    for name in ("features", "preference"):
        (run / name).mkdir()
    features, rounds = PhaseStatus(run / "features", "features"), PhaseStatus(run / "preference", "preference")
    features.show("features, shard 3 of 40")
    assert status_lines(run)[2:] == ["features     running, shard 3 of 40", "generative   waiting"]
    features.ended("stopped", "asked to stop")
    assert status_lines(run)[2] == "features     stopped, shard 3 of 40: asked to stop"
    features.show("")
    rounds.show("candidates of round 2, shard 1 of 9")
    os.utime(run / "preference" / STATUS, (time.time() - 61, time.time() - 61))
    assert status_lines(run)[2:] == ["generative   waiting", "preference   gone, candidates of round 2, shard 1 of 9"]
    rounds.show("")
    rounds.ended("failed", "in the training of a round, which says so itself")
    assert status_lines(run)[2:] == ["generative   waiting"]


def test_a_checkpoint_later_than_the_last_line_of_the_log_counts(run):
    (run / "contrastive" / "checkpoints" / "step-00000125").mkdir()
    (run / "contrastive" / "checkpoints" / "step-00000125" / "complete.json").write_text("{}")
    (run / "contrastive" / STATUS).write_text(json.dumps(KNOWN | {"state": "stopped"}))
    assert "stopped, step 125 of 1000, loss 0.52, checkpoint of step 125" in status_lines(run)[1]


def test_a_stage_that_nothing_reads_is_not_waited_for(run):
    public = "{clip: clip, clip_weights: clip.bin, sync: none}"
    (run / "recipe.yaml").write_text(f"conditioning: {public}\npreference: {{rounds: 0}}\n")
    assert run_status(run)[1].state == "running", "what is under way is told all the same"
    shutil.rmtree(run / "contrastive")
    assert status_lines(run)[1:] == ["contrastive  not part of this run", "generative   waiting"]


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no recipe.yaml, so no run was started there; give the folder of a run"):
        run_status(tmp_path)


def test_a_log_says_where_it_is(run):
    log = RunLog(run / "generative", "generative", 3, 10, active=True)
    log.advance(4, 0.5, 8.0)
    log.state("failed", "disk full")
    log.close()
    stage = run_status(run)[2]
    assert (stage.state, stage.step, stage.steps, stage.loss, stage.reason) == ("failed", 4, 10, 0.5, "disk full")
