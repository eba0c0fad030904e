"""The section `train` of every stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.config.data import StreamConfig
from pipelines.config.ema import EMAConfig
from pipelines.config.fields import check


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
        check(self.lr > 0, "lr must be above 0")


@dataclass(kw_only=True)
class ZeroConfig:
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over the ranks: 0 nothing, 1 optimiser state, 2 and gradients, 3 and parameters."""
    offload_optimiser: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimiser's state lives: on the device, in the host's memory (stages 1 to 3) or on a disk (stage 3)."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where the sharded parameters live between uses (stage 3)."""
    nvme_path: str = ""
    """Folder on a fast local disk for what `nvme` offloads; each stage of a run has a folder of its own below it while it trains."""
    persistence_threshold: int = 100_000
    """Parameters with fewer elements stay whole on every rank (stage 3): gathering them would cost more than it saves."""

    def __post_init__(self):
        check(self.offload_optimiser == "none" or self.stage > 0,
              f"offload_optimiser {self.offload_optimiser} needs a sharded optimiser: set zero.stage to 1, 2 or 3")
        check(self.offload_optimiser != "nvme" or self.stage == 3, f"offload_optimiser nvme needs zero.stage 3, not {self.stage}")
        check(self.offload_parameters == "none" or self.stage == 3,
              f"offload_parameters {self.offload_parameters} needs zero.stage 3, not {self.stage}")
        check("nvme" not in (self.offload_optimiser, self.offload_parameters) or bool(self.nvme_path),
              "nvme_path must name a folder on a local disk where something is offloaded to nvme")


@dataclass(kw_only=True)
class GuardConfig:
    """Steps that would do harm are skipped; too many of them take training back to a good checkpoint."""

    spike_score: float = 20.0
    """Skip a step whose loss lies this many robust standard deviations above the recent median; 0 skips none for its loss."""
    window: int = 128
    """Recent good losses that the median and the deviation are taken from; none is skipped for its loss before they are there."""
    max_skips: int = 10
    """Skipped steps among the last `window` that take training back to the newest checkpoint from before the first of them."""
    max_rollbacks: int = 3
    """Times that training is taken back before it gives up."""

    def __post_init__(self):
        check(self.spike_score >= 0, f"spike_score {self.spike_score} must be 0 or above")
        check(self.window >= 8, f"window {self.window} must be 8 or above: a deviation of fewer losses says nothing")
        check(0 < self.max_skips <= self.window, f"max_skips {self.max_skips} must be in [1, window]")
        check(self.max_rollbacks >= 0, f"max_rollbacks {self.max_rollbacks} must be 0 or above")


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
    ema: EMAConfig | None = None
    """Other averages than the one of `ema_decay`, which then counts for nothing."""
    checkpoint_every: int = 1000
    """Steps between resumable checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept, newest first."""
    keep_every: int = 0
    """Steps between checkpoints that are kept for good, a multiple of `checkpoint_every`; 0 keeps none beside the newest."""
    asynchronous_checkpoints: bool = False
    """Write checkpoints in the background; costs host memory for one copy of this rank's share."""
    checkpoint_mirror: str = ""
    """fsspec URL such as s3://bucket/run that complete checkpoints are copied to; empty copies none."""
    guards: GuardConfig = field(default_factory=GuardConfig)
    """What happens to steps that would do harm."""
    hang_seconds: float = 1800.0
    """A step, validation, save or restart that takes longer counts as hung: every stack is written down and the process ends; 0 never."""
    profile: int = 0
    """Steps that a torch profiler trace in the stage's folder covers, after a few to warm up; 0 writes none."""
    peak_tflops: float = 0.0
    """Dense peak of one device in the precision trained, for the model FLOPs utilisation; 0 takes that of a known GPU."""
    log_every: int = 10
    """Steps between log lines."""
    validate_every: int = 0
    """Steps between validations; 0 validates at the end only."""
    validation_clips: int = 192
    """Held-out clips that a validation looks at."""

    def __post_init__(self):
        check(self.steps > 0 and self.batch_size > 0, "steps and batch_size must be above 0")
        check(self.batch_size % self.accumulation == 0, f"batch_size {self.batch_size} must divide by accumulation {self.accumulation}")
        check(0 <= self.ema_decay < 1, "ema_decay must be in [0, 1)")
        check(self.checkpoint_every > 0, f"checkpoint_every {self.checkpoint_every} must be above 0")
        check(self.keep_every >= 0 and self.keep_every % self.checkpoint_every == 0,
              f"keep_every {self.keep_every} must be a multiple of checkpoint_every {self.checkpoint_every}, or 0")
        check(min(self.hang_seconds, self.profile, self.peak_tflops) >= 0, "hang_seconds, profile and peak_tflops must be 0 or above")
