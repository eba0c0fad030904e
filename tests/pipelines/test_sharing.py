"""Shards that processes make together: each once, those that are there stay, and the index comes last."""

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
import time

import pytest
import torch

from data_prep.index import ShardSet
from data_prep.sidecar import read_sidecar
from data_prep.storage import Folder
from pipelines.engine.log import STATUS
from pipelines.engine.watchdog import HUNG, Watchdog
from pipelines.engine.world import World
from pipelines.sharing import Work, make_shards
from tests.fixtures.made_shards import COUNTS as COUNTS_MADE
from tests.fixtures.made_shards import DECODE, damage, write
from tests.fixtures.two_ranks import REPOSITORY
from tests.fixtures.unruly import Unruly
from tests.pipelines.engine.toy import finish_ranks
from tests.services.ports import free_ports

ALONE = World(0, 1, torch.device("cpu"))
COUNTS = (2, 0, 3)


def copying(made=None, **options):
    """Work that writes shards with the keys of others, noting their numbers."""
    def write_shard(writer, batches):
        for batch in batches:
            for key in batch["key"]:
                writer.add(key, {"made.npy": b"x"})
        if made is not None:
            made.append(int(writer.name.removeprefix("shard-")))
    return Work(DECODE, 4, write_shard, **options)


def share(source, folder, made, world=ALONE):
    return make_shards(source, folder, world, "copies", {"what": "copies"}, lambda: copying(made))


def test_every_shard_is_made_once(tmp_path):
    source, made = write(tmp_path / "in", COUNTS), []
    found = share(source, tmp_path / "out", made)
    assert made == [0, 1, 2] and found.counts.tolist() == [2, 0, 3] and found.settings == {"what": "copies"}
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert share(source, tmp_path / "out", made).hash == found.hash and made == [0, 1, 2]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


def test_an_interrupted_shard_is_made_again_and_the_others_stay(tmp_path):
    source, made = write(tmp_path / "in", COUNTS), []
    found = share(source, tmp_path / "out", made)
    (tmp_path / "out" / "shard-000002.parquet").unlink()
    assert share(source, tmp_path / "out", made).hash == found.hash
    assert made == [0, 1, 2, 2]


def test_additions_that_are_interrupted_leave_no_index_of_less(tmp_path):
    source, out = write(tmp_path / "in", COUNTS), tmp_path / "out"
    found = share(source, out, [])
    (out / "shard-000002.parquet").unlink()

    def failing(writer, batches):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shards(source, out, ALONE, "copies", {}, lambda: Work(DECODE, 4, failing))
    assert not (out / "dataset.json").exists()
    assert share(source, out, []).hash == found.hash


def test_nothing_is_loaded_where_nothing_is_to_be_made(tmp_path):
    source = write(tmp_path / "in", COUNTS)
    share(source, tmp_path / "out", [])
    make_shards(source, tmp_path / "out", ALONE, "copies", {}, lambda: pytest.fail("loaded"))


def test_a_set_with_fewer_shards_than_processes_is_told(tmp_path, caplog):
    source = write(tmp_path / "in", COUNTS)
    share(source, tmp_path / "out", [])
    (tmp_path / "out" / "shard-000000.parquet").unlink()
    # No group of five is there to talk to: the warning comes before the first collective.
    with caplog.at_level(logging.WARNING), contextlib.suppress(ValueError):
        share(source, tmp_path / "out", [], World(0, 5, torch.device("cpu")))
    assert "copies: 3 shards for 5 processes, some of them wait; clip shards with fewer rows share better" in caplog.text


def test_a_shard_that_storage_did_not_give_is_made_the_next_time(tmp_path):
    """A tar that is gone for a while, beside a clip that is damaged for good."""
    damage(write(tmp_path / "whole"), 0, 1, tmp_path / "in")
    out = tmp_path / "out"

    def share():
        return make_shards(ShardSet.open(tmp_path / "in"), out, ALONE, "copies", {}, copying)

    tar = tmp_path / "in" / "shard-000001.tar"
    tar.rename(tmp_path / "away")
    with pytest.raises(OSError, match="clip-9 cannot be read: .*: see to the storage and run again, shard-000001 is made then"):
        share()
    assert [path.name for path in sorted(out.glob("*.parquet"))] == ["shard-000000.parquet"]
    (tmp_path / "away").rename(tar)
    assert share().counts.tolist() == [8, *COUNTS_MADE[1:]]
    (failed,) = [row for row in read_sidecar(Folder(out), "shard-000000").to_pylist() if row["status"] != "ok"]
    assert (failed["key"], failed["status"], failed["reason"]) == ("clip-1", "failed", "bad_crc")


def test_a_clip_that_hangs_its_decoder_is_recorded_as_failed(tmp_path):
    source, hanging = write(tmp_path / "in", COUNTS), Unruly(("value",), hangs=("clip-2",))
    work = dataclasses.replace(copying(workers=2, clip_timeout=0.6), decode=hanging)
    assert make_shards(source, tmp_path / "out", ALONE, "copies", {}, lambda: work).counts.tolist() == [2, 0, 2]
    (failed,) = [row for row in read_sidecar(Folder(tmp_path / "out"), "shard-000002").to_pylist() if row["status"] != "ok"]
    assert (failed["key"], failed["status"], failed["reason"]) == ("clip-2", "failed", "timeout")


def test_every_shard_is_a_sign_of_life(tmp_path, monkeypatch):
    phases = []
    monkeypatch.setattr(Watchdog, "beat", lambda self, phase: phases.append(phase))
    with Watchdog(tmp_path, ALONE, limit=0).watching():
        share(write(tmp_path / "in", COUNTS), tmp_path / "out", [])
    shards = [f"copies, shard {number} of 3" for number in (1, 2, 3)]
    batches = 2
    assert phases.count("start") == batches, "a batch is one too, of the same phase: here the first, as nothing is noted down"
    assert [phase for phase in phases if phase != "start"] == ["copies, loading what makes them", *shards, "copies, index"]


def troubled(folder, trouble):
    """Exit codes and outputs of two real processes, the second of which fails or hangs."""
    common = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]),
              "LOCAL_RANK": "0", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", "tests.pipelines.sharing_share", str(folder), trouble]
    return finish_ranks([subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | common | {"RANK": str(rank)}, stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT, text=True) for rank in range(2)])


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["fail", "hang"])
def test_rank_0_tells_which_process_is_in_trouble(tmp_path, trouble):
    begin = time.monotonic()
    codes, outputs = troubled(tmp_path, trouble)
    assert time.monotonic() - begin < 90, "nobody waits for ever for a shard that will not come"
    assert codes == [1, 1 if trouble == "fail" else HUNG], outputs
    said = "ValueError: clip-9 is not to my taste" if trouble == "fail" else "has taken more than 15 s; every stack is in "
    assert "foleyscale: rank 1 of 2: features, shard 2 of " in outputs[0] and said in outputs[0]
    folder = tmp_path / "run" / "features"
    kept = (folder / "errors" / "rank-1.txt" if trouble == "fail" else folder / "hang-rank-1.txt").read_text()
    assert "in write_shard" in kept
    assert json.loads((folder / STATUS).read_text())["reason"].endswith("shards of other processes to come")
