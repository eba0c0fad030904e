"""Run in two processes by test_memory.py: what an engine leaves in memory when it is stopped, and what whole weights take on each rank."""

from __future__ import annotations

import gc
import itertools
import json
import sys
from pathlib import Path

import torch
from torch import nn

from pipelines.config import TrainConfig, ZeroConfig
from pipelines.engine.ema import ShardedEMA
from pipelines.engine.memory import model_states
from pipelines.engine.world import World, join_world
from pipelines.engine.zero import gather_weights, start_engine, stop_engine

WIDTH, LAYERS, BATCH = 64, 16, 4
CASES = [*itertools.product(("fp32", "bf16"), range(4), ("none",)), *itertools.product(("fp32", "bf16"), (1, 2, 3), ("cpu",))]


def trained(world: World, precision: str, stage: int, place: str) -> tuple:
    """An engine after two steps, and an average of its weights."""
    zero = ZeroConfig(stage=stage, offload_optimiser=place, persistence_threshold=0)
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    engine = start_engine(module, TrainConfig(batch_size=BATCH, precision=precision, zero=zero), world)
    ema = ShardedEMA(engine, 0.9)
    for step in range(2):
        inputs = torch.ones(BATCH // world.size, WIDTH, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        engine.backward(engine(inputs).float().square().mean())
        engine.step()
        ema.update(step + 1)
    return engine, ema


def live_bytes() -> int:
    """Of all tensors of this process."""
    gc.collect()
    storages = (each.untyped_storage() for each in gc.get_objects() if isinstance(each, torch.Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def left(world: World) -> dict[str, list[int]]:
    """Case -> bytes of tensors while an engine runs, and after it was stopped, beyond those before it."""
    found = {}
    for case in CASES:
        before = live_bytes()
        engine, ema = trained(world, *case)
        running = live_bytes() - before
        stop_engine(engine)
        del engine, ema
        found[", ".join(map(str, case))] = [running, live_bytes() - before]
    return found


def gathered(world: World) -> dict[str, list[int]]:
    """ZeRO stage -> bytes of the whole weights and of the whole average that this rank gets."""
    found = {}
    for stage in range(4):
        engine, ema = trained(world, "fp32", stage, "none")
        found[str(stage)] = [sum(value.nbytes for value in weights.values()) for weights in (gather_weights(engine), ema.weights())]
        stop_engine(engine)
    return found


def peaks(world: World, trace: Path) -> dict[str, list[float]]:
    """Case -> bytes of gradients at their peak in the update as estimated, and as the allocator saw them."""
    found = {}
    for precision, stage in itertools.product(("fp32", "bf16"), range(4)):
        engine, _ = trained(world, precision, stage, "none")
        inputs = torch.ones(BATCH // world.size, WIDTH, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        # The backward pass too: what was allocated outside of the profile is not missed when it goes.
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            engine.backward(engine(inputs).float().square().mean())
            with torch.profiler.record_function("update"):
                engine.step()
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
        (update,) = (event for event in events if event.get("name") == "update" and "dur" in event)
        memory = sorted((event["ts"], event["args"]["Total Allocated"]) for event in events if event.get("name") == "[memory]")
        allocated = [total for moment, total in memory if update["ts"] <= moment <= update["ts"] + update["dur"]]
        trainable = LAYERS * (WIDTH * WIDTH + WIDTH)
        lasting = (2 if precision == "bf16" else 4) * trainable / world.size if stage == 3 else 0  # its buffer of gradients stays
        estimated = model_states(trainable, stage, world.size, precision).gradients
        found[f"{precision}, stage {stage}"] = [estimated, max(allocated) - allocated[-1] + lasting]
        stop_engine(engine)
    return found


def main(folder: str) -> None:
    world = join_world()
    found = {"left": left(world), "gathered": gathered(world), "peaks": peaks(world, Path(folder) / f"trace-{world.rank}.json")}
    (Path(folder) / f"found-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
