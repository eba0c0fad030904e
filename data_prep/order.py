"""The order of training as a pure function: position -> (dataset, shard, row), with no list of clips, nor of an epoch's shards.

The clips lie on a line, shard after shard. Each epoch starts the line at another place, cuts it into blocks of a typical shard's
clips, puts the blocks in a new order and cuts that into windows of about `window` blocks; inside a window the clips are permuted
by a keyed bijection, evaluated for one clip at a time. So every position costs the same, the first after a seek too, and all
that is kept is the number of clips before each shard: 8 bytes a shard.

How far clips travel: two clips of one block stay within two windows of each other, all others may lie anywhere in the epoch; a set
of fewer than 1.5 * window blocks is shuffled as a whole. How near it reads: a stretch no longer than a window lies in two windows.
Where all shards have equal clips a block is one shard, so that stretch touches 2 * window + 2 shards at most; a block of ragged
shards touches those that share its clips, two or three as a rule. A larger window mixes further and keeps more files open.
Only integer arithmetic is used: the order cannot change with a library.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

ORDER_VERSION = 2
"""Counts up when the same seed gives another order, so that no run goes on in an order that it did not begin."""

_MASK = (1 << 64) - 1
_ROUNDS = 6
_LARGEST_SCHEDULE = 1024
_MIXTURE, _BLOCKS, _CLIPS, _REPLACEMENT, _START = range(5)  # separate the keys of permutations with different jobs


class Place(NamedTuple):
    """Where a clip lies: data set, shard and good row, all counted from 0."""

    dataset: int
    shard: int
    row: int


def mix(*values: int) -> int:
    """A 64-bit hash of integers (the finaliser of SplitMix64 over a running sum)."""
    state = 0
    for value in values:
        state = _absorb(state, value)
    return state


def _absorb(state: int, value: int) -> int:
    state = (state + value + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def permute(index: int, size: int, key: int) -> int:
    """The image of `index` under the permutation of range(size) that `key` names.

    An alternating Feistel network on Z_a x Z_b with a * b >= size (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
    2002); a result outside the range walks on until one lies inside, which takes hardly more than one step as a * b < size + a.
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is outside range({size})")
    a, b, keys = _network(size, key)
    while True:
        right, left = divmod(index, a)
        for even, odd in keys:
            left = (left + _absorb(even, right)) % a
            right = (right + _absorb(odd, left)) % b
        index = right * a + left
        if index < size:
            return index


@lru_cache(256)
def _network(size: int, key: int) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """The two sides of a permutation's network and the keys of its rounds, in pairs."""
    a = math.isqrt(size - 1) + 1
    return a, -(-size // a), tuple((mix(key, number), mix(key, number + 1)) for number in range(0, _ROUNDS, 2))


class Order:
    """The endless order over one or more data sets, given their clips per shard.

    Without weights all data sets form one, each clip once per epoch. With integer `weights` every block of sum(weights)
    positions takes exactly weights[d] clips of data set d, which runs through epochs of its own.
    """

    def __init__(self, counts: Sequence[Sequence[int]], seed: int = 0, window: int = 16, weights: Sequence[int] | None = None):
        if window < 1:
            raise ValueError(f"window must be at least 1 shard, not {window}")
        arrays = [np.asarray(each, dtype=np.int64) for each in counts]
        if empty := [number for number, each in enumerate(arrays) if not each.sum()]:
            raise ValueError(f"data set {empty[0]} has no clips; index it again or leave it out")
        self.seed, self.window = seed, window
        self.weights = None if weights is None else _checked_weights(weights, len(arrays))
        if self.weights is None:
            self._pools = [_Pool(np.concatenate(arrays), mix(seed), window)]
            self._ends = list(accumulate(map(len, arrays)))
        else:
            self._pools = [_Pool(each, mix(seed, number), window) for number, each in enumerate(arrays)]
            self._ends = list(accumulate(self.weights))

    def __len__(self) -> int:
        return sum(pool.size for pool in self._pools)

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
        block, slot = divmod(position, self._ends[-1])
        slot = permute(slot, self._ends[-1], mix(self.seed, _MIXTURE, block))
        pool = bisect_right(self._ends, slot)
        return pool, block * self.weights[pool] + slot - (self._ends[pool] - self.weights[pool])

    def _place(self, pool: int, shard: int, row: int) -> Place:
        if self.weights is not None:
            return Place(pool, shard, row)
        dataset = bisect_right(self._ends, shard)
        return Place(dataset, shard - (self._ends[dataset - 1] if dataset else 0), row)


class _Pool:
    """The endless order over the shards of one pool; time O(log shards) per position, wherever it lies."""

    def __init__(self, counts: np.ndarray, key: int, window: int):
        self._counts, self._key, self._window = counts, key, window
        self._before = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.size = int(self._before[-1])
        self._block = _block_size(counts)
        # Windows of equal size: a short last one would be read from too few shards.
        self._windows = max(1, (self.size + self._block * window // 2) // (self._block * window))
        # Positions are asked for one after the other: they share a window, and its blocks.
        self._window_at = lru_cache(4)(self._window_of)
        self._block_start = lru_cache(8 * window)(self._start_of_block)

    def __reduce__(self) -> tuple[type[_Pool], tuple[np.ndarray, int, int]]:
        small = self._counts.astype(np.min_scalar_type(self._counts.max()))
        return _Pool, (small, self._key, self._window)

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, row) of the clip at `index`."""
        epoch, place = divmod(index, self.size)
        block, rest = divmod(self._shuffled(epoch, place), self._block)
        clip = (self._block_start(epoch, block) + rest) % self.size
        shard = int(self._before.searchsorted(clip, side="right")) - 1
        return shard, clip - int(self._before[shard])

    def _shuffled(self, epoch: int, place: int) -> int:
        """Where the clip at `place` of the epoch lay before the clips of each window were permuted."""
        first, size, key = self._window_at(epoch, ((place + 1) * self._windows - 1) // self.size)
        return first + permute(place - first, size, key)

    def _window_of(self, epoch: int, number: int) -> tuple[int, int, int]:
        """The first place of the epoch's window of that number, its places, and the key of their permutation."""
        first, end = (each * self.size // self._windows for each in (number, number + 1))
        return first, end - first, mix(self._key, _CLIPS, epoch, number)

    def _start_of_block(self, epoch: int, block: int) -> int:
        """Where on the line of clips the epoch's block number `block` begins."""
        blocks = self.size // self._block
        # Whole blocks, so that blocks of equal shards stay shards. The clips left over go last: others in each epoch.
        start = mix(self._key, _START, epoch) % -(-self.size // self._block) * self._block
        chosen = permute(block, blocks, mix(self._key, _BLOCKS, epoch)) if block < blocks else block
        return start + chosen * self._block


def _block_size(counts: np.ndarray) -> int:
    """Clips of a typical shard: the median where most are alike, but the mean where most are small, or windows would be small too."""
    counts = np.sort(counts[counts > 0])
    return max(int(counts[len(counts) // 2]), -(-int(counts.sum(dtype=np.int64)) // len(counts)))


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
