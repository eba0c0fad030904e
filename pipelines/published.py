"""Published generators in a run, and a run's generator and autoencoder for MMAudio's own code."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from models.codecs.autoencoder import MelVAE, MelVAEConfig
from models.generators.mmdit import MMDiT, MMDiTConfig
from models.pretrained import export_mmaudio, export_mmaudio_vae, load_weights, mmaudio_vae_preset, mmaudio_variant, save_weights
from pipelines.config import Recipe
from pipelines.encoding import generator_sizes, needed_stages
from pipelines.engine.checkpoint import EXPORTED, weights_hash
from pipelines.engine.saving import write_atomically
from pipelines.engine.world import World
from pipelines.recipes import load_recipe
from pipelines.sounding import generator_export, require
from pipelines.stages.generative import published_generator


def adopt_generator(recipe: Recipe, world: World) -> None:
    """Take `generative.weights` over as the export of the generative stage, for preference rounds on them. Collective."""
    if world.is_main:
        config = dataclasses.replace(recipe.generative.model, **generator_sizes(recipe))
        export = recipe.folder / "generative" / "export"
        save_weights(published_generator(recipe, config), config, export)
        parents = {f"../{stage}/export": weights_hash(recipe.folder / stage / "export") for stage in needed_stages(recipe, "generative")}
        write_atomically(export / EXPORTED, json.dumps({"stage": "generative", "steps": 0, "parents": parents}, indent=1))
    world.barrier()


def export_public(run: Path, out: Path, stage: str | None = None) -> str:
    """Write a run's generator to `out` under the names of MMAudio's checkpoints; which of its variants it is."""
    model = load_weights(MMDiT, MMDiTConfig, generator_export(run, stage))
    variant = mmaudio_variant(model)
    _write(export_mmaudio(model), out)
    return variant


def export_public_vae(run: Path, out: Path) -> str:
    """Write a run's autoencoder to `out` under the names of MMAudio's checkpoints; which of them it is: "16k" or "44k"."""
    vae = load_weights(MelVAE, MelVAEConfig, require(run / "autoencoder" / "export"))
    mel = load_recipe(require(run / "recipe.yaml")).autoencoder.mel
    preset = mmaudio_vae_preset(vae.config)
    if mel != f"mmaudio_{preset}":
        raise ValueError(f"this autoencoder codes the log-mels {mel}; MMAudio's code would give it those of mmaudio_{preset}")
    _write(export_mmaudio_vae(vae), out)
    return preset


def _write(state: Mapping[str, torch.Tensor], out: Path) -> None:
    """Under its final name once it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
    torch.save(state, temporary)
    temporary.replace(out)
