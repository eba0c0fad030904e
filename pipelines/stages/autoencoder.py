"""Stage 1: the mel VAE."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from data_prep.audio import log_mel
from data_prep.index import ShardSet
from models.codecs.autoencoder import MelVAE
from models.pretrained import save_weights
from pipelines.config import Recipe
from pipelines.engine.draws import Draws
from pipelines.engine.log import Validation
from pipelines.engine.world import World
from pipelines.generate import vocoder
from pipelines.stages.data import clip_decoder, clips, training_stream
from pipelines.stages.stage import Stage


class AutoencoderStage(Stage):
    """Learns to code log-mels (B, F, T) as latents (B, C, T/2)."""

    name = "autoencoder"

    def __init__(self, recipe: Recipe):
        self.recipe, self.config = recipe, recipe.autoencoder
        self.train, self.seed = self.config.train, recipe.seed

    def build(self) -> nn.Module:
        """A fresh VAE that knows the per-band statistics of the training mels."""
        vae = MelVAE(self.config.model)
        mels = self._mels(self.recipe.train_split, self.recipe.features.statistics_clips)
        std, mean = torch.std_mean(mels.transpose(0, 1).flatten(1), dim=1)
        vae.set_data_stats(mean, std)
        return vae

    def stream(self, world: World, quarantine: Path):
        """Audio of random clips."""
        decode = clip_decoder(self.recipe, self.recipe.clip.seconds, random_crop=True, want=("waveform",))
        shards = ShardSet.open(self.recipe.data, split=self.recipe.train_split)
        return training_stream(shards, decode, self.train, self.seed, world, quarantine)

    def inputs(self, batch: dict, draws: Draws, device: torch.device) -> dict[str, torch.Tensor]:
        """Log-mels and the noise of the posterior sample."""
        mel = log_mel(batch["waveform"].to(device), self.config.mel)
        return {"mel": mel, "noise": draws.normal(self.config.model.latent_dim, mel.shape[-1] // 2)}

    @torch.no_grad()
    def validate(self, module: nn.Module, device: torch.device) -> Validation:
        """L1 of held-out mels relative to that of the per-band mean, and pictures of both."""
        mel = self._mels(self.recipe.heldout_split, self.train.validation_clips).to(device)
        decoded = torch.cat([module.decode(module.encode(part)[0]) for part in mel.split(self.recipe.features.batch_size)])
        shown = {"truth": mel[:1], "decoded": decoded[:1]}
        listen = vocoder(self.recipe).to(device)
        return Validation({"l1_ratio": relative_l1(decoded, mel)}, {f"mel/{name}": x[0].cpu().numpy() for name, x in shown.items()},
                          {f"sound/{name}": listen.vocode(x)[0].cpu().numpy() for name, x in shown.items()}, self.recipe.clip.sample_rate)

    def export(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """The VAE."""
        vae = MelVAE(self.config.model)
        vae.load_state_dict(weights)
        save_weights(vae, self.config.model, folder)

    def _mels(self, split: str, limit: int) -> torch.Tensor:
        batches = clips(self.recipe, split, self.recipe.features.batch_size, limit, want=("waveform",))
        return torch.cat([log_mel(batch["waveform"], self.config.mel) for batch in batches])


def relative_l1(decoded: torch.Tensor, mel: torch.Tensor) -> float:
    """Mean |decoded - mel| over mean |per-band mean - mel|, log-mels (B, F, T): 0 is perfect, 1 knows only the bands' means."""
    band_mean = mel.mean(dim=(0, 2), keepdim=True)
    return float((decoded - mel).abs().mean() / (band_mean - mel).abs().mean())
