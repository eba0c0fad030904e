"""Shards made from shards, shared by the processes of a run: number n by process n mod world size, resumable by shard."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from data_prep.index import ShardSet, build_index
from data_prep.layout import DATASET_FILE
from data_prep.shards import ShardWriter
from data_prep.stream import BadClip, Batch, shard_passes
from data_prep.streaming.reading import Decode
from pipelines.engine.signals import leave_alone_if_asked
from pipelines.engine.watchdog import beat
from pipelines.engine.world import World

_TICK = 1.0
"""Seconds between two looks at what the other processes have written."""
_KEPT = "the shards that are whole are kept"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """How shards are made from shards."""

    decode: Decode
    """Reads a clip of the source, as in data_prep.decoding."""
    batch_size: int
    write: Callable[[ShardWriter, Iterator[Batch]], None]
    """Adds what it makes of all the batches of one shard; it keeps nothing from one shard to the next that would change a byte."""
    workers: int = 0
    """Processes that decode ahead."""
    clip_timeout: float = 60.0
    """Seconds that a clip may decode in one of them."""


def make_shards(source: ShardSet, folder: Path, world: World, label: str, settings: dict[str, Any], start: Callable[[], Work]) -> ShardSet:
    """Make a shard of `folder` for each of `source`, then the index with `settings`; those that are there stay. Collective.

    `start` loads what the work needs, and is called where there is work only. Clips that are no good are recorded as failed.
    What a shard holds does not depend on the process: any number of processes leaves the same bytes.
    """
    paths = [folder / f"{name}.parquet" for name in source.shards.column("name").to_pylist()]
    wanted = [place for place in range(world.rank, len(paths), world.size) if not paths[place].exists()]
    if world.is_main and wanted and world.size > len(paths):
        _log.warning("%s: %d shards for %d processes, some of them wait; clip shards with fewer rows share better",
                     label, len(paths), world.size)
    beat(f"{label}, loading what makes them")
    if wanted:
        # An index of fewer shards must not pass for the whole, should this end between the last shard and the new index.
        (folder / DATASET_FILE).unlink(missing_ok=True)
        _make(source, wanted, folder, label, start(), quiet=not world.is_main)
    # The others are awaited by their files: a process that waits in a collective cannot leave when it is asked to.
    while paths := [path for path in paths if not path.exists()]:
        leave_alone_if_asked(_KEPT)
        beat(f"{label}, {len(paths)} shards of other processes to come")  # theirs to end, should one of them hang
        time.sleep(_TICK)
    beat(f"{label}, index")
    # An index over many shards takes a while, and rounds come back to the same ones.
    anew = world.any(bool(wanted) or not (folder / DATASET_FILE).exists())
    if anew and world.is_main:
        build_index(str(folder), settings)
    world.barrier()
    return ShardSet.open(folder)


def _make(source: ShardSet, places: list[int], folder: Path, label: str, work: Work, quiet: bool) -> None:
    """The shards at `places` of the source."""
    passes = shard_passes(source.select(places), work.decode, work.batch_size, work.workers, work.clip_timeout)
    with contextlib.closing(passes):
        for place, batches in zip(track(places, label, console=Console(stderr=True), disable=quiet), passes, strict=True):
            leave_alone_if_asked(_KEPT)
            beat(f"{label}, shard {place + 1} of {len(source.shards)}")
            info, bad = source.shards[place], []
            with ShardWriter(folder, info.number, split=info.split) as writer:
                work.write(writer, _good(batches, bad))
                _record_bad(writer, bad)


def _good(batches: Iterator[tuple[Batch, list[BadClip]]], bad: list[BadClip]) -> Iterator[Batch]:
    """The batches that hold a clip; the others' and theirs that are no good are added to `bad`."""
    for batch, found in batches:
        beat()
        bad += found
        if batch["key"]:
            yield batch


def _record_bad(writer: ShardWriter, bad: list[BadClip]) -> None:
    """Record clips that are no good as failed. OSError where storage did not give one: it may the next time, and the shard is made then."""
    for clip in bad:
        if clip.reason == "unreadable":
            raise OSError(f"{clip.message}: see to the storage and run again, {writer.name} is made then")
        writer.skip(clip.key, "failed", clip.reason, message=clip.message)
