"""Run by torchrun in test_preference.py: preference steps under every ZeRO stage against plain torch on the whole batch."""

import itertools
import json
import sys
from pathlib import Path

import torch
from torch import nn

from models.generators.mmdit import MMDiT
from pipelines.config import OptimiserConfig, TrainConfig, ZeroConfig
from pipelines.engine.world import World, join_world
from pipelines.engine.zero import gather_weights, start_engine
from pipelines.stages.preference import PreferenceModel
from tests.pipelines.stages.test_generative import CONFIG

BATCH, STEPS = 4, 3
# A large eps: where gradients are next to nothing, Adam's steps would hang on the order of a sum.
OPTIONS = OptimiserConfig(lr=0.01, eps=0.1, weight_decay=0.1, gradient_clipping=0.5)


def generator():
    torch.manual_seed(0)
    made = MMDiT(CONFIG)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    made.latent_std.data.fill_(1.5)
    return made


def model(tuning):
    return PreferenceModel(generator(), beta=3.0, whole_reference=generator() if tuning == "full" else None)


def batches():
    shapes = {"winner": (12, 4), "loser": (12, 4), "noise": (12, 4), "clip": (6, 8), "sync": (32, 8)}
    random = torch.Generator().manual_seed(1)
    return [{**{name: torch.randn(BATCH, *shape, generator=random) for name, shape in shapes.items()},
             "t": torch.rand(BATCH, generator=random)} for _ in range(STEPS)]


def plain(tuning):
    """Weights and losses of full-batch steps."""
    module, losses = model(tuning), []
    trained = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=OPTIONS.lr, betas=OPTIONS.betas, eps=OPTIONS.eps, weight_decay=OPTIONS.weight_decay)
    for given in batches():
        optimiser.zero_grad()
        found = module(**given)
        found["loss"].backward()
        nn.utils.clip_grad_norm_(trained, OPTIONS.gradient_clipping)
        optimiser.step()
        losses.append({name: float(value) for name, value in found.items()})
    return module.state_dict(), losses


def sharded(world: World, tuning, stage, options=OPTIONS, precision="fp32"):
    """The same under ZeRO, each rank with its part of the batch; and whether the trunk kept anything for the backward pass."""
    train = TrainConfig(batch_size=BATCH, precision=precision, zero=ZeroConfig(stage=stage, persistence_threshold=0), optimiser=options)
    engine, losses, kept = start_engine(model(tuning), train, world), [], []
    if tuning == "top":
        engine.module.reference.register_forward_pre_hook(lambda _, states: kept.append(any(x.requires_grad for x in states[0][:3])))
    for given in batches():
        found = engine(**{name: x.chunk(world.size)[world.rank] for name, x in given.items()})
        engine.backward(found["loss"])
        engine.step()
        totals = world.total({name: value.detach() for name, value in found.items()})
        losses.append({name: value / world.size for name, value in totals.items()})
    return gather_weights(engine), losses, any(kept)


def main(folder):
    world, worst, rounded = join_world(), {}, {}
    for tuning, stage in itertools.product(("top", "full"), (0, 1, 2, 3)):
        (weights, losses, kept), (wanted, wanted_losses) = sharded(world, tuning, stage), plain(tuning)
        if world.is_main:
            assert weights.keys() == wanted.keys()
            before = model(tuning).state_dict()
            worst[f"{tuning}, stage {stage}"] = {
                "moved": max(float((wanted[name] - before[name]).abs().max()) for name in wanted if name.startswith("generator.")),
                "weights": max(float((weights[name] - wanted[name]).abs().max()) for name in wanted if not name.startswith("objective.")),
                # Running maxima of the losses, so as near as those are.
                "maxima": max(float((weights[name] - wanted[name]).abs()) for name in wanted if name.startswith("objective.")),
                "losses": max(abs(found[name] - value) for found, line in zip(losses, wanted_losses, strict=True)
                              for name, value in line.items()),
                "kept": kept}
    for tuning, stage in itertools.product(("top", "full"), (1, 3)):
        # The paper's rate, far below what bf16 can add to these weights.
        weights, *_ = sharded(world, tuning, stage, OptimiserConfig(lr=5e-6, weight_decay=1e-4), "bf16")
        if world.is_main:
            before = model(tuning)
            names = {name: p.requires_grad for name, p in before.named_parameters()}
            rounded[f"{tuning}, stage {stage}"] = {
                "moved": sum(not torch.equal(weights[name], p) for name, p in before.named_parameters() if names[name]),
                "trained": sum(names.values()),
                "changed": [name for name, p in before.named_parameters() if not names[name] and not torch.equal(weights[name], p)]}
    if world.is_main:
        (Path(folder) / "found.json").write_text(json.dumps({"worst": worst, "bf16": rounded}))


if __name__ == "__main__":
    main(sys.argv[1])
