"""Being asked to stop: the first signal raises a flag that is looked at where it is safe to leave, a later one ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from pipelines.engine.world import World

REQUEUE = 75
"""Exit code of a run that was asked to stop and can go on (EX_TEMPFAIL of sysexits.h): start it again."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_ECHO = 10.0
"""Seconds in which further signals are the same request: SLURM signals every process of a step, and torchrun passes on what it gets."""
_received: list[float] = []


class Stopped(SystemExit):
    """Leave with REQUEUE: everything is saved, and the same command goes on from there."""

    def __init__(self, where: str):
        super().__init__(REQUEUE)
        self.where = where

    def __str__(self) -> str:
        return f"asked to stop: {self.where}; run the same command again to go on (exit code {REQUEUE})"


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 ask this process to stop; outside they do what they did before."""
    _received.clear()
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_requested() -> bool:
    """Whether this process was asked to stop; the others may not know."""
    return bool(_received)


def leave_if_asked(world: World, where: str) -> None:
    """Raise Stopped on all ranks where one of them was asked to stop. Collective; `where` says what is safe to leave."""
    if world.any(stop_requested()):
        raise Stopped(where)


def leave_alone_if_asked(where: str) -> None:
    """Raise Stopped on this rank, between pieces of work that no other rank waits for; its launcher then ends the others."""
    if stop_requested():
        raise Stopped(where)


def _note(number: int, frame: object) -> None:
    # Nothing else is safe between any two instructions; and whoever asks again cannot wait.
    now = time.monotonic()
    if _received and now - _received[0] > _ECHO:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    _received.append(now)
