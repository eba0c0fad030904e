"""Measured values as they stand in `evaluation.json`: each with its error and its control."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.metrics.statistics import Paired

__all__ = ["Figure", "difference", "share"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured value."""

    name: str
    """What was measured."""
    value: float
    """The measurement, or the mean paired difference."""
    standard_error: float | None = None
    """Of a mean or a difference."""
    note: str = ""
    """Control, chance level and number of clips."""


def share(name: str, values: np.ndarray, note: str) -> Figure:
    """Mean over clips (N,), with its error."""
    error = float(values.std(ddof=1) / np.sqrt(len(values)))
    return Figure(name=name, value=float(values.mean()), standard_error=error, note=f"{note}, {len(values)} clips")


def difference(name: str, found: Paired, note: str = "") -> Figure:
    """Mean of paired differences, with its error."""
    text = "; ".join(part for part in (f"{found.sigmas:.1f} standard errors, {found.n} clips", note) if part)
    return Figure(name=name, value=found.difference, standard_error=found.standard_error, note=text)
