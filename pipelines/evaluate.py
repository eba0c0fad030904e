"""What a run is worth, in figures on held-out clips, each with its control and its error."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.index import ShardSet
from data_prep.media import mux
from models.objectives.flow_dpo import segment_score
from pipelines.config import BarsConfig, Recipe
from pipelines.controls import Controls
from pipelines.engine.saving import write_atomically
from pipelines.heldout import SHIFT, HeldOut, Shares, Sounded, sound_heldout
from pipelines.metrics.figures import Figure, difference, share
from pipelines.metrics.retrieval import recall_at_k, right_segment_accuracy
from pipelines.metrics.statistics import Bar, paired, shuffled_partner
from pipelines.signs import BEST
from pipelines.sounding import SoundModel, generator_export
from pipelines.stages.autoencoder import relative_l1
from pipelines.stages.contrastive import clip_embeddings
from pipelines.stages.generative import FlowModel, flow_losses

GALLERY = 64
ENCODER, GENERATOR = "contrastive stage", "generative stage"
"""Where to look when a bar is missed."""


def evaluate(run: Path, device: torch.device, recipe: Recipe | None = None) -> list[Bar]:
    """Measure a finished run, write `evaluation.json` and the examples, and return its bars. `recipe` replaces the run's own.

    Measured are clips that chose no preference round. Bars and controls are about the stage `generative`, the figures named "after minus
    before preference" and the examples about the round that was kept.
    """
    last, base = SoundModel.from_run(run, device), SoundModel.from_run(run, device, stage="generative", sees=False)
    recipe, shares = recipe or last.recipe, _shares(run, recipe or last.recipe)
    recipe = dataclasses.replace(recipe, evaluation=dataclasses.replace(recipe.evaluation, clips=len(shares.evaluation)))
    held = HeldOut.encode(last, recipe, shares.evaluation)
    partner = shuffled_partner(len(held), recipe.seed)
    kept, start = generator_export(run), run / "generative" / "export"
    aligned = kept != start
    after = _sounded(last, recipe, held, partner, kept)
    before = _sounded(base, recipe, held, partner, start) if aligned else after
    parts = [_retrieval(recipe, held), _timing(recipe, last, held)] if held.judged else []
    right, wrong = _flow_losses(recipe, base, held), _flow_losses(recipe, base, held, partner)
    parts += [_autoencoder(recipe, base, held), _flow(recipe, right, wrong), _sounds(recipe.evaluation.bars, before)]
    figures = [figure for part, _ in parts for figure in part]
    if aligned:
        figures += _preference(before, after, right, _flow_losses(recipe, last, held))
    figures += Controls(last, base, recipe, held).figures(before, partner) if recipe.evaluation.controls else []
    bars = [bar for _, part in parts for bar in part if bar]
    found = {"bars": [dataclasses.asdict(bar) for bar in bars], "figures": [dataclasses.asdict(figure) for figure in figures],
             "examples": _examples(run, recipe, held, after), "environment": _environment(device) | _measured(run, shares, held, last)}
    write_atomically(run / "evaluation.json", json.dumps(found, indent=1))
    return bars


def _shares(run: Path, recipe: Recipe) -> Shares:
    """As the recipe has them, but for what chose a round when it was another."""
    shares, watched = Shares.of(recipe), _best(run).get("watched")
    return shares.sparing(range(*watched)) if watched else shares


def _best(run: Path) -> dict[str, Any]:
    """What best.json says; empty where no round was chosen."""
    path = run / "preference" / BEST
    return json.loads(path.read_text()) if path.exists() else {}


def _sounded(model: SoundModel, recipe: Recipe, held: HeldOut, partner: np.ndarray, export: Path) -> Sounded:
    """The held-out videos with their generated sounds; ValueError where some are not finite, so that no figure hides it."""
    sounded = sound_heldout(model, recipe, held, partner)
    if broken := int(np.isnan(sounded.onset_f1).sum()):
        raise ValueError(f"{export}: {broken} of {len(held)} sounds that it generates are not finite: train it on or anew, or, of a "
                         "preference round, choose what is kept by another preference.watch.keep than last")
    return sounded


def _measured(run: Path, shares: Shares, held: HeldOut, model: SoundModel) -> dict[str, str]:
    """Which generator the figures are about, why it and no other round's, what made its sounds audible, and on which clips."""
    found = {"generator": str(generator_export(run).parent.relative_to(run)), "vocoder": model.vocoder.name}
    if best := _best(run):
        found["preference rounds"] = "; ".join([best["reason"], *best["warnings"]])
    others = f"; the last {len(shares.watch)} chose the round" if shares.watch else ""
    return found | {"clips": f"{len(held)} of the first {len(shares.evaluation)} of {shares.there} held-out clips{others}"}


def _autoencoder(recipe: Recipe, model: SoundModel, held: HeldOut) -> tuple[list[Figure], list[Bar | None]]:
    """How near the decoded log-mels come."""
    latents = held.features["latent_mean"].split(recipe.features.batch_size)
    ratio = relative_l1(torch.cat([model.mel(part) for part in latents]), held.mel)
    return ([Figure(name="autoencoder L1, relative", value=ratio, note="1 is the per-band mean")],
            [_bar("autoencoder L1, relative", ratio, "<=", recipe.evaluation.bars.autoencoder_ratio, "autoencoder stage")])


