"""The processes of a run: who am I, how many are we, on which device."""

from __future__ import annotations

import functools
import os
import secrets
import warnings
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    device: torch.device
    start: str = ""
    """Names this start of the run: the same on all ranks, another one whenever processes start anew."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()

    def total(self, values: dict[Hashable, float | torch.Tensor]) -> dict[Hashable, float]:
        """Sum scalars over all processes in one collective; every process must call with the same keys in the same order."""
        if not values:
            return {}
        # As tensors to the end: a device waits for its host once, not once per value.
        scalars = [torch.as_tensor(value, device=self.device).detach().double().reshape(()) for value in values.values()]
        summed = torch.stack(scalars)
        if self.size > 1:
            dist.all_reduce(summed)
        return dict(zip(values, summed.tolist(), strict=True))

    def agree_on(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every process the values of the first, in place; every process must call with tensors of the same shapes."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, 0)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        return self.total({"flag": float(flag)})["flag"] > 0


def join_world() -> World:
    """Start or join the process group: alone, or as torchrun and SLURM say in RANK, WORLD_SIZE and LOCAL_RANK."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _initialise(device, rank, size)
    return World(rank, size, device, _start(device, size))


_WAIT = timedelta(days=1)
"""Longer than any phase may take: the watchdog ends what hangs and names it. NCCL's ten minutes would end a long validation."""


def _initialise(device: torch.device, rank: int, size: int) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    # A lone process needs no port, so that two runs on one machine cannot collide.
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it even of a lone process
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
    dist.init_process_group(backend, timeout=_WAIT, **alone)
    _deepspeed(device).init_distributed(dist_backend=backend, verbose=False)


@functools.cache
def _start(device: torch.device, size: int) -> str:
    """As the first rank has drawn it: what launchers say of themselves may be the same at the next start."""
    drawn = torch.tensor(secrets.randbits(63), device=device)
    if size > 1:
        dist.broadcast(drawn, 0)
    return f"{drawn.item():016x}"


def _deepspeed(device: torch.device):
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # DeepSpeed calls names that torch has renamed: once per collective and rank, a warning that nobody can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    if device.type == "cpu":
        # DeepSpeed would compile its shared-memory collective with g++ on first use (about a minute); gloo serves on a CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
