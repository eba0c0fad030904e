"""Any folder of videos, with an optional CSV of captions, labels and times."""

from __future__ import annotations

import csv as csv_module
import hashlib
import io
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import fsspec.core
from fsspec.implementations.local import LocalFileSystem

from data_prep.manifest import ManifestRow, make_key, short_hash
from data_prep.media import ClipError, probe
from data_prep.remote.urls import without_credentials

VIDEO_EXTENSIONS = {
    "3gp", "asf", "avi", "flv", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "ogv", "ts", "vob", "webm", "wmv",
}  # fmt: skip
_COLUMNS = {"name": "name", "path": "name", "file": "name", "label": "labels", "labels": "labels"}
_COLUMNS |= {name: name for name in ("caption", "start", "end", "split")}


@dataclass(frozen=True)
class _Wish:
    """A piece of a file that is wanted, with what the CSV says about it."""

    name: str
    start: float = 0.0
    end: float | None = None
    labels: tuple[str, ...] = ()
    caption: str = ""
    split: str = ""
    extra: tuple[tuple[str, str], ...] = ()


def read_folder(
    root: str | os.PathLike[str],
    csv: str | os.PathLike[str] | None = None,
    dataset: str = "folder",
    heldout: float = 0.0,
    clip_seconds: float | None = None,
    min_seconds: float = 1.0,
) -> Iterator[ManifestRow]:
    """Rows for all videos below `root` (a local folder or an fsspec URL), in the order of their names.

    csv           a table with a header: name (or path) below `root`, and any of caption, labels (a;b), start, end (s), split;
                  other columns become `extra`. It decides which files are wanted; a file may have several lines.
    heldout       share of the files, chosen by a hash of their names, whose clips go to the split "heldout"; the others to "train".
    clip_seconds  cut files into consecutive clips of this length; a remainder is kept from `min_seconds` on.
    """
    _check(heldout, clip_seconds, min_seconds)
    root, names = _video_names(without_credentials(os.fspath(root)))
    if not names:
        raise ValueError(f"{root}: no videos here; files named *.{', *.'.join(sorted(VIDEO_EXTENSIONS))} count as videos")
    wishes = [_Wish(name) for name in names] if csv is None else list(_read_csv(os.fspath(csv), names))
    keys, away = _keys(dataset, names), _heldout({wish.name for wish in wishes}, heldout)
    given: Counter[str] = Counter()
    for wish in wishes:
        for piece in _pieces(wish, f"{root}/{wish.name}", clip_seconds, min_seconds):
            key = f"{keys[wish.name]}_{round(piece.start * 1000)}"
            given[key] += 1
            yield ManifestRow(
                key=key if given[key] == 1 else f"{key}-{given[key]}",  # two lines about the same moment of a file
                dataset=dataset,
                split=wish.split or ("heldout" if wish.name in away else "train"),
                source=f"{root}/{wish.name}",
                start=piece.start,
                end=piece.end,
                labels=list(wish.labels),
                caption=wish.caption,
                extra=dict(wish.extra),
            )


def _check(heldout: float, clip_seconds: float | None, min_seconds: float) -> None:
    if not 0 <= heldout < 1:
        raise ValueError(f"heldout is {heldout}: choose a share of the files from 0 to below 1")
    if clip_seconds is not None and not clip_seconds > 0:
        raise ValueError(f"clip_seconds is {clip_seconds}: choose a length above 0, or None for whole files")
    if min_seconds < 0:
        raise ValueError(f"min_seconds is {min_seconds}: choose a length of 0 or more")


def _video_names(root: str) -> tuple[str, list[str]]:
    """The root as sources are to begin with, and the sorted paths of the videos below it."""
    filesystem, path = fsspec.core.url_to_fs(root)
    path = path.rstrip("/")
    if not filesystem.isdir(path):
        raise ValueError(f"{root}: no such folder")
    found = (name[len(path) :].lstrip("/") for name in filesystem.find(path))
    names = sorted(name for name in found if _is_video(PurePosixPath(name)))
    # Absolute: shards may be written from another working directory.
    return (path if isinstance(filesystem, LocalFileSystem) else root.rstrip("/")), names


