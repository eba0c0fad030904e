"""Latents and conditions computed once: feature shards with the keys and numbers of the clip shards."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from data_prep.index import ShardSet, build_index
from data_prep.shards import ShardWriter
from data_prep.stream import one_pass
from models.conditioning import EncoderConditioner
from models.encoders.sf_cavp import SFCAVP, SFCAVPConfig
from models.pretrained import load_weights, save_weights
from pipelines.config import Recipe
from pipelines.encoding import ClipEncoder, file_hash, needs_contrastive, public_weights
from pipelines.engine.checkpoint import weights_hash
from pipelines.engine.saving import write_atomically
from pipelines.engine.signals import leave_alone_if_asked
from pipelines.engine.world import World
from pipelines.stages.data import clips

_TICK = 1.0
"""Seconds between two looks at what the other processes have written."""
KEPT = "the shards that are whole are kept"


class FeaturesError(RuntimeError):
    """Features that do not belong to this run; the message says what to do."""


def extract_features(recipe: Recipe, folder: Path, world: World) -> None:
    """Prepare what training reads in `folder`: the standardised own encoder, and shards where the recipe computes them beforehand."""
    _prepare(recipe, folder, world)
    if recipe.conditioning.precompute:
        _write_shards(recipe, folder, world)


def require_shards(recipe: Recipe, folder: Path, world: World) -> None:
    """Feature shards for what reads them again and again, such as preference rounds, whatever the recipe says of training."""
    _prepare(recipe, folder, world)
    _write_shards(recipe, folder, world)


def _prepare(recipe: Recipe, folder: Path, world: World) -> None:
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        _check_provenance(folder / "provenance.json", _provenance(recipe))
        if recipe.conditioning.uses_own:
            _fit_conditioner(recipe, folder / "conditioner", world.device)
    world.barrier()


def _write_shards(recipe: Recipe, folder: Path, world: World) -> None:
    """Write `folder`/shards: latents, conditions and segment embeddings of every clip.

    Resumable by shard; shard i is written by rank i mod world size. No process holds more than a batch. Collective.
    """
    url, source = folder / "shards", ShardSet.open(recipe.data)
    mine = range(world.rank, len(source.shards), world.size)
    wanted = [number for number in mine if not _written(url, source, number)]
    if wanted:
        encoder = ClipEncoder.of_run(recipe, folder.parent, world.device, reward=needs_contrastive(recipe))
        for number in track(wanted, "features", disable=not world.is_main):
            leave_alone_if_asked(KEPT)
            _write_shard(encoder, source, number, str(url))
    # The others are awaited by their files: a collective would give up on them after minutes.
    while not all(_written(url, source, number) for number in range(len(source.shards))):
        leave_alone_if_asked(KEPT)
        time.sleep(_TICK)
    world.barrier()
    if world.is_main:
        build_index(str(url), json.loads((folder / "provenance.json").read_text()), expected=len(source.shards))
    world.barrier()


def _written(url: Path, source: ShardSet, number: int) -> bool:
    return (url / f"{source.shards[number].name}.parquet").exists()


def _provenance(recipe: Recipe) -> dict:
    """Everything that the features depend on: data, format, and the weights of all encoders."""
    clip, config = recipe.clip, recipe.conditioning
    settings = {"data": ShardSet.open(recipe.data).hash, "seconds": clip.seconds, "size": clip.size, "mel": recipe.autoencoder.mel}
    settings |= {f"conditioning.{slot}": getattr(config, slot) for slot in ("clip", "sync", "text")}
    stages = ("autoencoder", "contrastive") if needs_contrastive(recipe) else ("autoencoder",)
    settings |= {stage: weights_hash(recipe.folder / stage / "export") for stage in stages}
    if config.uses_clip:
        settings["clip_model"] = f"{config.clip_model.architecture}, {config.clip_model.picture_size} pixels"
    return settings | {f"{name}_weights": file_hash(path) for name, path in public_weights(recipe).items()}


def _check_provenance(path: Path, provenance: dict) -> None:
    if not path.exists():
        write_atomically(path, json.dumps(provenance, indent=1))
    known = json.loads(path.read_text())
    changed = [name for name in provenance if known.get(name) != provenance[name]]
    if changed:
        what = ", ".join(changed)
        raise FeaturesError(f"{path.parent} was computed with another {what}: delete that folder, or give the run another name")


def _fit_conditioner(recipe: Recipe, folder: Path, device: torch.device) -> None:
    if (folder / "config.json").exists():
        return
    encoder = load_weights(SFCAVP, SFCAVPConfig, recipe.folder / "contrastive" / "export")
    conditioner = EncoderConditioner(encoder).to(device).eval()
    options = recipe.features
    batches = clips(recipe, recipe.train_split, options.batch_size, options.statistics_clips, want=("frames",))
    conditioner.fit(batch["frames"].to(device).float() / 255 for batch in batches)
    save_weights(conditioner, recipe.contrastive.model, folder)


def _write_shard(encoder: ClipEncoder, source: ShardSet, number: int, url: str) -> None:
    info, bad = source.shards[number], []
    with ShardWriter(url, info.number, split=info.split) as writer:
        for batch in one_pass(source.select([number]), encoder.decoder(), encoder.recipe.features.batch_size, on_bad=bad.append):
            features = encoder(batch)
            for row, key in enumerate(batch["key"]):
                writer.add(key, {f"{name}.npy": npy(values[row]) for name, values in features.items()})
        for clip in bad:
            writer.skip(clip.key, "failed", clip.reason, message=clip.message)
    encoder.forget_captions()


def npy(values: torch.Tensor) -> bytes:
    """A tensor as the bytes of a float16 .npy file."""
    file = io.BytesIO()
    np.save(file, values.cpu().numpy().astype(np.float16))
    return file.getvalue()
