"""The chain of stages: skips what is complete, resumes what is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from pathlib import Path

import torch

from data_prep.index import ShardSet
from models.checkpoints import read_checkpoint
from models.codecs.autoencoder import PRESETS as VAE_PRESETS
from models.pretrained import load_mmaudio_vae, save_weights
from pipelines.config import Recipe
from pipelines.encoding import needed_stages, needs_contrastive
from pipelines.engine.checkpoint import EXPORTED
from pipelines.engine.saving import write_atomically
from pipelines.engine.signals import Stopped, leave_if_asked, stop_on_signals
from pipelines.engine.world import World, join_world
from pipelines.features import extract_features
from pipelines.folders import StageFolders
from pipelines.heldout import Shares
from pipelines.published import adopt_generator
from pipelines.recipes import RecipeError, dump_recipe, load_recipe, to_tree
from pipelines.rewards import load_scorer
from pipelines.rounds import Rounds
from pipelines.stages.autoencoder import AutoencoderStage
from pipelines.stages.contrastive import ContrastiveStage
from pipelines.stages.generative import GenerativeStage

HASHES = "data.json"
"""In a run's folder: the hash of each split that it was last started with."""
STAGES = ("autoencoder", "contrastive", "generative", "preference")


@dataclass
class Chain:
    """One run's chain in its folder."""

    recipe: Recipe
    world: World
    say: InitVar[Callable[[str], None]] = print
    folders: StageFolders = field(init=False)

    def __post_init__(self, say: Callable[[str], None]):
        self.folders = StageFolders(self.recipe, self.world, say)

    def run(self, stages: tuple[str, ...] = STAGES) -> None:
        """Run the named stages in order; a complete one is skipped, an interrupted one goes on from its last checkpoint."""
        if self.recipe.threads:
            torch.set_num_threads(self.recipe.threads)
        if "preference" in stages and self.recipe.preference.rounds and self.recipe.preference.reward:
            load_scorer(self.recipe, torch.device("cpu"))  # a wrong one is told now, and not days later when the rounds begin
        self._prepare_folder()
        if "preference" in stages and (complaint := Shares.of(self.recipe).complaint(self.recipe)):
            self.tell(complaint)
        for name in stages:
            getattr(self, f"_{name}")()
            leave_if_asked(self.world, f"{name} is complete")

    @property
    def _features(self) -> str:
        return str(self.recipe.folder / "features" / "shards")

    def _autoencoder(self) -> None:
        if self.recipe.autoencoder.weights:
            with self.folders.watched("autoencoder", self.recipe.autoencoder.train):
                self.folders.once("autoencoder", self._adopt_autoencoder)
        else:
            self.folders.fit("autoencoder", lambda: AutoencoderStage(self.recipe))

    def _contrastive(self) -> None:
        if needs_contrastive(self.recipe):
            self.folders.fit("contrastive", lambda: ContrastiveStage(self.recipe))
        else:
            self.tell("contrastive: nothing reads it, left out")

    def _generative(self) -> None:
        self.folders.require(*needed_stages(self.recipe, "generative"))
        with self.folders.watched("features", self.recipe.generative.train):
            extract_features(self.recipe, self.recipe.folder / "features", self.world)
            leave_if_asked(self.world, "the features are complete")
        if self.recipe.generative.fine_tune:
            self.folders.fit("generative", lambda: GenerativeStage(self.recipe, self._features))
        else:
            with self.folders.watched("generative", self.recipe.generative.train):
                self.folders.once("generative", lambda: adopt_generator(self.recipe, self.world))

    def _preference(self) -> None:
        if not self.recipe.preference.rounds:
            self.tell("preference: no rounds, left out")
            return
        self.folders.require(*needed_stages(self.recipe, "preference"))
        with self.folders.watched("preference", self.recipe.preference.train):
            Rounds(self.folders, self._features).run()

    def _adopt_autoencoder(self) -> None:
        config = self.recipe.autoencoder
        preset = next((name for name in ("16k", "44k") if VAE_PRESETS[name] == config.model), None)
        if preset is None:
            raise RecipeError("autoencoder.weights: published weights fit the presets 16k and 44k only; set autoencoder.model to one")
        if self.world.is_main:
            export = self.recipe.folder / "autoencoder" / "export"
            export.mkdir(parents=True, exist_ok=True)
            save_weights(load_mmaudio_vae(read_checkpoint(config.weights), preset), config.model, export)
            write_atomically(export / EXPORTED, "{}")
        self.world.barrier()

    def _prepare_folder(self) -> None:
        """Keep the resolved recipe in the run's folder; another recipe under the same name is refused. Run and shards may be moved."""
        splits = {name: ShardSet.open(self.recipe.data, split=name) for name in (self.recipe.train_split, self.recipe.heldout_split)}
        for name, shards in splits.items():
            if len(shards) < 2:
                raise RecipeError(f"{self.recipe.data}: split {name!r} has fewer than two clips; prepare more, or choose another split")
        path = self.recipe.folder / "recipe.yaml"
        if self.world.is_main:
            hashes = {name: shards.hash for name, shards in splits.items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and (changed := self._changed_since(path, hashes)):
                what = ", ".join(changed)
                raise RecipeError(f"{path.parent} was started with other values of {what}: restore them, or give name=another")
            write_atomically(path, dump_recipe(self.recipe))
            write_atomically(path.with_name(HASHES), json.dumps(hashes))
        self.world.barrier()

    def _changed_since(self, path: Path, hashes: dict[str, str]) -> list[str]:
        changed, kept = changed_keys(load_recipe(path), self.recipe), path.with_name(HASHES)
        moved = kept.exists() and json.loads(kept.read_text()) == hashes
        return [key for key in changed if not (moved and key == "data")]

    def tell(self, line: str) -> None:
        """Say it once, from the main process."""
        self.folders.tell(line)


def changed_keys(before: Recipe, after: Recipe) -> list[str]:
    """Dotted keys in which two recipes differ, where that changes what is learned; what is measured may change freely."""
    differences = _differences(to_tree(before), to_tree(after))
    return [key for key in differences if key != "out" and not key.startswith(MEASURING) and not key.endswith(FREE)]


FREE = (
    "threads", "stream.workers", "stream.cache_gb", "stream.disk_cache", "stream.disk_cache_gb", "stream.clip_timeout",
    "stream.max_bad_share", "stream.allow_data_change", "checkpoint_every", "keep_checkpoints", "keep_every", "asynchronous_checkpoints",
    "checkpoint_mirror", "log_every", "validate_every", "hang_seconds", "profile", "peak_tflops", "zero.stage",
    "zero.offload_optimiser", "zero.offload_parameters", "zero.nvme_path", "zero.persistence_threshold",
    "guards.max_rollbacks", "generative.train.accumulation", "preference.rounds", "preference.batch_videos",
    "features.workers", "features.clip_timeout",
)  # fmt: skip
"""Ends of the keys that change how a run goes, not what it learns."""
MEASURING = ("evaluation", "preference.watch.")
"""Beginnings of those that change what is measured."""


def _differences(before, after, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = before.keys() | after.keys()
        return [d for key in sorted(keys) for d in _differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)]
    return [] if before == after else [path]


def run_chain(recipe: Recipe, stages: tuple[str, ...] = STAGES, say: Callable[[str], None] = print) -> Path:
    """Join the processes of this run and take the chain through `stages`; the run's folder. Stopped where a signal asked for it."""
    if not recipe.data:
        raise RecipeError("data: name the shards to train on, for example data=shards (made by `foleyscale prep shards`)")
    with stop_on_signals():
        chain = Chain(recipe, join_world(), say)
        try:
            chain.run(stages)
        except Stopped as stopped:
            chain.tell(str(stopped))
            raise
    return recipe.folder


