"""Section `autoencoder`: stage 1."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from data_prep.audio import MEL_SPECS
from models.codecs import autoencoder
from models.codecs.adversarial import AdversarialConfig
from pipelines.config.fields import check, from_presets
from pipelines.config.training import TrainConfig


@dataclass(kw_only=True)
class AutoencoderConfig:
    """Stage 1: the mel VAE."""

    model: Annotated[autoencoder.MelVAEConfig, from_presets(autoencoder.PRESETS)] = field(
        default_factory=lambda: autoencoder.PRESETS["16k"])
    """Preset name, or fields of MelVAEConfig."""
    mel: str = "mmaudio_16k"
    """Log-mel front end that the VAE codes."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """Training against a discriminator."""
    weights: str = ""
    """Published checkpoint (.pth) to use in place of training this stage; needs the preset `16k` or `44k`."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training."""

    def __post_init__(self):
        check(self.mel in MEL_SPECS, f"mel {self.mel!r} is not known; choose from {', '.join(MEL_SPECS)}")
