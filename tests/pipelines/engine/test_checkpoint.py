"""Checkpoints: complete or not there, whatever happens while they are written and afterwards."""

import json
import logging
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from pipelines.config.ema import EMAConfig
from pipelines.engine.checkpoint import MARKER, CheckpointError, Checkpoints, newest, surplus, write_atomically
from pipelines.engine.ema import ShardedEMA
from pipelines.engine.log import keep_lines_until
from pipelines.engine.saving import missing_room, write_tensors
from pipelines.engine.world import World
from tests.services.s3_server import s3_server

WORLD = World(0, 1, torch.device("cpu"))
BOTH = EMAConfig(kind="power", sigma_rels=(0.05, 0.1))


class Engine:
    """What the engine is to a checkpoint, without sharding and without DeepSpeed: plain torch on one process."""

    global_rank, world_size, device = 0, 1, WORLD.device

    def __init__(self, width=4, seed=0):
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1).requires_grad_(False))
        self.basic_optimizer = self.optimizer = torch.optim.AdamW([p for p in self.module.parameters() if p.requires_grad], lr=0.1)
        self.ema = ShardedEMA(self, BOTH)

    def zero_optimization_stage(self):
        return 0

    def train_batch_size(self):
        return 8

    def gradient_accumulation_steps(self):
        return 1

    def train(self, first, last):
        """Steps from `first` up to `last`, each on its own batch."""
        for step in range(first, last):
            self.optimizer.zero_grad()
            self.module(torch.randn(8, 3, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            self.optimizer.step()
            self.ema.update(step + 1)

    def everything(self):
        """All that must come back, flat."""
        moments = [state[kind] for state in self.optimizer.state.values() for kind in sorted(state)]
        averages = [value for average in self.ema.averages.values() for value in average]
        return torch.cat([value.detach().double().flatten() for value in (*self.module.state_dict().values(), *moments, *averages)])


@dataclass
class Options:
    """As in a recipe."""

    keep_checkpoints: int = 2
    keep_every: int = 0
    asynchronous_checkpoints: bool = False
    checkpoint_mirror: str = ""


def trained(folder, steps, **options):
    """An engine after the last of `steps`, saved at each of them, and its checkpoints."""
    engine, checkpoints, done = Engine(), Checkpoints(folder, WORLD, Options(**options)), 0
    for step in steps:
        engine.train(done, step)
        checkpoints.save(step, engine, engine.ema, {"stream": {"position": 8 * step}})
        done = step
    checkpoints.wait()
    return engine, checkpoints


def resumed(folder, **options):
    """Another engine, with what the checkpoints in the folder give."""
    engine = Engine(seed=1)
    return engine, Checkpoints(folder, WORLD, Options(**options)).restore(engine, engine.ema)


def names(folder):
    """What lies in a folder."""
    return sorted(os.listdir(folder))


@contextmanager
def small_files(size):
    """Let the system refuse to make files larger than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_all_comes_back_and_training_goes_on_as_if_nothing_was(tmp_path, asynchronous):
    first, _ = trained(tmp_path, (3,), asynchronous_checkpoints=asynchronous)
    second, client = resumed(tmp_path)
    assert client == {"step": 3, "stream": {"position": 24}}
    assert torch.equal(first.everything(), second.everything())
    first.train(3, 6), second.train(3, 6)
    assert torch.equal(first.everything(), second.everything())


def test_both_ways_write_the_same_files(tmp_path):
    for way in (False, True):
        trained(tmp_path / str(way), (2,), asynchronous_checkpoints=way)
    one, other = (tmp_path / way / "step-00000002" for way in ("False", "True"))
    assert names(one) == names(other) == [MARKER, "module.safetensors", "rank-00000-of-00001.safetensors"]
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names(one))


def test_a_save_in_the_background_holds_the_moment_it_was_asked_for(tmp_path):
    engine, checkpoints = Engine(), Checkpoints(tmp_path, WORLD, Options(asynchronous_checkpoints=True))
    engine.train(0, 2)
    then = engine.everything()
    checkpoints.save(2, engine, engine.ema, {})
    engine.train(2, 5)
    checkpoints.wait()
    assert torch.equal(resumed(tmp_path)[0].everything(), then)


def test_frozen_weights_and_buffers_are_there_under_their_names(tmp_path):
    engine, _ = trained(tmp_path, (1,))
    saved = load_file(tmp_path / "step-00000001" / "module.safetensors")
    assert saved.keys() == {"1.running_mean", "1.running_var", "1.num_batches_tracked", "2.weight", "2.bias"}
    assert torch.equal(saved["2.weight"], engine.module[2].weight)


@pytest.mark.parametrize("harm", ["a byte", "an end", "a file", "the list", "half the marker"])
def test_a_checkpoint_that_is_not_as_written_is_set_aside_for_the_one_before(tmp_path, harm, caplog):
    trained(tmp_path, (2, 4))
    path = tmp_path / "step-00000004" / "rank-00000-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    if harm == "a byte":
        data[-5] ^= 1
        path.write_bytes(data)
    elif harm == "an end":
        path.write_bytes(data[:-1])
    elif harm == "a file":
        path.unlink()
    else:
        path.with_name(MARKER).write_text('{"step": 4, "processes": 1}' if harm == "the list" else '{"step": 4, "fil')
    with caplog.at_level(logging.WARNING):
        engine, client = resumed(tmp_path)
    assert client["step"] == 2 and names(tmp_path) == ["broken-step-00000004", "step-00000002"]
    (line,) = caplog.messages
    assert "step-00000004" in line and "the checkpoint before it is used" in line
    wanted = Engine()
    wanted.train(0, 2)
    assert torch.equal(engine.everything(), wanted.everything())


def test_what_killed_runs_left_is_neither_used_nor_kept(tmp_path):
    trained(tmp_path, (2,))
    shutil.copytree(tmp_path / "step-00000002", tmp_path / ".unfinished-step-00000004-ab")
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "step-00000006")
    (tmp_path / "step-00000006" / MARKER).unlink()
    assert resumed(tmp_path)[1]["step"] == 2
    assert names(tmp_path) == ["step-00000002"]


def test_nothing_there_is_a_new_run(tmp_path):
    assert resumed(tmp_path / "new")[1] is None


@given(st.sets(st.integers(0, 200)), st.integers(0, 5), st.integers(0, 7))
def test_surplus_is_neither_among_the_newest_nor_a_keeper(steps, keep, every):
    gone = set(surplus(list(steps), keep, every))
    left = steps - gone
    assert gone <= steps and set(sorted(steps)[-keep:] if keep else steps) <= left
    assert not every or all(step % every for step in gone)
    assert not keep or len(left) <= keep + (sum(step % every == 0 for step in steps) if every else 0)


@given(st.sets(st.integers(0, 200)), st.integers(1, 5), st.integers(0, 200))
def test_surplus_leaves_one_to_go_back_to(steps, keep, needed):
    target = {max((step for step in steps if step <= needed), default=-1)}
    assert set(surplus(list(steps), keep, 0, needed)) == set(surplus(list(steps), keep, 0)) - target


def test_a_checkpoint_that_may_be_needed_stays_here_and_in_the_mirror(tmp_path):
    engine, checkpoints = Engine(), Checkpoints(tmp_path / "run", WORLD, Options(1, checkpoint_mirror=f"file://{tmp_path}/mirror"))
    for step, needed in ((2, None), (4, None), (6, 5), (8, 5), (10, None)):
        checkpoints.save(step, engine, engine.ema, {}, needed=needed)
        checkpoints.wait()
        kept = [f"step-{4 if needed else step:08d}", f"step-{step:08d}"][-2 if needed else -1:]
        assert names(tmp_path / "run") == kept
        assert [name for name in names(tmp_path / "mirror") if name.endswith(".json")] == [f"{name}.json" for name in kept]


def test_the_newest_and_the_keepers_stay(tmp_path):
    trained(tmp_path, (1, 2, 3, 4, 5, 6, 7), keep_checkpoints=2, keep_every=3, asynchronous_checkpoints=True)
    assert names(tmp_path) == ["step-00000003", "step-00000006", "step-00000007"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_write_that_fails_leaves_the_checkpoints_before_it(tmp_path, asynchronous):
    engine, checkpoints = trained(tmp_path, (2,), asynchronous_checkpoints=asynchronous)
    wanted = "step 4 is not saved, older checkpoints are as they were: .*File too large: .*rank-00000"
    with small_files(1000), pytest.raises(CheckpointError, match=wanted):
        checkpoints.save(4, engine, engine.ema, {})
        checkpoints.wait()
    assert names(tmp_path) == ["step-00000002"] and resumed(tmp_path)[1]["step"] == 2
    checkpoints.save(4, engine, engine.ema, {})
    checkpoints.wait()
    assert newest(tmp_path).name == "step-00000004"


def test_a_disk_too_small_is_known_before_the_first_byte(tmp_path):
    assert missing_room(tmp_path, 1) == ""
    assert "a checkpoint needs 1e+09 GB and" in missing_room(tmp_path, 10**18)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_is_one_clear_line(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], check=True)
    try:
        engine, checkpoints = trained(tmp_path / "run", (2,))
        filler = tmp_path / "filler"
        filler.write_bytes(b"x" * (shutil.disk_usage(tmp_path).free - (1 << 19)))
        wanted = r"step 4 is not saved, older checkpoints are as they were: .*needs .* GB and .* GB are free\. Make room"
        with pytest.raises(CheckpointError, match=wanted):
            checkpoints.save(4, engine, engine.ema, {})
        with pytest.raises(OSError, match="No space left on device: .*/run/a"):
            write_tensors(tmp_path / "run" / "a", {"a": torch.zeros(1 << 20)}, {})
        assert names(tmp_path / "run") == ["step-00000002"]
        filler.unlink()
        checkpoints.save(4, engine, engine.ema, {})
        assert resumed(tmp_path / "run")[1]["step"] == 4
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_another_model_is_named(tmp_path):
    trained(tmp_path, (2,))
    other = Engine(width=5)
    with pytest.raises(CheckpointError, match=r"step-00000002 does not fit this recipe: 0.bias was \[4\], now \[5\]; restore the recipe"):
        Checkpoints(tmp_path, WORLD, Options()).restore(other, other.ema)


def test_an_average_that_was_not_kept_is_named(tmp_path):
    trained(tmp_path, (2,))
    other = Engine()
    ema = ShardedEMA(other, EMAConfig(half_lives=(10.0,)))
    with pytest.raises(CheckpointError, match="ema-10.0 of 0 of the 12 values wanted here were saved"):
        Checkpoints(tmp_path, WORLD, Options()).restore(other, ema)


def test_a_run_is_taken_back_for_good(tmp_path):
    url = f"file://{tmp_path}/mirror"
    engine, checkpoints = trained(tmp_path / "run", (2, 4, 6), keep_checkpoints=3, checkpoint_mirror=url)
    assert checkpoints.rollback_target() == 6 and checkpoints.rollback_target(before=6) == 4
    assert checkpoints.restore(engine, engine.ema, before=5)["step"] == 4
    wanted = Engine()
    wanted.train(0, 4)
    assert torch.equal(engine.everything(), wanted.everything())
    assert names(tmp_path / "run") == ["step-00000002", "step-00000004"]
    assert [name for name in names(tmp_path / "mirror") if name.endswith(".json")] == ["step-00000002.json", "step-00000004.json"]


def test_the_mirror_holds_the_same_and_gives_it_back(tmp_path):
    url = f"file://{tmp_path}/mirror"
    engine, _ = trained(tmp_path / "run", (2, 4, 6), keep_checkpoints=1, keep_every=4, checkpoint_mirror=url)
    assert {name for name in names(tmp_path / "mirror") if name.endswith(".json")} >= {"step-00000006.json"}
    for name in names(tmp_path / "run" / "step-00000006"):
        there = tmp_path / "mirror" / ("step-00000006.json" if name == MARKER else f"step-00000006/{name}")
        assert there.read_bytes() == (tmp_path / "run" / "step-00000006" / name).read_bytes()
    shutil.rmtree(tmp_path / "run")
    other, client = resumed(tmp_path / "run", checkpoint_mirror=url)
    assert client["step"] == 6 and torch.equal(engine.everything(), other.everything())


def test_a_copy_that_came_to_harm_is_passed_over(tmp_path):
    url = f"file://{tmp_path}/mirror"
    for step in (2, 4):
        trained(tmp_path / "run", (step,), checkpoint_mirror=url)
    path = tmp_path / "mirror" / "step-00000004" / "module.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    shutil.rmtree(tmp_path / "run")
    assert resumed(tmp_path / "run", checkpoint_mirror=url)[1]["step"] == 2


def test_a_mirror_out_of_reach_ends_no_training_but_is_told(tmp_path, caplog):
    (tmp_path / "mirror").mkdir()
    engine, checkpoints = trained(tmp_path / "run", (), checkpoint_mirror=f"file://{tmp_path}/mirror")
    (tmp_path / "mirror").rmdir()
    (tmp_path / "mirror").write_text("in the way")
    for step in (2, 4):
        engine.train(step - 2, step)
        checkpoints.save(step, engine, engine.ema, {})
    checkpoints.wait()
    assert "step-00000004 is not copied to file://" in caplog.messages[-1] and resumed(tmp_path / "run")[1]["step"] == 4


def test_a_marker_can_be_read_by_others(tmp_path):
    trained(tmp_path, (2,))
    marker = json.loads((tmp_path / "step-00000002" / MARKER).read_text())
    assert (marker["step"], marker["processes"], marker["zero_stage"], marker["client"]) == (2, 1, 0, {"stream": {"position": 16}})
    assert {name: about["bytes"] for name, about in marker["files"].items()} == {
        name: (tmp_path / "step-00000002" / name).stat().st_size for name in names(tmp_path / "step-00000002") if name != MARKER}


def test_a_file_is_there_whole(tmp_path):
    write_atomically(tmp_path / "a.json", "old")
    write_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_lines_after_the_checkpoint_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join(lines) + "\n" + '{"step": 5, "lo')
    keep_lines_until(path, 3)
    assert path.read_text().splitlines() == lines[:3]
    keep_lines_until(tmp_path / "none.jsonl", 3)


@pytest.mark.slow
def test_a_mirror_on_s3(tmp_path, monkeypatch):
    with s3_server(tmp_path / "server") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        options = {"checkpoint_mirror": "s3://data/run/checkpoints", "asynchronous_checkpoints": True}
        engine, _ = trained(tmp_path / "run", (2, 4, 6), **options)
        filesystem, root = server.filesystem(), "data/run/checkpoints"
        assert f"{root}/step-00000006.json" in filesystem.ls(root)
        shutil.rmtree(tmp_path / "run")
        other, client = resumed(tmp_path / "run", **options)
        assert client["step"] == 6 and torch.equal(engine.everything(), other.everything())
        # A copy without its marker is none.
        shutil.rmtree(tmp_path / "run")
        filesystem.rm_file(f"{root}/step-00000006.json")
        found = resumed(tmp_path / "run", **options)[1]
        assert found is None or found["step"] in (2, 4)
