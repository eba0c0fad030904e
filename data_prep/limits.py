"""A bound on the memory of a worker process: what would take the machine's memory costs one clip instead."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

MEMORY_EXIT = 77
"""Exit code of a process that was ended because of its memory."""

_STATM = Path("/proc/self/statm")
_PAUSE = 0.02


def limit_memory(megabytes: int) -> None:
    """Let this process have so many MB of data (heap and private mappings) more than it has now.

    An allocation that by itself goes a quarter beyond fails, as MemoryError or the library's own error. A process that creeps
    over the limit in `memory_watched` is ended with MEMORY_EXIT before small allocations fail, as many libraries do not live
    through that.
    """
    allowance = megabytes << 20
    limit = data_bytes() + allowance
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = limit + allowance // 4
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    if _STATM.exists():  # elsewhere than on Linux the first bound alone has to do
        threading.Thread(target=_watch, args=[limit, os.getppid()], daemon=True).start()


@contextlib.contextmanager
def memory_watched() -> Iterator[None]:
    """While the limit holds: between two clips the process may be talking to its parent, who must not be cut off."""
    _working.set()
    try:
        yield
    finally:
        _working.clear()


_working = threading.Event()


def _watch(limit: int, parent: int) -> None:
    while os.getppid() == parent:
        if _working.is_set() and data_bytes() > limit:
            os._exit(MEMORY_EXIT)
        time.sleep(_PAUSE)
    os._exit(1)  # nobody is left to stop a decoder that hangs


def data_bytes() -> int:
    """Bytes of data that this process has been given, as the kernel counts them; 0 where it does not tell."""
    if not _STATM.exists():
        return 0
    return int(_STATM.read_text().split()[5]) * resource.getpagesize()
