"""Stage 4, its training: preference optimisation of the generator's top, or of all of it (MultiSoundGen AVP-RPO, equations 4-5)."""

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
from pipelines.distorted import distortion_row
from pipelines.engine.draws import Draws
from pipelines.engine.log import Validation
from pipelines.engine.world import World
from pipelines.stages.data import training_stream
from pipelines.stages.generative import FlowModel, validate_flow
from pipelines.stages.inputs import LATENTS, StoredFeatures
from pipelines.stages.stage import Stage


def choose_trained(generator: MMDiT, whole: bool) -> None:
    """Let the top of a generator train, or the whole of it.

    What stands for a missing video never does: each pair has one, and weights without a gradient would decay under some ZeRO stages only.
    """
    if whole:
        for empty in (generator.empty_clip_feat, generator.empty_sync_feat):
            empty.requires_grad_(False)
        return
    generator.requires_grad_(False)
    for parameter in generator.top_parameters():
        parameter.requires_grad_(True)


class PreferenceModel(nn.Module):
    """Policy and reference in one module, so that every ZeRO stage shards both.

    The frozen trunk runs once, then the trained top and the frozen copy of where it started. With `whole_reference`, a second `generator`
    of the same weights, everything trains, and the reference runs beside it from end to end.
    """

    def __init__(self, generator: MMDiT, beta: float, normalise: str = "balanced", objective: str = "avp_rpo",
                 whole_reference: MMDiT | None = None):
        super().__init__()
        self.generator, self.tuned_whole = generator, whole_reference is not None
        choose_trained(generator, self.tuned_whole)
        # Copied before there is an engine: ZeRO-3 leaves nothing that could be copied.
        self.reference = whole_reference.requires_grad_(False) if self.tuned_whole else TopBlocks.copy_of(generator)
        self.objective = AVPRPOLoss(beta, normalise, objective)

    def forward(self, winner: torch.Tensor, loser: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, clip: torch.Tensor | None = None,
                sync: torch.Tensor | None = None, text: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Latents of winner and loser (B, N, C) under the same noise and times (B,) -> the loss and its terms."""
        pair = self.generator.normalise(torch.cat([winner, loser]))
        noise, t, *conditions = (None if x is None else torch.cat([x, x]) for x in (noise, t, clip, sync, text))
        x_t, target = interpolate(noise, pair, t)
        flow, before = self._flows(x_t, conditions, t)
        policy, reference = flow_loss(flow, target), flow_loss(before, target)
        return self.objective(*policy.chunk(2), *reference.chunk(2))

    def _flows(self, x_t: torch.Tensor, conditions: list[torch.Tensor | None], t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Flow of the policy and of the reference."""
        if self.tuned_whole:
            with torch.no_grad():
                before = self.reference(x_t, *conditions, t)
            return self.generator(x_t, *conditions, t), before
        # Of the trunk nothing is kept for a backward pass: neither its weights nor what it reads ask for a gradient.
        flow, state = self.generator(x_t, *conditions, t, return_state=True)
        with torch.no_grad():
            return flow, self.reference(state)


class PreferenceStage(Stage):
    """One round: pairs of a preferred sound and another, against the model that the round started from."""

    def __init__(self, recipe: Recipe, features: str, candidates: str, start: Path, number: int, distorted: str = ""):
        """`candidates` and `distorted` are folders of shards, each read where `preference.losers` asks for it."""
        self.recipe, self.config = recipe, recipe.preference
        self.features, self.candidates, self.distorted, self.start = features, candidates, distorted, start
        self.name, self.train, self.seed = f"preference/round-{number}", self.config.train, recipe.seed + number
        self.parents = (start,)

    def build(self) -> nn.Module:
        """The last round's generator as policy and reference."""
        config, reference = self.config, self._generator() if self.config.tuning == "full" else None
        return PreferenceModel(self._generator(), config.beta, config.normalise, config.objective, reference)

    def stream(self, world: World, quarantine: Path):
        """Random pairs with their conditions."""
        return training_stream(self._pairs(), TensorDecoder(self._names()), self.train, self.seed, world, quarantine)

    def _pairs(self) -> ShardSet:
        """Candidates, distorted sounds and features in layers; the first says which videos there are."""
        features = ShardSet.open(self.features)
        distorted = ShardSet.open(self.distorted) if self.config.needs_distorted else None
        if not self.config.needs_candidates:
            # A clip whose pictures cannot be read has a distorted sound, but no features.
            return features.select(distorted.shards.places_in(features.shards).to_pylist()).with_layer(distorted)
        pairs = ShardSet.open(self.candidates)  # some videos have none
        return (pairs.with_layer(distorted) if distorted else pairs).with_layer(features)

    def _names(self) -> tuple[str, ...]:
        config = self.config
        pair = {"loser": config.needs_candidates, "winner": config.winner == "best_of_n", "distorted": config.needs_distorted}
        return LATENTS + tuple(name for name, needed in pair.items() if needed) + self.recipe.conditioning.slots

    def inputs(self, batch: dict, draws: Draws, device: torch.device) -> dict[str, torch.Tensor]:
        """Winner and loser latents, noise, time and conditions.

        Drawn in this order, whatever the recipe: the winner's noise, the flow's noise, its time; then where there are distorted losers
        whether one is taken, its kind, and the step to a neighbouring level. So variants of a round share all that they can.
        """
        names = self._names()
        found = {name: batch[name].to(device) for name in names}
        mean, std = (found.pop(name) for name in LATENTS)
        truth = mean + std * draws.normal(*mean.shape[1:])
        drawn = {"noise": draws.normal(*mean.shape[1:]), "t": flow_time(draws.uniform(), self.recipe.generative.time)}
        winner, loser = found.pop("winner", truth), found.pop("loser", truth)
        if self.config.needs_distorted:
            taken, distorted = self._distorted(found.pop("distorted"), batch["position"].to(device), draws)
            # A distorted sound loses against what it was made from: it may well be better than anything generated.
            winner, loser = torch.where(taken, truth, winner), torch.where(taken, distorted, loser)
        return {"winner": winner, "loser": loser, **drawn, **found}

    def _distorted(self, rows: torch.Tensor, position: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every distortion (B, R, N, C): whose loser is one (B, 1, 1), and which (B, N, C), by how far training has come."""
        config = self.config
        share = config.distorted_share if config.needs_candidates else 1.0
        taken, kind, jitter = (draws.uniform() for _ in range(3))
        # Of the position and not of the step: it is the same in any number of processes, and after a resume.
        progress = (position / (self.train.steps * self.train.batch_size)).clamp(max=1 - 1e-6)
        chosen = distortion_row(config.distortion, progress, kind, jitter)
        return (taken < share)[:, None, None], rows[torch.arange(len(rows), device=rows.device), chosen]

    @torch.no_grad()
    def validate(self, module: nn.Module, device: torch.device) -> Validation:
        """Held-out flow loss: a rise is the first sign of over-optimisation."""
        model = FlowModel(module.generator).to(device).eval()
        return validate_flow(model, self.recipe, StoredFeatures(self.recipe, self.features), self.train.validation_clips, device)

    def export(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """The aligned generator: what did not train is as it was, to the last bit."""
        generator = self._generator()
        choose_trained(generator, self.config.tuning == "full")
        trained = {name: weights[f"generator.{name}"] for name, parameter in generator.named_parameters() if parameter.requires_grad}
        generator.load_state_dict(generator.state_dict() | trained)
        save_weights(generator, generator.config, folder)

    def _generator(self) -> MMDiT:
        return load_weights(MMDiT, MMDiTConfig, self.start)
