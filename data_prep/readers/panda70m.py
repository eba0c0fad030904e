"""Panda-70M: lists of videos (`panda70m_training_2m.csv` and the others) with times, captions and scores of their clips."""

from __future__ import annotations

import csv as csv_module
import os
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from data_prep.manifest import ManifestRow
from data_prep.readers.lines import read_lines, split_cells
from data_prep.readers.locate import locate_rows
from data_prep.readers.panda_clips import parse_clips
from data_prep.readers.rejects import ReaderError, Rejects
from data_prep.youtube import is_video_id

PATTERNS = (
    "{id}.mp4", "{id}.webm", "{id}.mkv",
    "{id}_{index}.mp4", "{id}_{index:05d}.mp4", "{shard:05d}/{row:07d}_{index:05d}.mp4",
)  # fmt: skip
"""Names in use: whole videos, then cut files; the last are those of the data set's own downloader."""
_ROWS_PER_SHARD = 100
"""Lines of the list that this downloader puts in one folder."""
_COLUMNS = ("videoID", "timestamp", "caption", "matching_score")
_LATER_COLUMNS = ("desirable_filtering", "shot_boundary_detection")


@dataclass(frozen=True, kw_only=True)
class ClipChoice:
    """Which clips of a video are wanted."""

    min_score: float | None = None
    """Least matching score; None for any."""
    classes: tuple[str, ...] | None = None
    """Values of `desirable_filtering`, such as ("desirable",); None for any."""
    clips_per_video: int | None = None
    """Most clips of one video: those with the highest scores; None for all."""
    min_seconds: float = 0.0
    """Least length."""
    max_seconds: float | None = None
    """Greatest length; None for any."""

    def __post_init__(self):
        if self.clips_per_video is not None and self.clips_per_video < 1:
            raise ValueError(f"clips_per_video is {self.clips_per_video}: choose 1 or more, or None for all")
        if self.min_seconds < 0:
            raise ValueError(f"min_seconds is {self.min_seconds}: choose a length of 0 or more")
        if self.max_seconds is not None and self.max_seconds <= self.min_seconds:
            raise ValueError(f"max_seconds is {self.max_seconds}: choose a length above min_seconds, {self.min_seconds}")

    def among(self, clips: list[ManifestRow]) -> list[ManifestRow]:
        """The wanted ones of a video's clips, in their order."""
        wanted = [clip for clip in clips if self._wants(clip)]
        best = sorted(wanted, key=lambda clip: clip.extra["matching_score"], reverse=True)[: self.clips_per_video]
        return sorted(best, key=lambda clip: clip.extra["clip"])

    def _wants(self, clip: ManifestRow) -> bool:
        seconds = round(clip.end - clip.start, 3)
        return (
            (self.min_score is None or clip.extra["matching_score"] >= self.min_score)
            and (self.classes is None or clip.extra.get("desirable") in self.classes)
            and self.min_seconds <= seconds
            and (self.max_seconds is None or seconds <= self.max_seconds)
        )


def read_panda70m(
    csv: str | os.PathLike[str],
    media: str | os.PathLike[str] | None = None,
    *,
    split: str = "train",
    choice: ClipChoice | None = None,
    patterns: Sequence[str] | None = None,
    rejects: Rejects | None = None,
) -> Iterator[ManifestRow]:
    """Rows for the clips of one of the data set's lists, in its order.

    `extra` holds video_id, clip (its place in the line, from 0), matching_score and, where the list has them, desirable (its class)
    and shots (start and end of each, seconds from the start of the clip).

    media     root of the files, found by `patterns` (fields id, split, start_ms, end_ms, index: the clip's place in its line,
              row: the line's place in the list, from 0, and shard: row // 100); None for addresses on YouTube.
    split     of all rows: a list does not tell which it is.
    choice    which of the clips are wanted; None for all.
    rejects   takes malformed lines, and malformed clips of other lines.
    """
    rejects = rejects or Rejects()
    lines = _lines(os.fspath(csv), split, choice, rejects)
    if media is None:
        for _, clips in lines:
            yield from clips
    else:
        pairs = ((_fields(number, clip), clip) for number, clips in lines for clip in clips)
        for located, clip in locate_rows(pairs, media, patterns or PATTERNS):
            yield replace(clip, source=located.source, **located.span(clip.start, clip.end))
    rejects.finish()


def _fields(number: int, clip: ManifestRow) -> dict[str, Any]:
    return {
        "id": clip.extra["video_id"], "split": clip.split, "index": clip.extra["clip"],
        "start_ms": round(clip.start * 1000), "end_ms": round(clip.end * 1000),
        "row": number, "shard": number // _ROWS_PER_SHARD,
    }  # fmt: skip


def _lines(url: str, split: str, choice: ClipChoice | None, rejects: Rejects) -> Iterator[tuple[int, list[ManifestRow]]]:
    """The wanted clips of each line, with its number."""
    lines = read_lines(url)
    columns = _Columns(*next(lines, (url, "")))
    if choice and choice.classes is not None and not columns.has_classes:
        raise ReaderError(f"{url}: no column {_LATER_COLUMNS[0]!r} to choose clips by; lists made since October 2024 have it")
    for number, (where, line) in enumerate(lines):
        try:
            video_id, *lists = columns.cells(line)
            clips, faults = parse_clips(video_id, split, lists)
        except ValueError as error:
            clips, faults = [], [str(error)]
        rejects.accept(len(clips))
        for fault in faults:
            rejects.reject(where, fault)
        yield number, choice.among(clips) if choice else clips


class _Columns:
    """Where the columns of a file are."""

    def __init__(self, where: str, header: str):
        names = [name.strip() for name in split_cells(header)] if header else []
        if missing := [name for name in _COLUMNS if name not in names]:
            raise ReaderError(f"{where}: no column {missing[0]!r}; the header of a list of Panda-70M names {', '.join(_COLUMNS)}")
        self.has_classes = _LATER_COLUMNS[0] in names
        self._count = len(names)
        self._pick = itemgetter(*(names.index(name) if name in names else -1 for name in _COLUMNS + _LATER_COLUMNS))

    def cells(self, line: str) -> tuple[Any, ...]:
        """The video's id and its lists; None for those that this file does not have."""
        cells: list[str | None] = _split_long_cells(line)
        if len(cells) != self._count:
            raise ValueError(f"{len(cells)} cells under a header of {self._count}")
        cells.append(None)
        picked = self._pick(cells)
        if not is_video_id(picked[0]):
            raise ValueError(f"videoID {reprlib.repr(picked[0])} is not that of a video: 11 letters, digits, '-' or '_'")
        return picked


def _split_long_cells(line: str) -> list[str]:
    """`split_cells` for cells beyond the limit of Python's csv, which holds for the whole process: the captions of a long video."""
    limit = csv_module.field_size_limit()
    if len(line) <= limit:
        return split_cells(line)
    csv_module.field_size_limit(len(line))
    try:
        return split_cells(line)
    finally:
        csv_module.field_size_limit(limit)
