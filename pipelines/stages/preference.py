"""Stage 4, its training: preference optimisation of the generator's top (MultiSoundGen AVP-RPO, equations 4-5)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from data_prep.decoding import TensorDecoder
from data_prep.index import ShardSet
from models.generators.mmdit import MMDiT, MMDiTConfig, TopBlocks
from models.objectives.flow_dpo import AVPRPOLoss
from models.objectives.flow_matching import flow_loss, flow_time, interpolate
from models.pretrained import load_weights, save_weights
from pipelines.config import Recipe
from pipelines.engine.draws import Draws
from pipelines.engine.log import Validation
from pipelines.engine.world import World
from pipelines.stages.data import training_stream
from pipelines.stages.generative import FlowModel, validate_flow
from pipelines.stages.inputs import StoredFeatures
from pipelines.stages.stage import Stage

PAIR = ("latent_mean", "latent_std", "loser")


class PreferenceModel(nn.Module):
    """Policy and reference in one: the frozen trunk runs once, then the trained top and the frozen copy of where it started."""

    def __init__(self, generator: MMDiT, beta: float, normalise: str):
        super().__init__()
        self.generator = generator.requires_grad_(False)
        for parameter in generator.top_parameters():
            parameter.requires_grad_(True)
        self.reference = TopBlocks.copy_of(generator).requires_grad_(False)
        self.objective = AVPRPOLoss(beta, normalise)

    def forward(self, winner: torch.Tensor, loser: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, clip: torch.Tensor | None = None,
                sync: torch.Tensor | None = None, text: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Latents of winner and loser (B, N, C) under the same noise and times (B,) -> the terms of equation 5."""
        pair = self.generator.normalise(torch.cat([winner, loser]))
        noise, t, clip, sync, text = (None if x is None else torch.cat([x, x]) for x in (noise, t, clip, sync, text))
        x_t, target = interpolate(noise, pair, t)
        flow, state = self.generator(x_t, clip, sync, text, t, return_state=True)
        with torch.no_grad():
            reference = flow_loss(self.reference(state), target)
        policy = flow_loss(flow, target)
        return self.objective(*policy.chunk(2), *reference.chunk(2)) | {"flow_lose": policy.detach().chunk(2)[1].mean()}


class PreferenceStage(Stage):
    """One round: pairs of the true sound and the worst candidate, against the model that the round started from."""

    def __init__(self, recipe: Recipe, features: str, candidates: str, start: Path, number: int):
        self.recipe, self.config = recipe, recipe.preference
        self.features, self.candidates, self.start = features, candidates, start
        self.name, self.train, self.seed = f"preference/round-{number}", self.config.train, recipe.seed + number
        self.parents = (start,)

    def build(self) -> nn.Module:
        """The last round's generator as policy and reference."""
        generator = load_weights(MMDiT, MMDiTConfig, self.start)
        return PreferenceModel(generator, self.config.beta, self.config.normalise)

    def stream(self, world: World, quarantine: Path):
        """Random pairs with their conditions."""
        shards = ShardSet.open(self.candidates).with_layer(ShardSet.open(self.features))
        return training_stream(shards, TensorDecoder(PAIR + self.recipe.conditioning.slots), self.train, self.seed, world, quarantine)

    def inputs(self, batch: dict, draws: Draws, device: torch.device) -> dict[str, torch.Tensor]:
        """Winner and loser latents, noise, time and conditions."""
        mean = batch["latent_mean"].to(device)
        shape = mean.shape[1:]
        return {
            "winner": mean + batch["latent_std"].to(device) * draws.normal(*shape),
            "loser": batch["loser"].to(device),
            "noise": draws.normal(*shape),
            "t": flow_time(draws.uniform(), self.recipe.generative.time),
            **{name: batch[name].to(device) for name in self.recipe.conditioning.slots},
        }

    @torch.no_grad()
    def validate(self, module: nn.Module, device: torch.device) -> Validation:
        """Held-out flow loss: a rise is the first sign of over-optimisation."""
        model = FlowModel(module.generator).to(device).eval()
        return validate_flow(model, self.recipe, StoredFeatures(self.recipe, self.features), self.train.validation_clips, device)

    def export(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """The aligned generator."""
        generator = load_weights(MMDiT, MMDiTConfig, self.start)
        prefix = "generator."
        generator.load_state_dict({name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)})
        save_weights(generator, generator.config, folder)
