"""Run by test_elastic.py: a toy is trained through stops at which the world size and the ZeRO stage change."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipelines.config import OptimiserConfig, TrainConfig, ZeroConfig
from pipelines.config.ema import EMAConfig
from pipelines.engine.checkpoint import Checkpoints
from pipelines.engine.ema import ShardedEMA
from pipelines.engine.zero import start_engine
from tests.pipelines.engine.worlds import preload, run_world

BATCH, STEPS = 12, 9
EMA = EMAConfig(kind="power", sigma_rels=(0.05, 0.1), snapshot_every=3, export=0.1)


class Toy(nn.Module):
    """A frozen layer, a scalar, a buffer, batch statistics that differ by rank, sizes that no world divides, one weight unused."""

    def __init__(self):
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(5, 17), nn.Linear(17, 17).requires_grad_(False), nn.Linear(17, 3)
        self.statistics = nn.BatchNorm1d(17, affine=False)
        self.gain, self.unused = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.ones(7))
        self.register_buffer("offset", torch.ones(3))

    def forward(self, x, y):
        hidden = self.first(x).tanh()
        with torch.no_grad():
            self.statistics(hidden.float())  # its running mean is kept, what it gives would depend on the world size
        found = self.last(self.frozen(hidden)) * self.gain + self.offset
        return {"loss": (found - y).square().mean() + 0 * self.unused.sum()}


@dataclass
class Options:
    """As a recipe would set them."""

    keep_checkpoints: int = 2
    keep_every: int = 0
    asynchronous_checkpoints: bool = True
    checkpoint_mirror: str = ""


def life(world, folder, stage, until, precision="fp32"):
    """One job: resume, train until a step, save. Losses, the final weights and averages are written down by rank 0."""
    train = TrainConfig(batch_size=BATCH, precision=precision, zero=ZeroConfig(stage=stage),
                        optimiser=OptimiserConfig(lr=0.01, weight_decay=0.1, gradient_clipping=0.5))
    torch.manual_seed(0)
    toy = Toy()
    checkpoints = Checkpoints(folder / "checkpoints", world, Options())
    if checkpoints.rollback_target() is not None:
        # It starts elsewhere after a stop, so that what the checkpoint does not give back is seen.
        with torch.no_grad():
            for value in (*toy.parameters(), *toy.buffers()):
                value.add_(1)
    engine = start_engine(toy, train, world)
    ema = ShardedEMA(engine, EMA, folder / "snapshots")
    client = checkpoints.restore(engine, ema) or {"step": 0, "stream": {"position": 0}}
    position = client["stream"]["position"]
    assert position == client["step"] * BATCH
    for step in range(client["step"], until):
        xs, ys = batch(position)
        mine = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
        loss = engine(xs[mine].to(engine.module.first.weight.dtype), ys[mine])["loss"]
        engine.backward(loss)
        engine.step()
        ema.update(step + 1)
        position += BATCH
        note(world, folder / "losses.jsonl", step, float(loss))
        if (step + 1) % 2 == 0:
            checkpoints.save(step + 1, engine, ema, {"stream": {"position": position}})
    checkpoints.save(until, engine, ema, {"stream": {"position": position}})
    checkpoints.wait()
    averaged = ema.weights(until)
    if world.is_main:
        torch.save(averaged, folder / "averaged.pt")


def batch(position):
    """The global batch at a position of the stream."""
    generator = torch.Generator().manual_seed(position)
    return torch.randn(BATCH, 5, generator=generator), 3 * torch.randn(BATCH, 3, generator=generator)


def note(world, path, step, loss):
    """Add the mean loss of all ranks to a file of lines."""
    mean = world.total({"loss": loss})["loss"] / world.size
    if world.is_main:
        with open(path, "a") as file:
            file.write(json.dumps([step, mean]) + "\n")


def main(folder, plans):
    """plans: name -> [(processes, ZeRO stage, last step), ...]."""
    preload()
    for name, plan in plans.items():
        (folder / name).mkdir()
        precision = "bf16" if name.startswith("bf16") else "fp32"
        for size, stage, until in plan:
            run_world(size, life, folder / name, stage, until, precision)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
