"""Walk through one tar and compare each of its bytes with what the sidecar, and the format, say is there."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

import pyarrow as pa

from data_prep.checksum import crc32
from data_prep.shards import BLOCK, tar_header
from data_prep.sidecar import Member, TarRanges

_PIECE = 4 << 20
"""Bytes read at a time, by each thread."""
_RECORD = 20 * BLOCK


def tar_problems(tar: TarRanges, size: int, table: pa.Table) -> Iterator[str]:
    """What is wrong with a tar of `size` bytes beside the sidecar `table`: headers, contents, padding, order, and its end."""
    members, pieces, position = list(_members(table)), _Pieces(tar, size), 0
    end = max((_end(member) for _, member in members), default=0)
    whole = end + 2 * BLOCK + -(end + 2 * BLOCK) % _RECORD
    if size < whole:
        lost = [name for name, member in members if _end(member) > size]
        cut = f": {lost[0]} and {len(lost) - 1} members after it are not whole" if lost else ", within the end of the archive"
        yield f"cut short at {size} of {whole} bytes{cut}"
    for name, member in members:
        if member.offset != position + BLOCK:
            yield f"{name}: lies at byte {member.offset} by the sidecar, but the members before it end at {position}"
        elif _end(member) <= size and (wrong := _member_problem(name, member, pieces)):
            yield f"{name}: {wrong}"
        position = max(position, _end(member))
    if not pieces.zero(min(position, size), min(whole, size)):
        yield "the end of the archive is not empty: members that the sidecar does not list, or damage"
    if size > whole:
        yield f"goes on for {size - whole} bytes after the end of the archive"


def _members(table: pa.Table) -> Iterator[tuple[str, Member]]:
    for key, members in zip(table["key"].to_pylist(), table["members"].to_pylist(), strict=True):
        for member in members:
            yield f"{key}.{member['name']}", Member(member["offset"], member["size"], member["crc32"])


def _end(member: Member) -> int:
    return member.offset + member.size + -member.size % BLOCK


def _member_problem(name: str, member: Member, pieces: _Pieces) -> str | None:
    stop = member.offset + member.size
    try:
        expected = tar_header(name, member.size)
    except ValueError as error:
        return f"the sidecar names what no shard holds ({error})"
    if (header := pieces.read(member.offset - BLOCK, member.offset)) != expected:
        return _header_problem(name, header, member.size)
    checksum = 0
    for part in pieces.parts(member.offset, stop):
        checksum = crc32(part, checksum)
    if checksum != member.crc32:
        return "damaged: its crc32 is not the sidecar's"
    return None if pieces.zero(stop, _end(member)) else "the padding after it is not empty"


def _header_problem(name: str, header: bytes, size: int) -> str:
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"bad tar header ({error})"
    if (found.name, found.size) != (name, size):
        return f"the tar header says {found.name} of {found.size} bytes, the sidecar {size}"
    return "the tar header is not as it was written"


class _Pieces:
    """The bytes of a tar by range; whoever goes on where he was reads the file in large pieces, once."""

    def __init__(self, tar: TarRanges, size: int):
        self._tar, self._size = tar, size
        self._start, self._data = 0, memoryview(b"")

    def parts(self, start: int, stop: int) -> Iterator[memoryview]:
        """Bytes [start, stop), as they come; fewer where the file ends before."""
        while start < stop:
            if not self._start <= start < self._start + len(self._data):
                self._start, self._data = start, memoryview(self._tar.read(start, min(start + _PIECE, self._size)))
                if not self._data:
                    return  # the file became shorter in the meantime
            part = self._data[start - self._start : stop - self._start]
            start += len(part)
            yield part

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop)."""
        return b"".join(self.parts(start, stop))

    def zero(self, start: int, stop: int) -> bool:
        """Whether all bytes of [start, stop) are 0."""
        return self.read(start, stop) == bytes(stop - start)
