"""From a manifest to clip shards: cut, transcode, filter, write. Any task may be killed, repeated or run twice at once."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from data_prep.clips import Outcome, make_clips
from data_prep.downloads.download import Downloader
from data_prep.index import ShardSet, build_index
from data_prep.layout import SETTINGS_FILE, read_json
from data_prep.manifest import Manifest, ManifestRow
from data_prep.media import ClipFormat
from data_prep.parallel import in_order
from data_prep.plan import ShardPlan, Survey, plan_shards, rows_of, walks
from data_prep.settings import PrepareConfig
from data_prep.shards import ShardWriter, shard_name
from data_prep.sidecar import read_sidecar
from data_prep.storage import Folder

Progress = Callable[[int, int], None]
_USUAL_SECONDS = 10.0
_ROWS_AT_ONCE = 1 << 16
"""Rows of the manifest held in memory: shards of as many are found in one walk over it."""
_TELLING = 8
"""Rows of a shard from which on it is no accident that all of them fail for a reason outside the media."""
_OUTSIDE = ("missing", "unreadable", "timeout", "crashed", "memory", "error", "blocked", "network", "too_slow")

_FAILURES = (*_OUTSIDE, "undecodable", "no_video", "too_large", "private", "removed", "restricted", "unavailable", "not_media")


class PrepareError(ValueError):
    """Shards that cannot be made as asked; the message says why and what to do."""


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
    worse: int
    """Shards that were to be made again and would have lost clips: the old ones stay."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Reason -> clips dropped or failed."""

    def __str__(self):
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.items())
        clips = f"{self.ok} kept, {self.dropped} dropped, {self.failed} failed" + (f" ({reasons})" if reasons else "")
        worse = f"; {self.worse} left as they were, because clips of theirs could not be made again" if self.worse else ""
        return f"{self.shards} shards written, {self.skipped} there already{worse}; clips: {clips}"


def prepare_shards(
    manifest_url: str | os.PathLike[str],
    out_url: str | os.PathLike[str],
    settings: PrepareConfig,
    *,
    task: tuple[int, int] = (0, 1),
    workers: int = 2,
    redo: Collection[str] = (),
    progress: Progress | None = None,
) -> Summary:
    """Write the shards i, i + n, ... of task (i, n). A shard whose sidecar is there is skipped; the only task also writes the index.

    Shards with clips that failed for one of the reasons `redo`, such as "network", are made again. `progress` is told (rows done,
    rows to do). PrepareError where the folder holds shards of other settings.
    """
    index, count = task
    if unknown := set(redo) - set(_FAILURES):
        raise ValueError(f"redo: no clip fails for {min(unknown)!r}; choose from {', '.join(_FAILURES)}")
    if not 0 <= index < count or workers < 1:
        raise ValueError(f"prepare_shards: task is {task}, workers {workers}: need task (i, n) with 0 <= i < n, and workers >= 1")
    folder = Folder(out_url)
    if settings.download is not None:
        Downloader(settings.download)  # what is wrong with its settings is one error here, not one for each clip
    with Manifest(manifest_url) as manifest:
        survey = Survey.of(manifest)
        rows_per_shard = settings.rows_per_shard or _rows_per_shard(survey.mean_seconds, settings)
        plans = plan_shards(survey.counts, rows_per_shard)
        _claim(folder, _record(survey, settings, rows_per_shard, len(plans)))
        present, mine = folder.sizes(), plans[index::count]
        there = [plan for plan in mine if f"{shard_name(plan.number)}.parquet" in present]
        done = set(there) - _failed(folder, there, redo)
        todo = [plan for plan in mine if plan not in done]
        counts, worse = _write_shards(folder, _rows(manifest, survey, todo, settings.seed), todo, settings, workers, progress)
    if count == 1:
        index_shards(folder.url)
    reasons = {reason: number for (_, reason), number in counts.most_common() if reason}
    totals = {status: sum(number for (kind, _), number in counts.items() if kind == status) for status in ("ok", "dropped", "failed")}
    return Summary(len(todo) - worse, len(mine) - len(todo), **totals, worse=worse, reasons=reasons)


def index_shards(out_url: str | os.PathLike[str]) -> ShardSet:
    """Write the index of a folder whose tasks are all done; an error names the shards that are missing."""
    try:
        settings = read_json(Folder(out_url), SETTINGS_FILE)
    except FileNotFoundError:
        raise PrepareError(f"{out_url}: no {SETTINGS_FILE} here; make shards with `foleyscale prep shards` first") from None
    return build_index(out_url, settings, expected=settings["shards"])


def bytes_per_second(format: ClipFormat) -> float:
    """Estimate of what a second of a clip takes, measured on public clips of street, music and film: within a factor of 1.5."""
    video = 65e3 * (format.short_side / 256) ** 1.5 * (format.fps / 25) ** 0.5 * 2 ** ((23 - format.crf) / 6)
    return video * (9 / 16 if format.crop else 1) + 1.5 * format.sample_rate


def _rows_per_shard(mean_seconds: float | None, settings: PrepareConfig) -> int:
    # Of clips that go to the end of their file nothing is known without opening it.
    seconds = min(mean_seconds or _USUAL_SECONDS, settings.format.max_seconds or math.inf)
    return max(1, round(settings.shard_mb * 1e6 / (seconds * bytes_per_second(settings.format))))


