"""Run by torchrun in test_sampling_under_zero.py: what a validation asks of a generator under ZeRO-3 against plain torch."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch import nn

from models.generators.mmdit import PRESETS, MMDiT
from models.objectives.flow_matching import integrate
from pipelines.config import OptimiserConfig, TrainConfig, ZeroConfig
from pipelines.engine.world import join_world
from pipelines.engine.zero import start_engine

CONFIG = dataclasses.replace(PRESETS["tiny"], latent_dim=4, hidden=32, clip_dim=8, sync_dim=8, latent_len=12, clip_len=6, sync_len=32)


class Trained(nn.Module):
    """A generator none of whose gates is closed, with a loss that reads its statistics too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator = MMDiT(CONFIG)
        for parameter in self.generator.parameters():
            nn.init.uniform_(parameter, 0.05, 0.2)

    def forward(self, latent, clip, sync, t):
        return {"loss": self.generator(self.generator.normalise(latent), clip, sync, None, t).square().mean()}


def data():
    shapes = {"latent": (2, 12, 4), "clip": (2, 6, 8), "sync": (2, 32, 8)}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@torch.no_grad()
def answers(generator, latent, clip, sync):
    """Everything that reads the generator's own weights outside its forward."""
    guidance = generator.guidance(latent.shape[:2], clip, sync, None, 3.0)
    return {
        "normalised": generator.normalise(latent),
        "guided": generator.guided_flow(latent, torch.full((2,), 0.5), clip, None, None, 2.0),
        "sampled": generator.unnormalise(integrate(guidance, latent, steps=3)),
    }


def main(folder):
    world, given, worst = join_world(), data(), {}
    wanted = answers(Trained().eval().generator, **given)
    # A rate of next to nothing: the weights are gathered and sharded again, and stay what they are.
    options = OptimiserConfig(lr=1e-12, weight_decay=0.0)
    train = TrainConfig(batch_size=2 * world.size, zero=ZeroConfig(stage=3, persistence_threshold=0), optimiser=options)
    engine = start_engine(Trained(), train, world)
    for when in ("before the first step", "after a step"):
        engine.eval()
        found = answers(engine.module.generator, **given)
        worst |= {f"{name} {when}": float((found[name] - wanted[name]).abs().max()) for name in wanted}
        engine.train()
        engine.backward(engine(**given, t=torch.tensor([0.2, 0.7]))["loss"])
        engine.step()
    if world.is_main:
        (Path(folder) / "worst.json").write_text(json.dumps(worst))


if __name__ == "__main__":
    main(sys.argv[1])
