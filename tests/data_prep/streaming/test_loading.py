from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep.decoding import TensorDecoder
from data_prep.index import ShardError
from data_prep.stream import ClipStream, one_pass, shard_passes
from tests.fixtures.made_shards import DECODE, damage, take, values, write
from tests.fixtures.unruly import Unruly

TIMEOUT = 0.6


@dataclass
class DiesReading(TensorDecoder):
    """Ends its process before it has a clip's bytes."""

    @property
    def members(self):
        os._exit(3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write(tmp_path_factory.mktemp("loading") / "set")


def stream(shards, decode=DECODE, **options):
    return ClipStream(shards, decode, **{"batch_size": 8, "clip_timeout": TIMEOUT, **options})


@pytest.mark.parametrize(("fault", "reason"), [("hangs", "timeout"), ("kills", "crashed")])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_clip_that_hangs_or_kills_its_decoder_is_set_aside_and_nothing_else_changes(shards, tmp_path, fault, reason, workers):
    log, quarantine = tmp_path / "log", tmp_path / "quarantine.jsonl"
    unruly = stream(shards, Unruly(("value",), log=log, **{fault: ("clip-18",)}), quarantine=quarantine)
    found = values(take(unruly, 12, workers=workers))
    # What a checksum error of the same clip leads to; the clip comes up in both epochs.
    assert found == values(take(stream(damage(shards, 3, 5, tmp_path / "copy"), max_bad_share=0.1), 12))
    assert (unruly.bad, unruly.seen, unruly.position) == (2, 98, 96)
    records = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(record["key"], record["shard"], record["reason"]) for record in records] == [("clip-18", "shard-000003", reason)] * 2
    message = {"timeout": "was still being decoded after 0.6 s", "crashed": "ended the process that decoded it, 2 times (SIGKILL"}[reason]
    assert f"shard-000003.tar: clip clip-18 {message}" in records[0]["message"]
    assert Counter(log.read_text().split())["clip-18"] == 2
    # Another start of the run, with other workers, knows the clip and has the same batches without trying it.
    again = stream(shards, Unruly(("value",), log=log, **{fault: ("clip-18",)}), quarantine=quarantine)
    assert values(take(again, 6)) == found[:48]
    assert Counter(log.read_text().split())["clip-18"] == 2


def test_a_worker_killed_from_outside_costs_no_clip(shards, tmp_path):
    sound = values(take(stream(shards), 12))
    unlucky = stream(shards, Unruly(("value",), kills=("clip-18",), once=tmp_path / "once"))
    assert values(take(unlucky, 12, workers=2)) == sound and (unlucky.bad, unlucky.seen) == (0, 96)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_paused_from_outside_costs_no_clip(shards, tmp_path, workers):
    sound, log = values(take(stream(shards), 12)), tmp_path / "log"
    paused = stream(shards, Unruly(("value",), kills=("clip-18",), fatal=signal.SIGSTOP, log=log, once=tmp_path / "once"),
                    quarantine=tmp_path / "quarantine.jsonl")  # fmt: skip
    assert values(take(paused, 12, workers=workers)) == sound and (paused.bad, paused.seen) == (0, 96)
    assert Counter(log.read_text().split())["clip-18"] >= 3  # twice in the first epoch, once in the second
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_a_pause_in_each_epoch_costs_no_clip_either(shards, tmp_path):
    """What was read since then takes the blame off it."""

    class Paused(TensorDecoder):
        def __call__(self, raw, entry, random):
            with open(tmp_path / "log", "a") as file:
                file.write(f"{entry.key}\n")
            if entry.key == "clip-18" and Counter((tmp_path / "log").read_text().split())["clip-18"] in (1, 3):
                os.kill(os.getpid(), signal.SIGSTOP)
            return super().__call__(raw, entry, random)

    sound, paused = values(take(stream(shards), 12)), stream(shards, Paused(("value",)))
    assert values(take(paused, 12, workers=1)) == sound and paused.bad == 0
    assert Counter((tmp_path / "log").read_text().split())["clip-18"] >= 4


