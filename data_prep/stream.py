"""The training data set over shards: global batches in an order that is a function of the position, and one pass for evaluation.

All state is (data, seed, position), equal on every rank. World size and the number of workers may change at any restart.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_prep.decoding import DecodedCache, Sample
from data_prep.index import ShardError, ShardSet
from data_prep.media import ClipError
from data_prep.order import Order, Place, mix

Batch = dict[str, Any]
Decode = Callable[..., Sample]

_ATTEMPTS = 16
_FEWEST_SEEN = 100
_STUCK_SECONDS = 900
_CROP = 0x43524F50  # keeps the keys of crops apart from those of the order


@dataclass(frozen=True)
class BadClip:
    """A clip that could not be read: where it lies, why, and the position that asked for it."""

    url: str
    shard: str
    key: str
    reason: str
    position: int
    message: str


class ClipStream:
    """Batches for ever: at each step rank r of W takes its slice of the next `batch_size` positions of the order.

    decode: `(raw, entry, random) -> {name: tensor}` as in data_prep.decoding; `random` depends on (seed, position) alone.
    batch_size: clips of all ranks together; a multiple of world_size.
    window: shards mixed at a time (data_prep.order). weights: whole numbers, the shares of several sets; None makes them one.
    quarantine: local JSON-lines file of unreadable clips; each is replaced by another, the same after every restart.
    max_bad_share: share of unreadable clips among those seen that stops the run.
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
        quarantine: str | os.PathLike[str] | None = None,
        cache_gb: float = 0.0,
    ):
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} must be a multiple of the {world_size} ranks: it counts the clips of all of them")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside a world of {world_size}")
        if cache_gb and not hasattr(decode, "whole"):
            raise ValueError(f"cache_gb needs a decoder with whole() and crop(), which {type(decode).__name__} lacks; set it to 0")
        self.sets = [shards] if isinstance(shards, ShardSet) else list(shards)
        counts = tuple(tuple(map(int, each.counts)) for each in self.sets)
        self.order = Order(counts, seed, window, None if weights is None else tuple(weights))
        self.position, self.batch_size = position, batch_size
        self.max_bad_share, self.cache_gb = max_bad_share, cache_gb
        self.quarantine = None if quarantine is None else Path(quarantine)
        self.seen, self.bad = 0, 0
        self._share = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._reader = _Reader([each.keeping_open(2 * window) for each in self.sets], decode, seed)

    @property
    def epoch(self) -> float:
        """Passes over the data so far, all sets taken together."""
        return self.position / len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, workers: int = 0) -> Iterator[Batch]:
        """Batches from `position` on, prepared by worker processes or, with 0, in this one; the batches are the same."""
        cache = DecodedCache(self.cache_gb * 2**30 / max(1, workers))
        make = _TrainingBatches(replace(self._reader, cache=cache), self.order, self.position, self.batch_size, self._share)
        expected = self.position
        for batch, bad in _load(make, None, workers, all(each.is_local for each in self.sets)):
            if self.position != expected:
                raise RuntimeError(f"the stream was moved from position {expected} to {self.position} while it ran; call batches() again")
            self._account(bad)
            # Only here, where the consumer takes it, does a batch count: what workers prepared ahead is made again after a restart.
            self.position = expected = expected + self.batch_size
            yield batch

    def _account(self, bad: list[BadClip]) -> None:
        self.seen += len(self._share) + len(bad)
        self.bad += len(bad)
        if bad and self.quarantine is not None:
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
            with open(self.quarantine, "a") as file:
                file.write("".join(json.dumps(asdict(clip)) + "\n" for clip in bad))
        if self.seen >= _FEWEST_SEEN and self.bad > self.max_bad_share * self.seen:
            where = f"they are listed in {self.quarantine}" if self.quarantine else f"the last: {bad[-1].message}"
            raise ShardError(
                f"{self.bad} of {self.seen} clips could not be read, more than max_bad_share {self.max_bad_share:g} allows; {where}. "
                "Check the data with `foleyscale prep verify`, or raise max_bad_share"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs, equal on all ranks; "sets" and the order's settings only serve to name a difference."""
        sets = [{"hash": each.hash, "clips": len(each), "shards": len(each.shards)} for each in self.sets]
        order = {"seed": self.order.seed, "window": self.order.window, "weights": self.order.weights and list(self.order.weights)}
        digest = hashlib.sha256("\n".join(each.hash for each in self.sets).encode()).hexdigest()
        return {"dataset": digest if len(sets) > 1 else sets[0]["hash"], "position": self.position, **order, "sets": sets}

    def load_state_dict(self, state: dict[str, Any], allow_data_change: bool = False) -> None:
        """Go on where `state` was taken; ValueError names what differs, as clips would then be seen twice or never.

        With allow_data_change the stream goes on at the same position of its own, different order.
        """
        differences = self._differences(state)
        if differences and not allow_data_change:
            raise ValueError(
                f"cannot resume the data stream: {'; '.join(differences)}. "
                f"Restore it, or allow the data to change: training goes on at position {state['position']} of the new order"
            )
        self.position = int(state["position"])

    def _differences(self, state: dict[str, Any]) -> list[str]:
        own, found = self.state_dict(), []
        if len(own["sets"]) != len(state["sets"]):
            found.append(f"there were {len(state['sets'])} data sets, now {len(own['sets'])}")
        for each, now, then in zip(self.sets, own["sets"], state["sets"], strict=False):
            if now["hash"] != then["hash"]:
                sizes = [f"{side['clips']} clips in {side['shards']} shards" for side in (then, now)]
                change = f"had {sizes[0]}, now {sizes[1]}" if sizes[0] != sizes[1] else f"has {sizes[1]} as before, but others"
                found.append(f"{each.url} {change}")
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
) -> Iterator[Batch]:
    """Each of the first `limit` clips once, in index order, with "shard" and "row"; rank r takes the r-th of W equal stretches.

    `batch_size` counts this rank's clips; the last batch may be shorter. Unreadable clips go to `on_bad` and are left out;
    without it the first one raises ShardError.
    """
    total = len(shards) if limit is None else min(limit, len(shards))
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    make = _PassBatches(_Reader([shards], decode, 0), np.cumsum(shards.counts), first, last, batch_size)
    for batch, bad in _load(make, -(-(last - first) // batch_size), workers, shards.is_local):
        for clip in bad:
            if on_bad is None:
                raise ShardError(clip.message, clip.shard, clip.key, clip.reason)
            on_bad(clip)
        if batch["key"]:
            yield batch


@dataclass
class _Reader:
    """Reads and decodes single clips; what a worker process gets."""

    sets: list[ShardSet]
    decode: Decode
    seed: int
    cache: DecodedCache | None = None

    def read(self, place: Place, position: int) -> Sample | BadClip:
        """The sample, or what is wrong with the clip. Other errors are no fault of one clip and get out."""
        shards, key = self.sets[place.dataset], ""
        try:
            entry = shards.entry(place.shard, place.row)
            key = entry.key
            random = np.random.Generator(np.random.Philox(mix(self.seed, _CROP, position)))
            return {"key": key, "position": position, **self._decode(shards, place, entry, random)}
        except (ShardError, ClipError) as error:
            return BadClip(shards.url, shards.shards[place.shard].name, key, error.reason, position, str(error))

    def _decode(self, shards: ShardSet, place: Place, entry: Any, random: np.random.Generator) -> Sample:
        names = getattr(self.decode, "members", None)
        media = self.cache and self.cache.get(place)
        if media is None and (self.cache is None or self.cache.full):
            return self.decode(shards.read_entry(entry, names), entry, random)
        if media is None:
            media = self.decode.whole(shards.read_entry(entry, names), entry)
            self.cache.add(place, media)
        return self.decode.crop(media, entry, random)


@dataclass
class _TrainingBatches:
    """Step -> this rank's part of the global batch."""

    reader: _Reader
    order: Order
    position: int
    batch_size: int
    share: range

    def __call__(self, step: int) -> tuple[Batch, list[BadClip]]:
        start, bad = self.position + step * self.batch_size, []
        return collate([self._sample(start + offset, bad) for offset in self.share]), bad

    def _sample(self, position: int, bad: list[BadClip]) -> Sample:
        place = self.order.locate(position)
        for attempt in range(_ATTEMPTS):
            sample = self.reader.read(place, position)
            if not isinstance(sample, BadClip):
                return sample
            bad.append(sample)
            place = self.order.replacement(position, attempt)
        raise ShardError(f"{_ATTEMPTS} clips in a row could not be read; the last: {bad[-1].message}")


@dataclass
class _PassBatches:
    """Step -> the clips of one stretch of the index order."""

    reader: _Reader
    ends: np.ndarray
    first: int
    last: int
    batch_size: int

    def __call__(self, step: int) -> tuple[Batch, list[BadClip]]:
        start = self.first + step * self.batch_size
        samples, bad = [], []
        for position in range(start, min(start + self.batch_size, self.last)):
            shard = int(np.searchsorted(self.ends, position, side="right"))
            row = position - int(self.ends[shard - 1] if shard else 0)
            sample = self.reader.read(Place(0, shard, row), position)
            if isinstance(sample, BadClip):
                bad.append(sample)
            else:
                samples.append({**sample, "shard": shard, "row": row})
        return collate(samples), bad


class _Steps(IterableDataset):
    """The steps of a loader: worker w of n makes the steps w, w + n, ..., which the loader takes in turn, so in order."""

    def __init__(self, make: Callable[[int], Any], steps: int | None):
        self._make, self._steps = make, steps

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, stride = (info.id, info.num_workers) if info else (0, 1)
        return map(self._make, itertools.count(first, stride) if self._steps is None else range(first, self._steps, stride))


def _load(make: Callable[[int], Any], steps: int | None, workers: int, local: bool) -> Iterator[Any]:
    dataset = _Steps(make, steps)
    if not workers:
        yield from dataset
        return
    batches = iter(
        DataLoader(
            dataset,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            # Connections and their threads do not survive a fork.
            multiprocessing_context=None if local else "forkserver",
            # A decoder that hangs stops the run with an error instead of holding all ranks for ever.
            timeout=_STUCK_SECONDS,
            # Its own generator: the loader would draw from the global one, and a restart would change what training draws.
            generator=torch.Generator(),
        )
    )
    try:
        yield from batches
    finally:
        # After an error the traceback holds the loader, and the garbage collector would wait seconds for each worker.
        batches._shutdown_workers()


def _as_it_is(item: Any) -> Any:
    return item


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of equal names to one batch: tensors are stacked, whole numbers become int64 tensors, the rest stays a list."""
    if not samples:
        return {"key": []}
    return {name: _collate_one(name, [sample[name] for sample in samples]) for name in samples[0]}


def _collate_one(name: str, values: list[Any]) -> Any:
    if isinstance(values[0], torch.Tensor):
        if shapes := {tuple(value.shape) for value in values} - {tuple(values[0].shape)}:
            raise ValueError(f"{name}: clips of one batch have shapes {tuple(values[0].shape)} and {min(shapes)}; fix them in the decoder "
                             "(seconds, size) or take batches of one")  # fmt: skip
        return torch.stack(values)
    if name in ("position", "shard", "row"):
        return torch.tensor(values, dtype=torch.int64)
    return values
