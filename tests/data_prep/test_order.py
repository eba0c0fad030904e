from __future__ import annotations

import pickle
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.order import ORDER_VERSION, Order, mix, permute

shard_counts = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any).map(tuple)
data_sets = st.lists(shard_counts, min_size=1, max_size=3).map(tuple)
seeds = st.integers(0, 2**63)


def clips(counts):
    return Counter((d, s, r) for d, shards in enumerate(counts) for s, count in enumerate(shards) for r in range(count))


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_reaches_every_order_and_every_place_equally():
    orders = Counter(tuple(permute(i, 4, mix(key)) for i in range(4)) for key in range(12000))
    assert len(orders) == 24
    first = Counter(permute(3, 50, mix(key)) for key in range(20000))
    assert len(first) == 50 and max(first.values()) < 500 and min(first.values()) > 300  # 400 each, sigma 20


def test_values_are_fixed_for_ever():
    """A change here breaks the resume of every run in the field; one of the order must count ORDER_VERSION up."""
    assert mix(1, 2, 3) == 7702586659592502839
    assert [permute(i, 10, 7) for i in range(10)] == [6, 1, 5, 4, 9, 2, 8, 0, 7, 3]
    order = Order(((3, 5), (4,) * 9), seed=9, window=2)
    assert [tuple(order.locate(p)) for p in (0, 1, 5, 44, 10**12)] == [(1, 3, 2), (1, 3, 0), (1, 7, 1), (0, 1, 1), (1, 5, 1)]
    assert ORDER_VERSION == 2


@settings(max_examples=100, deadline=None)
@given(data_sets, seeds, st.integers(1, 8), st.integers(0, 3))
def test_each_epoch_holds_each_clip_once(counts, seed, window, epoch):
    if any(not sum(shards) for shards in counts):
        return
    order = Order(counts, seed, window)
    n = len(order)
    assert Counter(order.locate(epoch * n + i) for i in range(n)) == clips(counts)


runs = st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 3), st.integers(0, 5)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(data_sets, seeds, st.integers(1, 6), runs)
def test_global_batches_do_not_depend_on_who_reads_them(counts, seed, window, runs):
    """Runs of (world size, workers per rank, steps), one after the other, deal exactly the order."""
    if any(not sum(shards) for shards in counts):
        return
    order, size, seen = Order(counts, seed, window), 12, []
    for world, workers, steps in runs:
        share, position = size // world, len(seen)
        ranks = [pickle.loads(pickle.dumps(order)) for _ in range(world)]
        made = {}
        for rank, own in enumerate(ranks):
            for worker in range(workers):
                for step in range(worker, steps, workers):
                    made[step, rank] = [own.locate(position + step * size + rank * share + i) for i in range(share)]
        seen += [place for step in range(steps) for rank in range(world) for place in made[step, rank]]
    assert seen == [order.locate(i) for i in range(len(seen))]
    n = len(order)
    for epoch in range(len(seen) // n):
        assert Counter(seen[epoch * n : (epoch + 1) * n]) == clips(counts)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(shard_counts, st.integers(1, 5)), min_size=1, max_size=3), seeds, st.integers(1, 4))
