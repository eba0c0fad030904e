"""What our training loop costs over a bare loop of torch's DistributedDataParallel: two processes, one small model, gloo.

Both take the same batches; ours adds ZeRO, guards, averages of the weights, telemetry and the agreement of the ranks after each step.
Run: python -m benchmarks.engine_overhead
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import alternate, machine, show

STEPS, REPEATS, BATCH, WIDTH = 10, 5, 64, 512
SIDES = {"bare DDP loop": None, "engine, ZeRO 0": 0, "engine, ZeRO 1": 1, "engine, ZeRO 2": 2, "engine, ZeRO 3": 3}


class Model(nn.Module):
    """Residual layers, 2.1 million parameters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Vectors (B, WIDTH) -> a loss."""
        for layer in self.layers:
            x = x + layer(x).tanh()
        return {"loss": x.square().mean()}


class Batches:
    """A stream whose batches are in memory."""

    bad = seen = 0

    def __init__(self, world):
        generator = torch.Generator().manual_seed(world.rank)
        self._batch = {"position": torch.arange(BATCH // world.size), "x": torch.randn(BATCH // world.size, WIDTH, generator=generator)}

    def batches(self, workers: int = 0):
        """The same batch for ever."""
        while True:
            yield self._batch


def bare(world):
    """A function that takes STEPS steps without any of ours."""
    module = nn.parallel.DistributedDataParallel(Model())
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    batches = Batches(world).batches()

    def run() -> None:
        for _ in range(STEPS):
            optimiser.zero_grad()
            loss = module(next(batches)["x"])["loss"]
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()

    return run


def engine(world, stage: int, folder: Path):
    """A function that takes STEPS steps of a trainer."""
    from pipelines.config import TrainConfig, ZeroConfig
    from pipelines.engine.log import RunLog, Validation
    from pipelines.engine.trainer import Trainer
    from pipelines.stages.stage import Stage

    class Bench(Stage):
        name, seed = "bench", 0
        train = TrainConfig(steps=10**6, batch_size=BATCH, zero=ZeroConfig(stage=stage, persistence_threshold=0), checkpoint_every=10**6)

        def build(self):
            return Model()

        def stream(self, world, quarantine):
            return Batches(world)

        def inputs(self, batch, draws, device):
            return {"x": batch["x"]}

        def validate(self, module, device):
            return Validation()

        def export(self, weights, folder):
            raise NotImplementedError("nothing is exported here")

    trainer = Trainer(Bench(), folder / f"zero-{stage}", world)
    log = RunLog(trainer.folder, "bench", 0, 10**6, world.is_main)
    batches = trainer.stream.batches()

    def run() -> None:
        with trainer.telemetry.watching():
            for _ in range(STEPS):
                trainer.one_step(batches, log)

    return run


def measure(folder: Path) -> None:
    """In one of the processes: time both sides in turns; rank 0 prints."""
    from pipelines.engine.world import join_world

    world = join_world()
    runs = {name: bare(world) if stage is None else engine(world, stage, folder) for name, stage in SIDES.items()}
    for run in runs.values():
        run()
    seconds = alternate(runs, repeats=REPEATS)
    if world.is_main:
        reference = seconds["bare DDP loop"]
        rows = [(name, 1000 * value / STEPS, value / reference) for name, value in seconds.items()]
        show(f"Engine overhead, two processes ({machine('torch', 'deepspeed')}, load {os.getloadavg()[0]:.1f})",
             ["loop", "ms per step", "ratio"], rows)


def main() -> None:
    """Start two processes of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    folder = parser.parse_args().folder
    if folder:
        measure(folder)
        return
    with tempfile.TemporaryDirectory() as made:
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        subprocess.run([*command, "-m", "benchmarks.engine_overhead", "--folder", made], check=True)


if __name__ == "__main__":
    main()
