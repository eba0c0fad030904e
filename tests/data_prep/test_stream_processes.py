"""Ranks as real processes, with workers of their own, ended by signals and started again in other numbers."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import pytest

from data_prep.index import ShardSet
from data_prep.stream import ClipStream
from tests.fixtures.made_shards import DECODE, take, values, write

SPAWN = multiprocessing.get_context("fork")
COUNTS = (100, 100, 100, 60, 7)
"""Of these webdataset's split_by_node gives 25 and 20 batches of 8 to two ranks, and 13, 12, 12 and 7 to four."""


def run_rank(url, folder, rank, world, workers, steps, state):
    """Take `steps` batches; after each one, write what was seen and the state, as a checkpoint would."""
    stream = ClipStream(ShardSet.open(url), DECODE, batch_size=12, rank=rank, world_size=world, seed=3, window=2)
    if state is not None:
        stream.load_state_dict(state)
    for step, batch in zip(range(steps), stream.batches(workers), strict=False):
        record = {"values": values([batch]), "state": stream.state_dict({"seen": 0, "bad": 0})}
        temporary = folder / f".{rank}-{step}"
        temporary.write_text(json.dumps(record))
        temporary.rename(folder / f"{rank}-{step:03d}")


def run_world(url, folder, world, workers, steps, state, kill_at=None):
    """All ranks to the end, or killed once rank 0 has made step `kill_at`; their records by (rank, step)."""
    folder.mkdir()
    ranks = [SPAWN.Process(target=run_rank, args=(url, folder, rank, world, workers, steps, state)) for rank in range(world)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 60
    while kill_at is not None and not (folder / f"0-{kill_at:03d}").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    for process in ranks:
        if kill_at is not None:
            os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == (0 if kill_at is None else -signal.SIGKILL)
    return {tuple(map(int, path.name.split("-"))): json.loads(path.read_text()) for path in folder.glob("[0-9]*")}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write(tmp_path_factory.mktemp("processes") / "set", COUNTS)


def test_worlds_of_two_one_and_three_see_one_order(shards, tmp_path):
    seen, state = [], None
    for number, (world, workers, steps) in enumerate([(2, 2, 12), (1, 0, 7), (3, 1, 30), (4, 2, 13)]):
        records = run_world(shards.url, tmp_path / str(number), world, workers, steps, state)
        assert set(records) == {(rank, step) for rank in range(world) for step in range(steps)}  # equal steps on all ranks
        for step in range(steps):
            states = [records[rank, step]["state"] for rank in range(world)]
            assert all(other == states[0] for other in states)
            seen += [value for rank in range(world) for value in records[rank, step]["values"]]
        state = states[0]
    whole = values(take(ClipStream(shards, DECODE, batch_size=12, seed=3, window=2), 62))
    assert seen == whole and sorted(seen[:367]) == sorted(seen[367:734]) == list(range(367))


def test_a_run_killed_between_checkpoints_goes_on_from_the_last(shards, tmp_path):
    whole = values(take(ClipStream(shards, DECODE, batch_size=12, seed=3, window=2), 40))
    killed = run_world(shards.url, tmp_path / "killed", 2, 2, 10**6, None, kill_at=9)
    for step in (4, 9):  # any state that was written will do
        state = killed[0, step]["state"]
        assert state["position"] == 12 * (step + 1)
        records = run_world(shards.url, tmp_path / f"from-{step}", 3, 1, 10, state)
        found = [value for later in range(10) for rank in range(3) for value in records[rank, later]["values"]]
        assert found == whole[12 * (step + 1) : 12 * (step + 11)]
