"""Any video files below a folder, with or without a table of captions and times."""

from __future__ import annotations

import csv as csv_module
import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath

import fsspec

from data_prep.manifest import ManifestError, ManifestRow, make_key
from data_prep.media import ClipError, probe

SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp"}
COLUMNS = ("name", "caption", "label", "start", "end", "split")


def read_folder(root: str | os.PathLike, csv: str | None = None, dataset: str = "folder", heldout: float = 0.0,
                clip_seconds: float | None = None) -> Iterator[ManifestRow]:
    """Rows for the video files below `root` (a path or an fsspec URL), in the order of their names.

    csv: table with a header and any of the columns name, caption, label (several separated by `;`), start, end, split; only the files
    it names are taken, several rows may name one file. clip_seconds: cut each file into consecutive clips of that length.
    heldout: share of the files (not clips: clips of one file must not meet in both) that go to the split `heldout`.
    Raises ManifestError naming the file, or the table's line.
    """
    files = _video_files(os.fspath(root))
    if not files:
        raise ManifestError(f"{root}: no video files ({', '.join(sorted(SUFFIXES))}) below this folder")
    kept_out = _heldout(sorted(files), heldout)
    rows = _listed(files, csv, dataset) if csv else (ManifestRow(key=make_key(_stem(name)), source=files[name], dataset=dataset) for name in files)
    names = {source: name for name, source in files.items()}
    for row in rows:
        if names[row.source] in kept_out and row.split == "train":
            row = replace(row, split="heldout")
        yield from _cut(row, clip_seconds) if clip_seconds else (row,)


def _video_files(root: str) -> dict[str, str]:
    """Relative name -> path or URL."""
    filesystem, path = fsspec.core.url_to_fs(root)
    if not filesystem.isdir(path):
        raise ManifestError(f"{root}: no such folder")
    found = sorted(name for name in filesystem.find(path) if PurePosixPath(name).suffix.lower() in SUFFIXES)
    return {name[len(path):].strip("/"): filesystem.unstrip_protocol(name).removeprefix("file://") for name in found}


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _heldout(names: list[str], share: float) -> set[str]:
    """A stable choice by hash: adding files later does not move the old ones between splits, but for the least hash of a small set."""
    if not 0 <= share < 1:
        raise ManifestError(f"heldout is {share}: give a share of at least 0 and below 1")
    rank = {name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in names}
    chosen = {name for name in names if rank[name] < share}
    if share and not chosen and len(names) > 1:
        chosen = {min(names, key=rank.get)}
    return chosen if len(chosen) < len(names) else chosen - {max(names, key=rank.get)}


def _listed(files: dict[str, str], csv: str, dataset: str) -> Iterator[ManifestRow]:
    with fsspec.open(csv, "rt", encoding="utf-8-sig", newline="") as file:
        table = csv_module.DictReader(io.StringIO(file.read()), skipinitialspace=True)
    unknown = sorted(set(table.fieldnames or ()) - set(COLUMNS))
    if "name" not in (table.fieldnames or ()) or unknown:
        raise ManifestError(f"{csv}: the header must hold `name` and may hold {', '.join(COLUMNS[1:])}; found {', '.join(table.fieldnames or ['nothing'])}")
    by_stem = {_stem(name): name for name in files} | {name: name for name in files}
    for record in table:
        name = by_stem.get(record["name"])
        if name is None:
            raise ManifestError(f"{csv}, line {table.line_num}: no video file {record['name']!r} in the folder")
        start, end = (_seconds(record.get(column), csv, table.line_num, column) for column in ("start", "end"))
        key = make_key(_stem(name)) + (f"_{round(start * 1000)}" if start is not None else "")
        labels = [label.strip() for label in (record.get("label") or "").split(";") if label.strip()]
        yield ManifestRow(key=key, source=files[name], dataset=dataset, split=record.get("split") or "train", start=start or 0.0, end=end,
                          labels=labels, caption=record.get("caption") or "")


def _seconds(text: str | None, csv: str, line: int, column: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        raise ManifestError(f"{csv}, line {line}: {column} is {text!r}: give seconds") from None


def _cut(row: ManifestRow, seconds: float) -> Iterator[ManifestRow]:
    """Consecutive clips of a row; a rest of less than half a clip is left out."""
    try:
        duration = probe(row.source).duration
    except ClipError:
        # The shard's sidecar is where a bad file is reported, with its reason.
        yield row
        return
    stop = min(row.end or duration, duration)
    for number in range(max(1, int((stop - row.start) / seconds + 0.5))):
        start = row.start + number * seconds
        yield replace(row, key=f"{row.key}_{round(start * 1000)}", start=start, end=min(start + seconds, stop) if stop > start else None)
