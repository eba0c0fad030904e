"""Where a run stands, from its files alone: any shell that sees the folder can ask."""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from pipelines.encoding import needs_contrastive
from pipelines.engine.checkpoint import EXPORTED, newest
from pipelines.engine.log import STATUS
from pipelines.engine.watchdog import PULSE
from pipelines.recipes import load_recipe

_GONE = 6 * PULSE
"""Seconds without a sign of life after which a process counts as gone; a network file system may show one half a minute late."""
_UNDER_WAY = ("starting", "running", "validating", "exporting")
_UNUSED = "not part of this run"


@dataclass(frozen=True)
class StageStatus:
    """One stage of a run."""

    name: str
    state: str
    """starting, running, validating, exporting, stopped, failed, gone (no sign of life), complete, waiting or not part of this run."""
    step: int = 0
    """The last that was logged, or that of the newest checkpoint where this is later: not every step is logged."""
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
    folders = [path.name for path in (run / "preference").glob("round-*")]
    rounds = sorted((name for name in folders if re.fullmatch(r"round-\d+", name)), key=lambda name: int(name[6:]))  # not a copy of one
    names = ["autoencoder", "contrastive", "generative", *(f"preference/{name}" for name in rounds)]
    unused = () if needs_contrastive(load_recipe(run / "recipe.yaml")) else ("contrastive",)
    # Work outside of a stage's training has a status while it goes on, or where it ended badly.
    for name, behind in (("features", "contrastive"), ("preference", "generative")):
        if (run / name / STATUS).exists():
            names.insert(names.index(behind) + 1, name)
    return [_stage(run / name, name, _UNUSED if name in unused else "waiting") for name in names]


def _stage(folder: Path, name: str, absent: str) -> StageStatus:
    """`absent` is the state of a stage that has left nothing."""
    found = newest(folder / "checkpoints")
    checkpoint = int(found.name[5:]) if found else None
    facts = {"checkpoint": checkpoint, "quarantined": _clips(folder / "quarantine.jsonl")}
    path = folder / STATUS
    if not path.exists():
        return StageStatus(name, "complete" if (folder / "export" / EXPORTED).exists() else absent, step=checkpoint or 0, **facts)
    known = json.loads(path.read_text())
    shown = {key: known.get(key) for key in ("steps", "loss", "samples_per_second", "seconds_left", "reason")}
    return StageStatus(name, _state(folder, known["state"]), step=max(known["step"], checkpoint or 0), **shown, **facts)


def _state(folder: Path, told: str) -> str:
    if (folder / "export" / EXPORTED).exists():
        return "complete"
    silent = time.time() - (folder / STATUS).stat().st_mtime > _GONE
    return "gone" if told in _UNDER_WAY and silent else told


def _clips(path: Path) -> int:
    """Different clips of a quarantine: each is listed again whenever it is met again."""
    if not path.exists():
        return 0
    found = set()
    with open(path) as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut short when a run was killed
                clip = json.loads(line)
                found.add((clip["url"], clip["shard"], clip["key"]))
    return len(found)
