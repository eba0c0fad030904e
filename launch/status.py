"""`foleyscale status`: where each stage of a run stands."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.status import StageStatus


def status_lines(run: Path) -> list[str]:
    """One line per stage of the run in `run`. ValueError where there is none."""
    from pipelines.status import run_status

    stages = run_status(run)
    width = max(len(stage.name) for stage in stages)
    return [f"{stage.name:{width}}  {_line(stage)}" for stage in stages]


def _line(stage: StageStatus) -> str:
    said = [stage.state]
    if stage.steps:
        said.append(f"step {stage.step} of {stage.steps}")
    if stage.loss is not None:
        said.append(f"loss {stage.loss:.4g}")
    if stage.state == "running" and stage.samples_per_second:
        said.append(f"{stage.samples_per_second:.3g} samples/s")
    if stage.state == "running" and stage.seconds_left is not None:
        said.append(f"{timedelta(seconds=round(stage.seconds_left))} left")
    if stage.checkpoint is not None and stage.state != "complete":
        said.append(f"checkpoint of step {stage.checkpoint}")
    if stage.quarantined:
        said.append(f"{stage.quarantined} clips quarantined")
    return ", ".join([*said, *([stage.reason] if stage.reason else [])])
