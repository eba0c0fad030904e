"""Single clips from shards to tensors, and the stacking of several: what a worker process does."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, MutableSequence, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from data_prep.decoding import DecodedCache, Random, Sample
from data_prep.index import Entry, ShardError, ShardSet
from data_prep.media import ClipError
from data_prep.order import Place, mix

Batch = dict[str, Any]
Raw = dict[str, bytes]
Fetched = dict[Place, tuple[Entry, Raw | ShardError]]
Decode = Callable[..., Sample]
TIMEOUT, CRASHED = "timeout", "crashed"
"""Reasons of clips that cost a worker process."""

_CONNECTIONS = 8
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


class Name(NamedTuple):
    """What a clip is called, whatever the order of the shards."""

    url: str
    shard: str
    key: str


class Note:
    """What a reader is busy with, in memory that another process may look into when this one hangs or is gone."""

    SIZE = 5
    """Numbers it takes: data set, shard, row, and since when the clip is being read and decoded."""

    def __init__(self, memory: MutableSequence[float] | None = None):
        self._memory = [0.0] * self.SIZE if memory is None else memory

    def begin(self, place: Place) -> None:
        """A clip is being read since now."""
        self._memory[:3] = place
        self._memory[3] = time.monotonic()

    def decode(self) -> None:
        """Its bytes are there; it is being decoded since now."""
        self._memory[4] = time.monotonic()

    def end(self) -> None:
        """No clip is in work."""
        self._memory[4] = 0.0  # first: it must never stand beside another clip
        self._memory[3] = 0.0

    @property
    def place(self) -> Place | None:
        """The clip in work."""
        return Place(*map(int, self._memory[:3])) if self.reading else None

    @property
    def reading(self) -> float:
        """Seconds (time.monotonic) since when the clip is in work; 0 where none is."""
        return self._memory[3]

    @property
    def decoding(self) -> float:
        """Seconds (time.monotonic) since when it is being decoded; 0 where it is not."""
        return self._memory[4]


@dataclass
class ClipReader:
    """Reads and decodes clips of several sets; `condemned` are those never to be decoded, with reason and message."""

    sets: list[ShardSet]
    decode: Decode
    seed: int = 0
    condemned: dict[Name, tuple[str, str]] = field(default_factory=dict)
    cache: DecodedCache | None = None
    note: Note = field(default_factory=Note)
    _fetched: Fetched = field(default_factory=dict, init=False, repr=False)
    _ahead: tuple[Sequence[Place], Future[Fetched]] | None = field(default=None, init=False, repr=False)

    @property
    def is_distant(self) -> bool:
        """Whether it pays to read ahead. Locally it does not: another thread and the memory of a second batch cost more than they save."""
        return not all(each.is_local for each in self.sets)

    def fetch(self, places: Sequence[Place]) -> None:
        """Read the bytes of these clips in one go, but for those in the cache; `read` takes them from there."""
        (expected, future), self._ahead = self._ahead or ((), None), None
        if places:
            self.note.begin(places[0])  # where storage hangs, one of them tells where
        try:
            self._fetched = future.result() if future and expected == places else self._fetch(places)
        finally:
            self.note.end()

    def fetch_ahead(self, places: Sequence[Place]) -> None:
        """Begin to read the bytes of these clips, while others are decoded; a `fetch` of the same places finds them read."""
        self._ahead = places, _reader_ahead().submit(self._fetch, places)

    def _fetch(self, places: Sequence[Place]) -> Fetched:
        wanted = [place for place in places if not (self.cache and self.cache.get(place))]
        if len(wanted) < 2 and not self.is_distant:  # alone it is read no faster here than by `read`
            return {}
        found: Fetched = {}
        for number in {place.dataset for place in wanted}:
            shards = self.sets[number]
            entries = _entries(shards, [place for place in wanted if place.dataset == number])
            raws = shards.read_many([*entries.values()], self._members())
            found |= {place: (entry, raw) for (place, entry), raw in zip(entries.items(), raws, strict=True)}
        return found

    def read(self, place: Place, position: int) -> Sample | BadClip:
        """The sample, or what is wrong with the clip. Other errors are no fault of one clip and get out."""
        shards, key = self.sets[place.dataset], ""
        self.note.begin(place)
        try:
            entry, raw = self._fetched.pop(place, None) or (shards.entry(place.shard, place.row), None)
            key = entry.key
            if self.condemned and (verdict := self.condemned.get(Name(shards.url, entry.shard, key))):
                return BadClip(shards.url, entry.shard, key, verdict[0], position, verdict[1])
            return {"key": key, "position": position, **self._decode(place, entry, raw, partial(_generator, self.seed, position))}
        except (ShardError, ClipError) as error:
            return BadClip(shards.url, shards.shards.name(place.shard), key, error.reason, position, str(error))
        finally:
            self.note.end()

    def name(self, place: Place) -> Name:
        """What the clip at `place` is called."""
        shards = self.sets[place.dataset]
        entry = shards.entry(place.shard, place.row)
        return Name(shards.url, entry.shard, entry.key)

    def _members(self) -> tuple[str, ...] | None:
        return getattr(self.decode, "members", None)

    def _bytes(self, place: Place, entry: Entry, fetched: Raw | ShardError | None) -> Raw:
        if isinstance(fetched, ShardError):
            raise fetched
        return self.sets[place.dataset].read_entry(entry, self._members()) if fetched is None else fetched

    def _decode(self, place: Place, entry: Entry, fetched: Raw | ShardError | None, random: Random) -> Sample:
        media = self.cache and self.cache.get(place)
        raw = None if media is not None else self._bytes(place, entry, fetched)
        self.note.decode()
        if media is None and (self.cache is None or self.cache.full):
            return self.decode(raw, entry, random)
        if media is None:
            media = self.decode.whole(raw, entry)
            self.cache.add(place, media)
        return self.decode.crop(media, entry, random)


def _generator(seed: int, position: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(mix(seed, _CROP, position)))


def _entries(shards: ShardSet, places: Sequence[Place]) -> dict[Place, Entry]:
    """Those that have one; what is wrong with the others, `read` finds again."""
    if not shards.is_local:  # sidecars that are not at hand come at once, not one after the other
        list(_threads().map(partial(_load, shards), {place.shard for place in places}))
    entries = {}
    for place in places:
        try:
            entries[place] = shards.entry(place.shard, place.row)
        except ShardError:
            continue
    return entries


def _load(shards: ShardSet, shard: int) -> None:
    with contextlib.suppress(ShardError):
        shards.load(shard)


@cache
def _threads() -> ThreadPoolExecutor:
    """One pool per process, made when it is first needed: neither it nor the connections of its threads survive a fork."""
    return ThreadPoolExecutor(_CONNECTIONS)


@cache
def _reader_ahead() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1)


os.register_at_fork(after_in_child=_reader_ahead.cache_clear)  # threads do not survive a fork


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
        return torch.from_numpy(np.array(values, np.int64))  # a sixth of what torch.tensor takes
    return values
