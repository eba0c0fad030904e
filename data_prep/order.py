"""The order of training as a pure function: position -> (dataset, shard, row), with no list of clips anywhere.

Each epoch deals the shards in a new order and cuts it into windows of `window` shards; inside a window the clips are permuted
by a keyed bijection, evaluated for one clip at a time. Two clips therefore lie further apart than their shards' places in the
epoch only by the clips of one window, and any stretch of the order shorter than a window touches at most 2 * window shards.
A larger window mixes better and keeps more files open. Only integer arithmetic is used: the order cannot change with a library.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

_MASK = (1 << 64) - 1
_ROUNDS = 6
_LARGEST_SCHEDULE = 1024
_EPOCHS_AT_HAND = 2
_MIXTURE, _SHARDS, _CLIPS, _REPLACEMENT = range(4)  # separate the keys of permutations with different jobs


class Place(NamedTuple):
    """Where a clip lies: data set, shard and good row, all counted from 0."""

    dataset: int
    shard: int
    row: int


def mix(*values: int) -> int:
    """A 64-bit hash of integers (the finaliser of SplitMix64 over a running sum)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permute(index: int, size: int, key: int) -> int:
    """The image of `index` under the permutation of range(size) that `key` names.

    An alternating Feistel network on Z_a x Z_b with a * b >= size (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
    2002); a result outside the range walks on until one lies inside, which takes hardly more than one step as a * b < size + a.
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is outside range({size})")
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    while True:
        left, right = index % a, index // a
        for number in range(0, _ROUNDS, 2):
            left = (left + mix(key, number, right)) % a
            right = (right + mix(key, number + 1, left)) % b
        index = right * a + left
        if index < size:
            return index


@dataclass(frozen=True)
class Order:
    """The endless order over one or more data sets, given their clips per shard.

    Without weights all data sets form one, each clip once per epoch. With integer `weights` every block of sum(weights)
    positions takes exactly weights[d] clips of data set d, which runs through epochs of its own.
    """

    counts: tuple[tuple[int, ...], ...]
    seed: int = 0
    window: int = 16
    weights: tuple[int, ...] | None = None
    _pools: tuple[_Pool, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1 shard, not {self.window}")
        if empty := [number for number, counts in enumerate(self.counts) if not sum(counts)]:
            raise ValueError(f"data set {empty[0]} has no clips; index it again or leave it out")
        if self.weights is None:
            merged = tuple(count for counts in self.counts for count in counts)
            pools = (_Pool(merged, mix(self.seed), self.window),)
        else:
            object.__setattr__(self, "weights", _checked_weights(self.weights, len(self.counts)))
            pools = tuple(_Pool(counts, mix(self.seed, number), self.window) for number, counts in enumerate(self.counts))
        object.__setattr__(self, "_pools", pools)

    def __len__(self) -> int:
        return sum(sum(counts) for counts in self.counts)

    def locate(self, position: int) -> Place:
        """The clip at `position` >= 0."""
        pool, index = self._route(position)
        return self._place(pool, *self._pools[pool].locate(index))

    def replacement(self, position: int, attempt: int) -> Place:
        """A clip to take in place of an unreadable one: another of the same data set and epoch, told by position and attempt alone."""
        pool, index = self._route(position)
        size = self._pools[pool].size
        other = mix(self.seed, _REPLACEMENT, position, attempt) % size
        return self._place(pool, *self._pools[pool].locate(index - index % size + other))

    def _route(self, position: int) -> tuple[int, int]:
        """The pool that serves the position, and the position inside that pool."""
        if position < 0:
            raise ValueError(f"position must be 0 or more, not {position}")
        if self.weights is None:
            return 0, position
        ends = list(accumulate(self.weights))
        block, slot = divmod(position, ends[-1])
        slot = permute(slot, ends[-1], mix(self.seed, _MIXTURE, block))
        pool = bisect_right(ends, slot)
        return pool, block * self.weights[pool] + slot - (ends[pool] - self.weights[pool])

    def _place(self, pool: int, shard: int, row: int) -> Place:
        if self.weights is not None:
            return Place(pool, shard, row)
        dataset = 0
        while shard >= len(self.counts[dataset]):
            shard -= len(self.counts[dataset])
            dataset += 1
        return Place(dataset, shard, row)


class _Pool:
    """The endless order over the shards of one pool; memory O(shards), time O(log shards) per position within an epoch."""

    def __init__(self, counts: Sequence[int], key: int, window: int):
        self._counts, self._key, self._window = counts, key, window
        self.size = sum(counts)
        self._epoch = lru_cache(_EPOCHS_AT_HAND)(self._deal)

    def __reduce__(self) -> tuple[type[_Pool], tuple[Sequence[int], int, int]]:
        return _Pool, (self._counts, self._key, self._window)

    def _deal(self, epoch: int) -> tuple[list[int], list[int]]:
        """The epoch's shards in order, and the clips before each of them and at the end."""
        key = mix(self._key, _SHARDS, epoch)
        shards = [permute(place, len(self._counts), key) for place in range(len(self._counts))]
        return shards, list(accumulate((self._counts[shard] for shard in shards), initial=0))

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, row) of the clip at `index`."""
        epoch, offset = divmod(index, self.size)
        shards, before = self._epoch(epoch)
        window = (bisect_right(before, offset) - 1) // self._window
        first, last = window * self._window, min((window + 1) * self._window, len(shards))
        start, size = before[first], before[last] - before[first]
        offset = start + permute(offset - start, size, mix(self._key, _CLIPS, epoch, window))
        place = bisect_right(before, offset) - 1
        return shards[place], offset - before[place]


def _checked_weights(weights: Sequence[int], datasets: int) -> tuple[int, ...]:
    if len(weights) != datasets:
        raise ValueError(f"weights has {len(weights)} values for {datasets} data sets; give one each")
    if any(not isinstance(weight, int) or weight < 1 for weight in weights):
        raise ValueError(f"weights must be whole numbers of at least 1, not {list(weights)}; leave out a data set you do not want")
    reduced = tuple(weight // math.gcd(*weights) for weight in weights)
    if sum(reduced) > _LARGEST_SCHEDULE:
        # Clips of a data set change places within one block: longer blocks would reach over many windows of shards.
        raise ValueError(f"weights {list(weights)} add up to more than {_LARGEST_SCHEDULE}; use smaller whole numbers")
    return reduced
