"""The typed recipe: every key of a recipe file, documented, with its default, checked before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from data_prep.audio import MEL_SPECS
from data_prep.media import ClipFormat
from data_prep.settings import PrepareConfig
from models.codecs import autoencoder
from models.codecs.vocoder import GriffinLimConfig
from models.encoders import sf_cavp
from models.generators import mmdit


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _text(value: Any) -> Any:
    """Numbers on a command line are text; a recipe need not quote them."""
    return str(value) if isinstance(value, int | float) else value


def _from_presets(presets: Mapping[str, Any]) -> pydantic.BeforeValidator:
    """Let a recipe write a model as `tiny`, or as `{preset: tiny, hidden: 96}`, or in full."""

    def expand(value: Any) -> Any:
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, Mapping) or "preset" not in value:
            return value
        name = value["preset"]
        _check(name in presets, f"no preset {name!r}; choose from {', '.join(presets)}")
        return merge(dataclasses.asdict(presets[name]), {k: v for k, v in value.items() if k != "preset"})

    return pydantic.BeforeValidator(expand)


@dataclass(kw_only=True)
class ClipConfig:
    """How clips come out of the shards."""

    seconds: float = 8.0
    """Length of a clip in training and the window of generation."""
    fps: float = 25.0
    """Frame rate of the shards and of what the encoder sees."""
    size: int = 224
    """Side of the square pictures that the encoder sees, pixels."""
    sample_rate: int = 16000
    """Audio rate of the shards, Hz."""
    backend: Literal["pyav", "decord", "torchcodec"] = "pyav"
    """Decoder of the pictures; decord and torchcodec must be installed (extra `decoders`)."""

    def __post_init__(self):
        _check(self.seconds > 0 and self.fps > 0, "seconds and fps must be above 0")


@dataclass(kw_only=True)
class PrepareSection:
    """How the shards of `data` are made: what `prep shards --recipe` and `launch slurm` read."""

    reader: Literal["", "vggsound", "vggss", "audioset", "panda70m", "folder", "rendered"] = ""
    """Reader that lists the clips; empty where the manifest is there already."""
    arguments: tuple[Annotated[str, pydantic.BeforeValidator(_text)], ...] = ()
    """What follows `foleyscale prep manifest READER` on the command line, without --out."""
    manifest: str = "manifest.parquet"
    """The manifest: a path or an fsspec URL."""
    tasks: int = 1
    """Tasks that share the shards, each of them a job of an array."""
    workers: int = 2
    """Processes per task."""
    settings: PrepareConfig = field(default_factory=PrepareConfig)
    """Format, filters and limits."""

    def __post_init__(self):
        _check(self.tasks > 0 and self.workers > 0, "tasks and workers must be above 0")


@dataclass(kw_only=True)
class StreamConfig:
    """How training reads the shards."""

    workers: int = 0
    """Decoding processes per rank; 0 decodes in the training process."""
    window: int = 16
    """Shards that are shuffled together: larger mixes further, smaller reads closer to sequentially."""
    cache_gb: float = 0.0
    """Memory for decoded clips per process: worth it when the whole set fits, as in the demo. Each worker keeps its own part."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the clips cannot be read."""
    clip_timeout: float = 60.0
    """Seconds a clip may decode in a worker before the worker is killed and the clip quarantined; without workers nothing can watch."""
    allow_data_change: bool = False
    """Resume although the shards or the order's settings are not those of the checkpoint: clips may come twice, or not at all."""


@dataclass(kw_only=True)
class OptimiserConfig:
    """AdamW with linear warm-up, then a schedule."""

    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moments."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 1e-6
    """Decoupled weight decay."""
    warmup_steps: int = 1000
    """Steps of linear warm-up from 0."""
    schedule: Literal["constant", "cosine", "steps"] = "constant"
    """After the warm-up: constant, cosine to 0 at the last step, or tenfold drops at `milestones`."""
    milestones: tuple[int, ...] = ()
    """Steps at which the schedule `steps` divides the rate by ten."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    def __post_init__(self):
        _check(self.lr > 0, "lr must be above 0")


@dataclass(kw_only=True)
class ZeroConfig:
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over the ranks: 0 nothing, 1 optimiser state, 2 and gradients, 3 and parameters."""
    offload_optimiser: Literal["none", "cpu"] = "none"
    """Where the optimiser's state lives (stages 1 to 3)."""


