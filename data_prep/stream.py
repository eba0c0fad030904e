"""The training data set over shards: global batches in an order that is a function of the position, and one pass for evaluation.

All state is (data, seed, position), equal on every rank. World size and the number of workers may change at any restart.
"""

from __future__ import annotations

import hashlib
import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any

from data_prep.decoding import DecodedCache, Sample
from data_prep.index import ShardError, ShardSet
from data_prep.order import ORDER_VERSION, Order, Place
from data_prep.streaming.loading import load
from data_prep.streaming.quarantine import Quarantine
from data_prep.streaming.reading import BadClip, Batch, ClipReader, Decode, collate

__all__ = ["BadClip", "Batch", "ClipStream", "collate", "one_pass", "shard_passes"]

_ATTEMPTS = 16
_JUDGED_EVERY = 16
"""Steps from one judgement of the bad clips of all ranks to the next: each waits for the device."""
_log = logging.getLogger(__name__)


class ClipStream:
    """Batches for ever: at each step rank r of W takes its slice of the next `batch_size` positions of the order.

    decode: `(raw, entry, random) -> {name: tensor}` as in data_prep.decoding; what `random()` gives depends on (seed, position) alone.
    batch_size: clips of all ranks together; a multiple of world_size.
    window: shards mixed at a time (data_prep.order). weights: whole numbers, the shares of several sets; None makes them one.
    quarantine: local JSON-lines file of unreadable clips; each is replaced by another, the same after every restart.
    max_bad_share: share of unreadable clips among those seen that stops the run.
    total: sums named numbers over all ranks, which call it at the same steps and so stop at the same one; without it a rank judges its
        own clips alone.
    clip_timeout: seconds after which a worker process that still decodes one clip is killed and the clip counts as unreadable.
    cache_gb: memory for decoded clips, of all workers of this rank together; it changes the speed, not the batches.
    """

    def __init__(
        self,
        shards: ShardSet | Sequence[ShardSet],
        decode: Decode,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        position: int = 0,
        window: int = 16,
        weights: Sequence[int] | None = None,
        max_bad_share: float = 0.01,
        total: Callable[[dict[str, float]], Mapping[str, float]] | None = None,
        quarantine: str | os.PathLike[str] | None = None,
        clip_timeout: float = 60.0,
        cache_gb: float = 0.0,
    ):
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} must be a multiple of the {world_size} ranks: it counts the clips of all of them")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside a world of {world_size}")
        if clip_timeout <= 0:
            raise ValueError(f"clip_timeout is {clip_timeout}: give the seconds that the slowest good clip may take to decode")
        if cache_gb and not hasattr(decode, "whole"):
            raise ValueError(f"cache_gb needs a decoder with whole() and crop(), which {type(decode).__name__} lacks; set it to 0")
        self.sets = [shards] if isinstance(shards, ShardSet) else list(shards)
        self.order = Order([each.counts for each in self.sets], seed, window, weights)
        self.position, self.batch_size = position, batch_size
        self.clip_timeout, self.cache_gb = clip_timeout, cache_gb
        self._rank, self._world_size = rank, world_size
        self._share = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._quarantine, self._total = Quarantine(quarantine, max_bad_share), total
        # Workers are apart by less than a window: two windows are in work, and a block of ragged shards touches two or three.
        sets = [each.keeping_open(4 * window + 4) for each in self.sets]
        self._reader = ClipReader(sets, decode, seed, self._quarantine.deadly())

    @property
    def epoch(self) -> float:
        """Passes over the data so far, all sets taken together."""
        return self.position / len(self.order)

    @property
    def seen(self) -> int:
        """Clips that this rank has taken since the run began, unreadable ones included."""
        return self._quarantine.seen

    @property
    def bad(self) -> int:
        """Those among `seen` that could not be read."""
        return self._quarantine.bad

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, workers: int = 0) -> Iterator[Batch]:
        """Batches from `position` on, prepared by worker processes or, with 0, in this one; the batches are the same.

        Only worker processes can be watched: with 0 a decoder that hangs or crashes takes the run along.
        """
        cache = DecodedCache(self.cache_gb * 2**30 / max(1, workers))
        make = _TrainingBatches(replace(self._reader, cache=cache), self.order, self.position, self.batch_size, self._share)
        expected = self.position
        steps = load(make, None, workers, all(each.is_local for each in self.sets), self.clip_timeout)
        for step, (batch, bad) in enumerate(steps):
            if self.position != expected:
                raise RuntimeError(f"the stream was moved from position {expected} to {self.position} while it ran; call batches() again")
            self._quarantine.count(len(self._share), bad)
            self._judge(step)
            # Only here, where the consumer takes it, does a batch count: what workers prepared ahead is made again after a restart.
            self.position = expected = expected + self.batch_size
            yield batch
            del batch  # where the consumer has dropped it too, the next one is made in its memory

    def _judge(self, step: int) -> None:
        """Stop where too many clips are bad, on all ranks at once: one that stops alone leaves the others waiting for it."""
        if self._total is None:
            self._quarantine.judge()
        elif step % _JUDGED_EVERY == 0:
            self._quarantine.judge(self._total({"seen": self.seen, "bad": self.bad}))

    def state_dict(self, totals: Mapping[str, int] | None = None) -> dict[str, Any]:
        """What a restart needs, equal on all ranks; "sets" and the order's settings only serve to name a difference.

        totals: "seen" and "bad" summed over all ranks; None where this rank is the only one.
        """
        totals = totals or {"seen": self.seen, "bad": self.bad}
        sets = [{"hash": each.hash, "clips": len(each), "shards": len(each.shards)} for each in self.sets]
        order = {"seed": self.order.seed, "window": self.order.window, "weights": self.order.weights and list(self.order.weights)}
        digest = hashlib.sha256("\n".join(each.hash for each in self.sets).encode()).hexdigest()
        state = {"dataset": digest if len(sets) > 1 else sets[0]["hash"], "position": self.position, "order": ORDER_VERSION}
        return {**state, **order, **{name: round(totals[name]) for name in ("seen", "bad")}, "sets": sets}

    def load_state_dict(self, state: dict[str, Any], allow_data_change: bool = False) -> None:
        """Go on where `state` was taken; ValueError names what differs, as clips would then be seen twice or never.

        With allow_data_change the stream goes on at the same position of its own, different order, and a line of the log says so.
        """
        if differences := "; ".join(self._differences(state)):
            if not allow_data_change:
                raise ValueError(
                    f"cannot resume the data stream: {differences}. "
                    f"Restore it, or allow the data to change: training goes on at position {state['position']} of the new order"
                )
            if not self._rank:
                _log.warning("the data stream has changed: %s; it goes on at position %s of the new order", differences, state["position"])
        self.position = int(state["position"])
        self._quarantine.restore(state, self._rank, self._world_size)

    def _differences(self, state: dict[str, Any]) -> list[str]:
        own, found = self.state_dict(), []
        if len(own["sets"]) != len(state["sets"]):
            found.append(f"there were {len(state['sets'])} data sets, now {len(own['sets'])}")
        for each, now, then in zip(self.sets, own["sets"], state["sets"], strict=False):
            if now["hash"] != then["hash"]:
                sizes = [f"{side['clips']} clips in {side['shards']} shards" for side in (then, now)]
                change = f"had {sizes[0]}, now {sizes[1]}" if sizes[0] != sizes[1] else f"has {sizes[1]} as before, but others"
                found.append(f"{each.url} {change}")
        if state.get("order") != ORDER_VERSION:
            found.append(f"the run was begun in another version of the order, {state.get('order', 1)} and not {ORDER_VERSION}")
        found += [f"{name} was {state[name]}, now {own[name]}" for name in ("seed", "window", "weights") if state[name] != own[name]]
        return found


