"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from pipelines.config import OptimiserConfig


def learning_rate(step: int, steps: int, config: OptimiserConfig) -> float:
    """Rate of step `step` (from 0) of `steps`: linear warm-up, then the recipe's schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "steps":
        return config.lr * 0.1 ** sum(step >= milestone for milestone in config.milestones)
    return config.lr
