"""Byte ranges to ask of a remote store: neighbours in one request, long ones in several that run at once."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

GAP = 1 << 20
"""Bytes: reading over a shorter gap costs less than another request, which takes milliseconds of processor on either side."""
LARGEST = 1 << 24
"""Bytes of the largest request: what is lost with a connection, and what one of several connections carries at a time."""


class Range(NamedTuple):
    """Bytes [start, stop) of a file."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes."""
        return max(0, self.stop - self.start)


def merged(ranges: Iterable[Range], gap: int = GAP, largest: int = LARGEST) -> list[Range]:
    """Requests that cover all ranges: none longer than `largest`, no bytes further than `gap` from a wanted one."""
    requests: list[Range] = []
    for name, start, stop in sorted(piece for each in ranges for piece in _pieces(each, largest)):
        last = requests[-1] if requests else None
        if last and last.name == name and start <= last.stop + gap and max(stop, last.stop) <= last.start + largest:
            requests[-1] = Range(name, last.start, max(stop, last.stop))
        else:
            requests.append(Range(name, start, stop))
    return requests


def cut(ranges: Iterable[Range], contents: Mapping[Range, bytes], largest: int = LARGEST) -> list[bytes]:
    """The bytes of each range out of what the requests of `merged` brought; shorter where the file ends before."""
    requests = sorted(contents)

    def part(piece: Range) -> bytes:
        request = requests[bisect_right(requests, (piece.name, piece.start, math.inf)) - 1]
        return contents[request][piece.start - request.start : piece.stop - request.start]

    return [b"".join(map(part, _pieces(each, largest))) for each in ranges]


def _pieces(each: Range, largest: int) -> Iterator[Range]:
    for start in range(each.start, each.stop, largest):
        yield Range(each.name, start, min(start + largest, each.stop))
