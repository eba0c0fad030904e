"""What a run's figures are to be held against, on the same held-out clips: an untrained encoder, a linear probe, a ceiling and floors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from data_prep.audio import log_mel
from data_prep.index import ShardSet
from data_prep.sidecar import ShardError
from data_prep.stream import one_pass
from models.conditioning import CombinedConditioner, EncoderConditioner
from models.encoders.batch_norm import BatchNorm
from models.encoders.rewards import Reward
from models.objectives.flow_dpo import segment_score
from pipelines.config import Recipe
from pipelines.encoding import ClipEncoder, frozen, reward_view
from pipelines.heldout import SHIFT, HeldOut, Sounded, heldout_batches, select_rows, sound_heldout
from pipelines.metrics.figures import Figure, share
from pipelines.metrics.linear_code import linear_code
from pipelines.metrics.onsets import detect_onsets, onset_f1
from pipelines.metrics.probe import OnsetProbe, onset_density
from pipelines.metrics.retrieval import recall_at_k, right_segment_accuracy
from pipelines.metrics.statistics import paired
from pipelines.sounding import SoundModel
from pipelines.stages.autoencoder import relative_l1
from pipelines.stages.contrastive import clip_embeddings
from pipelines.views import views_of

GALLERY = 64


@dataclass
class Controls:
    """The controls of one run."""

    seeing: SoundModel
    """With the run's conditioner."""
    sounding: SoundModel
    """With the generator that is judged."""
    recipe: Recipe
    held: HeldOut
    """The clips that the run's own figures are about: the first `evaluation.clips` of the held-out split."""
    encoder: ClipEncoder = field(init=False)
    """Reads those clips once more."""

    def __post_init__(self):
        seeing = self.seeing
        self.encoder = ClipEncoder(self.recipe, seeing.vae, seeing.conditioner, seeing.reward, seeing.device)

    def figures(self, sounded: Sounded, partner: np.ndarray) -> list[Figure]:
        """All of them; `sounded` is what the generator made of the held-out videos, `partner` each clip's in the shuffled control."""
        untrained = None if self.seeing.reward is None else self._untrained()
        found = [*([] if untrained is None else self._timing(untrained)), self._linear_code()]
        if "sync" in self.recipe.conditioning.slots:
            found += self._probes(untrained if self.recipe.conditioning.sync == "own" else None, partner)
        return found + self._sounds(sounded, partner)

    def _untrained(self) -> Reward:
        """The encoder as before training, but for its batch norms: they have seen training clips, else they would hide what random
        weights can tell apart."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            encoder = type(self.seeing.reward)(self.seeing.reward.config).to(self.seeing.device).train()
        norms = [module for module in encoder.modules() if isinstance(module, BatchNorm)]
        for number, batch in enumerate(self._training(self.recipe.features.statistics_clips), start=1):
            for norm in norms:
                norm.momentum = 1 / number  # the mean over all batches
            with torch.no_grad():
                encoder.encode_video(self._frames(batch))
                encoder.encode_audio(log_mel(batch["waveform"].to(self.seeing.device), encoder.config.mel))
        return frozen(encoder, self.seeing.device)

    @torch.no_grad()
    def _timing(self, untrained: Reward) -> list[Figure]:
        """The figures that the encoder's bars are about, of an untrained one."""
        model, parts = replace(self.seeing, reward=untrained), []
        for batch in self._held():
            waveform = batch["waveform"].to(model.device)
            late = waveform[:, round(SHIFT * model.sample_rate):]
            video, audio = untrained.encode_video(self._frames(batch)).segments, model.hear(waveform)
            parts.append((video, audio, model.hear(late) if video.shape[1] > 1 else audio[:, :0]))
        video, audio, shifted = (torch.cat(each) for each in zip(*parts, strict=True))
        gallery, segments = min(GALLERY, len(video)), video.shape[1]
        recall = recall_at_k(clip_embeddings(video), clip_embeddings(audio), 1, gallery, self.recipe.evaluation.galleries)
        found = [Figure(name="untrained encoder: retrieval R@1", value=recall.value, standard_error=_error(np.array(recall.per_gallery)),
                        note=f"chance {recall.chance:.3f}, error over {len(recall.per_gallery)} galleries of {gallery}, both directions")]
        if segments < 2:
            return found
        score = self.recipe.preference.score
        left = shifted.shape[1]
        in_time, out_of_time = (segment_score(untrained.similarity(video[:, :left], sound), score) for sound in (audio[:, :left], shifted))
        right, prefers = right_segment_accuracy(video.cpu().numpy(), audio.cpu().numpy()), (in_time > out_of_time).float().cpu().numpy()
        return [*found, share("untrained encoder: right segment of a clip", right, f"chance {1 / segments:.3f}, {segments} segments"),
                share(f"untrained encoder: true sound over itself {SHIFT:g} s out of time", prefers, "chance 0.5")]

    @torch.no_grad()
    def _probes(self, untrained: Reward | None, partner: np.ndarray) -> list[Figure]:
        """Whether the timing is there to be read, in what the generator is given and in the features of an untrained encoder."""
        own = self.held.features["sync"]
        group = self.sounding.generator.config.sync_group
        seconds = token_seconds(self.seeing.conditioner, own.shape[1], group, self.recipe.clip.seconds)
        trained, random = OnsetProbe(seconds, group), OnsetProbe(seconds, group)
        for batch in self._training(self.recipe.evaluation.probe_clips):
            onsets = self._onsets(log_mel(batch["waveform"], self.recipe.autoencoder.mel))
            trained.add(self._conditions(batch)["sync"], onsets)
            if untrained is not None:
                random.add(self._tokens(untrained, batch), onsets)
        found = self._read(trained, (own,), "linear probe", partner)
        if untrained is not None:
            tokens = (self._tokens(untrained, batch) for batch in self._held())
            found += self._read(random, tokens, "linear probe, untrained encoder", partner)
        return found

    def _read(self, probe: OnsetProbe, tokens: Iterable[Tensor], name: str, partner: np.ndarray) -> list[Figure]:
        """What a probe reads in the held-out clips, against those clips and against others."""
        probe.fit()
        size = self.recipe.features.batch_size
        curves = np.concatenate([probe.curves(part) for each in tokens for part in each.split(size)])
        true, heard = self._onsets(self.held.mel), [probe.onsets(curve) for curve in curves]
        dense = [onset_density(times, probe.seconds) for times in true]
        scores = {"onset F1": (onset_f1, heard, true), "correlation with the onsets": (_correlation, curves, dense)}
        found = []
        for what, (measure, read, truth) in scores.items():
            own = np.array([measure(*pair) for pair in zip(read, truth, strict=True)])
            other = np.array([measure(each, truth[number]) for each, number in zip(read, partner, strict=True)])
            found.append(share(f"{name}: {what}", own, f"shuffled {other.mean():.3f}, difference {_told(own, other)}"))
        return found

    def _linear_code(self) -> Figure:
        """The error of principal components in the autoencoder's place."""
        channels, front_end = self.seeing.vae.config.latent_dim, self.recipe.autoencoder.mel
        batches = self._training(self.recipe.evaluation.probe_clips, want=("waveform",))
        decoded, true = linear_code((log_mel(batch["waveform"], front_end) for batch in batches), self.held.mel.cpu(), channels)
        return Figure(name="autoencoder L1, relative: linear code", value=relative_l1(decoded, true),
                      note=f"principal components of 8 frames, {channels} values for every two")

    @torch.no_grad()
    def _sounds(self, sounded: Sounded, partner: np.ndarray) -> list[Figure]:
        """Onset F1 against the true sound, from the best that the autoencoder allows down to silence."""
        model, true = self.sounding, self._onsets(self.held.mel)
        mels, again = [], []
        for latents in self.held.features["latent_mean"].split(self.recipe.features.batch_size):
            mels += self._onsets(model.mel(latents))
            again += self._onsets(log_mel(model.waveform(latents), model.front_end))
        still, black = (replace(self.held, features=self.held.features | conditions) for conditions in self._sightless())
        scores = {
            "true log-mels through the autoencoder": _scores(mels, true),
            "true log-mels through autoencoder and vocoder": _scores(again, true),
            "generated": sounded.onset_f1,
            "generated from frozen videos": sound_heldout(model, self.recipe, still, partner).onset_f1,
            "generated from black videos": sound_heldout(model, self.recipe, black, partner).onset_f1,
            "generated, against another clip": sounded.onset_f1_shuffled,
            "silence": _scores([np.zeros(0)] * len(true), true),
        }
        return [share(f"onset F1: {name}", values, f"generated minus this {_told(sounded.onset_f1, values)}")
                for name, values in scores.items()]  # fmt: skip

    def _sightless(self) -> list[dict[str, Tensor]]:
        """Conditions of the held-out videos with their first picture all along, where what is there is seen but not when it happens; and
        of black pictures."""
        parts = ([], [])
        for batch in self._held():
            views = {name: value for name, value in batch.items() if name.startswith("view")}
            first = {name: value[:, :1].expand_as(value) for name, value in views.items()}
            black = {name: torch.zeros_like(value) for name, value in views.items()}
            for part, changed in zip(parts, (first, black), strict=True):
                part.append(self._conditions(batch | changed))
        return [{name: torch.cat([conditions[name] for conditions in part]) for name in part[0]} for part in parts]

    def _held(self) -> Iterator[dict]:
        """The held-out clips once more, row by row those of `held`. ShardError where one cannot be read again: a decoder took too long."""
        known, seen = set(self.held.positions.tolist()), 0
        for batch in heldout_batches(self.recipe, self.encoder.decoder(), range(self.recipe.evaluation.clips)):
            rows = [row for row, position in enumerate(batch["position"].tolist()) if position in known]
            seen += len(rows)
            yield select_rows(batch, rows)
        if seen < len(known):
            raise ShardError(f"{self.recipe.data}: {len(known) - seen} held-out clips could not be read again: give the command again")

    def _training(self, limit: int, want: tuple[str, ...] = ("frames", "waveform")) -> Iterator[dict]:
        shards = ShardSet.open(self.recipe.data, split=self.recipe.train_split)
        options = self.recipe.features
        return one_pass(shards, self.encoder.decoder(want), options.batch_size, limit=limit, on_bad=lambda clip: None, **options.decoding)

    @torch.no_grad()
    def _conditions(self, batch: dict) -> dict[str, Tensor]:
        """What the video tells the generator; a caption knows no time."""
        views = views_of(batch, self.encoder.views, self.seeing.device)
        return self.seeing.conditioner.conditions(views).filled()

    def _frames(self, batch: dict) -> Tensor:
        """Pictures as the contrastive encoder sees them."""
        return views_of(batch, self.encoder.views, self.seeing.device)[reward_view(self.seeing.reward)]

    def _tokens(self, encoder: Reward, batch: dict) -> Tensor:
        """Synchrony tokens of an encoder as a conditioner would give them."""
        return EncoderConditioner(encoder).to(self.seeing.device)(self._frames(batch))[0].sync

    def _onsets(self, mels: Tensor) -> list[np.ndarray]:
        return [detect_onsets(mel, self.recipe.autoencoder.mel) for mel in mels.cpu().numpy()]


