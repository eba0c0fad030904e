"""The members of clips, read from the tars of one folder and checked: local or remote, through a cache on disk or without."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import NamedTuple

from data_prep.checksum import crc32
from data_prep.remote.disk_cache import DiskCache
from data_prep.sidecar import Member, TarRanges
from data_prep.storage import Folder

_ALONE = 1 << 20
"""Bytes below which a second thread would take longer to wake than it saves."""


class Wanted(NamedTuple):
    """A member to read: its shard, its name in the clip, and where it lies."""

    shard: str
    name: str
    member: Member


class Fault(NamedTuple):
    """What is wrong with a member: a short slug for the quarantine, and words that go on after "clip KEY"."""

    reason: str
    words: str


class MemberReader:
    """Reads by pread from local tars, of which `open_tars` stay open, and from a store in as few requests as it takes."""

    def __init__(self, tars: Folder, open_tars: int, cache: DiskCache | None):
        self._tars, self._cache = tars, cache
        self._tar = lru_cache(open_tars)(lambda shard: TarRanges(tars, shard))

    def read(self, wanted: Sequence[Wanted]) -> list[bytes | Fault]:
        """The bytes of each member, whose checksum is right, or what is wrong with it.

        Of a local tar that includes an error in reading it. One of a store gets out: it is gone, not this clip.
        """
        if not self._tars.is_local:
            return self._remote(wanted)
        found: list[bytes | Fault] = [b""] * len(wanted)
        turns = enumerate(wanted)
        if len(wanted) < 2 or sum(each.member.size for each in wanted) < _ALONE:
            self._local(turns, found)
        else:
            # Copies out of the page cache and checksums run outside Python's lock: two threads take half the time. Each takes the next
            # member when it is done with one, so that no half of a batch waits for a thread that the processors have no time for.
            helper = _helper().submit(self._local, turns, found)
            self._local(turns, found)
            if not helper.cancel():
                helper.result()
        return found

    def _local(self, turns: Iterator[tuple[int, Wanted]], found: list[bytes | Fault]) -> None:
        for number, (shard, name, member) in turns:
            try:
                data = self._tar(shard).read(member.offset, member.offset + member.size)
                found[number] = data if _intact(member, data) else _fault(name, member, data)
            except OSError as error:
                found[number] = Fault("unreadable", f"cannot be read: {error.strerror}")

    def _remote(self, wanted: Sequence[Wanted]) -> list[bytes | Fault]:
        kept = [self._kept(*each) for each in wanted]
        missing = [each for each, data in zip(wanted, kept, strict=True) if data is None]
        ranges = [(f"{shard}.tar", member.offset, member.offset + member.size) for shard, _, member in missing]
        fetched = dict(zip(missing, self._tars.read_ranges(ranges), strict=True)) if missing else {}
        checked = {each: self._checked(*each, data) for each, data in fetched.items()}
        return [checked[each] if data is None else data for each, data in zip(wanted, kept, strict=True)]

    def _kept(self, shard: str, name: str, member: Member) -> bytes | None:
        if self._cache is None:
            return None
        data = self._cache.read(self._tars.url, f"{shard}.tar", member.offset, member.offset + member.size)
        return data if _intact(member, data) else None

    def _checked(self, shard: str, name: str, member: Member, data: bytes) -> bytes | Fault:
        if not _intact(member, data):
            return _fault(name, member, data)
        if self._cache is not None:
            self._cache.add(self._tars.url, f"{shard}.tar", member.offset, data)
        return data


def _intact(member: Member, data: bytes) -> bool:
    return len(data) == member.size and crc32(data) == member.crc32


def _fault(name: str, member: Member, data: bytes) -> Fault:
    if len(data) < member.size:
        return Fault("truncated", f"ends after {len(data)} of the {member.size} bytes of {name}")
    return Fault("bad_crc", f"has a damaged {name}: its crc32 is not the sidecar's")


@cache
def _helper() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1)


os.register_at_fork(after_in_child=_helper.cache_clear)  # threads do not survive a fork
