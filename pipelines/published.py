"""Published generators in a run, and a run's generators for MMAudio's own code."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import torch

from models.generators.mmdit import MMDiT, MMDiTConfig
from models.pretrained import export_mmaudio, load_weights, mmaudio_variant, save_weights
from pipelines.config import Recipe
from pipelines.encoding import generator_sizes, needed_stages
from pipelines.engine.checkpoint import EXPORTED, weights_hash
from pipelines.engine.saving import write_atomically
from pipelines.engine.world import World
from pipelines.sounding import generator_export
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
    variant, state = mmaudio_variant(model), export_mmaudio(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
    torch.save(state, temporary)
    temporary.replace(out)
    return variant
