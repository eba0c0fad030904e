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
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of one that ships.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, as key=value.")] = None,
    stages: Annotated[
        str | None, typer.Option(help="Parts to run, with commas: prepare, autoencoder, contrastive, generative, preference; all.")
    ] = None,
    nodes: Annotated[int, typer.Option(help="Nodes of each training job.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each node in training; 0 trains on CPUs.")] = 0,
    processes_per_node: Annotated[int | None, typer.Option(help="Training processes on each node; by default one per GPU.")] = None,
    cpus_per_node: Annotated[int | None, typer.Option(help="CPUs in training; by default one per process and decoding worker.")] = None,
    stage_time: Annotated[list[str] | None, typer.Option(help="Time limit of one stage, as generative=2-00:00:00.")] = None,
    notice: Annotated[int, typer.Option(help="Seconds before its time limit at which a stage saves and leaves.")] = 300,
    process_restarts: Annotated[int, typer.Option(help="Times that torchrun starts died processes again within a job.")] = 2,
    train_sbatch: Annotated[list[str] | None, typer.Option(help="Like --sbatch, for the training jobs alone.")] = None,
    container: Annotated[str | None, typer.Option(help="Image that the commands run in.")] = None,
    container_runtime: Annotated[str | None, typer.Option(help="What runs it: pyxis, the default, or apptainer.")] = None,
    mount: Annotated[list[str] | None, typer.Option(help="Folder that the container sees, as FOLDER or FOLDER:INSIDE.")] = None,
    tasks: Annotated[int | None, typer.Option(help="Tasks of the shard array; by default prepare.tasks.")] = None,
    max_running: Annotated[int | None, typer.Option(help="Tasks that may run at once; by default all.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account that is charged.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of each job, such as 12:00:00.")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="CPUs of a shard task; by default prepare.workers.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory of each job on each node, such as 32G.")] = None,
    restarts: Annotated[int, typer.Option(help="Times that a job goes back into the queue before it counts as failed.")] = 3,
    setup: Annotated[list[str] | None, typer.Option(help="Line of shell to run before the command; may be given again.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="Another option for sbatch, as --sbatch=--qos=low; may be given again.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of the scripts; by default slurm in the run's folder.")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Folder of the logs; by default logs beside the scripts.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written and submitted; do neither.")] = False,
):
    """Run a recipe on SLURM: its preparation, then a job for every stage. Launch again to resume: what is complete is left out."""
    from launch import slurm
    from pipelines.recipes import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    training = slurm.Training(
        nodes=nodes, gpus_per_node=gpus_per_node, processes_per_node=processes_per_node, cpus_per_node=cpus_per_node,
        times=_times(stage_time or ()), notice=notice, max_restarts=process_restarts, sbatch=tuple(train_sbatch or ()))  # fmt: skip
    if not container and (container_runtime or mount):
        raise ValueError("--container-runtime and --mount are for a container: name its image with --container")
    image = slurm.Container(image=container, runtime=container_runtime or "pyxis", mounts=tuple(mount or ())) if container else None
    config = slurm.SlurmConfig(
        folder=(folder or loaded.folder / "slurm").absolute(), log_dir=log_dir and log_dir.absolute(), partition=partition, account=account,
        time=time, mem=mem, cpus_per_task=cpus_per_task, tasks=tasks, max_running=max_running, restarts=restarts,
        setup=tuple(setup or ()), sbatch=tuple(sbatch or ()), training=training, container=image)  # fmt: skip
    slurm.launch(loaded, config, typer.echo, parts=_parts(stages), dry_run=dry_run)


def _parts(stages: str | None) -> tuple[str, ...]:
    from launch.slurm.jobs import PARTS

    return PARTS if stages is None else tuple(stages.split(","))


def _times(options: list[str] | tuple[str, ...]) -> dict[str, str]:
    from launch.slurm.jobs import PARTS

    times = dict(option.partition("=")[::2] for option in options)
    if wrong := [option for option in options if option.partition("=")[0] not in PARTS[1:] or not option.partition("=")[2]]:
        raise ValueError(f"--stage-time {wrong[0]!r}: write it as STAGE=TIME with one of {', '.join(PARTS[1:])}")
    return times