@dataclass(kw_only=True)
class TrainConfig:
    """One stage's training."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 64
    """Clips per optimiser step over all ranks and accumulation steps: independent of the number of GPUs."""
    accumulation: int = 1
    """Backward passes per optimiser step on each rank. A contrastive loss sees the negatives of one pass only."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward and backward passes; master weights are fp32 always."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """AdamW and its schedule."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """DeepSpeed ZeRO."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """Reading and decoding."""
    ema_decay: float = 0.9999
    """Decay per step of the averaged weights that the stage exports; 0 exports the last weights."""
    checkpoint_every: int = 1000
    """Steps between resumable checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept, newest first."""
    log_every: int = 10
    """Steps between log lines."""
    validate_every: int = 0
    """Steps between validations; 0 validates at the end only."""
    validation_clips: int = 192
    """Held-out clips that a validation looks at."""

    def __post_init__(self):
        _check(self.steps > 0 and self.batch_size > 0, "steps and batch_size must be above 0")
        _check(self.batch_size % self.accumulation == 0, f"batch_size {self.batch_size} must divide by accumulation {self.accumulation}")
        _check(0 <= self.ema_decay < 1, "ema_decay must be in [0, 1)")


@dataclass(kw_only=True)
class AutoencoderConfig:
    """Stage 1: the mel VAE."""

    model: Annotated[autoencoder.MelVAEConfig, _from_presets(autoencoder.PRESETS)] = field(
        default_factory=lambda: autoencoder.PRESETS["16k"])
    """Preset name, or fields of MelVAEConfig."""
    mel: str = "mmaudio_16k"
    """Log-mel front end that the VAE codes."""
    weights: str = ""
    """Published checkpoint (.pth) to use in place of training this stage; needs the preset `16k` or `44k`."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training."""

    def __post_init__(self):
        _check(self.mel in MEL_SPECS, f"mel {self.mel!r} is not known; choose from {', '.join(MEL_SPECS)}")


@dataclass(kw_only=True)
class ContrastiveConfig:
    """Stage 2: SF-CAVP (MultiSoundGen, equations 1-2)."""

    model: Annotated[sf_cavp.SFCAVPConfig, _from_presets(sf_cavp.PRESETS)] = field(default_factory=lambda: sf_cavp.PRESETS["r50"])
    """Preset name, or fields of SFCAVPConfig."""
    segments: int = 2
    """Consecutive segments drawn from each clip, at a random start: those of one clip are each other's hard negatives."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training."""


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

    model: Annotated[mmdit.MMDiTConfig, _from_presets(mmdit.PRESETS)] = field(default_factory=lambda: mmdit.PRESETS["small_16k"])
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


@dataclass(kw_only=True)
class BarsConfig:
    """What `evaluate` demands; a bar that is not set is not checked."""

    retrieval_times_chance: float | None = None
    """Least R@1 in galleries of 64, as a multiple of chance."""
    autoencoder_ratio: float | None = None
    """Largest L1 of the autoencoder over that of the per-band mean."""
    flow_gap: float | None = None
    """Least relative rise of the flow loss when videos are shuffled."""
    flow_gap_sigmas: float | None = None
    """Least significance of that rise, standard errors."""
    reward_gap_sigmas: float | None = None
    """Least significance by which generated sound prefers its own video."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """Figures on held-out clips."""

    clips: int = 192
    """Held-out clips that are measured."""
    galleries: int = 3
    """Retrieval galleries of 64."""
    examples: int = 4
    """Clips shown in the report."""
    bars: BarsConfig = field(default_factory=BarsConfig)
    """What must be reached."""


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
    vocoder: GriffinLimConfig = field(default_factory=GriffinLimConfig)
    """From log-mels to sound."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """Latents and conditions."""
    generative: GenerativeConfig = field(default_factory=GenerativeConfig)
    """Stage 3."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Stage 4."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Figures and bars."""

    def __post_init__(self):
        _check(self.autoencoder.mel in MEL_SPECS, "autoencoder.mel is not known")
        rate = MEL_SPECS[self.autoencoder.mel].sample_rate
        _check(rate == self.clip.sample_rate, f"clip.sample_rate {self.clip.sample_rate} must equal that of autoencoder.mel, {rate}")
        segment = self.contrastive.model.segment_frames / self.contrastive.model.fps
        _check(self.clip.seconds >= self.contrastive.segments * segment - 1e-6,
               f"clip.seconds {self.clip.seconds} is shorter than contrastive.segments x {segment:g} s")

        for name in ("fps", "sample_rate") if self.prepare else ():
            made, read = getattr(self.prepare.settings.format, name), getattr(self.clip, name)
            _check(made == read, f"prepare.settings.format.{name} {made:g} must equal clip.{name}, {read:g}")

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


def merge(base: Mapping, changes: Mapping) -> dict:
    """`base` with `changes` laid over it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), str):
            # `model: tiny` with `model.hidden=96` laid over it: the preset with a change.
            merged[key] = {"preset": merged[key]}
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else value
    return merged
