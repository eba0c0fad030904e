"""Stage 3: conditional flow matching of an MM-DiT on the autoencoder's latents."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import torch
from torch import nn

from models.checkpoints import read_checkpoint
from models.generators.mmdit import MMDiT, MMDiTConfig
from models.objectives.flow_matching import flow_loss, flow_time, interpolate
from models.pretrained import load_mmaudio, save_weights
from pipelines.config import Recipe
from pipelines.encoding import generator_sizes, load_recipe_clip, needed_stages
from pipelines.engine.draws import Draws
from pipelines.engine.log import Validation
from pipelines.engine.world import World
from pipelines.metrics.statistics import shuffled_partner
from pipelines.stages.data import training_stream
from pipelines.stages.inputs import LATENTS, Features, features_of, first_features
from pipelines.stages.samples import generated_samples
from pipelines.stages.stage import Stage


class FlowModel(nn.Module):
    """The generator with its objective: all that is trainable happens inside forward, where ZeRO-3 can see it."""

    def __init__(self, generator: MMDiT):
        super().__init__()
        self.generator = generator

    def forward(self, **clips: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean flow loss of a batch; arguments as in `per_clip`."""
        return {"loss": self.per_clip(**clips).mean()}

    def per_clip(self, latent: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, clip: torch.Tensor | None = None,
                 sync: torch.Tensor | None = None, text: torch.Tensor | None = None, drop_video: torch.Tensor | None = None,
                 drop_text: torch.Tensor | None = None) -> torch.Tensor:
        """Data latents and noise (B, N, C), times (B,), conditions (B, T, D) -> flow losses (B,)."""
        x_t, target = interpolate(noise, self.generator.normalise(latent), t)
        flow = self.generator(x_t, clip, sync, text, t, drop_video=drop_video, drop_text=drop_text)
        return flow_loss(flow, target)


class GenerativeStage(Stage):
    """Learns the flow from noise to the latents of a clip's sound, given its video."""

    name = "generative"

    def __init__(self, recipe: Recipe, features: str):
        self.recipe, self.config = recipe, recipe.generative
        self.features = features_of(recipe, features)
        self.names = LATENTS + recipe.conditioning.slots
        self.train, self.seed = self.config.train, recipe.seed
        self.parents = tuple(recipe.folder / stage / "export" for stage in needed_stages(recipe, "generative"))

    def model_config(self) -> MMDiTConfig:
        """The recipe's generator, fitted to the clips, the autoencoder and the encoders."""
        return dataclasses.replace(self.config.model, **generator_sizes(self.recipe))

    def build(self) -> nn.Module:
        """The generator of `weights`, or a fresh one that knows the statistics of the latents, per channel."""
        generator = published_generator(self.recipe, self.model_config()) if self.config.weights else self._fresh()
        if self.config.compile:
            generator.compile_blocks()
        return FlowModel(generator)

    def _fresh(self) -> MMDiT:
        generator, recipe, cpu = MMDiT(self.model_config()), self.recipe, torch.device("cpu")
        latents = first_features(self.features, recipe.train_split, LATENTS, recipe.features.statistics_clips, cpu)
        std, mean = torch.std_mean(latents["latent_mean"], dim=(0, 1))
        generator.set_latent_stats(mean, std)
        if "text" in recipe.conditioning.slots:
            with torch.no_grad():
                generator.empty_string_feat.copy_(load_recipe_clip(recipe).encode_text([""])[0])
        return generator

    def stream(self, world: World, quarantine: Path):
        """Latents and conditions of random clips."""
        shards, decode = self.features.shards(self.recipe.train_split), self.features.decoder(self.names)
        return training_stream(shards, decode, self.train, self.seed, world, quarantine)

    def inputs(self, batch: dict, draws: Draws, device: torch.device) -> dict[str, torch.Tensor]:
        """A sample of the posterior, noise, time, conditions, and who trains without them."""
        clips = self.features.tensors(batch, self.names, device)
        mean, std = (clips.pop(name) for name in LATENTS)
        shape = mean.shape[1:]
        return {
            "latent": mean + std * draws.normal(*shape),
            "noise": draws.normal(*shape),
            "t": flow_time(draws.uniform(), self.config.time),
            "drop_video": draws.uniform() < self.config.drop_video,
            "drop_text": draws.uniform() < self.config.drop_text,
            **clips,
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


def published_generator(recipe: Recipe, config: MMDiTConfig) -> MMDiT:
    """The generator of `generative.weights`, which must have the widths that the autoencoder and the encoders give."""
    path = recipe.generative.weights
    try:
        return load_mmaudio(read_checkpoint(path), config)
    except FileNotFoundError:
        raise ValueError(f"generative.weights is {path}: no such file") from None
    except ValueError as error:
        remedy = "choose generative.model, autoencoder.model and conditioning that it was trained with"
        raise ValueError(f"generative.weights {path}: {str(error).partition(';')[0]}; {remedy}") from None


@torch.no_grad()
def validate_flow(model: FlowModel, recipe: Recipe, features: Features, limit: int, device: torch.device) -> Validation:
    """Flow loss of the first `limit` held-out clips with their own video and with another's, and what `model` makes of a few."""
    clips = first_features(features, recipe.heldout_split, ("latent_mean", *recipe.conditioning.slots), limit, device)
    partner = torch.as_tensor(shuffled_partner(len(clips["latent_mean"]), seed=0))
    right, wrong = (flow_losses(model, clips, device, recipe.features.batch_size, videos=videos) for videos in (None, partner))
    found = generated_samples(model.generator, recipe, clips, device)
    found.scalars = {"flow_loss": float(right.mean()), "flow_loss_shuffled": float(wrong.mean())}
    return found


@torch.no_grad()
def flow_losses(module: FlowModel, clips: dict[str, torch.Tensor], device: torch.device, batch_size: int, repeats: int = 4,
                positions: torch.Tensor | None = None, videos: torch.Tensor | None = None) -> torch.Tensor:
    """Flow losses per clip (B,), averaged over `repeats` noises and stratified times.

    `clips` holds latent_mean and conditions. `videos` (B,) are the rows whose videos the clips are given, by default their own; a caption
    stays with its clip, as it is the video that is asked about. Noise and times are those of a clip's place among `positions` (B,), by
    default its row: losses with other videos are paired, and a clip given its position in the split keeps them whichever others are there.
    """
    own = torch.arange(len(clips["latent_mean"]))
    positions, videos = own if positions is None else positions, own if videos is None else videos
    losses = torch.zeros(len(own))
    for repeat, rows in itertools.product(range(repeats), own.split(batch_size)):
        draws = Draws(repeat, positions[rows], device)
        latent = clips["latent_mean"][rows].to(device)
        # Times spread evenly over the repeats: the loss varies more with time than with anything else.
        arguments = {"latent": latent, "noise": draws.normal(*latent.shape[1:]), "t": (draws.uniform() + repeat) / repeats}
        seen = {"clip": videos[rows], "sync": videos[rows], "text": rows}
        conditions = {name: clips[name][order].to(device) for name, order in seen.items() if name in clips}
        losses[rows] += module.per_clip(**arguments, **conditions).cpu() / repeats
    return losses
