"""Adversarial losses of a decoder and its discriminator, which judges patches at several scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

__all__ = ["discriminator_loss", "feature_matching_loss", "generator_loss"]


def discriminator_loss(real: Sequence[Tensor], made: Sequence[Tensor]) -> Tensor:
    """Hinge loss of scores, averaged over scales: true patches should score above 1, made ones below -1 (Lim and Ye 2017)."""
    return sum(F.relu(1 - r).mean() + F.relu(1 + m).mean() for r, m in zip(real, made, strict=True)) / len(real)


def generator_loss(made: Sequence[Tensor]) -> Tensor:
    """Minus the mean score of made patches, averaged over scales."""
    return -sum(scores.mean() for scores in made) / len(made)


def feature_matching_loss(real: Sequence[Tensor], made: Sequence[Tensor]) -> Tensor:
    """Mean L1 between a discriminator's features of made and true inputs, relative to the size of the true ones; no gradient to those."""
    pairs = [(r.detach(), m) for r, m in zip(real, made, strict=True)]
    return sum(F.l1_loss(m, r) / r.abs().mean().clamp_min(1e-6) for r, m in pairs) / len(pairs)
