"""Real processes for tests of the engine: one that has imported everything forks those of a world, in a moment instead of seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from tests.services.ports import free_ports

_SECONDS = 120


def preload() -> None:
    """Import what a rank needs; once, in a process that starts no threads of its own and never joins a world itself."""
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    import deepspeed.runtime.zero.muon.muon_optimizer  # what DeepSpeed imports when an engine starts, and all of torch's compiler with it
    import torch.utils.tensorboard

    import pipelines.engine.checkpoint  # noqa: F401

    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("WARNING")


def fork_world(size: int, function: Callable, *arguments: object) -> list[int]:
    """Start `function(world, *arguments)` on `size` ranks; their process ids."""
    port = free_ports(1)[0]
    return [_fork_rank(rank, size, port, function, arguments) for rank in range(size)]


def run_world(size: int, function: Callable, *arguments: object) -> None:
    """Let a world come to its end; RuntimeError where a rank failed, with what it said above."""
    if any(statuses := wait_for(fork_world(size, function, *arguments))):
        raise RuntimeError(f"{function.__name__} on {size} ranks ended with {statuses}")


def wait_for(ranks: list[int]) -> list[int]:
    """Exit status of every rank, minus the signal where it was killed. When one fails the others are killed, as by torchrun."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + _SECONDS
    while len(statuses) < len(ranks):
        for rank in set(ranks) - statuses.keys():
            ended, status = os.waitpid(rank, os.WNOHANG)
            if ended:
                statuses[rank] = os.waitstatus_to_exitcode(status)
        if any(statuses.values()) or time.monotonic() > deadline:
            kill([rank for rank in ranks if rank not in statuses])
        time.sleep(0.005)
    return [statuses[rank] for rank in ranks]


def kill(ranks: list[int]) -> None:
    """kill -9."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def _fork_rank(rank: int, size: int, port: int, function: Callable, arguments: tuple) -> int:
    if process := os.fork():
        return process
    status = 1
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        from pipelines.engine.world import join_world

        function(join_world(), *arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