def one_pass(
    shards: ShardSet,
    decode: Decode,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    workers: int = 0,
    on_bad: Callable[[BadClip], None] | None = None,
    clip_timeout: float = 60.0,
) -> Iterator[Batch]:
    """Each of the first `limit` clips once, in index order, with "shard" and "row"; rank r takes the r-th of W equal stretches.

    `batch_size` counts this rank's clips; the last batch may be shorter. Unreadable clips go to `on_bad` and are left out;
    without it the first one raises ShardError. `clip_timeout` as in ClipStream, where there are workers.
    """
    total = len(shards) if limit is None else min(limit, len(shards))
    stretch = range(total * rank // world_size, total * (rank + 1) // world_size)
    for batch, bad in _load(shards, decode, _cut(stretch, batch_size), workers, clip_timeout):
        for clip in bad:
            if on_bad is None:
                raise ShardError(clip.message, clip.shard, clip.key, clip.reason)
            on_bad(clip)
        if batch["key"]:
            yield batch
        del batch


def shard_passes(
    shards: ShardSet, decode: Decode, batch_size: int, workers: int = 0, clip_timeout: float = 60.0
) -> Iterator[Iterator[tuple[Batch, list[BadClip]]]]:
    """For each shard in turn: its clips as of `one_pass`, in batches that end where it ends, each with the unreadable clips among them.

    A batch without a good clip has no keys. The workers are those of all shards: they read ahead beyond the end of one. Each shard must be
    read to its end before the next one; RuntimeError where it was not. Close it where an error ends it early, and the workers end too.
    """
    stretches = [_cut(range(*ends), batch_size) for ends in pairwise([0, *shards.counts.cumsum().tolist()])]
    batches = _load(shards, decode, [step for steps in stretches for step in steps], workers, clip_timeout)
    try:
        for steps in stretches:
            batches_of_shard = islice(batches, len(steps))
            yield batches_of_shard
            if next(batches_of_shard, None) is not None:
                raise RuntimeError("a shard was not read to its end before the next one was asked for")
    finally:
        batches.close()


def _cut(stretch: range, size: int) -> list[range]:
    """A stretch of positions in steps of `size`; the last may be shorter."""
    return [stretch[start:start + size] for start in range(0, len(stretch), size)]


def _load(shards: ShardSet, decode: Decode, steps: list[range], workers: int, clip_timeout: float) -> Iterator[tuple[Batch, list[BadClip]]]:
    make = _PassBatches(ClipReader([shards], decode), shards.counts.cumsum().tolist(), steps)
    return load(make, len(steps), workers, shards.is_local, clip_timeout)


@dataclass
class _Batches:
    """What makes the batch of a step."""

    reader: ClipReader

    def _fetched(self, step: int, then: int | None) -> dict[int, Place]:
        """Position -> place of the clips of a step, whose bytes are there now; those of the step `then` are on their way from a store."""
        places = self._places(step)
        self.reader.fetch([*places.values()])
        if then is not None and self.reader.is_distant:
            self.reader.fetch_ahead([*self._places(then).values()])
        return places

    def _places(self, step: int) -> dict[int, Place]:
        raise NotImplementedError


@dataclass
class _TrainingBatches(_Batches):
    """Step -> this rank's part of the global batch."""

    order: Order
    position: int
    batch_size: int
    share: range

    def __call__(self, step: int, then: int | None) -> tuple[Batch, list[BadClip]]:
        bad: list[BadClip] = []
        places = self._fetched(step, then)
        return collate([self._sample(position, place, bad) for position, place in places.items()]), bad

    def _places(self, step: int) -> dict[int, Place]:
        start = self.position + step * self.batch_size
        return {start + offset: self.order.locate(start + offset) for offset in self.share}

    def _sample(self, position: int, place: Place, bad: list[BadClip]) -> Sample:
        for attempt in range(_ATTEMPTS):
            sample = self.reader.read(place, position)
            if not isinstance(sample, BadClip):
                return sample
            bad.append(sample)
            place = self.order.replacement(position, attempt)
        raise ShardError(f"{_ATTEMPTS} clips in a row could not be read; the last: {bad[-1].message}")


@dataclass
class _PassBatches(_Batches):
    """Step -> the clips of one stretch of the index order."""

    ends: list[int]
    steps: list[range]

    def __call__(self, step: int, then: int | None) -> tuple[Batch, list[BadClip]]:
        samples, bad = [], []
        for position, place in self._fetched(step, then).items():
            sample = self.reader.read(place, position)
            if isinstance(sample, BadClip):
                bad.append(sample)
            else:
                samples.append({**sample, "shard": place.shard, "row": place.row})
        return collate(samples), bad

    def _places(self, step: int) -> dict[int, Place]:
        return {position: self._place(position) for position in self.steps[step]}

    def _place(self, position: int) -> Place:
        shard = bisect_right(self.ends, position)
        return Place(0, shard, position - (self.ends[shard - 1] if shard else 0))
