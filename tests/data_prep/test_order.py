from __future__ import annotations

import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.order import Order, mix, permute

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
    """A change here silently breaks the resume of every run in the field."""
    assert mix(1, 2, 3) == 7702586659592502839
    assert [permute(i, 10, 7) for i in range(10)] == [6, 1, 5, 4, 9, 2, 8, 0, 7, 3]
    order = Order(((3, 5), (4,)), seed=9, window=2)
    assert [tuple(order.locate(p)) for p in (0, 1, 5, 12, 10**12)] == [(0, 0, 2), (0, 0, 0), (1, 0, 1), (0, 1, 0), (0, 1, 2)]


@settings(max_examples=60, deadline=None)
@given(data_sets, seeds, st.integers(1, 8), st.integers(0, 3))
def test_each_epoch_holds_each_clip_once(counts, seed, window, epoch):
    if any(not sum(shards) for shards in counts):
        return
    order = Order(counts, seed, window)
    n = len(order)
    assert Counter(order.locate(epoch * n + i) for i in range(n)) == clips(counts)


@settings(max_examples=40, deadline=None)
@given(shard_counts, seeds, st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 6]))
def test_slices_of_ranks_make_up_the_order(counts, seed, window, world):
    order, size = Order((counts,), seed, window), 12
    whole = [order.locate(i) for i in range(4 * size)]
    ranks = [pickle.loads(pickle.dumps(order)) for _ in range(world)]
    share = size // world
    parts = [[ranks[r].locate(s * size + r * share + i) for s in range(4) for i in range(share)] for r in range(world)]
    assert [clip for s in range(4) for part in parts for clip in part[s * share : (s + 1) * share]] == whole


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


def test_neighbours_come_from_few_shards():
    order = Order(((20,) * 64,), seed=1, window=4)
    places = [order.locate(i) for i in range(len(order))]
    for start in range(0, len(order), 80):
        assert len({place.shard for place in places[start : start + 80]}) == 4
    assert max(len({place.shard for place in places[i : i + 80]}) for i in range(len(order) - 80)) == 8


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
    assert all(place in clips(order.counts) for place in found)
    if mixed:
        assert {place.dataset for place in found} == {order.locate(position).dataset}


def test_far_positions_cost_no_more_than_near_ones():
    order = Order(((1000,) * 2000,), seed=3)
    for position in (0, 10**15, 10**15 + 1, 10**18):
        place = order.locate(position)
        assert 0 <= place.shard < 2000 and 0 <= place.row < 1000


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
