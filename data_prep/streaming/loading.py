"""Worker processes that make the steps of a loader, in order; one that hangs or dies is replaced and nothing is lost or made twice."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, Protocol

import torch

from data_prep.index import ShardError
from data_prep.order import Place
from data_prep.streaming.handover import pack, unpack
from data_prep.streaming.heap import keep_freed_memory
from data_prep.streaming.reading import CRASHED, TIMEOUT, ClipReader, Name, Note

_AHEAD = 2
"""Steps that a worker has in hand: one in work and one waiting."""
_TICK = 0.5
"""Seconds between two looks at what the workers are busy with."""
_STUCK_SECONDS = 900.0
"""How long a clip's bytes may take to come: storage gives up by itself long before, a mounted file system may not."""
_DEATHS = 2
"""Workers lost over one clip that are no accident. One may also be killed or paused from outside, so a single one condemns no clip."""
_LAST_SECONDS = 10.0
"""How long a killed process may take to go; one that the kernel holds in a dead file system may never."""

_PR_SET_PDEATHSIG = 1

_TRAINERS = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""The trainer answers these, and takes batches on until it has; handlers that it installed must not run in a worker."""


class Make(Protocol):
    """Makes the item of a step, reading all clips through `reader`; `then` is the step that the same process makes next, if any."""

    reader: ClipReader

    def __call__(self, step: int, then: int | None) -> Any: ...


def load(make: Make, steps: int | None, workers: int, local: bool, timeout: float) -> Iterator[Any]:
    """The items of steps 0, 1 and so on, `steps` of them or without end, made by `workers` processes or, with 0, in this one.

    A clip over which two workers are lost, as it decodes for more than `timeout` seconds or kills them, is condemned
    (reading.ClipReader): its step is made again without it. With 0 workers there is no one to watch, and neither is noticed.
    """
    keep_freed_memory()
    workers = workers if steps is None else min(workers, steps)
    if not workers:
        yield from itertools.starmap(make, _paired(itertools.count() if steps is None else range(steps)))
        return
    pool = _Pool(make, steps, workers, local, timeout)
    try:
        while pool.more:
            yield pool.take()
    finally:
        pool.stop()


def _paired(steps: Iterable[int]) -> Iterator[tuple[int, int | None]]:
    """Each step with the one that follows it, the last with None."""
    return itertools.pairwise(itertools.chain(steps, (None,)))


class _Pool:
    """The workers; worker w of n makes the steps w, w + n, ..."""

    def __init__(self, make: Make, steps: int | None, workers: int, local: bool, timeout: float):
        self._make, self._timeout = make, timeout
        # Connections and their threads do not survive a fork.
        context = multiprocessing.get_context("fork" if local else "forkserver")
        own = (itertools.count(first, workers) if steps is None else range(first, steps, workers) for first in range(workers))
        self._workers = [_Worker(context, make, _paired(steps)) for steps in own]
        self._turn = 0

    @property
    def more(self) -> bool:
        """Whether a step is left."""
        return bool(self._workers[self._turn].steps or self._workers[self._turn].made)

    def take(self) -> Any:
        """The next step's item; an error in making it is raised here."""
        worker = self._workers[self._turn]
        while not worker.made:
            self._listen()
        self._turn = (self._turn + 1) % len(self._workers)
        item, error = worker.made.popleft()
        worker.ask()
        if error is not None:
            raise error
        return item

    def stop(self) -> None:
        """End all workers; they hold nothing that must be put away."""
        for worker in self._workers:
            worker.kill()

    def _listen(self) -> None:
        # One that has made all its steps may go: something else may have ended it, and nobody waits for it.
        busy = [worker for worker in self._workers if worker.steps]
        handles = {handle: worker for worker in busy for handle in (worker.connection, worker.process.sentinel)}
        ready = {handles[handle] for handle in wait(list(handles), timeout=_TICK)}
        for worker in ready:
            if not worker.receive():
                self._replace(worker)
        for worker in busy:
            if worker not in ready and worker.busy_for("decoding") > self._timeout:
                self._replace(worker)
            elif not worker.note.decoding and worker.busy_for("reading") > _STUCK_SECONDS:
                raise ShardError(f"{self._where(worker.note.place)}: still not read after {_STUCK_SECONDS:g} s; is the storage there?")

    def _replace(self, worker: _Worker) -> None:
        """Put a new process in the place of a dead or hanging one, and condemn the clip that is to blame."""
        alive = worker.process.is_alive()
        worker.kill()
        note, ending = worker.note, _ending(worker.process.exitcode)  # final now
        phase = "decoding" if note.decoding else "reading" if note.reading else "idle"
        death = phase, note.place or worker.steps[0]
        worker.deaths[death] += 1
        times = worker.deaths[death]
        # The clock runs on while a job is suspended: what seems to hang may be sound, and is tried once more.
        if phase == "decoding" and times >= _DEATHS and alive and worker.busy_for("decoding") > self._timeout:
            self._condemn(note.place, TIMEOUT, f"was still being decoded after {self._timeout:g} s")
        elif phase == "decoding" and times >= _DEATHS:
            self._condemn(note.place, CRASHED, f"ended the process that decoded it, {times} times ({ending})")
        elif times > _DEATHS:
            where = f"reading {self._where(note.place)}" if note.place else "outside any clip"
            raise RuntimeError(f"a worker process died {times} times {where} ({ending})")
        worker.start()

    def _condemn(self, place: Place, reason: str, what: str) -> None:
        name = self._make.reader.name(place)
        verdict = reason, f"{name.url}/{name.shard}.tar: clip {name.key} {what}"
        self._make.reader.condemned[name] = verdict
        for worker in self._workers:
            worker.news[name] = verdict

    def _where(self, place: Place) -> str:
        shards = self._make.reader.sets[place.dataset]
        return f"{shards.url}/{shards.shards[place.shard].name}.tar"


