"""Clips of one source that are nearly the same recording, found in bounded memory however many clips there are."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np

from data_prep.digests import key_digest
from data_prep.manifest import LONGEST_KEY
from data_prep.transcoding.fingerprint import BYTES, similarity

_BUCKETS = 128
_IN_MEMORY = 1 << 20
"""Bytes of a bucket from which on it lies in a temporary file."""
_PACKED = struct.Struct(f"<Qd{LONGEST_KEY}s{BYTES}sq")
_RECORD = np.dtype([("source", "<u8"), ("start", "<f8"), ("key", f"S{LONGEST_KEY}"), ("print", "u1", BYTES), ("place", "<i8")])


class NearDuplicates:
    """Takes clips one by one and names in the end those that repeat an earlier one of their source.

    Of a source's clips the first by (start, key) stays, and each later one that is more than `limit` alike to none that stays.
    The clips are dealt by source to buckets, which spill to temporary files; each is small enough to be sorted alone.
    """

    def __init__(self, limit: float):
        self._limit = limit
        with ExitStack() as stack:
            self._buckets = [stack.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY)) for _ in range(_BUCKETS)]
            self._stack = stack.pop_all()

    def __enter__(self) -> NearDuplicates:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, source: str, start: float, key: str, fingerprint: bytes, place: int) -> None:
        """Note a clip; `place` is what it is called in the end."""
        number = int.from_bytes(key_digest(source)[:8], "little")
        self._buckets[number % _BUCKETS].write(_PACKED.pack(number, start, key.encode(), fingerprint, place))

    def repeated(self) -> Iterator[int]:
        """The places of the clips to drop."""
        for bucket in self._buckets:
            bucket.seek(0)
            clips = np.frombuffer(bucket.read(), _RECORD)
            clips = clips[np.lexsort((clips["key"], clips["start"], clips["source"]))]
            bounds = np.flatnonzero(clips["source"][1:] != clips["source"][:-1]) + 1
            for clips_of_one in np.split(clips, bounds):
                yield from self._in_source(clips_of_one)

    def _in_source(self, clips: np.ndarray) -> Iterator[int]:
        staying: list[bytes] = []
        for clip in clips:
            own = clip["print"].tobytes()
            if any(similarity(own, other) > self._limit for other in staying):
                yield int(clip["place"])
            else:
                staying.append(own)
