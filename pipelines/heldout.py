"""Held-out clips, what a run's models make of them, and the sounds that its generators give them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data_prep.audio import log_mel
from data_prep.index import ShardSet
from data_prep.stream import one_pass
from models.conditioning import Conditions
from models.objectives.flow_dpo import segment_score
from pipelines.config import Recipe
from pipelines.encoding import ClipEncoder
from pipelines.metrics.onsets import detect_onsets, onset_f1
from pipelines.sounding import SoundModel

SHIFT = 0.3
"""Seconds between a true sound and its shifted copy: beyond what viewers forgive, far below a segment."""


@dataclass
class HeldOut:
    """N held-out clips, encoded."""

    keys: list[str]
    places: torch.Tensor
    """Shard and row (N, 2)."""
    waveform: torch.Tensor
    mel: torch.Tensor
    features: dict[str, torch.Tensor]
    """Posterior mean `latent_mean` (N, L, C) and the conditions."""
    judged: dict[str, torch.Tensor]
    """Segment embeddings of the reward encoder: `video` and `audio` (N, S, D), and `shifted` (N, S - 1, D), those of the sound from
    `SHIFT` seconds on, as a clip holds no more of it. Empty in a run without reward encoder."""

    @classmethod
    def encode(cls, model: SoundModel, recipe: Recipe) -> HeldOut:
        """Encode the first `evaluation.clips` of the recipe's held-out split; unreadable ones are left out."""
        encoder = ClipEncoder(recipe, model.vae, model.conditioner, model.reward, model.device)
        shards = ShardSet.open(recipe.data, split=recipe.heldout_split)
        batches = one_pass(shards, encoder.decoder(), recipe.features.batch_size, limit=recipe.evaluation.clips, on_bad=lambda clip: None)
        parts = [_encode(model, encoder, batch) for batch in batches]
        keys = [key for part in parts for key in part.pop("keys")]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        judged = {name: joined.pop(name) for name in ("video", "audio", "shifted") if name in joined}
        own = {name: joined.pop(name) for name in ("places", "waveform", "mel")}
        return cls(keys=keys, **own, features=joined, judged=judged)

    def __len__(self) -> int:
        return len(self.keys)


@torch.no_grad()
def _encode(model: SoundModel, encoder: ClipEncoder, batch: dict) -> dict:
    waveform, features = batch["waveform"].to(model.device), encoder(batch)
    video, _ = features.pop("segments", None), features.pop("latent_std")
    found = {"keys": batch["key"], "places": torch.stack([batch["shard"], batch["row"]], dim=1), "waveform": waveform,
             "mel": log_mel(waveform, model.front_end), **features}
    return found if video is None else found | {"video": video, **_heard(model, waveform, video.shape[1])}


def _heard(model: SoundModel, waveform: torch.Tensor, segments: int) -> dict[str, torch.Tensor]:
    """Segments of the sound, in time and out of time."""
    audio = model.hear(waveform)
    if segments < 2:
        return {"audio": audio, "shifted": audio[:, :0]}
    return {"audio": audio, "shifted": model.hear(waveform[:, round(SHIFT * model.sample_rate):])[:, :segments - 1]}


@dataclass
class Sounded:
    """Sounds that one generator gave the held-out videos, and their scores (N,)."""

    mel: np.ndarray
    waveform: torch.Tensor
    reward: np.ndarray | None
    """Of each sound with its own video; None in a run without reward encoder."""
    reward_shuffled: np.ndarray | None
    """The same sounds with another clip's video."""
    onset_f1: np.ndarray
    """Of each sound's onsets against those of its clip's true sound."""
    onset_f1_shuffled: np.ndarray
    """Against those of another clip's."""


@torch.no_grad()
def sound_heldout(model: SoundModel, recipe: Recipe, held: HeldOut, partner: np.ndarray) -> Sounded:
    """Generate for every held-out video, with noise that depends on the clip's number alone, so that two generators can be paired."""
    conditions, mels, waveforms = {name: held.features[name] for name in recipe.conditioning.slots}, [], []
    for part in torch.arange(len(held)).split(recipe.features.batch_size):
        noise = torch.cat([model.noise(1, recipe.clip.seconds, int(row)) for row in part])
        latents = model.latents(Conditions(**{name: values[part] for name, values in conditions.items()}), noise)
        mels.append(model.mel(latents))
        waveforms.append(model.waveform(latents))
    mel, waveform = torch.cat(mels), torch.cat(waveforms)
    heard, true = _onsets(mel, recipe), _onsets(held.mel, recipe)
    return Sounded(mel.cpu().numpy(), waveform, *_rewards(model, recipe, held, partner, waveform),
                   np.array([onset_f1(*pair) for pair in zip(heard, true, strict=True)]),
                   np.array([onset_f1(sound, true[other]) for sound, other in zip(heard, partner, strict=True)]))


def _rewards(model: SoundModel, recipe: Recipe, held: HeldOut, partner: np.ndarray, waveform: torch.Tensor) -> Iterator[np.ndarray | None]:
    """Of the sounds with their own videos, then with the partners'."""
    if not held.judged:
        yield from (None, None)
        return
    video, heard = held.judged["video"], torch.cat([model.hear(part) for part in waveform.split(recipe.features.batch_size)])
    for seen in (video, video[partner]):
        yield segment_score(model.reward.similarity(seen, heard), recipe.preference.score).cpu().numpy()


def _onsets(mels: torch.Tensor, recipe: Recipe) -> list[np.ndarray]:
    return [detect_onsets(mel, recipe.autoencoder.mel) for mel in mels.cpu().numpy()]
