"""Checks that stop a run before it wastes a night."""

from __future__ import annotations

import math


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and what to look at."""


def check_finite(losses: dict[str, float], step: int) -> None:
    """Raise TrainingError when a logged value is not finite, naming step and value.

    The engine's own gradient check is off in fp32 and bf16, so a NaN would otherwise spread to all weights in silence.
    """
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        raise TrainingError(f"step {step}: {', '.join(bad)} not finite; lower the learning rate or look at the batch, "
                            "then run again: it resumes from the last checkpoint")
