"""Clips of one source that are nearly the same recording, found in bounded memory however many clips there are."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from data_prep.buckets import Buckets
from data_prep.digests import key_digest
from data_prep.manifest import LONGEST_KEY
from data_prep.transcoding.fingerprint import BYTES, similarity

_BUCKETS = 128
_PACKED = struct.Struct(f"<Qd{LONGEST_KEY}s{BYTES}sq")
_RECORD = np.dtype([("source", "<u8"), ("start", "<f8"), ("key", f"S{LONGEST_KEY}"), ("print", "u1", BYTES), ("place", "<i8")])


class NearDuplicates:
    """Takes clips one by one and names in the end those that repeat an earlier one of their source.

    Of a source's clips the first by (start, key) stays, and each later one that is more than `limit` alike to none that stays.
    The clips are dealt to buckets by source.
    """

    def __init__(self, limit: float):
        self._limit = limit
        self._buckets = Buckets(_BUCKETS)

    def __enter__(self) -> NearDuplicates:
        return self

    def __exit__(self, *_: object) -> None:
        self._buckets.close()

    def add(self, source: str, start: float, key: str, fingerprint: bytes, place: int) -> None:
        """Note a clip; `place` is what it is called in the end."""
        number = int.from_bytes(key_digest(source)[:8], "little")
        self._buckets.add(number, _PACKED.pack(number, start, key.encode(), fingerprint, place))

    def repeated(self) -> Iterator[int]:
        """The places of the clips to drop."""
        for bucket in self._buckets:
            clips = np.frombuffer(bucket, _RECORD)
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
