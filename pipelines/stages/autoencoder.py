"""Stage 1: the mel VAE."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from data_prep.audio import log_mel
from data_prep.index import ShardSet
from models.codecs.adversarial import AdversarialVAE
from models.codecs.autoencoder import MelVAE
from models.codecs.magnitude_preserving import MPConv1d
from models.pretrained import save_weights
from pipelines.config import Recipe
from pipelines.engine.draws import Draws
from pipelines.engine.log import Validation
from pipelines.engine.unit_rows import normalise_rows
from pipelines.engine.world import World
from pipelines.sounding import vocoder
from pipelines.stages.data import clip_decoder, clips, training_stream
from pipelines.stages.stage import Stage


class AutoencoderStage(Stage):
    """Learns to code log-mels (B, F, T) as latents (B, C, T/2)."""

    name = "autoencoder"

    def __init__(self, recipe: Recipe):
        self.recipe, self.config = recipe, recipe.autoencoder
        self.train, self.seed = self.config.train, recipe.seed

    def build(self) -> nn.Module:
        """A fresh VAE that knows the per-band statistics of the training mels, with a discriminator where the recipe asks for one."""
        vae = MelVAE(self.config.model)
        mels = self._mels(self.recipe.train_split, self.recipe.features.statistics_clips)
        std, mean = torch.std_mean(mels.transpose(0, 1).flatten(1), dim=1)
        vae.set_data_stats(mean, std)
        return AdversarialVAE(vae, self.config.adversarial) if self.config.adversarial.weight else vae

    def stream(self, world: World, quarantine: Path):
        """Audio of random clips."""
        decode = clip_decoder(self.recipe, self.recipe.clip.seconds, random_crop=True, want=("waveform",))
        shards = ShardSet.open(self.recipe.data, split=self.recipe.train_split)
        return training_stream(shards, decode, self.train, self.seed, world, quarantine)

    def inputs(self, batch: dict, draws: Draws, device: torch.device) -> dict[str, torch.Tensor]:
        """Log-mels and the noise of the posterior sample; with a discriminator, whether its time has come."""
        mel = self._mel(batch["waveform"].to(device))
        found = {"mel": mel, "noise": draws.normal(self.config.model.latent_dim, mel.shape[-1] // 2)}
        if self.config.adversarial.weight:
            # The step follows from the position, so a resumed run begins at the same one. It stays on the CPU: forward branches on it.
            step = int(batch["position"][0]) // self.train.batch_size
            found["adversarial"] = torch.tensor(step >= self.config.adversarial.start)
        return found

    def after_step(self, engine) -> None:
        """Kernels back to unit norm, where the model asks for it."""
        if self.config.model.forced_weight_norm:
            kernels = (f"{name}.weight" for name, module in engine.module.named_modules() if isinstance(module, MPConv1d))
            normalise_rows(engine, frozenset(kernels))

    @torch.no_grad()
    def validate(self, module: nn.Module, device: torch.device) -> Validation:
        """L1 of held-out mels relative to that of the per-band mean, and pictures of both."""
        vae = getattr(module, "vae", module)
        mel = self._mels(self.recipe.heldout_split, self.train.validation_clips).to(device)
        decoded = torch.cat([vae.decode(vae.encode(part)[0]) for part in mel.split(self.recipe.features.batch_size)])
        shown = {"truth": mel[:1], "decoded": decoded[:1]}
        listen = vocoder(self.recipe).to(device)
        return Validation({"l1_ratio": relative_l1(decoded, mel)}, {f"mel/{name}": x[0].cpu().numpy() for name, x in shown.items()},
                          {f"sound/{name}": listen.vocode(x)[0].cpu().numpy() for name, x in shown.items()}, self.recipe.clip.sample_rate)

    def export(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """The VAE."""
        vae = MelVAE(self.config.model)
        vae.load_state_dict({name.removeprefix("vae."): value for name, value in weights.items() if not name.startswith("discriminator.")})
        save_weights(vae, self.config.model, folder)

    def _mels(self, split: str, limit: int) -> torch.Tensor:
        batches = clips(self.recipe, split, limit, want=("waveform",))
        return torch.cat([self._mel(batch["waveform"]) for batch in batches])

    def _mel(self, waveform: torch.Tensor) -> torch.Tensor:
        """Log-mel (B, F, T) with T even: 8 s at 44.1 kHz are 689 frames, and a latent covers two."""
        mel = log_mel(waveform, self.config.mel)
        return mel[..., :mel.shape[-1] // 2 * 2]


def relative_l1(decoded: torch.Tensor, mel: torch.Tensor) -> float:
    """Mean |decoded - mel| over mean |per-band mean - mel|, log-mels (B, F, T): 0 is perfect, 1 knows only the bands' means."""
    band_mean = mel.mean(dim=(0, 2), keepdim=True)
    return float((decoded - mel).abs().mean() / (band_mean - mel).abs().mean())
