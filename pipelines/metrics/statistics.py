"""Paired differences, shuffled controls, and the bars that a run must clear."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Bar", "Paired", "paired", "shuffled_partner"]


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Mean of n paired differences and how sure it is."""

    difference: float
    """Mean of a - b."""
    standard_error: float
    """Of that mean, from the spread of the differences themselves."""
    n: int
    """Number of pairs."""
    sigmas: float
    """difference / standard_error; infinite where all differences are one value other than zero, 0 where all are zero."""


def paired(a: np.ndarray, b: np.ndarray) -> Paired:
    """Paired comparison of two measurements (N,) of the same N clips; ValueError unless N >= 2 and all are finite."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"paired takes two arrays of one shape (N,) with N >= 2, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("paired: a measurement is NaN or infinite: leave out the clips that could not be measured, in both arrays")
    difference = float(np.mean(a - b))
    error = float(np.std(a - b, ddof=1) / math.sqrt(len(a)))
    sigmas = difference / error if error else math.copysign(math.inf, difference) if difference else 0.0
    return Paired(difference=difference, standard_error=error, n=len(a), sigmas=sigmas)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A measured value held against a bound; `passed` follows from the two, and a NaN never passes."""

    name: str
    """What is measured, as the report prints it."""
    value: float
    """The measurement."""
    comparison: str
    """">=" or "<=": how the value must stand to the bound."""
    bound: float
    """The least, or greatest, value that passes."""
    explanation: str = ""
    """What the value means, and where to look when it is missed."""
    passed: bool = field(init=False)
    """Whether the bar is cleared."""

    def __post_init__(self):
        if self.comparison not in (">=", "<="):
            raise ValueError(f"Bar.comparison of {self.name!r} is {self.comparison!r}: choose '>=' or '<='")
        passed = self.value >= self.bound if self.comparison == ">=" else self.value <= self.bound
        object.__setattr__(self, "passed", bool(passed))

    def __str__(self):
        verdict = "passed" if self.passed else "MISSED"
        return f"{verdict}: {self.name} = {self.value:.4g} ({self.comparison} {self.bound:.4g}) {self.explanation}".rstrip()


def shuffled_partner(n: int, seed: int) -> np.ndarray:
    """Each of n clips' partner (n,) in a shuffled control: a seeded permutation of a single cycle, so no clip keeps its own."""
    if n < 2:
        raise ValueError(f"shuffled_partner needs at least two clips, got {n}: with one there is no other video to give it")
    order = np.random.default_rng(seed).permutation(n)
    partner = np.empty(n, dtype=np.int64)
    partner[order] = np.roll(order, -1)
    return partner
