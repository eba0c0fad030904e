"""Make the clips of manifest rows in worker processes: whatever is wrong with one costs that clip alone."""

from __future__ import annotations

import json
import posixpath
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import TimeoutError as ClipTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from data_prep.downloads.download import DownloadConfig, Downloader
from data_prep.filters import DROPPED, verdict
from data_prep.limits import MEMORY_EXIT, limit_memory, memory_watched
from data_prep.manifest import ManifestRow
from data_prep.media import ClipError, transcode
from data_prep.remote.urls import redacted
from data_prep.settings import PrepareConfig

_AHEAD = 4
"""Clips per worker under way or waiting to be written: bounds the memory, and a slow clip does not stop the others at once."""

_CLIPS_PER_PROCESS = 500


@dataclass(frozen=True)
class Outcome:
    """What became of one row."""

    status: str
    reason: str | None
    columns: dict[str, Any]
    members: dict[str, bytes] = field(default_factory=dict)


def make_clips(rows: Iterable[ManifestRow], settings: PrepareConfig, workers: int) -> Iterator[tuple[ManifestRow, Outcome]]:
    """Make clips in worker processes, in order: a decoder that hangs, crashes or takes too much memory is killed and costs one clip."""
    # Spawned: libraries behind fsspec do not survive a fork.
    # Renewed now and then: what libraries leak must not be charged to a clip.
    start = {"initializer": _begin, "initargs": [settings.clip_memory_mb]}
    pool = ProcessPool(workers, max_tasks=_CLIPS_PER_PROCESS, context=get_context("spawn"), **start)
    ahead: deque[tuple[ManifestRow, ProcessFuture]] = deque()
    try:
        for row in rows:
            ahead.append((row, pool.schedule(make_clip, args=[row, settings], timeout=_seconds(row, settings))))
            if len(ahead) >= _AHEAD * workers:
                yield _collect(*ahead.popleft(), settings)
        while ahead:
            yield _collect(*ahead.popleft(), settings)
    finally:
        pool.stop()
        pool.join()


def _begin(memory_mb: int) -> None:
    limit_memory(memory_mb)  # from here, so that this module's libraries are in memory already and do not count


def _collect(row: ManifestRow, future: ProcessFuture, settings: PrepareConfig) -> tuple[ManifestRow, Outcome]:
    try:
        return row, future.result()
    except ClipTimeout:
        return row, _failure(row, "timeout", f"no result within {_seconds(row, settings):g} s")
    except ProcessExpired as error:
        if error.exitcode == MEMORY_EXIT:
            return row, _failure(row, "memory", f"it takes more than clip_memory_mb, {settings.clip_memory_mb} MB")
        return row, _failure(row, "crashed", f"the process that decoded it ended with code {error.exitcode}")
    except BrokenProcessPool as error:
        hint = "where that is at their start, a script must call prepare_shards below `if __name__ == '__main__':`"
        raise RuntimeError(f"the worker processes end by themselves ({error}); {hint}") from error
    except Exception as error:  # an outcome that cannot be sent, or the like
        return row, _failure(row, "error", f"{type(error).__name__}: {error}")


def make_clip(row: ManifestRow, settings: PrepareConfig) -> Outcome:
    """Make one clip; what is wrong with it comes back as an outcome, never as an exception."""
    try:
        with memory_watched():
            return _made(row, settings)
    except ClipError as error:
        return _failure(row, error.reason, str(error))
    except MemoryError:
        return _failure(row, "memory", f"it takes more than clip_memory_mb, {settings.clip_memory_mb} MB")
    except Exception as error:  # libraries raise all sorts for bytes they did not expect: that is one clip's fate, not the run's
        return _failure(row, "error", f"{type(error).__name__}: {error}")


def _made(row: ManifestRow, settings: PrepareConfig) -> Outcome:
    columns = row_columns(row)
    clip = transcode(_located(row.source, settings), row.start, row.end, settings.format)
    described = {"key": row.key, "split": row.split, **columns, **clip.described(), "extra": json.loads(columns["extra"])}
    columns |= clip.columns()
    if reason := verdict(columns, settings.filters):
        return Outcome("dropped", reason, columns)
    return Outcome("ok", None, columns, {"mp4": clip.mp4, "flac": clip.flac, "json": json.dumps(described, sort_keys=True).encode()})


def row_columns(row: ManifestRow) -> dict[str, Any]:
    """The manifest's part of a sidecar row."""
    # A signed URL opens its file to whoever reads the sidecar.
    extra = redacted(json.dumps(row.extra, sort_keys=True, ensure_ascii=False))
    columns = asdict(row) | {"extra": extra, "source": redacted(row.source)}
    return {name: value for name, value in columns.items() if name not in ("key", "split")}


def _failure(row: ManifestRow, reason: str, message: str) -> Outcome:
    return Outcome("dropped" if reason in DROPPED else "failed", reason, row_columns(row) | {"message": redacted(message)})


def _located(source: str, settings: PrepareConfig) -> str:
    """The path or URL to read a source from, downloaded first where that is asked for; ClipError where it leads out of the root."""
    if _is_web(source) and settings.download is not None:
        return str(_downloader(settings.download).fetch(source))
    if not settings.media_root or "://" in source or source.startswith("/"):
        return source
    if posixpath.normpath(source).split("/")[0] == "..":
        raise ClipError("unreadable", f"{source}: leads out of media_root {settings.media_root}; mend the manifest")
    return f"{settings.media_root.rstrip('/')}/{source}"


@cache
def _downloader(config: DownloadConfig) -> Downloader:
    """One per process: to make it reads the cookies and tries the folder."""
    return Downloader(config)


def _is_web(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def _seconds(row: ManifestRow, settings: PrepareConfig) -> float:
    """The time limit of a row: that of a download comes on top."""
    downloads = _is_web(row.source) and settings.download is not None
    return settings.clip_timeout + (settings.download.time_limit + settings.download.timeout if downloads else 0.0)