def _retrieval(recipe: Recipe, held: HeldOut) -> tuple[list[Figure], list[Bar | None]]:
    """Whether the encoder finds a clip's sound among those of others."""
    gallery, galleries = min(GALLERY, len(held)), recipe.evaluation.galleries
    video, audio = clip_embeddings(held.judged["video"]), clip_embeddings(held.judged["audio"])
    recalls = [recall_at_k(video, audio, k, gallery, galleries) for k in (1, 5, 10) if k <= gallery]
    where = f"{galleries} galleries of {gallery}, both directions"
    figures = [Figure(name=f"retrieval R@{found.k}", value=found.value, note=f"chance {found.chance:.3f}, {where}") for found in recalls]
    times_chance = recalls[0].value / recalls[0].chance
    return figures, [_bar("retrieval R@1, times chance", times_chance, ">=", recipe.evaluation.bars.retrieval_times_chance, ENCODER)]


def _timing(recipe: Recipe, model: SoundModel, held: HeldOut) -> tuple[list[Figure], list[Bar | None]]:
    """Whether the encoder hears when, not only what: a clip's own segments, and its sound out of time."""
    limits, score, (video, audio) = recipe.evaluation.bars, recipe.preference.score, (held.judged[name] for name in ("video", "audio"))
    segments = video.shape[1]
    if segments < 2:
        return [], []
    right = right_segment_accuracy(video.cpu().numpy(), audio.cpu().numpy())
    left = held.judged["shifted"].shape[1]
    cosines = (model.reward.similarity(video[:, :left], sound) for sound in (audio[:, :left], held.judged["shifted"]))
    true, shifted = (segment_score(cosine, score) for cosine in cosines)
    prefers, name = (true > shifted).float().cpu().numpy(), f"true sound over itself {SHIFT:g} s out of time"
    figures = [share("right segment of a clip", right, f"chance {1 / segments:.3f}, {segments} segments"),
               share(name, prefers, f"chance 0.5, {score} of {left} segments")]
    times_chance = float(right.mean()) * segments
    bars = [_bar("right segment, times chance", times_chance, ">=", limits.right_segment_times_chance, ENCODER),
            _bar(name, float(prefers.mean()), ">=", limits.shift_preference, ENCODER)]
    return figures, bars


def _flow_losses(recipe: Recipe, model: SoundModel, held: HeldOut, partner: np.ndarray | None = None) -> np.ndarray:
    """Flow loss of each clip, with its own video or with that of its partner."""
    videos = None if partner is None else torch.as_tensor(partner)
    return flow_losses(FlowModel(model.generator).eval(), held.features, model.device, recipe.features.batch_size,
                       positions=held.positions, videos=videos).numpy()


def _flow(recipe: Recipe, right: np.ndarray, wrong: np.ndarray) -> tuple[list[Figure], list[Bar | None]]:
    """Whether the generator looks at the video at all."""
    limits, gap = recipe.evaluation.bars, paired(wrong, right)
    figures = [Figure(name="flow loss, right video", value=float(right.mean()), note=f"{len(right)} clips"),
               difference("flow loss, shuffled minus right video", gap)]
    bars = [_bar("flow loss below that of shuffled videos", gap.difference / float(wrong.mean()), ">=", limits.flow_gap, GENERATOR),
            _bar("flow loss below that of shuffled videos, standard errors", gap.sigmas, ">=", limits.flow_gap_sigmas, GENERATOR)]
    return figures, bars


def _sounds(limits: BarsConfig, sounded: Sounded) -> tuple[list[Figure], list[Bar | None]]:
    """Whether the sounds fit their videos better than others'."""
    onsets, own = paired(sounded.onset_f1, sounded.onset_f1_shuffled), f"own {sounded.onset_f1.mean():.3f}, within 100 ms"
    figures = [difference("onset F1, own minus shuffled clip", onsets, own)]
    bars = [_bar("onset F1 above shuffled clips", onsets.difference, ">=", limits.onset_gap, GENERATOR),
            _bar("onset F1 above shuffled clips, standard errors", onsets.sigmas, ">=", limits.onset_gap_sigmas, GENERATOR)]
    if sounded.reward is not None:
        reward = paired(sounded.reward, sounded.reward_shuffled)
        figures.insert(0, difference("reward, own minus shuffled video", reward))
        bars.insert(0, _bar("reward of own over shuffled video, standard errors", reward.sigmas, ">=", limits.reward_gap_sigmas, GENERATOR))
    return figures, bars


def _preference(before: Sounded, after: Sounded, loss_before: np.ndarray, loss_after: np.ndarray) -> list[Figure]:
    """What the preference rounds changed, clip by clip, from the same noise."""
    changes = {} if before.reward is None else {"reward": (after.reward, before.reward)}
    changes |= {"onset F1": (after.onset_f1, before.onset_f1), "flow loss": (loss_after, loss_before)}
    return [difference(f"{name}, after minus before preference", paired(*pair), f"before {pair[1].mean():.4f}")
            for name, pair in changes.items()]  # fmt: skip


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


def _environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    versions = {package: metadata.version(package) for package in ("torch", "deepspeed")}
    return {"device": name, "python": platform.python_version(), **versions}


def table(run: Path) -> str:
    """The figures of `evaluation.json` as text, after what they are about."""
    found = json.loads((run / "evaluation.json").read_text())
    figures, about = found["figures"], found["environment"]
    width = max(len(figure["name"]) for figure in figures)
    lines = [f"{name}: {about[name]}" for name in ("generator", "vocoder", "preference rounds", "clips") if name in about]
    for figure in figures:
        error = "" if figure["standard_error"] is None else f" ± {figure['standard_error']:.4f}"
        lines.append(f"{figure['name']:<{width}}  {figure['value']:8.4f}{error:10}  {figure['note']}")
    return "\n".join(lines)