def test_workers_live_through_the_signals_of_a_cluster_and_are_replaced_when_ended(shards):
    sound = values(take(stream(shards), 12))
    batches = stream(shards).batches(workers=2)
    found = values([next(batches)])
    before = multiprocessing.active_children()
    assert len(before) == 2
    for child in before:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(child.pid, number)
    found += values([next(batches) for _ in range(5)])
    assert multiprocessing.active_children() == before
    for child in before:
        os.kill(child.pid, signal.SIGTERM)
    found += values([next(batches) for _ in range(6)])
    assert found == sound and not set(before) & set(multiprocessing.active_children())
    batches.close()
    assert not multiprocessing.active_children()


def test_too_many_hanging_clips_stop_the_run(tmp_path):
    shards = write(tmp_path / "set", counts=(120,))
    unruly = Unruly(("value",), kills=tuple(f"clip-{i}" for i in range(8)))
    with pytest.raises(ShardError, match=r"\d of 1\d\d clips could not be read, more than max_bad_share 0.01 allows"):
        take(stream(shards, unruly, quarantine=tmp_path / "quarantine.jsonl"), 30, workers=2)


def test_a_pass_leaves_hanging_clips_out(shards):
    bad = []
    unruly = Unruly(("value",), hangs=("clip-18",), kills=("clip-30",))
    found = values(one_pass(shards, unruly, 5, workers=2, on_bad=bad.append, clip_timeout=TIMEOUT))
    assert found == [number for number in range(48) if number not in (18, 30)]
    assert [(clip.key, clip.reason) for clip in bad] == [("clip-18", "timeout"), ("clip-30", "crashed")]


def test_a_worker_that_has_made_all_its_steps_is_not_missed(shards):
    """Three steps, of which the second of two workers makes one."""
    batches = one_pass(shards, DECODE, 20, workers=2)
    found = values([next(batches), next(batches)])
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
        child.join()
    assert found + values(batches) == list(range(48)) and not multiprocessing.active_children()
    assert values(one_pass(shards, DECODE, 48, workers=2)) == list(range(48))


def test_passes_over_shards_leave_hanging_clips_out(shards):
    unruly = Unruly(("value",), hangs=("clip-3",), kills=("clip-30",))
    passes = [list(each) for each in shard_passes(shards, unruly, 5, workers=2, clip_timeout=TIMEOUT)]
    assert values(batch for each in passes for batch, _ in each) == [number for number in range(48) if number not in (3, 30)]
    bad = [(clip.key, clip.reason) for each in passes for _, bad in each for clip in bad]
    assert bad == [("clip-3", "timeout"), ("clip-30", "crashed")]


def test_deaths_that_no_clip_explains_stop_the_run(shards):
    with pytest.raises(RuntimeError, match=r"a worker process died 3 times reading .*/shard-00000\d.tar \(exit code 3\)"):
        take(stream(shards, DiesReading(("value",))), 1, workers=1)


def test_errors_keep_their_type_and_tell_where_they_come_from(shards):
    class Mistaken(TensorDecoder):
        def __call__(self, raw, entry, random):
            raise LocalError(entry.key, "cannot be pickled")

    class LocalError(Exception):
        pass

    class Odd(TensorDecoder):
        def __call__(self, raw, entry, random):
            return super().__call__(raw, entry, random) | {"odd": lambda: None}

    with pytest.raises(AttributeError, match="pickle local object"):
        take(stream(shards, Odd(("value",))), 1, workers=1)
    with pytest.raises(RuntimeError, match="LocalError: .*cannot be pickled"):
        take(stream(shards, Mistaken(("value",))), 1, workers=1)
    with pytest.raises(ShardError, match="16 clips in a row") as caught:
        take(stream(shards, TensorDecoder(("nothing",))), 1, workers=1)
    assert "In a worker process" in caught.value.__notes__[0] and "_sample" in caught.value.__notes__[0]


@pytest.mark.parametrize("hangs", [(), ("clip-12", "clip-20")], ids=["idle", "hanging"])
def test_workers_do_not_outlive_a_killed_run(shards, hangs):
    program = f"""
import multiprocessing, time
from data_prep.index import ShardSet
from tests.fixtures.unruly import Unruly
from data_prep.stream import one_pass
batches = one_pass(ShardSet.open({shards.url!r}), Unruly(("value",), hangs={hangs!r}), 8, workers=2, clip_timeout=600)
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in run.stdout.readline().split()]
    assert len(pids) == 2 and all(alive(pid) for pid in pids)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
