"""Optimiser state and parameters on a local disk (DeepSpeed's nvme offload of stage 3): settings, folder, and how to get at them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.engine.world import World

AIO = {"block_size": 1 << 20, "queue_depth": 8, "intra_op_parallelism": 1, "single_submit": False, "overlap_events": True, "use_gds": False}
"""How DeepSpeed reads and writes. What is smaller than a block stays in the host's memory."""


def optimiser_settings(folder: str) -> dict:
    """For the optimiser's state: buffers for a group's master weights, both moments and its gradient."""
    return {"nvme_path": folder, "buffer_count": 4, "pipeline_read": False, "pipeline_write": False, "fast_init": False}


def parameter_settings(folder: str, module: nn.Module, ranks: int) -> dict:
    """For the parameters: as many buffers as are in use at once, each for a rank's share of the largest."""
    largest = max((parameter.numel() for parameter in module.parameters()), default=1)
    return {"nvme_path": folder, "buffer_count": 1 + _at_once(module), "buffer_size": -(-largest // ranks), "max_in_cpu": 0}


def _at_once(module: nn.Module) -> int:
    """Most parameters that a forward pass needs together: those of a module and of all modules around it."""
    return sum(1 for _ in module.parameters(recurse=False)) + max(map(_at_once, module.children()), default=0)


def load_asynchronous_io() -> None:
    """Build what DeepSpeed reads and writes with, once on a machine (minutes); ValueError where that cannot be done."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import get_default_build_root

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise ValueError("offload to nvme: DeepSpeed's async_io operator cannot be built here; install libaio-dev and a C++ compiler, "
                         "or set zero.offload_optimiser and zero.offload_parameters to cpu")
    # Torch's own lock is a file that a killed build leaves, and all later ones wait for in silence. This one goes with its process.
    root = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{get_default_build_root()}/foleyscale-torch{torch.__version__}"))
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "foleyscale.lock", "w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        for left in root.glob("*/lock"):
            left.unlink()
        builder.load(verbose=False)


@cache
def heed_types() -> None:
    """Have DeepSpeed keep parameters in the type that it is told.

    On a processor without float16, 0.19.8 takes bfloat16 instead (`dtype or float16 if fp16 else bfloat16` binds the other way round), and
    reads parameters on a disk as that.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    decide = Init._set_dtype

    def set_dtype(self: Init, config: Any, dtype: torch.dtype | None) -> None:
        decide(self, config, dtype)
        self.dtype = dtype or self.dtype

    Init._set_dtype = set_dtype


def folder_of(path: str, run: Path) -> Path:
    """The folder below `path` that belongs to this stage of this run alone: DeepSpeed's names are the same in all runs."""
    return Path(path) / f"foleyscale-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]}"


def clear(folder: Path, world: World) -> None:
    """Remove what this run, or one that was killed, has left; collective."""
    world.barrier()
    shutil.rmtree(folder, ignore_errors=True)  # every rank: the disk may be that of its node
    world.barrier()


def on_disk(optimiser, group: int) -> bool:
    """Whether stage 3 keeps the master weights and moments of this group on a disk."""
    return optimiser._swappable_optimizer_subgroup(group)


@contextlib.contextmanager
def group_in_memory(optimiser, group: int, change: bool) -> Iterator[None]:
    """Inside, master weights and moments of the group are in memory; they are written back where they `change`."""
    optimiser._optimizer_states_and_gradient_swap_in(group)
    try:
        yield
    finally:
        if change:
            optimiser._optimizer_states_and_gradient_swap_out(group)
        else:
            optimiser._release_swap_buffers(group)
