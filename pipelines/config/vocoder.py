"""Section `vocoder`: from log-mels to sound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.codecs import bigvgan
from models.codecs.vocoder import GriffinLimConfig
from pipelines.config.fields import check


@dataclass(frozen=True, kw_only=True)
class VocoderConfig(GriffinLimConfig):
    """Fast Griffin-Lim, which needs no weights (the inherited keys are its effort), or BigVGAN from a local checkpoint."""

    kind: Literal["griffin_lim", "bigvgan"] = "griffin_lim"
    """Which one."""
    weights: str = ""
    """BigVGAN's checkpoint: best_netG.pt at 16 kHz, bigvgan_generator.pt of the 128-band v2 at 44.1 kHz."""
    preset: Literal["16k", "44k"] = "16k"
    """Layout of that checkpoint."""

    def __post_init__(self):
        super().__post_init__()
        check(bool(self.weights) or self.kind != "bigvgan", "weights: name the local checkpoint of BigVGAN")

    def check_mel(self, mel: str) -> None:
        """ValueError where the vocoder was not made for the log-mels that the autoencoder gives."""
        if self.kind == "bigvgan":
            wanted = bigvgan.PRESETS[self.preset].mel
            check(wanted == mel, f"vocoder.preset {self.preset} takes log-mels {wanted}, autoencoder.mel is {mel}: choose the other preset")
