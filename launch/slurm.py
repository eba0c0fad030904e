"""The preparation of a recipe as a chain of SLURM jobs: manifest, array of shard tasks, index, verify."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from data_prep.storage import Folder
from launch.tasks import TASKS
from pipelines.config import Recipe
from pipelines.recipes import RecipeError, dump_recipe

_KEPT_VARIABLES = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS")


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What every job asks of SLURM."""

    folder: Path
    """Where the scripts, the resolved recipe and the logs go; all nodes must see it."""
    log_dir: Path | None = None
    """Where the logs go; by default `logs` in `folder`."""
    partition: str | None = None
    """Partition; by default the cluster's."""
    account: str | None = None
    """Account that is charged."""
    time: str | None = None
    """Time limit as SLURM writes it, such as 12:00:00; by default the partition's."""
    mem: str | None = None
    """Memory per job, such as 32G; by default the partition's."""
    cpus_per_task: int | None = None
    """CPUs of a shard task and of verify; by default `prepare.workers`."""
    tasks: int | None = None
    """Tasks of the array; by default `prepare.tasks`."""
    max_running: int | None = None
    """Tasks of the array that may run at once; by default all."""
    restarts: int = 3
    """How often a job goes back into the queue by itself, after a failure or at its time limit, before it counts as failed."""
    setup: tuple[str, ...] = ()
    """Lines of shell that run before the command, such as `module load python`."""
    sbatch: tuple[str, ...] = ()
    """Other options of sbatch, such as --qos=low."""

    def __post_init__(self):
        for name, least in (("cpus_per_task", 1), ("tasks", 1), ("max_running", 1), ("restarts", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"SlurmConfig.{name} is {value}: choose {least} or more")
        if wrong := [option for option in self.sbatch if not option.startswith("-") or "\n" in option]:
            raise ValueError(f"SlurmConfig.sbatch has {wrong[0]!r}: write options of sbatch, such as --qos=low")
        if not {"%", "\\", "\n"}.isdisjoint(str(self.logs)):
            raise ValueError(f"SlurmConfig.log_dir is {str(self.logs)!r}: SLURM reads % and \\ in names of logs; choose another --log-dir")

    @property
    def logs(self) -> Path:
        """Folder of the logs."""
        return self.log_dir or self.folder / "logs"


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


def launch(recipe: Recipe, config: SlurmConfig, say: Callable[[str], None], *, dry_run: bool = False) -> list[str]:
    """Write the job scripts of a recipe's preparation and submit them; their ids. A dry run shows them, and leaves nothing behind.

    Raises ValueError where sbatch is not there or refuses a job: none of the chain stays in the queue then.
    """
    if not dry_run and not shutil.which("sbatch"):
        raise ValueError("sbatch is not on the PATH: launch where SLURM jobs are submitted, or see the jobs with --dry-run")
    text = dump_recipe(recipe)
    # Jobs in the queue keep the recipe they were submitted with, whatever is launched later.
    recipe_file = config.folder / f"recipe-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}.yaml"
    jobs = preparation(recipe, recipe_file, config, say)
    scripts = {job.name: job_script(job, recipe.name, config) for job in jobs}
    if dry_run:
        _show(jobs, scripts, config, say)
        return []
    config.logs.mkdir(parents=True, exist_ok=True)
    for name, content in {recipe_file.name: text, **{f"{name}.sh": script for name, script in scripts.items()}}.items():
        Folder(config.folder).write(name, content.encode())
    return submit(jobs, config, say)


def preparation(recipe: Recipe, recipe_file: Path, config: SlurmConfig, say: Callable[[str], None]) -> list[Job]:
    """The jobs that make a recipe's shards, in order; RecipeError names the key that is missing."""
    prepare = recipe.prepare
    if prepare is None:
        raise RecipeError("prepare: the recipe does not say how its shards are made; add the section, with reader and arguments")
    if not recipe.data:
        raise RecipeError("data: name the folder or URL of the shards, for example data=shards")
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


def job_script(job: Job, run: str, config: SlurmConfig) -> str:
    """The text of a job's script."""
    values = {
        "directives": "\n".join(_directives(job, run, config)),
        "answers": " ".join(map(str, job.answers)),
        "restarts": config.restarts,
        "folder": shlex.quote(os.getcwd()),
        "setup": "\n".join(_setup(job, config)),
        "cpus": job.cpus,
        # -P: folders of the user's that happen to be called launch or models must not be imported.
        "command": shlex.join((sys.executable, "-P", "-m", "launch.cli", *job.command)),
    }
    template = resources.files("launch") / "templates" / "slurm_job.sh"
    return _Template(template.read_text()).substitute(values)


def submit(jobs: list[Job], config: SlurmConfig, say: Callable[[str], None]) -> list[str]:
    """Submit a chain in order; where one job is refused, those before it are cancelled and ValueError says why."""
    ids: dict[str, str] = {}
    for job in jobs:
        done = _slurm(*_submission(job, config, ids))
        if done.returncode:
            if ids:
                _slurm("scancel", *ids.values())
            reason = " ".join((done.stderr or done.stdout).split())
            raise ValueError(f"sbatch refused the job {job.name}, and nothing stays in the queue: {reason}")
        ids[job.name] = done.stdout.strip().split(";")[0]
        tasks = f", {job.tasks} tasks" if job.tasks else ""
        say(f"{job.name}: job {ids[job.name]}{tasks}" + (f", after {', '.join(job.after)}" if job.after else ""))
    say(f"logs: {config.logs}; cancel with: scancel {' '.join(ids.values())}")
    return list(ids.values())


class _Template(string.Template):
    """Shell is full of dollar signs."""

    delimiter = "@"


def _is_listed(recipe: Recipe, say: Callable[[str], None]) -> bool:
    """Whether the manifest is there and need not be made; RecipeError where it is not there and nothing says how to make it."""
    url, reader = recipe.prepare.manifest, recipe.prepare.reader
    parent, slash, name = url.rpartition("/")
    try:
        Folder(parent or slash or ".").size(name)
    except FileNotFoundError:
        if not reader:
            raise RecipeError(f"prepare.manifest: {url} is not there; make it, or name a reader as prepare.reader") from None
        return False
    if reader:
        say(f"{url} is there and is used as it is; delete it to list the clips anew")
    return True


def _directives(job: Job, run: str, config: SlurmConfig) -> list[str]:
    array = f"0-{job.tasks - 1}" + (f"%{config.max_running}" if config.max_running else "") if job.tasks else None
    options = {
        "job-name": f"{run}-{job.name}",
        "output": f"{config.logs / job.name}-{'%A_%a' if job.tasks else '%j'}.log",
        "open-mode": "append",
        "array": array,
        "partition": config.partition,
        "account": config.account,
        "time": config.time,
        "mem": config.mem,
        "ntasks": 1,
        "cpus-per-task": job.cpus,
        "signal": "B:USR1@60",
    }
    written = [f"#SBATCH --{name}={_quoted(str(value))}" for name, value in options.items() if value is not None]
    return [*written, "#SBATCH --requeue", *(f"#SBATCH {option}" for option in config.sbatch)]


def _quoted(value: str) -> str:
    """A value as sbatch reads it in a script: its quotes are like the shell's, but nothing is expanded."""
    if not value.isprintable():
        raise ValueError(f"{value!r} has a line break or another character that sbatch cannot take: choose another value")
    if re.fullmatch(r"[\w.,:@%=+/-]+", value):
        return value
    return '"' + value.replace("\\", r"\\").replace('"', r"\"") + '"'


def _setup(job: Job, config: SlurmConfig) -> list[str]:
    lines = [f"export {TASKS}={job.tasks}"] if job.tasks else []
    # Scripts of modules and conda read variables that are not set.
    return [*lines, "set +u", *config.setup, "set -u"] if config.setup else lines


def _submission(job: Job, config: SlurmConfig, ids: Mapping[str, str]) -> list[str]:
    after = ":".join(ids[name] for name in job.after)
    waits = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *waits, str(config.folder / f"{job.name}.sh")]


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    # From inside a job, what SLURM says of that job would be handed on to the new ones and contradict their own requests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in _KEPT_VARIABLES}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _show(jobs: list[Job], scripts: Mapping[str, str], config: SlurmConfig, say: Callable[[str], None]) -> None:
    for job in jobs:
        say(f"# {config.folder / job.name}.sh\n\n{scripts[job.name]}")
    say("# submitted in this order, each waiting for the one before:\n")
    for job in jobs:
        say(shlex.join(_submission(job, config, {name: f"ID_OF_{name.upper()}" for name in job.after})))
