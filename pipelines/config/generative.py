"""Sections `features` and `generative`: stage 3 and what it reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from models.generators import mmdit
from pipelines.config.fields import check, from_presets
from pipelines.config.training import TrainConfig


@dataclass(kw_only=True)
class FeaturesConfig:
    """Latents and conditions computed once, for the stages that train on them."""

    batch_size: int = 32
    """Clips encoded together."""
    statistics_clips: int = 512
    """Clips that the normalisation of conditions and latents is measured on."""
    workers: int = 0
    """Processes that decode ahead for each process that encodes, here and wherever clips are read outside training; 0 decodes between."""
    clip_timeout: float = 60.0
    """Seconds a clip may decode in one of them before it is left out as broken; without workers nothing can watch."""

    def __post_init__(self):
        check(self.batch_size > 0 and self.statistics_clips > 0, "batch_size and statistics_clips must be 1 or more")
        check(self.workers >= 0 and self.clip_timeout > 0, "workers must be 0 or more, clip_timeout above 0")

    @property
    def decoding(self) -> dict[str, Any]:
        """Who decodes, and how long a clip may take."""
        return {"workers": self.workers, "clip_timeout": self.clip_timeout}


@dataclass(kw_only=True)
class GenerativeConfig:
    """Stage 3: MM-DiT with conditional flow matching (MMAudio)."""

    model: Annotated[mmdit.MMDiTConfig, from_presets(mmdit.PRESETS)] = field(default_factory=lambda: mmdit.PRESETS["small_16k"])
    """Preset name, or fields of MMDiTConfig. Latent and condition sizes are taken from the earlier stages and the encoders."""
    weights: str = ""
    """Checkpoint to start from: one published with MMAudio (.pth), or an export of ours (.safetensors). It brings its latent statistics."""
    fine_tune: bool = True
    """Train on from `weights`; false takes them over as they are, for preference rounds on a published model."""
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
    compile: bool = False
    """Compile each transformer block (needs a C++ compiler on a CPU); not with ZeRO stage 3, whose gathering breaks the graphs."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training."""

    def __post_init__(self):
        check(not self.compile or self.train.zero.stage < 3, "compile works with train.zero.stage 0 to 2: set one of the two otherwise")
        check(self.fine_tune or bool(self.weights), "fine_tune is false, so name the `weights` to take over")
