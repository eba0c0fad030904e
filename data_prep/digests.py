"""Digests of tables too long for memory: of their contents, and of their keys, with the keys that come twice."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.buckets import Buckets

_BYTES = 16
_BUCKETS = 64


def key_digest(key: str) -> bytes:
    """Sixteen bytes that stand for a key: among 10^9 keys two that agree by chance are not to be expected."""
    return hashlib.blake2b(key.encode(), digest_size=_BYTES).digest()


def keys_digest(keys: Iterable[str]) -> str:
    """The sum of the keys' digests modulo 2^128, as hexadecimal: equal for equal multisets, in any order."""
    return hex_digest(keys_total(keys))


def keys_total(keys: Iterable[str]) -> int:
    """The sum of the keys' digests: those of parts add up, and `hex_digest` makes the digest of all of it."""
    return sum(int.from_bytes(key_digest(key), "big") for key in keys)


def hex_digest(total: int) -> str:
    """A sum of key digests as hexadecimal."""
    return f"{total % (1 << 8 * _BYTES):0{2 * _BYTES}x}"


class KeyLedger:
    """Takes keys one by one and tells in the end which came more than once, in a few megabytes of memory."""

    def __init__(self):
        self._buckets = Buckets(_BUCKETS)
        self._sum = self._count = 0

    def __enter__(self) -> KeyLedger:
        return self

    def __exit__(self, *_: object) -> None:
        self._buckets.close()

    def __len__(self) -> int:
        return self._count

    @property
    def digest(self) -> str:
        """`keys_digest` of the keys so far."""
        return hex_digest(self._sum)

    def add(self, key: str) -> None:
        """Note a key."""
        value = key_digest(key)
        self._buckets.add(value[0], value)
        self._sum += int.from_bytes(value, "big")
        self._count += 1

    def repeated(self) -> set[bytes]:
        """Digests of the keys that were added more than once."""
        found: set[bytes] = set()
        for bucket in self._buckets:
            values = np.sort(np.frombuffer(bucket, dtype=f"S{_BYTES}"))
            found.update(value.ljust(_BYTES, b"\0") for value in values[1:][values[1:] == values[:-1]].tolist())
        return found


class ContentHash:
    """SHA-256 of a table that comes in pieces: the same however it is cut."""

    def __init__(self):
        self._digests: dict[str, Any] = {}

    def update(self, table: pa.Table) -> None:
        """Take the next rows."""
        for name, column in zip(table.column_names, table.columns, strict=True):
            for chunk in column.chunks:
                self._feed(name, chunk)

    def _feed(self, name: str, values: pa.Array) -> None:
        # Lengths and contents go to digests of their own: which bytes belong to which row is told by both together.
        if pa.types.is_list(values.type):
            self._numbers(f"{name}.lengths", pc.list_value_length(values))
            self._feed(f"{name}.items", values.flatten())
        elif pa.types.is_string(values.type):
            self._numbers(f"{name}.lengths", pc.fill_null(pc.binary_length(values), -1))
            self._digest(f"{name}.bytes").update(_text(values))
        else:
            self._numbers(name, pc.fill_null(values, math.nan))

    def _numbers(self, name: str, values: pa.Array) -> None:
        self._digest(name).update(values.to_numpy(zero_copy_only=False).tobytes())

    def _digest(self, name: str) -> Any:
        return self._digests.setdefault(name, hashlib.sha256())

    def hexdigest(self) -> str:
        """The hash of all rows so far."""
        parts = (f"{name} {part.hexdigest()}" for name, part in sorted(self._digests.items()))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _text(values: pa.StringArray) -> memoryview:
    """The characters of all values, one after the other, as they lie in memory."""
    _, offsets, data = values.buffers()
    if data is None:
        return memoryview(b"")
    bounds = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
    return memoryview(data)[bounds[0] : bounds[-1]]
