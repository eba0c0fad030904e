"""Latents and conditions computed once: feature shards with the keys and numbers of the clip shards."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from data_prep.audio import log_mel
from data_prep.index import ShardSet, build_index
from data_prep.shards import ShardWriter
from data_prep.stream import one_pass
from models.codecs.autoencoder import MelVAE, MelVAEConfig
from models.conditioning import EncoderConditioner
from models.encoders.sf_cavp import SFCAVP, SFCAVPConfig
from models.pretrained import load_weights, save_weights
from pipelines.config import Recipe
from pipelines.engine.checkpoint import weights_hash, write_atomically
from pipelines.engine.world import World
from pipelines.stages.data import clip_decoder, clips


class FeaturesError(RuntimeError):
    """Features that do not belong to this run; the message says what to do."""


def extract_features(recipe: Recipe, folder: Path, world: World) -> None:
    """Write `folder`/conditioner and `folder`/shards: latents, conditions and segment embeddings of every clip.

    Resumable by shard; shard i is written by rank i mod world size. Collective.
    """
    provenance = _provenance(recipe)
    shards_url = folder / "shards"
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        _check_provenance(folder / "provenance.json", provenance)
        _fit_conditioner(recipe, folder / "conditioner", world.device)
    world.barrier()
    vae = load_weights(MelVAE, MelVAEConfig, recipe.folder / "autoencoder" / "export").to(world.device).eval()
    conditioner = load_conditioner(folder / "conditioner").to(world.device).eval()
    source = ShardSet.open(recipe.data)
    mine = range(world.rank, len(source.shards), world.size)
    wanted = [n for n in mine if not (shards_url / f"{source.shards[n].name}.parquet").exists()]
    for shard in track(wanted, "features", disable=not world.is_main or not wanted):
        _write_shard(recipe, source, shard, str(shards_url), vae, conditioner, world.device)
    world.barrier()
    if world.is_main:
        build_index(str(shards_url), provenance, expected=len(source.shards))
    world.barrier()


def load_conditioner(folder: Path) -> EncoderConditioner:
    """The conditioner of a run."""
    return load_weights(lambda config: EncoderConditioner(SFCAVP(config)), SFCAVPConfig, folder)


def _provenance(recipe: Recipe) -> dict:
    clip, stages = recipe.clip, ("autoencoder", "contrastive")
    settings = {"data": ShardSet.open(recipe.data).hash, "seconds": clip.seconds, "size": clip.size, "mel": recipe.autoencoder.mel}
    return settings | {stage: weights_hash(recipe.folder / stage / "export") for stage in stages}


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


@torch.no_grad()
def _write_shard(recipe: Recipe, source: ShardSet, shard: int, url: str, vae: MelVAE, conditioner: EncoderConditioner, device) -> None:
    decode = clip_decoder(recipe, recipe.clip.seconds, random_crop=False)
    info, bad = source.shards[shard], []
    with ShardWriter(url, info.number, split=info.split) as writer:
        for batch in one_pass(source.select([shard]), decode, recipe.features.batch_size, on_bad=bad.append):
            features = _encode(recipe, batch, vae, conditioner, device)
            for row, key in enumerate(batch["key"]):
                writer.add(key, {f"{name}.npy": npy(values[row]) for name, values in features.items()})
        for clip in bad:
            writer.skip(clip.key, "failed", clip.reason, message=clip.message)


def _encode(recipe: Recipe, batch: dict, vae: MelVAE, conditioner: EncoderConditioner, device) -> dict[str, torch.Tensor]:
    mean, std = vae.encode(log_mel(batch["waveform"].to(device), recipe.autoencoder.mel))
    conditions, segments = conditioner(batch["frames"].to(device).float() / 255)
    return {"latent_mean": mean.transpose(1, 2), "latent_std": std.transpose(1, 2), "clip": conditions.clip, "sync": conditions.sync,
            "segments": segments}


def npy(values: torch.Tensor) -> bytes:
    """A tensor as the bytes of a float16 .npy file."""
    file = io.BytesIO()
    np.save(file, values.cpu().numpy().astype(np.float16))
    return file.getvalue()


