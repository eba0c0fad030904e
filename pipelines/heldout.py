"""Held-out clips, what a run's models make of them, and the sounds that its generators give them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from data_prep.audio import log_mel
from data_prep.index import ShardSet
from data_prep.sidecar import ShardError
from data_prep.stream import one_pass
from data_prep.streaming.reading import BadClip
from models.conditioning import Conditions
from models.objectives.flow_dpo import segment_score
from pipelines.config import Recipe
from pipelines.encoding import ClipEncoder
from pipelines.engine.watchdog import beat
from pipelines.metrics.onsets import detect_onsets, onset_f1
from pipelines.sounding import SoundModel
from pipelines.views import ViewDecoder

SHIFT = 0.3
"""Seconds between a true sound and its shifted copy: beyond what viewers forgive, far below a segment."""
_FEWEST = 2
"""Clips that a standard error takes."""


@dataclass(frozen=True)
class Shares:
    """Which clips of the held-out split, by position, are for what: a round is chosen on clips that the evaluation never looks at.

    Chosen on the clips that are reported, the best of several rounds would look better than it is.
    """

    there: int
    """Clips in the split."""
    evaluation: range
    """The first ones, for `evaluate`."""
    watch: range
    """The last ones, for the signs of each round; empty in a run without rounds, or where there are too few."""

    @classmethod
    def of(cls, recipe: Recipe) -> Shares:
        """As the recipe asks, where the split holds so many; else the rounds take a quarter of it, and the evaluation the rest."""
        count = len(ShardSet.open(recipe.data, split=recipe.heldout_split))
        return cls.divide(count, recipe.evaluation.clips, recipe.preference.watch.clips if recipe.preference.rounds else 0)

    @classmethod
    def divide(cls, count: int, evaluation: int, watch: int) -> Shares:
        """The shares of `count` clips; `watch` is 0 in a run without rounds."""
        watched = min(watch, max(count - evaluation, count // 4, _FEWEST))
        watched = watched if count - watched >= _FEWEST else 0
        return cls(count, range(min(evaluation, count - watched)), range(count - watched, count))

    def sparing(self, watched: range) -> Shares:
        """The same, but for the clips that a round was chosen on before, whatever the recipe says by now: these are not evaluated."""
        return replace(self, evaluation=range(min(self.evaluation.stop, watched.start)), watch=watched)

    def complaint(self, recipe: Recipe) -> str:
        """One line where the split holds fewer clips than the recipe asks for, else nothing."""
        if not recipe.preference.rounds:
            return ""
        wanted = {"evaluation.clips": recipe.evaluation.clips, "preference.watch.clips": recipe.preference.watch.clips}
        if len(self.evaluation) + len(self.watch) >= sum(wanted.values()):
            return ""
        asked = " and ".join(f"{name}={value}" for name, value in wanted.items())
        split = f"split {recipe.heldout_split!r} has {self.there} clips for {asked}"
        if not self.watch:
            return f"{split}: too few to watch the preference rounds by, so the last round is kept; hold out at least {2 * _FEWEST}"
        return (f"{split}: {len(self.evaluation)} are evaluated and {len(self.watch)} others watch the preference rounds; "
                f"hold out {sum(wanted.values())}")


@dataclass
class HeldOut:
    """N held-out clips, encoded."""

    keys: list[str]
    positions: torch.Tensor
    """Of each in the held-out split (N,), rising."""
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
    def encode(cls, model: SoundModel, recipe: Recipe, positions: range) -> HeldOut:
        """Encode the clips at `positions` of the recipe's held-out split; broken ones are left out."""
        encoder = ClipEncoder(recipe, model.vae, model.conditioner, model.reward, model.device)
        parts = [_encode(model, encoder, batch) for batch in heldout_batches(recipe, encoder.decoder(), positions)]
        if not parts:
            raise ValueError(f"{recipe.data}: none of the {len(positions)} clips of split {recipe.heldout_split!r} can be read")
        keys = [key for part in parts for key in part.pop("keys")]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        judged = {name: joined.pop(name) for name in ("video", "audio", "shifted") if name in joined}
        own = {name: joined.pop(name) for name in ("positions", "places", "waveform", "mel")}
        return cls(keys=keys, **own, features=joined, judged=judged)

    def cpu(self) -> HeldOut:
        """The same in main memory, for what lives as long as a training that wants the device for itself."""
        features, judged = ({name: values.cpu() for name, values in each.items()} for each in (self.features, self.judged))
        return replace(self, waveform=self.waveform.cpu(), mel=self.mel.cpu(), features=features, judged=judged)

    def __len__(self) -> int:
        return len(self.keys)


