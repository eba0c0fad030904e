"""Make the clips of manifest rows in worker processes: whatever is wrong with one costs that clip alone."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import TimeoutError as ClipTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from data_prep.filters import DROPPED, verdict
from data_prep.manifest import ManifestRow
from data_prep.media import ClipError, transcode
from data_prep.settings import PrepareConfig

_AHEAD = 4
"""Clips per worker under way or waiting to be written: bounds the memory, and a slow clip does not stop the others at once."""


@dataclass(frozen=True)
class Outcome:
    """What became of one row."""

    status: str
    reason: str | None
    columns: dict[str, Any]
    members: dict[str, bytes] = field(default_factory=dict)


def make_clips(rows: Iterable[ManifestRow], settings: PrepareConfig, workers: int) -> Iterator[tuple[ManifestRow, Outcome]]:
    """Make clips in worker processes, in order: a decoder that hangs or crashes is killed and costs one clip."""
    # Spawned: libraries behind fsspec do not survive a fork.
    pool = ProcessPool(max_workers=workers, context=get_context("spawn"))
    ahead: deque[tuple[ManifestRow, ProcessFuture]] = deque()
    try:
        for row in rows:
            ahead.append((row, pool.schedule(make_clip, args=[row, settings], timeout=settings.clip_timeout)))
            if len(ahead) >= _AHEAD * workers:
                yield _collect(*ahead.popleft(), settings)
        while ahead:
            yield _collect(*ahead.popleft(), settings)
    finally:
        pool.stop()
        pool.join()


def _collect(row: ManifestRow, future: ProcessFuture, settings: PrepareConfig) -> tuple[ManifestRow, Outcome]:
    try:
        return row, future.result()
    except ClipTimeout:
        return row, _failure(row, "timeout", f"no result within {settings.clip_timeout:g} s")
    except ProcessExpired as error:
        return row, _failure(row, "crashed", f"the process that decoded it ended with code {error.exitcode}")
    except BrokenProcessPool as error:
        problem = "the worker processes end before they begin"
        raise RuntimeError(f"{problem}: a script must call prepare_shards below `if __name__ == '__main__':`") from error


def make_clip(row: ManifestRow, settings: PrepareConfig) -> Outcome:
    """Make one clip; what is wrong with it comes back as an outcome, never as an exception."""
    columns = row_columns(row)
    try:
        clip = transcode(_located(row.source, settings.media_root), row.start, row.end, settings.format)
    except ClipError as error:
        return _failure(row, error.reason, str(error))
    except Exception as error:  # libraries raise all sorts for bytes they did not expect: that is one clip's fate, not the run's
        return _failure(row, "error", f"{type(error).__name__}: {error}")
    columns |= clip.columns()
    if reason := verdict(columns, settings.filters):
        return Outcome("dropped", reason, columns)
    described = {"key": row.key, "split": row.split, **columns, "extra": row.extra}
    return Outcome("ok", None, columns, {"mp4": clip.mp4, "flac": clip.flac, "json": json.dumps(described, sort_keys=True).encode()})


def row_columns(row: ManifestRow) -> dict[str, Any]:
    """The manifest's part of a sidecar row."""
    columns = asdict(row) | {"extra": json.dumps(row.extra, sort_keys=True, ensure_ascii=False)}
    return {name: value for name, value in columns.items() if name not in ("key", "split")}


def _failure(row: ManifestRow, reason: str, message: str) -> Outcome:
    return Outcome("dropped" if reason in DROPPED else "failed", reason, row_columns(row) | {"message": message})


def _located(source: str, media_root: str) -> str:
    return source if not media_root or "://" in source or source.startswith("/") else f"{media_root.rstrip('/')}/{source}"
