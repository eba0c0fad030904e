"""The sidecar of one shard: its rows in memory, its hash, and byte ranges of the tar beside it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.shards import CORE_COLUMNS
from data_prep.storage import Folder, parse_parquet, read_descriptor


class ShardError(RuntimeError):
    """A shard, or bytes of it, that is missing or not what its sidecar says; `reason` is a short slug for the quarantine."""

    def __init__(self, message: str, shard: str = "", key: str = "", reason: str = "bad_shard"):
        super().__init__(message)
        self.shard, self.key, self.reason = shard, key, reason


class Member(NamedTuple):
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

    def __init__(self, layer: int, shard: str, table: pa.Table):
        good = table.filter(pc.equal(table["status"], "ok")).combine_chunks()
        self.shard, self._layer, self.keys = shard, layer, good["key"].to_pylist()
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
        offsets, sizes, checksums = self._places
        span = range(self._first[row], self._first[row + 1])
        return {self._names[i]: Member(offsets[i], sizes[i], checksums[i], self._layer) for i in span}

    def columns(self, row: int) -> Columns:
        """What the sidecar says beside key, status and members."""
        return Columns(self, row)

    @cached_property
    def values(self) -> dict[str, list[Any]]:
        """Column -> its values."""
        # All rows at once: Arrow takes longer to hand out one value than to hand out a hundred.
        return {name: column.to_pylist() for name, column in zip(self._rest.column_names, self._rest.columns, strict=True)}


class Columns(Mapping[str, Any]):
    """The other columns of one row, looked up when asked for: most readers want one or two of twenty."""

    __slots__ = ("_row", "_sidecar")

    def __init__(self, sidecar: Sidecar, row: int):
        self._sidecar, self._row = sidecar, row

    def __getitem__(self, name: str) -> Any:
        return self._sidecar.values[name][self._row]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sidecar.values)

    def __len__(self) -> int:
        return len(self._sidecar.values)


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

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)
