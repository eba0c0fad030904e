"""Measures the generator of each preference round on the watch clips."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.audio import log_mel
from data_prep.index import ShardSet
from models.encoders.rewards import Reward
from models.objectives.flow_dpo import segment_score
from pipelines.config import Recipe
from pipelines.encoding import file_hash, reward_view, view_decoder
from pipelines.engine.checkpoint import weights_hash
from pipelines.engine.guards import TrainingError
from pipelines.heldout import HeldOut, Sounded, heldout_batches, sound_heldout
from pipelines.metrics.retrieval import recall_at_k
from pipelines.metrics.statistics import shuffled_partner
from pipelines.rewards import load_scorer, scoring_export
from pipelines.signs import Signs
from pipelines.sounding import SoundModel
from pipelines.stages.contrastive import clip_embeddings
from pipelines.stages.generative import FlowModel, flow_losses
from pipelines.views import views_of

GALLERY = 64
LEARNED = ("flow_win", "flow_lose", "reference_win", "reference_lose", "margin", "margin_win", "margin_lose", "accuracy")
"""What a round logs of its training that is among its signs."""


@dataclass
class Watch:
    """The watch clips of a run, encoded once, and what its generators make of them. For the main process alone.

    What it keeps between rounds lies in main memory: the device is for the training.
    """

    recipe: Recipe
    run: Path
    positions: range
    """Of the clips in the held-out split."""
    device: torch.device

    def folder(self, number: int) -> Path:
        """Where the signs of a round are kept."""
        return self.run / "preference" / (f"round-{number}" if number else "start")

    def known(self, number: int, export: Path) -> Signs | None:
        """The signs of a round that was measured before, with the same models and settings."""
        return Signs.load(self.folder(number), self._settings(export))

    def measure(self, number: int, export: Path) -> Signs:
        """Measure the generator in `export`, which round `number` has left, and keep the signs in the round's folder.

        TrainingError where the one that the rounds start from makes sounds that are not finite: nothing can be compared with it.
        """
        model = self._model(export)
        figures = self._pairs(number) | self._learned(number) if number else {}
        sounded = sound_heldout(model, self.recipe, self.held, shuffled_partner(len(self.held), self.recipe.seed))
        signs = Signs(round=number, positions=self.held.positions.numpy(), clips=self._clips(model, sounded),
                      figures=self._retrieval(sounded) | figures)
        if not number and not signs.finite:
            raise TrainingError(f"{export}: its sounds are not finite, so no preference round can start from it; train it on")
        signs.save(self.folder(number), self._settings(export))
        return signs

    @cached_property
    def held(self) -> HeldOut:
        """The clips, encoded."""
        return HeldOut.encode(self._model(self.run / "generative" / "export", sees=True), self.recipe, self.positions).cpu()

    @cached_property
    def _true(self) -> torch.Tensor:
        """Waveforms of the true sounds as the autoencoder and the vocoder give them: what those lose must not count against a generator."""
        model = self._model(self.run / "generative" / "export")
        return torch.cat([model.waveform(part.to(self.device)).cpu() for part in self.held.features["latent_mean"].split(self._batch)])

    @cached_property
    def _scored(self) -> torch.Tensor:
        """Segments (N, S, D) of the videos by the encoder of `preference.reward`."""
        reward = load_scorer(self.recipe, self.device)
        view, seen = reward_view(reward), {}
        decoder = view_decoder(self.recipe, (view,), ("frames", "waveform"))
        for batch in heldout_batches(self.recipe, decoder, self.positions):
            with torch.no_grad():
                segments = reward.encode_video(views_of(batch, (view,), self.device)[view]).segments
            seen |= dict(zip(batch["key"], segments.cpu(), strict=True))
        if lost := [key for key in self.held.keys if key not in seen]:
            raise TrainingError(f"{self.recipe.data}: clip {lost[0]} could be decoded and then no more, one of {len(lost)}: "
                                "see to the storage and run again")
        return torch.stack([seen[key] for key in self.held.keys])

    @property
    def _batch(self) -> int:
        return self.recipe.features.batch_size

    def _model(self, export: Path, sees: bool = False) -> SoundModel:
        return SoundModel.from_run(self.run, self.device, stage=str(export.parent.relative_to(self.run)), sees=sees)

    def _settings(self, export: Path) -> dict[str, Any]:
        return self._fixed | {"generator": weights_hash(export)}

    @cached_property
    def _fixed(self) -> dict[str, Any]:
        """Everything but the generator that the signs depend on."""
        recipe, vocoder = self.recipe, self.recipe.vocoder
        stages = {stage: self.run / stage / "export" for stage in ("autoencoder", "contrastive")}
        if recipe.preference.reward:
            stages["preference.reward"] = scoring_export(recipe)
        options = {name: getattr(recipe.generative, name) for name in ("sampling_steps", "guidance")}
        return {**{name: weights_hash(path) for name, path in stages.items()}, **options, "score": recipe.preference.score,
                "data": ShardSet.open(recipe.data, split=recipe.heldout_split).hash, "clips": [self.positions.start, self.positions.stop],
                "vocoder": dataclasses.asdict(vocoder), "vocoder.weights": vocoder.weights and file_hash(vocoder.weights),
                "seed": recipe.seed, "noise": "by position"}

    def _clips(self, model: SoundModel, sounded: Sounded) -> dict[str, np.ndarray]:
        """What is measured clip by clip; names as in `Signs.clips`."""
        latent, held = sounded.latent.double().cpu(), self.held
        generator = FlowModel(model.generator).eval()
        flow = flow_losses(generator, held.features, model.device, self._batch, positions=held.positions)
        found = {"reward": sounded.reward, "reward_true": self._score(model.reward, held.judged["video"], self._true),
                 "onset_f1": sounded.onset_f1, "flow_loss": flow.numpy(), "latent_mean": latent.mean(1).numpy(),
                 "latent_square": latent.square().mean(1).numpy(),
                 "latent_true": held.features["latent_mean"].double().mean(1).numpy()}
        if self.recipe.preference.reward:
            video, reward = self._scored, load_scorer(self.recipe, self.device)
            found |= {"scoring": self._score(reward, video, sounded.waveform), "scoring_true": self._score(reward, video, self._true)}
        return {name: values.astype(np.float64) for name, values in found.items()}

    @torch.no_grad()
    def _score(self, reward: Reward, video: torch.Tensor, waveform: torch.Tensor) -> np.ndarray:
        """Reward (N,) of sounds (N, samples) with the segments (N, S, D) that are seen in their videos."""
        parts = (part.to(self.device) for part in waveform.split(self._batch))
        heard = torch.cat([reward.encode_audio(log_mel(part, reward.config.mel)).segments for part in parts])
        return segment_score(reward.similarity(video.to(self.device), heard), self.recipe.preference.score).cpu().numpy()

    def _retrieval(self, sounded: Sounded) -> dict[str, float]:
        """R@1 of the sounds among the watch clips, by the run's own encoder, both directions."""
        if not sounded.heard.isfinite().all():
            return {"retrieval": math.nan}
        gallery = min(GALLERY, len(self.held))
        video, audio = clip_embeddings(self.held.judged["video"]), clip_embeddings(sounded.heard)
        found = recall_at_k(video, audio, 1, gallery, len(self.held) // gallery)
        return {"retrieval": found.value, "retrieval_chance": found.chance}

    def _pairs(self, number: int) -> dict[str, float]:
        """Share of the round's videos whose true sound scores below the loser; nothing where nothing was generated."""
        if not self.recipe.preference.needs_candidates:
            return {}
        shards = ShardSet.open(self.folder(number) / "candidates")
        places = ((shard, row) for shard, count in enumerate(shards.counts) for row in range(int(count)))
        records = [json.loads(shards.read(*place, ["round.json"])["round.json"]) for place in places]
        below = [record["truth"] < record["scores"][record["loser"]] for record in records if record["truth"] is not None]
        return {"inverted": sum(below) / len(below)} if below else {}

    def _learned(self, number: int) -> dict[str, float]:
        """Means over the last tenth of the round's training, without steps that were skipped."""
        lines = [json.loads(line) for line in (self.folder(number) / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        late = [line for line in steps if line["step"] > 0.9 * steps[-1]["step"] and math.isfinite(line["loss"])]
        if not late:
            return {}
        return {name: float(np.mean([line[name] for line in late])) for name in LEARNED if name in late[-1]}
