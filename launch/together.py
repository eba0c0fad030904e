"""Processes of one launcher leave together: it ends all of them as soon as one fails."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

_WAIT = timedelta(days=1)
"""As long as a process waits for the others."""
_TICK = 0.5
"""Seconds between two looks at how many are done."""
_DONE = "foleyscale/done"


@contextmanager
def leaving_together(say: Callable[[str], None]) -> Iterator[None]:
    """Hold back the end of a block, be it an error, until every process of the launcher has come to it; the error is said at once.

    torchrun ends all processes when one fails: a video that one cannot read would cost the others what they are at. The only thing
    shared is a counter in the launcher's store; without a launcher (MASTER_ADDR) nobody is ended, and nobody waits.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or "MASTER_ADDR" not in os.environ:
        yield
        return
    from torch.distributed import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=_WAIT))
    try:
        yield
    except Exception as error:  # not an interrupt: that is to end the process at once
        say(f"{error}; the other processes are waited for")
        _wait(store, size)
        raise
    _wait(store, size)


def _wait(store, size: int) -> None:
    from torch.distributed import DistError

    deadline = time.monotonic() + _WAIT.total_seconds()
    try:
        done = store.add(_DONE, 1)
        # Not in one long call: a signal is answered between two short ones.
        while done < size and time.monotonic() < deadline:
            time.sleep(_TICK)
            done = store.add(_DONE, 0)
    except DistError:
        return  # who keeps the store is gone, and with it whom to wait for
