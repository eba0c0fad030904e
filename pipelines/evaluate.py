"""What a run is worth, in figures on held-out clips, each with its control and its error."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from data_prep.audio import log_mel
from data_prep.index import ShardSet
from models.conditioning import Conditions
from models.objectives.flow_dpo import segment_score
from pipelines.config import Recipe
from pipelines.engine.checkpoint import write_atomically
from pipelines.generate import SoundModel, generator_export
from pipelines.metrics.onsets import detect_onsets, onset_f1
from pipelines.metrics.retrieval import recall_at_k, right_segment_accuracy
from pipelines.metrics.statistics import Bar, Paired, paired, shuffled_partner
from pipelines.stages.autoencoder import relative_l1
from pipelines.stages.data import clips
from pipelines.stages.generative import FlowModel, flow_losses

GALLERY = 64


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured value."""

    name: str
    """What was measured, on how many clips."""
    value: float
    """The measurement, or the mean paired difference."""
    standard_error: float | None = None
    """Of a difference."""
    note: str = ""
    """Control and chance level."""


@dataclass
class HeldOut:
    """Held-out clips and what the run's encoder and autoencoder make of them; N clips."""

    keys: list[str]
    waveform: torch.Tensor
    mel: torch.Tensor
    latent: torch.Tensor
    clip: torch.Tensor
    sync: torch.Tensor
    video: torch.Tensor
    audio: torch.Tensor

    @classmethod
    @torch.no_grad()
    def encode(cls, model: SoundModel, recipe: Recipe) -> HeldOut:
        """Encode the recipe's held-out clips."""
        rows: dict[str, list] = {field.name: [] for field in dataclasses.fields(cls)}
        encoder = model.conditioner.encoder
        for batch in clips(recipe, recipe.heldout_split, recipe.features.batch_size, recipe.evaluation.clips):
            waveform = batch["waveform"].to(model.device)
            mel = log_mel(waveform, recipe.autoencoder.mel)
            conditions, video = model.conditioner(batch["frames"].to(model.device).float() / 255)
            audio = encoder.encode_audio(log_mel(waveform, encoder.config.mel)).segments
            latent = model.vae.encode(mel)[0].transpose(1, 2)
            values = dict(keys=batch["key"], waveform=waveform, mel=mel, latent=latent, clip=conditions.clip, sync=conditions.sync, video=video, audio=audio)
            for name, value in values.items():
                rows[name].append(value)
        keys = [key for part in rows.pop("keys") for key in part]
        return cls(keys=keys, **{name: torch.cat(parts) for name, parts in rows.items()})

    def __len__(self) -> int:
        return len(self.keys)


@dataclass
class Generated:
    """Sounds that one generator gave the held-out videos."""

    mel: np.ndarray
    waveform: torch.Tensor
    reward: np.ndarray
    reward_shuffled: np.ndarray
    onset_f1: np.ndarray
    onset_f1_shuffled: np.ndarray


@torch.no_grad()
def sound_heldout(model: SoundModel, held: HeldOut, partner: np.ndarray) -> Generated:
    """Generate for every held-out video with noise that depends on the clip alone, and score against own and shuffled videos."""
    recipe, rows = model.recipe, range(len(held))
    mels, waveforms = [], []
    for part in torch.arange(len(held)).split(recipe.features.batch_size):
        noise = torch.cat([model.noise(1, recipe.clip.seconds, int(row)) for row in part])
        latents = model.latents(Conditions(clip=held.clip[part], sync=held.sync[part]), noise)
        mels.append(model.mel(latents))
        waveforms.append(model.waveform(latents))
    mel, waveform = torch.cat(mels).cpu().numpy(), torch.cat(waveforms)

    def reward(video: torch.Tensor) -> np.ndarray:
        return segment_score(model.similarities(video, waveform), recipe.preference.score).cpu().numpy()

    heard = [detect_onsets(mel[row], recipe.autoencoder.mel) for row in rows]
    true = [detect_onsets(held.mel[row].cpu().numpy(), recipe.autoencoder.mel) for row in rows]
    return Generated(mel, waveform, reward(held.video), reward(held.video[partner]),
                     np.array([onset_f1(heard[row], true[row]) for row in rows]),
                     np.array([onset_f1(heard[row], true[partner[row]]) for row in rows]))


def evaluate(run: Path, device: torch.device, recipe: Recipe | None = None) -> list[Bar]:
    """Measure a finished run, write `evaluation.json` and the examples, and return its bars. `recipe` replaces the run's own."""
    last = SoundModel.from_run(run, device)
    base = SoundModel.from_run(run, device, stage="generative")
    recipe = recipe or last.recipe
    held = HeldOut.encode(last, recipe)
    partner = shuffled_partner(len(held), recipe.seed)
    before, after = sound_heldout(base, held, partner), sound_heldout(last, held, partner)
    figures, bars = _measure(recipe, base, held, before, after)
    found = {"bars": [dataclasses.asdict(bar) for bar in bars], "figures": [dataclasses.asdict(figure) for figure in figures],
             "examples": _examples(run, recipe, held, after), "environment": _environment(device, generator_export(run).parent.relative_to(run))}
    write_atomically(run / "evaluation.json", json.dumps(found, indent=1))
    return bars


