"""Stage 4, losers that need no sampling: the true sounds of the training videos put out of time, as latents in shards."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data_prep.audio import log_mel, mel_spec
from data_prep.index import ShardSet
from data_prep.shards import ShardWriter
from data_prep.stream import Batch
from models.codecs.autoencoder import MelVAE, MelVAEConfig
from models.objectives.time_maps import distortion_sizes, heard_through, time_map
from models.pretrained import load_weights
from pipelines.config import Recipe
from pipelines.config.preference import DistortionConfig
from pipelines.encoding import frozen, latent_length, view_decoder
from pipelines.engine.checkpoint import weights_hash
from pipelines.engine.world import World
from pipelines.features import npy, training_videos
from pipelines.provenance import claim, known_provenance
from pipelines.sharing import Work, make_shards


def write_distorted(recipe: Recipe, run: Path, world: World) -> str:
    """Write every distortion of every training video's true sound, `distorted.npy` (kinds x levels, N, C); the shards' folder.

    Shards have the keys and numbers of the clip shards and depend on no generator: they are made once for all rounds. Resumable by
    shard. Collective.
    """
    folder, source = run / "preference" / "distorted", training_videos(recipe)
    claim(folder, partial(_provenance, recipe, run, source), world, "delete that folder, or restore what was changed")
    start = partial(_work, recipe, run, world.device)
    make_shards(source, folder, world, "true sounds put out of time", known_provenance(folder), start)
    return str(folder)


def distortion_row(config: DistortionConfig, progress: torch.Tensor, kind: torch.Tensor, jitter: torch.Tensor) -> torch.Tensor:
    """Which row (B,) of `distorted.npy` loses at a `progress` (B,) of training in [0, 1): coarse ones first, subtle ones last.

    `kind` and `jitter` are uniform in [0, 1): which kind, and whether the level next to that of the progress is taken, to either side.
    """
    level = (config.levels * progress).long() + (3 * jitter).long() - 1
    return (len(config.kinds) * kind).long() * config.levels + level.clamp(0, config.levels - 1)


class Distorter:
    """Waveforms -> latents of every distortion of them."""

    def __init__(self, recipe: Recipe, vae: MelVAE, device: torch.device):
        self.recipe, self.vae, self.device = recipe, vae, device
        self.spec, self.length = mel_spec(recipe.autoencoder.mel), latent_length(recipe.clip.seconds, recipe.autoencoder.mel)

    @torch.no_grad()
    def __call__(self, waveform: torch.Tensor, keys: list[str]) -> torch.Tensor:
        """Waveforms (B, samples) of the clips `keys` -> latents (B, kinds x levels, N, C) in the autoencoder's scale.

        They are samples of the posterior, as the winner is: means alone would be smoother, and known for losers by that. A clip's draws
        come from its key, and its noise is the same in all rows.
        """
        mels = self._mels(waveform)
        draws = [np.random.default_rng([self.recipe.seed, *key.encode()]) for key in keys]
        noise = torch.stack([self._noise(random) for random in draws]).to(self.device)
        rows = zip(*(self._maps(random, mels.shape[-1]) for random in draws), strict=True)
        return torch.stack([self._encode(mels, maps, noise) for maps in rows], dim=1)

    def _mels(self, waveform: torch.Tensor) -> torch.Tensor:
        """Log-mels (B, F, T) of whole latents, as the features were made of."""
        missing = 2 * self.length * self.spec.hop - waveform.shape[1]
        return log_mel(F.pad(waveform.to(self.device), (0, missing)), self.spec)

    def _noise(self, random: np.random.Generator) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal((self.length, self.vae.config.latent_dim), dtype=np.float32))

    def _maps(self, random: np.random.Generator, frames: int) -> list[torch.Tensor]:
        """A map for each kind and level, in the order of the rows."""
        config, rate = self.recipe.preference.distortion, self.spec.sample_rate / self.spec.hop
        sizes = distortion_sizes(config.coarse_seconds, config.subtle_seconds, config.levels)
        return [time_map(kind, frames, size * rate, int(random.choice((-1, 1))), random.random())
                for kind, size in itertools.product(config.kinds, sizes)]

    def _encode(self, mels: torch.Tensor, maps: tuple[torch.Tensor, ...], noise: torch.Tensor) -> torch.Tensor:
        moved = torch.stack([heard_through(mel, source) for mel, source in zip(mels, maps, strict=True)])
        mean, std = self.vae.encode(moved)
        return mean.transpose(1, 2) + std.transpose(1, 2) * noise


def _provenance(recipe: Recipe, run: Path, source: ShardSet) -> dict[str, Any]:
    distortion = {f"preference.distortion.{name}": value for name, value in dataclasses.asdict(recipe.preference.distortion).items()}
    return {"data": source.hash, "seed": recipe.seed, "seconds": recipe.clip.seconds, "mel": recipe.autoencoder.mel,
            "autoencoder": weights_hash(run / "autoencoder" / "export"), **distortion}


def _work(recipe: Recipe, run: Path, device: torch.device) -> Work:
    distort = Distorter(recipe, frozen(load_weights(MelVAE, MelVAEConfig, run / "autoencoder" / "export"), device), device)
    options = recipe.features

    def write(writer: ShardWriter, batches: Iterator[Batch]) -> None:
        for batch in batches:
            for key, latents in zip(batch["key"], distort(batch["waveform"], batch["key"]), strict=True):
                writer.add(key, {"distorted.npy": npy(latents)})

    return Work(view_decoder(recipe, (), ("waveform",)), options.batch_size, write, **options.decoding)
