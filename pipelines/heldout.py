"""Held-out clips, what a run's models make of them, and the sounds that its generators give them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from data_prep.audio import log_mel
from models.conditioning import Conditions
from models.objectives.flow_dpo import segment_score
from pipelines.config import Recipe
from pipelines.generate import SoundModel
from pipelines.metrics.onsets import detect_onsets, onset_f1
from pipelines.stages.data import clips


@dataclass
class HeldOut:
    """N held-out clips, encoded."""

    keys: list[str]
    places: torch.Tensor
    """Shard and row (N, 2)."""
    waveform: torch.Tensor
    mel: torch.Tensor
    latent: torch.Tensor
    """Posterior means (N, L, C)."""
    clip: torch.Tensor
    sync: torch.Tensor
    video: torch.Tensor
    """Segment embeddings (N, S, D)."""
    audio: torch.Tensor
    """Segment embeddings (N, S, D)."""

    @classmethod
    def encode(cls, model: SoundModel, recipe: Recipe) -> HeldOut:
        """Encode the first `evaluation.clips` of the recipe's held-out split."""
        batches = clips(recipe, recipe.heldout_split, recipe.features.batch_size, recipe.evaluation.clips)
        parts = [_encode(model, batch) for batch in batches]
        keys = [key for part in parts for key in part["keys"]]
        return cls(keys=keys, **{f.name: torch.cat([part[f.name] for part in parts]) for f in fields(cls) if f.name != "keys"})

    def __len__(self) -> int:
        return len(self.keys)


@torch.no_grad()
def _encode(model: SoundModel, batch: dict) -> dict:
    waveform, encoder = batch["waveform"].to(model.device), model.conditioner.encoder
    mel = log_mel(waveform, model.recipe.autoencoder.mel)
    conditions, video = model.conditioner(batch["frames"].to(model.device).float() / 255)
    audio = encoder.encode_audio(log_mel(waveform, encoder.config.mel)).segments
    latent, places = model.vae.encode(mel)[0].transpose(1, 2), torch.stack([batch["shard"], batch["row"]], dim=1)
    return {"keys": batch["key"], "places": places, "waveform": waveform, "mel": mel, "latent": latent,
            "clip": conditions.clip, "sync": conditions.sync, "video": video, "audio": audio}


@dataclass
class Sounded:
    """Sounds that one generator gave the held-out videos, and their scores (N,)."""

    mel: np.ndarray
    waveform: torch.Tensor
    reward: np.ndarray
    """Of each sound with its own video."""
    reward_shuffled: np.ndarray
    """The same sounds with another clip's video."""
    onset_f1: np.ndarray
    """Of each sound's onsets against those of its clip's true sound."""
    onset_f1_shuffled: np.ndarray
    """Against those of another clip's."""


@torch.no_grad()
def sound_heldout(model: SoundModel, held: HeldOut, partner: np.ndarray) -> Sounded:
    """Generate for every held-out video, with noise that depends on the clip's number alone, so that two generators can be paired."""
    recipe = model.recipe
    mels, waveforms = [], []
    for part in torch.arange(len(held)).split(recipe.features.batch_size):
        noise = torch.cat([model.noise(1, recipe.clip.seconds, int(row)) for row in part])
        latents = model.latents(Conditions(clip=held.clip[part], sync=held.sync[part]), noise)
        mels.append(model.mel(latents))
        waveforms.append(model.waveform(latents))
    mel, waveform = torch.cat(mels), torch.cat(waveforms)
    videos = held.video, held.video[partner]
    own, shuffled = (segment_score(model.similarities(video, waveform), recipe.preference.score) for video in videos)
    heard, true = _onsets(mel, recipe), _onsets(held.mel, recipe)
    return Sounded(mel.cpu().numpy(), waveform, own.cpu().numpy(), shuffled.cpu().numpy(),
                   np.array([onset_f1(*pair) for pair in zip(heard, true, strict=True)]),
                   np.array([onset_f1(sound, true[other]) for sound, other in zip(heard, partner, strict=True)]))


def _onsets(mels: torch.Tensor, recipe: Recipe) -> list[np.ndarray]:
    return [detect_onsets(mel, recipe.autoencoder.mel) for mel in mels.cpu().numpy()]
