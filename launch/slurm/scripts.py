"""The text of the job scripts."""

from __future__ import annotations

import os
import re
import shlex
import string
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from launch.slurm.config import Container, SlurmConfig
from launch.slurm.jobs import Job
from launch.tasks import TASKS
from pipelines.config import Recipe

_NOTICE = 60
"""Seconds before its time limit in which a job is told, where there is nothing to save."""
_LAST_SECONDS = 30
"""Seconds of a stage's notice that are left for going back into the queue."""
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""On these torchrun passes the signal on, waits for its processes, and does not start them again."""


def job_script(job: Job, recipe: Recipe, config: SlurmConfig) -> str:
    """The text of a job's script."""
    start = shlex.join(("srun", *_layout(job, config), *_in_container(recipe, config)))
    # -P: folders of the user's that happen to be called launch or models must not be imported.
    python = ("python3" if config.container else sys.executable, "-P", "-m")
    command = shlex.join(("launch.cli", *job.command))
    values = {"restarts": config.restarts, "start": start, "python": shlex.join(python), "command": command}
    if job.trains:
        training = config.training
        values |= {
            "tries": shlex.quote(f"{config.logs / job.name}"),
            "made_in": shlex.join(str(folder.absolute()) for folder in job.made_in),
            "nodes": training.nodes, "processes": training.processes, "max_restarts": training.max_restarts,
            "saving": training.notice - _LAST_SECONDS, "signals": _SIGNALS,
        }  # fmt: skip
    return _fill("slurm_job.sh", {
        "directives": "\n".join(_directives(job, recipe.name, config)),
        "answers": " ".join(map(str, job.answers)),
        "work": _fill("slurm_stage.sh" if job.trains else "slurm_task.sh", values).rstrip("\n"),
        "folder": shlex.quote(os.getcwd()),
        "setup": "\n".join(_setup(job, config)),
    })  # fmt: skip


class _Template(string.Template):
    """Shell is full of dollar signs."""

    delimiter = "@"


def _fill(template: str, values: Mapping[str, Any]) -> str:
    return _Template((resources.files("launch") / "templates" / template).read_text()).substitute(values)


def _directives(job: Job, run: str, config: SlurmConfig) -> list[str]:
    training = config.training
    array = f"0-{job.tasks - 1}" + (f"%{config.max_running}" if config.max_running else "") if job.tasks else None
    stage = {"nodes": training.nodes, "ntasks-per-node": 1, "gpus-per-node": training.gpus_per_node or None}
    options = {
        "job-name": f"{run}-{job.name}",
        "output": f"{config.logs / job.name}-{'%A_%a' if job.tasks else '%j'}.log",
        "open-mode": "append",
        "array": array,
        "partition": config.partition,
        "account": config.account,
        "time": training.times.get(job.name, config.time),
        "mem": config.mem,
        **(stage if job.trains else {"ntasks": 1}),
        "cpus-per-task": job.cpus,
        "signal": f"B:USR1@{training.notice if job.trains else _NOTICE}",
    }
    written = [f"#SBATCH --{name}={_quoted(str(value))}" for name, value in options.items() if value is not None]
    # Of an option that is given twice, sbatch takes the last.
    more = (*config.sbatch, *(training.sbatch if job.trains else ()))
    return [*written, "#SBATCH --requeue", *(f"#SBATCH {option}" for option in more)]


def _layout(job: Job, config: SlurmConfig) -> list[str]:
    """Options of srun that say where the command starts."""
    if not job.trains:
        return ["--ntasks=1", f"--cpus-per-task={job.cpus}"]
    nodes = config.training.nodes
    # An agent that is done must not take the others along while they wait for their processes to save; one that hangs must end.
    return [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={job.cpus}",
            "--kill-on-bad-exit=0", "--wait=60"]  # fmt: skip


def _in_container(recipe: Recipe, config: SlurmConfig) -> list[str]:
    """What stands between srun's options and the command, so that it runs in the image."""
    if not config.container:
        return []
    mounts, here = _mounts(config.container, recipe, config), os.getcwd()
    if config.container.runtime == "pyxis":
        return [f"--container-image={config.container.image}", f"--container-mounts={','.join(mounts)}", f"--container-workdir={here}"]
    gpus = ["--nv"] if config.training.gpus_per_node else []
    return ["apptainer", "exec", *gpus, "--bind", ",".join(mounts), "--pwd", here, config.container.image]


def _mounts(container: Container, recipe: Recipe, config: SlurmConfig) -> list[str]:
    """Folders as FOLDER:INSIDE: the working folder, the run's and that of the scripts, unless they lie in one another; then the user's."""
    own: list[Path] = []
    for folder in (Path.cwd(), recipe.folder.absolute(), config.folder):
        if not any(folder.is_relative_to(other) for other in own):
            own.append(folder)
    if wrong := [folder for folder in own if not {",", ":"}.isdisjoint(str(folder))]:
        raise ValueError(f"{str(wrong[0])!r} has a comma or colon, with which no container can mount it: choose another folder")
    return [mount if ":" in mount else f"{mount}:{mount}" for mount in (*map(str, own), *container.mounts)]


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
