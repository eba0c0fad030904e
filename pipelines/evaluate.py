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

from data_prep.index import ShardSet
from data_prep.media import mux
from pipelines.config import BarsConfig, Recipe
from pipelines.engine.checkpoint import write_atomically
from pipelines.generate import SoundModel, generator_export
from pipelines.heldout import HeldOut, Sounded, sound_heldout
from pipelines.metrics.retrieval import recall_at_k, right_segment_accuracy
from pipelines.metrics.statistics import Bar, Paired, paired, shuffled_partner
from pipelines.stages.autoencoder import relative_l1
from pipelines.stages.contrastive import clip_embeddings
from pipelines.stages.generative import FlowModel, flow_losses

GALLERY = 64


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured value."""

    name: str
    """What was measured."""
    value: float
    """The measurement, or the mean paired difference."""
    standard_error: float | None = None
    """Of a difference."""
    note: str = ""
    """Control, chance level and number of clips."""


def evaluate(run: Path, device: torch.device, recipe: Recipe | None = None) -> list[Bar]:
    """Measure a finished run, write `evaluation.json` and the examples, and return its bars. `recipe` replaces the run's own."""
    last, base = SoundModel.from_run(run, device), SoundModel.from_run(run, device, stage="generative")
    recipe = recipe or last.recipe
    held = HeldOut.encode(last, recipe)
    partner = shuffled_partner(len(held), recipe.seed)
    before, after = sound_heldout(base, held, partner), sound_heldout(last, held, partner)
    figures, bars = _encoders(recipe, base, held)
    more_figures, more_bars = _generator(recipe.evaluation.bars, base, held, before)
    figures += more_figures + _preference(before, after)
    bars = [bar for bar in bars + more_bars if bar]
    found = {"bars": [dataclasses.asdict(bar) for bar in bars], "figures": [dataclasses.asdict(figure) for figure in figures],
             "examples": _examples(run, recipe, held, after), "environment": _environment(device, run)}
    write_atomically(run / "evaluation.json", json.dumps(found, indent=1))
    return bars


def _encoders(recipe: Recipe, model: SoundModel, held: HeldOut) -> tuple[list[Figure], list[Bar | None]]:
    """Retrieval, right segment, and the autoencoder."""
    limits, gallery = recipe.evaluation.bars, min(GALLERY, len(held))
    video, audio = clip_embeddings(held.video), clip_embeddings(held.audio)
    recalls = [recall_at_k(video, audio, k, gallery, recipe.evaluation.galleries) for k in (1, 5, 10) if k <= gallery]
    where = f"{recipe.evaluation.galleries} galleries of {gallery}, both directions"
    right = right_segment_accuracy(held.video.cpu().numpy(), held.audio.cpu().numpy())
    segments = held.video.shape[1]
    with torch.no_grad():
        decoded = torch.cat([model.vae.decode(part.transpose(1, 2)) for part in held.latent.split(recipe.features.batch_size)])
    ratio = relative_l1(decoded, held.mel)
    figures = [
        *(Figure(name=f"retrieval R@{recall.k}", value=recall.value, note=f"chance {recall.chance:.3f}, {where}") for recall in recalls),
        Figure(name="right segment of a clip", value=float(right.mean()), standard_error=float(right.std(ddof=1) / np.sqrt(len(right))),
               note=f"chance {1 / segments:.3f}, {segments} segments"),
        Figure(name="autoencoder L1, relative", value=ratio, note="1 is the per-band mean"),
    ]
    times_chance = recalls[0].value / recalls[0].chance
    bars = [_bar("retrieval R@1, times chance", times_chance, ">=", limits.retrieval_times_chance, "contrastive stage"),
            _bar("autoencoder L1, relative", ratio, "<=", limits.autoencoder_ratio, "autoencoder stage")]
    return figures, bars


