"""The section `train` of every stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.config.data import StreamConfig
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
        check(self.steps > 0 and self.batch_size > 0, "steps and batch_size must be above 0")
        check(self.batch_size % self.accumulation == 0, f"batch_size {self.batch_size} must divide by accumulation {self.accumulation}")
        check(0 <= self.ema_decay < 1, "ema_decay must be in [0, 1)")
