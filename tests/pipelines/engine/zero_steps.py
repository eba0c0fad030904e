"""Run in two processes by test_zero.py: optimiser steps under every ZeRO stage against plain torch, and the memory that they take."""

import itertools
import json
import sys
from pathlib import Path

import torch
from torch import nn

from pipelines.config import OptimiserConfig, TrainConfig, ZeroConfig
from pipelines.engine.ema import ShardedEMA
from pipelines.engine.gradients import GradientNorms
from pipelines.engine.memory import model_states
from pipelines.engine.world import World, join_world
from pipelines.engine.zero import gather_weights, start_engine
from tests.pipelines.engine.toy import BATCH, share, toy, toy_batches

STEPS, DECAY = 2, 0.5


def options(lr: float = 0.01, clipping: float = 0.0) -> OptimiserConfig:
    return OptimiserConfig(lr=lr, weight_decay=0.1, gradient_clipping=clipping)


def plain(clipping: float) -> tuple[dict, dict, dict]:
    """Weights and averaged weights after STEPS full-batch steps, and the last gradient norms by part."""
    module = toy()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    average = {name: p.detach().clone() for name, p in trained.items()}
    for step, batch in enumerate(toy_batches(STEPS), 1):
        optimiser.zero_grad()
        module(**batch)["loss"].backward()
        norms = {}
        for name, p in trained.items():
            norms[name.split(".")[0]] = (norms.get(name.split(".")[0], 0) ** 2 + float(p.grad.norm()) ** 2) ** 0.5
        if clipping:
            nn.utils.clip_grad_norm_(trained.values(), clipping)
        optimiser.step()
        decay = min(DECAY, (1 + step) / (10 + step))
        average = {name: average[name].lerp(p.detach(), 1 - decay) for name, p in trained.items()}
    return module.state_dict(), module.state_dict() | average, norms


def sharded(world: World, train: TrainConfig) -> tuple[dict, dict, dict]:
    """The same under ZeRO."""
    engine = start_engine(toy(), train, world)
    ema, norms = ShardedEMA(engine, DECAY), GradientNorms(engine)
    for step, batch in enumerate(toy_batches(STEPS), 1):
        for number, part in enumerate(share(batch, world, train.accumulation)):
            if number:
                engine.step()
            engine.backward(engine(**part)["loss"])
        squares = world.total(dict(zip(norms.parts, norms.squares(), strict=True)))
        engine.step()
        ema.update(step)
    return gather_weights(engine), ema.weights(), {name: square**0.5 for name, square in squares.items()}


def equality(world: World) -> dict[str, float]:
    """Case -> largest difference of weights, averaged weights and gradient norms."""
    cases = {f"stage {stage}, clipping {clipping}, accumulation {accumulation}": (stage, clipping, accumulation, "none")
             for stage, clipping, accumulation in itertools.product((0, 1, 2, 3), (0.0, 0.1), (1, 2))}
    cases |= {f"stage {stage}, offloaded": (stage, 0.1, 2, "cpu") for stage in (1, 2, 3)}
    worst = {}
    for name, (stage, clipping, accumulation, place) in cases.items():
        # Nothing is too small to be partitioned here: at DeepSpeed's own threshold stage 3 would leave the toy whole.
        zero = ZeroConfig(stage=stage, offload_optimiser=place, offload_parameters=place if stage == 3 else "none", persistence_threshold=0)
        train = TrainConfig(batch_size=BATCH, accumulation=accumulation, zero=zero, optimiser=options(clipping=clipping))
        pairs = list(zip(sharded(world, train), plain(clipping), strict=True))[0 if world.is_main else 2:]  # others hold no whole weights
        assert all(found.keys() == wanted.keys() for found, wanted in pairs)
        worst[name] = max(float(abs(found[key] - wanted[key]).max() if torch.is_tensor(found[key]) else abs(found[key] - wanted[key]))
                          for found, wanted in pairs for key in wanted)
    return worst


def small_updates(world: World) -> dict[str, float]:
    """Stage -> how far four steps on one batch at a rate of 1e-5 move a scalar of 0.5, where bf16 steps by 0.004."""
    moved = {}
    for stage in (0, 1, 2, 3):
        train = TrainConfig(batch_size=BATCH, precision="bf16", zero=ZeroConfig(stage=stage), optimiser=options(lr=1e-5))
        engine = start_engine(toy(), train, world)
        for batch in toy_batches(1) * 4:
            for part in share(batch, world):
                engine.backward(engine(**{name: x.bfloat16() if x.is_floating_point() else x for name, x in part.items()})["loss"])
                engine.step()
        weights = gather_weights(engine)
        moved[str(stage)] = abs(float(weights["gain"]) - 0.5) if world.is_main else 0.0
    return moved


def memory(world: World) -> dict[str, list[float]]:
    """Case -> bytes of the model's states per rank as estimated, and as measured on average."""
    found = {}
    for precision, stage in itertools.product(("fp32", "bf16"), (0, 1, 2, 3)):
        module = nn.Sequential(*(nn.Linear(128, 128) for _ in range(8)))
        zero = ZeroConfig(stage=stage, persistence_threshold=0)
        engine = start_engine(module, TrainConfig(batch_size=BATCH, precision=precision, zero=zero), world)
        ema = ShardedEMA(engine, DECAY)
        for step in range(2):  # the moments come with the first
            inputs = torch.ones(4, 128, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
            engine.backward(engine(inputs).float().square().mean())
            if step == 0:
                engine.step()
        estimate = model_states(8 * (128 * 128 + 128), stage, world.size, precision)
        measured = world.total({"bytes": _bytes(_lasting(engine, ema))})["bytes"] / world.size
        found[f"{precision}, stage {stage}"] = [estimate.total - estimate.gradients, measured]
    return found


def _lasting(engine, ema: ShardedEMA) -> list[torch.Tensor]:
    parameters = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    masters = [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
    if engine.zero_optimization_stage() == 3:
        masters = list(engine.optimizer.fp32_partitioned_groups_flat)
    moments = [value for state in engine.basic_optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return [*parameters, *masters, *moments, *(value for average in ema.averages.values() for value in average)]


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def main(folder: str) -> None:
    world = join_world()
    found = {"worst": equality(world), "moved": small_updates(world), "memory": memory(world)}
    if world.is_main:
        (Path(folder) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
