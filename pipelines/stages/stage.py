"""What the trainer asks of a stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import nn

from data_prep.stream import ClipStream
from pipelines.config import TrainConfig
from pipelines.engine.draws import Draws
from pipelines.engine.log import Validation
from pipelines.engine.world import World


class Stage(ABC):
    """One stage of the chain: its data, its model, one training step, validation and export."""

    name: str
    """Also the name of the stage's folder."""
    train: TrainConfig
    """How it trains."""
    seed: int
    """Seed of its noise."""
    parents: tuple[Path, ...] = ()
    """Exports of earlier stages that it builds on; their hashes are recorded beside its own export."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The module to train, ready at step 0; its forward takes what `inputs` gives and returns a dict with `loss`."""

    @abstractmethod
    def stream(self, world: World, quarantine: Path) -> ClipStream:
        """Training clips of this rank."""

    @abstractmethod
    def inputs(self, batch: dict, draws: Draws, device: torch.device) -> dict[str, torch.Tensor]:
        """Arguments of the module's forward for one batch; all randomness comes from `draws`."""

    def backward(self, engine, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Forward and backward pass of one batch through the DeepSpeed engine; what the module's forward gave."""
        outputs = engine(**inputs)
        engine.backward(outputs["loss"])
        return outputs

    def after_step(self, engine) -> None:  # noqa: B027  most stages have nothing to do
        """What follows an optimiser step, on every rank."""

    @abstractmethod
    def validate(self, module: nn.Module, device: torch.device) -> Validation:
        """Figures and samples on held-out clips; the module is in evaluation mode."""

    @abstractmethod
    def export(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write what the next stages read."""
