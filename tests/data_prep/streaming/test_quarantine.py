from __future__ import annotations

import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.index import ShardError
from data_prep.order import Order
from data_prep.stream import ClipStream
from data_prep.streaming.quarantine import Quarantine
from data_prep.streaming.reading import BadClip
from tests.fixtures.made_shards import DECODE, damage, take, write


def bad(key, reason="bad_crc"):
    return BadClip("/data", "shard-000000", key, reason, 7, f"clip {key} is bad")


@given(st.integers(0, 10**12), st.integers(0, 10**6), st.integers(1, 64))
def test_the_parts_of_the_ranks_add_up_to_the_counts(seen, bad, world_size):
    ranks = [Quarantine(None, 0.01) for _ in range(world_size)]
    for rank, part in enumerate(ranks):
        part.restore({"seen": seen, "bad": bad}, rank, world_size)
    assert (sum(part.seen for part in ranks), sum(part.bad for part in ranks)) == (seen, bad)
    assert max(part.bad for part in ranks) - min(part.bad for part in ranks) <= 1


def test_the_share_is_judged_once_enough_was_seen():
    quarantine = Quarantine(None, 0.02)
    quarantine.count(90, [bad(f"c{i}") for i in range(9)])  # 9 of 99
    quarantine.judge()
    quarantine.count(8, [])
    with pytest.raises(ShardError, match="9 of 107 clips could not be read, more than max_bad_share 0.02 allows; the last: clip c8 is bad"):
        quarantine.judge()
    generous = Quarantine(None, 0.1)
    generous.count(90, [bad(f"c{i}") for i in range(10)])  # exactly the share
    generous.judge()
    generous.count(0, [bad("c")])
    with pytest.raises(ShardError, match="11 of 101 clips .* the last: clip c is bad. Check the data with `foleyscale prep verify`"):
        generous.judge()


def test_the_counts_of_all_ranks_are_judged_where_they_are_told(tmp_path):
    quarantine = Quarantine(None, 0.1)
    quarantine.count(60, [bad(f"c{i}") for i in range(60)])
    quarantine.judge({"seen": 1200.0, "bad": 60.0})
    with pytest.raises(ShardError, match="60 of 120 clips"):
        quarantine.judge()
    for other, where in ((Quarantine(None, 0.1), "none of them in this process"), (Quarantine(tmp_path / "q", 0.1), "listed in .*/q")):
        with pytest.raises(ShardError, match=f"130 of 1200 clips could not be read, .*; .*{where}. Check"):
            other.judge({"seen": 1200.0, "bad": 130.0})


class Ranks:
    """Sums over ranks that are threads of this process; ends them all where one is missing."""

    def __init__(self, world):
        self.barrier, self.given = threading.Barrier(world, timeout=20), []

    def total(self, values):
        """As World.total."""
        self.given.append(values)
        self.barrier.wait()
        totals = {name: sum(each[name] for each in self.given) for name in values}
        if not self.barrier.wait():
            self.given.clear()
        self.barrier.wait()
        return totals


def lives(shards, steps, world=2, **options):
    """Steps that each rank made, and the error that it ended with."""
    ranks = Ranks(world)

    def life(rank):
        stream = ClipStream(shards, DECODE, batch_size=8, rank=rank, world_size=world, total=ranks.total, **options)
        try:
            made = sum(1 for _ in itertools.islice(stream.batches(), steps))
        except ShardError as error:
            return stream.position // 8, stream.bad, str(error)
        return made, stream.bad, ""

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(life, range(world)))


@pytest.fixture(scope="module")
def one_sided(tmp_path_factory):
    """Clips of which those are bad that the first rank of two meets in the first 50 steps of 8."""
    order = Order([np.array([1000])], 0, 16)
    rows = [order.locate(8 * step).row for step in range(50)]
    return write(tmp_path_factory.mktemp("quarantine") / "set", counts=(1000,), bad_rows=[(0, row) for row in rows])


def test_a_rank_with_all_bad_clips_stops_nobody_below_the_share(one_sided):
    # A quarter of the first rank's clips, an eighth of all: what replaces them is bad now and then.
    (made, bad_here, error), (other, bad_there, _) = lives(one_sided, 50, max_bad_share=0.17)
    assert (made, other, error) == (50, 50, "") and bad_here >= 50 and not bad_there
    alone = ClipStream(one_sided, DECODE, batch_size=8, world_size=2, max_bad_share=0.17)
    with pytest.raises(ShardError, match="more than max_bad_share 0.17"):
        take(alone, 50)


def test_above_the_share_all_ranks_stop_at_the_same_step(one_sided):
    (made, bad_here, error), (other, bad_there, told) = lives(one_sided, 50, max_bad_share=0.05)
    assert made == other == 16 and bad_here >= 16 and not bad_there  # the second judgement is the first of more than a hundred clips
    assert all("clips could not be read, more than max_bad_share 0.05" in each for each in (error, told))
    assert error.split()[:3] == told.split()[:3]


def test_deadly_clips_are_known_to_the_next_start(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    Quarantine(path, 1.0).count(0, [bad("a", "timeout"), bad("b"), bad("c", "crashed")])
    with open(path, "a") as file:
        file.write('{"url": "/data", "sha')  # a run killed while it wrote
    found = Quarantine(path, 1.0).deadly()
    assert found == {("/data", "shard-000000", key): (reason, f"clip {key} is bad") for key, reason in (("a", "timeout"), ("c", "crashed"))}
    assert Quarantine(None, 1.0).deadly() == Quarantine(tmp_path / "none", 1.0).deadly() == {}


def test_counts_go_through_restarts_of_other_worlds(tmp_path):
    """Two ranks, then one, then three; a trainer sums the counts of its ranks whenever it saves."""
    shards = write(tmp_path / "set")
    broken, state = damage(shards, 3, 5, tmp_path / "copy"), None
    for world in (2, 1, 3):
        ranks = [ClipStream(broken, DECODE, batch_size=6, rank=rank, world_size=world, max_bad_share=0.5) for rank in range(world)]
        for rank in ranks:
            if state:
                rank.load_state_dict(json.loads(state))
            take(rank, 8)  # an epoch
        totals = {"seen": sum(rank.seen for rank in ranks), "bad": sum(rank.bad for rank in ranks)}
        states = [rank.state_dict(totals) for rank in ranks]
        assert all(other == states[0] for other in states)
        state = json.dumps(states[0])
    assert totals == {"seen": 3 * 49, "bad": 3} and states[0]["position"] == 144
    strict = ClipStream(broken, DECODE, batch_size=6, max_bad_share=0.01)
    strict.load_state_dict(json.loads(state))
    with pytest.raises(ShardError, match="of 15. clips could not be read"):  # at once: the share is that of the whole run
        take(strict, 1)
