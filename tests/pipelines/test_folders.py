"""Work outside of a stage's training: watched, and shown while it goes on or where it ended badly."""

import json

import pytest
import torch

from pipelines.config import Recipe, TrainConfig
from pipelines.engine.log import STATUS
from pipelines.engine.signals import Stopped
from pipelines.engine.watchdog import Watchdog, beat
from pipelines.engine.world import World
from pipelines.folders import StageFolders

ALONE = World(0, 1, torch.device("cpu"))


def folders(path, world=ALONE):
    return StageFolders(Recipe(out=str(path), name="run"), world)


def status(path):
    return json.loads((path / "run" / "features" / STATUS).read_text())


def test_a_status_goes_when_the_work_is_done(tmp_path):
    with folders(tmp_path).watched("features", TrainConfig()):
        beat("features, shard 1 of 2")
        assert (status(tmp_path)["state"], status(tmp_path)["stage"]) == ("running", "features")
    assert [path.name for path in (tmp_path / "run" / "features").iterdir()] == ["errors"]


@pytest.mark.parametrize(("error", "state", "reason"), [
    (ValueError("no such clip"), "failed", "no such clip"),
    (KeyboardInterrupt(), "failed", "KeyboardInterrupt"),
    (Stopped("one shard is whole"), "stopped", "asked to stop: one shard is whole; run the same command again to go on (exit code 75)"),
])
def test_a_bad_end_is_shown(tmp_path, error, state, reason):
    with pytest.raises(type(error)), folders(tmp_path).watched("features", TrainConfig()):
        raise error
    assert (status(tmp_path)["state"], status(tmp_path)["reason"]) == (state, reason)
    noted = (tmp_path / "run" / "features" / "errors" / "rank-0.txt").exists()
    assert noted == isinstance(error, Exception), "being stopped is no error"


def test_a_stage_inside_speaks_for_itself(tmp_path):
    inside = Watchdog(tmp_path / "run" / "stage", ALONE, limit=0)
    with pytest.raises(ValueError), folders(tmp_path).watched("features", TrainConfig()), inside.watching():
        assert not (tmp_path / "run" / "features" / STATUS).exists()
        raise ValueError
    assert not (tmp_path / "run" / "features" / STATUS).exists()


def test_other_processes_show_nothing(tmp_path):
    with folders(tmp_path, World(1, 2, torch.device("cpu"))).watched("features", TrainConfig()):
        assert not (tmp_path / "run" / "features" / STATUS).exists()
