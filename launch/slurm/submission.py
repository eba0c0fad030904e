"""Writing the job scripts and handing them to SLURM."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence

from data_prep.storage import Folder
from launch.slurm.config import SlurmConfig
from launch.slurm.jobs import PARTS, Job, chain
from launch.slurm.scripts import job_script
from pipelines.config import Recipe
from pipelines.recipes import dump_recipe

_KEPT_VARIABLES = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS")


def launch(
    recipe: Recipe, config: SlurmConfig, say: Callable[[str], None], *, parts: Sequence[str] = PARTS, dry_run: bool = False
) -> list[str]:
    """Write the job scripts of a recipe and submit those of the parts that are not complete; their ids.

    A dry run shows them, and leaves nothing behind. Raises ValueError where jobs of an earlier launch are still in the queue, and where
    sbatch is not there or refuses a job: none of the chain stays in the queue then.
    """
    if not dry_run and not shutil.which("sbatch"):
        raise ValueError("sbatch is not on the PATH: launch where SLURM jobs are submitted, or see the jobs with --dry-run")
    text = dump_recipe(recipe)
    # Jobs in the queue keep the recipe they were submitted with, whatever is launched later.
    recipe_file = config.folder / f"recipe-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}.yaml"
    jobs = chain(recipe, recipe_file, config, say, parts)
    scripts = {job.name: job_script(job, recipe, config) for job in jobs}
    if not jobs:
        say("nothing to do: every part is complete")
    elif dry_run:
        _show(jobs, scripts, config, say)
    else:
        _refuse_twice(config)
        config.logs.mkdir(parents=True, exist_ok=True)
        for name, content in {recipe_file.name: text, **{f"{name}.sh": script for name, script in scripts.items()}}.items():
            Folder(config.folder).write(name, content.encode())
        return submit(jobs, config, say)
    return []


def submit(jobs: Sequence[Job], config: SlurmConfig, say: Callable[[str], None]) -> list[str]:
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


def _refuse_twice(config: SlurmConfig) -> None:
    """ValueError where scripts of this folder are in the queue: two jobs that train the same stage would write the same checkpoints."""
    done = _slurm("squeue", "--me", "--noheader", "--format=%A %o")
    if done.returncode:
        reason = " ".join(done.stderr.split())
        raise ValueError(f"squeue does not answer, so it is not known what is in the queue: {reason}; launch again later")
    queued = (line.strip().partition(" ") for line in done.stdout.splitlines())
    if ids := sorted({number for number, _, script in queued if script.startswith(f"{config.folder}/")}, key=int):
        raise ValueError(f"jobs of an earlier launch are in the queue: {', '.join(ids)}; wait for them, or scancel {' '.join(ids)}")


def _submission(job: Job, config: SlurmConfig, ids: Mapping[str, str]) -> list[str]:
    after = ":".join(ids[name] for name in job.after)
    waits = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *waits, str(config.folder / f"{job.name}.sh")]


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    # From inside a job, what SLURM says of that job would be handed on to the new ones and contradict their own requests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in _KEPT_VARIABLES}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _show(jobs: Sequence[Job], scripts: Mapping[str, str], config: SlurmConfig, say: Callable[[str], None]) -> None:
    for job in jobs:
        say(f"# {config.folder / job.name}.sh\n\n{scripts[job.name]}")
    say("# submitted in this order, each waiting for those that its line names:\n")
    for job in jobs:
        say(shlex.join(_submission(job, config, {name: f"ID_OF_{name.upper()}" for name in job.after})))
