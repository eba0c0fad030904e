"""The typed recipe: every key of a recipe file, documented, with its default, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pydantic

from data_prep.audio import MEL_SPECS
from data_prep.media import ClipFormat
from data_prep.settings import PrepareConfig
from pipelines.config.autoencoder import AutoencoderConfig
from pipelines.config.conditioning import ConditioningConfig
from pipelines.config.contrastive import ContrastiveConfig
from pipelines.config.data import ClipConfig, PrepareSection
from pipelines.config.evaluation import EvaluationConfig
from pipelines.config.fields import check
from pipelines.config.generative import FeaturesConfig, GenerativeConfig
from pipelines.config.preference import PreferenceConfig
from pipelines.config.vocoder import VocoderConfig


@dataclass(kw_only=True)
class Recipe:
    """The whole chain."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    name: str = "run"
    """Name of the run; its folder is `out`/`name`."""
    out: str = "runs"
    """Folder of all runs."""
    data: str = ""
    """Shards made by `foleyscale prep shards`: a folder or an fsspec URL."""
    train_split: str = "train"
    """Split that is trained on."""
    heldout_split: str = "heldout"
    """Split that validation and evaluation look at."""
    seed: int = 0
    """Seed of weights, order and noise."""
    threads: int = 0
    """CPU threads of torch in each process; 0 leaves torch's choice."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """Clip format."""
    prepare: PrepareSection | None = None
    """How the shards are made; not needed where they are there already."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Stage 1."""
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Stage 2."""
    vocoder: VocoderConfig = field(default_factory=VocoderConfig)
    """From log-mels to sound."""
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    """What tells the generator about a clip."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """Latents and conditions."""
    generative: GenerativeConfig = field(default_factory=GenerativeConfig)
    """Stage 3."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Stage 4."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Figures and bars."""

    def __post_init__(self):
        check(self.autoencoder.mel in MEL_SPECS, "autoencoder.mel is not known")
        rate = MEL_SPECS[self.autoencoder.mel].sample_rate
        check(rate == self.clip.sample_rate, f"clip.sample_rate {self.clip.sample_rate} must equal that of autoencoder.mel, {rate}")
        if self.conditioning.uses_own or self.preference.rounds:
            self._check_heard()
        self.vocoder.check_mel(self.autoencoder.mel)
        self._check_distortion()
        wanted = self.contrastive.seconds
        check(self.clip.seconds >= wanted - 1e-6,
              f"clip.seconds {self.clip.seconds} is shorter than the {wanted:g} s of {self.contrastive.segments} contrastive.segments")
        for name in ("fps", "sample_rate") if self.prepare else ():
            made, read = getattr(self.prepare.settings.format, name), getattr(self.clip, name)
            check(made == read, f"prepare.settings.format.{name} {made:g} must equal clip.{name}, {read:g}")

    def _check_heard(self) -> None:
        """Whether the contrastive stage hears and sees the clips as they are: shards are read at one rate and one number of pictures."""
        clip, model = self.clip, self.contrastive.model
        check(model.mel in MEL_SPECS, f"contrastive.model.mel {model.mel!r} is not known; choose from {', '.join(MEL_SPECS)}")
        heard = MEL_SPECS[model.mel]
        check(clip.sample_rate == heard.sample_rate,
              f"clip.sample_rate is {clip.sample_rate} and contrastive.model.mel takes {heard.sample_rate}: choose sf_cavp at 16000 Hz or "
              "sf_cavp_44k at 44100 Hz (contrastive.model.mel=sf_cavp_44k), or public encoders (conditioning.clip, conditioning.sync) and "
              "preference.rounds=0")
        check(clip.fps == model.fps,
              f"clip.fps is {clip.fps:g} and contrastive.model.fps {model.fps:g}: pictures and sound of a segment would not be of the same "
              f"time; make shards at {model.fps:g} fps (clip.fps, prepare.settings.format.fps), or set contrastive.model.fps={clip.fps:g} "
              "with segment_frames, hop_frames and segment_mels that fit")
        seen, sounding = model.segment_frames / model.fps, model.segment_mels * heard.hop / heard.sample_rate
        check(abs(seen - sounding) < 1e-6,
              f"contrastive.model: segment_frames last {seen:.4g} s at {model.fps:g} fps and segment_mels {sounding:.4g} s in {model.mel}: "
              "give both the same length; sf_cavp and sf_cavp_44k have 4 mels to a picture at 25 fps")

    def _check_distortion(self) -> None:
        if not self.preference.needs_distorted:
            return
        distortion, spec = self.preference.distortion, MEL_SPECS[self.autoencoder.mel]
        share, latent = 4 if "warp" in distortion.kinds else 2, 2 * spec.hop / spec.sample_rate
        coarse, most = distortion.coarse_seconds, self.clip.seconds / share
        check(coarse <= most, f"preference.distortion.coarse_seconds is {coarse:g}: give at most {most:g}, 1 / {share} of clip.seconds; "
              "warp moves a quarter of a clip at most, shift and swap half")
        check(distortion.subtle_seconds >= latent - 1e-6,
              f"preference.distortion.subtle_seconds {distortion.subtle_seconds:g} is shorter than a latent, {latent:.4g} s: give more")

    @property
    def preparation(self) -> PrepareConfig:
        """How to make its shards: as `prepare` says, else clips of the format that `clip` reads."""
        if self.prepare:
            return self.prepare.settings
        clip = self.clip
        side = clip.size + clip.size % 2
        return PrepareConfig(format=ClipFormat(fps=clip.fps, sample_rate=clip.sample_rate, short_side=side, max_seconds=clip.seconds))

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return Path(self.out) / self.name