def token_seconds(conditioner: CombinedConditioner, count: int, group: int, seconds: float) -> np.ndarray:
    """Time of the middle of each of `count` synchrony tokens of a clip, `group` of which an encoder's window gives, in seconds (count,)."""
    config = conditioner.parts[conditioner.sources["sync"]].encoder.config
    if config.hop_frames == config.segment_frames:  # evenly over the clip, also where it ends within a segment
        return (np.arange(count) + 0.5) * int(seconds * config.fps + 1e-6) / config.fps / count
    windows, places = np.divmod(np.arange(count), group)
    return (windows * config.hop_frames + (places + 0.5) * config.segment_frames / group) / config.fps


def _scores(heard: list[np.ndarray], true: list[np.ndarray]) -> np.ndarray:
    return np.array([onset_f1(*pair) for pair in zip(heard, true, strict=True)])


def _correlation(curve: np.ndarray, truth: np.ndarray) -> float:
    """Pearson's; 0 where one of the two does not move, as in a clip without onsets."""
    spread = curve.std() * truth.std()
    return float(np.mean((curve - curve.mean()) * (truth - truth.mean())) / spread) if spread > 1e-12 else 0.0


def _told(first: np.ndarray, second: np.ndarray) -> str:
    found = paired(first, second)
    return f"{found.difference:.3f} ± {found.standard_error:.3f}"


def _error(values: np.ndarray) -> float | None:
    """Standard error of a mean; None for a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