def _measure(recipe: Recipe, base: SoundModel, held: HeldOut, before: Generated, after: Generated) -> tuple[list[Figure], list[Bar]]:
    video, audio = held.video.cpu().numpy(), held.audio.cpu().numpy()
    gallery = min(GALLERY, len(held))
    recalls = {k: recall_at_k(_flat(video), _flat(audio), k, gallery, recipe.evaluation.galleries) for k in (1, 5, 10) if k <= gallery}
    with torch.no_grad():
        parts = held.mel.split(recipe.features.batch_size)
        ratio = relative_l1(torch.cat([base.vae.decode(base.vae.encode(part)[0]) for part in parts]), held.mel)
    right, wrong = flow_losses(FlowModel(base.generator).eval(), {"latent_mean": held.latent, "clip": held.clip, "sync": held.sync}, base.device)
    flow = paired(wrong.numpy(), right.numpy())
    relative = flow.difference / float(right.mean())
    reward = paired(before.reward, before.reward_shuffled)
    times_chance = recalls[1].value / recalls[1].chance
    count, segments = len(held), video.shape[1]
    figures = [
        *(Figure(name=f"retrieval R@{k}", value=r.value, note=f"chance {r.chance:.3f}, {recipe.evaluation.galleries} galleries of {gallery}, both directions")
          for k, r in recalls.items()),
        Figure(name="autoencoder L1, relative", value=ratio, note="1 is the per-band mean"),
        Figure(name="flow loss, right video", value=float(right.mean()), note=f"{count} clips"),
        _difference("flow loss, shuffled minus right video", flow),
        _difference("reward, own minus shuffled video", reward),
        _difference("onset F1, own minus shuffled clip", paired(before.onset_f1, before.onset_f1_shuffled),
                    f"own {before.onset_f1.mean():.3f}, within 100 ms"),
        _right_segment(right_segment_accuracy(video, audio), segments),
        _difference("reward, after minus before preference", paired(after.reward, before.reward), f"before {before.reward.mean():.4f}"),
        _difference("onset F1, after minus before preference", paired(after.onset_f1, before.onset_f1), f"before {before.onset_f1.mean():.3f}"),
    ]
    limits = recipe.evaluation.bars
    bars = [
        _bar("retrieval R@1, times chance", times_chance, ">=", limits.retrieval_times_chance, "contrastive stage"),
        _bar("autoencoder L1, relative", ratio, "<=", limits.autoencoder_ratio, "autoencoder stage"),
        _bar("flow loss rise with shuffled videos", relative, ">=", limits.flow_gap, "generative stage: share of the flow loss"),
        _bar("flow loss rise, standard errors", flow.sigmas, ">=", limits.flow_gap_sigmas, "generative stage"),
        _bar("reward of own over shuffled video, standard errors", reward.sigmas, ">=", limits.reward_gap_sigmas, "generated sound"),
    ]
    return figures, [bar for bar in bars if bar]


def _difference(name: str, found: Paired, note: str = "") -> Figure:
    text = "; ".join(part for part in (f"{found.sigmas:.1f} standard errors, {found.n} clips", note) if part)
    return Figure(name=name, value=found.difference, standard_error=found.standard_error, note=text)


def _right_segment(accuracy: np.ndarray, segments: int) -> Figure:
    error = float(accuracy.std(ddof=1) / np.sqrt(len(accuracy)))
    return Figure(name="right segment of a clip", value=float(accuracy.mean()), standard_error=error, note=f"chance {1 / segments:.3f}, {segments} segments")


def _bar(name: str, value: float, comparison: str, bound: float | None, explanation: str) -> Bar | None:
    return None if bound is None else Bar(name=name, value=value, comparison=comparison, bound=bound, explanation=explanation)


def _flat(segments: np.ndarray) -> np.ndarray:
    """Normalised segment embeddings (N, S, D) laid end to end (N, S*D), so that a clip's cosine is the mean over its segments."""
    return (segments / np.linalg.norm(segments, axis=-1, keepdims=True).clip(1e-9)).reshape(len(segments), -1)


def _examples(run: Path, recipe: Recipe, held: HeldOut, generated: Generated) -> list[dict]:
    """Videos with their true and their generated sound, and the log-mels of both, as files below `run`/examples."""
    from data_prep.media import mux

    folder = run / "examples"
    folder.mkdir(exist_ok=True)
    shards = ShardSet.open(recipe.data, split=recipe.heldout_split)
    places = [(shard, row) for shard in range(len(shards.shards)) for row in range(int(shards.counts[shard]))]
    examples = []
    for number in range(min(recipe.evaluation.examples, len(held))):
        key, (shard, row) = held.keys[number], places[number]
        silent = folder / f"{key}.silent.mp4"
        silent.write_bytes(shards.read(shard, row, ["mp4"])["mp4"])
        sounds = {"truth": held.waveform[number].cpu().numpy(), "generated": generated.waveform[number].cpu().numpy()}
        mels = {"truth": held.mel[number].cpu().numpy(), "generated": generated.mel[number]}
        example = {"key": key, "title": shards.entry(shard, row).columns.get("caption") or key}
        for kind in sounds:
            mux(str(silent), sounds[kind], recipe.clip.sample_rate, str(folder / f"{key}.{kind}.mp4"))
            np.save(folder / f"{key}.{kind}.npy", mels[kind].astype(np.float16))
            example |= {f"{kind}_video": f"examples/{key}.{kind}.mp4", f"{kind}_mel": f"examples/{key}.{kind}.npy"}
        silent.unlink()
        examples.append(example)
    return examples


def _environment(device: torch.device, generator: Path) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {"device": name, "python": platform.python_version(), "torch": torch.__version__, "deepspeed": metadata.version("deepspeed"), "generator": str(generator)}


def table(run: Path) -> str:
    """The figures of `evaluation.json` as text."""
    figures = json.loads((run / "evaluation.json").read_text())["figures"]
    width = max(len(figure["name"]) for figure in figures)
    lines = []
    for figure in figures:
        error = "" if figure["standard_error"] is None else f" ± {figure['standard_error']:.4f}"
        lines.append(f"{figure['name']:<{width}}  {figure['value']:8.4f}{error:10}  {figure['note']}")
    return "\n".join(lines)
