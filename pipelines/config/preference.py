"""Section `preference`: stage 4."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.config.training import TrainConfig


@dataclass(kw_only=True)
class PreferenceConfig:
    """Stage 4: AVP-RPO rounds (MultiSoundGen, equations 3-5 and appendix C)."""

    rounds: int = 1
    """Rounds of generate, score, pair, train; each starts from the last."""
    candidates: int = 5
    """Sounds generated for each training video (N_a)."""
    videos: int = 0
    """Training videos per round; 0 takes all."""
    score: Literal["bottom_quartile", "mean", "min"] = "bottom_quartile"
    """How the cosines of a clip's segments become its reward (equation 3)."""
    beta: float = 1000.0
    """Strength of the preference (equation 4); code that writes -0.5 beta needs twice this value."""
    normalise: Literal["running_max", "detached", "none"] = "running_max"
    """N(.) of equation 5."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training of each round."""