def heldout_batches(recipe: Recipe, decode: ViewDecoder, positions: range) -> Iterator[dict[str, Any]]:
    """Batches of the good clips at `positions`, which follow one another, of the held-out split, with "shard", "row" and "position".

    Broken clips are left out; ShardError where storage could not be read.
    """
    shards = ShardSet.open(recipe.data, split=recipe.heldout_split)
    ends = shards.counts.cumsum()
    first = int(ends.searchsorted(positions.start, side="right"))
    skipped = int(ends[first] - shards.counts[first])
    tail = shards.select(range(first, len(ends)))
    for batch in one_pass(tail, decode, recipe.features.batch_size, limit=positions.stop - skipped, on_bad=leave_broken,
                          **recipe.features.decoding):
        beat()
        batch |= {"shard": batch["shard"] + first, "position": batch["position"] + skipped}
        kept = torch.nonzero(batch["position"] >= positions.start).flatten()
        if len(kept):
            yield select_rows(batch, kept.tolist())


def leave_broken(clip: BadClip) -> None:
    """ShardError where the clip may be read tomorrow: what is measured without it would stay so."""
    if clip.reason == "unreadable":
        raise ShardError(f"{clip.message}; nothing is measured without it: see to the storage and give the command again",
                         clip.shard, clip.key, clip.reason)


def select_rows(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some clips of a batch."""
    return {name: values[rows] if isinstance(values, torch.Tensor) else [values[row] for row in rows] for name, values in batch.items()}


@torch.no_grad()
def _encode(model: SoundModel, encoder: ClipEncoder, batch: dict) -> dict:
    waveform, features = batch["waveform"].to(model.device), encoder(batch)
    video, _ = features.pop("segments", None), features.pop("latent_std")
    found = {"keys": batch["key"], "positions": batch["position"], "places": torch.stack([batch["shard"], batch["row"]], dim=1),
             "waveform": waveform, "mel": log_mel(waveform, model.front_end), **features}
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

    latent: torch.Tensor
    """Latents (N, L, C)."""
    mel: np.ndarray
    waveform: torch.Tensor
    heard: torch.Tensor | None
    """Segment embeddings (N, S, D) of the sounds; None in a run without reward encoder, as the next two."""
    reward: np.ndarray | None
    """Of each sound with its own video."""
    reward_shuffled: np.ndarray | None
    """The same sounds with another clip's video."""
    onset_f1: np.ndarray
    """Of each sound's onsets against those of its clip's true sound."""
    onset_f1_shuffled: np.ndarray
    """Against those of another clip's."""


@torch.no_grad()
def sound_heldout(model: SoundModel, recipe: Recipe, held: HeldOut, partner: np.ndarray) -> Sounded:
    """Generate for every held-out video, with noise that depends on the clip's position in the split alone: two generators can be paired,
    also where another clip could not be read for one of them."""
    conditions, latents = {name: held.features[name] for name in recipe.conditioning.slots}, []
    for part in torch.arange(len(held)).split(recipe.features.batch_size):
        noise = torch.cat([model.noise(1, recipe.clip.seconds, int(position)) for position in held.positions[part]])
        latents.append(model.latents(Conditions(**{name: values[part].to(model.device) for name, values in conditions.items()}), noise))
    mel, waveform = torch.cat([model.mel(part) for part in latents]), torch.cat([model.waveform(part) for part in latents])
    onsets, true = _onsets(mel, recipe), _onsets(held.mel, recipe)
    return Sounded(torch.cat(latents), mel.cpu().numpy(), waveform, *_judge(model, recipe, held, partner, waveform),
                   np.array([_onset_score(*pair) for pair in zip(onsets, true, strict=True)]),
                   np.array([_onset_score(sound, true[other]) for sound, other in zip(onsets, partner, strict=True)]))


def _judge(model: SoundModel, recipe: Recipe, held: HeldOut, partner: np.ndarray, waveform: torch.Tensor) -> tuple:
    """Embeddings of the sounds, their rewards with their own videos and with the partners'."""
    if not held.judged:
        return None, None, None
    heard = torch.cat([model.hear(part) for part in waveform.split(recipe.features.batch_size)])
    video = held.judged["video"].to(model.device)
    cosines = (model.reward.similarity(seen, heard) for seen in (video, video[partner]))
    return heard, *(segment_score(cosine, recipe.preference.score).cpu().numpy() for cosine in cosines)


def _onsets(mels: torch.Tensor, recipe: Recipe) -> list[np.ndarray | None]:
    """Onset times of each sound; None of one that is not finite, which nobody can hear."""
    return [detect_onsets(mel, recipe.autoencoder.mel) if np.isfinite(mel).all() else None for mel in mels.cpu().numpy()]


def _onset_score(heard: np.ndarray | None, true: np.ndarray) -> float:
    return np.nan if heard is None else onset_f1(heard, true)
