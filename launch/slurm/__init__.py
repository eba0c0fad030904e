"""The chain of a recipe as SLURM jobs: manifest, array of shard tasks, index, verify, and a job for every stage."""

from launch.slurm.config import Container, SlurmConfig, Training
from launch.slurm.jobs import Job, chain
from launch.slurm.scripts import job_script
from launch.slurm.submission import launch

__all__ = ["Container", "Job", "SlurmConfig", "Training", "chain", "job_script", "launch"]
