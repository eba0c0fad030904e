"""Section `contrastive`: stage 2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from models.encoders import sf_cavp
from pipelines.config.fields import from_presets
from pipelines.config.training import TrainConfig


@dataclass(kw_only=True)
class ContrastiveConfig:
    """Stage 2: SF-CAVP (MultiSoundGen, equations 1-2)."""

    model: Annotated[sf_cavp.SFCAVPConfig, from_presets(sf_cavp.PRESETS)] = field(default_factory=lambda: sf_cavp.PRESETS["r50"])
    """Preset name, or fields of SFCAVPConfig."""
    segments: int = 2
    """Consecutive segments drawn from each clip, at a random start: those of one clip are each other's hard negatives."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training."""
