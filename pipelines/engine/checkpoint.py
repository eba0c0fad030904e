"""Resumable checkpoints: `checkpoints/step-*/`, each complete if and only if its marker file is there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch

from pipelines.engine.ema import ShardedEMA
from pipelines.engine.world import World

MARKER = EXPORTED = "complete.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names it and says what to do."""


def save_checkpoint(folder: Path, step: int, engine, ema: ShardedEMA, stream_state: dict, world: World, keep: int) -> None:
    """Write the state after `step` steps; the marker comes last, when every rank has written. Collective."""
    name = f"step-{step:08d}"
    engine.save_checkpoint(str(folder), tag=name, client_state={"step": step, "stream": stream_state}, save_latest=False)
    torch.save(ema.state(), folder / name / f"ema-{world.rank:05d}.pt")
    world.barrier()
    if world.is_main:
        write_atomically(folder / name / MARKER, json.dumps({"step": step, "processes": world.size}))
        _prune(folder, keep)
    world.barrier()


def load_checkpoint(folder: Path, engine, ema: ShardedEMA, world: World) -> dict | None:
    """Restore the newest complete checkpoint; its `step` and `stream`, or None where there is none. Collective."""
    path = newest(folder)
    if path is None:
        return None
    processes = json.loads((path / MARKER).read_text())["processes"]
    if processes != world.size:
        raise CheckpointError(f"{path} was written by {processes} processes and this run has {world.size}: start it with {processes}")
    _, client = engine.load_checkpoint(str(folder), tag=path.name)
    ema.restore(torch.load(path / f"ema-{world.rank:05d}.pt", map_location="cpu", weights_only=True))
    return {"step": client["step"], "stream": client["stream"]}


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`."""
    return max((marker.parent for marker in folder.glob(f"step-*/{MARKER}")), default=None)


def weights_hash(export: Path) -> str:
    """Identity of an export: sha256 of its weights."""
    with open(export / "weights.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _prune(folder: Path, keep: int) -> None:
    complete = sorted(marker.parent for marker in folder.glob(f"step-*/{MARKER}"))
    surplus = complete[:-keep] if keep else []
    # What an interrupted save left behind is older than the newest complete one, and of no use to anyone.
    halves = [p for p in folder.glob("step-*") if not (p / MARKER).exists() and p < complete[-1]]
    for path in (*surplus, *halves):
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)
