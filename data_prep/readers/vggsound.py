"""VGGSound (`vggsound.csv`) and VGG-SS, its test clips with boxes around what sounds (`vggss.json`)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from data_prep.manifest import ManifestRow
from data_prep.readers.lines import read_json_list, read_lines, split_cells
from data_prep.readers.locate import locate_rows
from data_prep.readers.rejects import ReaderError, Rejects
from data_prep.youtube import is_video_id

CLIP_SECONDS = 10
PATTERNS = (
    "{id}_{start:06d}.mp4", "{split}/{id}_{start:06d}.mp4", "video/{id}_{start:06d}.mp4", "{id}_{start_ms}_{end_ms}.mp4",
    "{id}.mp4", "{id}.mkv", "{id}.webm",
)  # fmt: skip
"""Names in use: cut files, then whole videos."""
_SECONDS = re.compile(r"[0-9]{1,6}")
_FILE = re.compile(r"(.{11})_([0-9]{1,6})(\.[A-Za-z0-9]+)?")


class _Clip(NamedTuple):
    video_id: str
    start: int
    label: str
    split: str
    extra: dict[str, Any]


def read_vggsound(
    csv: str | os.PathLike[str],
    media: str | os.PathLike[str] | None = None,
    *,
    patterns: Sequence[str] | None = None,
    rejects: Rejects | None = None,
) -> Iterator[ManifestRow]:
    """Rows for the clips of `vggsound.csv` (id, start, label, split; without a header), in its order.

    media     root of the files, found by `patterns` (fields id, split, start, start_ms, end_ms); None for addresses on YouTube.
    rejects   takes the malformed rows. Clips that come twice are passed on: `write_manifest` sets repeated keys aside.
    """
    rejects = rejects or Rejects()
    yield from _rows("vggsound", rejects.sift(_without_header(read_lines(csv)), _parse), media, patterns)
    rejects.finish()


def read_vggss(
    json: str | os.PathLike[str],
    media: str | os.PathLike[str] | None = None,
    *,
    split: str = "test",
    patterns: Sequence[str] | None = None,
    rejects: Rejects | None = None,
) -> Iterator[ManifestRow]:
    """Rows for the clips of `vggss.json`, all of `split`: VGG-SS is a part of VGGSound's test split, on which AVP-RPO trains.

    `extra["bbox"]` holds the boxes (left, top, right, bottom, as shares of the picture). The rest is as in `read_vggsound`.
    """
    rejects = rejects or Rejects()
    items = read_json_list(json, "objects with file, class and bbox, as vggss.json is")
    clips = (clip._replace(split=split) for clip in rejects.sift(items, _parse_object))
    yield from _rows("vggss", clips, media, patterns)
    rejects.finish()


def _rows(
    dataset: str, clips: Iterable[_Clip], media: str | os.PathLike[str] | None, patterns: Sequence[str] | None
) -> Iterator[ManifestRow]:
    for located, clip in locate_rows(((_fields(clip), clip) for clip in clips), media, patterns or PATTERNS):
        yield ManifestRow(
            key=f"{dataset}_{clip.video_id}_{clip.start * 1000}",
            dataset=dataset,
            split=clip.split,
            source=located.source,
            **located.span(clip.start, clip.start + CLIP_SECONDS),
            labels=[clip.label],
            extra={"video_id": clip.video_id} | clip.extra,
        )


def _fields(clip: _Clip) -> dict[str, Any]:
    end = clip.start + CLIP_SECONDS
    return {"id": clip.video_id, "split": clip.split, "start": clip.start, "start_ms": clip.start * 1000, "end_ms": end * 1000}


def _without_header(lines: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The lines less a header that somebody added; the published list has none, its first line is a clip."""
    for number, (where, line) in enumerate(lines):
        if number or not _is_header(line):
            yield where, line


def _is_header(line: str) -> bool:
    cells = [cell.strip().lower() for cell in line.split(",")]
    return len(cells) == 4 and not _SECONDS.fullmatch(cells[1]) and ("label" in cells[2] or "split" in cells[3])


def _parse(line: str) -> _Clip:
    cells = [cell.strip() for cell in split_cells(line)]
    if len(cells) != 4:
        raise ReaderError(f"{len(cells)} cells, four are expected: id, start, label (quoted where it holds a comma), split")
    video_id, start, label, split = cells
    if split not in ("train", "test"):
        raise ReaderError(f"split {split!r} is neither train nor test")
    return _clip(video_id, start, label, split, {})


def _clip(video_id: str, start: str, label: str, split: str, extra: dict[str, Any]) -> _Clip:
    if not is_video_id(video_id):
        raise ReaderError(f"id {video_id!r} is not that of a video: 11 letters, digits, '-' or '_'")
    if not _SECONDS.fullmatch(start):
        raise ReaderError(f"start {start!r} is no whole number of seconds")
    if not label:
        raise ReaderError("the label is empty")
    return _Clip(video_id, int(start), label, split, extra)


def _parse_object(item: Any) -> _Clip:
    if not (isinstance(item, dict) and isinstance(item.get("file"), str) and isinstance(item.get("class"), str)):
        raise ReaderError("is no object with the texts file and class")
    if not (match := _FILE.fullmatch(item["file"])):
        raise ReaderError(f"file {item['file']!r} is not of the form ID_SECONDS")
    boxes = item.get("bbox", [])
    if not (isinstance(boxes, list) and all(_is_box(box) for box in boxes)):
        raise ReaderError(f"bbox {str(boxes)[:80]} is no list of boxes of four numbers")
    return _clip(match[1], match[2], item["class"].strip(), "test", {"bbox": boxes})


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) and math.isfinite(side) for side in box)
