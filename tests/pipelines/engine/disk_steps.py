"""Run by test_disk.py: stage 3 with optimiser and parameters on a disk, stopped and gone on with, against plain torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from pipelines.config import OptimiserConfig, TrainConfig, ZeroConfig
from pipelines.engine.checkpoint import Checkpoints
from pipelines.engine.disk import load_asynchronous_io
from pipelines.engine.ema import ShardedEMA
from pipelines.engine.gradients import GradientNorms, update_held_back
from pipelines.engine.unit_rows import normalise_rows
from pipelines.engine.zero import gather_weights, start_engine, stop_engine
from tests.pipelines.engine.elastic_steps import Options
from tests.pipelines.engine.worlds import preload, run_world

BATCH, STEPS, DECAY, UNIT = 4, 4, 0.5, ("last.weight",)
SKIPPED = 2
OPTIONS = OptimiserConfig(lr=0.01, weight_decay=0.1, gradient_clipping=0.5, eps=1e-3)
CASES = {"optimiser": ("nvme", "none"), "parameters": ("none", "nvme"), "both": ("nvme", "nvme")}


class Wide(nn.Module):
    """Weights of which half are still more than a block of a disk, and some that are not."""

    def __init__(self):
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(512, 1100), nn.Linear(1100, 1100).requires_grad_(False), nn.Linear(1100, 512)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return {"loss": (self.last(self.frozen(self.first(x).tanh())) * self.gain).square().mean()}


def wide() -> Wide:
    """The same weights at every call."""
    torch.manual_seed(0)
    return Wide()


def batch(step: int) -> torch.Tensor:
    """The global batch of a step."""
    return torch.randn(BATCH, 512, generator=torch.Generator().manual_seed(step))


def plain() -> tuple[dict, dict, list[float]]:
    """Weights, averages and gradient norms without an engine; step SKIPPED is left out."""
    module, norms = wide(), []
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in trained.items()}
    optimiser = torch.optim.AdamW(trained.values(), lr=OPTIONS.lr, betas=OPTIONS.betas, eps=OPTIONS.eps, weight_decay=OPTIONS.weight_decay)
    for step in range(STEPS):
        optimiser.zero_grad()
        module(batch(step))["loss"].backward()
        norms.append(float(nn.utils.clip_grad_norm_(trained.values(), OPTIONS.gradient_clipping)))
        if step == SKIPPED:
            continue
        optimiser.step()
        with torch.no_grad():
            for name in UNIT:
                trained[name].div_(trained[name].norm(dim=1, keepdim=True))
        decay = min(DECAY, (2 + step) / (11 + step))
        average = {name: average[name].lerp(p.detach(), 1 - decay) for name, p in trained.items()}
    return module.state_dict(), module.state_dict() | average, norms


def life(world, folder: Path, case: str, until: int) -> None:
    """Take up what there is, train until a step, save; rank 0 writes down how far everything is from plain torch."""
    optimiser, parameters = CASES[case]
    zero = ZeroConfig(stage=3, offload_optimiser=optimiser, offload_parameters=parameters, nvme_path=str(folder / "disk"),
                      persistence_threshold=2000)
    checkpoints, module = Checkpoints(folder / "checkpoints", world, Options()), wide()
    if checkpoints.rollback_target() is not None:
        with torch.no_grad():  # so that what the checkpoint does not give back is seen
            for value in module.parameters():
                value.add_(1)
    engine = start_engine(module, TrainConfig(batch_size=BATCH, zero=zero, optimiser=OPTIONS), world)
    ema, norms = ShardedEMA(engine, DECAY), GradientNorms(engine)
    client = checkpoints.restore(engine, ema) or {"step": 0, "norms": []}
    for step in range(client["step"], until):
        engine.backward(engine(batch(step).chunk(world.size)[world.rank])["loss"])
        client["norms"].append(sum(world.total({"squares": norms.squares().sum()}).values())**0.5)
        if step == SKIPPED:
            with update_held_back(engine):
                engine.step()
            continue
        engine.step()
        normalise_rows(engine, UNIT)
        ema.update(step + 1)
    checkpoints.save(until, engine, ema, client)
    checkpoints.wait()
    if until == STEPS:
        compare(world, engine, ema, client["norms"], folder)
    stop_engine(engine)


def compare(world, engine, ema: ShardedEMA, norms: list[float], folder: Path) -> None:
    """How far weights, averages and gradient norms are from plain torch, and what is in memory and on the disk between steps."""
    found = gather_weights(engine), ema.weights()
    if world.is_main:
        last, averaged, wanted = plain()
        pairs = zip(found, (last, averaged), strict=True)
        worst = max(float((have[name] - want[name]).abs().max()) for have, want in pairs for name in want)
        in_memory = sum(master.nbytes for master in engine.optimizer.fp32_partitioned_groups_flat)
        in_memory += sum(p.ds_tensor.nbytes for p in engine.module.parameters())
        on_disk = sum(path.stat().st_size for path in (folder / "disk").rglob("rank0/*.swp"))
        norm = max(abs(a - b) for a, b in zip(norms, wanted, strict=True))
        (folder / "found.json").write_text(json.dumps({"worst": worst, "norm": norm, "in_memory": in_memory, "on_disk": on_disk}))


def main(folder: Path) -> None:
    """Every case on two processes, and from its checkpoint on one."""
    preload()
    load_asynchronous_io()
    for case in CASES:
        (folder / case).mkdir()
        run_world(2, life, folder / case, case, 2)
        run_world(1, life, folder / case, case, STEPS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