def _generator(limits: BarsConfig, model: SoundModel, held: HeldOut, sounded: Sounded) -> tuple[list[Figure], list[Bar | None]]:
    """Whether the generator listens to the video: flow loss, reward and onsets against shuffled videos."""
    features = {"latent_mean": held.latent, "clip": held.clip, "sync": held.sync}
    right, wrong = (losses.numpy() for losses in flow_losses(FlowModel(model.generator).eval(), features, model.device))
    flow, reward = paired(wrong, right), paired(sounded.reward, sounded.reward_shuffled)
    onsets = paired(sounded.onset_f1, sounded.onset_f1_shuffled)
    figures = [
        Figure(name="flow loss, right video", value=float(right.mean()), note=f"{len(held)} clips"),
        _difference("flow loss, shuffled minus right video", flow),
        _difference("reward, own minus shuffled video", reward),
        _difference("onset F1, own minus shuffled clip", onsets, f"own {sounded.onset_f1.mean():.3f}, within 100 ms"),
    ]
    bars = [_bar("flow loss rise with shuffled videos", flow.difference / float(right.mean()), ">=", limits.flow_gap, "generative stage"),
            _bar("flow loss rise, standard errors", flow.sigmas, ">=", limits.flow_gap_sigmas, "generative stage"),
            _bar("reward of own over shuffled video, standard errors", reward.sigmas, ">=", limits.reward_gap_sigmas, "generated sound")]
    return figures, bars


def _preference(before: Sounded, after: Sounded) -> list[Figure]:
    """What the preference rounds changed, clip by clip, from the same noise."""
    return [_difference("reward, after minus before preference", paired(after.reward, before.reward), f"before {before.reward.mean():.4f}"),
            _difference("onset F1, after minus before preference", paired(after.onset_f1, before.onset_f1),
                        f"before {before.onset_f1.mean():.3f}")]


def _difference(name: str, found: Paired, note: str = "") -> Figure:
    text = "; ".join(part for part in (f"{found.sigmas:.1f} standard errors, {found.n} clips", note) if part)
    return Figure(name=name, value=found.difference, standard_error=found.standard_error, note=text)


def _bar(name: str, value: float, comparison: str, bound: float | None, explanation: str) -> Bar | None:
    return None if bound is None else Bar(name=name, value=value, comparison=comparison, bound=bound, explanation=explanation)


def _examples(run: Path, recipe: Recipe, held: HeldOut, sounded: Sounded) -> list[dict]:
    """Videos with their true and their generated sound, and the log-mels of both, as files below `run`/examples."""
    (run / "examples").mkdir(exist_ok=True)
    shards = ShardSet.open(recipe.data, split=recipe.heldout_split)
    examples = []
    for number in range(min(recipe.evaluation.examples, len(held))):
        shard, row = held.places[number].tolist()
        picture = shards.read(shard, row, ["mp4"])["mp4"]
        title = shards.entry(shard, row).columns.get("caption") or held.keys[number]
        example = {"key": held.keys[number], "title": title}
        for kind, waveform, mel in (("truth", held.waveform, held.mel), ("generated", sounded.waveform, sounded.mel)):
            stem = f"examples/{held.keys[number]}.{kind}"
            mux(picture, waveform[number].cpu().numpy(), recipe.clip.sample_rate, run / f"{stem}.mp4")
            np.save(run / f"{stem}.npy", np.asarray(mel[number], np.float16))
            example |= {f"{kind}_video": f"{stem}.mp4", f"{kind}_mel": f"{stem}.npy"}
        examples.append(example)
    return examples


def _environment(device: torch.device, run: Path) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    versions = {package: metadata.version(package) for package in ("torch", "deepspeed")}
    generator = str(generator_export(run).parent.relative_to(run))
    return {"device": name, "python": platform.python_version(), **versions, "generator": generator}


def table(run: Path) -> str:
    """The figures of `evaluation.json` as text."""
    figures = json.loads((run / "evaluation.json").read_text())["figures"]
    width = max(len(figure["name"]) for figure in figures)
    lines = []
    for figure in figures:
        error = "" if figure["standard_error"] is None else f" ± {figure['standard_error']:.4f}"
        lines.append(f"{figure['name']:<{width}}  {figure['value']:8.4f}{error:10}  {figure['note']}")
    return "\n".join(lines)