class _Worker:
    """One process, what it is asked for, what it has made, and the deaths over what it is to make next."""

    def __init__(self, context: Any, make: Make, numbers: Iterator[tuple[int, int | None]]):
        self._context, self._make, self._numbers = context, make, numbers
        self.steps = deque(itertools.islice(numbers, _AHEAD))
        self.made: deque[tuple[Any, Exception | None]] = deque()
        self.deaths: Counter[Any] = Counter()
        self.start()

    def start(self) -> None:
        """A new process for the steps that are not made yet."""
        self.note = Note(self._context.RawArray("d", Note.SIZE))  # new: the last process may not be quite gone
        self.news: dict[Name, tuple[str, str]] = {}
        self.connection, theirs = self._context.Pipe()
        self.process = self._context.Process(target=_work, args=(self._make, theirs, self.note), daemon=True)
        # Until it ignores them itself, a signal to the whole process group must not end it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        for step in self.steps:
            self._send(step)

    def ask(self) -> None:
        """For one step more, if there is one."""
        for step in itertools.islice(self._numbers, 1):
            self.steps.append(step)
            self._send(step)

    def receive(self) -> bool:
        """Take what was made; False where the process is gone and has nothing more to give."""
        try:
            if not self.connection.poll():
                return False
            descriptor = recv_handle(self.connection)
        except (EOFError, OSError):
            return False
        self.made.append(unpack(descriptor))
        self.steps.popleft()
        self.deaths.clear()  # all were over clips of this step, and it came through
        return True

    def busy_for(self, phase: str) -> float:
        """Seconds that the clip in work has been in a phase."""
        since = getattr(self.note, phase)
        return time.monotonic() - since if since else 0.0

    def kill(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join(_LAST_SECONDS)
        self.connection.close()

    def _send(self, step: tuple[int, int | None]) -> None:
        with contextlib.suppress(OSError):  # it died; the next look finds out
            self.connection.send((step, self.news))
            self.news = {}


def _work(make: Make, connection: Connection, note: Note) -> None:
    """The life of a worker process."""
    _end_with_parent()
    torch.set_num_threads(1)
    keep_freed_memory()
    for number in _TRAINERS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TRAINERS)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    make.reader.note = note
    for step, news in _asked(connection):
        make.reader.condemned.update(news)
        try:
            descriptor = pack((make(*step), None))
        except Exception as error:
            descriptor = pack((None, _portable(error)))
        with contextlib.suppress(ConnectionError):  # the consumer is gone; the next look finds out
            send_handle(connection, descriptor, None)
        os.close(descriptor)


def _asked(connection: Connection) -> Iterator[tuple[tuple[int, int | None], dict[Name, tuple[str, str]]]]:
    """Requests until the consumer is gone."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            yield connection.recv()


def _end_with_parent() -> None:
    """Have the kernel end this process with its parent: a clip may hang in C, and a forked sibling may hold the connection open."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note; one that cannot be pickled becomes a RuntimeError."""
    error.add_note(f"In a worker process:\n{traceback.format_exc()}")
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _ending(code: int | None) -> str:
    """An exit code in words."""
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"{signal.Signals(-code).name}; out of memory?" if code == -signal.SIGKILL else signal.Signals(-code).name
