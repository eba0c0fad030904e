"""What a stage tells while it runs: metrics.jsonl, TensorBoard, status.json and a progress bar, all from the main process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipelines.engine.saving import write_atomically

STATUS = "status.json"
_STATUS_SECONDS = 5.0
_LINE_SECONDS = 60.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


class LogError(RuntimeError):
    """A log that the disk has no room for; the message names its folder and says what to do."""


@dataclass
class Validation:
    """What a stage's validation found."""

    scalars: dict[str, float] = field(default_factory=dict)
    """Figures by name."""
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    """Log-mels (F, T) by name, shown as spectrograms."""
    sounds: dict[str, np.ndarray] = field(default_factory=dict)
    """Waveforms (N,) in [-1, 1] by name."""
    sample_rate: int = 16000
    """Rate of the sounds, Hz."""


class RunLog:
    """Logs of one stage. After a resume at `step`, lines of later steps are taken away: the run is about to write them again."""

    def __init__(self, folder: Path, title: str, step: int, steps: int, active: bool):
        self._active = active
        self._folder, self._ending = folder, False
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        with self._needing_room():
            keep_lines_until(path, step)
            self._file = open(path, "a")  # noqa: SIM115 closed by close()
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._progress = _Bar(title, step, steps) if sys.stderr.isatty() else _Lines(title, steps)
        self._status, self._told = folder / STATUS, 0.0
        self._about = {"stage": title, "step": step, "steps": steps, "pid": os.getpid(), "host": platform.node()}
        self.state("starting")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of figures. This, `validation`, `advance`, `state` and `close` raise LogError where the disk is full."""
        if not self._active:
            return
        with self._needing_room():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def validation(self, step: int, found: Validation) -> None:
        """Figures, spectrograms and sounds of a validation."""
        if not self._active:
            return
        self.scalars(step, {f"validation/{name}": value for name, value in found.scalars.items()})
        with self._needing_room():
            for name, mel in found.pictures.items():
                self._board.add_image(name, _grey(mel), step, dataformats="HW")
            for name, waveform in found.sounds.items():
                self._board.add_audio(name, np.clip(waveform, -1, 1)[None], step, sample_rate=found.sample_rate)

    def advance(self, step: int, loss: float, rate: float) -> None:
        """The step, the loss and the samples per second, for the progress bar and for `foleyscale status`."""
        if not self._active:
            return
        now = time.time()
        begun, first = self._about.setdefault("clock", (now, step))
        left = (now - begun) / (step - first) * (self._about["steps"] - step) if step > first else None
        self._about |= {"step": step, "loss": loss, "samples_per_second": rate, "seconds_left": left}
        self._progress.advance(step, f"loss {loss:.4f}, {rate:.3g} samples/s")
        if now - self._told > _STATUS_SECONDS:
            self.state("running")

    def state(self, state: str, reason: str = "") -> None:
        """What the stage is doing now: running, validating, stopped, failed, complete."""
        if not self._active:
            return
        self._told = time.time()
        self._ending |= state in ("stopped", "failed")
        known = {name: value for name, value in self._about.items() if name != "clock"}
        with self._needing_room():
            write_atomically(self._status, json.dumps({**known, "state": state, "reason": reason, "time": self._told}))

    def tell(self, line: str) -> None:
        """A line that must not be overlooked."""
        if self._active:
            self._progress.tell(line)

    def close(self) -> None:
        """Flush everything."""
        if not self._active:
            return
        with self._needing_room(), contextlib.ExitStack() as stack:
            for end in (self._file.close, self._board.close, self._progress.close):
                stack.callback(end)

    @contextlib.contextmanager
    def _needing_room(self) -> Iterator[None]:
        """A full disk is told once, and not at all where the run ends anyhow: why it ends matters more."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if not self._ending:
                self._ending = True
                raise LogError(f"{self._folder}: {error.strerror}, so the logs cannot be written; make room and run again: "
                               "it goes on from the newest checkpoint") from error


class PhaseStatus:
    """status.json of work outside of a stage's training, such as features, in its folder; gone when that is done. Of one process."""

    def __init__(self, folder: Path, title: str):
        self._path, self._title, self._phase = folder / STATUS, title, ""

    def show(self, phase: str) -> None:
        """What goes on now; empty where nothing does, or something that has a status of its own."""
        self._phase = phase.removeprefix(self._title).removeprefix(", ")
        if phase:
            self._write("running", self._phase)
        else:
            self._path.unlink(missing_ok=True)

    def ended(self, state: str, reason: str) -> None:
        """Why the work that was shown last is not done."""
        if self._path.exists():
            self._write(state, ": ".join(filter(None, (self._phase, reason))))

    def _write(self, state: str, reason: str) -> None:
        known = {"stage": self._title, "step": 0, "steps": 0, "pid": os.getpid(), "host": platform.node()}
        write_atomically(self._path, json.dumps({**known, "state": state, "reason": reason, "time": time.time()}))


class _Bar:
    """One line at the foot of a terminal."""

    def __init__(self, title: str, step: int, steps: int):
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), refresh_per_second=2)
        self._task = self._bar.add_task(title, total=steps, completed=step, note="")
        self._bar.start()

    def advance(self, step: int, note: str) -> None:
        self._bar.update(self._task, completed=step, note=note)

    def tell(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


class _Lines:
    """A line a minute in the log of a job."""

    def __init__(self, title: str, steps: int):
        self._title, self._steps, self._begun, self._told = title, steps, time.monotonic(), time.monotonic()

    def advance(self, step: int, note: str) -> None:
        if time.monotonic() - self._told > _LINE_SECONDS:
            self._told = time.monotonic()
            self.tell(f"{self._title}: step {step} of {self._steps}, {note}, {timedelta(seconds=round(self._told - self._begun))}")

    def tell(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of a metrics file that belong to steps after `step`, and a half line that a kill left."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    write_atomically(path, "".join(kept))


def _grey(mel: np.ndarray) -> np.ndarray:
    low, high = float(mel.min()), float(mel.max())
    return ((mel[::-1] - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
