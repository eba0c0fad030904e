"""The chain: complete, skipped when complete, resumed when killed, refused when it would mix things."""

import json
import os
import shutil
import signal
import sys
import time

import pytest
from safetensors.torch import load_file

from pipelines.folders import check_parents
from pipelines.recipes import RecipeError, load_recipe
from pipelines.run import changed_keys
from tests.fixtures.tiny_chain import STEPS, command, finish, losses, overrides, start, tiny_shards

FOLDERS = ("autoencoder", "contrastive", "generative", "preference/round-1")


def test_every_stage_leaves_its_export(tiny):
    for name in FOLDERS:
        complete = json.loads((tiny.run / name / "export" / "complete.json").read_text())
        assert complete["steps"] == STEPS
        assert (tiny.run / name / "export" / "weights.safetensors").stat().st_size > 10_000
        check_parents(tiny.run / name)


def test_every_step_is_logged_once(tiny):
    for name in FOLDERS:
        steps = [line["step"] for line in losses(tiny.run)[name] if "loss" in line]
        assert steps == list(range(1, STEPS + 1))


def test_a_complete_chain_is_skipped(tiny):
    before = losses(tiny.run)
    output = finish(start(command(tiny.folder, tiny.shards)))
    assert output.count("complete, skipped") == 4
    assert losses(tiny.run) == before


def test_another_recipe_under_the_same_name_is_refused(tiny):
    process = start(command(tiny.folder, tiny.shards, "clip.size=48"))
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert output.strip().endswith("was started with other values of clip.size: restore them, or give name=another")


def test_run_and_shards_may_be_moved(tiny, tmp_path):
    shutil.copytree(tiny.run, tmp_path / "run")
    shutil.copytree(tiny.shards, tmp_path / "shards")
    finish(start(command(tmp_path, str(tmp_path / "shards"))))
    assert losses(tmp_path / "run") == losses(tiny.run)


def test_other_shards_in_another_place_are_refused(tiny, tmp_path):
    process = start(command(tiny.folder, tiny_shards(tmp_path, clips=16)))
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert output.strip().endswith("was started with other values of data: restore them, or give name=another")


def test_published_weights_need_a_published_size(tiny, tmp_path):
    process = start(command(tmp_path, tiny.shards, "autoencoder.weights=vae.pth"))
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert output.strip().endswith("published weights fit the presets 16k and 44k only; set autoencoder.model to one")


def test_changed_keys_are_those_that_matter(tiny):
    recipe = load_recipe("demo", overrides(tiny.folder, tiny.shards))
    free = ["threads=2", "evaluation.clips=4", "generative.train.log_every=9", "generative.train.zero.stage=3",
            "generative.train.profile=5", "contrastive.train.asynchronous_checkpoints=true",
            "preference.rounds=5", "preference.watch={clips: 16, keep: onset_f1}", "preference.batch_videos=4"]
    other = load_recipe("demo", [*overrides(tiny.folder, tiny.shards), "seed=7", *free])
    assert changed_keys(recipe, other) == ["seed"]


def test_a_stage_knows_its_parents(tiny, tmp_path):
    for stage in ("autoencoder", "contrastive", "generative"):
        shutil.copytree(tiny.run / stage / "export", tmp_path / stage / "export")
    check_parents(tmp_path / "generative")  # a run can be moved as a whole
    with open(tmp_path / "autoencoder" / "export" / "weights.safetensors", "ab") as file:
        file.write(b"!")
    with pytest.raises(RecipeError, match="was trained on another .*autoencoder/export: delete .*generative to train it again"):
        check_parents(tmp_path / "generative")


@pytest.mark.slow
def test_two_processes_train_as_one(tiny, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "launch.cli"]
    finish(start([sys.executable, *launcher, "train", "autoencoder", "demo", *overrides(tmp_path, tiny.shards)]))
    one, two = (losses(folder / "run")["autoencoder"] for folder in (tiny.folder, tmp_path))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for name in ("loss", "reconstruction", "kl", "gradient_norm"):
        values = [[line[name] for line in lines if name in line] for lines in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", FOLDERS)
def test_a_killed_run_resumes_with_the_same_losses(tiny, tmp_path, stage):
    process = start(command(tmp_path, tiny.shards))
    _wait_for_lines(tmp_path / "run" / stage / "metrics.jsonl", 3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(losses(tmp_path / "run")[stage]) < STEPS + 1, "the kill came too late to show anything"
    finish(start(command(tmp_path, tiny.shards)))
    assert losses(tmp_path / "run") == losses(tiny.run)


@pytest.mark.slow
def test_a_chain_that_is_asked_to_stop_goes_on(tiny, tmp_path):
    process = start(command(tmp_path, tiny.shards))
    _wait_for_lines(tmp_path / "run" / "contrastive" / "metrics.jsonl", 2, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 75, output
    assert "asked to stop: contrastive " in output and "run the same command again to go on" in output
    finish(start(command(tmp_path, tiny.shards)))
    assert losses(tmp_path / "run") == losses(tiny.run)


@pytest.mark.slow
def test_stage_3_trains_validates_and_exports_as_stage_1(tiny, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "launch.cli"]
    for zero in (1, 3):
        out = tmp_path / str(zero)
        for stage in ("autoencoder", "contrastive"):
            shutil.copytree(tiny.run / stage, out / "run" / stage)
        options = [f"{stage}.train.zero.{key}" for stage in ("generative", "preference")
                   for key in (f"stage={zero}", "persistence_threshold=0")]
        finish(start([sys.executable, *launcher, "run", "demo", *overrides(out, tiny.shards), *options]))
    one, three = (losses(tmp_path / zero / "run") for zero in ("1", "3"))
    for stage in FOLDERS[2:]:
        assert [list(line) for line in one[stage]] == [list(line) for line in three[stage]]
        for name in ("loss", "gradient_norm", "validation/flow_loss"):
            values = [[line[name] for line in lines[stage] if name in line] for lines in (one, three)]
            assert values[0] == pytest.approx(values[1], rel=1e-3), (stage, name)  # what a round generates is kept in half precision
        sharded, whole = (load_file(tmp_path / zero / "run" / stage / "export" / "weights.safetensors") for zero in ("1", "3"))
        assert max(float((sharded[name] - whole[name]).abs().max()) for name in whole) < 1e-4


def _wait_for_lines(path, count: int, process) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not grow")
