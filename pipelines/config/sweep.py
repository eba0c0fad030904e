"""A sweep file: which variants of the preference rounds are compared over one run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from pipelines.config.fields import check


@dataclass(kw_only=True)
class SweepConfig:
    """Every variant with every seed is a run of its own, from the same models."""

    rounds: int = 5
    """Rounds of each run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each variant: a curve is the mean over them, its bars are standard errors over them."""
    preference: dict[str, Any] = field(default_factory=dict)
    """Changes to the section `preference` of the run's recipe for all variants, such as {videos: 512, train: {steps: 200}}."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name, further changes to that section. The first is what the others are compared with."""

    def __post_init__(self):
        check(self.rounds >= 1, f"rounds is {self.rounds}: give 1 or more")
        check(bool(self.seeds) and min(self.seeds) >= 0 and len(set(self.seeds)) == len(self.seeds),
              f"seeds is {list(self.seeds)}: give one or more, different ones, none below 0")
        for name in self.variants:
            # matplotlib leaves names that begin with _ out of legends.
            check(bool(re.fullmatch(r"[A-Za-z0-9][\w-]*", name, re.ASCII)),
                  f"variants: {name!r} names a folder: use letters, digits, _ and -, with a letter or digit first")
