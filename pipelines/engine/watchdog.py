"""No silent end: a phase that takes too long is named with every stack, and what fails on any rank is told by rank 0.

Both need a shared run folder and nothing else. A collective that waits for a dead rank may wait for half an hour; the watchdog's
thread does not wait with it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from pipelines.engine.saving import write_atomically
from pipelines.engine.world import World

HUNG = 70
"""Exit code of a process that ended itself because a phase hung (EX_SOFTWARE of sysexits.h)."""
PULSE = 10.0
"""Seconds between signs of life."""
_LOOK = 0.5
"""Seconds between looks at the clock and at the other ranks' errors."""
_PATIENCE = 10.0
"""Seconds that a rank waits after another's error for its own end to come by itself."""
_watching: list[Watchdog] = []
"""Those of this process, the innermost last: that one watches, the others rest."""
_LOCK = threading.Lock()
_told: set[str] = set()
"""What this process has printed of other ranks: a note is kept in the folder of every watchdog that an error passes."""


def beat(phase: str = "") -> None:
    """For work that has no watchdog at hand: a phase begins, such as `features, shard 3 of 40`, or the one under way has got further."""
    if _watching:
        _watching[-1].beat(phase or _watching[-1]._phase)


class Watchdog:
    """Watches one process in a thread of its own.

    limit: seconds that a phase may take; 0 watches for errors of other ranks only.
    pulse: file whose time of change rank 0 renews: where it is old, the process is gone.
    show: what rank 0 tells the phase every so often instead; an empty one when another watchdog takes over.
    """

    def __init__(self, folder: Path, world: World, limit: float, pulse: Path | None = None, show: Callable[[str], None] | None = None):
        self._folder, self._world, self._limit = folder, world, limit
        self._show = (show or partial(_touch, pulse)) if world.is_main and (show or pulse) else None
        self._shown = 0.0
        self._phase, self._deadline = "start", self._next_deadline()
        self._mark = f"\nstart: {world.start}\n"
        self._of_other_starts: dict[Path, int] = {}
        _errors(folder).mkdir(parents=True, exist_ok=True)
        (_errors(folder) / f"rank-{world.rank}.txt").unlink(missing_ok=True)

    def beat(self, phase: str) -> None:
        """A phase begins, such as `step 12, backward`: the clock starts again."""
        self._phase, self._deadline = phase, self._next_deadline()

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watch what happens inside, and note an exception in the run folder for all ranks to see.

        Not within itself; within another's, that one rests until this is over.
        """
        over = threading.Event()
        with _LOCK:
            for outer in _watching[-1:]:
                outer._rest()
            self._deadline = self._next_deadline()
            _watching.append(self)
        threading.Thread(target=self._watch, args=(over,), name="watchdog", daemon=True).start()
        try:
            yield self
        except Exception as error:
            over.set()  # nothing hangs any more
            self._note(error)
            self._tell_others(wait=_LOOK * 4)
            raise
        finally:
            over.set()
            with _LOCK:
                _watching.remove(self)
                for outer in _watching[-1:]:
                    outer.beat(outer._phase)

    def _rest(self) -> None:
        if self._show:
            self._shown = 0.0
            with contextlib.suppress(OSError):
                self._show("")

    def _next_deadline(self) -> float:
        return time.monotonic() + self._limit if self._limit else float("inf")

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(_LOOK):
            hung = False
            with _LOCK:
                if _watching[-1:] == [self]:
                    hung = time.monotonic() > self._deadline
                    self._show_life()
            if hung:
                self._hang()
            if self._others():
                self._tell_others(wait=0)
                # A collective with the dead rank may never return, nor its error reach this rank.
                if not over.wait(_PATIENCE):
                    self._keep_stacks(f"{self._where}, has not ended after another rank failed")  # it may be the one that hangs
                    self._leave(1)

    def _show_life(self) -> None:
        if self._show and time.monotonic() - self._shown > PULSE:
            self._shown = time.monotonic()
            with contextlib.suppress(OSError):
                self._show(self._phase)

    def _hang(self) -> None:
        line = f"{self._where} has taken more than {self._limit:g} s"
        line += f"; every stack is in {self._keep_stacks(line)}"
        self._write(f"{line}\n")
        print(f"foleyscale: {line}", file=sys.stderr, flush=True)
        self._leave(HUNG)

    @property
    def _where(self) -> str:
        return f"rank {self._world.rank} of {self._world.size}: {self._phase}"

    def _keep_stacks(self, line: str) -> str:
        """Where they are: in a file, or above where the disk is full."""
        path = self._folder / f"hang-rank-{self._world.rank}.txt"
        try:
            with open(path, "w") as file:
                file.write(f"{line}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            return str(path)
        except OSError as error:
            faulthandler.dump_traceback(all_threads=True)
            return f"the lines above ({error})"

    def _leave(self, code: int) -> None:
        sys.stderr.flush()
        os._exit(code)  # the main thread cannot: it hangs

    def _note(self, error: Exception) -> None:
        text = f"{self._where}: {type(error).__name__}: {error}\n\n{''.join(traceback.format_exception(error))}"
        self._write(error.__dict__.setdefault("noted", text))  # the innermost watchdog knows best where it was

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the error itself matters more than where it is kept
            write_atomically(_errors(self._folder) / f"rank-{self._world.rank}.txt", text + self._mark)

    def _others(self) -> list[Path]:
        """Errors that other ranks have noted in this start of the run, also before this watchdog was there."""
        found = []
        for path in _errors(self._folder).glob("rank-*.txt"):
            with contextlib.suppress(FileNotFoundError):  # a rank that starts takes its old one away
                written = path.stat().st_mtime_ns
                if path.stem == f"rank-{self._world.rank}" or self._of_other_starts.get(path) == written:
                    continue
                if path.read_text().endswith(self._mark):
                    found.append(path)
                else:
                    self._of_other_starts[path] = written
        return found

    def _tell_others(self, wait: float) -> None:
        """On rank 0, print what failed elsewhere; a moment later where its own failure may only be the consequence."""
        time.sleep(wait if self._world.size > 1 else 0)
        for path in self._others() if self._world.is_main else ():
            text = path.read_text()
            if text not in _told:
                _told.add(text)
                print(f"foleyscale: {text.splitlines()[0]} ({path})", file=sys.stderr, flush=True)


def _touch(path: Path, phase: str) -> None:
    if phase:
        os.utime(path)


def _errors(folder: Path) -> Path:
    return folder / "errors"
