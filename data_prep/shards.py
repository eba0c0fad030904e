"""Write one shard: a plain tar that any WebDataset reader streams, and the Parquet sidecar that says where each member lies."""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.checksum import crc32
from data_prep.storage import Folder, StagedFile

KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
SHARD_PATTERN = re.compile(r"shard-\d{6,}")
_MEMBER_PATTERN = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")

BLOCK = 512
_RECORD = 20 * BLOCK
_PADDING = bytes(BLOCK)
_LONGEST_NAME = 100
_LARGEST_MEMBER = 8**11 - 1

CORE_COLUMNS = {
    "key": pa.string(),
    "status": pa.string(),
    "reason": pa.string(),
    "split": pa.string(),
    "members": pa.list_(
        pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("crc32", pa.uint32())])
    ),
}

CLIP_COLUMNS = {
    "dataset": pa.string(),
    "source": pa.string(),
    "start": pa.float64(),
    "end": pa.float64(),
    "labels": pa.list_(pa.string()),
    "caption": pa.string(),
    "extra": pa.string(),
    "duration": pa.float64(),
    "fps": pa.float64(),
    "width": pa.int32(),
    "height": pa.int32(),
    "sample_rate": pa.int32(),
    "channels": pa.int32(),
    "loudness": pa.float64(),
    "peak": pa.float64(),
    "silence": pa.float64(),
    "av_offset": pa.float64(),
    "motion": pa.float64(),
    "lost": pa.float64(),
    "source_fps": pa.float64(),
    "source_side": pa.int32(),
    "fingerprint": pa.binary(),
    "message": pa.string(),
}
"""Types of the usual extra columns: without them a shard whose values are all missing would get another type than its neighbours."""


def shard_name(number: int) -> str:
    """The name of shard `number`, without extension."""
    return f"shard-{number:06d}"


class ShardWriter:
    """Writes shard `number` of `url` (a local folder or an fsspec URL); every row belongs to `split`.

    Leaving the `with` block without an error shows the tar, then the sidecar: a shard exists if and only if its sidecar does.
    The bytes depend on the rows alone, so tasks that write one shard at the same time leave the same shard.
    """

    def __init__(self, url: str | os.PathLike[str], number: int, split: str = "train"):
        self.name = shard_name(number)
        self._folder, self._split = Folder(url), split
        self._rows: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        self.bytes = 0

    def __enter__(self) -> ShardWriter:
        self._stack = contextlib.ExitStack()
        self._tar = self._stack.enter_context(StagedFile(self._folder, f"{self.name}.tar"))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is None:
                self._commit()

    def add(self, key: str, members: dict[str, bytes], **columns: Any) -> None:
        """Append one good clip; `members` maps extensions ("mp4", "latent_mean.npy") to contents."""
        if not members:
            raise ValueError(f"{self.name}: key {key!r} has no members; record a clip without data with skip()")
        headers = [tar_header(f"{key}.{name}", len(data)) for name, data in members.items()]
        self._append(key, "ok", None, columns)
        places, pieces = self._rows[-1]["members"], []
        for header, (name, data) in zip(headers, members.items(), strict=True):
            padding = _PADDING[: -len(data) % BLOCK]
            places.append({"name": name, "offset": self.bytes + BLOCK, "size": len(data), "crc32": crc32(data)})
            pieces += (header, data, padding)
            self.bytes += BLOCK + len(data) + len(padding)
        self._tar.append(pieces)

    def skip(self, key: str, status: str, reason: str, **columns: Any) -> None:
        """Record a clip that has no data: status "dropped" (a filter said no) or "failed" (it could not be made), and why."""
        if status not in ("dropped", "failed"):
            raise ValueError(f"{self.name}: status of {key!r} must be 'dropped' or 'failed', not {status!r}")
        if not reason:
            raise ValueError(f"{self.name}: {key!r} is {status} without a reason; give one")
        self._append(key, status, reason, columns)

    def _append(self, key: str, status: str, reason: str | None, columns: dict[str, Any]) -> None:
        if not KEY_PATTERN.fullmatch(key):
            raise ValueError(f"{self.name}: key {key!r} may hold only letters, digits, '-' and '_'; make it with make_key()")
        if key in self._keys:
            raise ValueError(f"{self.name}: key {key!r} is given twice; keys must be unique")
        if taken := CORE_COLUMNS.keys() & columns.keys():
            raise ValueError(f"{self.name}: column {min(taken)!r} is the shard's own; choose another name")
        self._keys.add(key)
        self._rows.append({**columns, "key": key, "status": status, "reason": reason, "split": self._split, "members": []})

    def _commit(self) -> None:
        self._tar.append([bytes(2 * BLOCK + -(self.bytes + 2 * BLOCK) % _RECORD)])
        sidecar, name = self._sidecar(), f"{self.name}.parquet"
        with contextlib.suppress(FileNotFoundError):
            # A sidecar of other contents must not stand beside the new tar, not even if this process dies between the two.
            if self._folder.read(name) != sidecar:
                self._folder.remove(name)
        self._tar.publish()
        self._folder.write(name, sidecar)
        if not self._tar.stands():
            # Another task made the shard in between, and its clips fared differently: this sidecar must not stand beside that tar.
            self._folder.remove(name)
            raise OSError(f"{self._folder.url}/{self.name}: another task wrote it at the same time with other outcomes; run again")

    def _sidecar(self) -> bytes:
        extra = {name for row in self._rows for name in row} - CORE_COLUMNS.keys()
        ordered = [*CORE_COLUMNS, *(name for name in CLIP_COLUMNS if name in extra), *sorted(extra - CLIP_COLUMNS.keys())]
        table = pa.table({name: self._column(name) for name in ordered})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue().to_pybytes()

    def _column(self, name: str) -> pa.Array:
        try:
            return pa.array([row.get(name) for row in self._rows], type=(CORE_COLUMNS | CLIP_COLUMNS).get(name))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"{self.name}: column {name!r} holds values of the wrong type: {error}") from error


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte ustar header of a plain file, free of times and owners: equal contents give equal bytes.

    Written by hand because tarfile's TarInfo takes longer than writing the member itself.
    """
    if not _MEMBER_PATTERN.fullmatch(name):
        raise ValueError(f"member name {name!r} may hold only letters, digits, '-', '_' and single dots between them")
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"member name {name!r} has {len(name)} characters, a tar takes {_LONGEST_NAME}; shorten the key")
    if size > _LARGEST_MEMBER:
        raise ValueError(f"member {name!r} has {size} bytes, a tar takes {_LARGEST_MEMBER}; cut the clip shorter")
    encoded, digits = name.encode("ascii"), b"%011o" % size
    checksum = _CHECKSUM + sum(encoded) + sum(digits)
    return b"".join((encoded.ljust(100, b"\0"), _OWNERS, digits, _TIME, b"%06o\0 " % checksum, _REST))


_OWNERS = b"0000644\0" + b"0000000\0" * 2  # mode, user, group
_TIME = b"\0" + b"00000000000\0"  # the size's end, time
_REST = b"".join((
    b"0" + bytes(100),  # a regular file, no link
    b"ustar\00000" + bytes(64),  # magic and version, names of user and group
    b"0000000\0" * 2 + bytes(155 + 12),  # device numbers, name prefix, padding
))  # fmt: skip
_CHECKSUM = sum(_OWNERS + _TIME + b" " * 8 + _REST)
"""Of a header without name and size."""
