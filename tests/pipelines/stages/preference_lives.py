"""Run by torchrun in test_preference.py: a round with every switch thrown, undisturbed and in two lives."""

import json
import sys
from pathlib import Path

import torch

from data_prep.index import build_index
from data_prep.shards import ShardWriter
from models.pretrained import save_weights
from pipelines.engine.checkpoint import weights_hash
from pipelines.engine.log import Validation
from pipelines.engine.trainer import Trainer
from pipelines.engine.world import join_world
from pipelines.features import npy
from pipelines.recipes import load_recipe
from pipelines.stages.preference import PreferenceStage
from tests.pipelines.stages.preference_steps import generator

SHAPES = {
    "features": {"latent_mean": (12, 4), "latent_std": (12, 4), "clip": (6, 8), "sync": (32, 8)},
    "candidates": {"loser": (12, 4), "winner": (12, 4)},
    "distorted": {"distorted": (12, 12, 4)},
}
OPTIONS = ("tuning=full", "losers=mixed", "winner=best_of_n", "train.steps=4", "train.batch_size=4", "train.checkpoint_every=2",
           "train.log_every=1", "train.zero.stage=3", "train.zero.persistence_threshold=0", "train.optimiser.lr=1e-3")


class Round(PreferenceStage):
    """Ends with an error at the first pair of `last`, as if it were killed there."""

    last = None

    def inputs(self, batch, draws, device):
        if self.last is not None and int(batch["position"].max()) >= self.last:
            raise InterruptedError
        return super().inputs(batch, draws, device)

    def validate(self, module, device):
        """How far policy and reference are apart, which needs both whole."""
        pairs = zip(module.generator.parameters(), module.reference.parameters(), strict=True)
        return Validation({"distance": sum(float((ours - theirs).abs().sum()) for ours, theirs in pairs)})


def write(folder):
    random = torch.Generator().manual_seed(2)
    for name, members in SHAPES.items():
        for shard in range(2):
            with ShardWriter(folder / name, shard) as writer:
                for row in range(4):
                    writer.add(f"clip-{shard}-{row}",
                               {f"{member}.npy": npy(torch.randn(shape, generator=random)) for member, shape in members.items()})
        build_index(str(folder / name), {})
    made = generator()
    save_weights(made, made.config, folder / "start")


def life(folder, name, world, last=None):
    urls = {layer: str(folder / layer) for layer in SHAPES}
    stage = Round(load_recipe("demo", [f"preference.{option}" for option in OPTIONS]), urls["features"], urls["candidates"],
                  folder / "start", 1, urls["distorted"])
    stage.last = last
    trainer = Trainer(stage, folder / name, world)
    try:
        trainer.fit()
    except InterruptedError:
        return
    if world.is_main:
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        wanted = ("step", "loss", "margin", "margin_lose", "validation/distance")
        seen = [{key: line[key] for key in wanted if key in line} for line in lines]
        (folder / f"{name}.json").write_text(json.dumps({"weights": weights_hash(folder / name / "export"), "lines": seen}))


def main(folder):
    folder, world = Path(folder), join_world()
    if world.is_main:
        write(folder)
    world.barrier()
    life(folder, "undisturbed", world)
    life(folder, "interrupted", world, last=12)
    life(folder, "interrupted", world)
    if world.is_main:
        found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("undisturbed", "interrupted")}
        (folder / "found.json").write_text(json.dumps(found | {"start": weights_hash(folder / "start")}))


if __name__ == "__main__":
    main(sys.argv[1])
