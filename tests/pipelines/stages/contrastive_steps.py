"""Run by torchrun in test_contrastive.py: steps of the contrastive stage under every ZeRO stage against plain torch on the full batch."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from models.encoders import slowfast
from models.encoders.sf_cavp import PRESETS, SFCAVP, SFCAVPConfig
from pipelines.config import ContrastiveConfig, OptimiserConfig, Recipe, TrainConfig, ZeroConfig
from pipelines.engine import zero
from pipelines.engine.world import join_world
from pipelines.stages.contrastive import ContrastiveStage

BATCH, STEPS, PARTS = 6, 2, ("stem", "res2", "res3", "res4", "res5")
CASES = ((0.05, 0, ()), (0.05, 2, ()), (0.05, 2, PARTS), (0.0, 2, PARTS))
"""Gradient clipping, clips per pass, parts recomputed."""


def model_config(parts: tuple[str, ...] = (), negatives: str = "global") -> SFCAVPConfig:
    """Narrow towers whose norms do not measure anything, so that a step of the whole batch and of its parts is the same."""
    def tower(config):
        return replace(config, width=8, beta=2, batch_norm="frozen", activation_checkpointing=parts, zero_init=False)

    towers = {"video": tower(slowfast.PRESETS["video_tiny"]), "audio": tower(slowfast.PRESETS["audio_tiny"])}
    return replace(PRESETS["tiny"], **towers, feature_norm="none", negatives=negatives)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (STEPS, BATCH, 32, 3, 16, 16), generator=random, dtype=torch.uint8)
    return frames, -5 + 2 * torch.randn(STEPS, BATCH, 128, 128, generator=random)


def train_config(stage: int, clipping: float) -> TrainConfig:
    # Adam divides by the gradient's size: with a small eps it would show rounding errors of gradients near 0, which differ from one
    # processor to another, as whole steps.
    options = OptimiserConfig(lr=0.01, eps=1e-2, weight_decay=0.1, gradient_clipping=clipping)
    # Stage 3 shards what it would else keep whole on every rank; only the smallest stay, for the sake of time.
    return TrainConfig(batch_size=BATCH, zero=ZeroConfig(stage=stage, persistence_threshold=2000), optimiser=options)


def plain(clipping: float, ranks: int = 1) -> dict[str, torch.Tensor]:
    """Weights after STEPS steps of torch on all clips; `ranks` above 1 have negatives of their own."""
    torch.manual_seed(0)
    module, options = SFCAVP(model_config(negatives="local")).train(), train_config(0, clipping).optimiser
    optimiser = torch.optim.AdamW(module.parameters(), lr=options.lr, betas=options.betas, eps=options.eps,
                                  weight_decay=options.weight_decay)
    for frames, mel in zip(*data(), strict=True):
        optimiser.zero_grad()
        for part in zip(frames.chunk(ranks), mel.chunk(ranks), strict=True):
            (module(*part)["loss"] / ranks).backward()
        if clipping:
            nn.utils.clip_grad_norm_(module.parameters(), clipping)
        optimiser.step()
    return module.state_dict()


def trained(world, config: ContrastiveConfig) -> dict[str, torch.Tensor]:
    """The same by the stage on a DeepSpeed engine."""
    torch.manual_seed(0)
    stage = ContrastiveStage(Recipe(contrastive=config))
    engine = zero.start_engine(stage.build(), stage.train, world)
    engine.train()
    mine = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    for frames, mel in zip(*data(), strict=True):
        stage.backward(engine, {"frames": frames[mine], "mel": mel[mine]})
        engine.step()
    assert all(buffer.dtype == torch.float32 for name, buffer in engine.module.named_buffers() if "running" in name)
    return zero.gather_weights(engine)


def furthest(world, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == (wanted.keys() if world.is_main else set()), "other ranks than the first hold no whole weights"
    return max((float((found[name].float() - wanted[name]).abs().max()) for name in found), default=0.0)


def main(folder: str, cases: str) -> None:
    world, worst = join_world(), {}
    for stage, (clipping, chunk, parts) in itertools.product((0, 1, 2, 3), CASES) if cases == "all" else [(2, CASES[2])]:
        config = ContrastiveConfig(model=model_config(parts), chunk=chunk, train=train_config(stage, clipping))
        case = f"stage {stage}, clipping {clipping}, chunk {chunk}, {len(parts)} parts"
        worst[case] = furthest(world, trained(world, config), plain(clipping))
    if cases == "all":
        config = ContrastiveConfig(model=model_config(negatives="local"), chunk=1, train=train_config(1, 0.0))
        worst["negatives of each rank"] = furthest(world, trained(world, config), plain(0.0, world.size))
    if world.is_main:
        Path(folder, "worst.json").write_text(json.dumps(worst))


if __name__ == "__main__":
    main(*sys.argv[1:])
