"""The sidecar of one shard: its rows in memory, its hash, and byte ranges of the tar beside it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.shards import CORE_COLUMNS
from data_prep.storage import Folder, parse_parquet, read_descriptor


class ShardError(RuntimeError):
    """A shard, or bytes of it, that is missing or not what its sidecar says; `reason` is a short slug for the quarantine."""

    def __init__(self, message: str, shard: str = "", key: str = "", reason: str = "bad_shard"):
        super().__init__(message)
        self.shard, self.key, self.reason = shard, key, reason


@dataclass(frozen=True, slots=True)
class Member:
    """Where one file of a clip lies: offset of its data in the tar, size in bytes, checksum, and the layer whose tar it is."""

    offset: int
    size: int
    crc32: int
    layer: int = 0


def read_sidecar(folder: Folder, shard: str) -> pa.Table:
    """All rows of a shard; ShardError where the file is not a sidecar."""
    return parse_sidecar(folder.read(f"{shard}.parquet"), f"{folder.url}/{shard}.parquet")


def parse_sidecar(data: bytes, place: str) -> pa.Table:
    """The rows in the bytes of a sidecar; ShardError naming its `place` where they are not one."""
    try:
        # One thread: Arrow's pool does not survive a fork into a worker process.
        table = parse_parquet(data)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardError(f"{place}: not a readable sidecar ({error}); remove it and write the shard again") from None
    if missing := CORE_COLUMNS.keys() - set(table.column_names):
        raise ShardError(f"{place}: lacks the column {min(missing)!r}; remove it and write the shard again")
    return table


def sidecar_hash(table: pa.Table) -> str:
    """sha256 over keys, status, and every member's name, offset, size and crc32: equal for equal contents, whatever wrote the file."""
    lists = pa.concat_arrays(table["members"].cast(CORE_COLUMNS["members"]).chunks or [pa.array([], CORE_COLUMNS["members"])])
    members = lists.flatten()
    digest = hashlib.sha256()
    for texts in (table["key"], table["status"], members.field("name")):
        digest.update("\n".join(texts.to_pylist()).encode() + b"\0")
    for numbers in (pc.list_value_length(lists), *(members.field(name) for name in ("offset", "size", "crc32"))):
        digest.update(numbers.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()


class Sidecar:
    """The good rows of one shard, by row and by key."""

    def __init__(self, layer: int, table: pa.Table):
        good = table.filter(pc.equal(table["status"], "ok")).combine_chunks()
        self._layer, self.keys = layer, good["key"].to_pylist()
        lists = pa.concat_arrays(good["members"].chunks) if len(good) else pa.array([], CORE_COLUMNS["members"])
        self._first = lists.offsets.to_pylist()
        self._names = lists.values.field("name").to_pylist()
        self._places = [lists.values.field(name).to_pylist() for name in ("offset", "size", "crc32")]
        self._rest = good.select([name for name in good.column_names if name not in CORE_COLUMNS])

    @cached_property
    def rows(self) -> dict[str, int]:
        """Key -> row."""
        return {key: row for row, key in enumerate(self.keys)}

    def members(self, row: int) -> dict[str, Member]:
        """The clip's files by extension."""
        span = range(self._first[row], self._first[row + 1])
        return {self._names[i]: Member(*(place[i] for place in self._places), self._layer) for i in span}

    def columns(self, row: int) -> dict[str, Any]:
        """What the sidecar says beside key, status and members."""
        return {name: values[row] for name, values in self._values.items()}

    @cached_property
    def _values(self) -> dict[str, list[Any]]:
        # All rows at once: Arrow takes longer to hand out one value than to hand out a hundred.
        return {name: column.to_pylist() for name, column in zip(self._rest.column_names, self._rest.columns, strict=True)}


class TarRanges:
    """Byte ranges of one tar: pread on a descriptor kept open where the file is local, range requests where it is not."""

    def __init__(self, folder: Folder, shard: str):
        self._folder, self._name = folder, f"{shard}.tar"
        # pread has no file position to share, so a descriptor opened before a fork serves both sides.
        self._descriptor = os.open(folder.path(self._name), os.O_RDONLY) if folder.is_local else None

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer where the file ends before."""
        if self._descriptor is None:
            return self._folder.read_range(self._name, start, stop)
        return read_descriptor(self._descriptor, start, stop)

    def read_all(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several ranges of one clip: they lie side by side, so one request takes them all where the file is remote."""
        if self._descriptor is not None:
            return [self.read(start, stop) for start, stop in ranges]
        first = min(start for start, _ in ranges)
        data = self.read(first, max(stop for _, stop in ranges))
        return [data[start - first : stop - first] for start, stop in ranges]

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)
