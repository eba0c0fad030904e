"""Section `contrastive`: stage 2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from models.encoders import sf_cavp
from pipelines.config.fields import check, from_presets
from pipelines.config.training import TrainConfig


@dataclass(kw_only=True)
class ContrastiveConfig:
    """Stage 2: SF-CAVP (MultiSoundGen, equations 1-2)."""

    model: Annotated[sf_cavp.SFCAVPConfig, from_presets(sf_cavp.PRESETS)] = field(default_factory=lambda: sf_cavp.PRESETS["r50"])
    """Preset name, or fields of SFCAVPConfig."""
    video_weights: str = ""
    """PyTorchVideo's SLOWFAST_8x8_R50.pyth (Kinetics-400) to start the video tower from; needs the preset `r50_kinetics`."""
    segments: int = 2
    """Consecutive segments drawn from each clip, at a random start: those of one clip are each other's hard negatives."""
    chunk: int = 0
    """Clips that the towers see at a time on each rank, twice per step (cached gradients): negatives of the whole batch, activations of
    a chunk. Batch norms that are not frozen measure chunks. 0 = the whole batch at once."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training."""

    def __post_init__(self):
        check(self.segments > 0, f"contrastive.segments is {self.segments}: give a number above 0")
        check(self.chunk >= 0, f"contrastive.chunk is {self.chunk}: give clips per pass, or 0 for the whole batch at once")
        # Accumulated passes do not see each other's negatives, which is what chunks are for.
        check(self.chunk == 0 or self.train.accumulation == 1,
              f"contrastive.chunk is {self.chunk} and contrastive.train.accumulation {self.train.accumulation}: set accumulation to 1; "
              "chunks bound the memory, and every clip keeps all others as negatives")

    @property
    def seconds(self) -> float:
        """Length of the clips that it trains on."""
        return self.model.seconds(self.segments)
