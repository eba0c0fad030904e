"""Variants of the preference rounds over one run, one after the other: the ablations of a paper, with figures of their results."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from operator import attrgetter
from pathlib import Path

import yaml

from pipelines.config import PreferenceConfig, Recipe, merge
from pipelines.config.sweep import SweepConfig
from pipelines.encoding import needed_stages
from pipelines.engine.checkpoint import EXPORTED, weights_hash
from pipelines.engine.saving import write_atomically
from pipelines.engine.signals import Stopped, stop_on_signals
from pipelines.engine.world import World, join_world
from pipelines.recipes import RecipeError, change, dump_recipe, load_recipe, parse_recipe, to_tree
from pipelines.run import Chain, changed_keys
from pipelines.sweep_results import write_results

LINKED = ("autoencoder", "contrastive", "features", "generative")
"""Folders of the run that its variants use as their own."""
SHARED = {
    "round-1/candidates": ("seed", *(f"preference.{key}" for key in ("candidates", "videos", "batch_videos", "score", "reward", "winner"))),
    "distorted": ("seed", "preference.videos", "preference.distortion"),
    "reward": ("preference.videos", "preference.reward"),
    "start": ("seed", "preference.score", "preference.reward", "preference.watch.clips"),
}
"""Folders below `preference` that do not depend on what a variant has trained, and the keys that they do depend on, beside the weights of
the run: variants in which these are equal share one. The first round's candidates are the dearest of them."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    variant: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.recipe.name


def load_sweep(source: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep file, or one that ships with the package by name, and lay `key=value` overrides over it.

    Raises RecipeError with one line that names the file, the key and the remedy.
    """
    path = _find(source)
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a sweep is a mapping of keys to values")
    try:
        # JSON is YAML: what the file says is laid over the defaults as the command line's changes are.
        config = change(SweepConfig(), [*(f"{key}={json.dumps(value, default=str)}" for key, value in tree.items()), *overrides])
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    if not config.variants:
        raise RecipeError(f"{path}: variants: name at least one, such as base: {{}}")
    return config


def run_sweep(run: Path, config: SweepConfig, only: Sequence[str] = (), say: Callable[[str], None] = print) -> Path:
    """Run every variant with every seed, or those of the variants in `only`, over the finished run `run`; the folder of the sweep.

    What is complete is skipped, what was interrupted goes on. After each run sweep.csv and sweep.html are written anew. Stopped where
    a signal asked for it. RecipeError before anything runs: a variant's recipe is wrong, or differs from that which it was begun with.
    """
    found = members(run, config)
    if unknown := [name for name in only if name not in config.variants]:
        raise RecipeError(f"--only {unknown[0]}: no such variant; choose from {', '.join(config.variants)}")
    with stop_on_signals():
        world = join_world()
        for member in found:
            if not only or member.variant in only:
                _run(run, member, world, say)
                if world.is_main:
                    write_results(run / "sweep", config, {(m.variant, m.seed): m.recipe.folder for m in found})
    return run / "sweep"


def members(run: Path, config: SweepConfig) -> list[Member]:
    """The runs of a sweep, seed by seed, each with its checked recipe."""
    if not (run / "recipe.yaml").exists():
        raise RecipeError(f"{run}: no recipe.yaml, so no run was started there; give the folder of a run, such as runs/mine")
    if not (run / "generative" / "export" / EXPORTED).exists():
        raise RecipeError(f"{run}: stage generative is not complete; run it with `foleyscale train generative` first")
    base = load_recipe(run / "recipe.yaml")
    found = [Member(variant, seed, _recipe(base, run, config, variant, seed)) for seed in config.seeds for variant in config.variants]
    for member in found:
        if "contrastive" in needed_stages(member.recipe, "preference") and not (run / "contrastive" / "export" / EXPORTED).exists():
            raise RecipeError(f"{run}: the rounds of variant {member.variant} need a contrastive encoder, which this run has not trained: "
                              "run `foleyscale train contrastive` with its recipe and preference.rounds=1, and delete its features folder")
        _check_unchanged(member)
    return found


def _recipe(base: Recipe, run: Path, config: SweepConfig, variant: str, seed: int) -> Recipe:
    tree, name = to_tree(base), f"{variant}-{seed}"
    preference = merge(tree["preference"], {"rounds": config.rounds})
    for changes in (config.preference, config.variants[variant]):
        preference = merge(preference, changes)
    recipe = parse_recipe(tree | {"out": str(run / "sweep"), "name": name, "seed": seed, "preference": preference}, f"variant {variant}")
    if mirror := recipe.preference.train.checkpoint_mirror:
        # In one folder the runs would take up each other's checkpoints.
        recipe.preference.train.checkpoint_mirror = f"{mirror.rstrip('/')}/sweep/{name}"
    return recipe


def _check_unchanged(member: Member) -> None:
    path = member.recipe.folder / "recipe.yaml"
    if path.exists() and (changed := changed_keys(load_recipe(path), member.recipe)):
        raise RecipeError(f"variant {member.variant}: {path.parent} was begun with other values of {', '.join(changed)}: restore them, "
                          "or give the variant another name")


def _run(run: Path, member: Member, world: World, say: Callable[[str], None]) -> None:
    if world.is_main:
        _prepare(run, member)
    world.barrier()
    chain = Chain(member.recipe, world, lambda line: say(f"{member.name}: {line}"))
    try:
        chain.run(("preference",))
    except Stopped as stopped:
        chain.tell(str(stopped))
        raise


def _prepare(run: Path, member: Member) -> None:
    """The member's folder with its links and its recipe, which also says where the folder is now: the run may have been moved."""
    folder = member.recipe.folder
    (run / "features").mkdir(exist_ok=True)
    for name in LINKED:
        if (run / name).exists():
            _link(folder / name, run / name)
    for name in _needed(member.recipe.preference):
        _link(folder / "preference" / name, _shared(run, name, member.recipe))
    write_atomically(folder / "recipe.yaml", dump_recipe(member.recipe))


def _needed(preference: PreferenceConfig) -> list[str]:
    """Which of the shared folders a run uses."""
    uses = {"round-1/candidates": preference.needs_candidates, "distorted": preference.needs_distorted, "reward": bool(preference.reward)}
    return [name for name in SHARED if uses.get(name, True)]


def _shared(run: Path, name: str, recipe: Recipe) -> Path:
    values = repr([*(attrgetter(key)(recipe) for key in SHARED[name]), *_weights(run)])
    folder = run / "sweep" / "shared" / f"{Path(name).name}-{hashlib.sha256(values.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _weights(run: Path) -> list[str]:
    """Identities of what the rounds start from: what was made with other weights must not be taken up."""
    exports = [run / name / "export" for name in LINKED]
    return [weights_hash(export) for export in exports if (export / EXPORTED).exists()]


def _link(path: Path, target: Path) -> None:
    """A relative link, so that the run can be moved as a whole; a link to elsewhere is replaced, anything else stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Resolved: ".." of a linked folder is not where its name says.
    there = os.path.relpath(target.resolve(), path.parent.resolve())
    if path.is_symlink() and os.readlink(path) != there:
        path.unlink()
    if not os.path.lexists(path):
        path.symlink_to(there)


def _find(source: str | Path) -> Path:
    if Path(source).is_file():
        return Path(source)
    folder = resources.files("launch.recipes") / "sweeps"
    if (shipped := folder / f"{source}.yaml").is_file():
        return Path(str(shipped))
    names = ", ".join(sorted(path.name.removesuffix(".yaml") for path in folder.iterdir()))
    raise RecipeError(f"{source}: no such sweep file, and no shipped sweep of that name ({names})")
