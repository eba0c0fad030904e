"""Records too many for memory, dealt to buckets that are each small enough to be worked on alone."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

_IN_MEMORY = 1 << 20
"""Bytes of a bucket from which on it lies in a temporary file."""


class Buckets:
    """Takes records of bytes one by one, by number; iterating gives the bytes of each bucket."""

    def __init__(self, count: int):
        with contextlib.ExitStack() as stack:
            self._files = [stack.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY)) for _ in range(count)]
            self._stack = stack.pop_all()

    def add(self, number: int, record: bytes) -> None:
        """Put a record into the bucket that `number`, modulo their count, names."""
        self._files[number % len(self._files)].write(record)

    def __iter__(self) -> Iterator[bytes]:
        for file in self._files:
            file.seek(0)
            yield file.read()

    def close(self) -> None:
        """Let go of the records."""
        self._stack.close()
