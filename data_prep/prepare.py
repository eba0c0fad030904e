"""From a manifest to clip shards: cut, transcode, filter, write. Any task may be killed, repeated or run twice at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as ClipTimeout
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
from pebble import ProcessExpired, ProcessPool

from data_prep.filters import DROPPED, FilterConfig, verdict
from data_prep.index import ShardSet, build_index
from data_prep.manifest import ManifestRow, manifest_hash, read_manifest
from data_prep.media import ClipError, ClipFormat, transcode
from data_prep.shards import ShardWriter, shard_name
from data_prep.storage import Folder

SETTINGS_FILE = "settings.json"
BYTES_PER_SECOND = 60_000
"""Guess of a clip's size at 256 pixels, video and FLAC together, from which the rows per shard are chosen."""


class PrepareError(ValueError):
    """Settings that do not fit what is already in the folder; the message says how they differ."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How a manifest becomes shards."""

    format: ClipFormat = field(default_factory=ClipFormat)
    """Pictures and audio."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which clips are kept."""
    rows_per_shard: int | None = None
    """Manifest rows per shard; by default as many as fill `shard_mb`."""
    shard_mb: int = 256
    """Design size of a shard, MB."""
    seed: int = 0
    """Seed of the global shuffle: clips of one source must not stay neighbours."""
    clip_timeout: float = 120.0
    """Seconds after which a clip's decoder is killed; that clip fails, the shard goes on."""


@dataclass(frozen=True)
class Summary:
    """What one task did."""

    shards: int
    """Shards written now."""
    skipped: int
    """Shards that were there already."""
    ok: int
    """Clips kept."""
    dropped: int
    """Clips that a filter dropped."""
    failed: int
    """Clips that could not be made."""

    def __str__(self):
        return f"{self.shards} shards written, {self.skipped} there already; clips: {self.ok} kept, {self.dropped} dropped, {self.failed} failed"


@dataclass(frozen=True)
class ShardPlan:
    """The rows of one shard."""

    number: int
    split: str
    rows: list[ManifestRow]


@dataclass(frozen=True)
class Outcome:
    """What became of one row."""

    status: str
    reason: str | None
    columns: dict[str, Any]
    members: dict[str, bytes] = field(default_factory=dict)


def prepare_shards(manifest: str, out: str, config: PrepareConfig, task: tuple[int, int] = (0, 1), workers: int = 2,
                   progress: Callable[[int, int], None] | None = None) -> Summary:
    """Write the shards of `task` = (i, n): i, i + n, ... A shard whose sidecar is there is skipped. The only task also writes the index.

    `progress` is told (shards done, shards to do). PrepareError where the folder holds shards of other settings.
    """
    rows = read_manifest(manifest)
    plans = plan_shards(rows, config)
    folder = Folder(out)
    _check_settings(folder, {"manifest": manifest_hash(manifest), "shards": len(plans), **asdict(config)})
    mine = plans[task[0]::task[1]]
    present = folder.sizes()
    wanted = [plan for plan in mine if f"{shard_name(plan.number)}.parquet" not in present]
    counts = {"ok": 0, "dropped": 0, "failed": 0}
    for done, (plan, outcomes) in enumerate(_process(wanted, config, workers)):
        with ShardWriter(out, plan.number, plan.split) as writer:
            for row, outcome in zip(plan.rows, outcomes, strict=True):
                counts[outcome.status] += 1
                if outcome.status == "ok":
                    writer.add(row.key, outcome.members, **outcome.columns)
                else:
                    writer.skip(row.key, outcome.status, outcome.reason, **outcome.columns)
        if progress:
            progress(done + 1, len(wanted))
    if task[1] == 1:
        index_shards(out)
    return Summary(len(wanted), len(mine) - len(wanted), **counts)


def index_shards(out: str) -> ShardSet:
    """Write the index of a folder whose tasks are all done; an error names the shards that are missing."""
    try:
        settings = json.loads(Folder(out).read(SETTINGS_FILE))
    except FileNotFoundError:
        raise PrepareError(f"{out}: no {SETTINGS_FILE} here; make shards with `foleyscale prep shards` first") from None
    return build_index(out, settings, expected=settings["shards"])