def _record(survey: Survey, settings: PrepareConfig, rows_per_shard: int, shards: int) -> dict[str, Any]:
    """All that decides what is in the shards, and nothing else: the rest may change between runs."""
    chosen = {name: value for name, value in asdict(settings).items() if name in ("format", "filters", "seed")}
    table = {"manifest": survey.hash, "keys": survey.keys, "rows": survey.rows}
    return json.loads(json.dumps({**table, "shards": shards, "rows_per_shard": rows_per_shard, **chosen}))


def _claim(folder: Folder, record: dict[str, Any]) -> None:
    """Leave the settings in the folder, or compare with those that are there: shards of two settings must not mix."""
    try:
        known = read_json(folder, SETTINGS_FILE)
    except FileNotFoundError:
        folder.write(SETTINGS_FILE, json.dumps(record, indent=1).encode() + b"\n")
        return
    old, new = _flat(known), _flat(record)
    if changed := [f"{name} {old.get(name)} (now {new.get(name)})" for name in old | new if old.get(name) != new.get(name)]:
        remedy = f"choose another folder or the same settings, or delete {SETTINGS_FILE} where there are no shards yet"
        raise PrepareError(f"{folder.url} holds shards made with {', '.join(changed)}: {remedy}")


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    pairs = (_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value} for name, value in record.items())
    return {name: value for pair in pairs for name, value in pair.items()}


def _rows(manifest: Manifest, survey: Survey, plans: list[ShardPlan], seed: int) -> Iterator[ManifestRow]:
    """The rows of all these shards, one after the other."""
    for group in walks(plans, _ROWS_AT_ONCE):
        numbers = [rows_of(plan, survey, seed) for plan in group]
        rows = manifest.take(np.concatenate(numbers))
        yield from (rows[number] for shard in numbers for number in shard.tolist())


def _write_shards(
    folder: Folder,
    rows: Iterator[ManifestRow],
    plans: list[ShardPlan],
    settings: PrepareConfig,
    workers: int,
    progress: Progress | None,
) -> tuple[Counter[tuple[str, str | None]], int]:
    """Clips by status and reason, and how many shards were left as they were."""
    counts: Counter[tuple[str, str | None]] = Counter()
    total, worse = sum(map(len, plans)), len(plans)
    # One stream through all shards: the clips of the next are under way while one is completed.
    with contextlib.closing(make_clips(rows, settings, workers)) as outcomes:
        for plan in plans:
            with contextlib.suppress(_Worse), ShardWriter(folder.url, plan.number, plan.split) as writer:
                told, good = Counter[tuple[str, str | None]](), set[str]()
                for row, outcome in islice(outcomes, len(plan)):
                    _put(writer, row, outcome)
                    told[outcome.status, outcome.reason] += 1
                    good |= {row.key} if outcome.status == "ok" else set()
                    if progress:
                        progress(counts.total() + told.total(), total)
                _check_shard(folder, plan, told, outcome)
                if _good_keys(folder, plan) - good:
                    raise _Worse
                worse -= 1
            counts += told
    return counts, worse


class _Worse(Exception):
    """A shard that is there has clips that could not be made now."""


def _failed(folder: Folder, plans: Sequence[ShardPlan], reasons: Collection[str]) -> set[ShardPlan]:
    """Those of the shards, all of which are there, that have clips which failed for one of the reasons."""
    if not reasons:
        return set()
    fates = in_order(lambda plan: any(status == "failed" and reason in reasons for _, status, reason in _fates(folder, plan)), plans)
    return {plan for plan, failed in zip(plans, fates, strict=True) if failed}


def _good_keys(folder: Folder, plan: ShardPlan) -> set[str]:
    """Keys of the clips in a shard that is there, none where it is not."""
    try:
        return {key for key, status, _ in _fates(folder, plan) if status == "ok"}
    except FileNotFoundError:
        return set()


def _fates(folder: Folder, plan: ShardPlan) -> Iterator[tuple[str, str, str | None]]:
    table = read_sidecar(folder, shard_name(plan.number))
    return zip(*(table[name].to_pylist() for name in ("key", "status", "reason")), strict=True)


def _put(writer: ShardWriter, row: ManifestRow, outcome: Outcome) -> None:
    if outcome.status == "ok":
        writer.add(row.key, outcome.members, **outcome.columns)
    else:
        writer.skip(row.key, outcome.status, outcome.reason or "", **outcome.columns)


def _check_shard(folder: Folder, plan: ShardPlan, told: Counter[tuple[str, str | None]], last: Outcome) -> None:
    """Refuse to write a shard of nothing but outside failures: a mistyped root or a disk that went away is to be mended, not recorded."""
    if len(plan) >= _TELLING and all(status == "failed" and reason in _OUTSIDE for status, reason in told):
        where = f"{folder.url}/{shard_name(plan.number)}"
        raise PrepareError(
            f"{where}: none of its {len(plan)} clips could be made, the last because of: {last.columns['message']}. Mend the cause "
            "(media_root, credentials, network) and run again, or take these rows out of the manifest"
        )
