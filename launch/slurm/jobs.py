"""Which jobs take a recipe from where it stands to its last stage, and which waits for which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.layout import INDEX_FILE
from data_prep.storage import Folder
from launch.slurm.config import SlurmConfig, Training
from pipelines.config import Recipe
from pipelines.engine.checkpoint import EXPORTED
from pipelines.recipes import RecipeError

PREPARE = "prepare"
_PARENTS = {"autoencoder": (), "contrastive": (), "generative": ("autoencoder", "contrastive"), "preference": ("generative",)}
"""Stage -> the stages whose exports it reads."""
PARTS = (PREPARE, *_PARENTS)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job of a chain."""

    name: str
    """Name of the script and of the logs."""
    command: tuple[str, ...]
    """What follows `foleyscale`."""
    after: tuple[str, ...] = ()
    """Names of the jobs that must have succeeded."""
    tasks: int | None = None
    """Tasks, where the job is an array."""
    cpus: int = 1
    """CPUs of each task."""
    answers: tuple[int, ...] = ()
    """Exit codes that are an answer: starting again would not change them."""
    trains: bool = False
    """Whether torchrun starts the command on several nodes, as many processes on each as `Training` says."""
    made_in: tuple[Path, ...] = ()
    """Folders in which a job that trains finishes checkpoints and shards: by these it gets further."""


def chain(recipe: Recipe, recipe_file: Path, config: SlurmConfig, say: Callable[[str], None], parts: Sequence[str] = PARTS) -> list[Job]:
    """The jobs of the named parts, in order, without those that are complete.

    Raises RecipeError or ValueError where a part lacks what it starts from; the message names the key or the part.
    """
    if wrong := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--stages has {wrong[0]!r}: choose from {', '.join(PARTS)}")
    if not recipe.data:
        raise RecipeError("data: name the folder or URL of the shards, for example data=shards")
    stages = _open_stages(recipe, parts, say)
    jobs = preparation(recipe, recipe_file, config, say) if PREPARE in parts and not _is_prepared(recipe, parts, say) else []
    if stages and not jobs and not _exists(recipe.data, INDEX_FILE):
        raise ValueError(f"{recipe.data}: there are no indexed shards to train on; add {PREPARE} to --stages")
    start = tuple(job.name for job in jobs[-1:])
    return [*jobs, *(_stage_job(recipe, recipe_file, config.training, stage, stages, start) for stage in stages)]


def preparation(recipe: Recipe, recipe_file: Path, config: SlurmConfig, say: Callable[[str], None]) -> list[Job]:
    """The jobs that make a recipe's shards, in order; RecipeError names the key that is missing."""
    prepare = recipe.prepare
    if prepare is None:
        raise RecipeError("prepare: the recipe does not say how its shards are made; add the section, with reader and arguments")
    data, manifest, cpus = recipe.data, prepare.manifest, config.cpus_per_task or prepare.workers
    listing = ("prep", "manifest", prepare.reader, *prepare.arguments, "--out", manifest)
    jobs = [] if _is_listed(recipe, say) else [Job(name="manifest", command=listing)]
    cut = ("prep", "shards", manifest, data, "--recipe", str(recipe_file), "--task", "auto", "--workers", str(prepare.workers))
    return [
        *jobs,
        Job(name="shards", command=cut, after=tuple(job.name for job in jobs), tasks=config.tasks or prepare.tasks, cpus=cpus),
        Job(name="index", command=("prep", "index", data), after=("shards",)),
        Job(name="verify", command=("prep", "verify", data, "--manifest", manifest), after=("index",), cpus=cpus, answers=(1,)),
    ]


def _stage_job(recipe: Recipe, recipe_file: Path, training: Training, stage: str, stages: Sequence[str], start: tuple[str, ...]) -> Job:
    train = getattr(recipe, stage).train
    processes = training.nodes * training.processes
    if train.batch_size % (processes * train.accumulation):
        raise ValueError(f"{stage}.train.batch_size {train.batch_size} must divide by {processes} processes x accumulation "
                         f"{train.accumulation}: change one of them, --nodes or --gpus-per-node")  # fmt: skip
    # Features are computed by the stage that first reads them.
    folders = (recipe.folder / stage, *((recipe.folder / "features",) if stage == "generative" else ()))
    return Job(
        name=stage, command=("train", stage, str(recipe_file)), trains=True, made_in=folders,
        after=tuple(parent for parent in _PARENTS[stage] if parent in stages) or start,
        cpus=training.cpus_per_node or training.processes * (1 + max(train.stream.workers, recipe.features.workers)))  # fmt: skip


def _open_stages(recipe: Recipe, parts: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """The stages among `parts` that are not complete, in order; ValueError where one would start without its parents."""
    wanted = [stage for stage in _PARENTS if stage in parts]
    complete = {stage for stage in _PARENTS if _is_complete(recipe, stage)}
    for stage in wanted:
        if stage in complete:
            say(f"{stage}: complete, skipped")
        elif lacking := [parent for parent in _PARENTS[stage] if parent not in complete and parent not in wanted]:
            raise ValueError(f"{recipe.folder}: stage {lacking[0]} is not complete, and {stage} starts from it; add it to --stages")
    return [stage for stage in wanted if stage not in complete]


def _is_complete(recipe: Recipe, stage: str) -> bool:
    rounds = [f"preference/round-{number}" for number in range(1, recipe.preference.rounds + 1)]
    return all((recipe.folder / name / "export" / EXPORTED).exists() for name in (rounds if stage == "preference" else [stage]))


def _is_prepared(recipe: Recipe, parts: Sequence[str], say: Callable[[str], None]) -> bool:
    """Whether indexed shards are taken as they are: where stages follow that have begun, or where the recipe cannot make any."""
    trains = len(parts) > 1
    # Training starts after verify: where it has begun, the shards were found sound.
    if trains and _exists(recipe.data, INDEX_FILE) and (recipe.prepare is None or (recipe.folder / "recipe.yaml").exists()):
        say(f"{recipe.data}: prepared, skipped")
        return True
    return False


def _is_listed(recipe: Recipe, say: Callable[[str], None]) -> bool:
    """Whether the manifest is there and need not be made; RecipeError where it is not there and nothing says how to make it."""
    url, reader = recipe.prepare.manifest, recipe.prepare.reader
    parent, slash, name = url.rpartition("/")
    if not _exists(parent or slash or ".", name):
        if not reader:
            raise RecipeError(f"prepare.manifest: {url} is not there; make it, or name a reader as prepare.reader")
        return False
    if reader:
        say(f"{url} is there and is used as it is; delete it to list the clips anew")
    return True


def _exists(folder: str, name: str) -> bool:
    try:
        Folder(folder).size(name)
    except FileNotFoundError:
        return False
    return True
