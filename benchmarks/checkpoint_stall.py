"""How long training stands still for a checkpoint: written at once, in the background, and by DeepSpeed's own save_checkpoint.

    python -m benchmarks.checkpoint_stall [--folder DIR] [--width 768] [--layers 12] [--steps 20] [--repeats 3]

A stall is what `steps` steps with one save before them take longer than without it, and it counts all: the copy, what the thread that
writes takes from the steps, and waiting for the disk at the end. On a CPU the copies and the checksums are made by the cores that train.
Ours flushes files and folders to the disk and sums them, and holds an average of the weights; DeepSpeed's does none of this, and
writes the weights twice.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import alternate, machine, show
from pipelines.config import OptimiserConfig, TrainConfig, ZeroConfig
from pipelines.engine.checkpoint import Checkpoints
from pipelines.engine.ema import ShardedEMA
from pipelines.engine.world import World, join_world
from pipelines.engine.zero import start_engine

BATCH = 64


@dataclass
class Options:
    """As a recipe sets them."""

    asynchronous_checkpoints: bool
    keep_checkpoints: int = 1
    keep_every: int = 0
    checkpoint_mirror: str = ""


class Layers(nn.Module):
    """Square matrices: many bytes of state for their time."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.layers = nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.GELU())))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean square of the last layer."""
        return {"loss": self.layers(x).square().mean()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    world = join_world()
    engine, ema = trained(world, arguments.width, arguments.layers)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        saves = {"none": lambda: None, **savers(Path(folder), world, engine, ema)}
        runs = {name: lambda save=save: steps_after(save, world, engine, ema, arguments.steps) for name, save in saves.items()}
        for run in runs.values():
            run()
        seconds = alternate(runs, arguments.repeats)
    step = seconds.pop("none") / arguments.steps
    rows = [[name, value - step * arguments.steps, (value - step * arguments.steps) / step] for name, value in seconds.items()]
    print(machine("torch", "deepspeed"), "on", world.device)
    values = arguments.layers * arguments.width * (arguments.width + 1)
    title = f"Stall of one checkpoint of {values / 1e6:.3g} M parameters, a step being {1000 * step:.0f} ms"
    show(title, ["checkpoint", "s", "steps"], rows)


def trained(world: World, width: int, layers: int) -> tuple:
    """An engine under ZeRO 1 and an average of its weights, past the first step."""
    train = TrainConfig(batch_size=BATCH * world.size, zero=ZeroConfig(stage=1), optimiser=OptimiserConfig())
    engine = start_engine(Layers(width, layers).to(world.device), train, world)
    ema = ShardedEMA(engine, 0.999)
    steps_after(lambda: None, world, engine, ema, 2)
    return engine, ema


def savers(folder: Path, world: World, engine, ema: ShardedEMA) -> dict:
    """Name -> a save that returns as soon as training may go on, and a wait for what is still being written."""
    numbers = itertools.count(1)
    ours = {name: Checkpoints(folder / name, world, Options(behind)) for name, behind in (("at once", False), ("in the background", True))}

    def save(checkpoints: Checkpoints):
        checkpoints.save(next(numbers), engine, ema, {})
        return checkpoints.wait

    def deepspeeds():
        shutil.rmtree(folder / "deepspeed", ignore_errors=True)
        engine.save_checkpoint(str(folder / "deepspeed"), tag="step", save_latest=False)

    return {name: lambda checkpoints=checkpoints: save(checkpoints) for name, checkpoints in ours.items()} | {"DeepSpeed's": deepspeeds}


def steps_after(save, world: World, engine, ema: ShardedEMA, steps: int) -> None:
    """A save, and training until nothing of it is left to do."""
    wait = save()
    x = torch.randn(BATCH, engine.module.layers[0].in_features, device=world.device)
    for step in range(steps):
        engine.backward(engine(x)["loss"])
        engine.step()
        ema.update(step + 1)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    if wait:
        wait()


if __name__ == "__main__":
    main()
