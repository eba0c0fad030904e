"""Sections `features` and `generative`: stage 3 and what it reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from models.generators import mmdit
from pipelines.config.fields import from_presets
from pipelines.config.training import TrainConfig


@dataclass(kw_only=True)
class FeaturesConfig:
    """Latents and conditions computed once, for the stages that train on them."""

    batch_size: int = 32
    """Clips encoded together."""
    statistics_clips: int = 512
    """Clips that the normalisation of conditions and latents is measured on."""


@dataclass(kw_only=True)
class GenerativeConfig:
    """Stage 3: MM-DiT with conditional flow matching (MMAudio)."""

    model: Annotated[mmdit.MMDiTConfig, from_presets(mmdit.PRESETS)] = field(default_factory=lambda: mmdit.PRESETS["small_16k"])
    """Preset name, or fields of MMDiTConfig. Latent and condition sizes are taken from the earlier stages."""
    drop_video: float = 0.1
    """Share of clips that train without their video."""
    drop_text: float = 0.1
    """Share of clips that train without their text."""
    time: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of the flow's time."""
    sampling_steps: int = 25
    """Euler steps from noise to sound."""
    guidance: float = 4.5
    """Strength of classifier-free guidance; 1 is without."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training."""
