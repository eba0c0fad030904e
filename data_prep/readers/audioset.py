"""AudioSet: its lists of segments (`balanced_train_segments.csv` and the others), with the names of the classes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from data_prep.manifest import ManifestRow
from data_prep.readers.lines import read_lines, split_cells
from data_prep.readers.locate import locate_rows
from data_prep.readers.ontology import Classes
from data_prep.readers.rejects import ReaderError, Rejects
from data_prep.youtube import is_video_id

_CUT = ("{id}_{start_ms}_{end_ms}.mp4", "{id}_{start:06d}.mp4", "{id}_{start}_{end}.mp4", "Y{id}.mp4")
_WHOLE = ("{id}.mp4", "{id}.mkv", "{id}.webm")
PATTERNS = tuple(
    f"{kind}:{folder}{name}" for folder in ("", "{list}/") for kind, names in (("cut", _CUT), ("whole", _WHOLE)) for name in names
)
"""Names in use, below the root or below a folder named as the list."""
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]+)?")
_COUNT = re.compile(r"(num_\w+)=(\d+)")


class _Segment(NamedTuple):
    video_id: str
    start: float
    end: float
    label_ids: list[str]


def read_audioset(
    segments: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    labels: str | os.PathLike[str] | None,
    media: str | os.PathLike[str] | None = None,
    *,
    ontology: str | os.PathLike[str] | None = None,
    ancestors: bool = False,
    split: str | None = None,
    patterns: Sequence[str] | None = None,
    rejects: Rejects | None = None,
) -> Iterator[ManifestRow]:
    """Rows for the segments of one list or of several, in their order; `labels` are names, `extra["label_ids"]` the ids.

    labels     `class_labels_indices.csv`; may be None where there is `ontology` (`ontology.json`).
    media      root of the files, found by `patterns` (fields id, split, list: the list's name without extension, start and end in
               whole seconds, start_ms, end_ms); None for addresses on YouTube.
    ancestors  add the names of all classes above a segment's own, by the ontology.
    split      of all rows; by default "train" for a list with "train" in its name and "test" for one with "eval".
    rejects    takes the malformed rows. The counts in the head of a list are compared with its rows when all are read;
               ReaderError where they differ.
    """
    if ancestors and ontology is None:
        raise ReaderError("the classes above others are told by ontology.json: give it (--ontology)")
    rejects, classes = rejects or Rejects(), Classes.read(labels, ontology)
    urls = [segments] if isinstance(segments, (str, os.PathLike)) else segments
    rows = (row for url in map(os.fspath, urls) for row in _rows(url, split or _split_of(url), classes, rejects))
    for located, (segment, part) in locate_rows(rows, media, patterns or PATTERNS):
        ids = classes.with_ancestors(segment.label_ids) if ancestors else segment.label_ids
        yield ManifestRow(
            key=f"audioset_{segment.video_id}_{round(segment.start * 1000)}",
            dataset="audioset",
            split=part,
            source=located.source,
            **located.span(segment.start, segment.end),
            labels=list(dict.fromkeys(classes.names[label] for label in ids)),
            extra={"video_id": segment.video_id, "label_ids": segment.label_ids},
        )
    rejects.finish()


def _rows(url: str, split: str, classes: Classes, rejects: Rejects) -> Iterator[tuple[dict[str, Any], tuple[_Segment, str]]]:
    counts, before = _Counts(url), rejects.rejected
    for segment in rejects.sift(counts.without_head(read_lines(url)), partial(_parse, classes=classes)):
        counts.add(segment)
        yield _fields(segment) | {"split": split, "list": _name(url)}, (segment, split)
    counts.check(rejects.rejected - before)


def _fields(segment: _Segment) -> dict[str, Any]:
    milliseconds = {"start_ms": round(segment.start * 1000), "end_ms": round(segment.end * 1000)}
    return {"id": segment.video_id, "start": int(segment.start), "end": int(segment.end)} | milliseconds


def _name(url: str) -> str:
    return url.rsplit("/", 1)[-1].split(".")[0]


def _split_of(url: str) -> str:
    parts = {"train": "train", "eval": "test"}
    named = [part for word, part in parts.items() if word in _name(url)]
    if len(named) != 1:
        raise ReaderError(f"{url}: the name holds neither 'train' nor 'eval' alone, and so tells no split: give one with --split")
    return named[0]


def _parse(line: str, classes: Classes) -> _Segment:
    cells = [cell.strip() for cell in split_cells(line, skip_space=True)]
    if len(cells) != 4:
        raise ReaderError(f"{len(cells)} cells, four are expected: id, start, end, labels (in quotes)")
    video_id, start, end = cells[0], cells[1], cells[2]
    if len(video_id) == 12 and video_id[0] == "Y":  # lists made from the names of audio files, which may not begin with '-'
        video_id = video_id[1:]
    if not is_video_id(video_id):
        raise ReaderError(f"id {video_id!r} is not that of a video: 11 letters, digits, '-' or '_'")
    if not (_SECONDS.fullmatch(start) and _SECONDS.fullmatch(end) and float(start) < float(end)):
        raise ReaderError(f"start and end are {start!r} and {end!r}; need seconds with start < end")
    label_ids = [label.strip() for label in cells[3].split(",")]
    if unknown := [label for label in label_ids if label not in classes.names]:
        raise ReaderError(f"no class has the id {unknown[0]!r}")
    return _Segment(video_id, float(start), float(end), label_ids)


class _Counts:
    """What the head of a list states, and what its rows amount to."""

    def __init__(self, url: str):
        self._url = url
        self._stated: dict[str, int] = {}
        self._segments = self._videos = self._labels = 0
        self._known: set[str] = set()
        self._last = ""

    def without_head(self, lines: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """The rows; what the lines with '#' before them state is noted."""
        for where, line in lines:
            if line.startswith("#"):
                self._stated |= {name: int(count) for name, count in _COUNT.findall(line)}
            elif not line.startswith("YTID,"):
                yield where, line

    def add(self, segment: _Segment) -> None:
        """Count a row."""
        self._segments += 1
        # The lists are sorted by id: without a set of two million, a video counts where it differs from the one before.
        self._videos += segment.video_id != self._last
        self._last = segment.video_id
        self._labels += len(segment.label_ids)
        self._known.update(segment.label_ids)

    def check(self, set_aside: int) -> None:
        """ReaderError where the rows are not those that the head states; only their number can be told where some were set aside."""
        found = {"num_segs": self._segments + set_aside}
        if not set_aside:
            found |= {"num_ytids": self._videos, "num_unique_labels": len(self._known), "num_positive_labels": self._labels}
        for name, count in found.items():
            if self._stated.get(name, count) != count:
                aside = f" ({set_aside:,} of them set aside)" if set_aside else ""
                raise ReaderError(
                    f"{self._url}: its head states {name}={self._stated[name]}, its rows make {count}{aside}: the list was cut short "
                    "or edited; fetch it again, or delete the line with the counts from a list that you shortened yourself"
                )
