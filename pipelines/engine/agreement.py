"""What all ranks must know of a step before they take it, in one collective."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pipelines.engine.gradients import GradientNorms
from pipelines.engine.world import World


@dataclass(frozen=True)
class StepFacts:
    """One step, over all ranks."""

    losses: dict[str, float]
    """Each term of the loss, mean over the ranks."""
    norms: dict[str, float]
    """Gradient norm of each part of the model, before clipping."""
    stop: bool
    """Whether any rank was asked to stop."""
    quarantined: int
    """Clips that could not be read so far."""

    @property
    def norm(self) -> float:
        """Gradient norm of the whole model."""
        return math.hypot(*self.norms.values())


def agree(world: World, losses: dict[str, torch.Tensor], norms: GradientNorms, stop: bool, quarantined: int) -> StepFacts:
    """The facts of a step, the same on every rank. Collective."""
    squares = dict(zip(norms.parts, norms.squares().unbind(), strict=True))
    groups = {"losses": losses, "squares": squares, "counts": {"stop": float(stop), "quarantined": float(quarantined)}}
    totals = world.total({(group, name): value for group, values in groups.items() for name, value in values.items()})
    found = {group: {name: totals[group, name] for name in values} for group, values in groups.items()}
    means = {name: total / world.size for name, total in found["losses"].items()}
    return StepFacts(means, {part: math.sqrt(square) for part, square in found["squares"].items()},
                     found["counts"]["stop"] > 0, round(found["counts"]["quarantined"]))
