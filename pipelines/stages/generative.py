"""Stage 3: conditional flow matching of an MM-DiT on the autoencoder's latents."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from data_prep.decoding import TensorDecoder
from data_prep.index import ShardSet
from data_prep.stream import one_pass
from models.generators.mmdit import MMDiT, MMDiTConfig
from models.objectives.flow_matching import flow_loss, flow_time, interpolate
from models.pretrained import save_weights
from pipelines.config import Recipe
from pipelines.engine.draws import Draws
from pipelines.engine.log import Validation
from pipelines.engine.world import World
from pipelines.metrics.statistics import shuffled_partner
from pipelines.stages.data import training_stream
from pipelines.stages.samples import generated_samples
from pipelines.stages.stage import Stage

LATENTS = ("latent_mean", "latent_std")
CONDITIONS = ("clip", "sync")


class FlowModel(nn.Module):
    """The generator with its objective: all that is trainable happens inside forward, where ZeRO-3 can see it."""

    def __init__(self, generator: MMDiT):
        super().__init__()
        self.generator = generator
        # Plain copies: under ZeRO-3 the generator's own are partitioned outside its forward.
        self.register_buffer("latent_mean", generator.latent_mean.detach().clone(), persistent=False)
        self.register_buffer("latent_std", generator.latent_std.detach().clone(), persistent=False)

    def forward(self, **clips: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean flow loss of a batch; arguments as in `per_clip`."""
        return {"loss": self.per_clip(**clips).mean()}

    def per_clip(self, latent: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, clip: torch.Tensor, sync: torch.Tensor,
                 drop_video: torch.Tensor | None = None, drop_text: torch.Tensor | None = None) -> torch.Tensor:
        """Data latents and noise (B, N, C), times (B,), conditions (B, T, D) -> flow losses (B,)."""
        x_t, target = interpolate(noise, (latent - self.latent_mean) / self.latent_std, t)
        flow = self.generator(x_t, clip, sync, None, t, drop_video=drop_video, drop_text=drop_text)
        return flow_loss(flow, target)


class GenerativeStage(Stage):
    """Learns the flow from noise to the latents of a clip's sound, given its video."""

    name = "generative"

    def __init__(self, recipe: Recipe, features: str):
        self.recipe, self.config, self.features = recipe, recipe.generative, features
        self.train, self.seed = self.config.train, recipe.seed
        self.parents = tuple(recipe.folder / stage / "export" for stage in ("autoencoder", "contrastive"))

    def model_config(self) -> MMDiTConfig:
        """The recipe's generator, fitted to the sizes of the features: sequences from the clip's length, widths from the encoder."""
        sample = next(iter(self._pass(self.recipe.train_split, limit=1)))
        fitted = {"sync_margin": 0}
        for name, value in (("latent", sample["latent_mean"]), ("clip", sample["clip"]), ("sync", sample["sync"])):
            fitted |= {f"{name}_len": value.shape[1], f"{name}_dim": value.shape[2]}
        return dataclasses.replace(self.config.model, **fitted)

    def build(self) -> nn.Module:
        """A fresh generator that knows the statistics of the latents, per channel."""
        generator = MMDiT(self.model_config())
        means = torch.cat([b["latent_mean"] for b in self._pass(self.recipe.train_split, self.recipe.features.statistics_clips)])
        std, mean = torch.std_mean(means, dim=(0, 1))
        generator.set_latent_stats(mean, std)
        return FlowModel(generator)

    def stream(self, world: World, quarantine: Path):
        """Latents and conditions of random clips."""
        shards = ShardSet.open(self.features, split=self.recipe.train_split)
        return training_stream(shards, TensorDecoder(LATENTS + CONDITIONS), self.train, self.seed, world, quarantine)

    def inputs(self, batch: dict, draws: Draws, device: torch.device) -> dict[str, torch.Tensor]:
        """A sample of the posterior, noise, time, conditions, and who trains without them."""
        latent = batch["latent_mean"].to(device)
        shape = latent.shape[1:]
        return {
            "latent": latent + batch["latent_std"].to(device) * draws.normal(*shape),
            "noise": draws.normal(*shape),
            "t": flow_time(draws.uniform(), self.config.time),
            "drop_video": draws.uniform() < self.config.drop_video,
            "drop_text": draws.uniform() < self.config.drop_text,
            **{name: batch[name].to(device) for name in CONDITIONS},
        }

    @torch.no_grad()
    def validate(self, module: nn.Module, device: torch.device) -> Validation:
        """Flow loss on held-out clips with their own video and with another's."""
        return validate_flow(module, self.recipe, self.features, self.train.validation_clips, device)

    def export(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """The generator."""
        config = self.model_config()
        generator = MMDiT(config)
        generator.load_state_dict({name.removeprefix("generator."): value for name, value in weights.items()})
        save_weights(generator, config, folder)

    def _pass(self, split: str, limit: int):
        shards = ShardSet.open(self.features, split=split)
        return one_pass(shards, TensorDecoder(LATENTS + CONDITIONS), self.recipe.features.batch_size, limit=limit)


@torch.no_grad()
def validate_flow(model: FlowModel, recipe: Recipe, features: str, limit: int, device: torch.device) -> Validation:
    """Flow loss of the first `limit` held-out clips with their own video and with another's, and what `model` makes of a few."""
    names, shards = ("latent_mean", *CONDITIONS), ShardSet.open(features, split=recipe.heldout_split)
    batches = list(one_pass(shards, TensorDecoder(names), recipe.features.batch_size, limit=limit))
    clips = {name: torch.cat([batch[name] for batch in batches]) for name in names}
    right, wrong = flow_losses(model, clips, device)
    found = generated_samples(model.generator, recipe, clips, device)
    found.scalars = {"flow_loss": float(right.mean()), "flow_loss_shuffled": float(wrong.mean())}
    return found


@torch.no_grad()
def flow_losses(module: FlowModel, clips: dict[str, torch.Tensor], device: torch.device, repeats: int = 4, seed: int = 0):
    """Flow losses per clip (B,), averaged over `repeats` noises and stratified times, with the right and with shuffled videos.

    Both use the same noise and times, so that their difference is paired.
    """
    count = len(clips["latent_mean"])
    partner = torch.as_tensor(shuffled_partner(count, seed))
    totals = torch.zeros(2, count)
    for repeat in range(repeats):
        draws = Draws(seed + repeat, torch.arange(count), device)
        latent = clips["latent_mean"].to(device)
        # Times spread evenly over the repeats: the loss varies more with time than with anything else.
        arguments = {"latent": latent, "noise": draws.normal(*latent.shape[1:]), "t": (draws.uniform() + repeat) / repeats}
        for row, order in enumerate((torch.arange(count), partner)):
            conditions = {name: clips[name][order].to(device) for name in CONDITIONS}
            totals[row] += module.per_clip(**arguments, **conditions).cpu() / repeats
    return totals[0], totals[1]
