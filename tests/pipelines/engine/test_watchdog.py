"""Hangs are named with rank, step and stack, and rank 0 tells what failed on the others."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch

from pipelines.engine import watchdog
from pipelines.engine.watchdog import HUNG, Watchdog, beat
from pipelines.engine.world import World
from tests.pipelines.engine.toy import finish_ranks, start_ranks

CPU = torch.device("cpu")
TRAIN = {"steps": 6, "batch_size": 8, "log_every": 1, "optimiser": {"lr": 0.01}}


@pytest.mark.slow
def test_a_hang_is_named(tmp_path):
    processes = start_ranks(2, tmp_path, {"toy": TRAIN | {"hang_seconds": 15, "trouble": {"hang": [1, 2]}}})
    codes, outputs = finish_ranks(processes)
    assert set(codes) <= {HUNG, 1} and codes[1] == HUNG, outputs
    stacks = (tmp_path / "toy" / "hang-rank-1.txt").read_text()
    assert stacks.startswith("rank 1 of 2: toy, step 3, inputs has taken more than 15 s")
    assert "_cause_trouble" in stacks and 'File "' in stacks
    assert "rank 1 of 2: toy, step 3, inputs has taken more than 15 s" in outputs[1]


def test_a_hang_ends_the_process_also_where_the_disk_is_full(tmp_path):
    (tmp_path / "hang-rank-0.txt").symlink_to("/dev/full")
    script = f"""
import time, torch
from pathlib import Path
from pipelines.engine.watchdog import Watchdog
from pipelines.engine.world import World
with Watchdog(Path({str(tmp_path)!r}), World(0, 1, torch.device("cpu")), limit=0.1).watching():
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.returncode == HUNG
    assert 'File "<string>", line 7' in done.stderr and "No space left on device" in done.stderr


@pytest.mark.slow
def test_a_hang_before_the_first_step_is_named(tmp_path):
    cases = {"building": TRAIN | {"hang_seconds": 15, "trouble": {"hang_in_build": 1}}}
    codes, outputs = finish_ranks(start_ranks(2, tmp_path, cases))
    assert HUNG in codes and set(codes) <= {HUNG, 1}, outputs
    # The other waits for it, and may be the first to say so; the stacks of both are kept.
    stacks = (tmp_path / "building" / "hang-rank-1.txt").read_text()
    assert stacks.startswith("rank 1 of 2: toy, building the model") and "in build" in stacks


@pytest.mark.slow
def test_a_hang_while_a_checkpoint_is_taken_up_is_named(tmp_path):
    train = TRAIN | {"checkpoint_every": 3}
    assert finish_ranks(start_ranks(2, tmp_path, {"toy": train}))[0] == [0, 0]
    marker = tmp_path / "toy" / "checkpoints" / "step-00000006" / "complete.json"
    marker.unlink()
    os.mkfifo(marker)  # whoever reads it waits for ever, as on a file system that is away
    codes, outputs = finish_ranks(start_ranks(2, tmp_path, {"toy": train | {"steps": 9, "hang_seconds": 30}}))
    assert HUNG in codes and set(codes) <= {HUNG, 1}, outputs
    stacks = "".join(path.read_text() for path in (tmp_path / "toy").glob("hang-rank-*.txt"))
    assert "toy, taking up a checkpoint has taken more than 30 s" in stacks and "in restore" in stacks


@pytest.mark.slow
def test_rank_0_tells_what_failed_elsewhere(tmp_path):
    begin = time.monotonic()
    codes, outputs = finish_ranks(start_ranks(2, tmp_path, {"toy": TRAIN | {"trouble": {"fail": [1, 2]}}}))
    assert codes[0] != 0 and codes[1] == 1
    assert "foleyscale: rank 1 of 2: toy, step 3, inputs: ValueError: clip-7 is not to my taste" in outputs[0]
    text = (tmp_path / "toy" / "errors" / "rank-1.txt").read_text()
    assert "Traceback (most recent call last)" in text and "_cause_trouble" in text
    assert re.search(r"\nstart: [0-9a-f]{16}\n$", text), "drawn by rank 0, which knows it again"
    assert time.monotonic() - begin < 90, "nobody waits for a collective's half hour"


def failed(folder, rank, start, message):
    """A process that ended with an error."""
    with pytest.raises(ValueError), Watchdog(folder, World(rank, 2, CPU, start), limit=0).watching() as dog:
        dog.beat("features")
        raise ValueError(message)


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(watchdog, "_LOOK", 0.01)


def test_an_error_from_before_the_watch_began_is_told_where_it_is_of_this_start(tmp_path, capsys, at_once):
    failed(tmp_path, 1, "first", "an old one")
    failed(tmp_path, 0, "second", "alone")
    assert capsys.readouterr().err == "", "what another start has left is nobody's concern"
    failed(tmp_path, 1, "second", "a new one")
    failed(tmp_path, 0, "second", "the consequence")
    assert capsys.readouterr().err == f"foleyscale: rank 1 of 2: features: ValueError: a new one ({tmp_path}/errors/rank-1.txt)\n"


def test_the_innermost_watches_and_shows(tmp_path, at_once, monkeypatch):
    shown, hung = [], []
    monkeypatch.setattr(Watchdog, "_hang", lambda self: hung.append(self._where))
    outer = Watchdog(tmp_path, World(0, 1, CPU), limit=0.05, show=shown.append)
    with outer.watching():
        beat("features, shard 1 of 2")
        wait_until(lambda: shown)
        with Watchdog(tmp_path / "stage", World(0, 1, CPU), limit=0).watching():
            time.sleep(0.2)
            assert not hung and shown == ["features, shard 1 of 2", ""]
        wait_until(lambda: hung)
        beat("candidates")
    beat("nobody listens")
    assert hung[0] == "rank 0 of 1: features, shard 1 of 2" and shown[2] == "features, shard 1 of 2"


def test_an_error_inside_is_noted_where_it_was_and_told_once(tmp_path, capsys, at_once):
    world = World(1, 2, CPU, "inside")
    with pytest.raises(ValueError), Watchdog(tmp_path, world, limit=0).watching():
        beat("preference")
        with Watchdog(tmp_path / "stage", world, limit=0).watching():
            beat("stage, step 3")
            raise ValueError("too much")
    notes = [(folder / "errors" / "rank-1.txt").read_text() for folder in (tmp_path, tmp_path / "stage")]
    assert notes[0] == notes[1] and notes[0].startswith("rank 1 of 2: stage, step 3: ValueError: too much\n")
    for folder in (tmp_path, tmp_path / "stage"):
        failed(folder, 0, "inside", "the consequence")
    assert capsys.readouterr().err.count("too much") == 1


def wait_until(happened):
    deadline = time.monotonic() + 20
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert happened()
