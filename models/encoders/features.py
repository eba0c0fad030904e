"""What a contrastive encoder says about a clip."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["AudioFeatures", "VideoFeatures"]


@dataclass
class VideoFeatures:
    """Features of silent video."""

    segments: Tensor
    """One embedding per segment (B, S, D), not normalised: the loss and the reward take cosines."""
    semantic: Tensor
    """Slow tokens (B, Ts, Ds): what is seen."""
    sync: Tensor
    """Fast tokens (B, Tf, Df), one per frame: when it happens."""


@dataclass
class AudioFeatures:
    """Features of sound."""

    segments: Tensor
    """One embedding per segment (B, S, D), not normalised."""
    frames: Tensor
    """Fast tokens (B, Tf, Df), as many as the video's `sync`."""
