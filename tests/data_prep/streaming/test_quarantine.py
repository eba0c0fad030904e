from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.index import ShardError
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
    with pytest.raises(ShardError, match="9 of 107 clips could not be read, more than max_bad_share 0.02 allows; most of them earlier"):
        quarantine.count(8, [])
    generous = Quarantine(None, 0.1)
    generous.count(90, [bad(f"c{i}") for i in range(10)])  # exactly the share
    with pytest.raises(ShardError, match="11 of 101 clips .* the last: clip c is bad. Check the data with `foleyscale prep verify`"):
        generous.count(0, [bad("c")])


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
