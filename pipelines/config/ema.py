"""Averaged weights: the section `ema` of every stage's training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.config.fields import check

_LARGEST = 3**-0.5 / 2
"""Width of the profile of exponent 0: the plain mean of all steps."""


@dataclass(kw_only=True)
class EMAConfig:
    """Which averages of the weights are kept beside them, and which of them the next stage reads."""

    kind: Literal["exponential", "power", "none"] = "exponential"
    """exponential: decays per step; power: the profiles of EDM2, whose width grows with the run; none exports the last weights."""
    decay: float = 0.9999
    """Decay per step of the one exponential average, where `half_lives` names none; warmed up as (1 + step) / (10 + step)."""
    half_lives: tuple[float, ...] = ()
    """Half-lives of exponential averages, steps; one average each."""
    sigma_rels: tuple[float, ...] = (0.05, 0.1)
    """Widths of power profiles as shares of the steps so far, below 0.2886; MMAudio keeps 0.05 and 0.1."""
    snapshot_every: int = 0
    """Steps between stored copies of the power averages (float16), from which any other width can be had later; 0 stores none."""
    export: float | None = None
    """Which average is exported: its half-life or sigma_rel; null takes the first. A width that is not kept needs snapshots."""

    def __post_init__(self):
        check(0 <= self.decay < 1, f"decay {self.decay} must be in [0, 1)")
        check(all(half_life > 0 for half_life in self.half_lives), f"half_lives {self.half_lives} must be above 0")
        widths = (*self.sigma_rels, *([self.export] if self.kind == "power" and self.export is not None else []))
        check(all(0 < width < _LARGEST for width in widths), f"sigma_rels {widths} must be above 0 and below {_LARGEST:.4f}")
        check(self.kind != "power" or bool(self.sigma_rels), "sigma_rels must name a width where kind is power")
        check(self.snapshot_every >= 0, f"snapshot_every {self.snapshot_every} must be 0 or above")
        check(not self.snapshot_every or self.kind == "power", "snapshot_every needs kind power: other averages cannot be combined")
        kept = {"exponential": self.half_lives, "power": self.sigma_rels, "none": ()}[self.kind]
        check(len(set(kept)) == len(kept), f"{kept} names an average twice")
        check(self.export is None or self.export in kept or bool(self.snapshot_every),
              f"export {self.export} is none of the averages kept, {kept}: name one of them, or set snapshot_every")

    @classmethod
    def of_decay(cls, decay: float) -> EMAConfig:
        """What the single field `ema_decay` of a recipe means: one exponential average, or with 0 none."""
        return cls(decay=decay) if decay else cls(kind="none")
