"""Run by torchrun in test_unit_rows.py: forced weight normalisation under every ZeRO stage against plain torch."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from models.codecs.magnitude_preserving import MPConv1d
from pipelines.config import OptimiserConfig, TrainConfig, ZeroConfig
from pipelines.engine.unit_rows import normalise_rows
from pipelines.engine.world import join_world
from pipelines.engine.zero import gather_weights, start_engine

BATCH, STEPS, FORCED = 4, 3, ("first.weight", "last.weight")
CASES = ((0, 0, "fp32"), (1, 0, "fp32"), (2, 0, "fp32"), (3, 0, "fp32"), (3, 100_000, "fp32"), (2, 0, "bf16"))


class Toy(nn.Module):
    """Two convolutions whose rows no shard's border respects, and a gain."""

    def __init__(self):
        super().__init__()
        self.first, self.last = MPConv1d(5, 7, 3), MPConv1d(7, 3, 3)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, y):
        return {"loss": (self.last(self.first(x).tanh()) * self.gain - y).square().mean()}


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, BATCH, 5, 8, generator=generator), torch.randn(STEPS, BATCH, 3, 8, generator=generator)


def toy():
    torch.manual_seed(0)
    return Toy()


def plain(options):
    """Weights after STEPS full-batch steps, each followed by the normalisation."""
    module, (xs, ys) = toy(), data()
    optimiser = torch.optim.AdamW(module.parameters(), lr=options.lr, betas=options.betas, eps=options.eps, weight_decay=0.0)
    for x, y in zip(xs, ys, strict=True):
        optimiser.zero_grad()
        module(x, y)["loss"].backward()
        optimiser.step()
        with torch.no_grad():
            for name in FORCED:
                weight = module.get_parameter(name)
                weight.div_(weight.flatten(1).norm(dim=1)[:, None, None])
    return module.state_dict()


def sharded(world, stage, threshold, precision, options):
    """The same under ZeRO; and the weights that its next forward pass would use."""
    zero = ZeroConfig(stage=stage, persistence_threshold=threshold)
    train = TrainConfig(batch_size=BATCH, zero=zero, optimiser=options, precision=precision)
    engine, (xs, ys) = start_engine(toy(), train, world), data()
    mine = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    for x, y in zip(xs[:, mine], ys[:, mine], strict=True):
        x, y = (v.bfloat16() if precision == "bf16" else v for v in (x, y))
        engine.backward(engine(x, y)["loss"])
        engine.step()
        normalise_rows(engine, FORCED)
    return gather_weights(engine), used(engine)


def used(engine):
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=engine.zero_optimization_stage() == 3):
        return {name: parameters[name].detach().float().clone() for name in FORCED}


def main(folder):
    world, found = join_world(), {}
    options = OptimiserConfig(lr=0.05, weight_decay=0.0, gradient_clipping=0.0)
    wanted = plain(options)
    for stage, threshold, precision in CASES:
        weights, next_used = sharded(world, stage, threshold, precision, options)
        if not world.is_main:
            continue
        difference = max(float((weights[name] - wanted[name]).abs().max()) for name in wanted)
        stale = max(float((weights[name] - next_used[name]).abs().max()) for name in FORCED)
        norm = max(float((weights[name].flatten(1).norm(dim=1) - 1).abs().max()) for name in FORCED)
        found[f"stage {stage}, threshold {threshold}, {precision}"] = {"difference": difference, "stale": stale, "norm": norm}
    if world.is_main:
        (Path(folder) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
