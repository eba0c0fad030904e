"""Power-function averages of weights and what can be made of them after training (EDM2, Karras et al. 2024, section 3 and appendix C).

After step t the weights of step s count in proportion to s^gamma; sigma_rel is the profile's standard deviation as a share of t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def gamma_of(sigma_rel: float) -> float:
    """Exponent of the profile of this width (EDM2 algorithm 2): the root of sigma_rel^2 (g + 2)^2 (g + 3) = g + 1 that is positive."""
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel {sigma_rel} must be above 0 and below {12**-0.5:.4f}")
    inverse = sigma_rel**-2
    return float(max(np.roots([1, 7, 16 - inverse, 12 - inverse]).real))


def sigma_rel_of(gamma: float) -> float:
    """Width of the profile of this exponent."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def power_decay(gamma: float, step: int) -> float:
    """How much of the average stays when the weights of step `step` (from 1) come in: (1 - 1/t)^(gamma + 1)."""
    return (1 - 1 / step) ** (gamma + 1)


def combine(steps: Sequence[int], gammas: Sequence[float], step: int, gamma: float) -> np.ndarray:
    """Factors with which averages of these steps and exponents add up to the one wanted, as nearly as they can.

    The least-squares fit of profiles of EDM2 algorithm 3: snapshots (N,) -> factors (N,).
    """
    times, exponents = np.asarray(steps, float), np.asarray(gammas, float)
    gram = _overlap(times[:, None], exponents[:, None], times[None], exponents[None])
    wanted = _overlap(times, exponents, np.float64(step), np.float64(gamma))
    return np.linalg.lstsq(gram, wanted, rcond=None)[0]


def _overlap(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Inner products of profiles (g + 1) s^g / t^(g + 1) on [0, t]."""
    # In the ratio of the times: the powers themselves leave the range of a float.
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** exponent / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))