def plan_shards(rows: list[ManifestRow], config: PrepareConfig) -> list[ShardPlan]:
    """Deal the rows of each split, shuffled by the seed, to shards of equal length: a pure function of its arguments."""
    size = config.rows_per_shard or _rows_per_shard(rows, config)
    plans: list[ShardPlan] = []
    for split in sorted({row.split for row in rows}):
        members = sorted((row for row in rows if row.split == split), key=lambda row: row.key)
        order = np.random.default_rng(config.seed).permutation(len(members))
        for part in np.array_split(order, -(-len(members) // size)):
            plans.append(ShardPlan(len(plans), split, [members[i] for i in part]))
    return plans


def _rows_per_shard(rows: list[ManifestRow], config: PrepareConfig) -> int:
    known = [row.end - row.start for row in rows if row.end is not None] or [10.0]
    seconds = min(float(np.mean(known)), config.format.max_seconds or np.inf)
    bytes_per_clip = seconds * BYTES_PER_SECOND * max(0.25, (config.format.short_side / 256) ** 2)
    return max(1, int(config.shard_mb * 1e6 / bytes_per_clip))


def _check_settings(folder: Folder, settings: dict) -> None:
    settings = json.loads(json.dumps(settings))
    try:
        known = json.loads(folder.read(SETTINGS_FILE))
    except FileNotFoundError:
        folder.write(SETTINGS_FILE, json.dumps(settings, indent=1).encode())
        return
    changed = [name for name in settings if known.get(name) != settings[name]]
    if changed:
        raise PrepareError(f"{folder.url} holds shards made with another {', '.join(changed)}: choose another folder, or the same settings")


def _process(plans: list[ShardPlan], config: PrepareConfig, workers: int) -> Iterator[tuple[ShardPlan, list[Outcome]]]:
    """Outcomes shard by shard; the next shard's clips are already under way while one is written."""
    # Processes, not threads: a decoder that hangs or crashes can be killed, and costs one clip.
    with ProcessPool(max_workers=workers, context=get_context("spawn")) as pool:
        def start(plan: ShardPlan) -> list:
            return [pool.schedule(make_clip, args=[row, config], timeout=config.clip_timeout) for row in plan.rows]

        ahead = [(plan, start(plan)) for plan in plans[:2]]
        for number in range(len(plans)):
            plan, futures = ahead.pop(0)
            outcomes = [_collect(future, row, config) for future, row in zip(futures, plan.rows, strict=True)]
            ahead += [(later, start(later)) for later in plans[number + 2:number + 3]]
            yield plan, outcomes


def _collect(future, row: ManifestRow, config: PrepareConfig) -> Outcome:
    try:
        return future.result()
    except ClipTimeout:
        return Outcome("failed", "timeout", row_columns(row) | {"message": f"no result within {config.clip_timeout:g} s"})
    except ProcessExpired as error:
        return Outcome("failed", "crashed", row_columns(row) | {"message": f"the decoder's process ended with code {error.exitcode}"})


def make_clip(row: ManifestRow, config: PrepareConfig) -> Outcome:
    """Make one clip; what is wrong with it comes back as an outcome, never as an exception."""
    columns = row_columns(row)
    try:
        clip = transcode(row.source, row.start, row.end, config.format)
    except ClipError as error:
        status = "dropped" if error.reason in DROPPED else "failed"
        return Outcome(status, error.reason, columns | {"message": str(error)})
    columns |= clip.columns()
    if reason := verdict(columns, config.filters):
        return Outcome("dropped", reason, columns)
    described = {"key": row.key, **columns, "extra": row.extra}
    return Outcome("ok", None, columns, {"mp4": clip.mp4, "flac": clip.flac, "json": json.dumps(described, sort_keys=True).encode()})


def row_columns(row: ManifestRow) -> dict[str, Any]:
    """The manifest's part of a sidecar row."""
    columns = asdict(row) | {"extra": json.dumps(row.extra, sort_keys=True)}
    return {name: value for name, value in columns.items() if name not in ("key", "split")}
