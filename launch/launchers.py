"""The commands that start work on a cluster: `foleyscale launch ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

launch = typer.Typer(help="Start work on a cluster.", no_args_is_help=True)


@launch.callback()
def _group() -> None:
    """Keeps `slurm` a command of a group while it is the only one."""


@launch.command("slurm")
def launch_slurm(
    recipe: Annotated[str, typer.Argument(help="Recipe file with a `prepare` section, or the name of one that ships.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, as key=value.")] = None,
    tasks: Annotated[int | None, typer.Option(help="Tasks of the shard array; by default prepare.tasks.")] = None,
    max_running: Annotated[int | None, typer.Option(help="Tasks that may run at once; by default all.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account that is charged.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of each job, such as 12:00:00.")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="CPUs of a shard task; by default prepare.workers.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory of each job, such as 32G.")] = None,
    restarts: Annotated[int, typer.Option(help="Times that a job goes back into the queue before it counts as failed.")] = 3,
    setup: Annotated[list[str] | None, typer.Option(help="Line of shell to run before the command; may be given again.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="Another option for sbatch, as --sbatch=--qos=low; may be given again.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of the scripts; by default slurm in the run's folder.")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Folder of the logs; by default logs beside the scripts.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written and submitted; do neither.")] = False,
):
    """Prepare a recipe's shards on SLURM: manifest, array of shard tasks, index, verify. Launch again to resume."""
    from launch import slurm
    from pipelines.recipes import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    config = slurm.SlurmConfig(
        folder=(folder or loaded.folder / "slurm").absolute(), log_dir=log_dir and log_dir.absolute(), partition=partition, account=account,
        time=time, mem=mem, cpus_per_task=cpus_per_task, tasks=tasks, max_running=max_running, restarts=restarts,
        setup=tuple(setup or ()), sbatch=tuple(sbatch or ()))  # fmt: skip
    slurm.launch(loaded, config, typer.echo, dry_run=dry_run)
