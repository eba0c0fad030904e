"""Shards made from shards, shared by the processes of a run: number n by process n mod world size, resumable by shard."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from data_prep.index import ShardSet, build_index
from data_prep.layout import DATASET_FILE
from data_prep.shards import ShardWriter
from data_prep.stream import BadClip
from pipelines.engine.signals import leave_alone_if_asked
from pipelines.engine.watchdog import beat
from pipelines.engine.world import World

_TICK = 1.0
"""Seconds between two looks at what the other processes have written."""
_KEPT = "the shards that are whole are kept"
_log = logging.getLogger(__name__)


def make_shards(source: ShardSet, folder: Path, world: World, label: str, settings: dict[str, Any],
                start: Callable[[], Callable[[int], None]]) -> ShardSet:
    """Make a shard of `folder` for each of `source`, then the index with `settings`; those that are there stay. Collective.

    `start` loads what the work needs, and is called where there is work only; it returns what writes the shard at a place of `source`.
    What a shard holds must not depend on the process: then any number of processes leaves the same bytes.
    """
    paths = [folder / f"{name}.parquet" for name in source.shards.column("name").to_pylist()]
    wanted = [place for place in range(world.rank, len(paths), world.size) if not paths[place].exists()]
    if world.is_main and wanted and world.size > len(paths):
        _log.warning("%s: %d shards for %d processes, some of them wait; clip shards with fewer rows share better",
                     label, len(paths), world.size)
    beat(f"{label}, loading what makes them")
    write = start() if wanted else None
    for place in track(wanted, label, console=Console(stderr=True), disable=not world.is_main or not wanted):
        leave_alone_if_asked(_KEPT)
        beat(f"{label}, shard {place + 1} of {len(source.shards)}")
        write(place)
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


def record_bad(writer: ShardWriter, bad: Sequence[BadClip]) -> None:
    """Record clips that are no good as failed. OSError where storage did not give one: it may the next time, and the shard is made then."""
    for clip in bad:
        if clip.reason == "unreadable":
            raise OSError(f"{clip.message}: see to the storage and run again, {writer.name} is made then")
        writer.skip(clip.key, "failed", clip.reason, message=clip.message)
