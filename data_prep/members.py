"""The members of clips, read from the tars of one folder: local or remote, through a cache on disk or without."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from data_prep.checksum import crc32
from data_prep.remote.disk_cache import DiskCache
from data_prep.sidecar import Member, TarRanges
from data_prep.storage import Folder


class MemberReader:
    """Reads by pread from local tars, of which `open_tars` stay open, and from a store in as few requests as it takes."""

    def __init__(self, tars: Folder, open_tars: int, cache: DiskCache | None):
        self._tars, self._cache = tars, cache
        self._tar = lru_cache(open_tars)(lambda shard: TarRanges(tars, shard))

    def read(self, wanted: Sequence[tuple[str, Member]]) -> list[bytes | OSError]:
        """The bytes of (shard, member), fewer where the tar ends before. In their place, of a local tar, the error that came.

        An error of a store gets out: it is gone, not this clip.
        """
        if self._tars.is_local:
            return [self._local(shard, member) for shard, member in wanted]
        kept = [self._kept(shard, member) for shard, member in wanted]
        missing = [pair for pair, data in zip(wanted, kept, strict=True) if data is None]
        ranges = [(f"{shard}.tar", member.offset, member.offset + member.size) for shard, member in missing]
        fetched = dict(zip(missing, self._tars.read_ranges(ranges), strict=True)) if missing else {}
        for (shard, member), data in fetched.items():
            self._keep(shard, member, data)
        return [fetched[pair] if data is None else data for pair, data in zip(wanted, kept, strict=True)]

    def _local(self, shard: str, member: Member) -> bytes | OSError:
        try:
            return self._tar(shard).read(member.offset, member.offset + member.size)
        except OSError as error:
            return error

    def _kept(self, shard: str, member: Member) -> bytes | None:
        if self._cache is None:
            return None
        data = self._cache.read(self._tars.url, f"{shard}.tar", member.offset, member.offset + member.size)
        return data if len(data) == member.size and crc32(data) == member.crc32 else None

    def _keep(self, shard: str, member: Member, data: bytes) -> None:
        if self._cache is not None and len(data) == member.size and crc32(data) == member.crc32:
            self._cache.add(self._tars.url, f"{shard}.tar", member.offset, data)
