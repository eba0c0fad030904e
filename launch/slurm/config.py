"""What the jobs ask of SLURM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUNTIMES = ("pyxis", "apptainer")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the jobs that train ask for, one of them per stage."""

    nodes: int = 1
    """Nodes of each job."""
    gpus_per_node: int = 0
    """GPUs of each node; 0 trains on CPUs."""
    processes_per_node: int | None = None
    """Processes on each node; by default one per GPU, or a single one."""
    cpus_per_node: int | None = None
    """CPUs on each node; by default one for each process and each of its decoding workers, in training or in `features`."""
    times: Mapping[str, str] = field(default_factory=dict)
    """Stage -> time limit, where it is not that of all jobs."""
    notice: int = 300
    """Seconds before the time limit in which a stage is told to save and leave: more than a step and a checkpoint take."""
    max_restarts: int = 2
    """How often torchrun starts the processes again in place after one of them died, before the job goes back into the queue."""
    sbatch: tuple[str, ...] = ()
    """Options of sbatch for these jobs alone, such as --partition=gpu; they decide over those of all jobs."""

    def __post_init__(self):
        bounds = {"nodes": 1, "gpus_per_node": 0, "processes_per_node": 1, "cpus_per_node": 1, "notice": 60, "max_restarts": 0}
        _check_bounds(self, bounds)
        _check_options(self)

    @property
    def processes(self) -> int:
        """Processes on each node."""
        return self.processes_per_node or max(self.gpus_per_node, 1)


@dataclass(frozen=True, kw_only=True)
class Container:
    """The image that the commands run in. The scripts themselves run outside of it, where SLURM's commands are."""

    image: str
    """Image as the runtime writes it: a file, or an address such as docker://registry/image."""
    runtime: str = "pyxis"
    """pyxis (SLURM's plugin for enroot) or apptainer."""
    mounts: tuple[str, ...] = ()
    """Folders that the commands see besides the working folder and the run's, as FOLDER or FOLDER:INSIDE."""

    def __post_init__(self):
        if self.runtime not in RUNTIMES:
            raise ValueError(f"Container.runtime is {self.runtime!r}: choose {' or '.join(RUNTIMES)}")
        if wrong := [mount for mount in self.mounts if not mount.startswith("/") or "," in mount]:
            raise ValueError(f"Container.mounts has {wrong[0]!r}: write an absolute path without commas, or two with a colon between them")


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
    """Memory on each node, such as 32G; by default the partition's."""
    cpus_per_task: int | None = None
    """CPUs of a shard task and of verify; by default `prepare.workers`."""
    tasks: int | None = None
    """Tasks of the array; by default `prepare.tasks`."""
    max_running: int | None = None
    """Tasks of the array that may run at once; by default all."""
    restarts: int = 3
    """How often a job goes back into the queue by itself after a failure before it counts as failed."""
    setup: tuple[str, ...] = ()
    """Lines of shell that run before the command, such as `module load python`."""
    sbatch: tuple[str, ...] = ()
    """Other options of sbatch, such as --qos=low."""
    training: Training = field(default_factory=Training)
    """The jobs that train."""
    container: Container | None = None
    """Image that the commands run in; None runs them with the Python that launches."""

    def __post_init__(self):
        _check_bounds(self, {"cpus_per_task": 1, "tasks": 1, "max_running": 1, "restarts": 0})
        _check_options(self)
        if not {"%", "\\", "\n"}.isdisjoint(str(self.logs)):
            raise ValueError(f"SlurmConfig.log_dir is {str(self.logs)!r}: SLURM reads % and \\ in names of logs; choose another --log-dir")

    @property
    def logs(self) -> Path:
        """Folder of the logs."""
        return self.log_dir or self.folder / "logs"


def _check_bounds(config: Any, bounds: Mapping[str, int]) -> None:
    for name, least in bounds.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{type(config).__name__}.{name} is {value}: choose {least} or more")


def _check_options(config: Any) -> None:
    if wrong := [option for option in config.sbatch if not option.startswith("-") or "\n" in option]:
        raise ValueError(f"{type(config).__name__}.sbatch has {wrong[0]!r}: write options of sbatch, such as --qos=low")