def _is_video(path: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix.lower().lstrip(".") in VIDEO_EXTENSIONS


def _keys(dataset: str, names: list[str]) -> dict[str, str]:
    """A key for each file, its path made safe; files that would share one get a hash of their path as well."""
    plain = {name: make_key(f"{dataset}_{PurePosixPath(name).with_suffix('')}")[:48] for name in names}
    count = Counter(plain.values())
    return {name: key if count[key] == 1 else f"{key}-{short_hash(name)}" for name, key in plain.items()}


def _heldout(names: set[str], share: float) -> set[str]:
    """The names whose hash, as a number in [0, 1), lies below `share`; of two names or more always one, never all."""
    if not share:
        return set()
    place = {name: int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64 for name in names}
    order = sorted(names, key=lambda name: (place[name], name))
    count = sum(value < share for value in place.values())
    return set(order[: min(max(count, 1), len(order) - 1)])


def _pieces(wish: _Wish, source: str, clip_seconds: float | None, min_seconds: float) -> Iterator[_Wish]:
    if clip_seconds is None:
        yield wish
        return
    try:
        length = probe(source).duration
    except ClipError:
        length = 0.0
    end = length if wish.end is None else min(wish.end, length)
    start = wish.start
    # A microsecond of tolerance: sums of decimal fractions are never exact.
    while end - start > min(clip_seconds, max(min_seconds, 1e-3)) - 1e-6:
        stop = round(min(start + clip_seconds, end), 6)
        yield replace(wish, start=start, end=stop)
        start = stop
    if start == wish.start:
        yield wish  # broken or too short: its row fails with the reason when the shards are written, instead of vanishing here


def _read_csv(url: str, names: list[str]) -> Iterator[_Wish]:
    try:
        with fsspec.open(url, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ValueError(f"{url}: cannot be read as a CSV in UTF-8: {error}") from error
    lines = csv_module.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    columns = _header(url, next(lines, []))
    known = _known(names)
    for cells in lines:
        if any(cell.strip() for cell in cells):
            yield _wish(f"{url}:{lines.line_num}", columns, [cell.strip() for cell in cells], known)


def _header(url: str, cells: list[str]) -> list[str]:
    columns = [_COLUMNS.get(cell.strip().lower(), cell.strip()) for cell in cells]
    if columns.count("name") != 1:
        raise ValueError(f"{url}:1: the header must name one column 'name' or 'path', found {', '.join(cells) or 'nothing'}")
    if twice := [column for column, count in Counter(columns).items() if count > 1]:
        raise ValueError(f"{url}:1: more than one column for {twice[0]!r}")
    return columns


def _known(names: list[str]) -> dict[str, set[str]]:
    """What a file may be called: its path, with or without extension, or its last part alone."""
    known: dict[str, set[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        for alias in {name, str(path.with_suffix("")), path.name, path.stem}:
            known.setdefault(alias, set()).add(name)
    return known | {name: {name} for name in names}


def _wish(where: str, columns: list[str], cells: list[str], known: dict[str, set[str]]) -> _Wish:
    if len(cells) != len(columns):
        raise ValueError(f"{where}: {len(cells)} cells under a header of {len(columns)}; quote texts that hold commas")
    row = dict(zip(columns, cells, strict=True))
    files = sorted(known.get(row["name"].removeprefix("./"), ()))
    if len(files) != 1:
        problem = f"may be any of {', '.join(files)}; give the path" if files else "is no video below the folder"
        raise ValueError(f"{where}: {row['name']!r} {problem}")
    start, end = _seconds(where, "start", row) or 0.0, _seconds(where, "end", row)
    if end is not None and end <= start:
        raise ValueError(f"{where}: end {end:g} is not after start {start:g}")
    labels = tuple(label.strip() for label in row.get("labels", "").split(";") if label.strip())
    extra = tuple((name, text) for name, text in row.items() if name not in _COLUMNS.values())
    return _Wish(files[0], start, end, labels, row.get("caption", ""), row.get("split", ""), extra)


def _seconds(where: str, column: str, row: dict[str, str]) -> float | None:
    text = row.get(column, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{where}: {column} {text!r} is no number of seconds, 0 or more")
    return value