def test_mixtures_keep_to_the_schedule_and_to_each_sets_epochs(sets, seed, window):
    counts, weights = tuple(shards for shards, _ in sets), tuple(weight for _, weight in sets)
    order = Order(counts, seed, window, weights)
    period = sum(order.weights)
    blocks = max(-(-sum(shards) // weight) for shards, weight in zip(counts, order.weights, strict=True))
    places = [order.locate(i) for i in range(blocks * period)]
    for block in range(blocks):
        taken = Counter(place.dataset for place in places[block * period : (block + 1) * period])
        assert taken == dict(enumerate(order.weights))
    for dataset, shards in enumerate(counts):
        visits = Counter((place.shard, place.row) for place in places if place.dataset == dataset)
        turns = blocks * order.weights[dataset]
        # After k clips of N each clip was seen k // N times or once more, up to the block that straddles the epoch's end.
        assert visits.total() == turns
        if turns % sum(shards) == 0:
            assert set(visits.values()) == {turns // sum(shards)}


def test_a_mixture_finishes_every_epoch_of_every_set_exactly():
    order = Order(((3, 3), (5, 4, 3)), seed=4, window=2, weights=(2, 4))
    assert order.weights == (1, 2)
    places = [order.locate(i) for i in range(18 * 5)]
    for epoch in range(5):
        assert Counter(places[epoch * 18 : (epoch + 1) * 18]) == clips(((3, 3), (5, 4, 3)))


def test_a_stretch_touches_few_shards():
    """Equal shards: a window's shards and no more. Ragged ones: two or three for one, as blocks no longer end where shards do."""
    order = Order(((20,) * 64,), seed=1, window=4)
    places = [order.locate(i) for i in range(len(order))]
    for start in range(0, len(order), 80):
        assert len({place.shard for place in places[start : start + 80]}) == 4
    assert max(len({place.shard for place in places[i : i + 80]}) for i in range(len(order) - 80)) == 8
    ragged = Order((np.random.default_rng(0).integers(10, 31, 64),), seed=1, window=4)
    places = [ragged.locate(i) for i in range(len(ragged))]
    touched = [len({place.shard for place in places[i : i + 80]}) for i in range(len(ragged) - 80)]
    assert max(touched) <= 24 and sum(touched) / len(touched) < 18


def test_clips_travel_over_the_whole_epoch_but_a_block_stays_together():
    order = Order(((10,) * 200,), seed=2, window=8)
    where = {order.locate(i): i for i in range(len(order))}
    blocks = [[where[0, shard, row] for row in range(10)] for shard in range(200)]
    assert max(max(block) - min(block) for block in blocks) < 2 * 80
    neighbours = [abs(blocks[shard][9] - blocks[shard + 1][0]) for shard in range(199)]
    assert max(neighbours) > 1500 and 500 < sum(neighbours) / 199 < 830  # a third of the epoch on average


@pytest.mark.parametrize("counts", [(1600,), (32,) * 50, (1,) * 400, (5000, 1, 1, 1)])
def test_small_sets_are_shuffled_as_a_whole(counts):
    """Neighbours in the shards end up as far apart as chance puts them: a third of the set, or of its window."""
    order = Order((counts,), seed=3)
    where = {order.locate(i): i for i in range(len(order))}
    line = [where[0, shard, row] for shard, count in enumerate(counts) for row in range(count)]
    steps = np.abs(np.diff(line))
    assert steps.mean() > min(len(order), 16 * max(counts)) / 3.5 and (steps == 1).sum() < 12


def test_a_short_last_block_is_another_in_each_epoch():
    order = Order(((10,) * 40 + (7,),), seed=0, window=4)
    tails = [frozenset(order.locate(epoch * 407 + i) for i in range(400, 407)) for epoch in range(20)]
    assert len(set(tails)) == 20


def test_epochs_and_seeds_differ():
    counts = ((10,) * 10,)
    first = [Order(counts, 0).locate(i) for i in range(100)]
    assert first != [Order(counts, 0).locate(100 + i) for i in range(100)]
    assert first != [Order(counts, 1).locate(i) for i in range(100)]
    assert first == [Order(counts, 0).locate(i) for i in range(100)]
    # Any clip is as likely as any other to come first.
    assert len({Order(counts, seed).locate(0) for seed in range(200)}) > 70


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(0, 10**9), st.booleans())
def test_replacements_stay_in_the_data_set(seed, position, mixed):
    order = Order(((7, 9), (20,)), seed, 4, (1, 2) if mixed else None)
    found = [order.replacement(position, attempt) for attempt in range(8)]
    assert found == [order.replacement(position, attempt) for attempt in range(8)] and len(set(found)) > 1
    assert all(place in clips(((7, 9), (20,))) for place in found)
    if mixed:
        assert {place.dataset for place in found} == {order.locate(position).dataset}


def calls(function, *arguments):
    """How many calls, of Python and of C, one call makes."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return count


def test_no_position_costs_more_in_a_hundred_million_clips():
    """The first after a seek neither: work is counted, as a clock would depend on the machine."""
    counts = np.random.default_rng(0).integers(200, 460, 300_000)
    order = Order((counts,), seed=3)
    assert len(order) > 9.8e7
    for position in (0, 1, round(0.9 * len(order)), 10**15, 10**18):
        assert calls(order.locate, position) < 150
        place = order.locate(position)
        assert 0 <= place.shard < 300_000 and 0 <= place.row < counts[place.shard]
    packed = pickle.dumps(order)
    assert len(packed) < 1e6 and pickle.loads(packed).locate(10**15) == order.locate(10**15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": ((0, 0),)}, "data set 0 has no clips"),
        ({"counts": ((1,),), "window": 0}, "window must be at least 1 shard, not 0"),
        ({"counts": ((1,), (1,)), "weights": (1,)}, "weights has 1 values for 2 data sets"),
        ({"counts": ((1,), (1,)), "weights": (1, 0)}, r"weights must be whole numbers of at least 1, not \[1, 0\]"),
        ({"counts": ((1,), (1,)), "weights": (0.5, 0.5)}, "weights must be whole numbers"),
        ({"counts": ((1,), (1,)), "weights": (1, 5000)}, "add up to more than 1024"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Order(**arguments)


def test_positions_start_at_zero():
    with pytest.raises(ValueError, match="position must be 0 or more, not -1"):
        Order(((1,),)).locate(-1)
    with pytest.raises(ValueError, match=r"index 3 is outside range\(3\)"):
        permute(3, 3, 0)
