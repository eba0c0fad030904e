"""What a stage tells while it runs: metrics.jsonl, TensorBoard and a progress bar, all from the main process."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / "metrics.jsonl"
        keep_lines_until(self._path, step)
        self._file = open(self._path, "a")  # noqa: SIM115 closed by close()
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), refresh_per_second=2)
        self._task = self._bar.add_task(title, total=steps, completed=step, note="")
        self._bar.start()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of figures."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def validation(self, step: int, found: Validation) -> None:
        """Figures, spectrograms and sounds of a validation."""
        if not self._active:
            return
        self.scalars(step, {f"validation/{name}": value for name, value in found.scalars.items()})
        for name, mel in found.pictures.items():
            self._board.add_image(name, _grey(mel), step, dataformats="HW")
        for name, waveform in found.sounds.items():
            self._board.add_audio(name, np.clip(waveform, -1, 1)[None], step, sample_rate=found.sample_rate)

    def advance(self, step: int, note: str) -> None:
        """Move the progress bar."""
        if self._active:
            self._bar.update(self._task, completed=step, note=note)

    def close(self) -> None:
        """Flush everything."""
        if self._active:
            self._bar.stop()
            self._board.close()
            self._file.close()


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of a metrics file that belong to steps after `step`, and a half line that a kill left."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    path.write_text("".join(kept))


def _grey(mel: np.ndarray) -> np.ndarray:
    low, high = float(mel.min()), float(mel.max())
    return ((mel[::-1] - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
