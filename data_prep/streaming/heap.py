"""Freed memory kept for the next batch: to give it back to the kernel and take it again, page by page, costs more than to read it."""

from __future__ import annotations

import contextlib
import ctypes
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of options in glibc's malloc.h
_KEPT = 1 << 28
"""Bytes at the end of the heap that may lie free."""
_LARGEST = 1 << 25
"""Bytes of the largest block that comes from the heap: the most that glibc accepts. Larger ones are mapped, each anew."""


@cache
def keep_freed_memory() -> None:
    """Tell this process's allocator; without effect where it is not glibc's."""
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _KEPT)
