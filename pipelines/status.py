"""Where a run stands, from its files alone: any shell that sees the folder can ask."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from pipelines.engine.checkpoint import EXPORTED, newest
from pipelines.engine.log import STATUS
from pipelines.engine.watchdog import PULSE

_GONE = 6 * PULSE
"""Seconds without a sign of life after which a process counts as gone; a network file system may show one half a minute late."""
_UNDER_WAY = ("starting", "running", "validating", "exporting")


@dataclass(frozen=True)
class StageStatus:
    """One stage of a run."""

    name: str
    state: str
    """starting, running, validating, exporting, stopped, failed, gone (no sign of life), complete or waiting."""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    samples_per_second: float | None = None
    seconds_left: float | None = None
    """At the mean speed since the stage was started."""
    checkpoint: int | None = None
    """Step of the newest complete checkpoint."""
    quarantined: int = 0
    """Clips that could not be read."""
    reason: str = ""
    """Why it stopped or failed."""


def run_status(run: Path) -> list[StageStatus]:
    """Every stage of a run in the order of the chain. ValueError where the folder holds no run."""
    if not (run / "recipe.yaml").exists():
        raise ValueError(f"{run}: no recipe.yaml, so no run was started there; give the folder of a run, such as runs/mine")
    rounds = sorted((run / "preference").glob("round-*"), key=lambda path: int(path.name[6:]))
    names = ["autoencoder", "contrastive", "generative", *(f"preference/{path.name}" for path in rounds)]
    return [_stage(run / name, name) for name in names]


def _stage(folder: Path, name: str) -> StageStatus:
    checkpoint = newest(folder / "checkpoints")
    facts = {"checkpoint": int(checkpoint.name[5:]) if checkpoint else None, "quarantined": _lines(folder / "quarantine.jsonl")}
    path = folder / STATUS
    if not path.exists():
        return StageStatus(name, "complete" if (folder / "export" / EXPORTED).exists() else "waiting", **facts)
    known = json.loads(path.read_text())
    shown = {key: known.get(key) for key in ("step", "steps", "loss", "samples_per_second", "seconds_left", "reason")}
    return StageStatus(name, _state(folder, known["state"]), **shown, **facts)


def _state(folder: Path, told: str) -> str:
    if (folder / "export" / EXPORTED).exists():
        return "complete"
    silent = time.time() - (folder / STATUS).stat().st_mtime > _GONE
    return "gone" if told in _UNDER_WAY and silent else told


def _lines(path: Path) -> int:
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        return sum(1 for _ in file)
