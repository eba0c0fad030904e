"""Run by torchrun in test_autoencoder.py: two steps of the autoencoder stage with forced weight normalisation, through the trainer."""

import json
import sys
from pathlib import Path

import torch

from models.codecs.magnitude_preserving import MPConv1d
from pipelines.engine.trainer import Trainer
from pipelines.engine.world import join_world
from pipelines.engine.zero import gather_weights
from pipelines.recipes import load_recipe
from pipelines.stages.autoencoder import AutoencoderStage

MODEL = "{preset: tiny, hidden: 16, multi_resolution_weight: 0.5, forced_weight_norm: true}"
OPTIONS = ("threads=1", f"autoencoder.model={MODEL}", "features.statistics_clips=4", "features.batch_size=4", "vocoder.iterations=1",
           "vocoder.inversion_steps=1", *(f"autoencoder.train.{option}" for option in (
               "steps=2", "batch_size=4", "checkpoint_every=1", "log_every=1", "validation_clips=2", "ema_decay=0", "zero.stage=2",
               "optimiser.lr=1e-2", "optimiser.warmup_steps=0")))


class Measured(AutoencoderStage):
    """Keeps the norms of all kernels, before and after what follows each step."""

    def __init__(self, recipe):
        super().__init__(recipe)
        self.seen = []

    def after_step(self, engine):
        before = gather_weights(engine)
        super().after_step(engine)
        after = gather_weights(engine)
        if before:  # the first process has them
            self.seen.append({"before": off_unit(before, engine.module), "after": off_unit(after, engine.module)})


def off_unit(weights, module):
    """Largest |norm - 1| over the rows of all kernels."""
    kernels = (weights[f"{name}.weight"] for name, part in module.named_modules() if isinstance(part, MPConv1d))
    return max(float((kernel.flatten(1).norm(dim=1) - 1).abs().max()) for kernel in kernels)


def main(folder):
    torch.set_num_threads(1)
    world, folder = join_world(), Path(folder)
    stage = Measured(load_recipe("demo", [*OPTIONS, f"data={folder / 'shards'}"]))
    Trainer(stage, folder / "autoencoder", world).fit()
    if world.is_main:
        (folder / "seen.json").write_text(json.dumps(stage.seen))


if __name__ == "__main__":
    main(sys.argv[1])
