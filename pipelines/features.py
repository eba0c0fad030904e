"""Latents and conditions computed once: feature shards with the keys and numbers of the clip shards."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.index import ShardSet
from data_prep.shards import ShardWriter
from data_prep.stream import Batch
from models.conditioning import EncoderConditioner, ends_within_segment
from models.encoders.sf_cavp import SFCAVP, SFCAVPConfig
from models.pretrained import load_weights, save_weights
from pipelines.config import Recipe
from pipelines.encoding import ClipEncoder, file_hash, needs_contrastive, public_weights
from pipelines.engine.checkpoint import weights_hash
from pipelines.engine.saving import write_atomically
from pipelines.engine.watchdog import beat
from pipelines.engine.world import World
from pipelines.provenance import FILE, ProvenanceError, claim, known_provenance
from pipelines.sharing import Work, make_shards
from pipelines.stages.data import clips


def extract_features(recipe: Recipe, folder: Path, world: World) -> None:
    """Prepare what training reads in `folder`: the standardised own encoder, and shards where the recipe computes them beforehand."""
    _prepare(recipe, folder, world)
    if recipe.conditioning.precompute:
        _write_shards(recipe, folder, world)


def require_shards(recipe: Recipe, folder: Path, world: World) -> None:
    """Feature shards for preference rounds, which read them again and again; of their clips alone where training makes its own."""
    _prepare(recipe, folder, world)
    _write_shards(recipe, folder, world)


def training_videos(recipe: Recipe) -> ShardSet:
    """The clip shards that preference rounds train on: the first that hold `preference.videos` clips, so possibly a few more."""
    shards = ShardSet.open(recipe.data, split=recipe.train_split)
    return _first(shards, recipe.preference.videos or len(shards))


def _first(shards: ShardSet, clips: int) -> ShardSet:
    """The first shards that hold `clips` clips; all where there are fewer."""
    ends = shards.counts.cumsum()
    return shards.select(range(min(len(ends), int(ends.searchsorted(clips)) + 1)))


def _wanted(recipe: Recipe) -> ShardSet:
    """The clip shards whose features are stored: all, or those that preference rounds train on and measure their held-out loss on."""
    shards = ShardSet.open(recipe.data)
    if recipe.conditioning.precompute:
        return shards
    heldout = _first(ShardSet.open(recipe.data, split=recipe.heldout_split), recipe.preference.train.validation_clips)
    parts = (training_videos(recipe), heldout)
    return shards.select(sorted({place for part in parts for place in part.shards.places_in(shards.shards).to_pylist()}))


def _prepare(recipe: Recipe, folder: Path, world: World) -> None:
    _check_judged(recipe, folder)
    if world.is_main:
        _take_in_new_shards(recipe, folder)
    claim(folder, partial(_provenance, recipe), world, "delete that folder, or give the run another name")
    if world.is_main and recipe.conditioning.uses_own:
        _fit_conditioner(recipe, folder / "conditioner", world.device)
    world.barrier()


def _check_judged(recipe: Recipe, folder: Path) -> None:
    """ProvenanceError where features of a run without rounds lack what the rounds compare."""
    known = known_provenance(folder)
    if known and needs_contrastive(recipe) and "contrastive" not in known:
        raise ProvenanceError(f"{folder} was made when preference.rounds was 0, without the segment embeddings that rounds score by: "
                              "delete that folder and run again; latents and conditions come out as before, no stage is trained again")


def _take_in_new_shards(recipe: Recipe, folder: Path) -> None:
    """Let the features be those of more clips, where shards have only been added to those that they were made from."""
    known, shards = known_provenance(folder), ShardSet.open(recipe.data)
    count = known.get("shards", len(shards.shards))
    if count < len(shards.shards) and shards.select(range(count)).hash == known["data"]:
        write_atomically(folder / FILE, json.dumps(known | _data(shards), indent=1))


def _data(shards: ShardSet) -> dict[str, Any]:
    return {"data": shards.hash, "shards": len(shards.shards)}


def _write_shards(recipe: Recipe, folder: Path, world: World) -> None:
    """Write `folder`/shards: latents, conditions and segment embeddings. No process holds more than a batch. Collective."""
    source = _wanted(recipe)
    start = partial(_work, recipe, folder.parent, world.device)
    make_shards(source, folder / "shards", world, "features", known_provenance(folder), start)


def _provenance(recipe: Recipe) -> dict[str, Any]:
    """Everything that the features depend on: data, format, and the weights of all encoders."""
    clip, config = recipe.clip, recipe.conditioning
    settings = _data(ShardSet.open(recipe.data)) | {"seconds": clip.seconds, "size": clip.size, "mel": recipe.autoencoder.mel}
    settings |= {f"conditioning.{slot}": getattr(config, slot) for slot in ("clip", "sync", "text")}
    stages = ("autoencoder", "contrastive") if needs_contrastive(recipe) else ("autoencoder",)
    settings |= {stage: weights_hash(recipe.folder / stage / "export") for stage in stages}
    if config.uses_own and ends_within_segment(clip.seconds, recipe.contrastive.model):
        # Features from before lay what was seen in the whole segments over all of the clip, and so too late.
        settings["timing of own tokens"] = "over the whole clip"
    if config.uses_clip:
        settings["clip_model"] = f"{config.clip_model.architecture}, {config.clip_model.picture_size} pixels"
    return settings | {f"{name}_weights": file_hash(path) for name, path in public_weights(recipe).items()}


def _fit_conditioner(recipe: Recipe, folder: Path, device: torch.device) -> None:
    if (folder / "config.json").exists():
        return
    encoder = load_weights(SFCAVP, SFCAVPConfig, recipe.folder / "contrastive" / "export")
    conditioner = EncoderConditioner(encoder).to(device).eval()
    beat("features, statistics of the conditions")
    batches = clips(recipe, recipe.train_split, recipe.features.statistics_clips, want=("frames",))
    conditioner.fit(batch["frames"].to(device).float() / 255 for batch in batches)
    save_weights(conditioner, recipe.contrastive.model, folder)


def _work(recipe: Recipe, run: Path, device: torch.device) -> Work:
    encoder, options = ClipEncoder.of_run(recipe, run, device, reward=needs_contrastive(recipe)), recipe.features

    def write(writer: ShardWriter, batches: Iterator[Batch]) -> None:
        for batch in batches:
            features = encoder(batch)
            for row, key in enumerate(batch["key"]):
                writer.add(key, {f"{name}.npy": npy(values[row]) for name, values in features.items()})
        encoder.forget_captions()

    return Work(encoder.decoder(), options.batch_size, write, **options.decoding)


def npy(values: torch.Tensor) -> bytes:
    """A tensor as the bytes of a float16 .npy file."""
    file = io.BytesIO()
    np.save(file, values.cpu().numpy().astype(np.float16))
    return file.getvalue()
