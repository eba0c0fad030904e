"""The clips of one line of Panda-70M, whose cells are Python lists with an entry per clip."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Sequence
from typing import Any

from data_prep.manifest import ManifestRow
from data_prep.readers.literals import parse_list, parse_numbers, parse_strings
from data_prep.youtube import youtube_url

_TIME = re.compile(r"(\d{1,2}):([0-5]?\d):([0-5]?\d(?:\.\d{1,6})?)", re.ASCII)
_Entry = tuple[float, float, str, float, str | None, list[list[float]] | None]
"""Start and end in the video (s), caption, matching score, class, shots (start and end in the clip, s)."""
_BETWEEN_TIMES, _BETWEEN_PAIRS, _BETWEEN_CLIPS = "', '", "'], ['", "']], [['"


def parse_clips(video_id: str, split: str, lists: Sequence[str | None]) -> tuple[list[ManifestRow], list[str]]:
    """Rows of a video's clips, with its address on YouTube, and what is wrong with those that are malformed.

    `lists` are the cells of times, captions, scores, classes and shots; None where the file has no such column.
    ValueError where one holds no list, or where they differ in length.
    """
    try:
        source = youtube_url(video_id)
        return [_row(video_id, split, source, index, *entry) for index, entry in enumerate(plain_entries(*lists))], []
    except (KeyError, ValueError):
        return _unusual_clips(video_id, split, lists)


def plain_entries(times: str, captions: str, scores: str, kinds: str | None, shots: str | None) -> list[_Entry]:
    """The entries of each clip of a line whose times are in the data set's own form; KeyError or ValueError for any other.

    What is split off as a time fails at its look-up if it is none, so that nothing else can hide between the quotes.
    """
    spans = _inside(times, 2).split(_BETWEEN_PAIRS)
    missing = [None] * len(spans)
    columns = (
        parse_strings(captions),
        parse_numbers(scores),
        missing if kinds is None else parse_strings(kinds),
        missing if shots is None else _inside(shots, 3).split(_BETWEEN_CLIPS),
    )
    entries = []
    for span, caption, score, kind, shot in zip(spans, *columns, strict=True):
        start, end = span.split(_BETWEEN_TIMES)
        entries.append((_SECONDS[start], _SECONDS[end], caption, score, kind, None if shot is None else _plain_shots(shot)))
    return entries


def _row(
    video_id: str, split: str, source: str, index: int, start: float, end: float, caption: str, score: float, kind: str | None, shots: Any
) -> ManifestRow:
    extra = {"video_id": video_id, "clip": index, "matching_score": score}
    if kind is not None:
        extra["desirable"] = kind
    if shots is not None:
        extra["shots"] = shots
    key = f"panda70m_{video_id}_{round(start * 1000)}"
    return ManifestRow(key=key, dataset="panda70m", split=split, source=source, start=start, end=end, caption=caption, extra=extra)


class _Seconds(dict[str, float]):
    """Seconds of "H:MM:SS.mmm"; KeyError for any other text. Times are those of frames, so that most of them come again and again."""

    _FORM = re.compile(r"(\d{1,2}):([0-5]\d):([0-5]\d\.\d{3})", re.ASCII)
    _MOST = 1 << 17  # some 20 MB

    def __missing__(self, text: str) -> float:
        if not (found := self._FORM.fullmatch(text)):
            raise KeyError(text)
        value = _seconds(*found.groups())
        if len(self) < self._MOST:
            self[text] = value
        return value


_SECONDS = _Seconds()


def _plain_shots(text: str) -> list[list[float]]:
    """Start and end of each shot of a clip."""
    shots = []
    for pair in text.split(_BETWEEN_PAIRS):
        start, end = pair.split(_BETWEEN_TIMES)
        shots.append([_SECONDS[start], _SECONDS[end]])
    return shots


def _inside(cell: str, depth: int) -> str:
    """What lies between the outermost quotes of a list of such depth."""
    if not (cell.startswith("[" * depth + "'") and cell.endswith("'" + "]" * depth)):
        raise ValueError
    return cell[depth + 1 : -depth - 1]


def _unusual_clips(video_id: str, split: str, lists: Sequence[str | None]) -> tuple[list[ManifestRow], list[str]]:
    """The clips of any line, each looked at by itself."""
    parsed = [None if cell is None else parse_list(cell) for cell in lists]
    sizes = [len(values) for values in parsed if values is not None]
    if len(set(sizes)) != 1:
        raise ValueError(f"lists of {', '.join(map(str, sizes))} entries: each needs one per clip")
    columns = ([None] * sizes[0] if values is None else values for values in parsed)
    rows, faults = [], []
    for index, (times, caption, score, kind, shots) in enumerate(zip(*columns, strict=True)):
        try:
            _check(caption, score, kind)
            shots = None if shots is None else _shots(shots)
            rows.append(_row(video_id, split, youtube_url(video_id), index, *_span(times), caption, score, kind, shots))
        except ValueError as error:
            faults.append(f"clip {index}: {error}")
    return rows, faults


def _check(caption: Any, score: Any, kind: Any) -> None:
    if not isinstance(caption, str):
        raise ValueError(f"caption {reprlib.repr(caption)} is no text")
    if type(score) not in (int, float) or not abs(score) < math.inf:
        raise ValueError(f"matching_score {reprlib.repr(score)} is no number")
    if not isinstance(kind, (str, type(None))):
        raise ValueError(f"desirable_filtering {reprlib.repr(kind)} is no text")


def _shots(shots: Any) -> list[list[float]]:
    if not isinstance(shots, list):
        raise ValueError(f"shot_boundary_detection {reprlib.repr(shots)} is no list")
    if shots and isinstance(shots[0], str):  # the only shot, without the list around it
        shots = [shots]
    return [list(_span(shot)) for shot in shots]


def _span(pair: Any) -> tuple[float, float]:
    """Both times of a pair, seconds."""
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise ValueError(f"{reprlib.repr(pair)} is no pair of times")
    return _time(pair[0]), _time(pair[1])


def _time(text: Any) -> float:
    found = _TIME.fullmatch(text) if isinstance(text, str) else None
    if not found:
        raise ValueError(f"time {reprlib.repr(text)} is not of the form H:MM:SS.mmm")
    return _seconds(*found.groups())


def _seconds(hours: str, minutes: str, seconds: str) -> float:
    return round(3600 * int(hours) + 60 * int(minutes) + float(seconds), 3)
