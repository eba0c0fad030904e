"""Run by torchrun in test_zero.py: two optimiser steps under every ZeRO stage against plain torch on the full batch."""

import itertools
import json
import sys

import torch
from torch import nn

from pipelines.config import OptimiserConfig, TrainConfig, ZeroConfig
from pipelines.engine.checkpoint import load_checkpoint, save_checkpoint
from pipelines.engine.ema import ShardedEMA
from pipelines.engine.world import join_world
from pipelines.engine.zero import gather_weights, start_engine

BATCH, STEPS, DECAY = 8, 2, 0.5


class Toy(nn.Module):
    """Two layers, a frozen one, a scalar and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(6, 16), nn.Linear(16, 16).requires_grad_(False), nn.Linear(16, 3)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("offset", torch.ones(3))

    def forward(self, x, y):
        return {"loss": (self.last(self.frozen(self.first(x).tanh())) * self.gain + self.offset - y).square().mean()}


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, BATCH, 6, generator=generator), 3 * torch.randn(STEPS, BATCH, 3, generator=generator)


def toy():
    torch.manual_seed(0)
    return Toy()


def plain(clipping):
    """Weights and averaged weights after STEPS full-batch steps."""
    module, (xs, ys) = toy(), data()
    trainable = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    average = [p.detach().clone() for p in trainable]
    for step, (x, y) in enumerate(zip(xs, ys, strict=True), 1):
        optimiser.zero_grad()
        module(x, y)["loss"].backward()
        if clipping:
            nn.utils.clip_grad_norm_(trainable, clipping)
        optimiser.step()
        decay = min(DECAY, (1 + step) / (10 + step))
        average = [a * decay + p.detach() * (1 - decay) for a, p in zip(average, trainable, strict=True)]
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    return module.state_dict(), module.state_dict() | dict(zip(names, average, strict=True))


def sharded(world, stage, clipping, accumulation, folder):
    """The same under ZeRO, stopped and resumed from a checkpoint between the steps."""
    train = TrainConfig(batch_size=BATCH, accumulation=accumulation, zero=ZeroConfig(stage=stage),
                        optimiser=OptimiserConfig(lr=0.01, weight_decay=0.1, gradient_clipping=clipping))
    xs, ys = data()
    for step in range(STEPS):
        engine = start_engine(toy(), train, world)
        ema = ShardedEMA(engine, DECAY)
        state = load_checkpoint(folder, engine, ema, world)
        assert (state["step"] if state else 0) == step
        mine = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
        for x, y in zip(xs[step, mine].chunk(accumulation), ys[step, mine].chunk(accumulation), strict=True):
            engine.backward(engine(x, y)["loss"])
            engine.step()
        ema.update(step + 1)
        save_checkpoint(folder, step + 1, engine, ema, {"position": step}, world, keep=1)
        weights, averaged = gather_weights(engine), ema.weights()
    return weights, averaged


def main(folder):
    from pathlib import Path

    world, worst = join_world(), {}
    for stage, clipping, accumulation in itertools.product((0, 1, 2, 3), (0.0, 0.1), (1, 2)):
        case = f"stage {stage}, clipping {clipping}, accumulation {accumulation}"
        path = Path(folder) / case.replace(" ", "")
        path.mkdir(exist_ok=True)
        found, wanted = sharded(world, stage, clipping, accumulation, path), plain(clipping)
        assert all(f.keys() == w.keys() for f, w in zip(found, wanted, strict=True))
        worst[case] = [max(float((f[name] - w[name]).abs().max()) for name in w) for f, w in zip(found, wanted, strict=True)]
    if world.is_main:
        (Path(folder) / "worst.json").write_text(json.dumps(worst))


if __name__ == "__main__":
    main(sys.argv[1])
