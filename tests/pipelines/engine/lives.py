"""Run by test_kills.py: a stage whose processes are killed with signal 9 at seeded moments, over and over, until it is done."""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from data_prep.index import ShardSet
from data_prep.stream import ClipStream
from pipelines.config import OptimiserConfig, StreamConfig, TrainConfig, ZeroConfig
from pipelines.config.ema import EMAConfig
from pipelines.engine.log import Validation
from pipelines.engine.trainer import Trainer
from pipelines.stages.stage import Stage
from tests.fixtures.made_shards import DECODE, write
from tests.pipelines.engine.worlds import fork_world, kill, preload, run_world, wait_for

BATCH, STEPS, STAGES = 12, 40, (2, 3, 0, 1)
MOMENT = 0.25
"""Seconds after the first step within which most kills fall: a whole run takes about as long."""


class Tiny(nn.Module):
    """Guesses a number from its position and some noise."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, value, noise):
        return {"loss": (self.layers(noise) - value / 48).square().mean()}


class TinyStage(Stage):
    """Steps of a few milliseconds over real shards; every clip that is looked at is written down."""

    name, seed = "tiny", 3

    def __init__(self, folder: Path, shards: Path, zero: int, asynchronous: bool):
        self._folder, self._shards = folder, shards
        self.train = TrainConfig(steps=STEPS, batch_size=BATCH, checkpoint_every=2, keep_checkpoints=2, log_every=1, hang_seconds=0.0,
                                 asynchronous_checkpoints=asynchronous, zero=ZeroConfig(stage=zero, persistence_threshold=0),
                                 stream=StreamConfig(workers=0, window=2),
                                 optimiser=OptimiserConfig(lr=1e-2, warmup_steps=4), ema=EMAConfig(kind="power"))

    def build(self):
        return Tiny()

    def stream(self, world, quarantine):
        self._log = open(self._folder / f"keys-{world.rank}.jsonl", "a", buffering=1)  # noqa: SIM115 until the process ends
        return ClipStream(ShardSet.open(self._shards), DECODE, batch_size=BATCH, rank=world.rank, world_size=world.size, window=2)

    def inputs(self, batch, draws, device):
        self._log.write(json.dumps(list(zip(batch["position"].tolist(), batch["key"], strict=True))) + "\n")
        return {"value": batch["value"], "noise": draws.normal(8)}

    def validate(self, module, device):
        return Validation()

    def export(self, weights, folder):
        save_file(weights, folder / "weights.safetensors")


def life(world, folder, shards, zero, asynchronous):
    """One start of the stage, to the end if it is let."""
    torch.set_num_threads(1)
    Trainer(TinyStage(folder, shards, zero, asynchronous), folder, world).fit()


def hunted(folder, shards, sizes, stages, rng, kills):
    """A run whose ranks are killed until it is done or `kills` have fallen, then let go; how many fell, and how many of them in a save.

    Each start has one of the `sizes` and one of the ZeRO `stages`.
    """
    folder.mkdir()
    fallen = in_save = 0
    while fallen < kills:
        ranks = fork_world(rng.choice(sizes), life, folder, shards, rng.choice(stages), rng.random() < 0.5)
        saving = _wait_for_the_moment(folder, ranks, rng)
        kill(ranks if rng.random() < 0.5 else [rng.choice(ranks)])
        if not any(wait_for(ranks)):
            return fallen, in_save
        fallen, in_save = fallen + 1, in_save + saving
    run_world(sizes[0], life, folder, shards, stages[0], True)
    return fallen, in_save


def _wait_for_the_moment(folder, ranks, rng):
    """A fifth of the kills fall anywhere in the start, two in training, two in a save; whether it is in a save."""
    kind, begin = rng.choice("sttcc"), time.monotonic()
    if kind == "s":
        time.sleep(rng.uniform(0, 2))
        return False
    first = _size(folder)
    while _size(folder) == first and _alive(ranks[0]):
        time.sleep(0.001)
    time.sleep(rng.uniform(0, MOMENT))
    if kind == "t":
        return False
    while not (saving := any((folder / "checkpoints").glob(".unfinished-*"))) and _alive(ranks[0]) and time.monotonic() < begin + 60:
        time.sleep(0.0005)
    time.sleep(rng.choice((0, 0.001, 0.003)))
    return saving


def _size(folder):
    path = folder / "keys-0.jsonl"
    return path.stat().st_size if path.exists() else 0


def _alive(rank):
    """Without taking its exit status, which is asked for later."""
    return Path(f"/proc/{rank}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def main(folder, kills):
    """Three kinds of runs, one process, two, and a number that changes with the ZeRO stage, until `kills` have fallen.

    What they wrote stays in `folder`: whole-SIZE-STAGE of runs that are left alone, hunted-SIZES-STAGES-NUMBER of the others.
    """
    preload()
    write(folder / "shards")
    for size, stage in itertools.product((1, 2), STAGES):
        whole = folder / f"whole-{size}-{stage}"
        whole.mkdir()
        run_world(size, life, whole, folder / "shards", stage, False)
    rng, fallen, in_save, number = random.Random(0), 0, 0, 0
    while fallen < kills:
        sizes = ((1,), (2,), (1, 2, 3))[number % 3]
        stages = STAGES if len(sizes) > 1 else (STAGES[number % 4],)
        name = "-".join(("hunted", "".join(map(str, sizes)), "".join(map(str, stages)), str(number)))
        found = hunted(folder / name, folder / "shards", sizes, stages, rng, min(12, kills - fallen))
        fallen, in_save, number = fallen + found[0], in_save + found[1], number + 1
    (folder / "kills.json").write_text(json.dumps({"kills": fallen, "in_save": in_save}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
