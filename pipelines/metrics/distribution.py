"""How far a set of generated features lies from the true ones, as distributions."""

from __future__ import annotations

import numpy as np

__all__ = ["frechet_distance"]


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance between the Gaussians of two feature sets (N, D) and (M, D).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), unbiased covariances, float64 (Heusel et al. 2017, equation 6).
    It is biased upwards for small sets: compare only figures with the same N, and N well above D.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(f"frechet_distance takes (N, D) and (M, D) with N, M >= 2, got {first.shape} and {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("frechet_distance: features hold NaN or infinity: leave out the clips that could not be measured")
    shift = first.mean(axis=0) - second.mean(axis=0)
    covariances = [np.atleast_2d(np.cov(features, rowvar=False)) for features in (first, second)]
    roots = [_square_root(covariance) for covariance in covariances]
    # tr (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2): real for singular covariances too, unlike a matrix
    # square root of the product, which turns complex when N < D.
    overlap = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    return float(max(shift @ shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2.0 * overlap, 0.0))


def _square_root(symmetric: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
