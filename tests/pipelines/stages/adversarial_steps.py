"""Run by torchrun in test_autoencoder.py: plain and adversarial steps of the VAE under every ZeRO stage against plain torch."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from models.codecs.adversarial import AdversarialConfig, AdversarialVAE
from models.codecs.autoencoder import PRESETS, MelVAE
from models.codecs.discriminator import MelDiscriminatorConfig
from pipelines.config import OptimiserConfig, TrainConfig, ZeroConfig
from pipelines.engine.world import join_world
from pipelines.engine.zero import gather_weights, start_engine

VAE = replace(PRESETS["tiny"], hidden=16, latent_dim=4, bands=16)
# Feature matching divides by a mean over the batch: over ranks it is no average of their own, so it is left out.
CONFIG = AdversarialConfig(weight=0.5, feature_weight=0.0, discriminator=MelDiscriminatorConfig(scales=2, channels=4, layers=2))
BATCH, BEGUN = 4, (False, True, True)
# A large eps keeps Adam from blowing up rounding errors of gradients that are nearly zero.
OPTIONS = OptimiserConfig(lr=0.01, weight_decay=0.0, gradient_clipping=0.0, eps=1e-3)


def model():
    torch.manual_seed(0)
    return AdversarialVAE(MelVAE(VAE), CONFIG)


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 16, 16, generator=generator), torch.randn(BATCH, 4, 8, generator=generator)


def plain():
    module = model()
    optimiser = torch.optim.AdamW(module.parameters(), lr=OPTIONS.lr, betas=OPTIONS.betas, eps=OPTIONS.eps, weight_decay=0.0)
    for begun in BEGUN:
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)  # what ZeRO makes of a missing gradient
        module(*data(), torch.tensor(begun))["loss"].backward()
        optimiser.step()
    return module.state_dict()


def sharded(world, stage):
    train = TrainConfig(batch_size=BATCH, zero=ZeroConfig(stage=stage, persistence_threshold=0), optimiser=OPTIONS)
    engine = start_engine(model(), train, world)
    mine = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    for begun in BEGUN:
        mel, noise = (x[mine] for x in data())
        engine.backward(engine(mel, noise, torch.tensor(begun))["loss"])
        engine.step()
    return gather_weights(engine)


def main(folder):
    world, wanted, worst = join_world(), plain(), {}
    for stage in (0, 1, 2, 3):
        found = sharded(world, stage)
        if world.is_main:
            worst[stage] = max(float((found[name] - wanted[name]).abs().max()) for name in wanted)
    if world.is_main:
        (Path(folder) / "worst.json").write_text(json.dumps(worst))


if __name__ == "__main__":
    main(sys.argv[1])
