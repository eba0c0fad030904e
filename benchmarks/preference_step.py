"""A preference step of small_16k: the frozen trunk once for policy and reference, against four full forward passes.

The usual way runs policy and reference, each on winner and loser, through the whole network; both train the same top and give the same
loss. Its bound is near 2: the trunk, nearly all of the work, then runs for two inputs instead of four.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import torch
from torch import nn

from benchmarks.common import alternate, machine, show
from benchmarks.generator_step import made_inputs, made_model
from models.objectives.flow_dpo import AVPRPOLoss
from models.objectives.flow_matching import flow_loss, interpolate
from pipelines.stages.preference import PreferenceModel

BETA = 1000.0


class FourPasses(nn.Module):
    """Policy and reference as two models, winner and loser as two passes."""

    def __init__(self, model: PreferenceModel):
        super().__init__()
        self.policy, self.reference = model.generator, copy.deepcopy(model.generator).requires_grad_(False)
        self.objective = AVPRPOLoss(BETA, "none")

    def forward(self, winner, loser, noise, t, clip, sync) -> dict[str, torch.Tensor]:
        """The terms of equation 5."""
        losses = []
        for generator in (self.policy, self.reference):
            for latent in (winner, loser):
                x_t, target = interpolate(noise, generator.normalise(latent), t)
                losses.append(flow_loss(generator(x_t, clip, sync, None, t), target))
        return self.objective(*losses)


def step(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Forward and backward pass; the loss."""
    model.zero_grad(set_to_none=True)
    loss = model(**given)["loss"]
    loss.backward()
    return loss.detach()


def main() -> None:
    """Print seconds per step and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    shared, rows = PreferenceModel(made_model(), BETA, "none"), []
    usual = FourPasses(shared)
    for batch in options.batches:
        given = made_inputs(batch)
        del given["text"]
        given["winner"], given["loser"], given["noise"] = given.pop("latent"), *torch.randn(2, batch, 250, 20)
        difference = abs(step(shared, given) - step(usual, given)).item()
        seconds = alternate({"usual": partial(step, usual, given), "shared": partial(step, shared, given)}, options.repeats)
        rows.append([batch, seconds["usual"], seconds["shared"], seconds["usual"] / seconds["shared"], difference])
    print(f"{machine('torch')}, {torch.get_num_threads()} threads")
    show("Preference step of small_16k", ["pairs", "four passes, s", "shared trunk, s", "ratio", "difference of the losses"], rows)


if __name__ == "__main__":
    main()
