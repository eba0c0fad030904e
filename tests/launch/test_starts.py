"""torchrun, accelerate and DeepSpeed's launcher: whichever starts two processes, they train alike."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.accelerated import accelerate_launch, skip_without_accelerate
from tests.fixtures.tiny_chain import REPOSITORY, STEPS, losses, overrides, tiny_shards
from tests.services.ports import free_ports

PROCESSES = 2
LEARNED = ("step", "loss", "reconstruction", "kl", "gradient_norm")
BIN = Path(sys.executable).parent


def torchrun(folder: Path) -> list[str]:
    return [BIN / "torchrun", "--standalone", f"--nproc-per-node={PROCESSES}", "-m", "launch.cli"]


def torchrun_of_the_command(folder: Path) -> list[str]:
    return [BIN / "torchrun", "--standalone", f"--nproc-per-node={PROCESSES}", "--no-python", BIN / "foleyscale"]


def accelerate(folder: Path) -> list[str]:
    return [*accelerate_launch(PROCESSES), "-m", "launch.cli"]


def deepspeed(folder: Path) -> list[str]:
    hosts = folder / "hostfile"
    hosts.write_text(f"localhost slots={PROCESSES}\n")
    return [BIN / "deepspeed", f"--hostfile={hosts}", "--no_ssh", "--node_rank=0", "--master_addr=127.0.0.1",
            f"--master_port={free_ports(1)[0]}", "--no_local_rank", "--module", "launch.cli"]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory):
    """What `torchrun -m launch.cli` logs."""
    return started(torchrun, shards, tmp_path_factory.mktemp("torchrun"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [torchrun_of_the_command, accelerate, deepspeed], ids=lambda launcher: launcher.__name__)
def test_every_launcher_trains_alike(shards, reference, tmp_path, launcher):
    if launcher is accelerate:
        skip_without_accelerate()
    assert started(launcher, shards, tmp_path) == reference
    assert [line["step"] for line in reference] == list(range(1, STEPS + 1))


def started(launcher, shards: str, folder: Path) -> list[dict]:
    """The log lines of the autoencoder that a launcher started, of what it learned; AssertionError with what it said where it failed."""
    command = [*map(str, launcher(folder)), "train", "autoencoder", "demo", *overrides(folder, shards)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-4000:]
    parts = (folder / "run" / "autoencoder" / "checkpoints").glob(f"*/rank-*{PROCESSES - 1}-of-*{PROCESSES}.safetensors")
    assert list(parts), "the last process has written no part of a checkpoint: was it started?"
    return [{name: line[name] for name in LEARNED} for line in losses(folder / "run")["autoencoder"] if "loss" in line]
